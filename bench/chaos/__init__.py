"""Break brokers, relays and connections at random, and check what clients observed."""
