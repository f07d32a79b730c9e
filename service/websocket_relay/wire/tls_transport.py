"""Speak TLS for one connection: OpenSSL between a TCP transport and a protocol.

uvloop's and asyncio's own TLS keep a read buffer of up to 256 KiB and a write queue for each
connection, offer no half-close, and can't abort a handshake early. Here all that waits to be sent
is in the buffer of the TCP transport, where it is counted. Knows no HTTP.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, cast

from websocket_relay.outcomes import RefusedError, TlsFailure
from websocket_relay.wire.http_connections import HttpConnections
from websocket_relay.wire.sockets import socket_of

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
    "CERTIFICATE_VERIFY_FAILED": TlsFailure.CLIENT_CERTIFICATE,
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": TlsFailure.CLIENT_CERTIFICATE,
}
"""The failures by OpenSSL's names of errors. An alert is one that the client has sent."""

RECORD_BYTES = 16_384
"""The maximum payload of a record (RFC 8446 section 5.1)."""

MIN_READ_BYTES = 256

CERTIFICATE = "certificate"
"""The name of an extra info of the transport: the client's certificate, DER; None: it has none."""

_incoming, _outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
"""Between OpenSSL and the sockets of all connections. Both are empty whenever a method returns:
OpenSSL takes all that it is given and keeps the part of a record itself, and what it has to send is
written at once. A pair for each connection would keep the memory of its largest flight."""


class _Input(Enum):
    """What becomes of bytes from the client."""

    READ = auto()
    DISCARDED = auto()  # our close_notify is sent
    ENDED = auto()  # by the client's close_notify, or by TCP's FIN


