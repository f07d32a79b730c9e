"""Keep the log in a JetStream stream (NATS 2.9 and newer). The only module that imports nats.

Two connections: one pulls the next entries, one appends. Knows no client and no message format.

The consumer is an ephemeral pull consumer, one per connection. The relay requests a bounded count
of entries and requests more as it processes them, so the receive buffer has a bound.
"""

import asyncio
import json
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from websocket_relay.backplane.access import TLS_PARAMETERS, BrokerAccess, certificate_error
from websocket_relay.backplane.codec import FILLER_ENTRY
from websocket_relay.backplane.connecting import connect_in_time
from websocket_relay.backplane.nkeys import UserKey, user_jwt
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
from websocket_relay.outcomes import UnusableSettingError
from websocket_relay.redaction import secrets_of, unusable_url

PULL_EXPIRES_S = 1.0
"""How long the broker keeps a pull request: an idle broker responds at this interval."""

RESPONSE_TIMEOUT_S = 2.0
"""Time limit of a request, in addition to the time that the broker keeps it."""

CREDIT = 32
"""Entries that the broker may send ahead of their processing."""

CONSUMER_IDLE_S = 30.0
"""The broker deletes a consumer that received no pull request for so long."""

MAX_ENTRY_BYTES = 1_048_576
"""Not more than this, even if the broker accepts it: the broker may send 32 entries ahead."""

MIN_PAYLOAD_BYTES = 4096

MIN_VERSION = (2, 9)

MAX_FILLER_ENTRIES = 1_000_000
"""Filler entries for a stream that lost its latest entries, at most. It is more than the entries of
two minutes, which a broker may lose in a power failure."""

DUPLICATE_WINDOW_S = 120.0  # default of the broker, unless the stream's max_age is shorter

PARAMETERS = {"replicas", "handshake_first", *TLS_PARAMETERS.values()}

STREAM_NOT_FOUND = 10059  # err_code of JetStream
JETSTREAM_NOT_ENABLED = {10039, 10076}  # err_codes: for the account; for the server


class NatsAddress(NamedTuple):
    """The servers of the broker, and the access to them, as their URL has it.

    Attributes:
        servers: URL of each.
        access: user and password, or a token as a password without a user, and certificates.
        uses_tls: whether the servers have to speak TLS.
        handshake_first: whether TLS begins before the server's first message.
        replicas: of a stream that is created.
    """

    servers: Sequence[str]
    access: BrokerAccess
    uses_tls: bool
    handshake_first: bool
    replicas: int


def parse_nats_url(url: str) -> NatsAddress:
    """Parse a URL: nats:// or tls://, with one or several servers, separated by commas.

    Raises:
        UnusableSettingError: the URL is invalid.
    """
    scheme, _, rest = url.partition("://")
    server_list, _, query = rest.partition("?")
    parameters = dict(parse_qsl(query))
    if unknown := parameters.keys() - PARAMETERS:
        raise unusable_url(url, _unknown_parameters(unknown))
    servers, username, password = [], "", ""
    for server in server_list.rstrip("/").split(","):
        try:
            parts = urlsplit(f"{scheme}://{server.rpartition('://')[2]}")
            servers.append(f"{scheme}://{_bracketed(parts.hostname)}:{parts.port or 4222}")
        except ValueError:
            raise unusable_url(url, "invalid servers; example: nats://one:4222,two:4222") from None
        if parts.password is not None:
            username, password = unquote(parts.username or ""), unquote(parts.password)
        elif parts.username:
            username, password = "", unquote(parts.username)
    replicas = parameters.get("replicas", "1")
    if replicas not in {"1", "3", "5"}:
        raise unusable_url(url, "invalid replicas; allowed: 1, 3, 5")
    handshake_first = parameters.get("handshake_first", "false")
    if handshake_first not in {"true", "false"}:
        raise unusable_url(url, "invalid handshake_first; allowed: true, false")
    uses_tls = scheme.lower() == "tls"
    if handshake_first == "true" and not uses_tls:
        raise unusable_url(url, "handshake_first needs TLS: tls://")
    files = {name: parameters.get(each, "") for name, each in TLS_PARAMETERS.items()}
    access = BrokerAccess(username=username, password=password, **files)
    return NatsAddress(servers, access, uses_tls, handshake_first == "true", int(replicas))


