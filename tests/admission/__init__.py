"""Admission of clients: handshake, tokens, keys, limits, file descriptors."""
