"""Reads prompts in chunks and hands their KV cache to decode workers."""
