"""Parse a client's frames into messages by RFC 6455 and RFC 7692.

The parser reports a violation as soon as the bytes show it: a forbidden header before the payload,
an oversized message at the header that declares the size, invalid UTF-8 at the first invalid octet,
even within a frame. It unmasks and inflates bytes as they arrive. Of a partial message it therefore
keeps only the decoded payload, at most the maximum message size. Knows no connection.
"""

from codecs import IncrementalDecoder, getincrementaldecoder
from collections.abc import Generator, Iterator

from websockets.frames import apply_mask  # type: ignore[attr-defined]  # in C where built

from websocket_relay.messages import BINARY, TEXT
from websocket_relay.outcomes import Close
from websocket_relay.wire.deflate import (
    DEFLATED_SLICE_BYTES,
    INFLATED_SLICE_BYTES,
    INFLATER_BYTES,
    Inflater,
)
from websocket_relay.wire.frames import (
    CLOSE,
    CONTINUATION,
    CONTROL,
    FIN,
    MAX_CONTROL_BYTES,
    OPCODE,
    PING,
    PONG,
    RESERVED,
    RSV1,
    ProtocolViolationError,
)

_Utf8Decoder = getincrementaldecoder("utf-8")

ParserEvent = tuple[int, bytes]
"""The opcode and payload of a complete message or of a control frame."""

PAUSE: ParserEvent = (CONTINUATION, b"pause")
"""Yielded after a slice of work, so that the event loop can serve others. Compare by identity."""

PAUSE_INFLATING: ParserEvent = (CONTINUATION, b"half")
"""Like PAUSE, within a message that inflates fast: complete it before others start theirs."""

PAUSE_INTERVAL_BYTES = 2_048  # input between two pauses: about 300 of the smallest frames
INFLATE_CALL_COST_BYTES = 1_024  # time of one zlib call, in bytes inflated in that time
DEFLATED_BYTE_COST = INFLATED_SLICE_BYTES // DEFLATED_SLICE_BYTES
"""Worst-case time to inflate one compressed byte, in the unit of INFLATE_CALL_COST_BYTES."""

UNFRAGMENTED = (FIN | TEXT, FIN | BINARY)  # first byte of a single-frame, uncompressed message

MASK_BIT = 0x80
MASK_BYTES = 4

OPCODES = (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG)

CLOSE_CODES = frozenset([*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)])
"""Codes allowed in a close frame (RFC 6455 section 7.4 and the IANA registry)."""


class _PartialMessage:
    """The data message that is being received.

    Args:
        opcode: TEXT or BINARY.
        inflater: of a compressed message; None: it is not compressed.

    Attributes:
        payload: the decoded bytes.
        wire_bytes: payload bytes as declared by the frames so far, before inflating.
        decoder: checks text; None: the message is binary.
        remaining_bytes: of the current frame's payload.
        mask: of the current frame, rotated by what was received of it.
        is_last_frame: whether the current frame is the message's last.
        is_restartable: whether the message being inflated starts within the last feed.
        is_restarting: whether `discard_inflated` asked to inflate the message again.
        inflate_steps: the inflating of what was received.
    """

    __slots__ = (
        "decoder",
        "inflate_steps",
        "inflater",
        "is_last_frame",
        "is_restartable",
        "is_restarting",
        "mask",
        "opcode",
        "payload",
        "remaining_bytes",
        "wire_bytes",
    )

    remaining_bytes: int
    mask: bytes
    is_last_frame: bool
    is_restartable: bool
    inflate_steps: Generator[ParserEvent, None, None]

    def __init__(self, opcode: int, inflater: Inflater | None) -> None:
        self.opcode = opcode
        self.wire_bytes = 0
        self.is_restarting = False
        self.start(inflater)

    def start(self, inflater: Inflater | None) -> None:
        """Start the decoding from the message's beginning."""
        self.payload = bytearray()
        self.inflater = inflater
        self.decoder: IncrementalDecoder | None = _Utf8Decoder() if self.opcode == TEXT else None

    def append(self, payload: bytes, *, final: bool = False) -> None:
        """Append decoded bytes.

        Raises:
            ProtocolViolationError: text is not UTF-8.
        """
        if self.decoder is not None:
            try:
                self.decoder.decode(payload, final)
            except UnicodeDecodeError:
                raise ProtocolViolationError(Close.INVALID_UTF8) from None
            # Python's decoder rejects a surrogate only at its third octet. UTF-8 has no surrogates
            # (RFC 3629): reject it at the second one.
            undecoded, _ = self.decoder.getstate()
            if undecoded[:1] == b"\xed" and undecoded[1:] >= b"\xa0":
                raise ProtocolViolationError(Close.INVALID_UTF8)
        self.payload += payload

    def finish(self) -> bytes:
        """Return the complete payload, and keep nothing of it.

        Raises:
            ProtocolViolationError: text or compressed data ends within a character or a block.
        """
        if self.inflater is not None:
            self.inflater.finish()
        self.append(b"", final=True)
        payload = bytes(self.payload)
        self.start(None)
        return payload

    @property
    def memory_bytes(self) -> int:
        """The memory that the message uses."""
        return len(self.payload) + (INFLATER_BYTES if self.inflater is not None else 0)


