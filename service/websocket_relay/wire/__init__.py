"""Implement HTTP, RFC 6455 and server-sent events. Knows no channel and no settings file."""
