"""Read the address of a channel, and show it without what is secret in it. Knows no connection."""

import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from websockets.exceptions import InvalidURI
from websockets.uri import parse_uri

from websocket_relay.client.errors import InvalidUrlError

EXAMPLE = "ws://localhost:8443/channels/news"
NO_ADDRESS = f"that is not an address such as {EXAMPLE}"
TOKEN = re.compile(r"[\w.~+/-]+=*", re.ASCII)
"""What a bearer token is made of (RFC 6750 section 2.1)."""


@dataclass(frozen=True, slots=True)
class ChannelUrl:
    """Where a channel is.

    Attributes:
        url: without what is asked for.
        since: the position that its query has, or an empty text.
        history: likewise, how many messages.
    """

    url: str
    since: str
    history: int

    @classmethod
    def parse(cls, url: str) -> Self:
        """Take an address apart.

        Raises:
            AddressError: it is none. The text does not repeat it.
        """
        try:
            parse_uri(url)
            parts = urlsplit(url)
            (parts.hostname or "").encode("idna")
            asked = parse_qsl(parts.query, keep_blank_values=True)
            wishes = {name: value for name, value in asked if name in {"since", "history"}}
            history = int(wishes.get("history", "0"))
        except InvalidURI as error:
            raise InvalidUrlError(f"{NO_ADDRESS}: {error.msg}") from None
        except ValueError:  # its text may repeat what is secret
            raise InvalidUrlError(NO_ADDRESS) from None
        rest = urlencode([pair for pair in asked if pair[0] not in wishes])
        plain = urlunsplit(parts._replace(query=rest)) if wishes else url
        return cls(plain, wishes.get("since", ""), history)

    @property
    def is_secure(self) -> bool:
        """Whether it is spoken to by TLS."""
        return urlsplit(self.url).scheme == "wss"

    @property
    def shown(self) -> str:
        """The address without user, password and query, where a token may be."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def asking(self, *, since: str, history: int) -> str:
        """Return the address with what is to be heard first."""
        wish = {"since": since} if since else {"history": str(history)} if history else {}
        if not wish:
            return self.url
        joint = "&" if urlsplit(self.url).query else "?"
        return f"{self.url}{joint}{urlencode(wish)}"


def authorization(token: str) -> dict[str, str]:
    """Return the header that brings a token.

    Raises:
        AddressError: no token looks like that.
    """
    if not token:
        return {}
    if not TOKEN.fullmatch(token):
        raise InvalidUrlError("that is no token: it has letters, digits and -._~+/ only")
    return {"Authorization": f"Bearer {token}"}
