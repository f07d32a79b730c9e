"""Find the token in a request, and keep it out of the response. Knows no key."""

import re
from collections.abc import Sequence
from itertools import pairwise
from urllib.parse import unquote

from websocket_relay.outcomes import Refusal, RefusedError, TokenProblem
from websocket_relay.wire.relay_v1 import SUBPROTOCOL

SCHEME = "bearer"
PARAMETER = b"access_token="

TOKEN_LIKE = re.compile(r"eyJ[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*")
"""A JSON Web Token: its first part is base64url of JSON, which begins with a brace and a quotation
mark."""


def find_token(
    authorization: Sequence[str], query: bytes, subprotocols: Sequence[str]
) -> str | None:
    """Return the token of a request, or None if it has none.

    The order is: the Authorization header, the query (RFC 6750 sections 2.1 and 2.3), the
    subprotocols, which are the only header that a browser's WebSocket can set.

    Args:
        authorization: the values of the Authorization header lines.
        query: the part of the URL after the question mark.
        subprotocols: the offered subprotocols: `bearer` in any case, followed by the token.

    Raises:
        RefusedError: there is more than one Authorization line. A proxy might have checked another
            one than the relay.
    """
    if len(authorization) > 1:
        raise RefusedError(Refusal.INVALID_TOKEN, TokenProblem.MALFORMED)
    scheme, _, token = "".join(authorization).partition(" ")
    if _is_scheme(scheme) and (token := token.strip()):
        return token
    if PARAMETER in query:
        for part in query.split(b"&"):
            if part.startswith(PARAMETER) and len(part) > len(PARAMETER):
                return unquote(part[len(PARAMETER) :].decode("latin-1"))
    return next((token for token in _after_bearer(subprotocols) if token), None)


def select_subprotocol(subprotocols: Sequence[str]) -> str | None:
    """Return the offered subprotocol to answer with; never a token.

    The relay is transparent to the clients' own protocol. If a client does not offer the relay's
    subprotocol, its first offer is accepted, because browsers drop a connection whose offer is not
    answered. A token in the wrong place is not echoed either: responses are logged more often.
    """
    if not subprotocols:
        return None
    if SUBPROTOCOL in subprotocols:
        return SUBPROTOCOL
    tokens = _after_bearer(subprotocols)
    for offer in subprotocols:
        hidden = _is_scheme(offer) or offer in tokens or TOKEN_LIKE.fullmatch(offer)
        if offer and not hidden:
            return offer
    # As it was offered: a browser compares the two with their case.
    return next(filter(_is_scheme, subprotocols), None)


def _after_bearer(subprotocols: Sequence[str]) -> list[str]:
    return [following for offer, following in pairwise(subprotocols) if _is_scheme(offer)]


def _is_scheme(offer: str) -> bool:
    return offer.lower() == SCHEME  # schemes are case-insensitive (RFC 9110 section 11.1)
