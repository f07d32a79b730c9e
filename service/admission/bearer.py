"""Find the token that a request brings, and keep it out of the answer. Knows no key."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from urllib.parse import unquote

SCHEME = "bearer"
PARAMETER = b"access_token="

OWN_SUBPROTOCOLS = frozenset({SCHEME, "relay.v1"})
"""Offers that speak to the relay itself; of any others the first is selected."""


def token_of(headers: Mapping[str, str], query: bytes, subprotocols: Sequence[str]) -> str | None:
    """Return the token of a request, or None where it brings none.

    Looked for in the Authorization header and the query (RFC 6750 sections 2.1 and 2.3), then
    among the subprotocols, for browsers can send nothing else.

    Args:
        headers: by their names in lower case.
        query: what stands behind the question mark.
        subprotocols: what is offered; `bearer` and behind it the token.
    """
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == SCHEME and (token := token.strip()):
        return token
    if PARAMETER in query:
        for part in query.split(b"&"):
            if part.startswith(PARAMETER) and len(part) > len(PARAMETER):
                return unquote(part[len(PARAMETER) :].decode("latin-1"))
    return next((token for token in _behind_bearer(subprotocols) if token), None)


def selected(subprotocols: Sequence[str]) -> str | None:
    """Return which of the offered subprotocols is answered; never a token.

    The relay is transparent to what its clients speak, so it takes the first offer that does not
    speak to the relay itself: browsers drop a connection whose offer is not answered.
    """
    if not subprotocols:
        return None
    secret = set(_behind_bearer(subprotocols))
    for offer in subprotocols:
        if offer and offer not in OWN_SUBPROTOCOLS and offer not in secret:
            return offer
    return SCHEME if SCHEME in subprotocols else None


def _behind_bearer(subprotocols: Sequence[str]) -> list[str]:
    return [behind for offer, behind in pairwise(subprotocols) if offer == SCHEME]
