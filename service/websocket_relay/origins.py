"""Bring allowed origins into the form that browsers send, and match Origin headers with them.

Knows no setting and no connection.
"""

import ipaddress
import re
from collections.abc import Iterable

import idna

ANY_ORIGIN = "*"

LITERALS = frozenset({ANY_ORIGIN, "null", "file://"})
"""Browsers send `null` for sandboxed pages, and `null` or `file://` for pages from a file."""

FORM = "scheme://host[:port] without a path, or *"

PATTERN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<wildcard>\*\.)?(?P<host>\*|\[[^]]*\]|[^\s/?#@:*%\\\[\]]+)"
    r"(?::(?P<port>\*|[0-9]{1,5}))?"
)
DOMAIN = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")

DEFAULT_PORTS = {"http": ":80", "https": ":443"}
PAGE_SCHEMES = {"ws": "http", "wss": "https"}


class AllowedOrigins:
    """The origins that are admitted: those in the settings, and the relay's own.

    Args:
        patterns: as `normalize_pattern` returns them.

    Attributes:
        expression: matches an origin as browsers send it; None: all origins are admitted.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        unique = dict.fromkeys(patterns)
        self.expression = None if ANY_ORIGIN in unique else "|".join(map(_expression, unique))
        self._compiled = re.compile(self.expression or "")

    def admit(self, origin: str, scheme: str, host: str) -> bool:
        """Return whether a request is admitted.

        Args:
            origin: its Origin header.
            scheme: of the request as the client sent it: http, https, ws or wss.
            host: its Host header; a page of the relay itself has this origin.
        """
        if self.expression is None:
            return True
        sent = _page_origin(origin)
        return bool(self._compiled.fullmatch(sent)) or sent == _page_origin(f"{scheme}://{host}")


def normalize_pattern(text: str) -> str:
    """Return an allowed origin in the form that browsers send.

    `*.` at the start of the host stands for one or more labels, `*` for any host or any port.

    Raises:
        ValueError: it can match no origin; the text states the allowed form.
    """
    lowered = text.lower()
    if lowered in LITERALS:
        return lowered
    match = PATTERN.fullmatch(lowered)
    if match is None:
        raise ValueError(f"an origin is {FORM}")
    scheme, wildcard, host, port = match.groups()
    if scheme in PAGE_SCHEMES:
        raise ValueError(f"an origin is that of the page: {PAGE_SCHEMES[scheme]}://, not {scheme}")
    if scheme == "file":
        raise ValueError("pages from a file have the origin file:// or null")
    if scheme in DEFAULT_PORTS and host != "*":
        host = _browser_host(host, is_suffix=bool(wildcard))
    if port is not None and port != "*":
        if not 0 < int(port) < 65_536:
            raise ValueError("a port is a number from 1 to 65535, or *")
        port = str(int(port))
    origin = f"{scheme}://{wildcard or ''}{host}" + (f":{port}" if port is not None else "")
    return origin.removesuffix(DEFAULT_PORTS.get(scheme, ""))


def _browser_host(host: str, *, is_suffix: bool) -> str:
    """Return a host as browsers write it (URL standard, section 3.5)."""
    is_address = host.startswith("[") or host.rstrip(".").rpartition(".")[2].isdecimal()
    try:
        if host.startswith("["):
            host = f"[{ipaddress.IPv6Address(host[1:-1])}]"
        elif is_address:
            host = str(ipaddress.IPv4Address(host))
        elif not DOMAIN.fullmatch(host):
            host = idna.encode(host, uts46=True).decode()
    except ValueError:  # idna.IDNAError is a subclass
        raise ValueError(f"{host} is not a host name or an IP address") from None
    if is_address and is_suffix:
        raise ValueError("an IP address has no subdomains")
    return host


def _expression(pattern: str) -> str:
    escaped = re.escape(pattern)
    any_host = r"(?:\[[0-9a-f:.]+\]|[^/:@\[\]]+)"  # in brackets: IPv6
    return escaped.replace(r"://\*", f"://{any_host}").replace(r":\*", "(?::[0-9]+)?")


def _page_origin(origin: str) -> str:
    """Return an origin without a default port, and with the scheme of pages.

    Clients other than browsers send both: React Native on Android sends the port of its URL.
    """
    scheme, separator, authority = origin.lower().partition("://")
    scheme = PAGE_SCHEMES.get(scheme, scheme)
    return f"{scheme}{separator}{authority.removesuffix(DEFAULT_PORTS.get(scheme, ''))}"
