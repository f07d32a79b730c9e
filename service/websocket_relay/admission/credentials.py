"""Find the token that a request brings, and keep it out of the answer. Knows no key."""

import re
from collections.abc import Sequence
from itertools import pairwise
from urllib.parse import unquote

from websocket_relay.outcomes import Refusal, RefusedError, TokenProblem

SCHEME = "bearer"
PARAMETER = b"access_token="

POSITIONS_SUBPROTOCOL = "relay.v1"
"""Who offers it is told each message's position. It goes before all others."""

TOKEN_LIKE = re.compile(r"eyJ[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*")
"""A JSON Web Token: its first part is JSON, which begins with a brace and a quotation mark."""


def find_token(
    authorization: Sequence[str], query: bytes, subprotocols: Sequence[str]
) -> str | None:
    """Return the token of a request, or None where it brings none.

    Looked for in the Authorization header and the query (RFC 6750 sections 2.1 and 2.3), then
    among the subprotocols, for browsers can send nothing else.

    Args:
        authorization: what the header lines of that name say.
        query: what stands behind the question mark.
        subprotocols: what is offered; `bearer` and behind it the token.

    Raises:
        RefusedError: there is more than one such line: a proxy might have looked at another.
    """
    if len(authorization) > 1:
        raise RefusedError(Refusal.BAD_TOKEN, TokenProblem.MALFORMED)
    scheme, _, token = "".join(authorization).partition(" ")
    if scheme.lower() == SCHEME and (token := token.strip()):
        return token
    if PARAMETER in query:
        for part in query.split(b"&"):
            if part.startswith(PARAMETER) and len(part) > len(PARAMETER):
                return unquote(part[len(PARAMETER) :].decode("latin-1"))
    return next((token for token in _behind_bearer(subprotocols) if token), None)


def select_subprotocol(subprotocols: Sequence[str]) -> str | None:
    """Return which of the offered subprotocols is answered; never a token.

    The relay is transparent to what its clients speak, so where they do not offer what it speaks
    itself it takes their first offer: browsers drop a connection whose offer is not answered. A
    token that stands in the wrong place is not sent back either, for answers are logged more often.
    """
    if not subprotocols:
        return None
    if POSITIONS_SUBPROTOCOL in subprotocols:
        return POSITIONS_SUBPROTOCOL
    hidden = {SCHEME, *_behind_bearer(subprotocols)}
    for offer in subprotocols:
        if offer and offer not in hidden and not TOKEN_LIKE.fullmatch(offer):
            return offer
    return SCHEME if SCHEME in subprotocols else None


def _behind_bearer(subprotocols: Sequence[str]) -> list[str]:
    return [behind for offer, behind in pairwise(subprotocols) if offer == SCHEME]
