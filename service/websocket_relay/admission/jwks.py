"""Keep an issuer's public keys (a JWK set, RFC 7517) at hand. The only room that knows httpx2.

Keys that are known stay in use while the issuer's server is down; only tokens with an unknown key
feel an outage.
"""

import asyncio
import json
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx2
from cryptography.exceptions import UnsupportedAlgorithm
from jwt import PyJWTError
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from websocket_relay.admission.public_keys import MIN_RSA_BITS, PublicKey, algorithms_of, is_short
from websocket_relay.cancellation import Deadline, cancel_until_done
from websocket_relay.outcomes import Refusal, RefusedError, RelayError
from websocket_relay.token_bucket import TokenBucket

log = logging.getLogger(__name__)

FETCH_S = 5.0
"""What a fetch may take from the first look at the server's name to the last byte."""

MAX_BYTES = 1_048_576

MAX_KEYS = 256
"""Of a set, those included that are of no use here. Reading one takes up to 0.1 ms, and every token
looks through all of them."""

MAX_AGE_S = 300.0
"""Keys that are older are fetched anew, in the background, as soon as one is used."""

FETCH_INTERVAL_S = 10.0
FETCH_BURST = 5
"""How often is fetched at most: tokens that name keys nobody has must not become a flood of
requests to the issuer."""

FIRST_PAUSE_S = 1.0
"""Until the second try to get the first keys. It doubles up to FETCH_INTERVAL_S, and each is cut by
chance to between a half and the whole, so that replicas do not ask an issuer all at once."""

READERS: dict[str, Callable[[Any], object]] = {
    "RSA": RSAAlgorithm.from_jwk,
    "EC": ECAlgorithm.from_jwk,
    "OKP": OKPAlgorithm.from_jwk,
}
"""What makes a key of a JWK, by its kty. Secrets (oct) have no business in a public set."""


class FetchError(RelayError):
    """The issuer's server did not give a key set. Says why."""


@dataclass(frozen=True, slots=True)
class NamedKey:
    """A key of the set."""

    kid: str | None
    key: PublicKey
    algorithms: frozenset[str]


class Jwks:
    """The keys behind a URL.

    Use it as a context manager, which cleans up. It fetches as the need arises, and `get_first` to
    begin with.

    Args:
        url: of the key set.
    """

    def __init__(self, url: str) -> None:
        self.fetches = {"ok": 0, "error": 0}
        self._url = url
        self._keys: tuple[NamedKey, ...] = ()
        self._fetched_at = 0.0
        self._there = asyncio.Event()  # set once there are keys, for good
        self._reachable = False  # whether the last fetch was a good one
        self._rate = TokenBucket(1 / FETCH_INTERVAL_S, FETCH_BURST)
        self._fetching: asyncio.Task[None] | None = None
        self._http: httpx2.AsyncClient

    async def __aenter__(self) -> Self:
        # Every fetch has a deadline of its own for all of it; httpx2's are for each step.
        self._http = httpx2.AsyncClient(timeout=None, limits=httpx2.Limits(max_connections=1))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._fetching is not None:
            await cancel_until_done(self._fetching)
        await self._http.aclose()

    async def get_first(self) -> None:
        """Return once there are keys; fetch until then, again and again."""
        pause_s = FIRST_PAUSE_S
        while True:
            await asyncio.wait({self._fetch_soon()})
            with suppress(TimeoutError):
                # A client's token may bring the next fetch about, and be quicker.
                async with asyncio.timeout(pause_s * random.uniform(0.5, 1)):
                    await self._there.wait()
                    return
            pause_s = min(2 * pause_s, FETCH_INTERVAL_S)

    async def find(self, algorithm: str, kid: str | None) -> PublicKey | None:
        """Return the key that a token names; fetch the set where it is not in it.

        A token without a key id is for the only key of its algorithm.

        Raises:
            RefusedError: the key is not known, and the server can't or may not be asked now: the
                token may be good once it can.
        """
        loop = asyncio.get_running_loop()
        asked = True
        found = self._known(algorithm, kid)
        if found:
            if loop.time() - self._fetched_at > MAX_AGE_S and self._rate.take(loop.time()):
                self._fetch_soon()  # nobody waits for it
        elif self._fetching is not None or self._rate.take(loop.time()):
            # Not awaited as such: a client that leaves would cancel it for all who wait.
            await asyncio.wait({self._fetch_soon()})
            found = self._known(algorithm, kid)
        else:
            asked = False
        if not found and not (asked and self._reachable):
            raise RefusedError(Refusal.KEYS)
        return found[0] if len(found) == 1 or (found and kid is not None) else None

    def _known(self, algorithm: str, kid: str | None) -> list[PublicKey]:
        return [
            named.key
            for named in self._keys
            if algorithm in named.algorithms and kid in (None, named.kid)
        ]

    def _fetch_soon(self) -> "asyncio.Task[None]":
        """Return the fetch under way, or a new one."""
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch())
        return self._fetching

    async def _fetch(self) -> None:
        try:
            self._keys = await key_set(await self._body())
        except FetchError as error:
            self._reachable = False
            self.fetches["error"] += 1
            log.error("keys not fetched", extra={"url": self._url, "error": str(error)})
        else:
            level = logging.DEBUG if self._reachable else logging.INFO  # news: the first, or again
            log.log(level, "keys fetched", extra={"keys": len(self._keys)})
            self._reachable = True
            self._fetched_at = asyncio.get_running_loop().time()
            self.fetches["ok"] += 1
            self._there.set()
        finally:
            self._fetching = None

    async def _body(self) -> bytes:
        # Not compressed: what a few bytes would inflate to is known only when it is there.
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        body = bytearray()
        try:
            async with (
                Deadline(FETCH_S),
                self._http.stream("GET", self._url, headers=headers) as response,
            ):
                if response.status_code != httpx2.codes.OK:
                    raise FetchError(f"status {response.status_code}")
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > MAX_BYTES:
                        raise FetchError(f"more than {MAX_BYTES} bytes")
        except TimeoutError:
            raise FetchError(f"not done in {FETCH_S:g} seconds") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            raise FetchError(_innermost(error)) from None
        return bytes(body)


