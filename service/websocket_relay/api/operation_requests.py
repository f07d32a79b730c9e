"""Parse what the server API is asked. Knows no connection and no response."""

import base64
import binascii
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

from websocket_relay.api.publish import MAX_BATCH, VALUE
from websocket_relay.api.requests import parameters_of
from websocket_relay.channels.broadcaster import Publish
from websocket_relay.channels.names import CHANNEL_NAME
from websocket_relay.channels.operations import MAX_LISTED, ORDERS
from websocket_relay.channels.publications import line_source
from websocket_relay.identity import MAX_USER_CHARACTERS
from websocket_relay.messages import BINARY, TEXT, Message
from websocket_relay.outcomes import Close, Refusal, RefusedError
from websocket_relay.strict_json import RepeatedKeyError, decode

MAX_REASON_BYTES = 123  # of a close frame (RFC 6455 section 5.5)
MAX_BLOCK_S = 86_400
MAX_LOG_LEVEL_S = 86_400
DEFAULT_LOG_LEVEL_S = 600
DEFAULT_LISTED = 100
CODES = range(4000, 5000)

Level = Literal["debug", "info", "warning", "error"]

TARGETS = ("user", "client", "channel")
CHANNEL_NEEDED = "channel must be the name of a channel"


class Disconnection(NamedTuple):
    """An order to disconnect clients.

    Attributes:
        target: the field that selects them, and its value.
        code, reason: of the close frame.
        blocked_until: the user is refused until then, in seconds since 1970; None: no change.
    """

    target: Mapping[str, str]
    code: int
    reason: str
    blocked_until: float | None

    @classmethod
    def parse(cls, body: bytes) -> "Disconnection":
        """Return the order in a body.

        Raises:
            RefusedError: it is invalid.
        """
        fields = _object_of(body)
        name, value = _target_of(fields)
        code = fields.pop("code", Close.DISCONNECTED.code)
        # In JSON, 4000.0 is an integer.
        if type(code) not in (int, float) or code not in CODES:
            raise _invalid(f"code must be an integer from {CODES[0]} to {CODES[-1]}")
        reason = fields.pop("reason", Close.DISCONNECTED.reason)
        if not _is_reason(reason):
            raise _invalid(f"reason must be text of at most {MAX_REASON_BYTES} bytes")
        blocked_until = None
        if "block_s" in fields:
            if name != "user":
                raise _invalid("block_s is for a user")
            blocked_until = time.time() + _seconds_of(fields, "block_s", 0, MAX_BLOCK_S)
        _require_empty(fields)
        return cls({name: value}, int(code), reason, blocked_until)

    def fields(self) -> dict[str, Any]:
        """Return what the replicas receive."""
        return {
            **self.target,
            "code": self.code,
            "reason": self.reason,
            "blocked_until": self.blocked_until,
        }


class LogLevelChange(NamedTuple):
    """A change of the minimum level of the log, for some seconds."""

    level: str
    for_s: float

    @classmethod
    def parse(cls, body: bytes) -> "LogLevelChange":
        """Return the change in a body.

        Raises:
            RefusedError: it is invalid.
        """
        fields = _object_of(body)
        level = fields.pop("level", None)
        if level not in get_args(Level):
            raise _invalid(f"level must be one of {', '.join(get_args(Level))}")
        fields.setdefault("for_s", DEFAULT_LOG_LEVEL_S)
        for_s = _seconds_of(fields, "for_s", 1, MAX_LOG_LEVEL_S)
        _require_empty(fields)
        return cls(level, for_s)


class ChannelsQuery(NamedTuple):
    """A question about the busiest channels.

    Attributes:
        prefix: of their names.
        order: what they have most of.
        limit: how many are listed.
    """

    prefix: str
    order: str
    limit: int

    @classmethod
    def parse(cls, query: bytes) -> "ChannelsQuery":
        """Return the question in a query.

        Raises:
            RefusedError: it is invalid.
        """
        parameters = parameters_of(query)
        prefix = _one_of(parameters, "prefix", "")
        order = _one_of(parameters, "order", "clients")
        if order not in ORDERS:
            raise _invalid_query(f"order must be {' or '.join(ORDERS)}")
        return cls(prefix, order, _limit_of(parameters))


