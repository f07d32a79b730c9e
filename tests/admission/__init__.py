"""Who comes in, and who is refused: the handshake, tokens, keys, limits."""
