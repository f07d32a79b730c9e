"""The clients of a load test: they count what they receive, some also publish. Knows no terminal.

This is not the package's client, but one built for speed. The messages of a load test are binary
and all of one size, so one call unpacks all frames of a read.
"""

import asyncio
import base64
import os
import ssl
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from time import perf_counter_ns
from typing import cast
from urllib.parse import urlsplit

from websockets.datastructures import Headers
from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.http11 import Response

from websocket_relay.cli.bench.tally import SCALE, Tally
from websocket_relay.client.errors import error_for

STAMP = struct.Struct(">8sqI")  # random mark of the run, due time in ns, number of the sender
MIN_MESSAGE_BYTES = STAMP.size
BINARY, CLOSE, PING, PONG = 0x2, 0x8, 0x9, 0xA
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
        head = frame_head(BINARY, message_bytes, masked=False)
        filler = message_bytes - MIN_MESSAGE_BYTES
        frames = struct.Struct(f">{len(head)}s8sqI{filler}x")
        return cls(message_bytes, os.urandom(8), head, frames)


def frame_head(opcode: int, length: int, *, masked: bool) -> bytes:
    """Encode a frame's header, without the masking key (RFC 6455 section 5.2)."""
    first, mask_bit = 0x80 | opcode, 0x80 if masked else 0
    if length < 126:
        return bytes((first, mask_bit | length))
    if length < 65_536:
        return struct.pack(">BBH", first, mask_bit | 126, length)
    return struct.pack(">BBQ", first, mask_bit | 127, length)


class BenchClient(asyncio.Protocol):
    """One client, from its opening handshake on.

    Args:
        number: index of the client; its messages carry it.
        request: the bytes of its upgrade request.
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
        request: bytes,
        layout: BenchMessage,
        tally: Tally,
        on_echo: Callable[["BenchClient", int], None] | None,
    ) -> None:
        self._number = number
        self._request = request
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
        """Mask in advance what is the same in every message (RFC 6455 section 5.3)."""
        layout, mask = self._layout, os.urandom(4)
        tail = struct.pack(">I", self._number) + os.urandom(
            layout.message_bytes - MIN_MESSAGE_BYTES
        )
        self._frame_start = frame_head(BINARY, layout.message_bytes, masked=True) + mask
        self._frame_start += _masked(layout.mark, mask)
        self._frame_end = _masked(tail, mask)
        self._stamp_mask = int.from_bytes(mask * 2)

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
            self._transport.write(control_frame(CLOSE, struct.pack(">H", 1000)))
            self._transport.close()

    # Callbacks of asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the upgrade request."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        """Count the connection as closed, unless this client closed it."""
        self.is_gone = True
        if not self.opened.done():
            self.opened.set_exception(EOFError())
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
        if self._unparsed:
            data = self._unparsed + data
        if self._is_open:
            self._unparsed = data[self._count(data, perf_counter_ns()) :]
        else:
            self._unparsed = data
            self._read_response()

    def _yield_to_loop(self) -> None:
        """Pause reading until the next turn: uvloop would read many times, and delay all timers."""
        self._transport.pause_reading()
        asyncio.get_running_loop().call_soon(self._resume_reading)

    def _resume_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def _read_response(self) -> None:
        head, end, trailing = self._unparsed.partition(b"\r\n\r\n")
        if not end or self.opened.done():
            return
        if not head.startswith(b"HTTP/"):
            self.opened.set_exception(InvalidHandshake("the response is not HTTP"))
            self._transport.abort()
            return
        response = _response(head, trailing)
        if response.status_code != 101:
            self.opened.set_exception(InvalidStatus(response))
            self._transport.abort()
            return
        self._is_open = True
        self._unparsed = b""
        self.opened.set_result(None)
        if trailing:
            self.data_received(trailing)

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
        if opcode == PING:
            self._transport.write(control_frame(PONG, payload))
        elif opcode == CLOSE and not self._is_closing:
            code, reason = int.from_bytes(payload[:2]), payload[2:].decode(errors="replace")
            self._close_reason = f"{reason.partition(';')[0]} ({code})"
            self._transport.write(control_frame(CLOSE, payload[:2]))


def _masked(data: bytes, mask: bytes) -> bytes:
    """Mask bytes whose offset in the payload is a multiple of four."""
    key = mask * (len(data) // 4 + 1)
    whole = int.from_bytes(data) ^ int.from_bytes(key[: len(data)])
    return whole.to_bytes(len(data))


def control_frame(opcode: int, payload: bytes) -> bytes:
    """Encode a masked control frame."""
    mask = os.urandom(4)
    return frame_head(opcode, len(payload), masked=True) + mask + _masked(payload, mask)


def _response(head: bytes, body: bytes) -> Response:
    """Parse an HTTP response; an invalid status becomes 0."""
    first, *lines = head.decode("latin-1").split("\r\n")
    _, status, *phrase = [*first.split(" ", 2), "0", ""][:3]
    fields = (line.partition(":") for line in lines)
    headers = Headers([(name.strip(), value.strip()) for name, _, value in fields])
    return Response(int(status) if status.isdecimal() else 0, "".join(phrase), headers, body)


def request_for(url: str, headers: dict[str, str]) -> bytes:
    """Return the upgrade request for a channel."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    header_lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return (
        f"GET {target} HTTP/1.1\r\n"
        f"Host: {parts.netloc.rpartition('@')[2]}\r\n"
        "Upgrade: websocket\r\n"
        "Connection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n"
        f"Sec-WebSocket-Version: 13\r\n{header_lines}\r\n"
    ).encode()


async def connect_all(
    url: str,
    headers: dict[str, str],
    context: ssl.SSLContext | None,
    clients: Sequence[Callable[[bytes], BenchClient]],
) -> list[BenchClient]:
    """Connect all clients, at most `MAX_CONCURRENT_CONNECTS` at a time.

    Args:
        url: of the channel.
        headers: additional headers of the request.
        context: verifies the relay's certificate; None: the system's authorities.
        clients: each makes a client for its request.

    Raises:
        RelayError: a client could not connect.
    """
    parts = urlsplit(url)
    is_secure = parts.scheme == "wss"
    port = parts.port or (443 if is_secure else 80)
    loop = asyncio.get_running_loop()
    slots = asyncio.Semaphore(MAX_CONCURRENT_CONNECTS)

    async def connect(make: Callable[[bytes], BenchClient]) -> BenchClient:
        async with slots, asyncio.timeout(OPEN_TIMEOUT_S):
            _, client = await loop.create_connection(
                lambda: make(request_for(url, headers)),
                parts.hostname or "",
                port,
                ssl=(context or True) if is_secure else None,
            )
            await client.opened
            return client

    fault = None
    connecting: list[asyncio.Task[BenchClient]] = []
    try:
        async with asyncio.TaskGroup() as tasks:
            connecting += [tasks.create_task(connect(make)) for make in clients]
    except* (OSError, EOFError, InvalidHandshake) as group:
        fault = error_for(_first(group), is_secure=is_secure)
    if fault is not None:  # Python before 3.11.4 wraps an exception raised above in a group
        raise fault
    return [task.result() for task in connecting]


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
