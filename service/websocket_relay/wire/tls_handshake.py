"""Perform the TLS handshake of one connection, which can be evicted meanwhile.

uvloop's own server offers no way to abort a TLS handshake early. Knows no HTTP.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, cast

from websocket_relay.outcomes import RefusedError, TlsFailure
from websocket_relay.wire.http_connections import HttpConnections

MIN_TIMEOUT_S = 0.001
"""start_tls rejects a timeout of 0."""

FAILURES = {
    "HTTP_REQUEST": TlsFailure.NOT_TLS,
    "HTTPS_PROXY_REQUEST": TlsFailure.NOT_TLS,
    "WRONG_VERSION_NUMBER": TlsFailure.NOT_TLS,
    "NO_SHARED_CIPHER": TlsFailure.UNSUPPORTED,
    "UNSUPPORTED_PROTOCOL": TlsFailure.UNSUPPORTED,
    "TLSV1_ALERT_PROTOCOL_VERSION": TlsFailure.UNSUPPORTED,
    "TLSV1_ALERT_UNKNOWN_CA": TlsFailure.CERTIFICATE_REJECTED,
    "SSLV3_ALERT_BAD_CERTIFICATE": TlsFailure.CERTIFICATE_REJECTED,
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": TlsFailure.CERTIFICATE_REJECTED,
    "SSLV3_ALERT_CERTIFICATE_REVOKED": TlsFailure.CERTIFICATE_REJECTED,
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": TlsFailure.CERTIFICATE_REJECTED,
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": TlsFailure.CERTIFICATE_REJECTED,
}
"""The failures by OpenSSL's names of errors. An alert is one that the client has sent."""


class TlsHandshake(asyncio.Protocol):
    """A TCP connection until the TLS handshake is complete; then `protocol` takes it over.

    The handshake starts with the first byte: a connection that ends without one, as a health check
    by TCP does, is no failed handshake.

    Args:
        protocol: the protocol that runs over TLS.
        http_connections: counts the connection during the handshake.
        ssl_context: certificate and key.
        deadline_at: the handshake is aborted at this time, by the event loop's clock.
        record_failure: counts and logs a handshake that failed.
    """

    def __init__(
        self,
        protocol: asyncio.Protocol,
        http_connections: HttpConnections,
        ssl_context: ssl.SSLContext,
        deadline_at: float,
        record_failure: Callable[[TlsFailure], None],
    ) -> None:
        self._protocol = protocol
        self._http_connections = http_connections
        self._ssl_context = ssl_context
        self._deadline_at = deadline_at
        self._record_failure = record_failure
        self._buffered: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None  # until the first byte
        self._task: asyncio.Task[None] | None = None
        self._is_evicted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first byte."""
        self._transport = cast(asyncio.Transport, transport)
        if (error := self._http_connections.register(self)) is not None:
            self._http_connections.record_refusal(error)
            self._transport.abort()
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(self._deadline_at, self._abort_silent)

    def data_received(self, data: bytes) -> None:
        """Start the handshake.

        Buffer bytes that arrive before start_tls, or before `protocol` has the connection.
        """
        self._buffered.append(data)
        if self._timer is not None:
            self._cancel_timer()
            loop = asyncio.get_running_loop()
            self._task = loop.create_task(self._run_handshake())
            # The loop reads before the task starts. Two loop iterations later, start_tls has
            # installed the TLS protocol, in the same iteration, and nothing more was read.
            loop.call_soon(loop.call_soon, self._forward_buffered)

    def _abort_silent(self) -> None:
        self._timer = None
        self._record_failure(TlsFailure.TIMEOUT)
        self._transport.abort()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

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
        self._cancel_timer()
        self._http_connections.unregister(self)

    def is_request_arriving(self) -> bool:
        """Return False: there is no request before the handshake is complete."""
        return False

    def evict(self, error: RefusedError) -> None:
        """Abort the connection. Without TLS no response can be sent."""
        self._is_evicted = True
        self._http_connections.record_refusal(error)
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
                ssl_handshake_timeout=max(MIN_TIMEOUT_S, self._deadline_at - loop.time()),
            )
        except OSError as error:
            if not self._is_evicted:
                self._record_failure(_failure_of(error))
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


def _failure_of(error: OSError) -> TlsFailure:
    if isinstance(error, ssl.SSLError):
        return FAILURES.get(error.reason or "", TlsFailure.OTHER)
    is_timeout = isinstance(error, ConnectionAbortedError)  # start_tls raises it at the deadline
    return TlsFailure.TIMEOUT if is_timeout else TlsFailure.DISCONNECTED
