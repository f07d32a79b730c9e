"""Keep the log in a Redis stream (Redis 6.2 and newer, Valkey). The only room that knows redis.

Two connections: one waits in XREAD for what comes next, one appends.

Ids of a stream leave room between them, so an entry that is gone leaves no trace. Therefore each
entry names the one before it, and a reader that finds another name there knows that it missed some.
"""

import asyncio
import re
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from redis.asyncio import Connection, ConnectionPool
from redis.exceptions import AskError, NoPermissionError, RedisError, ResponseError

from websocket_relay.backplane.replicated import (
    BrokerError,
    Id,
    StreamEntry,
    StreamRead,
    broker_error,
    reset_on_close,
)
from websocket_relay.cancellation import Deadline
from websocket_relay.redaction import secrets_of, unusable_url

WAIT_S = 1.0
"""How long XREAD waits for entries: so often is heard from a broker that has nothing to say."""

ANSWER_S = 2.0
"""What a command may take besides."""

READ_ENTRIES = 16  # at once

MAX_ENTRY_BYTES = 1_048_576
"""Far below what a value may have (512 MB): a read is no more than 16 of them."""

FIELD = b"d"
BEFORE = b"p"

APPEND = """
local key, known, following, oldest, data = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local function is_less(one, other)
  local ms, number = one:match('(%d+)-(%d+)')
  local other_ms, other_number = other:match('(%d+)-(%d+)')
  ms, other_ms = tonumber(ms), tonumber(other_ms)
  return ms < other_ms or ms == other_ms and tonumber(number) < tonumber(other_number)
end

local before, id = '0-0', '*'
local groups = redis.pcall('XINFO', 'GROUPS', key)
if groups.err then
  if not groups.err:find('no such key') then return groups end
  groups = {}
end
for _, group in ipairs(groups) do
  local facts = {}
  for at = 1, #group, 2 do facts[group[at]] = group[at + 1] end
  if facts.name == 'last' then before = facts['last-delivered-id'] end
end
if is_less(before, known) then
  before = 'lost'
  local now = redis.call('TIME')
  local ms = now[1] * 1000 + math.floor(now[2] / 1000)
  if not is_less(known, string.format('%.0f-0', ms)) then id = following end
end

local function add()
  return redis.pcall('XADD', key, 'MINID', '~', oldest, id, 'd', data, 'p', before)
end

local added = add()
if added.err and id ~= '*' then
  id = '*'
  added = add()
end
if not added.err and redis.pcall('XGROUP', 'SETID', key, 'last', '$').err then
  redis.call('XGROUP', 'CREATE', key, 'last', '$')
end
return added
"""
"""Add an entry that names the one before it, and trim what is too old; return the entry's id.

A consumer group, `last`, keeps the id of the latest entry, also when that one is deleted. XINFO
STREAM would tell the stream's last id, too, but together with two whole entries. The entry is added
before the group is moved: once a script has written, Redis does not ask any more whether there is
memory for the rest.

An entry that this replica knows of and the stream does not is lost: the broker went back, or began
anew. The new entry then stands after the lost one, so positions never go back, and names no entry,
for there may be others that were added before it and will never be read.
"""

SCRIPT = re.compile(
    r"Error running script \(call to \w+\): |@user_script: ?\d+: (-\w+ )?"
    r"| script: \w+, on @user_script:\d+\."
)
"""What Redis says of the script around an error of a command in it."""

KEEP_STEP_BYTES = 1_048_576
KEEP_STEPS = 8
"""A stream is cut off at marks; this is how exact they are."""

OLDEST = (6, 2)
VERSION = re.compile(rb"redis_version:(\d+)\.(\d+)")

OPTIONS: dict[str, Any] = {
    "socket_connect_timeout": ANSWER_S,
    "socket_timeout": None,  # deadlines are set here; redis-py starts a task for each of its own
    "retry": None,  # the backplane tries again, and knows what has changed meanwhile
    "retry_on_error": [],
    "decode_responses": False,
    "protocol": 2,
    "health_check_interval": 0,
}


