"""Accept connections on one port, with uvicorn. Knows no setting and no signal."""

import asyncio
import contextlib
import ipaddress
import os
import socket
import ssl
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from typing import TYPE_CHECKING, Any, cast

import uvicorn

from websocket_relay.outcomes import StartError
from websocket_relay.wire.http_connections import HttpConnections
from websocket_relay.wire.tls_handshake import TlsHandshake

if TYPE_CHECKING:
    pass


LISTEN_BACKLOG = 4096


"""Connections that wait in the kernel to be accepted; it caps this at net.core.somaxconn."""


UNSENT_BYTES = 131_072


"""What the kernel takes for a client beyond what TCP can send now (TCP_NOTSENT_LOWAT; accepted
connections have it from the one that listens). Without it up to 4 MB of kernel memory fill for each
slow client before the relay sees that it is behind, and then it sees in steps of a third of that
whether it moves."""


FINISH_S = 0.1


"""What answers to plain requests have to get out when the ports close."""


MAPPED_BITS = 96


"""What comes before the IPv4 address in an IPv6 address that holds one."""


class Listener(uvicorn.Server):
    """uvicorn on one port, as the relay needs it.

    uvicorn's own start has no deadline for TLS handshakes and exits the process where a port is
    taken; and its signals are the relay's business.

    Args:
        app: what answers there.
        host, port: where; port 0 takes any free one.
        plain: its connections that speak HTTP.
        context: for TLS, or None.
        handshake_timeout_s: for TLS handshakes.
        trusted_proxies: whose X-Forwarded-For and -Proto are believed.
        protocols: uvicorn's `http` and `ws` settings.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        host: str,
        port: int,
        *,
        plain: HttpConnections,
        context: ssl.SSLContext | None = None,
        handshake_timeout_s: float = 10,
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
        self._plain = plain
        self._context = context
        self._handshake_timeout_s = handshake_timeout_s

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return host, port

    async def listen(self) -> None:
        """Bind and accept connections.

        Raises:
            StartError: the address can't be had.
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
        except (OSError, UnicodeError) as error:  # the latter of a host that is no name at all
            number = getattr(error, "errno", None)
            reason = os.strerror(number) if number and number > 0 else str(error)
            raise StartError(
                f"can't listen on {self.config.host} port {self.config.port}: {reason}"
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
        return TlsHandshake(protocol, self._plain, self._context, self._handshake_timeout_s)

    async def startup(self, sockets: object = None) -> None:
        """Do nothing: `listen` did it."""

    async def answer_all(self, *, until: float) -> int:
        """Wait for the requests that are in progress: a POST may wait for its message's position.

        Args:
            until: no longer than this, by the event loop's clock.

        Returns:
            How many are not answered by then.
        """
        requests = list(self.server_state.tasks)
        if not requests:
            return 0
        left_s = until - asyncio.get_running_loop().time()
        _, unanswered = await asyncio.wait(requests, timeout=max(0.0, left_s))
        return len(unanswered)

    async def shutdown(self, sockets: object = None) -> None:
        """Close the port, and after a moment cut off who has not taken its answer.

        uvicorn's own waits a second or more for such a client.
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
        """Leave the signals to the relay."""
        yield


def _mapped(proxies: Iterable[str]) -> Iterator[str]:
    """Yield the IPv4 networks in their other form, which proxies write that listen on IPv6, too.

    That is `::ffff:10.0.0.0/104` for `10.0.0.0/8`, and the other way round (RFC 4291 section
    2.5.5.2).
    """
    for proxy in map(ipaddress.ip_network, proxies):
        if isinstance(proxy, ipaddress.IPv4Network):
            yield f"::ffff:{proxy.network_address}/{MAPPED_BITS + proxy.prefixlen}"
        elif proxy.prefixlen >= MAPPED_BITS and proxy.network_address.ipv4_mapped is not None:
            yield f"{proxy.network_address.ipv4_mapped}/{proxy.prefixlen - MAPPED_BITS}"