class Parser:
    """The incremental parser of one client's frames.

    Args:
        max_message_bytes: the maximum size of a message, after inflating.
        inflates: whether permessage-deflate is negotiated.

    Attributes:
        buffered_bytes: the memory used by the partial message.
    """

    # What an idle client costs: everything else is in the message that is being received.
    __slots__ = (
        "_inflate_cost_bytes",
        "_inflates",
        "_max_bytes",
        "_message",
        "_partial_frame",
        "buffered_bytes",
    )

    def __init__(self, max_message_bytes: int, *, inflates: bool) -> None:
        self._max_bytes = max_message_bytes
        self._inflates = inflates
        self._partial_frame = b""  # a partial frame header, or a partial control frame
        self._message: _PartialMessage | None = None
        self.buffered_bytes = 0
        self._inflate_cost_bytes = 0  # cost of inflating since the last pause, as output bytes

    # Hot path: splitting it into functions would cost a call for every frame.
    def feed(self, data: bytes) -> Iterator[ParserEvent]:  # noqa: C901
        """Parse more bytes and yield the messages and control frames that they complete.

        Long work yields a PAUSE or a HALF every 0.1 to 0.5 ms. A close frame is the last event.
        Exhaust the iterator before feeding more bytes.

        Raises:
            ProtocolViolationError: the next bytes violate the protocol. Feed nothing after it.
        """
        if self._partial_frame:
            data, self._partial_frame = self._partial_frame + data, b""
        self._inflate_cost_bytes = 0
        position, end, pause_at = 0, len(data), PAUSE_INTERVAL_BYTES
        if self._message is not None and self._message.remaining_bytes:
            position = yield from self._consume_payload(self._message, data, 0)
        while end - position >= 2:
            if position > pause_at:
                yield PAUSE
                pause_at = position + PAUSE_INTERVAL_BYTES
            first, second = data[position], data[position + 1]
            size = second & 0x7F
            body = position + 2 + MASK_BYTES
            if size > 125:
                size, body = _extended_length(data, position, size)
            is_complete = body + size <= end
            if (
                is_complete
                and first in UNFRAGMENTED
                and second & MASK_BIT
                and size <= self._max_bytes
                and self._message is None
            ):
                # The common case: a complete, uncompressed message in one frame.
                payload = apply_mask(data[body : body + size], data[body - MASK_BYTES : body])
                if first == FIN | TEXT and not payload.isascii():
                    _check_utf8(payload)
                position = body + size
                yield first & OPCODE, payload
                continue
            self._check_head(first, second, size)
            if body > end or (first & CONTROL and not is_complete):
                break
            mask = data[body - MASK_BYTES : body]
            if first & CONTROL:
                position = body + size
                yield _control_event(first & OPCODE, apply_mask(data[body:position], mask))
                if first & OPCODE == CLOSE:
                    return
            else:
                message = self._start_data_frame(first, size, mask)
                position = yield from self._consume_payload(message, data, body)
        self._partial_frame = data[position:]

    def _check_head(self, first: int, second: int, size: int) -> None:
        """Check the first two bytes of a frame and its size, as far as the size is received."""
        opcode, reserved = first & OPCODE, first & RESERVED
        is_compressed = reserved == RSV1 and self._inflates and opcode in (TEXT, BINARY)
        if not second & MASK_BIT:
            raise ProtocolViolationError(Close.PROTOCOL_ERROR, "unmasked frame")
        if reserved and not is_compressed:
            raise ProtocolViolationError(Close.PROTOCOL_ERROR, "reserved bits")
        if opcode not in OPCODES:
            raise ProtocolViolationError(Close.PROTOCOL_ERROR, "reserved opcode")
        if opcode & CONTROL:
            if not first & FIN:
                raise ProtocolViolationError(Close.PROTOCOL_ERROR, "fragmented control frame")
            if size > MAX_CONTROL_BYTES:
                raise ProtocolViolationError(Close.PROTOCOL_ERROR, "control frame too long")
            return
        message = self._message
        if opcode == CONTINUATION and message is None:
            raise ProtocolViolationError(Close.PROTOCOL_ERROR, "unexpected continuation frame")
        if opcode != CONTINUATION and message is not None:
            raise ProtocolViolationError(Close.PROTOCOL_ERROR, "expected continuation frame")
        may_inflate = is_compressed or (message is not None and message.inflater is not None)
        max_bytes = _max_deflated_bytes(self._max_bytes) if may_inflate else self._max_bytes
        if (message.wire_bytes if message is not None else 0) + size > max_bytes:
            raise ProtocolViolationError(Close.MESSAGE_TOO_BIG)

    def _start_data_frame(self, first: int, size: int, mask: bytes) -> _PartialMessage:
        """Start a data frame that is outside the common case of `feed`; return its message."""
        message = self._message
        is_first = message is None
        if message is None:
            inflater = Inflater(self._max_bytes) if first & RSV1 else None
            self._message = message = _PartialMessage(first & OPCODE, inflater)
        message.wire_bytes += size
        message.is_restartable = is_first
        message.remaining_bytes = size
        message.mask = mask
        message.is_last_frame = bool(first & FIN)
        return message

    def _consume_payload(
        self, message: _PartialMessage, data: bytes, start: int
    ) -> Generator[ParserEvent, None, int]:
        """Consume the available payload of the frame, and yield the message if it is complete.

        Returns:
            The end offset of the consumed payload.
        """
        payload = apply_mask(data[start : start + message.remaining_bytes], message.mask)
        consumed = len(payload)
        message.remaining_bytes -= consumed
        rotation = consumed % MASK_BYTES
        message.mask = message.mask[rotation:] + message.mask[:rotation]
        if message.inflater is None:
            message.append(payload)
        else:
            yield from self._inflate(message, payload)
        if not message.is_last_frame or message.remaining_bytes:
            self.buffered_bytes = message.memory_bytes
            return start + consumed
        inflated_bytes = len(message.payload) if message.inflater is not None else 0
        self._message = None
        self.buffered_bytes = 0
        yield message.opcode, message.finish()
        if inflated_bytes > INFLATED_SLICE_BYTES:
            yield PAUSE
        return start + consumed

    def discard_inflated(self) -> bool:
        """Discard the output of the message that paused with HALF, if it can be inflated again.

        Returns:
            Whether it can: the last feed holds all of the message received so far.
        """
        message = self._message
        assert message is not None
        if message.is_restartable:
            message.is_restarting = True
            message.inflate_steps.close()
            message.start(None)
            self.buffered_bytes = 0
        return message.is_restartable

    def _inflate(self, message: _PartialMessage, payload: bytes) -> Iterator[ParserEvent]:
        """Inflate the received part of a message; start again if the output was discarded."""
        while True:
            message.inflate_steps = self._inflate_once(message, payload)
            yield from message.inflate_steps
            if not message.is_restarting:
                break
            message.is_restarting = False
            message.start(Inflater(self._max_bytes))
        message.is_restartable = False

    def _inflate_once(
        self, message: _PartialMessage, payload: bytes
    ) -> Generator[ParserEvent, None, None]:
        assert message.inflater is not None
        pause = PAUSE
        for start in range(0, len(payload), DEFLATED_SLICE_BYTES):
            deflated = payload[start : start + DEFLATED_SLICE_BYTES]
            for part in message.inflater.feed(deflated):
                if self._inflate_cost_bytes > INFLATED_SLICE_BYTES:
                    self._inflate_cost_bytes = 0
                    self.buffered_bytes = message.memory_bytes
                    yield pause
                message.append(part)
                self._inflate_cost_bytes += max(INFLATE_CALL_COST_BYTES, len(part))
                pause = PAUSE_INFLATING if len(part) == INFLATED_SLICE_BYTES else PAUSE
            self._inflate_cost_bytes += len(deflated) * DEFLATED_BYTE_COST