class TlsTransport(asyncio.Transport, asyncio.Protocol):
    """The protocol of a TCP transport, and the transport of the protocol above it.

    The handshake starts with the first byte: a connection that ends without one, as a health check
    by TCP does, is no failed handshake.

    Args:
        protocol: runs over TLS, from the end of the handshake on.
        http_connections: counts the connection during the handshake.
        context: returns the present certificate and key.
        deadline_at: the handshake is aborted at this time, by the event loop's clock.
        record_failure: counts and logs a handshake that failed.
    """

    __slots__ = (
        "_context",
        "_handshake",
        "_input",
        "_is_paused",
        "_protocol",
        "_send",
        "_socket",
        "_ssl",
        "_tcp",
        "_unread",
    )

    def __init__(
        self,
        protocol: asyncio.Protocol,
        http_connections: HttpConnections,
        context: Callable[[], ssl.SSLContext],
        deadline_at: float,
        record_failure: Callable[[TlsFailure], None],
    ) -> None:
        self._protocol = protocol
        self._handshake: _Handshake | None = _Handshake(
            http_connections, deadline_at, record_failure
        )
        self._context: Callable[[], ssl.SSLContext] | None = context
        self._tcp: asyncio.Transport
        self._ssl: ssl.SSLObject | None = None
        self._socket: socket.SocketType | None = None
        self._send: Callable[[bytes], int] | None = None
        self._unread = b""  # received, and not passed to OpenSSL while reading is paused
        self._is_paused = False
        self._input = _Input.READ

    # Below: the protocol of the TCP transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first byte."""
        self._tcp = cast(asyncio.Transport, transport)
        assert self._handshake is not None
        self._handshake.start(self._tcp)

    def data_received(self, data: bytes) -> None:
        """Continue the handshake, or decrypt."""
        if self._input is not _Input.READ or (self._ssl is None and self._context is None):
            return  # the latter: after a handshake that failed
        if self._unread:
            self._unread += data
            return
        _incoming.write(data)
        try:
            if self._handshake is None or self._continue_handshake(self._handshake):
                self._read(len(data))
        finally:
            self._empty_buffers()

    def eof_received(self) -> bool:
        """Pass the end of TCP on, if there was no close_notify before it.

        Returns:
            True: this object closes the TCP transport.
        """
        if self._handshake is not None:
            self._tcp.close()
        elif self._input is not _Input.ENDED:
            self._end_input()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Release everything."""
        self._unread = b""
        self._ssl = None
        self.detach()
        if self._handshake is not None:
            self._handshake.on_lost()
            self._handshake = None
        else:
            self._protocol.connection_lost(exc)
        del self._protocol

    def pause_writing(self) -> None:
        """Pass on that the socket is full."""
        if self._handshake is None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Pass on that the buffer is empty."""
        if self._handshake is None:
            self._protocol.resume_writing()

    # The handshake

    def _continue_handshake(self, handshake: "_Handshake") -> bool:
        """Return whether the handshake is complete."""
        if self._ssl is None:
            assert self._context is not None
            handshake.begin()
            self._ssl = self._context().wrap_bio(_incoming, _outgoing, server_side=True)
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return False
        except ssl.SSLError as error:
            self._flush()  # an alert
            self._ssl = self._context = None
            handshake.fail(FAILURES.get(error.reason or "", TlsFailure.OTHER))
            return False
        self._flush()
        handshake.complete()
        self._handshake = self._context = None
        if self._tcp.is_closing():
            return False
        self._protocol.connection_made(self)
        return True

    # Reading

    def _read(self, received_bytes: int) -> None:
        """Decrypt what is received, and pass it on, until reading is paused or has ended."""
        read_bytes = min(max(received_bytes, MIN_READ_BYTES), RECORD_BYTES)
        while (connection := self._ssl) is not None:
            if self._is_paused or self._input is not _Input.READ:
                break
            if not _incoming.pending and not connection.pending():
                break  # an exception for what is known costs more than a short record
            try:
                data = connection.read(read_bytes)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:  # close_notify
                data = b""
            except ssl.SSLError:
                self._flush()
                self._tcp.abort()
                break
            self._flush()  # the answer to a key update: other connections may be written to now
            if not data:
                self._end_input()
                break
            self._protocol.data_received(data)

    def _empty_buffers(self) -> None:
        """Leave nothing of this connection to the next one, whatever has happened."""
        if _incoming.pending:
            rest = _incoming.read()
            self._unread = rest if self._input is _Input.READ else b""  # reading is paused
        self._flush()

    def _end_input(self) -> None:
        self._input = _Input.ENDED
        if not self._protocol.eof_received():
            self.close()

    def _read_unread(self) -> None:
        if self._is_paused or self._ssl is None or self._tcp.is_closing():
            return
        data, self._unread = self._unread, b""
        _incoming.write(data)
        try:
            self._read(len(data))
        except Exception:  # as uvloop does if data_received raises
            self._tcp.abort()
            raise
        finally:
            self._empty_buffers()
        if not self._is_paused and not self._tcp.is_closing():
            self._tcp.resume_reading()

    def pause_reading(self) -> None:
        """Pass nothing more on until `resume_reading`."""
        self._is_paused = True
        self._tcp.pause_reading()

    def resume_reading(self) -> None:
        """Go on: first with what is received already."""
        if not self._is_paused:
            return
        self._is_paused = False
        asyncio.get_running_loop().call_soon(self._read_unread)

    def is_reading(self) -> bool:
        """Return whether reading is not paused."""
        return not self._is_paused

    # Writing

    def attach(self) -> None:
        """Prepare `send`: until the connection is lost, it uses the socket itself."""
        self._socket = socket_of(self._tcp)
        self._send = self._socket.send

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send. Second half of the hot path, with TLS."""
        connection = self._ssl
        if connection is not None and len(data):
            try:
                connection.write(data)
            finally:
                encrypted = _outgoing.read()
            self._tcp.write(encrypted)

    def send(self, data: bytes) -> int:
        """Encrypt and send, past the TCP transport's buffer, in which nothing must wait.

        One record at a time: what is encrypted is a copy, and as much memory again.

        Returns:
            How many bytes were encrypted, of which the end may wait in the TCP transport.
        """
        size = len(data)
        if size > RECORD_BYTES:
            return self._send_records(data)
        connection, send = self._ssl, self._send
        if connection is None or send is None:
            return size
        try:
            connection.write(data)
        finally:  # nothing must be left to the next connection
            encrypted = _outgoing.read()
        try:
            sent_bytes = send(encrypted)
        except OSError:  # full, or disconnected: the transport finds out
            sent_bytes = 0
        if sent_bytes != len(encrypted):
            self._tcp.write(memoryview(encrypted)[sent_bytes:])
        return size

    def _send_records(self, data: bytes) -> int:
        for start in range(0, len(data), RECORD_BYTES):
            self.send(data[start : start + RECORD_BYTES])
            if self._tcp.get_write_buffer_size():
                return min(start + RECORD_BYTES, len(data))
        return len(data)

    def detach(self) -> None:
        """Forget the descriptor of the socket, which the TCP transport closes."""
        self._send = None
        if self._socket is not None:
            self._socket.detach()
            self._socket = None

    def _flush(self) -> None:
        if _outgoing.pending:
            self._tcp.write(_outgoing.read())

    def write_eof(self) -> None:
        """Send close_notify and TCP's FIN; what the client still sends is discarded."""
        self._send_close_notify()
        self._input = _Input.DISCARDED
        self._unread = b""
        self._tcp.write_eof()

    def can_write_eof(self) -> bool:
        """Return True."""
        return True

    def _send_close_notify(self) -> None:
        if self._ssl is not None and not self._tcp.is_closing():
            # unwrap looks for the client's close_notify, too. What it would find there belongs to
            # the connection that is being read.
            incoming = _incoming.read()
            try:
                with contextlib.suppress(ssl.SSLError):  # there is none
                    self._ssl.unwrap()
            finally:
                _incoming.write(incoming)
                self._flush()

    def close(self) -> None:
        """Close after everything is sent; the client's close_notify is not awaited."""
        self._send_close_notify()
        self._input = _Input.DISCARDED
        self._tcp.close()

    def abort(self) -> None:
        """Close at once; what is not sent is lost."""
        self._tcp.abort()

    def is_closing(self) -> bool:
        """Return whether the transport is closing."""
        return self._tcp.is_closing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the limits of the TCP transport's buffer."""
        self._tcp.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        """Return the bytes that wait in the TCP transport's buffer, encrypted."""
        return self._tcp.get_write_buffer_size()

    # The rest of a transport

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Replace the protocol."""
        self._protocol = cast(asyncio.Protocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol."""
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return a fact about the connection, as asyncio's transports do."""
        if name == "sslcontext":
            return self._ssl.context if self._ssl is not None else default
        if name == CERTIFICATE:
            return self._ssl.getpeercert(binary_form=True) if self._ssl is not None else default
        return self._tcp.get_extra_info(name, default)


