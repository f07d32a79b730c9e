"""The log that gives messages one order. Knows no client."""
