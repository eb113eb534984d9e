"""Runs a transformers model over a paged KV pool."""
