"""Send requests to the operator's own servers. The package's way to httpx2.

A proxy and the trusted authorities come from the environment. Knows no token, no hook and no event.
"""

import hashlib
import hmac
import os
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import anyio
import httpx2

from websocket_relay.cancellation import Deadline
from websocket_relay.outcomes import RelayError, UnusableSettingError
from websocket_relay.trust import accept_home_made_cas

CA_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
"""OpenSSL's own; the first has precedence, as in httpx2."""

SIGNATURE_HEADER = "Relay-Signature"
MAX_ANSWER_BYTES = 65_536
IDLE_S = 60.0
"""A connection that is kept is closed after so long without a request."""

CLOSE_S = 0.1
"""Maximum time to close the connections when the relay stops."""

ONE_CONNECTION = httpx2.Limits(max_connections=1, max_keepalive_connections=0)

LOST_CONNECTION = (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError)
"""The connection ended before the answer. A server closes a kept connection when it has been idle,
which may be the moment at which it is used again."""


class ProxyError(RelayError):
    """The environment names a proxy that can't be used."""


class CallError(RelayError):
    """A request was not answered. The message has the reason."""


class AnswerTooLargeError(CallError):
    """The answer has more than MAX_ANSWER_BYTES."""


class CallAnswer(NamedTuple):
    """An answer: its status, and its body."""

    status: int
    body: bytes


class SignedCalls:
    """POSTs of JSON to one URL, over connections that are kept. No redirect is followed.

    Args:
        url: of the operator's server.
        secret: signs each body; empty: none is signed.
        timeout_s: of a call, from name resolution to the last byte.
        max_connections: at a time.
        setting: the path of the setting that has the URL.

    Raises:
        UnusableSettingError: the environment names a proxy or authorities that can't be used.
    """

    def __init__(
        self, url: str, secret: str, *, timeout_s: float, max_connections: int, setting: str
    ) -> None:
        self._url = url
        self.configure(secret, timeout_s)
        limits = httpx2.Limits(
            max_connections=max_connections,
            max_keepalive_connections=max_connections,
            keepalive_expiry=IDLE_S,
        )
        try:
            transport = transport_to(url, trusted_authorities(setting), limits)
        except ProxyError as error:
            raise UnusableSettingError(setting, str(error)) from None
        self._http = httpx2.AsyncClient(
            transport=transport,
            timeout=None,
            follow_redirects=False,
            # A cookie of one answer, such as a session, must not be sent with the next request.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )
        load_backend()

    def configure(self, secret: str, timeout_s: float) -> None:
        """Replace the secret and the deadline, for the calls from now on."""
        self._secret = secret.encode()
        self._timeout_s = timeout_s

    async def post(self, body: bytes) -> CallAnswer:
        """Send a JSON body; return the answer, whatever its status.

        If the connection ends before the answer, the body is sent once more: the receiver has to
        accept repeats.

        Raises:
            CallError: there was none in time.
        """
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # what is not inflated has a known size
        }
        if self._secret:
            headers[SIGNATURE_HEADER] = sign(self._secret, body, int(time.time()))
        timeout_s = self._timeout_s
        try:
            async with Deadline(timeout_s):
                try:
                    return await self._send(body, headers)
                except LOST_CONNECTION:
                    return await self._send(body, headers)
        except TimeoutError:
            raise CallError(f"timeout after {timeout_s:g} seconds") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            raise CallError(root_cause(error)) from None

    async def _send(self, body: bytes, headers: Mapping[str, str]) -> CallAnswer:
        answer = bytearray()
        async with self._http.stream("POST", self._url, content=body, headers=headers) as response:
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > MAX_ANSWER_BYTES:
                    raise AnswerTooLargeError(f"answer of more than {MAX_ANSWER_BYTES} bytes")
        return CallAnswer(response.status_code, bytes(answer))

    async def close(self) -> None:
        """Close the connections, in CLOSE_S."""
        with suppress(TimeoutError):
            async with Deadline(CLOSE_S):
                await self._http.aclose()


def load_backend() -> None:
    """Import what httpx2 would import in its first request, which takes 0.1 s of the event loop.

    It imports nothing if an event loop runs already.
    """
    with suppress(RuntimeError):
        anyio.run(anyio.sleep, 0)


def sign(secret: bytes, body: bytes, at: int) -> str:
    """Return the value of SIGNATURE_HEADER.

    Args:
        secret: that the receiver knows.
        body: of the request.
        at: the time, in seconds since 1970: a receiver refuses old requests.
    """
    digest = hmac.new(secret, b"%d.%b" % (at, body), hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy, and the environment variable that names it."""

    variable: str
    url: str


def proxy_of(url: str) -> Proxy | None:
    """Return the proxy for a URL by http_proxy, https_proxy, all_proxy and no_proxy."""
    parts = urlsplit(url)
    if proxy_bypass(parts.netloc):
        return None
    proxies = getproxies()
    scheme = next((name for name in (parts.scheme, "all") if proxies.get(name)), None)
    if scheme is None:
        return None
    # Lower case first, as in getproxies.
    names = (name for name in sorted(os.environ, reverse=True) if name.lower() == f"{scheme}_proxy")
    address = proxies[scheme]
    address = address if "://" in address else f"http://{address}"
    return Proxy(next(names, "the settings of this system"), address)


def trusted_authorities(setting: str) -> ssl.SSLContext:
    """Return the authorities of the system, or those that a variable of OpenSSL names.

    Args:
        setting: that needs them.

    Raises:
        UnusableSettingError: the variable names no file or directory with certificates.
    """
    variable = next((name for name in CA_VARIABLES if os.environ.get(name)), None)
    try:
        if variable is not None:
            Path(os.environ[variable]).stat()  # OpenSSL ignores a missing directory
        return accept_home_made_cas(httpx2.create_ssl_context())
    except OSError as error:  # ssl.SSLError is one
        source = f"{variable}={os.environ[variable]}" if variable else "this system's authorities"
        reason = "no certificates in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        raise UnusableSettingError(setting, f"{source}: {reason}") from None


def transport_to(
    url: str, tls: ssl.SSLContext, limits: httpx2.Limits = ONE_CONNECTION
) -> httpx2.AsyncHTTPTransport:
    """Return the way to a URL, directly or through its proxy.

    Raises:
        ProxyError: the proxy can't be used. Its URL may contain a password, so it is not shown.
    """
    proxy = proxy_of(url)
    try:
        return httpx2.AsyncHTTPTransport(
            verify=tls, proxy=proxy.url if proxy else None, limits=limits
        )
    except (ImportError, ValueError, httpx2.InvalidURL):
        assert proxy is not None
        parts = urlsplit(url)
        raise ProxyError(
            f"{proxy.variable} is no HTTP proxy like http://proxy.example:3128, and SOCKS is not"
            f" supported; set {parts.scheme}_proxy to one, or no_proxy to {parts.hostname}"
        ) from None


def root_cause(error: BaseException) -> str:
    """Return the message of the innermost cause that has one, such as "Connection refused"."""
    message = type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        message = getattr(cause, "strerror", None) or str(cause) or message
        if isinstance(cause, BaseExceptionGroup):  # one attempt for each address of the name
            cause = cause.exceptions[0]
        else:
            cause = cause.__cause__ or cause.__context__
    return message