def _unknown_parameters(names: Set[str]) -> str:
    settings = names & {each.name for each in fields(BrokerAccess)}
    if settings:
        return f"set {' and '.join(f'backplane.{each}' for each in sorted(settings))} instead"
    return (
        f"unknown parameters: {', '.join(sorted(names))}; allowed: {', '.join(sorted(PARAMETERS))}"
    )


def _do_nothing() -> None:
    pass


def _bracketed(host: str | None) -> str:
    if not host:
        raise ValueError
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True, slots=True)
class SignIn:
    """What a connection needs to sign in, as read from the files.

    Attributes:
        options: for nats-py.
        public_key: of the user's nkey, unless a JWT names it; empty: none.
        password: a secret that a text of the broker may contain; empty: none.
    """

    options: Mapping[str, Any]
    public_key: str = ""
    password: str = ""


def read_sign_in(access: BrokerAccess, *, uses_tls: bool) -> SignIn:
    """Read the credentials and certificates. It takes up to 0.1 s: call it in a thread.

    Raises:
        UnusableSettingError: a file can't be used.
        OSError: a certificate can't be used.
    """
    options: dict[str, Any] = {"tls": access.tls_context()} if uses_tls else {}
    setting = "creds_file" if access.creds_file else "nkey_file" if access.nkey_file else ""
    if setting:
        text = access.read(setting)
        try:
            key = UserKey(text)
            options["signature_cb"] = key.sign
            if setting == "nkey_file":
                return SignIn(options, key.public)
            jwt = user_jwt(text).encode()
        except ValueError as error:
            file = getattr(access, setting)
            raise UnusableSettingError(f"backplane.{setting}", f"{file}: {error}") from None
        return SignIn({**options, "user_jwt_cb": lambda: jwt})
    password = access.read_password()
    if access.username:
        options |= {"user": access.username, "password": password}
    elif password:
        options["token"] = password
    return SignIn(options, password=password)


class QuietNatsClient(Client):
    """The client of nats-py, without its final flush.

    On close nats-py writes its buffer to a connection that may be closed already. uvloop raises an
    error then, and nats-py does not call `closed_cb`. Private names of nats-py are used only here
    and in `TlsNatsClient`; pyproject.toml has a bound on its version.
    """

    @property
    def has_greeting(self) -> bool:
        """Whether the server has sent its first message, INFO."""
        return bool(self._server_info)

    @property
    def stream_writer(self) -> asyncio.StreamWriter | None:
        """The writer of the TCP connection, if there is one: nats-py has no public access to it."""
        return getattr(self._transport, "_io_writer", None)

    def sign_in_as(self, public_key: str) -> None:
        """Name the user's nkey when connecting: nats-py does it only with the package nkeys."""
        self._public_nkey = public_key

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        self._pending = []
        self._pending_data_size = 0
        await super()._close(status, do_cbs)


class TlsNatsClient(QuietNatsClient):
    """A client that sends nothing, and no password, to a server that does not offer TLS.

    nats-py falls back to plain text if the server's INFO does not require TLS, whatever its own
    options are. A man in the middle would only have to remove that field.
    """

    def _connect_command(self) -> bytes:
        # Called before the first write.
        writer = self.stream_writer
        if writer is None or writer.get_extra_info("ssl_object") is None:
            raise NatsError("the server does not speak TLS")
        return super()._connect_command()