class _Handshake:
    """A TLS handshake in progress: counted, with a deadline, and evictable."""

    __slots__ = (
        "_deadline_at",
        "_has_begun",
        "_http_connections",
        "_is_recorded",
        "_record_failure",
        "_tcp",
        "_timer",
    )

    def __init__(
        self,
        http_connections: HttpConnections,
        deadline_at: float,
        record_failure: Callable[[TlsFailure], None],
    ) -> None:
        self._http_connections = http_connections
        self._deadline_at = deadline_at
        self._record_failure = record_failure
        self._tcp: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._has_begun = False
        self._is_recorded = False  # whether its end is

    def start(self, tcp: asyncio.Transport) -> None:
        """Count the connection from now on, until its deadline."""
        self._tcp = tcp
        if (error := self._http_connections.register(self)) is not None:
            self.evict(error)
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(self._deadline_at, self.fail, TlsFailure.TIMEOUT)

    def begin(self) -> None:
        """Record that the first byte has arrived."""
        self._has_begun = True

    def complete(self) -> None:
        """Stop to count the connection."""
        self._is_recorded = True
        self._stop()

    def fail(self, why: TlsFailure) -> None:
        """Record that the handshake has failed; end the connection."""
        if not self._is_recorded:
            self._is_recorded = True
            self._record_failure(why)
        self._stop()
        if why is TlsFailure.TIMEOUT:
            self._tcp.abort()
        else:
            self._tcp.close()  # after the alert

    def on_lost(self) -> None:
        """Record the end of the connection."""
        if self._has_begun and not self._is_recorded:
            self._is_recorded = True
            self._record_failure(TlsFailure.DISCONNECTED)
        self._stop()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._http_connections.unregister(self)

    def is_request_arriving(self) -> bool:
        """Return False: there is no request before the handshake is complete."""
        return False

    def evict(self, error: RefusedError) -> None:
        """Abort the connection. Without TLS no response can be sent."""
        self._is_recorded = True
        self._http_connections.record_refusal(error)
        self._tcp.abort()
