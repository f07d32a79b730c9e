"""Define who a client is to others. Knows no connection and no token."""

import hashlib
import secrets
from base64 import urlsafe_b64encode
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.x509.oid import NameOID

CLIENT_ID_BYTES = 9

MAX_USER_CHARACTERS = 1024
"""Of a user that a token, the backend or a certificate names, and of one that an order names."""


class ClientIdentity(NamedTuple):
    """Who a client is.

    Attributes:
        client: id of its connection, or of its session if it has one.
        user: the user of its token or certificate; empty: not known.
        info: what others are shown, any JSON value; None: nothing.
        may_return: whether it has a session, which it may resume on another replica.
        since: when it connected, in seconds since 1970.
        address: of its machine, which a trusted proxy may have forwarded; empty: not known.
    """

    client: str
    user: str
    info: Any
    may_return: bool
    since: float
    address: str = ""


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


def user_of_certificate(certificate: bytes) -> str:
    """Return the user that a client's certificate names; empty: it names none.

    That is its common name, or the whole subject (RFC 4514) if it has none, or several. One that is
    longer than MAX_USER_CHARACTERS names no user.

    Args:
        certificate: DER; its chain is verified.
    """
    try:
        subject = x509.load_der_x509_certificate(certificate).subject
        names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError:  # OpenSSL accepts more than this parser
        return ""
    user = subject.rfc4514_string()
    if len(names) == 1 and isinstance(name := names[0].value, str) and name:
        user = name
    return user if len(user) <= MAX_USER_CHARACTERS else ""
