"""A WebSocket client of single frames and bytes, for what a library never sends or hides.

Builds and parses the frames of RFC 6455 and the compressed ones of RFC 7692. Knows no relay process
and no test.
"""

import asyncio
import select
import socket
import struct
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

PATIENCE_S = 20.0  # the timeout of a single wait, long enough for a busy machine
KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455 section 1.3
MASK = b"\x37\xfa\x21\x3d"
READ_BYTES = 262_144
READS_PER_TURN = 100  # reads of received bytes, before other tasks of the event loop run

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
RSV1 = 4  # as `reserved` of a frame: the message is compressed (RFC 7692 section 6)
DEFLATE_TAIL = (
    b"\x00\x00\xff\xff"  # ends every compressed message and is never sent (section 7.2.1)
)


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame as the relay sent it."""

    opcode: int
    payload: bytes
    fin: bool
    compressed: bool = False

    def inflated(self, window_bits: int = 15) -> bytes:
        """Return the payload, inflated if it is compressed."""
        return inflated(self.payload, window_bits) if self.compressed else self.payload


@dataclass(frozen=True, slots=True)
class Response:
    """The head of an HTTP response; header names are in lower case."""

    status: int
    headers: dict[str, str]


def masked(payload: bytes, mask: bytes = MASK) -> bytes:
    """Mask or unmask a payload (RFC 6455 section 5.3)."""
    size = len(payload)
    repeated = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")).to_bytes(size, "big")


def length_field(size: int) -> tuple[int, bytes]:
    """Return the 7-bit length and the extended length that follows it."""
    if size < 126:
        return size, b""
    if size < 65_536:
        return 126, struct.pack("!H", size)
    return 127, struct.pack("!Q", size)


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    reserved: int = 0,
    mask: bool = True,
    key: bytes = MASK,
) -> bytes:
    """Encode a frame of a client, valid or not.

    Args:
        reserved: the three reserved bits, 0 to 7.
        mask: whether the payload is masked; a client must mask it.
        key: the masking key.
    """
    short, extended = length_field(len(payload))
    head = bytes([fin << 7 | reserved << 4 | opcode, mask << 7 | short]) + extended
    return head + key + masked(payload, key) if mask else head + payload


def deflated(
    payload: bytes,
    *,
    level: int = -1,
    window_bits: int = 15,
    strategy: int = zlib.Z_DEFAULT_STRATEGY,
) -> bytes:
    """Compress the payload of one message, no context takeover (RFC 7692 section 7.2.1)."""
    deflater = zlib.compressobj(level, zlib.DEFLATED, -window_bits, zlib.DEF_MEM_LEVEL, strategy)
    octets = deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH)
    assert octets.endswith(DEFLATE_TAIL)
    return octets[: -len(DEFLATE_TAIL)]


def inflated(payload: bytes, window_bits: int = 15) -> bytes:
    """Inflate the payload of one message, no context takeover (RFC 7692 section 7.2.2).

    Raises:
        zlib.error: it refers to bytes before the message, or beyond the window.
    """
    inflater = zlib.decompressobj(-window_bits)
    octets = inflater.decompress(payload + DEFLATE_TAIL)
    # An empty last block ends the stream, but only between two blocks.
    inflater.decompress(b"\x03\x00")
    assert inflater.eof, "the message ends inside a block"
    return octets


def compressed_frame(opcode: int, payload: bytes) -> bytes:
    """Encode a message as one compressed frame."""
    return frame(opcode, deflated(payload), reserved=RSV1)


def relayed_frame(opcode: int, payload: bytes) -> bytes:
    """Encode a frame as the relay sends it: whole and unmasked."""
    return frame(opcode, payload, mask=False)


def close_payload(code: int, reason: bytes = b"") -> bytes:
    return struct.pack("!H", code) + reason


def upgrade_request(
    path: str = "/",
    *,
    drop: str = "",
    lines: Sequence[str] = (),
    start: str = "GET {path} HTTP/1.1",
    **headers: str,
) -> bytes:
    """Build an upgrade request.

    Args:
        path: of the request line.
        drop: the name of a header to omit.
        lines: whole lines after the headers, for repeated headers and invalid ones.
        start: another request line.
        headers: further or other headers, with underscores for hyphens.
    """
    fields = {
        "Host": "localhost",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": KEY,
        "Sec-WebSocket-Version": "13",
    }
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    fields.pop(drop, None)
    head = [start.format(path=path), *(f"{name}: {value}" for name, value in fields.items())]
    return "".join(f"{line}\r\n" for line in (*head, *lines, "")).encode("latin-1")


class RawClient:
    """A TCP connection that sends and reads only in the calls of its methods."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._received = bytearray()
        self._reads = 0
        self._compresses = False
        self._window_bits = 15

    @classmethod
    async def connect(
        cls, host: str, port: int, *, receive_buffer_bytes: int | None = None
    ) -> Self:
        """Connect, without sending anything.

        Args:
            receive_buffer_bytes: SO_RCVBUF. If it is small and the client does not read, the relay
                can not send much.
        """
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            if receive_buffer_bytes is not None:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            made.setblocking(False)
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.get_running_loop().sock_connect(made, (host, port))
        except BaseException:
            made.close()
            raise
        return cls(made)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    @property
    def socket(self) -> socket.socket:
        """The socket of the connection."""
        return self._socket

    async def send(self, payload: bytes, *, patience_s: float = PATIENCE_S) -> None:
        async with asyncio.timeout(patience_s):
            await asyncio.get_running_loop().sock_sendall(self._socket, payload)

    async def send_one_byte_at_a_time(self, payload: bytes) -> None:
        """Send so that the relay receives the bytes in many small reads."""
        for position in range(len(payload)):
            await self.send(payload[position : position + 1])
            await asyncio.sleep(0)

    async def read_chunk(self, max_bytes: int = READ_BYTES) -> bytes:
        """Read the available bytes; empty: the end of the stream."""
        if self._received:
            taken = bytes(self._received[:max_bytes])
            del self._received[:max_bytes]
            return taken
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.get_running_loop().sock_recv(self._socket, max_bytes)

    def has_received(self) -> bool:
        """Return whether bytes, or the end of the stream, can be read now."""
        return bool(self._received or select.select([self._socket], [], [], 0)[0])

    async def read_exactly(self, size: int) -> bytes:
        self._reads += 1
        if self._reads % READS_PER_TURN == 0:
            await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            while len(self._received) < size:
                got = await asyncio.get_running_loop().sock_recv(self._socket, READ_BYTES)
                if not got:
                    raise EOFError(f"the stream ended after {bytes(self._received)!r}")
                self._received += got
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    async def read_response(self) -> Response:
        """Read the head of an HTTP response."""
        async with asyncio.timeout(PATIENCE_S):
            while b"\r\n\r\n" not in self._received:
                got = await asyncio.get_running_loop().sock_recv(self._socket, READ_BYTES)
                if not got:
                    raise EOFError(f"no response, but {bytes(self._received)!r}")
                self._received += got
        head, _, rest = bytes(self._received).partition(b"\r\n\r\n")
        self._received[:] = rest
        status, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":")[::2] for line in lines)
        return Response(
            int(status.split()[1]), {name.lower(): value.strip() for name, value in pairs}
        )

    async def upgrade(
        self,
        path: str = "/",
        *,
        trailing: bytes = b"",
        offers: Sequence[str] = (),
        **headers: str,
    ) -> Response:
        """Upgrade to a WebSocket; assert that the relay admits the client.

        Args:
            trailing: bytes sent together with the request, after it.
            offers: extensions, each in its own header line.
        """
        lines = [f"Sec-WebSocket-Extensions: {offer}" for offer in offers]
        await self.send(upgrade_request(path, lines=lines, **headers) + trailing)
        response = await self.read_response()
        assert response.status == 101, response
        name, *parameters = response.headers.get("sec-websocket-extensions", "").split("; ")
        self._compresses = name == "permessage-deflate"
        for parameter in parameters:
            if parameter.startswith("server_max_window_bits="):
                self._window_bits = int(parameter.partition("=")[2])
        return response

    @property
    def compresses(self) -> bool:
        """Whether permessage-deflate was negotiated."""
        return self._compresses

    async def peek_opcode(self) -> int:
        """Return the opcode of the next frame without consuming the frame."""
        first = await self.read_exactly(1)
        self._received[:0] = first
        return first[0] & 0x0F

    async def read_frame(self) -> Frame:
        first, second = await self.read_exactly(2)
        assert not second & 0x80, "a server must not mask frames"
        size = second & 0x7F
        if size == 126:
            (size,) = struct.unpack("!H", await self.read_exactly(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", await self.read_exactly(8))
        reserved = first >> 4 & 7
        is_negotiated = reserved == RSV1 and self._compresses
        assert not reserved or is_negotiated, "reserved bits without a negotiated extension"
        assert not reserved or first & 0x0F in (TEXT, BINARY), "only messages may be compressed"
        payload = await self.read_exactly(size)
        return Frame(first & 0x0F, payload, bool(first & 0x80), bool(reserved))

    async def read_message(self) -> str | bytes:
        """Read the next data message; skip pings and pongs before it."""
        received = await self.read_frame()
        while received.opcode in (PING, PONG):
            received = await self.read_frame()
        assert received.fin
        assert received.opcode in (TEXT, BINARY), received
        payload = received.inflated(self._window_bits)
        return payload.decode() if received.opcode == TEXT else payload

    async def read_close_frame(self) -> tuple[int, str]:
        """Read up to the close frame; return its code and reason."""
        received = await self.read_frame()
        while received.opcode != CLOSE:
            received = await self.read_frame()
        (code,) = struct.unpack("!H", received.payload[:2])
        return code, received.payload[2:].decode()

    async def complete_close(self) -> tuple[int, str]:
        """Read up to the close frame, and complete the closing handshake.

        Returns:
            The close code and reason of the relay.
        """
        code, reason = await self.read_close_frame()
        await self.send(frame(CLOSE, close_payload(code)))
        await self.read_to_end()
        self._socket.close()
        return code, reason

    async def read_to_end(self) -> bytes:
        """Read until the end of the connection; return the bytes read."""
        rest = bytearray()
        try:
            while got := await self.read_chunk():
                rest += got
        except ConnectionError:
            pass
        return bytes(rest)

    def end_stream(self) -> None:
        """End the outgoing stream (FIN)."""
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close the connection with RST."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


@asynccontextmanager
async def raw_websocket(
    host: str,
    port: int,
    path: str = "/",
    *,
    receive_buffer_bytes: int | None = None,
    trailing: bytes = b"",
    offers: Sequence[str] = (),
    **headers: str,
) -> AsyncIterator[RawClient]:
    """Connect, and upgrade to a WebSocket. See `RawClient.upgrade`."""
    async with await RawClient.connect(
        host, port, receive_buffer_bytes=receive_buffer_bytes
    ) as raw:
        await raw.upgrade(path, trailing=trailing, offers=offers, **headers)
        yield raw
