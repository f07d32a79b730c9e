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


class Parser:
    """The incremental parser of one client's frames.

    Args:
        max_message_bytes: the maximum size of a message, after inflating.
        inflates: whether permessage-deflate is negotiated.

    Attributes:
        buffered_bytes: the memory used by the partial message.
    """

    __slots__ = (
        "_decoder",
        "_fin",
        "_inflate_cost_bytes",
        "_inflate_steps",
        "_inflater",
        "_inflates",
        "_is_restartable",
        "_is_restarting",
        "_mask",
        "_max_bytes",
        "_message",
        "_message_opcode",
        "_partial_frame",
        "_remaining_bytes",
        "_wire_bytes",
        "buffered_bytes",
    )

    def __init__(self, max_message_bytes: int, *, inflates: bool) -> None:
        self._max_bytes = max_message_bytes
        self._inflates = inflates
        self._partial_frame = b""  # a partial frame header, or a partial control frame
        # The current data frame
        self._remaining_bytes = 0
        self._mask = b""
        self._fin = False
        # The current message; the opcode is CONTINUATION while there is none
        self._message_opcode = CONTINUATION
        self._message = bytearray()
        self.buffered_bytes = 0
        self._wire_bytes = 0  # payload bytes as received, before inflating
        self._decoder: IncrementalDecoder | None = None
        self._inflater: Inflater | None = None
        self._is_restartable = (
            False  # whether the message being inflated starts within the last feed
        )
        self._inflate_steps: Generator[ParserEvent, None, None]
        self._is_restarting = False  # `discard_inflated` asked to inflate the message again
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
        if self._remaining_bytes:
            position = yield from self._consume_payload(data, 0)
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
                and self._message_opcode == CONTINUATION
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
                self._start_data_frame(first, size, mask)
                position = yield from self._consume_payload(data, body)
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
        if opcode == CONTINUATION and self._message_opcode == CONTINUATION:
            raise ProtocolViolationError(Close.PROTOCOL_ERROR, "unexpected continuation frame")
        if opcode != CONTINUATION and self._message_opcode != CONTINUATION:
            raise ProtocolViolationError(Close.PROTOCOL_ERROR, "expected continuation frame")
        may_inflate = is_compressed or self._inflater is not None
        max_bytes = _max_deflated_bytes(self._max_bytes) if may_inflate else self._max_bytes
        if self._wire_bytes + size > max_bytes:
            raise ProtocolViolationError(Close.MESSAGE_TOO_BIG)

    def _start_data_frame(self, first: int, size: int, mask: bytes) -> None:
        """Start a data frame that is outside the common case of `feed`."""
        opcode = first & OPCODE
        if opcode != CONTINUATION:
            self._message_opcode = opcode
            self._decoder = _Utf8Decoder() if opcode == TEXT else None
            self._inflater = Inflater(self._max_bytes) if first & RSV1 else None
        self._wire_bytes += size
        self._is_restartable = opcode != CONTINUATION
        self._remaining_bytes = size
        self._mask = mask
        self._fin = bool(first & FIN)

    def _consume_payload(self, data: bytes, start: int) -> Generator[ParserEvent, None, int]:
        """Consume the available payload of the frame, and yield the message if it is complete.

        Returns:
            The end offset of the consumed payload.
        """
        payload = apply_mask(data[start : start + self._remaining_bytes], self._mask)
        consumed = len(payload)
        self._remaining_bytes -= consumed
        rotation = consumed % MASK_BYTES
        self._mask = self._mask[rotation:] + self._mask[:rotation]
        if self._inflater is None:
            self._append(payload)
        else:
            yield from self._inflate(payload)
        if self._fin and not self._remaining_bytes:
            inflated_bytes = len(self._message) if self._inflater is not None else 0
            yield self._finish_message()
            if inflated_bytes > INFLATED_SLICE_BYTES:
                yield PAUSE
        return start + consumed

    def discard_inflated(self) -> bool:
        """Discard the output of the message that paused with HALF, if it can be inflated again.

        Returns:
            Whether it can: the last feed holds all of the message received so far.
        """
        if self._is_restartable:
            self._is_restarting = True
            self._inflate_steps.close()
            self._reset()
        return self._is_restartable

    def _reset(self) -> None:
        self._message = bytearray()
        self.buffered_bytes = 0
        self._decoder = self._inflater = None

    def _inflate(self, payload: bytes) -> Iterator[ParserEvent]:
        """Inflate the received part of a message; start again if the output was discarded."""
        while True:
            self._inflate_steps = self._inflate_once(payload)
            yield from self._inflate_steps
            if not self._is_restarting:
                break
            self._is_restarting = False
            self._decoder = _Utf8Decoder() if self._message_opcode == TEXT else None
            self._inflater = Inflater(self._max_bytes)
        self._is_restartable = False

    def _inflate_once(self, payload: bytes) -> Generator[ParserEvent, None, None]:
        assert self._inflater is not None
        pause = PAUSE
        for start in range(0, len(payload), DEFLATED_SLICE_BYTES):
            deflated = payload[start : start + DEFLATED_SLICE_BYTES]
            for part in self._inflater.feed(deflated):
                if self._inflate_cost_bytes > INFLATED_SLICE_BYTES:
                    self._inflate_cost_bytes = 0
                    yield pause
                self._append(part)
                self._inflate_cost_bytes += max(INFLATE_CALL_COST_BYTES, len(part))
                pause = PAUSE_INFLATING if len(part) == INFLATED_SLICE_BYTES else PAUSE
            self._inflate_cost_bytes += len(deflated) * DEFLATED_BYTE_COST

    def _append(self, payload: bytes, *, final: bool = False) -> None:
        if self._decoder is not None:
            try:
                self._decoder.decode(payload, final)
            except UnicodeDecodeError:
                raise ProtocolViolationError(Close.INVALID_UTF8) from None
            # Python's decoder rejects a surrogate only at its third octet. UTF-8 has no surrogates
            # (RFC 3629): reject it at the second one.
            undecoded, _ = self._decoder.getstate()
            if undecoded[:1] == b"\xed" and undecoded[1:] >= b"\xa0":
                raise ProtocolViolationError(Close.INVALID_UTF8)
        self._message += payload
        self.buffered_bytes = len(self._message)
        if self._inflater is not None:
            self.buffered_bytes += INFLATER_BYTES

    def _finish_message(self) -> ParserEvent:
        """Return the complete message and reset the state for the next one."""
        if self._inflater is not None:
            self._inflater.finish()
        self._append(b"", final=True)
        opcode, payload = self._message_opcode, bytes(self._message)
        self._message_opcode = CONTINUATION
        self._wire_bytes = 0
        self._reset()
        return opcode, payload


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
