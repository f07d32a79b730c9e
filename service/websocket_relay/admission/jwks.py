"""Fetch and cache an issuer's public keys (a JWK set, RFC 7517).

Cached keys stay in use while the issuer's server is down. An outage affects only tokens that name
an unknown key. A proxy and the trusted authorities come from the environment. Knows no token and no
claim.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2
from cryptography.exceptions import UnsupportedAlgorithm
from jwt import PyJWTError
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from websocket_relay.admission.public_keys import MIN_RSA_BITS, PublicKey, algorithms_of, is_short
from websocket_relay.backoff import backoff
from websocket_relay.cancellation import Deadline, cancel_until_done
from websocket_relay.config.model import is_web_address
from websocket_relay.outcomes import Refusal, RefusedError, RelayError, UnusableSettingError
from websocket_relay.outgoing_http import (
    ProxyError,
    load_backend,
    proxy_of,
    root_cause,
    transport_to,
    trusted_authorities,
)
from websocket_relay.token_bucket import TokenBucket
from websocket_relay.wire.asgi import enter_task

log = logging.getLogger(__name__)

FETCH_S = 5.0
"""Deadline of one fetch, from name resolution to the last byte."""

MAX_BYTES = 1_048_576
"""Of one response, after inflating it."""

MAX_KEYS = 256
"""Keys in one set, unusable ones included. Parsing a key takes up to 0.1 ms, and every token causes
a search through all of them."""

MAX_AGE_S = 300.0
"""A set that is older is refetched in the background when one of its keys is next used."""

FETCH_INTERVAL_S = 10.0
FETCH_BURST = 5
"""Rate limit of fetches, as a token bucket: tokens that name unknown keys must not cause a flood of
requests to the issuer."""

INITIAL_BACKOFF_S = 1.0
"""Longest delay before the second attempt to fetch the first keys. It doubles up to
FETCH_INTERVAL_S."""

SETTING = "auth.jwt.jwks_url"
PARSERS: dict[str, Callable[[Any], object]] = {
    "RSA": RSAAlgorithm.from_jwk,
    "EC": ECAlgorithm.from_jwk,
    "OKP": OKPAlgorithm.from_jwk,
}
"""The parser of a JWK, by its kty. Symmetric keys (oct) do not belong in a public set."""


class FetchError(RelayError):
    """The issuer's server did not return a usable key set. The message has the reason."""


@dataclass(frozen=True, slots=True)
class NamedKey:
    """A key of the set, its key id, and the algorithms that it verifies."""

    kid: str | None
    key: PublicKey
    algorithms: frozenset[str]


class Jwks:
    """The cached keys of one URL.

    Use it as a context manager, which cancels the fetch in flight. It fetches on demand;
    `fetch_until_available` makes the first fetch.

    Args:
        url: the URL of the key set, or of the OpenID Connect document that names it.

    Raises:
        UnusableSettingError: the environment names a proxy or authorities that can't be used.
    """

    def __init__(self, url: str) -> None:
        self.fetches = {"ok": 0, "error": 0}
        self._url = url
        self._keys: tuple[NamedKey, ...] = ()
        self._fetched_at = 0.0
        self._has_keys = asyncio.Event()  # never cleared
        self._is_reachable = False  # whether the last fetch succeeded
        self._fetch_rate = TokenBucket(1 / FETCH_INTERVAL_S, FETCH_BURST)
        self._fetching: asyncio.Task[None] | None = None
        self._tls = trusted_authorities(SETTING)
        try:
            transport_to(url, self._tls)
        except ProxyError as error:
            raise UnusableSettingError(SETTING, str(error)) from None
        load_backend()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._fetching is not None:
            await cancel_until_done(self._fetching)

    def metrics(self) -> dict[str, dict[str, int]]:
        """Return the values of the metrics of the keys."""
        return {"jwks_fetches": self.fetches}

    async def fetch_until_available(self) -> None:
        """Retry the fetch until it succeeds once."""
        for delay_s in backoff(INITIAL_BACKOFF_S, FETCH_INTERVAL_S):
            await asyncio.wait({self._start_fetch()})
            with suppress(TimeoutError):
                # A client's token may cause a fetch that succeeds during the backoff.
                async with asyncio.timeout(delay_s):
                    await self._has_keys.wait()
                    return

    async def find(self, algorithm: str, kid: str | None) -> PublicKey | None:
        """Return the key that a token names; fetch the set if the key is not in it.

        A token without a key id matches only if the set has one key for its algorithm.

        Raises:
            RefusedError: the key is unknown, and the server is unreachable or the rate limit of
                fetches is exhausted. The token may turn out to be valid after the next fetch.
        """
        loop = asyncio.get_running_loop()
        is_fresh = True
        found = self._cached(algorithm, kid)
        if found:
            if loop.time() - self._fetched_at > MAX_AGE_S and self._fetch_rate.take(loop.time()):
                self._start_fetch()  # in the background
        elif self._fetching is not None or self._fetch_rate.take(loop.time()):
            # Not awaited directly: a client that disconnects would cancel it for all that wait.
            fetching = {self._start_fetch()}
            await enter_task()
            await asyncio.wait(fetching)
            found = self._cached(algorithm, kid)
        else:
            is_fresh = False
        if not found and not (is_fresh and self._is_reachable):
            raise RefusedError(Refusal.SIGNING_KEYS)
        return found[0] if len(found) == 1 or (found and kid is not None) else None

    def _cached(self, algorithm: str, kid: str | None) -> list[PublicKey]:
        return [
            named.key
            for named in self._keys
            if algorithm in named.algorithms and kid in (None, named.kid)
        ]

    def _start_fetch(self) -> "asyncio.Task[None]":
        """Return the fetch in flight, or start one."""
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch())
        return self._fetching

    async def _fetch(self) -> None:
        url = self._url
        try:
            async with Deadline(FETCH_S):
                document = await self._document(url)
                if "keys" not in document and "jwks_uri" in document:
                    url = _discovered_url(document, url)
                    document = await self._document(url)
            self._keys = await key_set(document)
        except (FetchError, ProxyError, TimeoutError) as error:
            reason = str(error) or f"timeout after {FETCH_S:g} seconds"
            if (proxy := proxy_of(url)) is not None:
                reason += f" (through the proxy in {proxy.variable})"
            self._is_reachable = False
            self.fetches["error"] += 1
            log.error(
                "signing keys not fetched", extra={"url": url.partition("?")[0], "error": reason}
            )
        else:
            # The first success, and the first after a failure, are worth a line.
            level = logging.DEBUG if self._is_reachable else logging.INFO
            log.log(level, "signing keys fetched", extra={"keys": len(self._keys)})
            self._is_reachable = True
            self._fetched_at = asyncio.get_running_loop().time()
            self.fetches["ok"] += 1
            self._has_keys.set()
        finally:
            self._fetching = None

    async def _document(self, url: str) -> dict[str, Any]:
        """Download a JSON object."""
        body = bytearray()
        # Not kept: between two fetches it would idle for minutes. FETCH_S applies to the whole,
        # httpx2's timeouts to each step.
        transport = transport_to(url, self._tls)
        try:
            async with (
                httpx2.AsyncClient(transport=transport, timeout=None) as http,
                http.stream("GET", url, headers={"Accept": "application/json"}) as response,
            ):
                _check_head(response)
                async for chunk in response.aiter_bytes():  # inflated, 1 MiB at most
                    body += chunk
                    if len(body) > MAX_BYTES:
                        raise FetchError(f"more than {MAX_BYTES} bytes")
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            raise FetchError(root_cause(error)) from None
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            raise FetchError("not JSON") from None
        if not isinstance(document, dict):
            raise FetchError("not a JWK set")
        return document