class NatsConnection:
    """A connection that is opened once, and not again after a failure.

    nats-py would reconnect by itself and send its buffer: late, and possibly twice.

    Args:
        address: the servers, and how they are accessed.
        sign_in: the credentials and certificates.
        timings: the time limits to connect and to close.

    Attributes:
        client: the client of nats-py; it publishes.
    """

    def __init__(self, address: NatsAddress, sign_in: SignIn, timings: Timings) -> None:
        self._address = address
        self._sign_in = sign_in
        self._timings = timings
        self.client = TlsNatsClient() if address.uses_tls else QuietNatsClient()
        if sign_in.public_key:
            self.client.sign_in_as(sign_in.public_key)
        domain = address.access.domain
        self.api = f"$JS.{domain}.API" if domain else "$JS.API"
        self._failure = ""
        self.on_failure: Callable[[], None] = _do_nothing

    @property
    def is_open(self) -> bool:
        """Whether the connection is open, as far as is known."""
        return bool(self.client.is_connected)

    @property
    def max_payload(self) -> int:
        """The largest message that the broker accepts, in bytes."""
        return int(self.client.max_payload)

    @property
    def failure(self) -> str:
        """The latest error of the connection."""
        return self._failure or "connection closed"

    @property
    def hint(self) -> str:
        """The likely reason for which the server did not answer in time; empty: none."""
        if (
            not self._address.uses_tls
            or self._address.handshake_first
            or self.client.has_greeting
            or self.client.stream_writer is None
            or self._failure
        ):
            return ""
        return "; a NATS with handshake_first needs ?handshake_first=true in backplane.url"

    async def open(self, server: str) -> None:
        """Connect, and check the version and the limits of the server.

        Raises:
            BrokerError: the server can't be reached, or is not supported.
        """
        options, timings = dict(self._sign_in.options), self._timings
        connect_s = 2 * timings.resolve_timeout_s + timings.connect_timeout_s
        if prefix := self._address.access.inbox_prefix:
            options["inbox_prefix"] = prefix
        try:
            await self.client.connect(
                [server],
                error_cb=self._on_error,
                closed_cb=self._on_closed,
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                # More than `connect_in_time` allows.
                connect_timeout=connect_s,  # type: ignore[arg-type]
                pending_size=0,  # publish never waits for a flush; the relay awaits responses
                tls_handshake_first=self._address.handshake_first,
                **options,
            )
        except (NatsError, OSError) as error:
            raise BrokerError(self._failure or str(error)) from None
        writer = self.client.stream_writer
        assert writer is not None
        reset_on_close(writer)
        version = self.client.connected_server_version
        if (version.major, version.minor) < MIN_VERSION:
            raise BrokerError(f"NATS {version} is not supported: 2.9 or newer is required")
        if self.max_payload < MIN_PAYLOAD_BYTES:
            raise BrokerError(f"max_payload must be at least {MIN_PAYLOAD_BYTES} bytes")

    async def subscribe(self, on_message: Any) -> str:
        """Pass messages to a new inbox of this connection to `on_message`; return the inbox."""
        inbox = self.client.new_inbox()
        # Without the limits of nats-py: it would drop the messages that exceed them.
        await self.client.subscribe(
            f"{inbox}.*", cb=on_message, pending_msgs_limit=0, pending_bytes_limit=0
        )
        return inbox

    async def request(self, command: str, content: Mapping[str, Any] | None = None) -> Any:
        """Send a request to the JetStream API and return its response.

        Raises:
            JetStreamError: the response is an error.
            BrokerError: there is no response.
        """
        data = json.dumps(content).encode() if content is not None else b""
        try:
            message = await self.client.request(
                f"{self.api}.{command}", data, timeout=RESPONSE_TIMEOUT_S
            )
        except NoRespondersError:
            domain = self._address.access.domain
            other = f", or there is no domain {domain}" if domain else ""
            raise BrokerError(f"JetStream is not enabled, or not for this account{other}") from None
        except (NatsError, OSError, TimeoutError) as error:
            raise BrokerError(self._failure or str(error) or "not answered in time") from None
        response = json.loads(message.data)
        if "error" in response:
            raise JetStreamError(response["error"])
        return response

    async def abort(self) -> None:
        """Abort the connection at once, also one whose `open` was cancelled."""
        if (writer := self.client.stream_writer) is not None:
            writer.transport.abort()
        with suppress(Exception):  # the connection is closed, whatever nats-py raises
            async with Deadline(self._timings.close_timeout_s):
                await self.client.close()

    async def _on_error(self, error: Exception) -> None:
        # A missing permission, for example: the broker does not respond to the request then.
        self._failure = str(error) or type(error).__name__
        self.on_failure()

    async def _on_closed(self) -> None:
        self.on_failure()


