"""The log of messages in memory, Redis and NATS, and several relays on one broker."""
