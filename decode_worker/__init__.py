"""Receives KV caches and writes answers, token by token, with continuous batching."""
