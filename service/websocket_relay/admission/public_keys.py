"""Own the public keys that tokens are checked with, and what each may be used for.

A key is good for the algorithms that its own kind and curve have, whatever a token says; a secret
is never looked up here. So no token can have a public key taken for a secret (RFC 8725 section
3.1). Knows no token.
"""

import errno
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from websocket_relay.outcomes import UnusableSettingError

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey | Ed448PublicKey

RSA_ALGORITHMS = frozenset({"RS256", "RS384", "RS512"})
CURVE_ALGORITHMS = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
EDWARDS_ALGORITHMS = frozenset({"EdDSA"})

MIN_RSA_BITS = 2048
"""RFC 7518 section 3.3. Shorter keys have been, or are about to be, factored."""


class KeySource(Protocol):
    """Where the keys come from."""

    async def find(self, algorithm: str, kid: str | None) -> PublicKey | None:
        """Return the key that a token names, or None where it is not known.

        Args:
            algorithm: what the token is signed with; the key returned is of that kind.
            kid: the token's key id.

        Raises:
            RefusedError: keys can't be had now.
        """


def algorithms_of(key: object) -> frozenset[str]:
    """Return what a public key may be used for; nothing for a key of another kind."""
    match key:
        case RSAPublicKey():
            return RSA_ALGORITHMS
        case EllipticCurvePublicKey() if key.curve.name in CURVE_ALGORITHMS:
            return frozenset({CURVE_ALGORITHMS[key.curve.name]})
        case Ed25519PublicKey() | Ed448PublicKey():
            return EDWARDS_ALGORITHMS
    return frozenset()


def is_short(key: PublicKey) -> bool:
    """Tell whether a key proves little because signatures can be made without the private one."""
    return isinstance(key, RSAPublicKey) and key.key_size < MIN_RSA_BITS


class PublicKeyFile:
    """One public key from a file; a token's key id says nothing then.

    Args:
        file: the key, PEM.
        algorithms: for which it has to do, those of secrets left out.

    Raises:
        UnfitError: it does not.
    """

    def __init__(self, file: Path, algorithms: frozenset[str]) -> None:
        try:
            self._key = _read(file)
        except OSError as error:
            raise _unfit(file, error.strerror or "can't be read") from None
        except ValueError as error:
            raise _unfit(file, str(error)) from None
        if is_short(self._key):
            raise _unfit(file, f"an RSA key of fewer than {MIN_RSA_BITS} bits")
        unsuited = algorithms - algorithms_of(self._key)
        if unsuited:
            raise _unfit(file, f"this kind of key is not for {', '.join(sorted(unsuited))}")

    async def find(self, algorithm: str, kid: str | None) -> PublicKey | None:
        """Return the key."""
        return self._key


def _read(file: Path) -> PublicKey:
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a directory, where a file should be")
    if not file.is_file():  # a FIFO, say, would be waited for
        raise FileNotFoundError(errno.ENOENT, "no such file")
    pem = file.read_bytes()
    if b"PRIVATE KEY" in pem:
        raise ValueError("a private key; the relay needs the public one only")
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("not a public key in PEM format") from None
    if not isinstance(key, PublicKey):
        raise ValueError("not an RSA, EC, Ed25519 or Ed448 key")
    return key


def _unfit(file: Path, reason: str) -> UnusableSettingError:
    return UnusableSettingError("auth.jwt.public_key_file", f"{file}: {reason}")
