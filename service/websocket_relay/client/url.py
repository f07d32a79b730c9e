"""Parse the URL of a relay. Knows no connection."""

import re
from typing import NamedTuple, Self
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from websockets.exceptions import InvalidURI
from websockets.uri import parse_uri

from websocket_relay.client.errors import InvalidUrlError

EXAMPLE_URL = "ws://localhost:8443"
INVALID_URL = f"not a relay URL such as {EXAMPLE_URL}"
OPTIONS = frozenset({"since", "history", "echo", "session", "seen"})
"""Query parameters that the client sets itself."""

CHANNEL_PATH = re.compile(r"(?P<base>.*/)channels/(?P<channel>[^/]+)/?")


class RelayUrl(NamedTuple):
    """The URL of a relay.

    Attributes:
        url: without the path of a channel.
        channel: the channel in the path of the URL; `default` if there is none.
        is_secure: whether connections use TLS.
    """

    url: str
    channel: str
    is_secure: bool

    @classmethod
    def parse(cls, url: str) -> Self:
        """Split a URL.

        Raises:
            InvalidUrlError: the URL is invalid. The text does not repeat it.
        """
        try:
            is_secure = parse_uri(url).secure
            parts = urlsplit(url)
            (parts.hostname or "").encode("idna")
            options = OPTIONS & dict(parse_qsl(parts.query, True)).keys()
        except InvalidURI as error:
            raise InvalidUrlError(f"{INVALID_URL}: {error.msg}") from None
        except ValueError:  # its text may repeat a secret of the URL
            raise InvalidUrlError(INVALID_URL) from None
        if options:
            raise InvalidUrlError(f"{INVALID_URL}: {min(options)} is an option of `subscribe`")
        found = CHANNEL_PATH.fullmatch(parts.path)
        path, channel = (found["base"], found["channel"]) if found else (parts.path, "default")
        return cls(urlunsplit(parts._replace(path=path)), channel, is_secure)

    def with_session(self, session: str, seen: str) -> str:
        """Return the URL that resumes a session; an empty one opens a new session.

        Args:
            session: as in the welcome.
            seen: a position received before the oldest unanswered message was sent.
        """
        if not session:
            return self.url
        separator = "&" if urlsplit(self.url).query else "?"
        return f"{self.url}{separator}{urlencode({'session': session, 'seen': seen})}"
