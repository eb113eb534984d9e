"""The front door: checks requests, queues and places them, streams their tokens to clients."""
