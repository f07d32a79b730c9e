"""Verify tokens (JWT, RFC 7519): signature, times, audience, issuer. Knows no channel.

Only the permissions of a token leave this module. A refusal names the check that failed, with a
fixed text and no part of the token.
"""

import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt
from jwt.algorithms import HMACAlgorithm, OKPAlgorithm
from jwt.warnings import InsecureKeyLengthWarning

from websocket_relay.admission.credentials import find_token
from websocket_relay.admission.permissions import Permissions, find_claim
from websocket_relay.admission.public_keys import KeySource, PublicKey, PublicKeyFile
from websocket_relay.config.model import SECRET_BYTES, JwtSettings
from websocket_relay.outcomes import Refusal, RefusedError, TokenProblem, UnusableSettingError

if TYPE_CHECKING:
    from jwt.types import Options

    from websocket_relay.admission.jwks import Jwks
    from websocket_relay.admission.policy import Action, AdmissionRequest, RequestSource

log = logging.getLogger(__name__)

MAX_CHARACTERS = 16_384
"""Maximum length of a token. Other servers allow less for a whole request head."""

for _name in ("Ed25519", "Ed448"):  # RFC 9864
    with suppress(ValueError):  # this version of PyJWT knows it
        jwt.register_algorithm(_name, OKPAlgorithm())

NOT_BEFORE_LEEWAY_S = 5
"""Minimum leeway of `nbf`. Clocks differ: a token that was just issued must be accepted though the
issuer's clock is ahead."""

CHECKS: "Options" = {
    "verify_exp": False,  # checked in _expiry, because its leeway differs from that of nbf
    "verify_iat": False,  # the issuer's clock may be ahead
}

TIMES = ("exp", "nbf", "iat")
"""Claims that are numbers (RFC 7519 section 4.1)."""

FAR_FUTURE = 253_402_300_800  # the year 10000
"""A token with a later `exp` never expires."""


