"""Channels and what happens in them. Knows no FastAPI and no broker's library."""
