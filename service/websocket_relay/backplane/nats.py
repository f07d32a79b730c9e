"""Keep the log in a JetStream stream (NATS 2.9 and newer). The only room that knows nats.

Two connections: one asks for what comes next, one appends. A consumer is a pull consumer that
lives as long as its connection: the relay asks for so many entries, and for more as it takes them,
so nothing gathers here that it has no room for.
"""

import asyncio
import json
import random
import ssl
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from websocket_relay.backplane.codec import HOLE
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
"""How long the broker waits for entries: so often is heard from one that has nothing to say."""

ANSWER_S = 2.0
"""What a request may take besides."""

HANG_UP_S = 0.2
"""A connection that was aborted needs some turns of the event loop to end."""

CREDIT = 32
"""Entries that the broker may send ahead."""

IDLE_S = 30.0
"""When a consumer that nobody asks is forgotten by the broker."""

MAX_ENTRY_BYTES = 1_048_576
"""Where the broker takes more, this is enough: the broker may send 32 of them ahead."""

LEAST_PAYLOAD_BYTES = 4096

OLDEST = (2, 9)

MAX_LIFT = 1_000_000
"""Entries to put into a stream that has gone back: more than two minutes' worth, which a broker
that loses power may lose."""

DUPLICATE_WINDOW_S = 120.0  # what the broker sets, unless the stream is not kept for so long

