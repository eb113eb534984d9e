"""What the three roles share: wire contract, configuration, KV blocks, engine, transports, client."""
