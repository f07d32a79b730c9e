"""Keep the log in a Redis stream (Redis 6.2 and newer, Valkey). The only module that imports redis.

Two connections: one blocks in XREAD for the next entries, one appends. Both are opened to the
server that holds the stream: the one in the URL, the primary that a Sentinel names, or the node to
which a Redis Cluster redirects. Knows no client and no message format.

Stream ids are not consecutive, so a deleted entry leaves no trace. Therefore each entry carries the
id of the entry before it. A reader that finds another id there detects that entries are missing.
"""

import asyncio
import random
import re
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from redis.asyncio import Connection, SSLConnection, UnixDomainSocketConnection
from redis.credentials import CredentialProvider
from redis.exceptions import AskError, MovedError, RedisError, ResponseError

from websocket_relay.backplane.access import TLS_PARAMETERS, BrokerAccess, certificate_error
from websocket_relay.backplane.connecting import connect_in_time
from websocket_relay.backplane.redis_url import RedisAddress, Server, parse_redis_url
from websocket_relay.backplane.stream import (
    AbortOnFailure,
    BrokerError,
    Id,
    Retention,
    StreamEntry,
    StreamRead,
    reset_on_close,
)
from websocket_relay.backplane.timings import Timings
from websocket_relay.cancellation import Deadline
from websocket_relay.redaction import secrets_of

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

MAX_REDIRECTIONS = 5
"""Redirections of a Redis Cluster that are followed for one command: more are a loop."""

MIN_VERSION = (6, 2)
VERSION = re.compile(rb"redis_version:(\d+)\.(\d+)")

CONNECTION_OPTIONS: dict[str, Any] = {
    "socket_connect_timeout": None,  # `connect_in_time` sets the deadline
    "socket_timeout": None,  # the caller sets deadlines; redis-py starts a task for each timeout
    "retry": None,  # the backplane retries, and knows what has changed meanwhile
    "retry_on_error": [],
    "decode_responses": False,
    "protocol": 2,
    "health_check_interval": 0,
}


class RedisAccess(CredentialProvider):
    """The access to a Redis: the password is read anew for each connection.

    Args:
        url: of the Redis, which may contain credentials and certificates, too.
        access: the settings for the access to Redis.

    Raises:
        UnusableSettingError: the password's file can't be used.
    """

    def __init__(self, url: str, access: BrokerAccess) -> None:
        self._url = url
        self._access = access
        self._password = access.read_password()

    def add_to(self, address: RedisAddress) -> RedisAddress:
        """Return an address with the credentials, and the certificates for Sentinels, too.

        Raises:
            UnusableSettingError: a certificate can't be used.
        """
        given = self._access.given
        tls = {option: given[name] for name, option in TLS_PARAMETERS.items() if name in given}
        options = {**address.options, **tls}
        if self._password:
            options["credential_provider"] = self
        if address.uses_tls:
            load_certificates(SSLConnection(**options), self._url)
        sentinel_options = {**address.sentinel_options, **tls}
        return address._replace(options=options, sentinel_options=sentinel_options)

    @property
    def secrets(self) -> Sequence[str]:
        """What a text of the broker may contain and a log line may not."""
        return secrets_of(self._url, self._password)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        """Return the arguments of AUTH."""
        self._password = await asyncio.to_thread(self._access.read_password)
        username = self._access.username
        return (username, self._password) if username else (self._password,)


def load_certificates(connection: SSLConnection, url: str) -> None:
    """Load the certificates for a new connection. It takes up to 0.1 s: call it in a thread.

    redis-py would load them in the event loop, not name the file that can't be used, ask for a
    passphrase on the terminal, and trust the system's CAs besides those of the file.

    Args:
        connection: not connected yet.
        url: of the broker, which may name the files.

    Raises:
        UnusableSettingError: a file can't be used.
    """
    tls = connection.ssl_context
    names = (tls.ca_certs, tls.certfile, tls.keyfile)
    access = BrokerAccess(**dict(zip(TLS_PARAMETERS, (name or "" for name in names), strict=True)))
    try:
        context = access.tls_context(ca_path=tls.ca_path, key_password=tls.password or "")
    except OSError as error:
        raise certificate_error(url, access, error) from None
    context.check_hostname = tls.check_hostname
    context.verify_mode = tls.cert_reqs
    tls.context = context


