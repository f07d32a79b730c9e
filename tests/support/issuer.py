"""Issue tokens as an identity provider: with real keys and signatures, and a real key server.

Knows no relay.
"""

import base64
import hashlib
import hmac
import json
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from jwt.algorithms import OKPAlgorithm, get_default_algorithms

from tests.support.http_server import HttpServer, send_answer
from tests.support.raw_client import PATIENCE_S

SECRET = "sixty-four bytes of secret, which is what HS512 asks for: abcdefg"
OTHER_SECRET = "another secret of sixty-four bytes, which no relay knows: abcdef"
ALL_CHANNELS = {"subscribe": ["*"], "publish": ["*"]}
CURVES = {
    "ES256": ec.SECP256R1,
    "ES256K": ec.SECP256K1,
    "ES384": ec.SECP384R1,
    "ES512": ec.SECP521R1,
}
RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
ASYMMETRIC = (*RSA, *CURVES, "EdDSA", "Ed25519", "Ed448")
ALGORITHMS = get_default_algorithms() | dict.fromkeys(("Ed25519", "Ed448"), OKPAlgorithm())

PrivateKey = (
    rsa.RSAPrivateKey
    | ec.EllipticCurvePrivateKey
    | ed25519.Ed25519PrivateKey
    | ed448.Ed448PrivateKey
)


@dataclass(frozen=True)
class Signer:
    """A key pair that signs with one algorithm.

    Args:
        kid: the key id; None: the key and its tokens have none.
    """

    algorithm: str
    key: PrivateKey
    kid: str | None = None

    @property
    def public_pem(self) -> bytes:
        return self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def private_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def jwk(self, **further: Any) -> dict[str, Any]:
        """Return the public key in the form of a key set, with further members."""
        members: dict[str, Any] = ALGORITHMS[self.algorithm].to_jwk(
            self.key.public_key(), as_dict=True
        )
        return members | self._key_id() | further

    def _key_id(self) -> dict[str, str]:
        return {} if self.kid is None else {"kid": self.kid}

    def token(self, headers: Mapping[str, Any] | None = None, **claims: Any) -> str:
        """Sign a token with these headers and claims, besides the usual ones."""
        return jwt.encode(
            claims_with(claims),
            self.key,
            self.algorithm,
            headers=self._key_id() | dict(headers or {}),
        )


def make_signer(algorithm: str, kid: str | None = None, number: int = 0) -> Signer:
    """Return a signer. Another number has another key pair."""
    kind = "RSA" if algorithm in RSA else CURVES.get(algorithm, algorithm)
    return Signer(algorithm, _private_key(kind, number), kid)


@cache
def _private_key(kind: Any, number: int) -> PrivateKey:
    if kind == "RSA":
        return rsa.generate_private_key(public_exponent=65_537, key_size=2048)
    if kind == "Ed448":
        return ed448.Ed448PrivateKey.generate()
    if kind in ("EdDSA", "Ed25519"):
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(kind())


def claims_with(claims: Mapping[str, Any]) -> dict[str, Any]:
    """Return claims that permit all channels for a minute, overridden by other claims.

    The value None removes a claim.
    """
    usual = {"relay": ALL_CHANNELS, "exp": int(time.time()) + 60}
    return {name: value for name, value in (usual | dict(claims)).items() if value is not None}


def sign_token(secret: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    """Sign a token with a secret."""
    return jwt.encode(claims_with(claims), secret, algorithm)


def base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def signed_as_is(header: Any, payload: Any, secret: str = SECRET) -> str:
    """Sign any header and payload with HS256, also those that a library rejects.

    Args:
        header, payload: values to encode as JSON, or bytes to use as they are.
    """
    parts = [
        part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload)
    ]
    signed = ".".join(base64url(part) for part in parts)
    signature = hmac.new(secret.encode(), signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{base64url(signature)}"


def key_set(*signers: Signer) -> bytes:
    return json.dumps({"keys": [signer.jwk() for signer in signers]}).encode()


class KeyServer(HttpServer):
    """An HTTP server of one document.

    Args:
        body: of the responses.
        context: for https; None: http.

    Attributes:
        status, headers: of the responses.
        closes_without_answer: whether it closes connections instead of responding.
        may_answer: requests wait for their responses while it is not set.
    """

    def __init__(self, body: bytes = b"", context: ssl.SSLContext | None = None) -> None:
        super().__init__(context)
        self.body = body
        self.status = 200
        self.headers: dict[str, str] = {}
        self.closes_without_answer = False
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._requests = 0
        self._request_count_grew = threading.Condition()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.may_answer.set()
        super().__exit__(kind, error, trace)

    @property
    def url(self) -> str:
        return f"{self.address}/keys.json"

    @property
    def requests(self) -> int:
        with self._request_count_grew:
            return self._requests

    def block_until_requested(self, count: int) -> None:
        """Block until so many requests have arrived."""
        with self._request_count_grew:
            assert self._request_count_grew.wait_for(lambda: self._requests >= count, PATIENCE_S), (
                self._requests
            )

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Send the document."""
        with self._request_count_grew:
            self._requests += 1
            self._request_count_grew.notify_all()
        self.may_answer.wait(PATIENCE_S)
        if not self.closes_without_answer:
            send_answer(request, self.status, self.body, **self.headers)


def write_key_file(directory: Path, content: bytes) -> str:
    """Write a file with a key; return its path."""
    file = directory / "key.pem"
    file.write_bytes(content)
    return str(file)


def channel_token(secret: str, *channels: str, lasts_s: int = 600, may_publish: bool = True) -> str:
    """Sign a token for channels.

    Args:
        lasts_s: the time until it expires, in seconds.
        may_publish: whether it also permits publishing.
    """
    permissions = {"subscribe": channels, "publish": channels if may_publish else ()}
    return jwt.encode({"exp": int(time.time()) + lasts_s, "relay": permissions}, secret, "HS256")