def _check_head(response: httpx2.Response) -> None:
    if response.status_code != httpx2.codes.OK:
        raise FetchError(f"status {response.status_code}")
    coding = response.headers.get("Content-Encoding", "identity").lower()
    if coding not in (*response.request.headers["Accept-Encoding"].split(", "), "identity"):
        raise FetchError(f"Content-Encoding {coding[:20]!r} is not supported")


def _discovered_url(document: dict[str, Any], url: str) -> str:
    """Return the URL of the key set that an OpenID Connect document names (Discovery 1.0)."""
    found = document["jwks_uri"]
    if not isinstance(found, str) or not is_web_address(found):
        raise FetchError("its jwks_uri is not a URL")
    if (urlsplit(url).scheme, urlsplit(found).scheme) == ("https", "http"):
        raise FetchError("its jwks_uri is not https")
    return found


async def key_set(document: dict[str, Any]) -> tuple[NamedKey, ...]:
    """Return the keys of a JWK set that can verify tokens; skip all others.

    Raises:
        FetchError: no key is usable, or there are too many.
    """
    listed = document.get("keys")
    if not isinstance(listed, list):
        raise FetchError("not a JWK set")
    if len(listed) > MAX_KEYS:
        raise FetchError(f"{len(listed)} keys, more than {MAX_KEYS}")
    usable = []
    for jwk in listed:
        if (key := _parse_key(jwk)) is not None:
            usable.append(key)
        await asyncio.sleep(0)  # messages are relayed between one key and the next
    keys = tuple(key for key in usable if not is_short(key.key))
    if len(keys) < len(usable):
        facts = {"keys": len(usable) - len(keys), "min_bits": MIN_RSA_BITS}
        log.warning("short RSA keys ignored", extra=facts)
    if not keys:
        raise FetchError("no usable key in the set")
    return keys


def _parse_key(jwk: object) -> NamedKey | None:
    if not isinstance(jwk, dict) or "d" in jwk:  # a published private key proves nothing
        return None
    if jwk.get("use", "sig") != "sig" or not _may_verify(jwk.get("key_ops", ["verify"])):
        return None
    kty = jwk.get("kty")
    parse = PARSERS.get(kty) if isinstance(kty, str) else None
    if parse is None:
        return None
    try:
        key = parse(jwk)
    except (PyJWTError, UnsupportedAlgorithm, ValueError, TypeError, AttributeError, KeyError):
        return None
    algorithms = algorithms_of(key)
    # Two names of one algorithm: a key that states one verifies tokens with the other, too.
    is_edwards = "EdDSA" in algorithms and str(jwk.get("alg")) in algorithms
    if "alg" in jwk and not is_edwards:
        algorithms &= {str(jwk["alg"])}
    kid = jwk.get("kid")
    if not algorithms or not isinstance(key, PublicKey):
        return None
    return NamedKey(kid if isinstance(kid, str) else None, key, algorithms)


def _may_verify(operations: object) -> bool:
    return isinstance(operations, list) and "verify" in operations
