"""Count clients by IP address, and by user. Knows no connection."""

import ipaddress
from functools import lru_cache

UNKNOWN = "unknown"
"""The key for every value that is not an IP address, because a trusted proxy may forward anything.
All such clients count as one address."""

SITE_BITS = 64
"""Prefix length under which IPv6 clients are counted. A site has at least 2^64 addresses (RFC
6177), so a single address does not identify a client."""


class ClientCounter:
    """The number of clients by a key: a network, or a user.

    Args:
        limit: maximum number of concurrent clients with one key.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._clients: dict[str, int] = {}

    def __len__(self) -> int:
        """Return the number of keys with at least one client."""
        return len(self._clients)

    def is_below_limit(self, key: str) -> bool:
        """Return whether a key is below the limit."""
        return self._clients.get(key, 0) < self.limit

    def add_client(self, key: str) -> None:
        """Add a client."""
        self._clients[key] = self._clients.get(key, 0) + 1

    def remove_client(self, key: str) -> None:
        """Remove a client."""
        remaining = self._clients[key] - 1
        if remaining:
            self._clients[key] = remaining
        else:
            del self._clients[key]


@lru_cache(maxsize=1024)  # behind a proxy, or in a storm, the same addresses return
def network_key(host: str | None) -> str:
    """Return the key under which a client with this address is counted."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return UNKNOWN
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address), SITE_BITS), strict=False))
