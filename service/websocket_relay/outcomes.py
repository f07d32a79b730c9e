"""Define every failure: errors, closes, refusals, drops, exit statuses.

There is one table of each; the wire, the metrics, the logs and the docs use these tables. Knows no
connection, no channel and no library.
"""

import random
from collections.abc import Mapping, Sequence
from enum import Enum, StrEnum
from http import HTTPStatus

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
"""The exit statuses of commands besides 0: a failure at run time, bad usage or settings, Ctrl-C."""


class RelayError(Exception):
    """The root of the relay's own errors."""


class SettingsError(RelayError):
    """The settings are invalid.

    Args:
        problems: one message each: file or variable, key, value, allowed values.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class UnusableSettingError(RelayError):
    """A setting is valid, but its value or the file that it names can't be used.

    Args:
        setting: its path, such as `auth.jwt.secret`.
        reason: never contains a secret.
    """

    def __init__(self, setting: str, reason: str) -> None:
        super().__init__(f"{setting}: {reason}")
        self.setting = setting
        self.reason = reason


class StartError(RelayError):
    """The relay can't start on this machine, for example because a port is in use."""


class ListenError(StartError):
    """The relay can't listen on an address.

    Args:
        setting: the path of the setting to change, such as `server.port`.
        reason: contains the address.
    """

    def __init__(self, setting: str, reason: str) -> None:
        super().__init__(f"{setting}: {reason}")
        self.setting = setting


class UnhealthyError(RelayError):
    """The relay on this machine fails its health check."""


class Close(Enum):
    """Why a connection ended: close code, reason, and the metric label, which is the name.

    Codes: RFC 6455 section 7.4.1 and the IANA registry; 1006 is never sent.
    """

    CLIENT = (1000, "")  # the client closed; its own code is echoed
    DRAINING = (1001, "draining")  # the relay shuts down; the reason is followed by retry_ms
    PROTOCOL_ERROR = (1002, "protocol error")  # a frame violates RFC 6455
    CONNECTION_LOST = (1006, "")  # the TCP connection ended without a close frame
    INVALID_UTF8 = (1007, "text is not UTF-8")
    INVALID_COMPRESSION = (1007, "invalid compressed data")  # it does not inflate
    RATE_LIMIT = (1008, "rate limit")  # limits.max_messages_per_s exceeded
    PUBLISH_NOT_ALLOWED = (1008, "not allowed to publish")  # the token does not permit it
    SESSION_RESUMED = (1008, "session resumed elsewhere")  # by another connection, of relay.v1
    MESSAGE_TOO_BIG = (1009, "message too big")  # limits.max_message_bytes exceeded
    INTERNAL_ERROR = (1011, "internal error")  # a bug in the relay; the log has the traceback
    PING_TIMEOUT = (1011, "ping timeout")  # silent for keepalive.ping_timeout_s after a ping
    SLOW_CONSUMER = (1013, "slow consumer")  # its send backlog, or the sum of all, is full
    BACKPLANE_UNAVAILABLE = (1013, "backplane unavailable")  # publish or replay failed in an outage
    PARTIAL_MESSAGES = (1013, "too many partial messages")  # the sum of all is too large
    TOKEN_EXPIRED = (3000, "token expired")  # the token's exp has passed
    DISCONNECTED = (4000, "disconnected")  # by the server API, which may send another code and text

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason
        self.label = self.name.lower()

    def text(self, retry_ms: int | None) -> str:
        """Return the reason as it is sent, with the time after which to reconnect, if any."""
        return self.reason if retry_ms is None else f"{self.reason}; retry_ms={retry_ms}"


