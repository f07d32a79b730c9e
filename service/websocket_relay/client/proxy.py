"""Choose the proxy of a connection from the environment. Knows no connection.

The variables are those of urllib and websockets: `https_proxy`, `http_proxy` (for ws:// only),
`socks_proxy` and `no_proxy`. In addition, `no_proxy` may contain networks (`127.0.0.0/8`).
"""

from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit
from urllib.request import getproxies

from websockets.proxy import get_proxy
from websockets.uri import parse_uri

LOOPBACK = "127.0.0.1"


def proxy_for(url: str) -> str | None:
    """Return the URL of the proxy for a relay; None: connect directly.

    Args:
        url: of the channel; valid.
    """
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):  # a host name, which no network contains
        address = ip_address(LOOPBACK if host == "localhost" else host)
        if any(address in network for network in _direct_networks()):
            return None
    return get_proxy(parse_uri(url))


def redacted(url: str) -> str:
    """Return a URL without user, password and query, which may contain a token."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _direct_networks() -> Iterator[IPv4Network | IPv6Network]:
    """Yield the addresses and networks of `no_proxy`."""
    for entry in getproxies().get("no", "").split(","):
        with suppress(ValueError):  # a host name
            yield ip_network(entry.strip().strip("[]"), strict=False)
