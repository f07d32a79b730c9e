"""Name every way in which something ends badly: failures, closes, refusals, drops.

One table of facts each: the wire, the metrics, the logs and the docs read them from here.
Knows no connection, no channel and no library.
"""

import random
from collections.abc import Sequence
from enum import Enum, StrEnum
from http import HTTPStatus


class RelayError(Exception):
    """The root of the relay's own errors."""


class SettingsError(RelayError):
    """The operator's settings can't be used.

    Args:
        problems: one sentence each: where it was said, the key, the value, what is allowed.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class UnusableSettingError(RelayError):
    """What the operator's settings name, or hold, can't be used.

    Args:
        setting: which: `auth.jwt.secret`, say.
        reason: why not; never a secret.
    """

    def __init__(self, setting: str, reason: str) -> None:
        super().__init__(f"{setting}: {reason}")
        self.setting = setting
        self.reason = reason


class StartError(RelayError):
    """The relay can't start on this machine as it is now: a port in use, say."""


class UnhealthyError(RelayError):
    """The relay on this machine does not say that it is well."""


class Close(Enum):
    """Why a connection ended: the code on the wire, the reason, and by its name the label.

    Codes: RFC 6455 section 7.4.1 and the IANA registry; 1006 is never sent.
    """

    CLIENT = (1000, "")  # the client closed; its own code goes back to it
    DRAINING = (1001, "draining")  # the relay stops; retry_ms follows
    PROTOCOL = (1002, "protocol error")  # a frame that RFC 6455 forbids
    VANISHED = (1006, "")  # the TCP connection ended without a close frame
    NOT_UTF8 = (1007, "text is not UTF-8")
    BAD_DEFLATE = (1007, "compressed data is broken")  # it does not inflate
    RATE_LIMIT = (1008, "rate limit")  # over limits.max_messages_per_s
    NOT_ALLOWED = (1008, "not allowed to publish")  # its token has no right to
    TOO_BIG = (1009, "message too big")  # over limits.max_message_bytes
    INTERNAL = (1011, "internal error")  # the relay's own fault; the log has it
    PING_TIMEOUT = (1011, "ping timeout")  # silent for keepalive.ping_timeout_s after a ping
    SLOW_CONSUMER = (1013, "slow consumer")  # its backlog, or all of them together, is full
    UNAVAILABLE = (1013, "backplane unavailable")  # its message can't be relayed, or its past read
    UNFINISHED = (1013, "unfinished message")  # all clients' unfinished messages come to too much
    TOKEN_EXPIRED = (3000, "token expired")  # the token's exp has passed

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason
        self.label = self.name.lower()


class Refusal(Enum):
    """Why a client was not let in: the HTTP status, what it is told, and by its name the label."""

    BODY = (HTTPStatus.BAD_REQUEST, "bad message")  # what was posted is not what it is said to be
    TOO_LARGE = (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "message too big")
    CODING = (HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "content coding not supported")  # gzip, say
    UNFINISHED = (HTTPStatus.SERVICE_UNAVAILABLE, "too much is being said")  # see wire/unfinished
    HANDSHAKE = (HTTPStatus.BAD_REQUEST, "not a WebSocket handshake")
    QUERY = (HTTPStatus.BAD_REQUEST, "bad query")  # and which parameter
    NO_TOKEN = (HTTPStatus.UNAUTHORIZED, "token required")
    BAD_TOKEN = (HTTPStatus.UNAUTHORIZED, "token not accepted")  # and why
    ORIGIN = (HTTPStatus.FORBIDDEN, "origin not allowed")
    NO_RIGHT = (HTTPStatus.FORBIDDEN, "no right to this channel")
    NO_STATS = (HTTPStatus.FORBIDDEN, "no right to the figures")
    PATH = (HTTPStatus.NOT_FOUND, "no such channel")
    HANDSHAKE_TIMEOUT = (HTTPStatus.REQUEST_TIMEOUT, "handshake timeout")
    HTTP_CONNECTIONS = (HTTPStatus.SERVICE_UNAVAILABLE, "too many HTTP connections")
    METRICS_CONNECTIONS = (HTTPStatus.SERVICE_UNAVAILABLE, "too many connections to this port")
    DESCRIPTORS = (HTTPStatus.SERVICE_UNAVAILABLE, "too few file descriptors")
    CONNECTIONS = (HTTPStatus.SERVICE_UNAVAILABLE, "too many connections")
    CONNECTIONS_PER_IP = (HTTPStatus.SERVICE_UNAVAILABLE, "too many connections from this address")
    HANDSHAKES = (HTTPStatus.SERVICE_UNAVAILABLE, "too many handshakes")
    CHANNELS = (HTTPStatus.SERVICE_UNAVAILABLE, "too many channels")
    KEYS = (HTTPStatus.SERVICE_UNAVAILABLE, "no keys to check tokens with")  # auth.jwt.jwks_url
    UNAVAILABLE = (HTTPStatus.SERVICE_UNAVAILABLE, "backplane unavailable")
    IN_DOUBT = (HTTPStatus.GATEWAY_TIMEOUT, "not known whether it was relayed")
    DRAINING = (HTTPStatus.SERVICE_UNAVAILABLE, "draining")

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        self.status = status
        self.reason = reason
        self.label = self.name.lower()


RETRY_AFTER_S = (1, 5)
"""Between these a refused client is told to come back, at random, so that not all do at once."""


def random_retry_after_s() -> int:
    """Return when a client that was refused for now should come back."""
    return random.randint(*RETRY_AFTER_S)


class TokenProblem(StrEnum):
    """What is wrong with a token, as a refused client is told."""

    MALFORMED = "malformed"
    ALGORITHM = "algorithm"
    UNKNOWN_KEY = "unknown key"
    SIGNATURE = "signature"
    EXPIRED = "expired"
    NOT_YET_VALID = "not yet valid"
    AUDIENCE = "wrong audience"
    SURPLUS_AUDIENCE = "an audience, where auth.jwt.audience is empty"
    ISSUER = "wrong issuer"


class RefusedError(RelayError):
    """A client is not let in.

    Args:
        why: what it is told, and the label.
        detail: what else it is told; never its own words.
    """

    def __init__(self, why: Refusal, detail: str = "") -> None:
        super().__init__(f"{why.reason}: {detail}" if detail else why.reason)
        self.why = why
        self.detail = detail


class Drop(Enum):
    """Why a message that was owed to a client was not written to it."""

    DISCONNECTED = "disconnected"  # the client was gone before its turn came
    SLOW_CONSUMER = "slow_consumer"  # it did not fit into the client's backlog