class ClientsQuery(NamedTuple):
    """A question about clients.

    Attributes:
        channel, user: that they have; None: any.
        limit: how many are listed.
    """

    channel: str | None
    user: str | None
    limit: int

    @classmethod
    def parse(cls, query: bytes) -> "ClientsQuery":
        """Return the question in a query.

        Raises:
            RefusedError: it is invalid.
        """
        parameters = parameters_of(query)
        channel = _one_of(parameters, "channel", "") if "channel" in parameters else None
        if channel is not None and not CHANNEL_NAME.fullmatch(channel):
            raise _invalid_query(CHANNEL_NEEDED)
        user = _one_of(parameters, "user", "") or None
        return cls(channel, user, _limit_of(parameters))


def publishes_of(body: bytes, key: str = "") -> Iterator[Publish]:
    """Yield the message of each line.

    Args:
        body: of the request.
        key: its Idempotency-Key; empty: it has none.

    Raises:
        RefusedError: a line is none. The text names the line.
    """
    counts: Counter[str] = Counter()  # of the messages so far, by channel
    for number, line in enumerate(VALUE.finditer(body), 1):
        if number > MAX_BATCH:
            raise RefusedError(Refusal.MESSAGE_TOO_BIG, f"a batch has up to {MAX_BATCH} lines")
        try:
            channel, message = _publish_of(line[0])
        except ValueError as error:
            line_number = body.count(b"\n", 0, line.start()) + 1
            problem = f"line {line_number}: {error}"
            raise RefusedError(Refusal.INVALID_MESSAGE, problem) from None
        source = line_source(key, channel, counts[channel]) if key else b""
        counts[channel] += 1
        yield Publish(channel, message, source)


def _publish_of(line: bytes) -> tuple[str, Message]:
    fields = _parsed(line)
    channel = fields.pop("channel", None)
    if type(channel) is not str or not CHANNEL_NAME.fullmatch(channel):
        raise ValueError(CHANNEL_NEEDED)
    if len(fields) != 1 or not fields.keys() <= {"text", "base64"}:
        raise ValueError("text or base64 is needed besides channel")
    ((kind, value),) = fields.items()
    if type(value) is not str:
        raise ValueError(f"{kind} must be text")
    if kind == "base64":
        try:
            return channel, (BINARY, base64.b64decode(value, validate=True))
        except (binascii.Error, ValueError):
            raise ValueError("base64 is invalid") from None
    try:
        return channel, (TEXT, value.encode())
    except UnicodeEncodeError:
        raise ValueError("text has half of a surrogate pair") from None


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        value = decode(body.decode())
    except RepeatedKeyError:
        raise ValueError("a key is repeated") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _object_of(body: bytes) -> dict[str, Any]:
    try:
        return _parsed(body)
    except ValueError as error:
        raise _invalid(str(error)) from None


def _target_of(fields: dict[str, Any]) -> tuple[str, str]:
    """Remove the field that selects clients; return its name and value."""
    names = [name for name in TARGETS if name in fields]
    if len(names) != 1:
        raise _invalid("one of user, client and channel is needed")
    (name,) = names
    value = fields.pop(name)
    if type(value) is not str or not 0 < len(value) <= MAX_USER_CHARACTERS:
        raise _invalid(f"{name} must be text of 1 to {MAX_USER_CHARACTERS} characters")
    if name == "channel" and not CHANNEL_NAME.fullmatch(value):
        raise _invalid(CHANNEL_NEEDED)
    return name, value


def _require_empty(fields: Mapping[str, Any]) -> None:
    if fields:
        raise _invalid("a field that is not known")


def _invalid(problem: str) -> RefusedError:
    return RefusedError(Refusal.INVALID_COMMAND, problem)


def _invalid_query(problem: str) -> RefusedError:
    return RefusedError(Refusal.INVALID_QUERY, problem)


def _is_reason(reason: object) -> bool:
    try:
        return type(reason) is str and len(reason.encode()) <= MAX_REASON_BYTES
    except UnicodeEncodeError:
        return False


def _seconds_of(fields: dict[str, Any], name: str, least: int, most: int) -> float:
    value = fields.pop(name)
    if type(value) not in (int, float) or not least <= value <= most:
        raise _invalid(f"{name} must be a number from {least} to {most}")
    return float(value)


def _one_of(parameters: Mapping[str, list[str]], name: str, default: str) -> str:
    values = parameters.get(name, [default])
    if len(values) > 1:
        raise _invalid_query(f"{name} must be one value")
    return values[0]


def _limit_of(parameters: Mapping[str, list[str]]) -> int:
    text = _one_of(parameters, "limit", str(DEFAULT_LISTED))
    is_number = text.isascii() and text.isdecimal() and len(text) < 9
    if not is_number or not 1 <= int(text) <= MAX_LISTED:
        raise _invalid_query(f"limit must be from 1 to {MAX_LISTED}")
    return int(text)
