"""The clients of a load test: they count what they receive, some also publish. Knows no terminal.

This is not the package's client, but one built for speed: it uses websockets for the opening
handshake only. The messages of a load test are binary and all of one size, so one call unpacks all
frames of a read.
"""

import asyncio
import os
import ssl
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from time import perf_counter_ns
from typing import cast

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import WebSocketURI

from websocket_relay.cancellation import cancel_until_done
from websocket_relay.cli.bench.tally import SCALE, Tally
from websocket_relay.client.errors import error_for

STAMP = struct.Struct(">8sqI")  # random mark of the run, due time in ns, number of the sender
MIN_MESSAGE_BYTES = STAMP.size
OPEN_TIMEOUT_S = 10.0
MAX_CONCURRENT_CONNECTS = 100
LARGE_READ_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class BenchMessage:
    """The layout of a run's messages on the wire, as the relay sends them.

    Attributes:
        message_bytes: size of the payload.
        mark: random bytes that identify the run.
        head: the header of the frame.
        frames: unpacks a frame into header, mark, due time and sender.
    """

    message_bytes: int
    mark: bytes
    head: bytes
    frames: struct.Struct

    @classmethod
    def of(cls, message_bytes: int) -> "BenchMessage":
        """Return the layout of a new run."""
        head = Frame(Opcode.BINARY, bytes(message_bytes)).serialize(mask=False)[:-message_bytes]
        filler = message_bytes - MIN_MESSAGE_BYTES
        frames = struct.Struct(f">{len(head)}s8sqI{filler}x")
        return cls(message_bytes, os.urandom(8), head, frames)