class JetStreamError(BrokerError):
    """A response of JetStream that is an error.

    Args:
        error: the error object of the response.
    """

    def __init__(self, error: Mapping[str, Any]) -> None:
        self.code = error.get("err_code")
        text = str(error.get("description"))
        if self.code in JETSTREAM_NOT_ENABLED:
            text = f"JetStream is not enabled: {text}"
        super().__init__(text)


class NatsAppender:
    """The connection that appends, one entry at a time.

    Args:
        connection: an open connection.
        subject: subject of the stream.

    Attributes:
        epoch: first part of the stream's entry ids.
    """

    def __init__(self, connection: NatsConnection, subject: str) -> None:
        self.connection = connection
        self.epoch = 0
        self._subject = subject
        self._inbox = ""
        self._request_number = 0
        self._confirmed: asyncio.Future[Msg | None] | None = None

    async def open(self, epoch: int) -> None:
        """Subscribe to the confirmations."""
        self.epoch = epoch
        self.connection.on_failure = self._fail
        self._inbox = await self.connection.subscribe(self._on_message)

    async def append(self, data: bytes) -> int:
        """Append an entry and wait for the broker's confirmation; return the entry's sequence.

        Raises:
            BrokerError: the append is not confirmed.
        """
        self._request_number += 1
        confirmed = self._confirmed = asyncio.get_running_loop().create_future()
        reply = f"{self._inbox}.{self._request_number}"
        await self.connection.client.publish(self._subject, data, reply)
        message = await confirmed
        if message is None:
            raise BrokerError(self.connection.failure)
        if message.headers:  # status 503: no responders
            raise BrokerError("no stream has this subject")
        response = json.loads(message.data)
        if "error" in response:
            raise JetStreamError(response["error"])
        return int(response["seq"])

    async def _on_message(self, message: Msg) -> None:
        confirmed = self._confirmed
        if (
            confirmed is not None
            and not confirmed.done()
            and message.subject == f"{self._inbox}.{self._request_number}"
        ):
            confirmed.set_result(message)

    def _fail(self) -> None:
        if self._confirmed is not None and not self._confirmed.done():
            self._confirmed.set_result(None)


class ReceivedEntry(NamedTuple):
    """An entry in the receive buffer.

    Attributes:
        sequence: JetStream sequence of the entry.
        time: when the broker stored the entry, in the broker's text form.
        remaining: count of further entries in the stream.
        data: bytes of the entry.
    """

    sequence: int
    time: str
    remaining: int
    data: bytes


