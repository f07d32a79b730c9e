"""Check tokens (JWT, RFC 7519): signature, times, audience, issuer. Knows no channel.

Nothing of a token leaves this room but what it allows: refusals say which check it failed, in
words that stand here.
"""

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt
from jwt.algorithms import HMACAlgorithm
from jwt.warnings import InsecureKeyLengthWarning

from websocket_relay.admission.permissions import Permissions
from websocket_relay.admission.public_keys import KeySource, PublicKey, PublicKeyFile
from websocket_relay.config.model import SECRET_BYTES, JwtSettings
from websocket_relay.outcomes import Refusal, RefusedError, TokenProblem, UnusableSettingError

if TYPE_CHECKING:
    from jwt.types import Options

    from websocket_relay.admission.jwks import Jwks

MAX_CHARACTERS = 16_384
"""Of a token: more than others let into a whole request's head."""

NOT_BEFORE_LEEWAY_S = 5
"""Clocks differ: a token that was just made must not be refused because its maker's is ahead. There
is none for `exp`: whoever is let in would have to leave at once."""

CHECKS: "Options" = {
    "verify_exp": False,  # below, for the leeway is not for it
    "verify_iat": False,  # nor is a token refused because its maker's clock is ahead
}

TIMES = ("exp", "nbf", "iat")
"""Claims that are numbers (RFC 7519 section 4.1)."""

FAR_FUTURE = 253_402_300_800  # the year 10000
"""A token that expires there or beyond does not."""


class TokenVerifier:
    """What is asked of tokens.

    Args:
        settings: what the operator asks of them.

    Raises:
        UnfitError: the keys can't be used.
    """

    def __init__(self, settings: JwtSettings) -> None:
        self._algorithms = frozenset[str](settings.algorithms)
        self._audience = settings.audience or None
        self._issuer = settings.issuer or None
        self._secret = settings.secret.get_secret_value().encode()
        if self._algorithms & SECRET_BYTES.keys():
            _prove_secret(self._secret)
        public = self._algorithms - SECRET_BYTES.keys()
        self.jwks = _jwks(settings.jwks_url) if public and settings.jwks_url else None
        self._keys: KeySource | None = self.jwks
        if public and self.jwks is None:
            self._keys = PublicKeyFile(Path(settings.public_key_file), public)
        # PyJWT would say it to standard error, for every token; it is said once, at the start.
        warnings.simplefilter("ignore", InsecureKeyLengthWarning)

    async def rights(self, token: str) -> Permissions:
        """Return what a token allows.

        Raises:
            RefusedError: nothing, or it can't be checked now.
        """
        with self._faults():
            algorithm, kid = self._header(token)
        key = await self._key(algorithm, kid)
        with self._faults():
            claims = jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self._issuer,
                options=CHECKS,
                leeway=NOT_BEFORE_LEEWAY_S,
            )
            self._check_types(claims)
            return Permissions.of(claims, _expiry(claims))

    def _header(self, token: str) -> tuple[str, str | None]:
        if len(token) > MAX_CHARACTERS:
            raise jwt.DecodeError
        header = jwt.get_unverified_header(token)
        algorithm = header.get("alg")
        if not isinstance(algorithm, str) or algorithm not in self._algorithms:
            raise jwt.InvalidAlgorithmError
        return algorithm, header.get("kid")

    async def _key(self, algorithm: str, kid: str | None) -> PublicKey | bytes:
        if algorithm in SECRET_BYTES:
            return self._secret
        assert self._keys is not None  # the settings have a key for every algorithm
        key = await self._keys.find(algorithm, kid)
        if key is None:
            raise RefusedError(Refusal.BAD_TOKEN, TokenProblem.UNKNOWN_KEY)
        return key

    def _check_types(self, claims: dict[str, Any]) -> None:
        """Check the types of registered claims where PyJWT does not, or not always.

        Raises:
            jwt.PyJWTError: one has the wrong type, or there is an audience and none is asked for.
        """
        if not all(_is_time(claims[name]) for name in TIMES if name in claims):
            raise jwt.DecodeError
        if not isinstance(claims.get("iss", ""), str):
            raise jwt.DecodeError
        if not isinstance(claims.get("aud", ""), str | list):
            raise jwt.DecodeError
        if "aud" in claims and self._audience is None:  # PyJWT lets empty ones pass
            raise jwt.InvalidAudienceError

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Turn whatever a token makes PyJWT raise into a refusal."""
        try:
            yield
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise RefusedError(Refusal.BAD_TOKEN, self._fault(error)) from None

    def _fault(self, error: Exception) -> TokenProblem:
        match error:
            case jwt.ExpiredSignatureError():
                return TokenProblem.EXPIRED
            case jwt.ImmatureSignatureError():
                return TokenProblem.NOT_YET_VALID
            case jwt.InvalidAudienceError() if self._audience is None:
                # RFC 7519 section 4.1.3: it is for somebody else.
                return TokenProblem.SURPLUS_AUDIENCE
            case jwt.InvalidAudienceError() | jwt.MissingRequiredClaimError(claim="aud"):
                return TokenProblem.AUDIENCE
            case jwt.InvalidIssuerError() | jwt.MissingRequiredClaimError(claim="iss"):
                return TokenProblem.ISSUER
            case jwt.InvalidSignatureError():
                return TokenProblem.SIGNATURE
            case jwt.InvalidAlgorithmError():
                return TokenProblem.ALGORITHM
        return TokenProblem.MALFORMED


def _jwks(url: str) -> "Jwks":
    from websocket_relay.admission.jwks import Jwks  # httpx2 takes a tenth of a second

    return Jwks(url)


def _prove_secret(secret: bytes) -> None:
    try:
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except jwt.InvalidKeyError:
        problem = "a key in PEM, DER, SSH or JWK format, where a secret should be"
        raise UnusableSettingError("auth.jwt.secret", problem) from None
    if secret != secret.strip():
        # Who signs tokens has the secret without it, and would be let in nowhere.
        problem = "white space at an end, such as the newline of the file that it came from"
        raise UnusableSettingError("auth.jwt.secret", problem)


def _is_time(value: object) -> bool:
    """Tell whether a claim is a NumericDate (RFC 7519 section 2)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -math.inf < value < math.inf


def _expiry(claims: dict[str, Any]) -> float | None:
    """Return until when a token is good, in seconds since 1970; None: for ever.

    Raises:
        jwt.PyJWTError: that is over.
    """
    if "exp" not in claims:
        return None
    expiry: float = claims["exp"]
    if expiry >= FAR_FUTURE:
        return None
    if int(expiry) <= time.time():
        raise jwt.ExpiredSignatureError
    return int(expiry)
