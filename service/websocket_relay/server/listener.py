"""Accept connections on the sockets of one port. Knows no settings and no signal."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, cast

from uvicorn import Config

from websocket_relay.app import Port
from websocket_relay.server.sockets import LISTEN_BACKLOG, ListeningAddress
from websocket_relay.wire.http_connections import STARTS_A_TURN
from websocket_relay.wire.http_protocol import HttpProtocol
from websocket_relay.wire.proxy_header import ProxyHeader
from websocket_relay.wire.tls_transport import TlsTransport

UNSENT_BYTES = 131_072
"""Bytes that the kernel buffers for a client beyond what TCP can send now (TCP_NOTSENT_LOWAT;
accepted sockets inherit it from the listening one). Without it each slow client fills up to 4 MB of
kernel memory before the relay notices that it lags, and then the relay sees progress only in steps
of a third of that."""

DATE_STEP_S = 1.0
"""The resolution of a Date field."""

FINISH_S = 0.1
"""Time for responses to plain requests to be sent when the ports close."""

UNIX_PEER = "unix"
"""The address of peers on a Unix socket, which have none. They are trusted as proxies: the
permissions of the socket decide who may connect."""

MAPPED_BITS = 96
"""Bits of prefix before the IPv4 address in an IPv4-mapped IPv6 address."""


@dataclass
class PortState:
    """What the connections of one port share: see `http_protocol.ServerState`."""

    connections: set[HttpProtocol] = field(default_factory=set)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    default_headers: list[tuple[bytes, bytes]] = field(default_factory=list)


class Listener:
    """The listening sockets of one port, and their connections.

    uvicorn's own server sets no deadline for TLS handshakes, exits the process if the port is in
    use, replaces the signal handlers, and closes all WebSockets at once.

    Args:
        port: what the port serves.
        sockets: the bound sockets.
        keepalive_timeout_s: seconds until an idle connection is closed.
        handshake_timeout_s: deadline of a TLS handshake, and of a PROXY protocol header.
        trusted_proxies: peers whose X-Forwarded-For and -Proto are trusted.
        proxy_protocol: whether these peers send a PROXY protocol header first.

    Attributes:
        server_state: the connections and the requests in flight.
    """

    def __init__(
        self,
        port: Port,
        sockets: Sequence[socket.socket],
        *,
        keepalive_timeout_s: float,
        handshake_timeout_s: float = 10,
        trusted_proxies: Sequence[str] = (),
        proxy_protocol: bool = False,
    ) -> None:
        trusted = [*trusted_proxies, *_mapped(trusted_proxies)]
        self._is_unix = sockets[0].family == socket.AF_UNIX
        self._config = Config(
            port.app,
            http=cast(Any, port.http),
            ws="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(trusted_proxies) or self._is_unix,
            forwarded_allow_ips=[*trusted, *([UNIX_PEER] if self._is_unix else [])],
            timeout_keep_alive=cast(int, keepalive_timeout_s),  # fractions work, too
        )
        self.server_state = PortState()
        self._servers: list[asyncio.AbstractServer] = []
        self._port = port
        self._sockets = sockets
        self._handshake_timeout_s = handshake_timeout_s
        self._proxy_networks = (
            [ipaddress.ip_network(proxy) for proxy in trusted] if proxy_protocol else None
        )

    @property
    def address(self) -> ListeningAddress:
        """Where clients on this machine, or a proxy, connect."""
        if self._is_unix:
            return ListeningAddress(self._sockets[0].getsockname(), None)
        names = [listening.getsockname() for listening in self._sockets]
        return ListeningAddress(", ".join(name[0] for name in names), names[0][1])

    async def listen(self) -> None:
        """Start to accept connections."""
        self._config.load()
        loop = asyncio.get_running_loop()
        for listening in self._sockets:
            create: Callable[..., Any] = loop.create_unix_server
            if not self._is_unix:
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
                create = loop.create_server
            self._servers.append(
                await create(self._protocol, sock=listening, backlog=LISTEN_BACKLOG)
            )

    async def run(self) -> None:
        """Keep the Date field of responses current, until cancelled."""
        while True:
            self.server_state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
            await asyncio.sleep(DATE_STEP_S)

    def _protocol(self) -> asyncio.Protocol:
        port = self._port
        http = port.http(config=self._config, server_state=self.server_state)
        if self._is_unix:
            http.peer = (UNIX_PEER, 0)
        if port.certificates is None and self._proxy_networks is None:
            return http
        deadline_at = asyncio.get_running_loop().time() + self._handshake_timeout_s
        following: asyncio.Protocol = http
        if (certificates := port.certificates) is not None:
            following = TlsTransport(
                http,
                port.http_connections,
                lambda: certificates.context,
                deadline_at,
                port.record_tls_failure,
            )
        if self._proxy_networks is None:
            return following
        return ProxyHeader(
            http, following, port.http_connections, deadline_at, self._sends_proxy_header
        )

    def _sends_proxy_header(self, transport: asyncio.BaseTransport) -> bool:
        assert self._proxy_networks is not None
        if self._is_unix:
            return True
        peer = transport.get_extra_info("peername")
        if peer is None:  # reset before it was accepted
            return False  # HTTP takes the connection over, and sees its end
        address = ipaddress.ip_address(peer[0])
        return any(address in network for network in self._proxy_networks)

    async def wait_for_responses(self, *, until: float) -> int:
        """Wait for the requests in flight: a POST may wait for the position of its message.

        Args:
            until: the deadline, by the event loop's clock.

        Returns:
            The number of requests without a response at the deadline.
        """
        await asyncio.sleep(0)  # the loop reads the requests that have arrived
        for _ in range(0, self._port.http_connections.queued_requests, STARTS_A_TURN):
            await asyncio.sleep(0)  # and starts them
        requests = list(self.server_state.tasks)
        if not requests:
            return 0
        remaining_s = until - asyncio.get_running_loop().time()
        _, unanswered = await asyncio.wait(requests, timeout=max(0.0, remaining_s))
        return len(unanswered)

    async def shutdown(self) -> None:
        """Close the port, and after FINISH_S abort the connections with an unsent response."""
        for server in self._servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await asyncio.sleep(FINISH_S)
        for connection in list(self.server_state.connections):
            connection.abort()


def _mapped(proxies: Iterable[str]) -> Iterator[str]:
    """Yield the other form of each IPv4 network, which proxies write that also listen on IPv6.

    That is `::ffff:10.0.0.0/104` for `10.0.0.0/8`, and vice versa (RFC 4291 section 2.5.5.2).
    """
    for proxy in map(ipaddress.ip_network, proxies):
        if isinstance(proxy, ipaddress.IPv4Network):
            yield f"::ffff:{proxy.network_address}/{MAPPED_BITS + proxy.prefixlen}"
        elif proxy.prefixlen >= MAPPED_BITS and proxy.network_address.ipv4_mapped is not None:
            yield f"{proxy.network_address.ipv4_mapped}/{proxy.prefixlen - MAPPED_BITS}"
