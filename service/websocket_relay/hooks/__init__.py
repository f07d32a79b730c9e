"""Webhooks: what happens in channels, delivered to a server of the operator."""