class TrimPoint:
    """Choose the id at which a stream may be trimmed, from the entries read so far.

    Args:
        retention: what the stream is to retain.
    """

    def __init__(self, retention: Retention) -> None:
        self._max_bytes = retention.max_bytes
        self._max_age_ms = round(retention.max_age_s * 1000)
        self._step_bytes = min(TRIM_STEP_BYTES, retention.max_bytes // TRIM_STEPS)
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
    """A connection to one server at a time.

    Args:
        url: of the broker, which may name certificates.
        timings: the time limits to connect.
    """

    def __init__(self, url: str, timings: Timings) -> None:
        self._url = url
        self._timings = timings
        self.server = Server("", 0)
        self._connection: Connection | UnixDomainSocketConnection | None = None
        self._stream: asyncio.StreamWriter | None = None

    @property
    def is_open(self) -> bool:
        """Whether the connection is open, as far as is known."""
        stream = self._stream
        # redis-py does not check the transport, and uvloop raises on a write to a closed one.
        is_closed = stream is None or stream.transport.is_closing()
        return not is_closed and self._connection is not None and self._connection.is_connected

    async def open(self, server: Server, options: Mapping[str, Any], *, uses_tls: bool) -> None:
        """Connect to a server, and check its version.

        Args:
            server: the server.
            options: arguments of redis-py.
            uses_tls: whether the server is reached by TLS.
        """
        await self.abort()
        self.server = server
        if not server.host:
            self._connection = UnixDomainSocketConnection(**options, **CONNECTION_OPTIONS)
        else:
            kind = SSLConnection if uses_tls else Connection
            self._connection = kind(**server._asdict(), **options, **CONNECTION_OPTIONS)
        path = options.get("path", "")
        await connect_in_time(*server, self._connect, self._timings, path=path)

    async def _connect(self) -> None:
        connection = self._connection
        assert connection is not None
        if isinstance(connection, SSLConnection):
            await asyncio.to_thread(load_certificates, connection, self._url)
        await connection.connect()  # type: ignore[no-untyped-call]
        writer = self._stream = connection._writer
        assert writer is not None
        reset_on_close(writer)
        try:
            info = await self.request("INFO", "server")
        except ResponseError:
            return  # renamed, or not permitted: a broker as strict as this is unlikely an old one
        version = VERSION.search(info)
        if version and tuple(map(int, version.groups())) < MIN_VERSION:
            await self.abort()
            shown = b".".join(version.groups()).decode()
            raise BrokerError(f"Redis {shown} is not supported: 6.2 or newer is required")

    async def request(self, *command: Any) -> Any:
        """Send a command and return its response.

        Raises:
            ResponseError: the response is an error.
        """
        connection = self._connection
        assert connection is not None
        await connection.send_packed_command(connection.pack_command(*command))
        return await connection.read_response()

    async def abort(self) -> None:
        """Abort the connection at once, also if redis-py has closed it already."""
        if self._stream is not None:
            self._stream.transport.abort()
            self._stream = None
        if self._connection is not None:
            with suppress(Exception):  # the connection is closed, whatever redis-py raises
                await self._connection.disconnect(nowait=True)


class RedisServers:
    """Find the server that holds the stream.

    redis-py has classes for Sentinel and Cluster, which keep pools of connections and retry by
    themselves. For a stream, which is one key, asking again at each connect is enough.

    Args:
        url: see `parse_redis_url`.
        address: the servers of the URL.
        timings: the time limits.
    """

    def __init__(self, url: str, address: RedisAddress, timings: Timings) -> None:
        self._url = url
        self._address = address
        self._timings = timings
        self._redirected_to: Server | None = None
        self.is_asking = False  # the slot of the key is migrating to the server

    async def open(self, connection: RedisConnection) -> None:
        """Connect to the server that holds the stream, as far as is known, unless it is connected.

        Raises:
            BrokerError: no server can be reached, or none is known.
        """
        if connection.is_open:
            return
        address = self._address
        if address.kind == "sentinel":
            server = await self._ask_sentinels()
        else:
            server = self._redirected_to or random.choice(address.servers)
        await connection.open(server, address.options, uses_tls=address.uses_tls)

    def redirect(self, error: AskError, origin: Server) -> None:
        """Follow a redirection.

        Raises:
            BrokerError: the address is not that of a Redis Cluster.
        """
        if self._address.kind != "cluster":
            raise BrokerError(
                f"in this Redis Cluster the key is elsewhere: {error}; use redis+cluster://"
            )
        # Without a host: the node has another port of the same host.
        self._redirected_to = Server(error.host or origin.host, error.port)
        self.is_asking = not isinstance(error, MovedError)

    def forget_redirection(self) -> None:
        """Connect to a server of the URL next: the node may be down."""
        self._redirected_to, self.is_asking = None, False

    async def _ask_sentinels(self) -> Server:
        servers = self._address.servers
        failures = {f"{each.host}:{each.port}": "not reached in time" for each in servers}
        with suppress(TimeoutError):
            async with Deadline(self._timings.sentinels_timeout_s):
                # In random order: one that is cut off from the others may name a former primary.
                for sentinel in random.sample(servers, len(servers)):
                    try:
                        return await self._ask_sentinel(sentinel)
                    except (BrokerError, RedisError, OSError) as error:  # TimeoutError, too
                        failure = str(error) or "not answered in time"
                        failures[f"{sentinel.host}:{sentinel.port}"] = failure
        listed = "; ".join(f"{each}: {failure}" for each, failure in sorted(failures.items()))
        raise BrokerError(f"no Sentinel names the primary: {listed}")

    async def _ask_sentinel(self, sentinel: Server) -> Server:
        address, connection = self._address, RedisConnection(self._url, self._timings)
        try:
            await connection.open(sentinel, address.sentinel_options, uses_tls=address.uses_tls)
            async with Deadline(RESPONSE_TIMEOUT_S):
                command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", address.service)
                primary = await connection.request(*command)
        finally:
            await connection.abort()
        if primary is None:
            raise BrokerError(f"no service {address.service}")
        return Server(primary[0].decode(), int(primary[1]))


class RedisStream:
    """A stream under one key of a Redis.

    Args:
        url: see `parse_redis_url`.
        name: the key.
        access: the settings for the access to Redis.
        timings: the time limits to connect.
        retention: entries beyond it are trimmed.

    Raises:
        UnusableSettingError: the URL is invalid, or a file can't be used.
    """

    max_entry_bytes = MAX_ENTRY_BYTES

    def __init__(
        self, url: str, name: str, access: BrokerAccess, timings: Timings, retention: Retention
    ) -> None:
        self._name = name
        self._access = RedisAccess(url, access)
        self._trim_point = TrimPoint(retention)
        address = self._access.add_to(parse_redis_url(url))
        self._servers = RedisServers(url, address, timings)
        self._writer, self._reader = RedisConnection(url, timings), RedisConnection(url, timings)
        self._writing, self._reading = map(self._abort_on_failure, (self._writer, self._reader))
        self._latest_id: Id = (0, 0)  # of the entries that were read or confirmed

    async def open_writer(self) -> None:
        """Connect for `append`, unless the connection is open.

        Raises:
            BrokerError: no server can be reached, or none is known.
        """
        async with self._writing:
            await self._servers.open(self._writer)

    async def append(self, data: bytes, timeout_s: float) -> None:
        """Append an entry, and trim the stream.

        Args:
            data: bytes of the entry.
            timeout_s: time limit of the response, and of redirections to another node.

        Raises:
            BrokerError: the append is unconfirmed; the entry may be in the stream.
        """
        ms, sequence = self._latest_id
        bounds = [(ms, sequence), (ms, sequence + 1), self._trim_point.oldest_id]
        command = ("EVAL", APPEND, 1, self._name, *map(_format_id, bounds), data)
        async with self._writing:
            entry_id = _parse_id(await self._execute(self._writer, command, timeout_s))
        self._latest_id = max(self._latest_id, entry_id)

    async def read(self, after: Id, *, must_reconnect: bool = False) -> StreamRead:
        """Return the next entries; block for at most a second if there are none.

        Raises:
            BrokerError: the stream can't be read now.
        """
        block_ms, timeout_s = round(READ_BLOCK_S * 1000), READ_BLOCK_S + RESPONSE_TIMEOUT_S
        stream = ("STREAMS", self._name, _format_id(after))
        command = ("XREAD", "COUNT", READ_ENTRIES, "BLOCK", block_ms, *stream)
        entries = []
        async with self._reading:
            if must_reconnect:
                await self._reader.abort()
            await self._servers.open(self._reader)
            found = await self._execute(self._reader, command, timeout_s)
            for raw_id, fields in found[0][1] if found else ():
                # Empty in an entry that was not written by a relay.
                values = dict(zip(fields[::2], fields[1::2], strict=False))
                data, previous_id = values.get(DATA_FIELD, b""), values.get(PREVIOUS_ID_FIELD, b"")
                follows = previous_id == _format_id(after).encode()
                after = _parse_id(raw_id)
                entries.append(StreamEntry(after, data, follows))
                self._trim_point.record_entry(after, len(data))
        self._latest_id = max(self._latest_id, after)
        return StreamRead(entries, is_last=len(entries) < READ_ENTRIES)

    async def close(self) -> None:
        """Abort both connections."""
        try:
            await self._writer.abort()
        finally:
            await self._reader.abort()

    async def _execute(
        self, connection: RedisConnection, command: tuple[Any, ...], timeout_s: float
    ) -> Any:
        """Run a command on the server that holds the stream; return its response."""
        servers = self._servers
        async with Deadline(timeout_s):
            for _ in range(MAX_REDIRECTIONS):
                await servers.open(connection)
                try:
                    if servers.is_asking:
                        await connection.request("ASKING")
                    return await connection.request(*command)
                except AskError as error:  # base class of MovedError
                    servers.redirect(error, connection.server)
                    await connection.abort()
                except ResponseError as error:
                    raise BrokerError(SCRIPT_CONTEXT.sub("", str(error))) from None
        raise BrokerError("the Redis Cluster redirects in a loop")

    def _abort_on_failure(self, connection: RedisConnection) -> AbortOnFailure:
        async def abort() -> None:
            await connection.abort()
            self._servers.forget_redirection()

        return AbortOnFailure(abort, lambda: self._access.secrets, RedisError)


def _parse_id(text: bytes) -> Id:
    ms, _, sequence = text.partition(b"-")
    return int(ms), int(sequence)


def _format_id(entry_id: Id) -> str:
    return f"{entry_id[0]}-{entry_id[1]}"
