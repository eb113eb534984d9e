"""What the three roles share: wire, configuration, KV blocks, engine, transports, client."""
