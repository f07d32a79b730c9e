"""Read the PROXY protocol header in front of a connection, before TLS and HTTP.

A proxy states the client's address in it. Both versions: https://www.haproxy.org/download/3.2/doc/
proxy-protocol.txt. Knows no HTTP.
"""

import asyncio
import ipaddress
from collections.abc import Callable
from typing import Protocol, cast

from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.wire.http_connections import HttpConnections

START_V1 = b"PROXY "
START_V2 = b"\r\n\r\n\x00\r\nQUIT\n"

MAX_V1_BYTES = 107
"""Maximum length of a header of version 1 with its line end (section 2.1)."""

HEAD_V2_BYTES = 16
MAX_V2_BYTES = HEAD_V2_BYTES + 4096
"""Version 2 allows 64 KiB. Proxies use a few hundred bytes, for extensions that the relay skips."""

LOCAL, PROXY = 0x20, 0x21
"""Version 2 with the command: a connection of the proxy itself, or one of a client."""

SOURCES = {0x11: (4, 12), 0x21: (16, 36)}
"""TCP over IPv4 and IPv6: the bytes of one address, and of both with their ports."""

WITHOUT_ADDRESS = (0x00, 0x31)
"""Unspecified, and Unix sockets."""

MAX_PORT = 65_535

Address = tuple[str, int]


class ProxyHeaderError(Exception):
    """The bytes are not a PROXY protocol header."""


def parse_header(received: bytes) -> tuple[Address | None, int] | None:
    """Parse the header at the start of a connection.

    Returns:
        The address of the client, and the length of the header; None while it is incomplete. The
        address is None if the header has none: then that of the connection itself is meant.

    Raises:
        ProxyHeaderError: there is no valid header.
    """
    for start, parse in ((START_V1, _parse_v1), (START_V2, _parse_v2)):
        if received.startswith(start):
            try:
                return parse(received)
            except ValueError as error:
                raise ProxyHeaderError(str(error)) from None
        if start.startswith(received):
            return None
    raise ProxyHeaderError("no header")


def _parse_v1(received: bytes) -> tuple[Address | None, int] | None:
    end = received.find(b"\r\n", 0, MAX_V1_BYTES)
    if end < 0:
        if len(received) >= MAX_V1_BYTES:
            raise ValueError("too long")
        return None
    match received[:end].decode("ascii").split(" "):
        case ["PROXY", "UNKNOWN", *_]:
            return None, end + 2
        case ["PROXY", "TCP4" | "TCP6" as family, source, target, source_port, target_port]:
            version = int(family[-1])
            for address in (source, target):
                if ipaddress.ip_address(address).version != version or "%" in address:
                    raise ValueError("invalid address")
            _port(target_port)
            return (source, _port(source_port)), end + 2
    raise ValueError("invalid line")


def _port(text: str) -> int:
    if not (text.isdecimal() and text.isascii() and int(text) <= MAX_PORT):
        raise ValueError("invalid port")
    return int(text)


def _parse_v2(received: bytes) -> tuple[Address | None, int] | None:
    if len(received) < HEAD_V2_BYTES:
        return None
    command, family = received[12], received[13]
    end = HEAD_V2_BYTES + int.from_bytes(received[14:16], "big")
    if command not in (LOCAL, PROXY) or end > MAX_V2_BYTES:
        raise ValueError("invalid head")
    if len(received) < end:
        return None
    if command == LOCAL or family in WITHOUT_ADDRESS:
        return None, end
    if family not in SOURCES or end - HEAD_V2_BYTES < SOURCES[family][1]:
        raise ValueError("invalid addresses")
    size = SOURCES[family][0]
    addresses = received[HEAD_V2_BYTES:end]
    port = int.from_bytes(addresses[2 * size : 2 * size + 2], "big")
    return (str(ipaddress.ip_address(addresses[:size])), port), end


class PeerProtocol(Protocol):
    """The protocol that reports the client's address to the application."""

    peer: Address | None
    """The address in place of that of the connection."""


class ProxyHeader(asyncio.Protocol):
    """A TCP connection until its header is complete; then another protocol takes it over.

    Args:
        http: is given the client's address.
        following: takes over the connection.
        http_connections: counts the connection until the header is complete.
        deadline_at: the connection is aborted at this time, by the event loop's clock.
        is_expected: returns whether the peer sends a header; another peer's first byte is not one.
    """

    def __init__(
        self,
        http: PeerProtocol,
        following: asyncio.Protocol,
        http_connections: HttpConnections,
        deadline_at: float,
        is_expected: Callable[[asyncio.BaseTransport], bool],
    ) -> None:
        self._http = http
        self._following = following
        self._http_connections = http_connections
        self._deadline_at = deadline_at
        self._is_expected = is_expected
        self._received = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the header."""
        self._transport = cast(asyncio.Transport, transport)
        if not self._is_expected(transport):
            self._pass_on(None)
            return
        if (error := self._http_connections.register(self)) is not None:
            self.evict(error)
            return
        self._timer = asyncio.get_running_loop().call_at(
            self._deadline_at, self.evict, RefusedError(Refusal.HANDSHAKE_TIMEOUT)
        )

    def data_received(self, data: bytes) -> None:
        """Parse the header; pass the connection on when it is complete."""
        if self._transport.is_closing():
            return
        self._received += data
        try:
            header = parse_header(self._received)
        except ProxyHeaderError:
            self.evict(RefusedError(Refusal.INVALID_PROXY_HEADER))
            return
        if header is None:
            return
        self._stop_counting()
        client, size = header
        self._pass_on(client)
        if size < len(self._received) and not self._transport.is_closing():
            self._following.data_received(self._received[size:])

    def _pass_on(self, client: Address | None) -> None:
        if client is not None:
            self._http.peer = client
        self._transport.set_protocol(self._following)
        self._following.connection_made(self._transport)

    def connection_lost(self, error: Exception | None) -> None:
        """Remove the connection from the count."""
        self._stop_counting()

    def _stop_counting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._http_connections.unregister(self)

    def is_request_arriving(self) -> bool:
        """Return False: there is no request before the header is complete."""
        return False

    def evict(self, error: RefusedError) -> None:
        """Abort the connection. The proxy expects no response before its request."""
        self._http_connections.record_refusal(error)
        self._transport.abort()
