"""Parse the URL of a relay. Knows no connection."""

import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from websockets.exceptions import InvalidURI
from websockets.uri import parse_uri

from websocket_relay.client.errors import InvalidUrlError

EXAMPLE_URL = "ws://localhost:8443"
INVALID_URL = f"not a relay URL such as {EXAMPLE_URL}"
DEFAULT_CHANNEL = "default"
CHANNEL_PATH = re.compile(r"(?P<base>.*/)channels/(?P<channel>[^/]+)/?")
RESERVED = frozenset({"since", "history", "echo", "session", "seen"})
"""Query parameters that the client sets: as options of a subscription, or for a session."""


@dataclass(frozen=True, slots=True)
class RelayUrl:
    """The URL of a relay.

    Attributes:
        url: without the path of a channel.
        channel: the channel in the path of the URL; `default` if there is none.
    """

    url: str
    channel: str

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
            reserved = RESERVED & {name for name, _ in parse_qsl(parts.query, True)}
        except InvalidURI as error:
            raise InvalidUrlError(f"{INVALID_URL}: {error.msg}") from None
        except ValueError:  # its text may repeat a secret of the URL
            raise InvalidUrlError(INVALID_URL) from None
        if reserved:
            raise InvalidUrlError(f"{INVALID_URL}: {min(reserved)} is an option of `subscribe`")
        found = CHANNEL_PATH.fullmatch(parts.path)
        if found is None:
            return cls(url, DEFAULT_CHANNEL)
        return cls(urlunsplit(parts._replace(path=found["base"])), found["channel"])

    @property
    def is_secure(self) -> bool:
        """Whether connections use TLS."""
        return urlsplit(self.url).scheme == "wss"

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