class RetentionLimits:
    """Say where a stream may be cut off: what is older, or more, than is to be kept.

    Args:
        max_bytes, max_age_s: what is to be kept of it.
    """

    def __init__(self, max_bytes: int, max_age_s: float) -> None:
        self._max_bytes = max_bytes
        self._max_age_ms = round(max_age_s * 1000)
        self._step_bytes = min(KEEP_STEP_BYTES, max_bytes // KEEP_STEPS)
        self._marks: deque[tuple[int, Id]] = deque()  # what had been read in all, before there
        self._read_bytes = 0

    def note(self, identity: Id, size: int) -> None:
        """Take note of an entry."""
        marks = self._marks
        if (
            not marks
            or self._read_bytes - marks[-1][0] >= self._step_bytes
            or (identity[0] - marks[-1][1][0]) * KEEP_STEPS >= self._max_age_ms
        ):
            marks.append((self._read_bytes, identity))
        self._read_bytes += size
        oldest_ms = identity[0] - self._max_age_ms
        while len(marks) > 1 and (
            self._read_bytes - marks[1][0] > self._max_bytes or marks[1][1][0] < oldest_ms
        ):
            marks.popleft()

    @property
    def from_id(self) -> Id:
        """The oldest entry to keep."""
        return self._marks[0][1] if self._marks else (0, 0)


class RedisConnection:
    """A connection that is made when it is needed."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._connection: Connection = pool.make_connection()  # type: ignore[no-untyped-call]
        self._stream: asyncio.StreamWriter | None = None

    @property
    def is_open(self) -> bool:
        """Whether nothing is known to be wrong with it."""
        stream = self._stream
        # redis-py does not look at the transport, and uvloop lets nobody write to a closed one.
        is_gone = stream is None or stream.transport.is_closing()
        return bool(self._connection.is_connected) and not is_gone

    async def open(self) -> None:
        """Connect, where it is not, and see whether this is a Redis of use."""
        if self.is_open:
            return
        await self.hang_up()
        await self._connection.connect()  # type: ignore[no-untyped-call]
        writer = self._stream = self._connection._writer
        assert writer is not None
        reset_on_close(writer)
        try:
            (found,) = await self.ask(("INFO", "server"))
        except NoPermissionError:
            return  # a broker that is kept this tidy is hardly an old one
        version = VERSION.search(found)
        if version and tuple(map(int, version.groups())) < OLDEST:
            await self.hang_up()
            shown = b".".join(version.groups()).decode()
            raise BrokerError(f"Redis {shown} is too old: 6.2 or newer is needed")

    async def ask(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Return the answers to some commands that are sent together.

        Raises:
            ResponseError: the first answer that is an error; all have been read.
        """
        connection = self._connection
        packed = [part for command in commands for part in connection.pack_command(*command)]
        await connection.send_packed_command(packed)
        answers: list[Any] = []
        refused = None
        for _ in commands:
            try:
                answers.append(await connection.read_response())
            except ResponseError as error:
                refused = refused or error
        if refused is not None:
            raise refused
        return answers

    async def hang_up(self) -> None:
        """Let go of the connection at once, also where redis-py has closed it already."""
        if self._stream is not None:
            self._stream.transport.abort()
            self._stream = None
        with suppress(Exception):  # whatever it says: it is over
            await self._connection.disconnect(nowait=True)


class RedisStream:
    """One key of a Redis.

    Args:
        url: redis://, rediss:// or unix://, as redis-py reads it.
        name: of the key.
        max_bytes, max_age_s: what the stream is to keep, roughly; more is trimmed.

    Raises:
        UnfitError: the URL can't be used.
    """

    max_entry_bytes = MAX_ENTRY_BYTES

    def __init__(self, url: str, name: str, *, max_bytes: int, max_age_s: float) -> None:
        self._name = name
        self._secrets = secrets_of(url)
        self._kept = RetentionLimits(max_bytes, max_age_s)
        try:
            pool = ConnectionPool.from_url(url)
            pool.connection_kwargs.update(OPTIONS)
            self._writer, self._reader = RedisConnection(pool), RedisConnection(pool)
        except (ValueError, TypeError, RedisError):
            # What they say may quote a part of the URL.
            raise unusable_url(url, "not a URL that redis-py understands") from None
        self._known: Id = (0, 0)  # the last entry that was read or confirmed
        self._is_doubtful = False  # whether the reader's connection is still to the right broker

    async def append(self, data: bytes) -> None:
        """Add an entry, and trim what is too old.

        Raises:
            BrokerError: it may be there and it may not.
        """
        major, minor = self._known
        bounds = [(major, minor), (major, minor + 1), self._kept.from_id]
        try:
            await self._writer.open()
            command = ("EVAL", APPEND, 1, self._name, *map(_text, bounds), data)
            (added,) = await self._writer.ask(command)
            self._know(_id(added))
        except BaseException as error:
            # Cancelled: the answer would be taken for the next one's. Also where it only said no:
            # what was the primary may be a replica now.
            await self._writer.hang_up()
            if not isinstance(error, Exception):
                raise
            raise self._failed(error) from None

    async def read(self, after: Id) -> StreamRead:
        """Return the next entries; wait for them a second.

        Raises:
            BrokerError: they can't be had now.
        """
        try:
            async with Deadline(WAIT_S + ANSWER_S):
                return await self._read(after)
        except BaseException as error:
            await self._reader.hang_up()
            if not isinstance(error, Exception):
                raise
            raise self._failed(error) from None

    def distrust_reader(self) -> None:
        """Read by another connection from now on."""
        self._is_doubtful = True

    async def _read(self, after: Id) -> StreamRead:
        if self._is_doubtful:
            self._is_doubtful = False
            await self._reader.hang_up()
        await self._reader.open()
        wait_ms = round(WAIT_S * 1000)
        (found,) = await self._reader.ask(
            ("XREAD", "COUNT", READ_ENTRIES, "BLOCK", wait_ms, "STREAMS", self._name, _text(after))
        )
        entries = []
        for identity, data, before in _entries(found):
            entries.append(StreamEntry(identity, data, follows=before == _text(after).encode()))
            self._kept.note(identity, len(data))
            after = identity
        self._know(after)
        return StreamRead(entries, is_last=len(entries) < READ_ENTRIES)

    def _know(self, identity: Id) -> None:
        self._known = max(self._known, identity)

    async def close(self) -> None:
        """Let go of both connections."""
        try:
            await self._writer.hang_up()
        finally:
            await self._reader.hang_up()

    def _failed(self, error: Exception) -> BrokerError:
        if isinstance(error, AskError):  # MovedError is one
            error = BrokerError(f"in this Redis Cluster the key is elsewhere: {error}")
        if isinstance(error, ResponseError):
            error = BrokerError(SCRIPT.sub("", str(error)))
        is_usual = isinstance(error, BrokerError | RedisError | OSError)  # TimeoutError, too
        return broker_error(error, self._secrets, is_usual=is_usual)


def _entries(found: Any) -> Iterator[tuple[Id, bytes, bytes]]:
    """Yield what XREAD found: ids, what the relay put there, and which ids it says come before.

    Both are empty in entries that others put there.
    """
    for _, entries in found or ():
        for identity, fields in entries:
            named = dict(zip(fields[::2], fields[1::2], strict=False))
            yield _id(identity), named.get(FIELD, b""), named.get(BEFORE, b"")


def _id(text: bytes) -> Id:
    major, _, minor = text.partition(b"-")
    return int(major), int(minor)


def _text(identity: Id) -> str:
    return f"{identity[0]}-{identity[1]}"
