"""Own the public keys that verify tokens, and the algorithms that each may be used for.

The type and curve of a key determine its algorithms, whatever a token's header states. Secrets are
never looked up here, so no token can cause a public key to be used as an HMAC secret (RFC 8725
section 3.1). Knows no token.
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

RSA_ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
CURVE_ALGORITHMS = {
    "secp256r1": "ES256",
    "secp256k1": "ES256K",
    "secp384r1": "ES384",
    "secp521r1": "ES512",
}
ED25519_ALGORITHMS = frozenset({"EdDSA", "Ed25519"})
ED448_ALGORITHMS = frozenset({"EdDSA", "Ed448"})
"""Two names of one algorithm: RFC 9864 deprecates EdDSA, which does not name the curve."""

MIN_RSA_BITS = 2048
"""RFC 7518 section 3.3. Shorter keys have been factored, or soon will be."""


class KeySource(Protocol):
    """A file or a JWK set that provides public keys."""

    async def find(self, algorithm: str, kid: str | None) -> PublicKey | None:
        """Return the key that a token names, or None if it is unknown.

        Args:
            algorithm: the algorithm in the token's header. The returned key is suitable for it.
            kid: the token's key id.

        Raises:
            RefusedError: the keys are unavailable now.
        """


def algorithms_of(key: object) -> frozenset[str]:
    """Return the algorithms of a public key; none for an unsupported type."""
    match key:
        case RSAPublicKey():
            return RSA_ALGORITHMS
        case EllipticCurvePublicKey() if key.curve.name in CURVE_ALGORITHMS:
            return frozenset({CURVE_ALGORITHMS[key.curve.name]})
        case Ed25519PublicKey():
            return ED25519_ALGORITHMS
        case Ed448PublicKey():
            return ED448_ALGORITHMS
    return frozenset()


def is_short(key: PublicKey) -> bool:
    """Return whether an RSA key is so short that its signatures can be forged."""
    return isinstance(key, RSAPublicKey) and key.key_size < MIN_RSA_BITS


class PublicKeyFile:
    """One public key from a file. The key id of a token is ignored.

    Args:
        file: the key, PEM.
        algorithms: the asymmetric algorithms that the key has to support.

    Raises:
        UnusableSettingError: the file can't be read, or the key is unsuitable.
    """

    def __init__(self, file: Path, algorithms: frozenset[str]) -> None:
        try:
            self._key = _read(file)
        except OSError as error:
            raise _unusable(file, error.strerror or "not readable") from None
        except ValueError as error:
            raise _unusable(file, str(error)) from None
        if is_short(self._key):
            raise _unusable(file, f"RSA key of fewer than {MIN_RSA_BITS} bits")
        unsupported = algorithms - algorithms_of(self._key)
        if unsupported:
            reason = f"this type of key does not support {', '.join(sorted(unsupported))}"
            raise _unusable(file, reason)

    async def find(self, algorithm: str, kid: str | None) -> PublicKey | None:
        """Return the key."""
        return self._key


def _read(file: Path) -> PublicKey:
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a directory, not a file")
    if not file.is_file():  # opening a FIFO, for example, would block
        raise FileNotFoundError(errno.ENOENT, "no such file")
    pem = file.read_bytes()
    if b"PRIVATE KEY" in pem:
        raise ValueError("a private key; the relay needs only the public key")
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("not a public key in PEM format") from None
    if not isinstance(key, PublicKey):
        raise ValueError("not an RSA, EC, Ed25519 or Ed448 key")
    return key


def _unusable(file: Path, reason: str) -> UnusableSettingError:
    return UnusableSettingError("auth.jwt.public_key_file", f"{file}: {reason}")
