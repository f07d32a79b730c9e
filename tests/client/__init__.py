"""The Python client against real relays, and against servers that violate the protocol."""
