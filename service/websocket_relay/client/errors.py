"""The client's errors, and which of them a failure is. Knows no connection; no text has a token.

A failure that another attempt can't mend is a RejectedError, every other an UnavailableError.
"""

import os
import random
import re
import ssl

from websockets import exceptions
from websockets.http11 import Response

from websocket_relay.client.events import Header
from websocket_relay.outcomes import Close, RelayError
from websocket_relay.redaction import redacted

ERRNO = re.compile(r"\[Errno (\d+)\]")
RETRY_AFTER = re.compile(r"\d{1,9}", re.ASCII)
RETRY_MS = re.compile(r"retry_ms=(\d{1,9})")
NAME_MISMATCH_CODES = frozenset({62, 64})
"""OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""

RETRYABLE_4XX = frozenset({408, 425, 429})
"""All other 4xx are permanent."""

PERMANENT_CLOSE_CODES = frozenset({1002, 1003, 1007, 1010})
"""A retry would be closed with the same code: the data that was sent is the cause."""

SESSION_RESUMED = (Close.SESSION_RESUMED.code, Close.SESSION_RESUMED.reason)
"""A copy of this client has its session, for example in a fork: they would close each other."""


class InvalidUrlError(RelayError):
    """The URL is not the URL of a relay, or the token is not a token."""


class RejectedError(RelayError):
    """The relay rejects this client or a command, or is not a relay: retrying would not help."""


class UnavailableError(RelayError):
    """The relay is not reachable, or can't carry out a command now.

    Args:
        reason: the cause.
        retry_after_s: seconds after which the relay asks the client to reconnect; None if unset.
        code: of the close frame with which the relay closed the connection; 0: none.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None, code: int = 0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.code = code


class UnconfirmedError(RelayError):
    """The message may or may not have been published."""


class ClosedError(RuntimeError):
    """The program has closed the client."""

    def __init__(self) -> None:
        super().__init__("the client was closed")


Failure = RejectedError | UnavailableError


def error_for(error: Exception, *, is_secure: bool = True, proxy: str | None = None) -> Failure:
    """Return the client's error for an error of the network or of websockets.

    Args:
        error: raised by the network or by a library.
        is_secure: whether the connection uses TLS.
        proxy: the URL of the proxy, which may have a password; None: none was used.
    """
    if isinstance(error, exceptions.ConnectionClosed):
        return _error_for_close(error)
    # When a redirect can't be followed, websockets raises an error whose text has the whole URL;
    # its context is the InvalidStatus with the response.
    cause = error if isinstance(error, exceptions.InvalidStatus) else error.__context__
    if isinstance(cause, exceptions.InvalidStatus):
        return _error_for_response(cause.response)
    if isinstance(error, exceptions.InvalidProxy):
        return RejectedError("invalid proxy URL in the environment")  # it may have a password
    found = _error_for_network(error, is_secure=is_secure)
    if proxy is not None:
        # Every step before the relay's response may have failed at the proxy.
        return type(found)(f"{found} (via proxy {redacted(proxy)})")
    return found


def _error_for_close(closed: exceptions.ConnectionClosed) -> Failure:
    received, sent = closed.rcvd, closed.sent
    if received is None:
        if sent is not None and sent.code == Close.MESSAGE_TOO_BIG.code:
            # A reconnection would replay the message.
            return RejectedError(f"received a message over the client's size limit: {sent.reason}")
        return UnavailableError("connection lost")
    code, retry_ms = received.code, RETRY_MS.search(received.reason)
    reason = f"closed by the relay: {received.reason or 'without a reason'} ({code})"
    if code in PERMANENT_CLOSE_CODES or (code, received.reason) == SESSION_RESUMED:
        return RejectedError(reason)
    return UnavailableError(reason, int(retry_ms[1]) / 1000 if retry_ms else None, code)


def _error_for_network(error: Exception, *, is_secure: bool) -> Failure:
    if isinstance(error, ssl.SSLCertVerificationError):
        is_name_mismatch = error.verify_code in NAME_MISMATCH_CODES
        problem = "is for another host name" if is_name_mismatch else "not trusted"
        return RejectedError(f"certificate {problem}: {error.verify_message}")
    if isinstance(error, OSError):
        return UnavailableError(_os_text(error))
    if isinstance(error, ImportError):
        return RejectedError(str(error))  # a SOCKS proxy needs another library
    if isinstance(error, exceptions.ProxyError):
        return UnavailableError(str(error))
    was_closed = isinstance(error.__cause__, EOFError | OSError)
    if isinstance(error, exceptions.InvalidHandshake) and not was_closed:
        return RejectedError(f"not a relay: {error}")
    advice = "" if is_secure else "; try wss://"
    return UnavailableError(f"connection closed during the opening handshake{advice}")


def _error_for_response(response: Response) -> Failure:
    status = response.status_code
    reason = f"HTTP {status}, {_reason_text(response)}"
    if status < 500 and status not in RETRYABLE_4XX:
        return RejectedError(reason)
    seconds = RETRY_AFTER.fullmatch("".join(response.headers.get_all("Retry-After")))
    # They are whole seconds. A random fraction spreads clients that were refused together.
    return UnavailableError(reason, int(seconds[0]) + random.random() if seconds else None)


def _reason_text(response: Response) -> str:
    """Return the first line of a plain-text body, else the reason phrase; printable only."""
    is_text = "text/plain" in "".join(response.headers.get_all("Content-Type"))
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
    text = os.strerror(int(found[1])) if found else error.strerror or str(error)
    return text.lower() or "timed out"  # asyncio's timeouts have no text


def error_in(header: Header) -> Failure | UnconfirmedError:
    """Return the client's error for a command that was not carried out."""
    status, reason = header.get("status"), str(header.get("reason", "without a reason"))
    if status == 503:
        return UnavailableError(reason, header.get("retry_after_s"))
    return UnconfirmedError(reason) if status == 504 else RejectedError(reason)
