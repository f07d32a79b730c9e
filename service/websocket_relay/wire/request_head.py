"""Parse the head of one HTTP/1.1 request, and refuse every head that could be read in two ways.

Knows RFC 9112 sections 2 to 6 and the Host, Upgrade and Connection fields. Knows no connection.
"""

import re
from http import HTTPStatus
from urllib.parse import unquote

from websocket_relay.outcomes import Refusal, RefusedError

HEAD_END = b"\r\n\r\n"

MAX_HEAD_BYTES = 65_536
"""Maximum size of a request head or of its trailers: above the limits of common servers."""

MAX_FIELDS = 256
"""Maximum number of header or trailer fields in one request. A field of four bytes takes fifty
times as much memory."""

MAX_SIZE_DIGITS = 15
"""Digits of a Content-Length, and hexadecimal ones of the size of a chunk: far below 64 bits."""

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"

EMPTY_LINES = b"\r\n" * 64
"""That many are skipped at a time; an expression would take memory for each."""

REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Z-]+) ([!-~]+)(?: HTTP/([0-9]\.[0-9]))?\r\n")
"""RFC 9112 section 3, and HTTP/0.9, which has no version. Names of methods with lower-case letters
do not exist."""

START_OF_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Z-]*(?: (?:[!-~]+(?: [HTP/0-9.]*)?)?)?\r?")
"""What is received of a request line that has no end yet."""

PART_OF_LINE = re.compile(rb"[ -~]*\r?")

BARE_LF = re.compile(rb"[^\r]\n")

FIELDS = re.compile(rb"(?:" + TOKEN + rb":[\t -~\x80-\xff]*\r\n)*")
"""RFC 9112 section 5, without obsolete line folding."""

HOST = re.compile(
    rb"((?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*|\[[0-9A-Fa-f:.]+\])(?::([0-9]{0,5}))?"
)
"""The value of a Host field (RFC 9110 section 7.2, RFC 3986 section 3.2)."""

ABSOLUTE = re.compile(rb"https?://([^/?]+)(/[^?]*)?(\?.*)?", re.IGNORECASE)
"""A request target in absolute form (RFC 9112 section 3.2.2)."""

METHODS = frozenset(
    ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
)
"""Methods that are passed on. Others are not implemented: metrics have a series for each."""

MAX_PORT = 65_535


class RequestHead:
    """The head of one request.

    Attributes:
        method: in upper case.
        version: 1.0 or 1.1.
        path: the path of the target, still percent-encoded.
        query: the part of the target after the question mark.
        headers: all fields, with their names in lower case.
        fields: the same by name. Several lines with one name are one list (RFC 9110 section 5.3).
        content_length: the size of the body in bytes.
        is_chunked: whether the body consists of chunks; `content_length` is 0 then.
    """

    __slots__ = (
        "content_length",
        "fields",
        "headers",
        "is_chunked",
        "method",
        "path",
        "query",
        "version",
    )

    content_length: int
    is_chunked: bool

    def __init__(
        self, method: str, version: str, target: tuple[bytes, bytes], lines: list[bytes]
    ) -> None:
        self.method = method
        self.version = version
        self.path, self.query = target
        self.headers: list[tuple[bytes, bytes]] = []
        self.fields: dict[bytes, bytes] = {}
        headers, fields = self.headers, self.fields
        for line in lines:
            name, _, value = line.partition(b":")
            name, value = name.lower(), value.strip(b" \t")
            headers.append((name, value))
            fields[name] = b"%b, %b" % (fields[name], value) if name in fields else value

    @property
    def decoded_path(self) -> str:
        """The path of the target, percent-decoded."""
        path = self.path.decode("ascii")
        return unquote(path) if "%" in path else path

    @property
    def offers_websocket(self) -> bool:
        """Whether the request offers an upgrade to WebSocket (RFC 9110 section 7.8)."""
        upgrade = self.fields.get(b"upgrade")
        return (
            upgrade is not None
            and b"websocket" in list_members(upgrade)
            and b"upgrade" in list_members(self.fields.get(b"connection", b""))
        )

    @property
    def keeps_alive(self) -> bool:
        """Whether another request may follow. HTTP/1.0 needs a negotiation that is not worth it."""
        connection = self.fields.get(b"connection")
        return self.version == "1.1" and (
            connection is None or b"close" not in list_members(connection)
        )

    @property
    def has_body(self) -> bool:
        """Whether a body follows, which may be empty if it is chunked."""
        return self.is_chunked or self.content_length > 0


def list_members(value: bytes) -> list[bytes]:
    """Return the members of a list field in lower case (RFC 9110 section 5.6.1)."""
    if b"," not in value:
        return [value.lower()]
    return [member.strip(b" \t").lower() for member in value.split(b",")]


