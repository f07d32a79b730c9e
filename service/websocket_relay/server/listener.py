"""Accept connections on one port, with uvicorn. Knows no settings and no signal."""

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import uvicorn

from websocket_relay.outcomes import ListenError, TlsFailure
from websocket_relay.wire.http_connections import HttpConnections
from websocket_relay.wire.tls_handshake import TlsHandshake

LISTEN_BACKLOG = 4096
"""Length of the kernel's accept queue; the kernel caps it at net.core.somaxconn."""

UNSENT_BYTES = 131_072
"""Bytes that the kernel buffers for a client beyond what TCP can send now (TCP_NOTSENT_LOWAT;
accepted sockets inherit it from the listening one). Without it each slow client fills up to 4 MB of
kernel memory before the relay notices that it lags, and then the relay sees progress only in steps
of a third of that."""

FINISH_S = 0.1
"""Time for responses to plain requests to be sent when the ports close."""

OF_THE_PORT = {errno.EADDRINUSE, errno.EACCES, errno.EPERM}
"""Errors that another port avoids; all others need another host."""

MAPPED_BITS = 96
"""Bits of prefix before the IPv4 address in an IPv4-mapped IPv6 address."""


class Listener(uvicorn.Server):
    """A uvicorn server on one port, with the relay's own startup, TLS and signals.

    uvicorn's own startup sets no deadline for TLS handshakes and exits the process if the port is
    in use. Its signal handlers would replace the relay's.

    Args:
        app: the application.
        host, port: the address; port 0 selects a free one.
        section: the section of the settings with the address, for errors.
        http_connections: the plain HTTP connections of the port.
        context: for TLS; None: no TLS.
        handshake_timeout_s: deadline of a TLS handshake.
        record_tls_failure: counts and logs a TLS handshake that failed.
        trusted_proxies: peers whose X-Forwarded-For and -Proto are trusted.
        protocols: uvicorn's `http`, `ws` and `timeout_keep_alive` settings.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        host: str,
        port: int,
        *,
        section: str,
        http_connections: HttpConnections,
        context: ssl.SSLContext | None = None,
        handshake_timeout_s: float = 10,
        record_tls_failure: Callable[[TlsFailure], None] = lambda _: None,
        trusted_proxies: Sequence[str] = (),
        **protocols: Any,
    ) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(trusted_proxies),
            forwarded_allow_ips=[*trusted_proxies, *_mapped(trusted_proxies)],
            **protocols,
        )
        super().__init__(config)
        self._section = section
        self._http_connections = http_connections
        self._context = context
        self._handshake_timeout_s = handshake_timeout_s
        self._record_tls_failure = record_tls_failure

    @property
    def address(self) -> tuple[str, int]:
        """The bound host and port."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return host, port

    async def listen(self) -> None:
        """Bind the port and start to accept connections.

        Raises:
            ListenError: the address can't be bound.
        """
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        try:
            server = await asyncio.get_running_loop().create_server(
                self._protocol,
                self.config.host,
                self.config.port,
                backlog=LISTEN_BACKLOG,
            )
        except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
            code = getattr(error, "errno", None)
            reason = os.strerror(code) if code and code > 0 else str(error)
            name = "port" if code in OF_THE_PORT else "host"
            raise ListenError(
                f"{self._section}.{name}",
                f"can't listen on {self.config.host} port {self.config.port}: {reason}",
            ) from None
        for listening in cast(list[socket.socket], server.sockets):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self.servers = [cast(Any, server)]
        self.started = True

    def _protocol(self) -> asyncio.Protocol:
        make = cast(Callable[..., asyncio.Protocol], self.config.http_protocol_class)
        protocol = make(config=self.config, server_state=self.server_state, app_state={})
        if self._context is None:
            return protocol
        return TlsHandshake(
            protocol,
            self._http_connections,
            self._context,
            asyncio.get_running_loop().time() + self._handshake_timeout_s,
            self._record_tls_failure,
        )

    async def startup(self, sockets: object = None) -> None:
        """Do nothing: `listen` has bound the port."""

    async def wait_for_responses(self, *, until: float) -> int:
        """Wait for the requests in flight: a POST may wait for the position of its message.

        Args:
            until: the deadline, by the event loop's clock.

        Returns:
            The number of requests without a response at the deadline.
        """
        requests = list(self.server_state.tasks)
        if not requests:
            return 0
        remaining_s = until - asyncio.get_running_loop().time()
        _, unanswered = await asyncio.wait(requests, timeout=max(0.0, remaining_s))
        return len(unanswered)

    async def shutdown(self, sockets: object = None) -> None:
        """Close the port, and after FINISH_S abort the connections with an unsent response.

        uvicorn's own shutdown waits a second or more for them.
        """
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await asyncio.sleep(FINISH_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers: server.signals has its own."""
        yield


def _mapped(proxies: Iterable[str]) -> Iterator[str]:
    """Yield the other form of each IPv4 network, which proxies write that also listen on IPv6.

    That is `::ffff:10.0.0.0/104` for `10.0.0.0/8`, and vice versa (RFC 4291 section 2.5.5.2).
    """
    for proxy in map(ipaddress.ip_network, proxies):
        if isinstance(proxy, ipaddress.IPv4Network):
            yield f"::ffff:{proxy.network_address}/{MAPPED_BITS + proxy.prefixlen}"
        elif proxy.prefixlen >= MAPPED_BITS and proxy.network_address.ipv4_mapped is not None:
            yield f"{proxy.network_address.ipv4_mapped}/{proxy.prefixlen - MAPPED_BITS}"
