"""Parse a channel's URL, and redact it for display. Knows no connection."""

import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from websockets.exceptions import InvalidURI
from websockets.uri import parse_uri

from websocket_relay.client.errors import InvalidUrlError
from websocket_relay.client.proxy import redacted

EXAMPLE_URL = "ws://localhost:8443/channels/news"
INVALID_URL = f"not a channel URL such as {EXAMPLE_URL}"
TOKEN = re.compile(r"[\w.~+/-]+=*", re.ASCII)
"""The syntax of a bearer token (RFC 6750 section 2.1)."""


@dataclass(frozen=True, slots=True)
class ChannelUrl:
    """The URL of a channel.

    Attributes:
        url: without the parameters `since` and `history`.
        since: the position in its query; empty if it has none.
        history: the number of messages in its query; 0 if it has none.
    """

    url: str
    since: str
    history: int

    @classmethod
    def parse(cls, url: str) -> Self:
        """Split a URL.

        Raises:
            InvalidUrlError: the URL is invalid. The text does not repeat it.
        """
        try:
            parse_uri(url)
            parts = urlsplit(url)
            (parts.hostname or "").encode("idna")
            query = parse_qsl(parts.query, keep_blank_values=True)
            start = {name: value for name, value in query if name in {"since", "history"}}
            history = int(start.get("history", "0"))
        except InvalidURI as error:
            raise InvalidUrlError(f"{INVALID_URL}: {error.msg}") from None
        except ValueError:  # its text may repeat a secret of the URL
            raise InvalidUrlError(INVALID_URL) from None
        other_parameters = urlencode([pair for pair in query if pair[0] not in start])
        plain = urlunsplit(parts._replace(query=other_parameters)) if start else url
        return cls(plain, start.get("since", ""), history)

    @property
    def is_secure(self) -> bool:
        """Whether connections use TLS."""
        return urlsplit(self.url).scheme == "wss"

    @property
    def redacted(self) -> str:
        """The URL as it may be shown."""
        return redacted(self.url)

    def url_with_start(self, *, since: str, history: int) -> str:
        """Return the URL with the position or the history to start with; `since` has precedence."""
        start = {"since": since} if since else {"history": str(history)} if history else {}
        if not start:
            return self.url
        separator = "&" if urlsplit(self.url).query else "?"
        return f"{self.url}{separator}{urlencode(start)}"


def authorization(token: str) -> dict[str, str]:
    """Return the request header with a token; no header for an empty one.

    Raises:
        InvalidUrlError: the token has characters that no bearer token has.
    """
    if not token:
        return {}
    if not TOKEN.fullmatch(token):
        raise InvalidUrlError("invalid token: only letters, digits and -._~+/ are allowed")
    return {"Authorization": f"Bearer {token}"}
