"""Many clients in one process: they hear and count, some of them send. Knows no terminal.

Not the client that others import: here only the speed counts. A message of a load test is binary
and always of one size, so what comes in one read is taken apart by one call.
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

STAMP = struct.Struct(">8sqI")  # the run's own mark, when it was due, who sent it
LEAST_BYTES = STAMP.size
BINARY, CLOSE, PING, PONG = 0x2, 0x8, 0x9, 0xA
OPEN_TIMEOUT_S = 10.0
OPENING_AT_A_TIME = 100
MUCH_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class BenchMessage:
    """What all messages of one run look like on the wire, as the relay sends them.

    Args:
        message_bytes: their size.
    """

    message_bytes: int
    mark: bytes
    head: bytes
    frames: struct.Struct

    @classmethod
    def of(cls, message_bytes: int) -> "BenchMessage":
        """Return the form of a run."""
        head = frame_head(BINARY, message_bytes, masked=False)
        filler = message_bytes - LEAST_BYTES
        frames = struct.Struct(f">{len(head)}s8sqI{filler}x")
        return cls(message_bytes, os.urandom(8), head, frames)


def frame_head(opcode: int, length: int, *, masked: bool) -> bytes:
    first, bit = 0x80 | opcode, 0x80 if masked else 0
    if length < 126:
        return bytes((first, bit | length))
    if length < 65_536:
        return struct.pack(">BBH", first, bit | 126, length)
    return struct.pack(">BBQ", first, bit | 127, length)


class BenchClient(asyncio.Protocol):
    """One client, from its handshake on.

    Args:
        number: which of them.
        request: the bytes of its upgrade.
        form: what messages look like.
        tally: where it counts.
        on_echo: called with itself and how many of its own messages came back; None: not called.
    """

    def __init__(
        self,
        number: int,
        request: bytes,
        form: BenchMessage,
        tally: Tally,
        on_echo: Callable[["BenchClient", int], None] | None,
    ) -> None:
        self._number = number
        self._request = request
        self._form = form
        self._tally = tally
        self._on_echo = on_echo
        self._rest = b""
        self._is_open = False
        self._is_leaving = False
        self._farewell = "connection lost"
        self._transport: asyncio.Transport
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.can_send = True
        self.is_gone = False
        self._prepare()

    def _prepare(self) -> None:
        """Mask what is the same in every message (RFC 6455 section 5.3)."""
        form, mask = self._form, os.urandom(4)
        tail = struct.pack(">I", self._number) + os.urandom(form.message_bytes - LEAST_BYTES)
        self._before = frame_head(BINARY, form.message_bytes, masked=True) + mask
        self._before += _masked(form.mark, mask)
        self._after = _masked(tail, mask)
        self._stamp_mask = int.from_bytes(mask * 2)

    # What it says

    def send(self, due_ns: int) -> None:
        """Send a message that was due then."""
        stamp = (due_ns ^ self._stamp_mask).to_bytes(8)
        self._transport.write(self._before + stamp + self._after)
        if due_ns >= self._tally.start_ns:
            self._tally.sent += 1

    def leave(self) -> None:
        """Say goodbye. What is heard from now on does not matter."""
        self._is_leaving = True
        if self._is_open and not self._transport.is_closing():
            self._transport.write(control_frame(CLOSE, struct.pack(">H", 1000)))
            self._transport.close()

    # What asyncio tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the upgrade."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        """Count the client as closed, unless it left."""
        self.is_gone = True
        if not self.opened.done():
            self.opened.set_exception(EOFError())
        elif self._is_open and not self._is_leaving:
            self._tally.closed[self._farewell] += 1

    def pause_writing(self) -> None:
        """Send no more: the relay does not take it."""
        self.can_send = False

    def resume_writing(self) -> None:
        """Send again."""
        self.can_send = True

    def data_received(self, data: bytes) -> None:
        """Hear what comes."""
        if len(data) >= MUCH_BYTES:
            self._let_others_read()
        if self._rest:
            data = self._rest + data
        if self._is_open:
            self._rest = data[self._count(data, perf_counter_ns()) :]
        else:
            self._rest = data
            self._open()

    def _let_others_read(self) -> None:
        """Read no more in this turn of the loop: uvloop would, many times, and no timer fire."""
        self._transport.pause_reading()
        asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def _open(self) -> None:
        head, end, rest = self._rest.partition(b"\r\n\r\n")
        if not end or self.opened.done():
            return
        if not head.startswith(b"HTTP/"):
            self.opened.set_exception(InvalidHandshake("it does not answer by HTTP"))
            self._transport.abort()
            return
        response = _response(head, rest)
        if response.status_code != 101:
            self.opened.set_exception(InvalidStatus(response))
            self._transport.abort()
            return
        self._is_open = True
        self._rest = b""
        self.opened.set_result(None)
        if rest:
            self.data_received(rest)

    def _count(self, data: bytes, now_ns: int) -> int:
        """Count the messages in what was read; return how much of it was used."""
        size, at, echoes = self._form.frames.size, 0, 0
        while True:
            whole = (len(data) - at) // size * size
            ours, own = self._count_ours(memoryview(data)[at : at + whole], now_ns)
            echoes += own
            others = self._skip_another(data, at + ours)
            at += ours + others
            if not others:
                break
        if echoes and self._on_echo is not None:
            self._on_echo(self, echoes)
        return at

    def _count_ours(self, frames: memoryview, now_ns: int) -> tuple[int, int]:
        """Count messages of this run until there comes something else.

        Returns:
            How many bytes they are, and how many of them this client sent itself.
        """
        tally, form = self._tally, self._form
        start_ns, counts, number = tally.start_ns, tally.latencies.counts, self._number
        head, mark = form.head, form.mark
        seen = counted = echoes = least = 0
        for its_head, its_mark, due_ns, sender in form.frames.iter_unpack(frames):
            if its_mark != mark or its_head != head:
                break
            seen += 1
            if sender == number:
                echoes += 1
            if due_ns >= start_ns:
                counted += 1
                took_ns = now_ns - due_ns
                counts[int(log(took_ns) * SCALE) if took_ns > 1 else 0] += 1
                least = max(least, took_ns)
        if counted:
            tally.deliveries += counted
            tally.last_ns = now_ns
            tally.latencies.most_ns = max(tally.latencies.most_ns, least)
        return seen * form.frames.size, echoes

    def _skip_another(self, data: bytes, at: int) -> int:
        """Read a frame that is not of this run; return its size, 0 where it is not whole."""
        left = len(data) - at
        if left < 2:
            return 0
        length, head = data[at + 1] & 0x7F, 2
        if length == 126:
            length, head = int.from_bytes(data[at + 2 : at + 4]), 4
        elif length == 127:
            length, head = int.from_bytes(data[at + 2 : at + 10]), 10
        if left < head + length:
            return 0
        self._heed(data[at] & 0x0F, data[at + head : at + head + length])
        return head + length

    def _heed(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            self._transport.write(control_frame(PONG, payload))
        elif opcode == CLOSE and not self._is_leaving:
            code, words = int.from_bytes(payload[:2]), payload[2:].decode(errors="replace")
            self._farewell = f"{words.partition(';')[0]} ({code})"
            self._transport.write(control_frame(CLOSE, payload[:2]))


def _masked(data: bytes, mask: bytes) -> bytes:
    """Mask bytes that begin at a multiple of four of the payload."""
    key = mask * (len(data) // 4 + 1)
    whole = int.from_bytes(data) ^ int.from_bytes(key[: len(data)])
    return whole.to_bytes(len(data))


def control_frame(opcode: int, payload: bytes) -> bytes:
    mask = os.urandom(4)
    return frame_head(opcode, len(payload), masked=True) + mask + _masked(payload, mask)


def _response(head: bytes, body: bytes) -> Response:
    """Read an answer as far as it matters here."""
    first, *lines = head.decode("latin-1").split("\r\n")
    _, status, *words = [*first.split(" ", 2), "0", ""][:3]
    fields = (line.partition(":") for line in lines)
    headers = Headers([(name.strip(), value.strip()) for name, _, value in fields])
    return Response(int(status) if status.isdecimal() else 0, "".join(words), headers, body)


def request_for(url: str, headers: dict[str, str]) -> bytes:
    """Return the upgrade that asks for a channel."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    further = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return (
        f"GET {target} HTTP/1.1\r\n"
        f"Host: {parts.netloc.rpartition('@')[2]}\r\n"
        "Upgrade: websocket\r\n"
        "Connection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n"
        f"Sec-WebSocket-Version: 13\r\n{further}\r\n"
    ).encode()


