"""Clients in a real browser: relay.js, the console, and EventSource."""