class NatsConsumer:
    """The connection that reads.

    It starts with the entry that the previous connection read last. A broker that loses its latest
    entries assigns their sequences again, so the sequence alone does not prove that this is still
    the same stream. The time of the entry does.

    Args:
        connection: an open connection.
        name: name of the stream.

    Attributes:
        epoch: first part of the stream's entry ids.
        after: sequence that was read last; 0: none.
        time: when the broker stored that entry.
    """

    def __init__(self, connection: NatsConnection, name: str) -> None:
        self.connection = connection
        self.epoch = self.after = 0
        self.time = ""
        self._name = name
        self._is_contiguous = False  # whether the stream is known to hold `after` unchanged
        self._inbox = ""
        self._pull_subject = ""
        self._pull_number = 0
        self._credit = 0
        self._received: deque[ReceivedEntry] = deque()
        self._has_received = asyncio.Event()
        self._failure = ""

    async def open(self, epoch: int, after: int, time: str) -> None:
        """Create a consumer that starts with the entry that was read last."""
        self.epoch, self.after, self.time = epoch, after, time
        self.connection.on_failure = self._fail
        self._inbox = await self.connection.subscribe(self._on_message)
        config = {
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": max(1, after),
            "ack_policy": "none",
            "replay_policy": "instant",
            "inactive_threshold": round(CONSUMER_IDLE_S * 1e9),
            "mem_storage": True,
            "num_replicas": 1,
        }
        content = {"stream_name": self._name, "config": config}
        response = await self.connection.request(f"CONSUMER.CREATE.{self._name}", content)
        api = self.connection.api
        self._pull_subject = f"{api}.CONSUMER.MSG.NEXT.{self._name}.{response['name']}"

    async def read(self) -> StreamRead:
        """Return the received entries; wait for at most a second if there are none."""
        if self._credit <= CREDIT // 2 and not self._failure:
            await self._pull()
        if not self._received and not self._failure:
            self._has_received.clear()
            await self._has_received.wait()
        if self._failure:
            raise BrokerError(self._failure)
        entries: list[StreamEntry] = []
        remaining = 0
        while self._received and len(entries) < CREDIT // 2:
            sequence, time, remaining, data = self._received.popleft()
            if sequence <= self.after:
                self._is_contiguous = (sequence, time) == (self.after, self.time)
                continue
            # Entries can be deleted from the middle of a stream, too.
            follows = self._is_contiguous and sequence == self.after + 1
            self.after, self.time, self._is_contiguous = sequence, time, True
            entries.append(StreamEntry((self.epoch, sequence), data, follows))
        return StreamRead(entries, is_last=not remaining)

    async def _pull(self) -> None:
        self._pull_number += 1
        batch = CREDIT - self._credit
        self._credit += batch
        content = f'{{"batch":{batch},"expires":{round(PULL_EXPIRES_S * 1e9)}}}'
        reply = f"{self._inbox}.{self._pull_number}"
        await self.connection.client.publish(self._pull_subject, content.encode(), reply)

    async def _on_message(self, message: Msg) -> None:
        headers = message.headers
        if headers and "Status" in headers:
            self._on_status(headers)
        else:
            # $JS.ACK.stream.consumer.… or, in a domain, $JS.ACK.domain.account.stream.consumer.…
            fields = message.reply.split(".")
            at = 5 if len(fields) == 9 else 7
            self._credit -= 1
            self._received.append(
                ReceivedEntry(int(fields[at]), fields[at + 2], int(fields[at + 3]), message.data)
            )
        self._has_received.set()

    def _on_status(self, headers: Mapping[str, str]) -> None:
        status = headers["Status"]
        if status in {"404", "408"}:  # a pull request has expired: it brings no more entries
            self._credit -= int(headers.get("Nats-Pending-Messages", self._credit))
        elif status != "100":
            self._failure = f"consumer failed: {headers.get('Description') or status}"

    def _fail(self) -> None:
        self._failure = self.connection.failure
        self._has_received.set()


