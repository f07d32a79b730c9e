"""Map failures to connect to the client's errors. Knows no connection; no text contains a token.

A failure that another attempt can't mend is a RejectedError, every other an UnavailableError.
"""

import os
import random
import re
import ssl

from websockets.exceptions import InvalidHandshake, InvalidProxy, InvalidStatus, ProxyError
from websockets.http11 import Response

from websocket_relay.outcomes import RelayError
from websocket_relay.redaction import redacted

ERRNO = re.compile(r"\[Errno (-?\d+)\]")
RETRY_AFTER = re.compile(r"\d{1,9}", re.ASCII)
NAME_MISMATCH_CODES = frozenset({62, 64})
"""OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""

RETRYABLE_4XX = frozenset({408, 425, 429})
"""All other 4xx are permanent."""


class InvalidUrlError(RelayError):
    """The URL is not the URL of a relay, or the token is not a token."""


class RejectedError(RelayError):
    """The relay rejects this client or a command, or is not a relay: retrying would not help."""


class UnavailableError(RelayError):
    """The relay is not reachable, or can't carry out a command now.

    Args:
        reason: the cause.
        retry_after_s: seconds after which the relay asks the client to reconnect; None if unset.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class UnconfirmedError(RelayError):
    """Messages may or may not have been published.

    Args:
        count: number of messages.
        reason: the cause.
    """

    def __init__(self, count: int, reason: str) -> None:
        messages = "1 message" if count == 1 else f"{count} messages"
        super().__init__(f"{messages} unconfirmed: {reason}")
        self.count = count
        self.reason = reason


class ClosedError(RuntimeError):
    """The program has closed the client."""

    def __init__(self) -> None:
        super().__init__("the client was closed")


def error_for(error: Exception, *, is_secure: bool, proxy: str | None = None) -> RelayError:
    """Return the client's error for an error of the network or of the opening handshake.

    Args:
        error: raised by the network or by a library.
        is_secure: whether the connection uses TLS.
        proxy: the URL of the proxy, which may have a password; None: none was used.
    """
    # When a redirect can't be followed, websockets raises an error whose text has the whole URL;
    # its context is the InvalidStatus with the response.
    cause = error if isinstance(error, InvalidStatus) else error.__context__
    if isinstance(cause, InvalidStatus):
        return _error_for_response(cause.response)
    if isinstance(error, InvalidProxy):  # its text has the proxy's URL, which may have a password
        return RejectedError("invalid proxy URL in the environment")
    found = _error_for_network(error, is_secure=is_secure)
    if proxy is not None:
        # Every step before the relay's response may have failed at the proxy.
        return type(found)(f"{found} (via proxy {redacted(proxy)})")
    return found


def _error_for_network(error: Exception, *, is_secure: bool) -> RelayError:
    if isinstance(error, ssl.SSLCertVerificationError):
        is_name_mismatch = error.verify_code in NAME_MISMATCH_CODES
        problem = "is for another host name" if is_name_mismatch else "not trusted"
        return RejectedError(f"certificate {problem}: {error.verify_message}")
    if isinstance(error, TimeoutError):
        return UnavailableError("timed out")
    if isinstance(error, OSError):
        return UnavailableError(_os_text(error))
    if isinstance(error, ImportError):
        return RejectedError(str(error))  # a SOCKS proxy needs another library
    if isinstance(error, ProxyError):
        return UnavailableError(str(error))
    if isinstance(error, InvalidHandshake) and not isinstance(error.__cause__, EOFError | OSError):
        return RejectedError(f"not a relay: {error}")
    advice = "" if is_secure else "; try wss://"
    return UnavailableError(f"connection closed during the opening handshake{advice}")


def _error_for_response(response: Response) -> RelayError:
    status = response.status_code
    reason = f"HTTP {status}, {_reason_text(response)}"
    if status < 500 and status not in RETRYABLE_4XX:
        return RejectedError(reason)
    seconds = response.headers.get_all("Retry-After")
    if len(seconds) != 1 or not RETRY_AFTER.fullmatch(seconds[0]):
        return UnavailableError(reason)
    # Retry-After is in whole seconds. A random fraction spreads clients that were refused together.
    return UnavailableError(reason, int(seconds[0]) + random.random())


def _reason_text(response: Response) -> str:
    """Return the first line of a plain-text body, else the reason phrase; printable only."""
    kinds = response.headers.get_all("Content-Type")
    is_text = any(kind.startswith("text/plain") for kind in kinds)
    body = (response.body or b"").decode(errors="replace") if is_text else ""
    text = body.partition("\n")[0] or response.reason_phrase
    return "".join(letter for letter in text if letter.isprintable())


def _os_text(error: OSError) -> str:
    """Return the system's text alone: asyncio adds addresses and joins all attempts."""
    if isinstance(error, ssl.SSLError):
        if error.reason == "WRONG_VERSION_NUMBER":
            return "server does not speak TLS; try ws://"
        return f"TLS: {(error.reason or str(error)).lower().replace('_', ' ')}"
    found = ERRNO.search(str(error))
    number = int(found[1]) if found else 0
    if number > 0:
        return os.strerror(number).lower()
    return (error.strerror or str(error) or type(error).__name__).lower()
