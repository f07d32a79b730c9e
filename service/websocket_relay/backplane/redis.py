"""Keep the log in a Redis stream (Redis 6.2 and newer, Valkey). The only module that imports redis.

Two connections: one blocks in XREAD for the next entries, one appends. Knows no client and no
message format.

Stream ids are not consecutive, so a deleted entry leaves no trace. Therefore each entry carries the
id of the entry before it. A reader that finds another id there detects that entries are missing.
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

READ_BLOCK_S = 1.0
"""How long XREAD blocks for entries: an idle broker responds at this interval."""

RESPONSE_TIMEOUT_S = 2.0
"""Time limit of a command, in addition to the time that it blocks."""

READ_ENTRIES = 16
"""Entries of one XREAD at most."""

MAX_ENTRY_BYTES = 1_048_576
"""Far below the limit of a Redis value (512 MB): a read returns at most 16 entries of this size."""

DATA_FIELD = b"d"
PREVIOUS_ID_FIELD = b"p"

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
"""Append an entry that carries the id of the one before it, trim the stream, return the entry's id.

A consumer group, `last`, keeps the id of the latest entry, also after that entry is deleted. XINFO
STREAM reports the last id of the stream, too, but together with two whole entries. The entry is
added before the group is moved: once a script has written, Redis no longer checks whether there is
memory for the rest.

