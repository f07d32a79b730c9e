"""Name what keeps a client from the relay, and word it. No text has a token in it.

What can't be mended by trying again is a DeniedError, all else an AwayError.
"""

import os
import random
import re
import ssl

from websockets.exceptions import InvalidHandshake, InvalidProxy, InvalidStatus, ProxyError
from websockets.http11 import Response

from websocket_relay.outcomes import RelayError

ERRNO = re.compile(r"\[Errno (-?\d+)\]")
RETRY_AFTER = re.compile(r"\d{1,9}", re.ASCII)
OTHER_NAME = frozenset({62, 64})
"""OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""

LATER = frozenset({408, 425, 429})
"""Of all 4xx these are worth another try."""


class InvalidUrlError(RelayError):
    """What was given is not the address of a channel, or not a token."""


class RejectedError(RelayError):
    """The relay does not want this client, or it is no relay: trying again would not help."""


class UnavailableError(RelayError):
    """The relay can't be reached now.

    Args:
        reason: why not.
        retry_after_s: when the relay wants the client back; None: it did not say.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class UnconfirmedError(RelayError):
    """Messages are not known to have been relayed.

    Args:
        count: how many.
        reason: what happened.
    """

    def __init__(self, count: int, reason: str) -> None:
        what = "1 message is" if count == 1 else f"{count} messages are"
        super().__init__(f"{what} not known to be relayed: {reason}")
        self.count = count


def error_for(error: Exception, *, is_secure: bool) -> RelayError:
    """Return what an error of the network or of the opening handshake means.

    Args:
        error: of the network or of a library.
        is_secure: whether TLS was spoken.
    """
    # Where a redirect could not be followed, the error shows the whole address and stands before
    # the answer.
    answer = error if isinstance(error, InvalidStatus) else error.__context__
    if isinstance(answer, InvalidStatus):
        return _refusal(answer.response)
    if isinstance(error, ssl.SSLCertVerificationError):
        is_another = error.verify_code in OTHER_NAME
        what = "is for another name" if is_another else "is not trusted"
        return RejectedError(f"its certificate {what}: {error.verify_message}")
    if isinstance(error, TimeoutError):
        return UnavailableError("no answer in time")
    if isinstance(error, OSError):
        return UnavailableError(_os_text(error))
    if isinstance(error, InvalidProxy):  # its text shows the address, where a password may be
        return RejectedError("the proxy that the environment names has no address of a proxy")
    if isinstance(error, ImportError):
        return RejectedError(str(error))  # a SOCKS proxy needs another library
    if isinstance(error, ProxyError):
        return UnavailableError(str(error))
    if isinstance(error, InvalidHandshake) and not isinstance(error.__cause__, EOFError | OSError):
        return RejectedError(f"that is no relay: {error}")
    advice = "" if is_secure else "; perhaps wss:// is meant"
    return UnavailableError(f"the connection ended in the opening handshake{advice}")


def _refusal(response: Response) -> RelayError:
    status = response.status_code
    said = f"HTTP {status}, {_words(response)}"
    if status < 500 and status not in LATER:
        return RejectedError(said)
    seconds = response.headers.get_all("Retry-After")
    if len(seconds) != 1 or not RETRY_AFTER.fullmatch(seconds[0]):
        return UnavailableError(said)
    # It tells whole seconds: those who were refused together shall not return together.
    return UnavailableError(said, int(seconds[0]) + random.random())


def _words(response: Response) -> str:
    """Return why, as it was answered: the first line of a plain text."""
    kinds = response.headers.get_all("Content-Type")
    is_text = any(kind.startswith("text/plain") for kind in kinds)
    body = (response.body or b"").decode(errors="replace") if is_text else ""
    words = body.partition("\n")[0] or response.reason_phrase
    return "".join(letter for letter in words if letter.isprintable())


def _os_text(error: OSError) -> str:
    """Return the system's words alone: asyncio adds addresses, and all attempts to one line."""
    if isinstance(error, ssl.SSLError):
        if error.reason == "WRONG_VERSION_NUMBER":
            return "it does not speak TLS; perhaps ws:// is meant"
        return f"TLS: {(error.reason or str(error)).lower().replace('_', ' ')}"
    found = ERRNO.search(str(error))
    number = int(found[1]) if found else 0
    if number > 0:
        return os.strerror(number).lower()
    return (error.strerror or str(error) or type(error).__name__).lower()