def _extended_length(data: bytes, position: int, size: int) -> tuple[int, int]:
    """Decode the 16-bit or 64-bit length of the frame at `position`.

    Returns:
        The payload length, and the offset of the payload. If the length is incomplete, `size` and
        an offset past the end of `data`.
    """
    length_bytes = 2 if size == 126 else 8
    length = data[position + 2 : position + 2 + length_bytes]
    if len(length) < length_bytes:
        return size, len(data) + 1
    size = int.from_bytes(length, "big")
    if size >> 63:
        raise ProtocolViolationError(
            Close.PROTOCOL_ERROR, "payload length: most significant bit set"
        )
    if size < 126 or (length_bytes == 8 and size < 65_536):
        raise ProtocolViolationError(Close.PROTOCOL_ERROR, "payload length: not minimally encoded")
    return size, position + 2 + length_bytes + MASK_BYTES


def _max_deflated_bytes(size: int) -> int:
    """Return an upper bound on the compressed size of `size` bytes, for any sane compressor.

    zlib's bound for its worst settings is about size + size / 8 (deflateBound).
    """
    return size + (size >> 3) + 1024


def _check_utf8(text: bytes) -> None:
    try:
        text.decode()
    except UnicodeDecodeError:
        raise ProtocolViolationError(Close.INVALID_UTF8) from None


def _control_event(opcode: int, payload: bytes) -> ParserEvent:
    """Return the event of a control frame; validate a close frame's payload (section 5.5.1)."""
    if opcode == CLOSE and payload:
        if len(payload) == 1:
            raise ProtocolViolationError(Close.PROTOCOL_ERROR, "close frame too short")
        if int.from_bytes(payload[:2], "big") not in CLOSE_CODES:
            raise ProtocolViolationError(Close.PROTOCOL_ERROR, "invalid close code")
        _check_utf8(payload[2:])
    return opcode, payload