class NatsStream:
    """A stream of a JetStream; its name is its subject, too.

    The stream is created if it does not exist. An existing stream is used as configured: its limits
    are up to its operator, but it has to be a log.

    Args:
        url: see `parse_nats_url`.
        name: name of the stream.
        access: the settings for the access to NATS.
        timings: the time limits to connect and to close.
        retention: of the stream, if it is created here.

    Raises:
        UnusableSettingError: the URL is invalid, or a file can't be used.
    """

    def __init__(
        self, url: str, name: str, access: BrokerAccess, timings: Timings, retention: Retention
    ) -> None:
        self.max_entry_bytes = MAX_ENTRY_BYTES
        address = parse_nats_url(url)
        self._address = address._replace(access=replace(access, **address.access.given))
        self._url = url
        self._secrets = secrets_of(url)
        self._read_sign_in()
        self._name = name
        self._timings = timings
        self._retention = retention
        self._server_index = random.randrange(len(self._address.servers))
        self._writer: NatsAppender | None = None
        self._reader: NatsConsumer | None = None
        self._writing = AbortOnFailure(self._abort_writer, lambda: self._secrets, NatsError)
        self._reading = AbortOnFailure(self._abort_reader, lambda: self._secrets, NatsError)
        self._last_read_time = ""  # when the broker stored the entry that was read last
        self._latest_id: Id = (0, 0)  # of the entries that were read or confirmed

    async def open_writer(self) -> None:
        """Connect for `append`, unless the connection is open.

        Raises:
            BrokerError: the server can't be reached, or the stream not used.
        """
        if self._writer is not None and self._writer.connection.is_open:
            return
        async with self._writing:
            await self._abort_writer()
            writer = self._writer = NatsAppender(await self._connect(), self._name)
            async with Deadline(RESPONSE_TIMEOUT_S):
                await writer.open(await self._prepare_stream(writer.connection))

    async def append(self, data: bytes, timeout_s: float) -> None:
        """Append an entry.

        Args:
            data: bytes of the entry.
            timeout_s: time limit of the response.

        Raises:
            BrokerError: the append is unconfirmed; the entry may be in the stream.
        """
        writer = self._writer
        assert writer is not None
        async with self._writing, Deadline(timeout_s):
            if len(data) > self.max_entry_bytes:
                raise BrokerError("the broker's message size limit was reduced")
            sequence = await writer.append(data)
        self._latest_id = max(self._latest_id, (writer.epoch, sequence))

    async def read(self, after: Id, *, must_reconnect: bool = False) -> StreamRead:
        """Return the next entries; wait for at most a second if there are none.

        Raises:
            BrokerError: the stream can't be read now.
        """
        async with self._reading:
            if must_reconnect:
                await self._abort_reader()
            if self._reader is None:
                await self._open_reader(after)
                return StreamRead((), is_last=False)
            reader = self._reader
            async with Deadline(PULL_EXPIRES_S + RESPONSE_TIMEOUT_S):
                read = await reader.read()
        self._latest_id = max(self._latest_id, (reader.epoch, reader.after))
        self._last_read_time = reader.time
        return read

    async def close(self) -> None:
        """Abort both connections."""
        try:
            await self._abort_writer()
        finally:
            await self._abort_reader()

    async def _connect(self) -> NatsConnection:
        """Open a connection to one of the servers; after a failure the next call tries the next."""
        async with Deadline(RESPONSE_TIMEOUT_S):
            sign_in = await asyncio.to_thread(self._read_sign_in)
        connection = NatsConnection(self._address, sign_in, self._timings)
        servers = self._address.servers
        server = servers[self._server_index % len(servers)]
        parts = urlsplit(server)
        try:
            await connect_in_time(
                parts.hostname or "",
                parts.port or 0,
                lambda: connection.open(server),
                self._timings,
            )
        except BaseException as error:
            self._server_index += 1
            hint = connection.hint if self._latest_id == (0, 0) else ""
            await connection.abort()
            if hint and isinstance(error, BrokerError):
                raise BrokerError(f"{error}{hint}") from None
            raise
        self.max_entry_bytes = min(MAX_ENTRY_BYTES, connection.max_payload)
        return connection

    def _read_sign_in(self) -> SignIn:
        access = self._address.access
        try:
            sign_in = read_sign_in(access, uses_tls=self._address.uses_tls)
        except OSError as error:
            raise certificate_error(self._url, access, error) from None
        self._secrets = secrets_of(self._url, sign_in.password)
        return sign_in

    async def _open_reader(self, after: Id) -> None:
        reader = self._reader = NatsConsumer(await self._connect(), self._name)
        async with Deadline(RESPONSE_TIMEOUT_S):
            epoch = await self._prepare_stream(reader.connection)
            sequence = after[1] if epoch == after[0] else 0
            await reader.open(epoch, sequence, self._last_read_time)

    async def _prepare_stream(self, connection: NatsConnection) -> int:
        """Return the epoch of the stream; fill the place of entries that the broker lost."""
        # Copied before the broker is asked: `_latest_id` grows meanwhile.
        latest_epoch, latest_sequence = self._latest_id
        response = await self._find_or_create_stream(connection)
        epoch, last_sequence = _ms(response["created"]), response["state"]["last_seq"]
        if epoch < latest_epoch:
            raise BrokerError("the stream is older than the one before: check the clocks")
        if epoch == latest_epoch and last_sequence < latest_sequence:
            await self._fill_lost_entries(connection, latest_sequence - last_sequence)
        return epoch

    async def _find_or_create_stream(self, connection: NatsConnection) -> Any:
        """Return what JetStream reports about the stream; create it if it does not exist."""
        try:
            response = await connection.request(f"STREAM.INFO.{self._name}")
        except JetStreamError as error:
            if error.code != STREAM_NOT_FOUND:
                raise
            return await connection.request(f"STREAM.CREATE.{self._name}", self._config())
        self._check_config(response["config"])
        return response

    def _check_config(self, config: Mapping[str, Any]) -> None:
        """Check that an existing stream is a log; record its message size limit."""
        name, max_msg_size = self._name, config.get("max_msg_size", -1)
        if config["retention"] != "limits" or config.get("discard", "old") != "old":
            raise BrokerError(f"stream {name}: retention must be limits, and discard old")
        if name not in config.get("subjects", ()):
            raise BrokerError(f"stream {name}: subjects must include {name}")
        if config.get("no_ack"):
            raise BrokerError(f"stream {name}: no_ack must be false")
        if 0 < max_msg_size < MIN_PAYLOAD_BYTES:
            raise BrokerError(f"stream {name}: max_msg_size must be at least {MIN_PAYLOAD_BYTES}")
        if max_msg_size > 0:
            self.max_entry_bytes = min(self.max_entry_bytes, max_msg_size)

    def _config(self) -> Mapping[str, Any]:
        return {
            "name": self._name,
            "subjects": [self._name],
            "retention": "limits",
            "discard": "old",
            "storage": "file",
            "max_bytes": self._retention.max_bytes,
            "max_age": round(self._retention.max_age_s * 1e9),
            "duplicate_window": round(min(DUPLICATE_WINDOW_S, self._retention.max_age_s) * 1e9),
            "num_replicas": self._address.replicas,
        }

    async def _fill_lost_entries(self, connection: NatsConnection, count: int) -> None:
        """Append filler entries, so that the stream continues after the latest known sequence.

        A broker that loses power loses the entries that it had not written to disk, and assigns
        their sequences again.
        """
        if count > MAX_FILLER_ENTRIES:
            raise BrokerError(f"the stream lost its latest {count} entries: too many to fill")
        for number in range(count):
            await connection.client.publish(self._name, FILLER_ENTRY)
            if not number % 1000:
                await asyncio.sleep(0)
        # Its response arrives after the broker has processed the filler entries.
        await connection.request(f"STREAM.INFO.{self._name}")

    async def _abort_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            await writer.connection.abort()

    async def _abort_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            await reader.connection.abort()


def _ms(text: str) -> int:
    """Convert an RFC 3339 time with nanoseconds to milliseconds since 1970."""
    seconds, _, fraction = text.rstrip("Z").partition(".")
    whole = datetime.fromisoformat(seconds).replace(tzinfo=UTC)
    return round(whole.timestamp()) * 1000 + int(f"{fraction:0<3}"[:3])
