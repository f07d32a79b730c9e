"""Channels as clients see them: names, order, history, slow consumers."""
