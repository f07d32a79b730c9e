"""Follow where requests begin and end in a connection's bytes, for what the parser does not tell.

httptools gives no offsets, and no request line as it came. It is fed piece by piece instead, and
remains the one that finds faults. Knows RFC 9112 sections 2.2, 6 and 7.1, and no field's meaning.
"""

from enum import Enum, auto

HEAD_END = b"\r\n\r\n"

CHUNKS_AT_ONCE = 64
"""A piece has so many at most: the smallest take 0.1 ms."""


class RequestPart(Enum):
    """What comes next."""

    LINE = auto()  # the request line, or an empty one before it
    FIELDS = auto()  # the rest of the head, or trailers
    CONTENT = auto()
    CHUNKS = auto()


class RequestFraming:
    """Where a connection is in its requests.

    Attributes:
        line: the request line as it came, with its line end.
    """

    __slots__ = ("_left", "_part", "_size", "line")

    def __init__(self) -> None:
        self.begin_request()

    def begin_request(self) -> None:
        """Expect a request."""
        self.line = b""
        self._part = RequestPart.LINE
        self._left = 0  # bytes of the content, or of a chunk and its line end
        self._size = b""  # the line before a chunk, as far as it has come

    def begin_content(self, size: int) -> None:
        """Expect so many bytes after the head."""
        self._part, self._left = RequestPart.CONTENT, size

    def begin_chunks(self) -> None:
        """Expect chunks after the head."""
        self._part = RequestPart.CHUNKS

    def pass_piece(self, data: bytes, start: int) -> int:
        """Go past the next piece: no request ends within it, and none begins but at its start.

        Returns:
            Where it ends. Feed it to the parser before the next one is asked for.
        """
        match self._part:
            case RequestPart.LINE:
                return self._pass_line(data, start)
            case RequestPart.FIELDS:
                return _end_of_fields(data, start)
            case RequestPart.CONTENT:
                return self._pass_content(data, start)
            case RequestPart.CHUNKS:
                return self._pass_chunks(data, start)

    def _pass_line(self, data: bytes, start: int) -> int:
        end = _end_of_line(data, start)
        self.line += data[start:end]
        if self.line == b"\r\n":  # RFC 9112 section 2.2: robust servers ignore it
            self.line = b""
        elif self.line.endswith(b"\n"):
            self._part = RequestPart.FIELDS
        return end

    def _pass_content(self, data: bytes, start: int) -> int:
        end = min(len(data), start + self._left)
        self._left -= end - start
        return end

    def _pass_chunks(self, data: bytes, start: int) -> int:
        for _ in range(CHUNKS_AT_ONCE):
            start = self._pass_content(data, start)
            if start == len(data):
                break
            end = _end_of_line(data, start)
            self._size += data[start:end]
            start = end
            if self._size.endswith(b"\n"):
                size, self._size = _chunk_size(self._size), b""
                if not size:
                    self._part = RequestPart.FIELDS
                    break
                self._left = size + len(b"\r\n")
        return start


def _end_of_line(data: bytes, start: int) -> int:
    return data.find(b"\n", start) + 1 or len(data)


def _end_of_fields(data: bytes, start: int) -> int:
    if start < 3:  # their end may have begun in an earlier read: it may be at each of these
        return start + 1
    found = data.find(HEAD_END, start - 3)
    return found + len(HEAD_END) if found >= 0 else len(data)


def _chunk_size(line: bytes) -> int:
    """Return how much a chunk holds; 0 for what is no size, which the parser refuses."""
    try:
        return max(0, int(line.partition(b";")[0], 16))
    except ValueError:
        return 0