def parse_head(received: bytes) -> RequestHead:
    """Parse a complete head, with the empty line at its end.

    Raises:
        RefusedError: it is malformed, ambiguous, too large or not supported.
    """
    if len(received) > MAX_HEAD_BYTES:
        raise RefusedError(Refusal.HEAD_TOO_LARGE)
    line = REQUEST_LINE.match(received)
    if line is None:
        raise RefusedError(Refusal.INVALID_REQUEST)
    method, target, version = line.groups()
    parsed_target = _parse_target(method, target)
    if version not in (b"1.1", b"1.0"):
        if version is not None and version.startswith(b"1."):
            raise RefusedError(Refusal.INVALID_REQUEST)
        status = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
        raise RefusedError(Refusal.INVALID_REQUEST, "HTTP version not supported", status)
    # The first CRLF of the empty line ends the last field.
    fields = received[line.end() : -2]
    if FIELDS.fullmatch(fields) is None:
        raise RefusedError(Refusal.INVALID_REQUEST)
    lines = fields.split(b"\r\n")
    lines.pop()
    if len(lines) > MAX_FIELDS:
        raise RefusedError(Refusal.HEAD_TOO_LARGE)
    head = RequestHead(method.decode("ascii"), version.decode("ascii"), parsed_target, lines)
    if head.method not in METHODS:
        status = HTTPStatus.NOT_IMPLEMENTED
        raise RefusedError(Refusal.INVALID_REQUEST, "method not supported", status)
    host = head.fields.get(b"host")
    if (host is None and version == b"1.1") or (host is not None and not HOST.fullmatch(host)):
        raise RefusedError(Refusal.INVALID_REQUEST)  # RFC 9112 section 3.2
    _parse_framing(head)
    return head


def skip_empty_lines(data: bytes, start: int) -> int:
    """Return the offset after empty lines, which robust servers ignore (RFC 9112 section 2.2)."""
    while data.startswith(EMPTY_LINES, start):
        start += len(EMPTY_LINES)
    while data.startswith(b"\r\n", start):
        start += len(b"\r\n")
    return start


def check_partial_head(received: bytes, checked: int) -> None:
    """Check what is received of a head that is not complete yet.

    Args:
        received: all of it.
        checked: how much of it was checked before.

    Raises:
        RefusedError: it can't become a request: it is TLS, for example.
    """
    if len(received) > MAX_HEAD_BYTES:
        raise RefusedError(Refusal.HEAD_TOO_LARGE)
    if not checked:
        check_request_line(received)
    elif b"\n" not in received:
        if not PART_OF_LINE.fullmatch(received, checked):
            raise RefusedError(Refusal.INVALID_REQUEST)
    elif received.find(b"\n") >= checked:
        check_request_line(received)
    if BARE_LF.search(received, max(0, checked - 1)):
        raise RefusedError(Refusal.INVALID_REQUEST)


def check_request_line(received: bytes, start: int = 0) -> None:
    """Check the request line at an offset, as far as it is received.

    Raises:
        RefusedError: it is no request line.
    """
    has_end = received.find(b"\n", start) >= 0
    form = REQUEST_LINE.match if has_end else START_OF_LINE.fullmatch
    if not form(received, start):
        raise RefusedError(Refusal.INVALID_REQUEST)


def _parse_target(method: bytes, target: bytes) -> tuple[bytes, bytes]:
    """Return the path and the query of a request target.

    Raises:
        RefusedError: it is neither in origin form nor in absolute form. CONNECT addresses a proxy
            and `*` the server as a whole, and clients must not send fragments.
    """
    if b"#" in target or method == b"CONNECT":
        raise RefusedError(Refusal.INVALID_REQUEST)
    if target.startswith(b"/"):
        path, _, query = target.partition(b"?")
        return path, query
    absolute = ABSOLUTE.fullmatch(target)
    if absolute is None:
        raise RefusedError(Refusal.INVALID_REQUEST)
    authority = HOST.fullmatch(absolute[1])
    if authority is None or not authority[1] or int(authority[2] or b"0") > MAX_PORT:
        raise RefusedError(Refusal.INVALID_REQUEST)
    return absolute[2] or b"/", (absolute[3] or b"")[1:]


def _parse_framing(head: RequestHead) -> None:
    """Determine the framing of the body (RFC 9112 sections 6.1 and 6.3).

    Raises:
        RefusedError: it is invalid or not supported.
    """
    length, coding = head.fields.get(b"content-length"), head.fields.get(b"transfer-encoding")
    head.content_length, head.is_chunked = 0, coding is not None
    if length is not None:
        digits = length.lstrip(b"0")
        if coding is not None or not length.isdigit() or len(digits) > MAX_SIZE_DIGITS:
            raise RefusedError(Refusal.INVALID_REQUEST)
        head.content_length = int(digits or b"0")
    if coding is not None and (coding.lower() != b"chunked" or head.version != "1.1"):
        *others, last = list_members(coding)
        if last == b"chunked" and any(others) and b"chunked" not in others:
            status = HTTPStatus.NOT_IMPLEMENTED
            raise RefusedError(Refusal.INVALID_REQUEST, "transfer coding not supported", status)
        raise RefusedError(Refusal.INVALID_REQUEST)
