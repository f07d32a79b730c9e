"""Decide by the Content-Type how a body is relayed: as text, as a batch of texts, or as binary.

Knows no request and no message.
"""

import re
from dataclasses import dataclass
from typing import Self

from websocket_relay.outcomes import Refusal, RefusedError

BATCH = "application/x-ndjson"
BATCHES = {
    BATCH,
    "application/ndjson",
    "application/jsonl",
    "application/x-jsonl",
    "application/jsonlines",
    "application/x-jsonlines",
}
"""Names of newline-delimited JSON. None is registered, and all are in use."""

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
OCTET_STREAM = "application/octet-stream"
TEXTS = {JSON, FORM, "application/xml"}
TEXT_SUFFIXES = ("+json", "+xml")  # RFC 6839

CHARSET = re.compile(r""";\s*charset\s*=\s*["']?([^\s;"']*)""", re.ASCII | re.IGNORECASE)
UTF_8 = {"utf-8", "utf8", "us-ascii", "ascii"}
LATIN_1 = {"iso-8859-1", "latin1"}
"""The default of HTTP before RFC 7231; some Java libraries still use it."""

ASCII_SUPERSETS = re.compile(
    r"(windows-|cp)125\d|iso-8859-\d+|koi8-[ru]|gbk|gb2312|gb18030|big5|euc-(jp|kr)"
)
"""Charsets in which ASCII is ASCII. UTF-16 is none: its text may consist of ASCII octets."""


@dataclass(frozen=True, slots=True)
class MediaType:
    """A media type in lower case.

    Attributes:
        name: without parameters; empty: none is given.
        charset: the parameter; empty: none is given.
    """

    name: str
    charset: str

    @classmethod
    def parse(cls, content_type: str) -> Self:
        """Return the media type in a Content-Type header."""
        name = content_type.partition(";")[0].strip().lower()
        charset = CHARSET.search(content_type)
        return cls(name, charset[1].lower() if charset else "")

    @property
    def is_batch(self) -> bool:
        """Whether each line of the body is a text message."""
        return self.name in BATCHES

    @property
    def is_text(self) -> bool:
        """Whether the body is one text message.

        An application's type is, if it has a charset that is relayed.
        """
        return (
            self.name.startswith("text/")
            or self.name in TEXTS
            or self.name.endswith(TEXT_SUFFIXES)
            or (
                self.charset in UTF_8 | LATIN_1
                and self.name.startswith("application/")
                and self.name != OCTET_STREAM
            )
        )

    def to_utf_8(self, body: bytes) -> bytes:
        """Return the text of a body in UTF-8. It may still be invalid.

        Raises:
            RefusedError: the charset is not supported.
        """
        if self.charset in LATIN_1:
            return body.decode("latin-1").encode()
        is_utf_8 = self.charset in UTF_8 or (
            body.isascii() and ASCII_SUPERSETS.fullmatch(self.charset)
        )
        if self.charset and not is_utf_8:
            raise RefusedError(Refusal.INVALID_MESSAGE, "charset not supported; send UTF-8")
        return body
