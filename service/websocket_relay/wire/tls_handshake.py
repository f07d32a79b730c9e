"""Perform the TLS handshake of one connection, which can be evicted meanwhile.

uvloop's own server offers no way to abort a TLS handshake early. Knows no HTTP.
"""

import asyncio
import ssl
from typing import Any, cast

from websocket_relay.outcomes import Refusal
from websocket_relay.wire.http_connections import HttpConnections


class TlsHandshake(asyncio.Protocol):
    """A TCP connection until the TLS handshake is complete; then `protocol` takes it over.

    Args:
        protocol: the protocol that runs over TLS.
        http_connections: counts the connection during the handshake.
        ssl_context: certificate and key.
        timeout_s: the handshake is aborted after this time.
    """

    def __init__(
        self,
        protocol: asyncio.Protocol,
        http_connections: HttpConnections,
        ssl_context: ssl.SSLContext,
        timeout_s: float,
    ) -> None:
        self._protocol = protocol
        self._http_connections = http_connections
        self._ssl_context = ssl_context
        self._timeout_s = timeout_s
        self._buffered: list[bytes] = []
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the handshake."""
        self._transport = cast(asyncio.Transport, transport)
        if (refusal := self._http_connections.register(self)) is not None:
            self._http_connections.record_refusal(refusal)
            self._transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._run_handshake())
        # The loop reads before the task starts. Two loop iterations later, start_tls has installed
        # the TLS protocol, in the same iteration, and nothing more was read.
        loop.call_soon(loop.call_soon, self._forward_buffered)

    def data_received(self, data: bytes) -> None:
        """Buffer bytes that arrive before start_tls, or before `protocol` has the connection."""
        self._buffered.append(data)

    def _forward_buffered(self) -> None:
        records, self._buffered = b"".join(self._buffered), []
        if self._transport.is_closing():
            return
        tls = cast(Any, self._transport.get_protocol())  # an asyncio.BufferedProtocol
        while records:
            buffer = tls.get_buffer(len(records))
            size = min(len(buffer), len(records))
            buffer[:size] = records[:size]
            tls.buffer_updated(size)
            records = records[size:]

    def connection_lost(self, error: Exception | None) -> None:
        """Remove the connection from the count."""
        self._http_connections.unregister(self)

    def is_request_arriving(self) -> bool:
        """Return False: there is no request before the handshake is complete."""
        return False

    def evict(self, refusal: Refusal) -> None:
        """Abort the connection. Without TLS no response can be sent."""
        self._http_connections.record_refusal(refusal)
        self._transport.abort()

    async def _run_handshake(self) -> None:
        loop = asyncio.get_running_loop()
        if self._transport.is_closing():
            return
        try:
            tls_transport = await loop.start_tls(
                self._transport,
                self,
                self._ssl_context,
                server_side=True,
                ssl_handshake_timeout=self._timeout_s,
            )
        except OSError:  # not TLS, certificate rejected by the client, timeout, disconnect
            self._transport.abort()
            return
        finally:
            self._http_connections.unregister(self)
            self._task = None
        if tls_transport is None or tls_transport.is_closing():
            return
        tls_transport.set_protocol(self._protocol)
        self._protocol.connection_made(tls_transport)
        for data in self._buffered:
            self._protocol.data_received(data)