PARAMETERS = {"replicas", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile"}

NOT_FOUND = 10059  # error code of JetStream: stream not found
NOT_ENABLED = {10039, 10076}  # for the account; at all


class NatsAddress(NamedTuple):
    """Where the broker is and how it is talked to."""

    servers: Sequence[str]
    credentials: Mapping[str, str]
    tls: ssl.SSLContext | None
    replicas: int


def parse_nats_url(url: str) -> NatsAddress:
    """Take a URL apart: nats:// or tls://, several servers with commas between them.

    Raises:
        UnfitError: it can't be used.
    """
    scheme, _, rest = url.partition("://")
    places, _, query = rest.partition("?")
    parameters = dict(parse_qsl(query))
    if unknown := parameters.keys() - PARAMETERS:
        raise unusable_url(url, f"{', '.join(sorted(unknown))}: of {', '.join(sorted(PARAMETERS))}")
    servers, credentials = [], {}
    for place in places.rstrip("/").split(","):
        try:
            parts = urlsplit(f"{scheme}://{place.rpartition('://')[2]}")
            servers.append(f"{scheme}://{_bracketed(parts.hostname)}:{parts.port or 4222}")
        except ValueError:
            raise unusable_url(url, "wants hosts and ports: nats://one:4222,two:4222") from None
        if parts.password is not None:
            user = unquote(parts.username or "")
            credentials = {"user": user, "password": unquote(parts.password)}
        elif parts.username:
            credentials = {"token": unquote(parts.username)}
    replicas = parameters.get("replicas", "1")
    if replicas not in {"1", "3", "5"}:
        raise unusable_url(url, "replicas: 1, 3 or 5")
    return NatsAddress(servers, credentials, _tls(url, scheme, parameters), int(replicas))


def _nothing() -> None:
    pass


def _bracketed(host: str | None) -> str:
    if not host:
        raise ValueError
    return f"[{host}]" if ":" in host else host


def _tls(url: str, scheme: str, parameters: Mapping[str, str]) -> ssl.SSLContext | None:
    if scheme != "tls":
        return None
    try:
        context = ssl.create_default_context(cafile=parameters.get("ssl_ca_certs"))
        if certificate := parameters.get("ssl_certfile"):
            context.load_cert_chain(certificate, parameters.get("ssl_keyfile"))
    except OSError as error:  # SSLError is one
        raise unusable_url(url, f"certificates: {error.strerror or error}") from None
    return context


class QuietNatsClient(Client):
    """nats-py's, which does not say goodbye.

    It would send what is left on a connection that is gone; uvloop makes that an error, and then
    nobody is told that it closed.
    """

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        self._pending = []
        self._pending_data_size = 0
        await super()._close(status, do_cbs)


class TlsNatsClient(QuietNatsClient):
    """A client that says nothing, and no password, to a server that leaves TLS out.

    nats-py speaks plainly to a server that does not ask for TLS, whatever it was told; who stands
    between the two would only have to take that question out.
    """

    def _connect_command(self) -> bytes:
        # The first thing that is sent; nats-py has no other way to its transport.
        if self._transport._io_writer.get_extra_info("ssl_object") is None:  # type: ignore[union-attr]
            raise NatsError("the server does not speak TLS")
        return super()._connect_command()


class NatsConnection:
    """A connection: made once, and not again when it has failed.

    nats-py would connect again by itself, and send what was in its buffer: late, and twice.
    """

    def __init__(self, address: NatsAddress) -> None:
        self._address = address
        self._client = TlsNatsClient() if address.tls is not None else QuietNatsClient()
        self._stream: asyncio.StreamWriter | None = None
        self._failure = ""
        self.when_failed: Callable[[], None] = _nothing

    @property
    def is_open(self) -> bool:
        """Whether nothing is known to be wrong with it."""
        return bool(self._client.is_connected)

    @property
    def max_payload(self) -> int:
        """What the broker takes at once."""
        return int(self._client.max_payload)

    @property
    def failure(self) -> str:
        """What went wrong with it, the last time."""
        return self._failure or "connection closed"

    async def open(self, server: str) -> None:
        """Connect, and see whether this is a NATS of use.

        Raises:
            BrokerError: it can't be reached, or is of no use.
        """
        try:
            await self._client.connect(
                [server],
                error_cb=self._note_error,
                closed_cb=self._note_closed,
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                connect_timeout=ANSWER_S,  # type: ignore[arg-type]
                pending_size=0,  # what is published is never waited for: answers are
                tls=self._address.tls,
                **self._address.credentials,  # type: ignore[arg-type]
            )
        except (NatsError, OSError) as error:
            raise BrokerError(self._failure or str(error)) from None
        # nats-py has no other way to its transport.
        self._stream = self._client._transport._io_writer  # type: ignore[union-attr]
        reset_on_close(self._stream)
        version = self._client.connected_server_version
        if (version.major, version.minor) < OLDEST:
            raise BrokerError(f"{version} is too old: 2.9 or newer is needed")
        if self.max_payload < LEAST_PAYLOAD_BYTES:
            raise BrokerError(f"its max_payload is below {LEAST_PAYLOAD_BYTES} bytes")

    async def subscribe(self, take: Any) -> str:
        """Give what comes to an address of this connection's own to `take`; return the address."""
        inbox = self._client.new_inbox()
        # Without bounds of its own: what is over them would be thrown away.
        await self._client.subscribe(
            f"{inbox}.*", cb=take, pending_msgs_limit=0, pending_bytes_limit=0
        )
        return inbox

    async def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        """Send something.

        Raises:
            BrokerError: there is no connection.
        """
        try:
            await self._client.publish(subject, data, reply=reply)
        except (NatsError, OSError) as error:
            raise BrokerError(self._failure or str(error)) from None

    async def ask(self, request: str, content: Mapping[str, Any] | None = None) -> Any:
        """Return JetStream's answer.

        Raises:
            RefusedError: the answer is an error.
            BrokerError: there is none.
        """
        data = json.dumps(content).encode() if content is not None else b""
        try:
            answer = await self._client.request(f"$JS.API.{request}", data, timeout=ANSWER_S)
        except NoRespondersError:
            raise BrokerError("JetStream is not enabled, or not for this account") from None
        except (NatsError, OSError, TimeoutError) as error:
            raise BrokerError(self._failure or str(error) or "not answered in time") from None
        found = json.loads(answer.data)
        if "error" in found:
            raise StreamRejectedError(found["error"])
        return found

    async def hang_up(self) -> None:
        """Let go of the connection at once."""
        if self._stream is not None:
            self._stream.transport.abort()
        with suppress(Exception):  # whatever it says: it is over
            async with Deadline(HANG_UP_S):
                await self._client.close()

    async def _note_error(self, error: Exception) -> None:
        # A right that is missing, say: what was asked for is not answered then.
        self._failure = str(error) or type(error).__name__
        self.when_failed()

    async def _note_closed(self) -> None:
        self.when_failed()


class StreamRejectedError(BrokerError):
    """JetStream's answer is an error.

    Args:
        error: as it says it.
    """

    def __init__(self, error: Mapping[str, Any]) -> None:
        self.code = error.get("err_code")
        text = str(error.get("description"))
        if self.code in NOT_ENABLED:
            text = f"JetStream is not enabled: {text}"
        super().__init__(text)


class StreamWriter:
    """The connection that appends, one entry at a time."""

    def __init__(self, link: NatsConnection, subject: str, major: int) -> None:
        self.link = link
        self.major = major
        self._subject = subject
        self._inbox = ""
        self._number = 0
        self._answer: asyncio.Future[Msg | None] | None = None

    async def open(self) -> None:
        """Get ready for answers."""
        self.link.when_failed = self._fail
        self._inbox = await self.link.subscribe(self._take)

    async def append(self, data: bytes) -> int:
        """Add an entry, and wait until the broker says that it has it; return its sequence.

        Raises:
            BrokerError: it does not say so.
        """
        self._number += 1
        answer = self._answer = asyncio.get_running_loop().create_future()
        await self.link.publish(self._subject, data, f"{self._inbox}.{self._number}")
        message = await answer
        if message is None:
            raise BrokerError(self.link.failure)
        if message.headers:  # the status: no responders
            raise BrokerError("no stream takes what is published")
        found = json.loads(message.data)
        if "error" in found:
            raise StreamRejectedError(found["error"])
        return int(found["seq"])

    async def _take(self, message: Msg) -> None:
        answer = self._answer
        if (
            answer is not None
            and not answer.done()
            and message.subject == f"{self._inbox}.{self._number}"
        ):
            answer.set_result(message)

    def _fail(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(None)


class StreamMessage(NamedTuple):
    """An entry of a stream.

    Attributes:
        sequence: its number.
        time: when the broker took it, in its words.
        following: how many more there are.
        data: its bytes.
    """

    sequence: int
    time: str
    following: int
    data: bytes


class StreamReader:
    """The connection that reads.

    It begins with the entry that was read last by the connection before. A broker that lost its
    latest entries gives their numbers to others; so the number alone does not say that this is the
    same stream still, but the time does.

    Args:
        link: the connection.
        name: of the stream.
        major: what its ids begin with.
        after: the sequence that was read last; 0: none.
        time: when the broker took that.
    """

    def __init__(self, link: NatsConnection, name: str, major: int, after: int, time: str) -> None:
        self.link = link
        self.major = major
        self.after = after
        self.time = time
        self._name = name
        self._follows = False  # whether nothing is missing after `after`
        self._inbox = ""
        self._next = ""  # where to ask for more
        self._asked = 0
        self._credit = 0
        self._come: deque[StreamMessage] = deque()
        self._has_come = asyncio.Event()
        self._failure = ""

    async def open(self) -> None:
        """Begin with what was read last."""
        self.link.when_failed = self._fail
        self._inbox = await self.link.subscribe(self._take)
        config = {
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": max(1, self.after),
            "ack_policy": "none",
            "replay_policy": "instant",
            "inactive_threshold": round(IDLE_S * 1e9),
            "mem_storage": True,
            "num_replicas": 1,
        }
        request = {"stream_name": self._name, "config": config}
        found = await self.link.ask(f"CONSUMER.CREATE.{self._name}", request)
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{self._name}.{found['name']}"

    async def read(self) -> StreamRead:
        """Return what has come, or comes in the next second."""
        if self._credit <= CREDIT // 2:
            await self._ask_for_more()
        if not self._come:
            self._has_come.clear()
            await self._has_come.wait()
        if self._failure:
            raise BrokerError(self._failure)
        entries: list[StreamEntry] = []
        following = 0
        while self._come and len(entries) < CREDIT // 2:
            sequence, time, following, data = self._come.popleft()
            if sequence <= self.after:
                self._follows = (sequence, time) == (self.after, self.time)
                continue
            # Entries can be taken out of a stream from the middle, too.
            follows = self._follows and sequence == self.after + 1
            self.after, self.time, self._follows = sequence, time, True
            entries.append(StreamEntry((self.major, sequence), data, follows))
        return StreamRead(entries, is_last=not following)

    async def _ask_for_more(self) -> None:
        self._asked += 1
        wanted = CREDIT - self._credit
        self._credit += wanted
        request = f'{{"batch":{wanted},"expires":{round(WAIT_S * 1e9)}}}'
        await self.link.publish(self._next, request.encode(), f"{self._inbox}.{self._asked}")

    async def _take(self, message: Msg) -> None:
        headers = message.headers
        if headers and "Status" in headers:
            self._take_status(headers)
        else:
            # $JS.ACK.stream.consumer.… or, in a domain, $JS.ACK.domain.account.stream.consumer.…
            fields = message.reply.split(".")
            at = 5 if len(fields) == 9 else 7
            self._credit -= 1
            self._come.append(
                StreamMessage(int(fields[at]), fields[at + 2], int(fields[at + 3]), message.data)
            )
        self._has_come.set()

    def _take_status(self, headers: Mapping[str, str]) -> None:
        status = headers["Status"]
        if status in {"404", "408"}:  # a request has expired: nothing more comes for it
            self._credit -= int(headers.get("Nats-Pending-Messages", self._credit))
        elif status != "100":
            self._failure = f"the consumer is gone: {headers.get('Description') or status}"

    def _fail(self) -> None:
        self._failure = self.link.failure
        self._has_come.set()


class NatsStream:
    """One stream of a JetStream; its name is the subject, too.

    It is made where it is absent. One that is there is used as it is: its limits are its
    operator's, but it has to be a log.

    Args:
        url: see `parse_nats_url`.
        name: of the stream.
        max_bytes, max_age_s: what the stream is to keep, when it is made here.

    Raises:
        UnfitError: the URL can't be used.
    """

    def __init__(self, url: str, name: str, *, max_bytes: int, max_age_s: float) -> None:
        self.max_entry_bytes = MAX_ENTRY_BYTES
        self._address = parse_nats_url(url)
        self._secrets = secrets_of(url)
        self._name = name
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._turn = random.randrange(len(self._address.servers))
        self._writer: StreamWriter | None = None
        self._reader: StreamReader | None = None
        self._is_doubtful = False  # whether the reader's connection is still to the right broker
        self._read_time = ""  # when the broker took the entry that was read last
        self._known: Id = (0, 0)  # the last entry that was read or confirmed

    async def append(self, data: bytes) -> None:
        """Add an entry.

        Raises:
            BrokerError: it may be there and it may not.
        """
        try:
            if self._writer is None or not self._writer.link.is_open:
                await self._drop_writer()
                self._writer = await self._open_writer()
            if len(data) > self.max_entry_bytes:
                raise BrokerError("the broker takes less at once than it did")
            writer = self._writer
            self._know((writer.major, await writer.append(data)))
        except BaseException as error:
            await self._drop_writer()
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
                if self._is_doubtful:
                    self._is_doubtful = False
                    await self._drop_reader()
                if self._reader is None:
                    self._reader = await self._open_reader(after)
                    return StreamRead((), is_last=False)
                read = await self._reader.read()
                self._know((self._reader.major, self._reader.after))
                self._read_time = self._reader.time
                return read
        except BaseException as error:
            await self._drop_reader()
            if not isinstance(error, Exception):
                raise
            raise self._failed(error) from None

    def distrust_reader(self) -> None:
        """Read by another connection from now on."""
        self._is_doubtful = True

    async def close(self) -> None:
        """Let go of both connections."""
        try:
            await self._drop_writer()
        finally:
            await self._drop_reader()

    async def _connect(self) -> NatsConnection:
        """Return a connection to one of the servers: to the next one, whenever one has failed."""
        link = NatsConnection(self._address)
        servers = self._address.servers
        try:
            await link.open(servers[self._turn % len(servers)])
        except BaseException:
            self._turn += 1
            await link.hang_up()
            raise
        self.max_entry_bytes = min(MAX_ENTRY_BYTES, link.max_payload)
        return link

    async def _open_writer(self) -> StreamWriter:
        link = await self._connect()
        try:
            writer = StreamWriter(link, self._name, await self._find(link))
            await writer.open()
        except BaseException:
            await link.hang_up()
            raise
        return writer

    async def _open_reader(self, after: Id) -> StreamReader:
        link = await self._connect()
        try:
            major = await self._find(link)
            sequence = after[1] if major == after[0] else 0
            reader = StreamReader(link, self._name, major, sequence, self._read_time)
            await reader.open()
        except BaseException:
            await link.hang_up()
            raise
        return reader

    async def _find(self, link: NatsConnection) -> int:
        """Return what the ids of the stream begin with; let it go on after what is known of it."""
        known_major, known = self._known  # before the stream is asked: it grows meanwhile
        found = await self._stream_by(link)
        major, last = _ms(found["created"]), found["state"]["last_seq"]
        if major < known_major:
            raise BrokerError("the stream is older than the one before: check the clocks")
        if major == known_major and last < known:
            await self._lift(link, known - last)
        return major

    def _know(self, identity: Id) -> None:
        self._known = max(self._known, identity)

    async def _stream_by(self, link: NatsConnection) -> Any:
        """Return what JetStream says of the stream; make it where it is absent."""
        try:
            found = await link.ask(f"STREAM.INFO.{self._name}")
        except StreamRejectedError as error:
            if error.code != NOT_FOUND:
                raise
            return await link.ask(f"STREAM.CREATE.{self._name}", self._config())
        self._see_whether_fit(found["config"])
        return found

    def _see_whether_fit(self, config: Mapping[str, Any]) -> None:
        """Insist that a stream is a log, and take note of what it takes at once."""
        name, takes = self._name, config.get("max_msg_size", -1)
        if config["retention"] != "limits" or config.get("discard", "old") != "old":
            raise BrokerError(f"stream {name}: needs retention limits and discard old")
        if name not in config.get("subjects", ()):
            raise BrokerError(f"stream {name}: needs the subject {name}")
        if config.get("no_ack"):
            raise BrokerError(f"stream {name}: needs to acknowledge what it takes")
        if 0 < takes < LEAST_PAYLOAD_BYTES:
            raise BrokerError(f"stream {name}: needs max_msg_size {LEAST_PAYLOAD_BYTES} at least")
        if takes > 0:
            self.max_entry_bytes = min(self.max_entry_bytes, takes)

    def _config(self) -> Mapping[str, Any]:
        return {
            "name": self._name,
            "subjects": [self._name],
            "retention": "limits",
            "discard": "old",
            "storage": "file",
            "max_bytes": self._max_bytes,
            "max_age": round(self._max_age_s * 1e9),
            "duplicate_window": round(min(DUPLICATE_WINDOW_S, self._max_age_s) * 1e9),
            "num_replicas": self._address.replicas,
        }

    async def _lift(self, link: NatsConnection, count: int) -> None:
        """Let a stream that has gone back go on after what is known of it.

        A broker that loses power loses what it had not written, and numbers what comes next as it
        did that.
        """
        if count > MAX_LIFT:
            raise BrokerError(f"the stream is {count} entries behind what was read of it")
        for number in range(count):
            await link.publish(self._name, HOLE)
            if not number % 1000:
                await asyncio.sleep(0)
        await link.ask(f"STREAM.INFO.{self._name}")  # answered when they are through

    async def _drop_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            await writer.link.hang_up()

    async def _drop_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            await reader.link.hang_up()

    def _failed(self, error: Exception) -> BrokerError:
        is_usual = isinstance(error, BrokerError | TimeoutError)
        return broker_error(error, self._secrets, is_usual=is_usual)


def _ms(text: str) -> int:
    """Return milliseconds since 1970 of RFC 3339 with nanoseconds."""
    seconds, _, fraction = text.rstrip("Z").partition(".")
    whole = datetime.fromisoformat(seconds).replace(tzinfo=UTC)
    return round(whole.timestamp()) * 1000 + int(f"{fraction:0<3}"[:3])
