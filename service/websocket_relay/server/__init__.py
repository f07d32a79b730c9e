"""Run the relay: both ports in one event loop, signals, shutdown."""
