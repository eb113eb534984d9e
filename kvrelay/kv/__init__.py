"""The paged KV cache: layout, block ledger, pool memory."""
