"""Run the relay: two ports in one event loop, signals, the shutdown."""