async def connect_all(
    url: str,
    headers: dict[str, str],
    context: ssl.SSLContext | None,
    clients: Sequence[Callable[[bytes], BenchClient]],
) -> list[BenchClient]:
    """Connect all clients, so many at a time.

    Raises:
        RelayError: one of them is not let in.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "wss"
    port = parts.port or (443 if secure else 80)
    loop = asyncio.get_running_loop()
    gate = asyncio.Semaphore(OPENING_AT_A_TIME)

    async def connect(make: Callable[[bytes], BenchClient]) -> BenchClient:
        async with gate, asyncio.timeout(OPEN_TIMEOUT_S):
            _, client = await loop.create_connection(
                lambda: make(request_for(url, headers)),
                parts.hostname or "",
                port,
                ssl=(context or True) if secure else None,
            )
            await client.opened
            return client

    fault = None
    connecting: list[asyncio.Task[BenchClient]] = []
    try:
        async with asyncio.TaskGroup() as tasks:
            connecting += [tasks.create_task(connect(make)) for make in clients]
    except* (OSError, EOFError, InvalidHandshake) as group:
        fault = error_for(_first(group), is_secure=secure)
    if fault is not None:  # Python before 3.11.4 wraps what is raised above in a group
        raise fault
    return [task.result() for task in connecting]


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