class TokenVerifier:
    """The checks that a token has to pass, as an authenticator: see `policy.Authenticator`.

    Args:
        settings: keys, algorithms, audience, issuer and leeway.
        jwks: the fetched keys of settings.jwks_url, after a reload; None: fetch them.

    Raises:
        UnusableSettingError: the keys can't be used.
    """

    def __init__(self, settings: JwtSettings, jwks: "Jwks | None" = None) -> None:
        self._algorithms = list[str](settings.algorithms)
        self._audiences = settings.audience or None
        self._issuers = settings.issuer or None
        self._leeway_s = settings.leeway_s
        self._claim = settings.claim
        self._secrets: Sequence[PublicKey | bytes] = [secret for _, secret in settings.all_secrets]
        if SECRET_BYTES.keys() & self._algorithms:
            for name, secret in settings.all_secrets:
                _check_secret(f"auth.jwt.{name}", secret)
        public = frozenset(self._algorithms) - SECRET_BYTES.keys()
        self.jwks = jwks
        if jwks is None and public and settings.jwks_url:
            self.jwks = _jwks(settings.jwks_url)
        self._keys: KeySource | None = self.jwks
        if public and self.jwks is None:
            self._keys = PublicKeyFile(Path(settings.public_key_file), public)
        # PyJWT would warn on standard error, for every token. The relay warns once, at the start.
        warnings.simplefilter("ignore", InsecureKeyLengthWarning)

    async def authenticate(self, request: "AdmissionRequest", action: "Action") -> Permissions:
        """Return the permissions of the token in a request.

        Raises:
            RefusedError: there is none, or it is invalid, or the keys are unavailable now.
        """
        token = find_token(request.authorization, request.query, request.subprotocols)
        if token is None:
            raise RefusedError(Refusal.TOKEN_REQUIRED)
        return await self.verify(token)

    def source_of(self, request: "AdmissionRequest") -> "RequestSource | None":
        """Return None: a token is verified alike for all."""
        return None

    async def renew(self, token: str, source: "RequestSource | None") -> Permissions:
        """Return the permissions of a token."""
        return await self.verify(token)

    async def verify(self, token: str) -> Permissions:
        """Verify a token and return its permissions.

        Raises:
            RefusedError: it is invalid, or the keys are unavailable now.
        """
        if len(token) > MAX_CHARACTERS:
            raise RefusedError(Refusal.INVALID_TOKEN, TokenProblem.MALFORMED)
        algorithms, keys = self._algorithms, self._secrets
        if self._keys is not None:  # which key depends on the header, which takes long to parse
            with self._refusing():
                algorithm, kid = self._header(token)
            algorithms, keys = [algorithm], await self._candidates(algorithm, kid)
        with self._refusing():
            claims = self._decode(token, algorithms, keys)
            self._check_types(claims)
            permissions = Permissions.of(claims, _expiry(claims, self._leeway_s), self._claim)
        if permissions.is_empty:
            is_present = find_claim(claims, self._claim) is not None
            problem = "it names no permission" if is_present else "the token has no such claim"
            log.debug("token permits nothing", extra={"claim": self._claim, "problem": problem})
        return permissions

    def _header(self, token: str) -> tuple[str, str | None]:
        header = jwt.get_unverified_header(token)
        algorithm = header.get("alg")
        if not isinstance(algorithm, str) or algorithm not in self._algorithms:
            raise jwt.InvalidAlgorithmError
        return algorithm, header.get("kid")

    async def _candidates(self, algorithm: str, kid: str | None) -> Sequence[PublicKey | bytes]:
        """Return the keys of which one may have signed the token; at least one."""
        if algorithm in SECRET_BYTES:
            return self._secrets
        assert self._keys is not None
        key = await self._keys.find(algorithm, kid)
        if key is None:
            raise RefusedError(Refusal.INVALID_TOKEN, TokenProblem.UNKNOWN_KEY)
        return [key]

    def _decode(
        self, token: str, algorithms: Sequence[str], keys: Sequence[PublicKey | bytes]
    ) -> dict[str, Any]:
        """Return the claims of a token that one of the keys has signed.

        Raises:
            jwt.PyJWTError: none has, or a claim is wrong.
        """
        for key in keys[:-1]:
            with suppress(jwt.InvalidSignatureError):
                return self._decode(token, algorithms, [key])
        return jwt.decode(
            token,
            keys[-1],
            algorithms=algorithms,
            audience=self._audiences,
            issuer=self._issuers,
            options=CHECKS,
            leeway=max(self._leeway_s, NOT_BEFORE_LEEWAY_S),
        )

    def _check_types(self, claims: dict[str, Any]) -> None:
        """Check the types of registered claims that PyJWT does not always check.

        Raises:
            jwt.PyJWTError: a claim has the wrong type, or the token has an audience and the
                settings have none.
        """
        if not all(_is_time(claims[name]) for name in TIMES if name in claims):
            raise jwt.DecodeError
        if not isinstance(claims.get("iss", ""), str):
            raise jwt.DecodeError
        if not isinstance(claims.get("aud", ""), str | list):
            raise jwt.DecodeError
        if "aud" in claims and self._audiences is None:  # PyJWT accepts empty ones
            raise jwt.InvalidAudienceError

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Convert every error that a token causes in PyJWT into a refusal."""
        try:
            yield
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise RefusedError(Refusal.INVALID_TOKEN, self._problem(error)) from None

    def _problem(self, error: Exception) -> TokenProblem:
        match error:
            case jwt.ExpiredSignatureError():
                return TokenProblem.EXPIRED
            case jwt.ImmatureSignatureError():
                return TokenProblem.NOT_YET_VALID
            case jwt.InvalidAudienceError() if self._audiences is None:
                # RFC 7519 section 4.1.3: the token is meant for another recipient.
                return TokenProblem.UNEXPECTED_AUDIENCE
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
    from websocket_relay.admission.jwks import Jwks  # importing httpx2 takes 0.1 s

    return Jwks(url)


def _check_secret(setting: str, secret: bytes) -> None:
    try:
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except jwt.InvalidKeyError:
        problem = "a key in PEM, DER, SSH or JWK format, not a secret"
        raise UnusableSettingError(setting, problem) from None
    if secret != secret.strip():
        # The issuer's secret lacks the white space, so that every token would be refused.
        problem = "white space at an end, such as the newline of the file that it came from"
        raise UnusableSettingError(setting, problem)


def _is_time(value: object) -> bool:
    """Return whether a claim is a NumericDate (RFC 7519 section 2)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -math.inf < value < math.inf


def _expiry(claims: dict[str, Any], leeway_s: float) -> float | None:
    """Return when a token expires, in seconds since 1970; None: never.

    The leeway is a part of it: a client that was just admitted is not closed at once.

    Raises:
        jwt.PyJWTError: it has expired.
    """
    if "exp" not in claims:
        return None
    expiry: float = claims["exp"]
    if expiry >= FAR_FUTURE:
        return None
    expires_at = int(expiry) + leeway_s
    if expires_at <= time.time():
        raise jwt.ExpiredSignatureError
    return expires_at
