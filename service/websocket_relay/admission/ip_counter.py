"""Count clients by the address they come from. Knows no connection."""

import ipaddress

UNKNOWN = "unknown"
"""What stands for everything that is no address: a trusted proxy may forward anything. All of it
counts as one address."""

SITE_BITS = 64
"""Of an IPv6 address: a site has at least 2^64 addresses (RFC 6177), so one says nothing."""


class IpCounter:
    """How many clients there are from each address.

    Args:
        limit: clients at a time from one address, or one IPv6 /64.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._clients: dict[str, int] = {}

    def __len__(self) -> int:
        """From how many addresses there are clients."""
        return len(self._clients)

    def has_room(self, network: str) -> bool:
        """Tell whether one more client may come from there."""
        return self._clients.get(network, 0) < self._limit

    def enter(self, network: str) -> None:
        """Count a client in."""
        self._clients[network] = self._clients.get(network, 0) + 1

    def leave(self, network: str) -> None:
        """Count a client out."""
        left = self._clients[network] - 1
        if left:
            self._clients[network] = left
        else:
            del self._clients[network]


def network_of(host: str | None) -> str:
    """Return under what a client with this address is counted."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return UNKNOWN
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address), SITE_BITS), strict=False))
