"""Admit or refuse clients: origins, tokens, permissions, limits. Knows no HTTP framework."""