class BenchClient(asyncio.Protocol):
    """One client, from its opening handshake on.

    Args:
        number: index of the client; its messages carry it.
        uri: of the channel.
        headers: additional headers of its upgrade request.
        layout: of the messages.
        tally: the shared counters.
        on_echo: called with this client and the number of its own messages in a read; None: never.

    Attributes:
        opened: done when the handshake is; its exception is the cause of a failure.
        can_send: whether the send buffer is below its high-water mark.
        is_gone: whether the connection has ended.
    """

    def __init__(
        self,
        number: int,
        uri: WebSocketURI,
        headers: dict[str, str],
        layout: BenchMessage,
        tally: Tally,
        on_echo: Callable[["BenchClient", int], None] | None,
    ) -> None:
        self._number = number
        self._handshake = ClientProtocol(uri)
        self._headers = headers
        self._has_response_head = False
        self._layout = layout
        self._tally = tally
        self._on_echo = on_echo
        self._unparsed = b""
        self._is_open = False
        self._is_closing = False
        self._close_reason = "connection lost"
        self._transport: asyncio.Transport
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.can_send = True
        self.is_gone = False
        self._prepare_frame()

    def _prepare_frame(self) -> None:
        """Encode and mask in advance what is the same in every message: all but the due time."""
        size = self._layout.message_bytes
        message = STAMP.pack(self._layout.mark, 0, self._number) + os.urandom(size - STAMP.size)
        frame = Frame(Opcode.BINARY, message).serialize(mask=True)
        due_at = len(frame) - size + len(self._layout.mark)
        self._frame_start, self._frame_end = frame[:due_at], frame[due_at + 8 :]
        self._stamp_mask = int.from_bytes(frame[due_at : due_at + 8])  # zeros, masked

    # Sending

    def send(self, due_ns: int) -> None:
        """Send a message with its due time, from which the receivers count its latency."""
        stamp = (due_ns ^ self._stamp_mask).to_bytes(8)
        self._transport.write(self._frame_start + stamp + self._frame_end)
        if due_ns >= self._tally.start_ns:
            self._tally.sent += 1

    def start_close(self) -> None:
        """Send a close frame and close. The end of this connection is not counted from now on."""
        self._is_closing = True
        if self._is_open and not self._transport.is_closing():
            self._send_control_frame(Opcode.CLOSE, struct.pack(">H", 1000))
            self._transport.close()

    # Callbacks of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the upgrade request."""
        self._transport = cast(asyncio.Transport, transport)
        request = self._handshake.connect()
        request.headers.update(self._headers)
        self._transport.write(request.serialize())

    def connection_lost(self, error: Exception | None) -> None:
        """Count the connection as closed, unless this client closed it."""
        self.is_gone = True
        if not self.opened.done():
            self._handshake.receive_eof()
            self.opened.set_exception(cast(Exception, self._handshake.handshake_exc))
        elif self._is_open and not self._is_closing:
            self._tally.closed[self._close_reason] += 1

    def pause_writing(self) -> None:
        """Stop sending: the send buffer is above its high-water mark."""
        self.can_send = False

    def resume_writing(self) -> None:
        """Resume sending."""
        self.can_send = True

    def data_received(self, data: bytes) -> None:
        """Process what was read."""
        if len(data) >= LARGE_READ_BYTES:
            self._yield_to_loop()
        if self._is_open:
            if self._unparsed:
                data = self._unparsed + data
            self._unparsed = data[self._count(data, perf_counter_ns()) :]
        elif not self.opened.done():
            self._read_response(data)

    def _yield_to_loop(self) -> None:
        """Pause reading until the next turn: uvloop would read many times, and delay all timers."""
        self._transport.pause_reading()
        asyncio.get_running_loop().call_soon(self._resume_reading)

    def _resume_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def _read_response(self, data: bytes) -> None:
        """Pass the response to websockets, but no byte of the frames that may follow it."""
        handshake = self._handshake
        if not self._has_response_head:
            head, end, data = (self._unparsed + data).partition(b"\r\n\r\n")
            self._unparsed, self._has_response_head = head, bool(end)
            if not end:
                return
            handshake.receive_data(head + end)
        if handshake.state is State.OPEN:
            self._is_open = True
            self._unparsed = b""
            self.opened.set_result(None)
            self.data_received(data)
            return
        handshake.receive_data(data)  # a part of the body
        if handshake.handshake_exc is not None:
            self.opened.set_exception(handshake.handshake_exc)
            self._transport.abort()

    def _count(self, data: bytes, now_ns: int) -> int:
        """Count the messages in what was read; return the number of parsed bytes."""
        size, at, echoes = self._layout.frames.size, 0, 0
        while True:
            whole = (len(data) - at) // size * size
            counted, own = self._count_run_frames(memoryview(data)[at : at + whole], now_ns)
            echoes += own
            skipped = self._skip_other_frame(data, at + counted)
            at += counted + skipped
            if not skipped:
                break
        if echoes and self._on_echo is not None:
            self._on_echo(self, echoes)
        return at

    def _count_run_frames(self, frames: memoryview, now_ns: int) -> tuple[int, int]:
        """Count messages of this run up to the first other frame.

        Returns:
            The size of their frames in bytes, and how many of them this client sent itself.
        """
        tally, layout = self._tally, self._layout
        start_ns, counts, number = tally.start_ns, tally.latencies.counts, self._number
        head, mark = layout.head, layout.mark
        seen = counted = echoes = max_ns = 0
        for its_head, its_mark, due_ns, sender in layout.frames.iter_unpack(frames):
            if its_mark != mark or its_head != head:
                break
            seen += 1
            if sender == number:
                echoes += 1
            if due_ns >= start_ns:
                counted += 1
                took_ns = now_ns - due_ns
                counts[int(log(took_ns) * SCALE) if took_ns > 1 else 0] += 1
                max_ns = max(max_ns, took_ns)
        if counted:
            tally.deliveries += counted
            tally.last_ns = now_ns
            tally.latencies.max_ns = max(tally.latencies.max_ns, max_ns)
        return seen * layout.frames.size, echoes

    def _skip_other_frame(self, data: bytes, at: int) -> int:
        """Process a frame that is not of this run; return its size, 0 if it is incomplete."""
        available = len(data) - at
        if available < 2:
            return 0
        length, head = data[at + 1] & 0x7F, 2
        if length == 126:
            length, head = int.from_bytes(data[at + 2 : at + 4]), 4
        elif length == 127:
            length, head = int.from_bytes(data[at + 2 : at + 10]), 10
        if available < head + length:
            return 0
        self._on_control_frame(data[at] & 0x0F, data[at + head : at + head + length])
        return head + length

    def _on_control_frame(self, opcode: int, payload: bytes) -> None:
        if opcode == Opcode.PING:
            self._send_control_frame(Opcode.PONG, payload)
        elif opcode == Opcode.CLOSE and not self._is_closing:
            code, reason = int.from_bytes(payload[:2]), payload[2:].decode(errors="replace")
            self._close_reason = f"{reason.partition(';')[0]} ({code})"
            self._send_control_frame(Opcode.CLOSE, payload[:2])

    def _send_control_frame(self, opcode: Opcode, payload: bytes) -> None:
        self._transport.write(Frame(opcode, payload).serialize(mask=True))


async def connect_all(
    uri: WebSocketURI, context: ssl.SSLContext | None, clients: Sequence[BenchClient]
) -> None:
    """Connect all clients, at most `MAX_CONCURRENT_CONNECTS` at a time.

    Args:
        uri: of the channel.
        context: verifies the relay's certificate; None: the system's authorities.
        clients: not connected yet.

    Raises:
        RelayError: a client could not connect.
    """
    tls = (context or True) if uri.secure else None
    loop = asyncio.get_running_loop()
    slots = asyncio.Semaphore(MAX_CONCURRENT_CONNECTS)

    async def connect(client: BenchClient) -> None:
        async with slots, asyncio.timeout(OPEN_TIMEOUT_S):
            await loop.create_connection(lambda: client, uri.host, uri.port, ssl=tls)
            await client.opened

    connecting = [asyncio.create_task(connect(client)) for client in clients]
    try:
        await asyncio.gather(*connecting)
    except (OSError, InvalidHandshake) as error:
        raise error_for(error, is_secure=uri.secure) from None
    finally:
        await cancel_until_done(*connecting)
