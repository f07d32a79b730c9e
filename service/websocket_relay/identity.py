"""Define who a client is to others. Knows no connection and no token."""

import hashlib
import secrets
from base64 import urlsafe_b64encode
from typing import Any, NamedTuple

CLIENT_ID_BYTES = 9


class ClientIdentity(NamedTuple):
    """Who a client is.

    Attributes:
        client: id of its connection, or of its session if it has one.
        user: the subject of its token; empty: not known.
        info: what others are shown, any JSON value; None: nothing.
        may_return: whether it has a session, which it may resume on another replica.
        since: when it connected, in seconds since 1970.
    """

    client: str
    user: str
    info: Any
    may_return: bool
    since: float


def new_client_id() -> str:
    """Return the id of a connection."""
    return secrets.token_urlsafe(CLIENT_ID_BYTES)


def client_id_of(session: bytes) -> str:
    """Return the id of a session's client: the same on each replica, and no way to the session.

    Args:
        session: the source of what it publishes.
    """
    digest = hashlib.blake2b(session, digest_size=CLIENT_ID_BYTES, person=b"client").digest()
    return urlsafe_b64encode(digest).decode()
