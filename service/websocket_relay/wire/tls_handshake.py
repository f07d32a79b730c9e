"""Agree on TLS with one client, as a connection that can make room for others.

uvloop's own server has no way to end a TLS handshake before its time. Knows no HTTP.
"""

import asyncio
import ssl
from typing import Any, cast

from websocket_relay.outcomes import Refusal
from websocket_relay.wire.http_connections import HttpConnections


class TlsHandshake(asyncio.Protocol):
    """A TCP connection until TLS is agreed on. Then another protocol has it.

    Args:
        protocol: the other one.
        plain: where the connection counts until then.
        context: certificate and key.
        timeout_s: it ends where TLS is not agreed on by then.
    """

    def __init__(
        self,
        protocol: asyncio.Protocol,
        plain: HttpConnections,
        context: ssl.SSLContext,
        timeout_s: float,
    ) -> None:
        self._protocol = protocol
        self._plain = plain
        self._context = context
        self._timeout_s = timeout_s
        self._early: list[bytes] = []
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)
        if (why := self._plain.enter(self)) is not None:
            self._plain.refused(why)
            self._transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._agree())
        # The loop reads before the task begins. Two turns from now TLS has begun, in the same turn,
        # and nothing more was read.
        loop.call_soon(loop.call_soon, self._pass_on_early)

    def data_received(self, data: bytes) -> None:
        """Keep what comes before TLS begins, and before the other protocol has the connection."""
        self._early.append(data)

    def _pass_on_early(self) -> None:
        records, self._early = b"".join(self._early), []
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
        """Count no longer."""
        self._plain.leave(self)

    def make_room(self, why: Refusal) -> None:
        """End: without TLS there is no answer."""
        self._plain.refused(why)
        self._transport.abort()

    async def _agree(self) -> None:
        loop = asyncio.get_running_loop()
        if self._transport.is_closing():
            return
        try:
            secured = await loop.start_tls(
                self._transport,
                self,
                self._context,
                server_side=True,
                ssl_handshake_timeout=self._timeout_s,
            )
        except OSError:  # no TLS, another certificate wanted, too late, gone
            self._transport.abort()
            return
        finally:
            self._plain.leave(self)
            self._task = None
        if secured is None or secured.is_closing():
            return
        secured.set_protocol(self._protocol)
        self._protocol.connection_made(secured)
        for data in self._early:
            self._protocol.data_received(data)