def _innermost(error: BaseException) -> str:
    """Return what began it: "Connection refused", where those who wrap it say less or nothing."""
    said = type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        said = getattr(cause, "strerror", None) or str(cause) or said
        if isinstance(cause, BaseExceptionGroup):  # an attempt for each address of the name
            cause = cause.exceptions[0]
        else:
            cause = cause.__cause__ or cause.__context__
    return said


async def key_set(body: bytes) -> tuple[NamedKey, ...]:
    """Return the keys of a JWK set that tokens can be checked with. Others in it do no harm.

    Raises:
        FetchError: there are none, or too many.
    """
    named = []
    for jwk in _listed(body):
        if (one := _named(jwk)) is not None:
            named.append(one)
        await asyncio.sleep(0)  # messages are relayed between one key and the next
    keys = tuple(one for one in named if not is_short(one.key))
    if len(keys) < len(named):
        facts = {"keys": len(named) - len(keys), "min_bits": MIN_RSA_BITS}
        log.warning("short RSA keys not used", extra=facts)
    if not keys:
        raise FetchError("no key to check tokens with")
    return keys


def _listed(body: bytes) -> list[object]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise FetchError("not JSON") from None
    listed = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise FetchError("not a JWK set")
    if len(listed) > MAX_KEYS:
        raise FetchError(f"{len(listed)} keys, more than {MAX_KEYS}")
    return listed


def _named(jwk: object) -> NamedKey | None:
    if not isinstance(jwk, dict) or "d" in jwk:  # a private key that got out proves nothing
        return None
    if jwk.get("use", "sig") != "sig" or not _verifies(jwk.get("key_ops", ["verify"])):
        return None
    kind = jwk.get("kty")
    read = READERS.get(kind) if isinstance(kind, str) else None
    if read is None:
        return None
    try:
        key = read(jwk)
    except (PyJWTError, UnsupportedAlgorithm, ValueError, TypeError, AttributeError, KeyError):
        return None
    algorithms = algorithms_of(key)
    if "alg" in jwk:
        algorithms &= {str(jwk["alg"])}
    kid = jwk.get("kid")
    if not algorithms or not isinstance(key, PublicKey):
        return None
    return NamedKey(kid if isinstance(kid, str) else None, key, algorithms)


def _verifies(operations: object) -> bool:
    return isinstance(operations, list) and "verify" in operations