An entry that this replica knows and the stream does not is lost: the broker went back to an earlier
state, or started empty. The new entry then gets an id after that of the lost one, so positions
never go back. It carries no previous id, because other entries may be lost as well.
"""

SCRIPT_CONTEXT = re.compile(
    r"Error running script \(call to \w+\): |@user_script: ?\d+: (-\w+ )?"
    r"| script: \w+, on @user_script:\d+\."
)
"""The context that Redis adds to the error of a command in a script."""

TRIM_STEP_BYTES = 1_048_576
TRIM_STEPS = 8
"""Granularity of trimming: 1 MiB, or an eighth of a limit where that is reached first."""

MIN_VERSION = (6, 2)
VERSION = re.compile(rb"redis_version:(\d+)\.(\d+)")

CONNECTION_OPTIONS: dict[str, Any] = {
    "socket_connect_timeout": RESPONSE_TIMEOUT_S,
    "socket_timeout": None,  # the caller sets deadlines; redis-py starts a task for each timeout
    "retry": None,  # the backplane retries, and knows what has changed meanwhile
    "retry_on_error": [],
    "decode_responses": False,
    "protocol": 2,
    "health_check_interval": 0,
}


class RetentionLimits:
    """Choose the id at which a stream may be trimmed, from the entries read so far.

    Args:
        max_bytes, max_age_s: what the stream is to retain.
    """

    def __init__(self, max_bytes: int, max_age_s: float) -> None:
        self._max_bytes = max_bytes
        self._max_age_ms = round(max_age_s * 1000)
        self._step_bytes = min(TRIM_STEP_BYTES, max_bytes // TRIM_STEPS)
        self._marks: deque[tuple[int, Id]] = deque()  # total bytes before an entry, and its id
        self._read_bytes = 0

    def record_entry(self, entry_id: Id, size: int) -> None:
        """Count an entry that was read."""
        marks = self._marks
        if (
            not marks
            or self._read_bytes - marks[-1][0] >= self._step_bytes
            or (entry_id[0] - marks[-1][1][0]) * TRIM_STEPS >= self._max_age_ms
        ):
            marks.append((self._read_bytes, entry_id))
        self._read_bytes += size
        oldest_ms = entry_id[0] - self._max_age_ms
        while len(marks) > 1 and (
            self._read_bytes - marks[1][0] > self._max_bytes or marks[1][1][0] < oldest_ms
        ):
            marks.popleft()

    @property
    def oldest_id(self) -> Id:
        """The id of the oldest entry to retain."""
        return self._marks[0][1] if self._marks else (0, 0)


class RedisConnection:
    """A connection that is opened on demand."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._connection: Connection = pool.make_connection()  # type: ignore[no-untyped-call]
        self._stream: asyncio.StreamWriter | None = None

    @property
    def is_open(self) -> bool:
        """Whether the connection is open, as far as is known."""
        stream = self._stream
        # redis-py does not check the transport, and uvloop raises on a write to a closed one.
        is_closed = stream is None or stream.transport.is_closing()
        return bool(self._connection.is_connected) and not is_closed

    async def open(self) -> None:
        """Connect unless connected, and check the version of Redis."""
        if self.is_open:
            return
        await self.abort()
        await self._connection.connect()  # type: ignore[no-untyped-call]
        writer = self._stream = self._connection._writer
        assert writer is not None
        reset_on_close(writer)
        try:
            (info,) = await self.execute(("INFO", "server"))
        except NoPermissionError:
            return  # a broker with ACLs as strict as this is unlikely to be an old one
        version = VERSION.search(info)
        if version and tuple(map(int, version.groups())) < MIN_VERSION:
            await self.abort()
            shown = b".".join(version.groups()).decode()
            raise BrokerError(f"Redis {shown} is not supported: 6.2 or newer is required")

    async def execute(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Send commands together and return their responses.

        Raises:
            ResponseError: the first response that is an error; all of them have been read.
        """
        connection = self._connection
        packed = [part for command in commands for part in connection.pack_command(*command)]
        await connection.send_packed_command(packed)
        responses: list[Any] = []
        first_error = None
        for _ in commands:
            try:
                responses.append(await connection.read_response())
            except ResponseError as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error
        return responses

    async def abort(self) -> None:
        """Abort the connection at once, also if redis-py has closed it already."""
        if self._stream is not None:
            self._stream.transport.abort()
            self._stream = None
        with suppress(Exception):  # the connection is closed, whatever redis-py raises
            await self._connection.disconnect(nowait=True)


class RedisStream:
    """A stream under one key of a Redis.

    Args:
        url: redis://, rediss:// or unix://, as parsed by redis-py.
        name: the key.
        max_bytes, max_age_s: approximate limits of retention; entries beyond them are trimmed.

    Raises:
        UnusableSettingError: the URL is invalid.
    """

    max_entry_bytes = MAX_ENTRY_BYTES

    def __init__(self, url: str, name: str, *, max_bytes: int, max_age_s: float) -> None:
        self._name = name
        self._secrets = secrets_of(url)
        self._retention = RetentionLimits(max_bytes, max_age_s)
        try:
            pool = ConnectionPool.from_url(url)
            pool.connection_kwargs.update(CONNECTION_OPTIONS)
            self._writer, self._reader = RedisConnection(pool), RedisConnection(pool)
        except (ValueError, TypeError, RedisError):
            # The text of the error may quote a part of the URL.
            raise unusable_url(url, "not a valid redis-py URL") from None
        self._latest_id: Id = (0, 0)  # of the entries that were read or confirmed
        self._is_reader_suspect = False  # the reader may be connected to a former primary

    async def append(self, data: bytes) -> None:
        """Append an entry, and trim the stream.

        Raises:
            BrokerError: the append is unconfirmed; the entry may be in the stream.
        """
        ms, sequence = self._latest_id
        bounds = [(ms, sequence), (ms, sequence + 1), self._retention.oldest_id]
        try:
            await self._writer.open()
            command = ("EVAL", APPEND, 1, self._name, *map(_format_id, bounds), data)
            (added,) = await self._writer.execute(command)
            self._record_id(_parse_id(added))
        except BaseException as error:
            # After a cancellation the response would be read as that of the next command. After an
            # error response, too: the server may be a replica that was the primary before.
            await self._writer.abort()
            if not isinstance(error, Exception):
                raise
            raise self._broker_error(error) from None

    async def read(self, after: Id) -> StreamRead:
        """Return the next entries; block for at most a second if there are none.

        Raises:
            BrokerError: the stream can't be read now.
        """
        try:
            async with Deadline(READ_BLOCK_S + RESPONSE_TIMEOUT_S):
                return await self._read(after)
        except BaseException as error:
            await self._reader.abort()
            if not isinstance(error, Exception):
                raise
            raise self._broker_error(error) from None

    def reconnect_reader(self) -> None:
        """Open a new connection for the next read."""
        self._is_reader_suspect = True

    async def _read(self, after: Id) -> StreamRead:
        if self._is_reader_suspect:
            self._is_reader_suspect = False
            await self._reader.abort()
        await self._reader.open()
        block_ms = round(READ_BLOCK_S * 1000)
        (found,) = await self._reader.execute(
            (
                "XREAD",
                "COUNT",
                READ_ENTRIES,
                "BLOCK",
                block_ms,
                "STREAMS",
                self._name,
                _format_id(after),
            )
        )
        entries = []
        for entry_id, data, previous_id in _parse_entries(found):
            entries.append(
                StreamEntry(entry_id, data, follows=previous_id == _format_id(after).encode())
            )
            self._retention.record_entry(entry_id, len(data))
            after = entry_id
        self._record_id(after)
        return StreamRead(entries, is_last=len(entries) < READ_ENTRIES)

    def _record_id(self, entry_id: Id) -> None:
        self._latest_id = max(self._latest_id, entry_id)

    async def close(self) -> None:
        """Abort both connections."""
        try:
            await self._writer.abort()
        finally:
            await self._reader.abort()

    def _broker_error(self, error: Exception) -> BrokerError:
        if isinstance(error, AskError):  # base class of MovedError
            error = BrokerError(f"in this Redis Cluster the key is elsewhere: {error}")
        if isinstance(error, ResponseError):
            error = BrokerError(SCRIPT_CONTEXT.sub("", str(error)))
        is_expected = isinstance(error, BrokerError | RedisError | OSError)  # TimeoutError, too
        return broker_error(error, self._secrets, is_expected=is_expected)


def _parse_entries(found: Any) -> Iterator[tuple[Id, bytes, bytes]]:
    """Yield the entries of an XREAD response: id, data, and the id of the previous entry.

    Data and previous id are empty in entries that were not written by a relay.
    """
    for _, entries in found or ():
        for raw_id, fields in entries:
            values = dict(zip(fields[::2], fields[1::2], strict=False))
            yield _parse_id(raw_id), values.get(DATA_FIELD, b""), values.get(PREVIOUS_ID_FIELD, b"")


def _parse_id(text: bytes) -> Id:
    ms, _, sequence = text.partition(b"-")
    return int(ms), int(sequence)


def _format_id(entry_id: Id) -> str:
    return f"{entry_id[0]}-{entry_id[1]}"
