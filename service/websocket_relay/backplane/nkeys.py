"""Sign in to NATS with a user's nkey: an Ed25519 key in base32, with a checksum.

Format: https://github.com/nats-io/nkeys. Knows no file and no connection.
"""

import re
from base64 import b32decode, b32encode, b64encode
from binascii import crc_hqx

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SEED = re.compile(r"\bSU[A-Z2-7]{56}\b")
"""The seed of a user. In a .creds file it stands after the JWT."""

JWT = re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]+")

USER_PREFIX = 20 << 3
"""The first byte of a user's public key: it makes the text begin with U."""


class UserKey:
    """The key of a user.

    Args:
        text: the content of a file with the user's seed.

    Raises:
        ValueError: there is no valid seed.
    """

    def __init__(self, text: str) -> None:
        found = SEED.search(text)
        if found is None:
            raise ValueError("no seed of a user, which begins with SU")
        raw = b32decode(f"{found[0]}======")
        if _checksum(raw[:-2]) != raw[-2:]:
            raise ValueError("invalid seed: wrong checksum")
        self._key = Ed25519PrivateKey.from_private_bytes(raw[2:34])

    @property
    def public(self) -> str:
        """The public key, by which NATS knows the user."""
        raw = bytes([USER_PREFIX]) + self._key.public_key().public_bytes_raw()
        return b32encode(raw + _checksum(raw)).decode()

    def sign(self, nonce: str) -> bytes:
        """Return the signature of the server's nonce, in base64."""
        return b64encode(self._key.sign(nonce.encode()))


def user_jwt(text: str) -> str:
    """Return the user's JWT in the content of a .creds file.

    Raises:
        ValueError: there is none.
    """
    found = JWT.search(text)
    if found is None:
        raise ValueError("no JWT of a user")
    return found[0]


def _checksum(raw: bytes) -> bytes:
    return crc_hqx(raw, 0).to_bytes(2, "little")