class Refusal(Enum):
    """Why a request was refused: HTTP status, reason, and the metric label, which is the name.

    Some have headers that their status requires: RFC 6750 section 3, RFC 9110 section 15.5.16.
    """

    INVALID_MESSAGE = (HTTPStatus.BAD_REQUEST, "invalid message")  # not of its Content-Type
    MESSAGE_TOO_BIG = (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "message too big")
    CONTENT_CODING = (
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        "content coding not supported",  # gzip
        {"Accept-Encoding": "identity"},
    )
    # The sum of all partial messages is too large: see wire/partial_messages.
    PARTIAL_MESSAGES = (HTTPStatus.SERVICE_UNAVAILABLE, "too many partial messages")
    INVALID_PROXY_HEADER = (HTTPStatus.BAD_REQUEST, "invalid PROXY header")  # without a response
    INVALID_REQUEST = (HTTPStatus.BAD_REQUEST, "invalid HTTP request")  # or an ambiguous one
    HEAD_TOO_LARGE = (HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "request head too large")
    INVALID_HANDSHAKE = (HTTPStatus.BAD_REQUEST, "not a WebSocket handshake")
    INVALID_QUERY = (HTTPStatus.BAD_REQUEST, "invalid query")  # followed by the problem
    TOKEN_REQUIRED = (HTTPStatus.UNAUTHORIZED, "token required", {"WWW-Authenticate": "Bearer"})
    INVALID_TOKEN = (
        HTTPStatus.UNAUTHORIZED,
        "invalid token",  # followed by the TokenProblem
        {"WWW-Authenticate": 'Bearer error="invalid_token"'},
    )
    # The backend that auth.hook.url names answered 401 or 403.
    NOT_AUTHENTICATED = (
        HTTPStatus.UNAUTHORIZED,
        "not authenticated",
        {"WWW-Authenticate": "Bearer"},
    )
    FORBIDDEN = (HTTPStatus.FORBIDDEN, "not authorized")
    ORIGIN_NOT_ALLOWED = (HTTPStatus.FORBIDDEN, "origin not allowed")
    NOT_AUTHORIZED = (HTTPStatus.FORBIDDEN, "not authorized for this channel")
    STATS_NOT_AUTHORIZED = (HTTPStatus.FORBIDDEN, "not authorized for stats")
    API_NOT_AUTHORIZED = (HTTPStatus.FORBIDDEN, "not authorized for the API")
    BLOCKED = (HTTPStatus.FORBIDDEN, "user is blocked")  # by the server API
    NO_SUCH_CHANNEL = (HTTPStatus.NOT_FOUND, "no such channel")
    NO_PRESENCE = (HTTPStatus.NOT_FOUND, "no presence in this channel")  # see presence.channels
    # Commands of relay.v1.
    INVALID_COMMAND = (HTTPStatus.BAD_REQUEST, "invalid command")  # followed by the problem
    CHANNELS_PER_CONNECTION = (HTTPStatus.BAD_REQUEST, "too many channels on this connection")
    NOT_SUBSCRIBED = (HTTPStatus.NOT_FOUND, "not subscribed")
    ALREADY_SUBSCRIBED = (HTTPStatus.CONFLICT, "already subscribed")
    INVALID_IDEMPOTENCY_KEY = (HTTPStatus.BAD_REQUEST, "invalid idempotency key")
    IDEMPOTENCY_KEY_REUSED = (HTTPStatus.UNPROCESSABLE_ENTITY, "idempotency key reused")
    HANDSHAKE_TIMEOUT = (HTTPStatus.REQUEST_TIMEOUT, "handshake timeout")
    HTTP_CONNECTIONS = (HTTPStatus.SERVICE_UNAVAILABLE, "too many HTTP connections")
    METRICS_CONNECTIONS = (HTTPStatus.SERVICE_UNAVAILABLE, "too many connections on this port")
    DESCRIPTORS = (HTTPStatus.SERVICE_UNAVAILABLE, "too few file descriptors")
    CONNECTIONS = (HTTPStatus.SERVICE_UNAVAILABLE, "too many connections")
    CONNECTIONS_PER_IP = (HTTPStatus.SERVICE_UNAVAILABLE, "too many connections from this address")
    CONNECTIONS_PER_USER = (HTTPStatus.SERVICE_UNAVAILABLE, "too many connections of this user")
    HANDSHAKES = (HTTPStatus.SERVICE_UNAVAILABLE, "too many handshakes")
    CHANNELS = (HTTPStatus.SERVICE_UNAVAILABLE, "too many channels")
    SIGNING_KEYS = (HTTPStatus.SERVICE_UNAVAILABLE, "signing keys unavailable")  # auth.jwt.jwks_url
    HOOK_UNAVAILABLE = (HTTPStatus.SERVICE_UNAVAILABLE, "hook unavailable")  # auth.hook.url
    HOOK_ANSWER_INVALID = (HTTPStatus.SERVICE_UNAVAILABLE, "hook answer invalid")
    HOOK_REQUESTS = (HTTPStatus.SERVICE_UNAVAILABLE, "too many hook requests")
    BACKPLANE_UNAVAILABLE = (HTTPStatus.SERVICE_UNAVAILABLE, "backplane unavailable")
    UNCONFIRMED = (HTTPStatus.GATEWAY_TIMEOUT, "publish unconfirmed")
    API_REQUESTS = (HTTPStatus.SERVICE_UNAVAILABLE, "too many API requests")
    BLOCKS = (HTTPStatus.SERVICE_UNAVAILABLE, "too many blocked users")
    DRAINING = (HTTPStatus.SERVICE_UNAVAILABLE, "draining")
    INTERNAL_ERROR = (HTTPStatus.INTERNAL_SERVER_ERROR, "internal error")  # a bug, see the log

    def __init__(
        self, status: HTTPStatus, reason: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self.status = status
        self.reason = reason
        self.headers = headers or {}
        self.label = self.name.lower()


RETRY_AFTER_S = (1, 5)
"""Range of Retry-After, which is random so that refused clients do not reconnect together."""


class TokenProblem(StrEnum):
    """The check that a token failed, as sent to the client."""

    MALFORMED = "malformed"
    ALGORITHM = "algorithm"
    UNKNOWN_KEY = "unknown key"
    SIGNATURE = "signature"
    EXPIRED = "expired"
    NOT_YET_VALID = "not yet valid"
    AUDIENCE = "wrong audience"
    UNEXPECTED_AUDIENCE = "unexpected audience"
    ISSUER = "wrong issuer"
    USER = "user too long"  # above 1,024 characters
    INFO = "info too large"  # above 1 KiB
    OTHER_USER = "other user"  # a token that replaces one must be of the same user


class RefusedError(RelayError):
    """A request is refused. `str` of it is the text of the response.

    Args:
        why: the status, the reason and the label.
        detail: appended to the reason; never a part of the request.
        status: the status of the response, if it is not that of `why`.
        headers: headers of the response besides those of `why`.

    Attributes:
        headers: all headers of the response that depend on the refusal.
        retry_after_s: when to try again, in seconds; None: the refusal is not temporary.
    """

    def __init__(
        self,
        why: Refusal,
        detail: str = "",
        status: HTTPStatus | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{why.reason}: {detail}" if detail else why.reason)
        self.why = why
        self.detail = detail
        self.status = status or why.status
        self.headers = {**why.headers, **(headers or {})}
        self.retry_after_s: int | None = None
        if self.status is HTTPStatus.SERVICE_UNAVAILABLE:
            self.retry_after_s = random.randint(*RETRY_AFTER_S)
            self.headers["Retry-After"] = str(self.retry_after_s)


class TlsFailure(Enum):
    """Why a TLS handshake failed; the value is the metric label."""

    CERTIFICATE_REJECTED = "certificate_rejected"  # an alert of the client, which does not trust it
    CLIENT_CERTIFICATE = "client_certificate"  # the client has none, or not one of client_ca_file
    DISCONNECTED = "disconnected"  # without an alert; clients in Python reject certificates so
    NOT_TLS = "not_tls"  # other bytes, for example an HTTP request
    TIMEOUT = "timeout"  # not complete at the deadline
    UNSUPPORTED = "unsupported"  # no common version or cipher
    OTHER = "other"  # another alert or violation of the protocol


class Drop(Enum):
    """Why an expected delivery to a client was not made."""

    DISCONNECTED = "disconnected"  # the client disconnected before the write
    SLOW_CONSUMER = "slow_consumer"  # the message did not fit into the client's send backlog
