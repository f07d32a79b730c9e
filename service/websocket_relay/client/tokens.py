"""Bearer tokens: their syntax, the request header, the expiry. Knows no connection."""

import json
import re
from base64 import urlsafe_b64decode
from collections.abc import Awaitable, Callable

from websocket_relay.client.errors import InvalidUrlError

TOKEN = re.compile(r"[\w.~+/-]+=*", re.ASCII)
"""The syntax of a bearer token (RFC 6750 section 2.1)."""

Token = str | Callable[[], str | Awaitable[str]]


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


def expiry_of(token: str) -> float | None:
    """Return the time at which a JSON Web Token expires, in seconds since 1970; None: unknown."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(claims["exp"])
    except (IndexError, KeyError, TypeError, ValueError, RecursionError):
        return None
