"""Subscribe and publish as clients do, and record observations. Knows no process, no fault."""

import asyncio
import json
import random
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlencode

import httpx2
from websocket_relay.backplane.interface import Position
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from bench.chaos.observations import (
    Answer,
    ConnectStep,
    Delivered,
    DisconnectStep,
    GapReported,
    Proof,
    Record,
    RosterAnswer,
    RosterChanged,
    RosterShown,
    Stay,
    Trace,
    name_of,
    named,
    payload_of,
)
from tests.support.events_client import EventStreamResponse, ServerSentEvent
from tests.support.relay_process import NO_CA
from tests.support.relay_v1 import RELAY_V1, decode, encode_command
from tests.support.tcp_proxy import HOST

OPEN_S = 3.0
SILENCE_S = 6.0
"""An event stream that is silent for so long is reopened; comments arrive every 2 s."""

RETURN_S = (0.05, 0.5)
SESSION_S = 8.0
"""Mean time after which a client that moves reconnects by itself."""

POST_S = 12.0
LOOK_S = 0.05
SMALL_BUFFER_BYTES = 16_384

SIZES = ((0.90, 20, 200), (0.095, 1_000, 8_000), (0.0045, 50_000, 150_000), (0.0005, 900_000, 0))
"""Shares of messages, and how long they are: from, and to."""

MAX_BYTES = 1_048_000

WEBSOCKET_PAUSE_S = 0.04
POST_PAUSE_S = 0.12
ASK_PAUSE_S = 0.5
BATCH_SHARE = 0.1


class Place(Protocol):
    """Where a client can connect."""

    @property
    def name(self) -> str:
        """The relay that runs there now."""

    @property
    def port(self) -> int:
        """Of its proxy."""

    @property
    def direct_port(self) -> int:
        """Of the relay itself."""


class Surroundings(Protocol):
    """The run, as a client sees it."""

    record: Record

    @property
    def places(self) -> Sequence[Place]:
        """Return where clients can connect."""

    def now_s(self) -> float:
        """Return seconds since the run's start."""


class RefusedSubscriptionError(Exception):
    """The relay refused an event stream."""


BROKEN = (OSError, EOFError, TimeoutError, WebSocketException, RefusedSubscriptionError)
"""The errors of a connection that a fault ends; httpx2 has others."""


def size_of(chance: random.Random) -> int:
    """Return how long the next message is."""
    share = chance.random()
    for part, least, most in SIZES:
        share -= part
        if share < 0:
            return chance.randint(least, most or MAX_BYTES)
    return SIZES[0][1]


class Subscriber:
    """A client that stays subscribed to one channel, whatever breaks.

    Args:
        moves: it reconnects by itself now and then, to any relay.
        watches: it is sent who is in the channel, and who joins and leaves.

    Attributes:
        client: its id in rosters; empty: it is not sent its id.
    """

    resumes = True

    def __init__(
        self, run: Surroundings, name: str, channel: str, *, moves: bool, watches: bool = False
    ) -> None:
        self.trace = Trace(name, channel, self.resumes)
        self.names: set[str] = set()
        self.client = ""
        self._run = run
        self._chance = random.Random(name)
        self._moves = moves
        self._watches = watches
        self._is_ended = asyncio.Event()
        run.record.traces.append(self.trace)

    @property
    def is_connected(self) -> bool:
        """Whether it is connected, as far as it knows."""
        return bool(self.trace.steps) and not isinstance(self.trace.steps[-1], DisconnectStep)

    def settle(self) -> None:
        """Do not reconnect by itself any more."""
        self._moves = False

    def end(self) -> None:
        """Unsubscribe for good."""
        self._is_ended.set()

    async def run(self) -> None:
        """Reconnect after each connection, until `end`."""
        while not self._is_ended.is_set():
            reason = await self._one_session()
            self.trace.steps.append(DisconnectStep(reason, self._run.now_s()))
            with suppress(TimeoutError):
                async with asyncio.timeout(self._chance.uniform(*RETURN_S)):
                    await self._is_ended.wait()

    async def _one_session(self) -> str:
        """Run one connection; return the reason of its end."""
        session = asyncio.create_task(self._session(self._choose_place()))
        ended = asyncio.create_task(self._is_ended.wait())
        lasts_s = self._chance.expovariate(1 / SESSION_S) if self._moves else None
        try:
            await asyncio.wait(
                (session, ended), timeout=lasts_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not self._moves:
                await asyncio.wait((session, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            if not session.done():
                session.cancel()
        try:
            return await session
        except asyncio.CancelledError:
            return "left"
        except BROKEN as error:
            return str(error)[:100] or type(error).__name__

    def _choose_place(self) -> Place:
        """Return where it connects next."""
        return self._chance.choice(self._run.places)

    async def _session(self, place: Place) -> str:
        raise NotImplementedError

    def _take_presence(self, kind: str, fields: dict[str, Any]) -> None:
        """Record a notice about who is in the channel; others are of no concern."""
        if kind == "presence":
            clients = tuple(each["client"] for each in fields["clients"])
            is_answer = bool(fields.get("id"))
            step = RosterShown(clients, fields["count"], is_answer, self._run.now_s())
            self.trace.steps.append(step)
        elif kind in {"joined", "left"}:
            is_joined = kind == "joined"
            self.trace.steps.append(RosterChanged(fields["client"], is_joined, self._run.now_s()))

    def _deliver(self, payload: str | bytes, position: Position | None) -> None:
        text = payload if isinstance(payload, str) else payload.decode(errors="replace")
        name = name_of(text.strip('"')) or ""
        self.names.add(name)
        self.trace.steps.append(Delivered(name, position, self._run.now_s()))


class Resuming(Subscriber):
    """A subscriber that receives positions, and resumes from the last one.

    Args:
        heeds_gaps: it resumes from a gap's position, as relay.js does; otherwise from the position
            of the last message.
    """

    def __init__(self, *arguments: Any, heeds_gaps: bool = True, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._heeds_gaps = heeds_gaps
        self.position: Position | None = None

    def _advance(self, position: Position) -> None:
        self.position = position if self.position is None else max(self.position, position)

    def _welcomed(self, relay: str, since: Position | None, welcome: dict[str, Any]) -> None:
        position = Position.parse(welcome["position"])
        step = ConnectStep(relay, since, welcome["recovered"], position, self._run.now_s())
        self.trace.steps.append(step)
        self._advance(position)

    def _gap(self, position: Position) -> None:
        self.trace.steps.append(GapReported(position, self._run.now_s()))
        if self._heeds_gaps:
            self._advance(position)

    def _message(self, position: Position, payload: str | bytes) -> None:
        self._deliver(payload, position)
        self._advance(position)


class WebSocketSubscriber(Resuming):
    """A subscriber with relay.v1.

    Attributes:
        abort_share: of the ends of a connection that it chooses itself: without a close frame.
    """

    abort_share = 0.5

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._work: asyncio.Task[None] | None = None

    async def _session(self, place: Place) -> str:
        since = self.position
        query = {"since": str(since)} if since else {}
        if self._watches:
            query["presence"] = "true"
        url = f"ws://{HOST}:{place.port}/channels/{self.trace.channel}"
        url += "?" + urlencode(query | self._session_query())
        async with connect(url, subprotocols=[RELAY_V1], **self._options(place)) as connection:
            relay = place.name
            try:
                async for data in connection:
                    header, payload = decode(data)
                    self._take(relay, since, header, payload)
                    await self._answer(connection, relay, header)
                    await self._before_next()
            except asyncio.CancelledError:
                if self._chance.random() < self.abort_share:
                    connection.transport.abort()
                else:
                    self._on_own_close()
                raise
            finally:
                # The library closes a connection whose pings are not answered.
                protocol = connection.protocol
                if protocol.close_sent and not protocol.close_rcvd_then_sent:
                    self._on_own_close()
                await self._end_work()
            return _end_of(connection)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work until the connection ends, or the work fails with it."""
        self._work = asyncio.create_task(work)

    async def _end_work(self) -> None:
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)
            self._work = None

    def _options(self, place: Place) -> dict[str, Any]:
        return websocket_options()

    async def _before_next(self) -> None:
        """Wait, if the client reads slowly."""

    def _session_query(self) -> dict[str, str]:
        """Return the parameters that resume a session."""
        return {}

    async def _answer(
        self, connection: ClientConnection, relay: str, header: dict[str, Any]
    ) -> None:
        """Send what follows a notice, and record answers."""

    def _on_own_close(self) -> None:
        """Record that the client sends a close frame on its own account."""

    def _take(
        self, relay: str, since: Position | None, header: dict[str, Any], payload: str | bytes
    ) -> None:
        match header.get("type"):
            case None:
                self._message(Position.parse(header["position"]), payload)
            case "welcome":
                self.client = header["client"]
            case "subscribed":
                self._welcomed(relay, since, header)
            case "gap":
                self._gap(Position.parse(header["position"]))
            case kind:
                self._take_presence(kind, header)


class Watcher(WebSocketSubscriber):
    """A subscriber of one relay, that also asks who is in the channel.

    Args:
        index: of the relay's place.
    """

    def __init__(self, *arguments: Any, index: int, **options: Any) -> None:
        super().__init__(*arguments, moves=False, watches=True, **options)
        self._index = index

    def _choose_place(self) -> Place:
        return self._run.places[self._index]

    async def _answer(
        self, connection: ClientConnection, relay: str, header: dict[str, Any]
    ) -> None:
        # Asked earlier, the answer would be in no order with the replay.
        if header.get("type") == "presence" and self._work is None:
            self._start(self._ask(connection))

    async def _ask(self, connection: ClientConnection) -> None:
        number = 0
        while True:
            await asyncio.sleep(ASK_PAUSE_S * self._chance.uniform(0.5, 1.5))
            number += 1
            await connection.send(encode_command("presence", channel=self.trace.channel, id=number))


class Unanswered(NamedTuple):
    """A publish of a session that was not answered yet.

    Attributes:
        number: its id.
        seen: the position that its client had received before it was sent first.
        sent_at_s: since the run's start.
        stay: the connection that it was sent over first.
    """

    number: int
    name: str
    payload: str
    seen: str
    sent_at_s: float
    stay: Stay


class SessionClient(WebSocketSubscriber):
    """A client of relay.v1 that publishes in a session, and sends again what was not answered."""

    abort_share = 0.8  # after a close frame a client has left, and is not resuming

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.publishes = asyncio.Event()
        self.published = self.resumed = self.unconfirmed = 0
        self.unanswered: deque[Unanswered] = deque()
        self._session_name = ""
        self._seen = ""
        self._sessions = 0
        self._number = 0
        self._stay: Stay | None = None  # of the present connection

    async def _session(self, place: Place) -> str:
        self._stay = None
        return await super()._session(place)

    def _on_own_close(self) -> None:
        if self._stay is not None:
            self._stay.is_closed_by_client = True

    def _session_query(self) -> dict[str, str]:
        if not self._session_name:
            return {}
        query = {"session": self._session_name}
        if self.unanswered:
            query["seen"] = self.unanswered[0].seen
        return query

    async def _answer(
        self, connection: ClientConnection, relay: str, header: dict[str, Any]
    ) -> None:
        self._seen = header.get("position") or self._seen
        match header.get("type"):
            case "welcome":
                self._resume(header)
                self._stay = Stay(header["client"], self.trace.channel)
                if self._watches:
                    self._run.record.stays.append(self._stay)
                self._start(self._publish(connection, self._stay))
            case "published":
                self._settle(header["id"], 202, header["position"], relay)
            case "error":
                self._settle(header["id"], header["status"], "", relay)

    def _resume(self, welcome: dict[str, Any]) -> None:
        self._session_name = welcome["session"]
        if welcome["resumed"]:
            self.resumed += 1
            return
        self.unconfirmed += len(self.unanswered)
        while self.unanswered:
            self._settle(self.unanswered[0].number, 0, "", "")
        self._sessions += 1
        self._number = 0

    def _settle(self, number: int, status: int, position: str, relay: str) -> None:
        if not self.unanswered or self.unanswered[0].number != number:
            text = f"{self.trace.subscriber}: answer {status} to {number}, out of order"
            self._run.record.failures.append(text)
            return
        publish, now_s = self.unanswered.popleft(), self._run.now_s()
        answer = Answer((publish.name,), status, position, relay, now_s)
        self._run.record.answers.append(answer)
        # A message that was sent again may be in the log since the connection before.
        if status == 202 and publish.stay is self._stay:
            proof = Proof(publish.sent_at_s, now_s, Position.parse(position))
            publish.stay.proofs.append(proof)

    async def _publish(self, connection: ClientConnection, stay: Stay) -> None:
        for each in list(self.unanswered):
            await self._send(connection, each)
        while True:
            await asyncio.sleep(WEBSOCKET_PAUSE_S * self._chance.uniform(0.5, 1.5))
            await self.publishes.wait()
            self._number += 1
            name = named(self.trace.channel, self.trace.subscriber, self._sessions, self._number)
            payload = payload_of(name, size_of(self._chance))
            now_s = self._run.now_s()
            publish = Unanswered(self._number, name, payload, self._seen, now_s, stay)
            self.unanswered.append(publish)
            self.published += 1
            await self._send(connection, publish)

    async def _send(self, connection: ClientConnection, publish: Unanswered) -> None:
        channel, number = self.trace.channel, publish.number
        await connection.send(
            encode_command("publish", publish.payload, channel=channel, id=number)
        )


class SlowSubscriber(WebSocketSubscriber):
    """A subscriber that can stop reading for a while; its receive buffer is small."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._reads = asyncio.Event()
        self._reads.set()

    async def pause(self, seconds: float) -> None:
        """Read nothing for so long."""
        self._reads.clear()
        await asyncio.sleep(seconds)
        self._reads.set()

    def _options(self, place: Place) -> dict[str, Any]:
        end = socket.socket()
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
        try:
            end.connect((HOST, place.direct_port))
        except OSError:
            end.close()
            raise
        slow = {"sock": end, "max_queue": 4, "ping_interval": None}
        return {**websocket_options(), **slow}

    async def _before_next(self) -> None:
        await self._reads.wait()


class EventSubscriber(Resuming):
    """A subscriber to server-sent events, as in a browser."""

    async def _session(self, place: Place) -> str:
        since = self.position
        async with asyncio.timeout(OPEN_S):
            reader, writer = await asyncio.open_connection(HOST, place.port, limit=1 << 24)
        relay = place.name
        try:
            writer.write(self._request(since))
            events = EventStreamResponse(reader, writer)
            async with asyncio.timeout(OPEN_S):
                await events.read_head()
            if events.status != 200:
                raise RefusedSubscriptionError(f"refused: {events.status}")
            while True:
                async with asyncio.timeout(SILENCE_S):
                    event = await events.next_event()
                if event.name == "close":
                    return f"close {event.json['code']} {event.json['reason'].partition(';')[0]}"
                self._take(relay, since, event)
        finally:
            writer.transport.abort()

    def _request(self, since: Position | None) -> bytes:
        resume = f"Last-Event-ID: {since}\r\n" if since else ""
        path = f"/channels/{self.trace.channel}/events"
        if self._watches:
            path += "?presence=true"
        return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{resume}\r\n".encode()

    def _take(self, relay: str, since: Position | None, event: ServerSentEvent) -> None:
        if event.name == "welcome":
            self._welcomed(relay, since, event.json)
        elif event.name == "gap":
            self._gap(Position.parse(event.json["position"]))
        elif event.name in {"presence", "joined", "left"}:
            self._take_presence(event.name, event.json)
        else:
            self._message(Position.parse(event.id), event.data)


class PlainPublisher(Subscriber):
    """A plain WebSocket client: it publishes, and receives its channel without positions."""

    resumes = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.publishes = asyncio.Event()
        self.published = 0
        self._connection = 0

    async def _session(self, place: Place) -> str:
        url = f"ws://{HOST}:{place.port}/channels/{self.trace.channel}"
        async with connect(url, **websocket_options()) as connection:
            self.trace.steps.append(ConnectStep(place.name, at_s=self._run.now_s()))
            publishing = asyncio.create_task(self._publish(connection))
            try:
                async for data in connection:
                    self._deliver(data, None)
            finally:
                publishing.cancel()
                await asyncio.gather(publishing, return_exceptions=True)
            return _end_of(connection)

    async def _publish(self, connection: ClientConnection) -> None:
        self._connection += 1
        number = 0
        while True:
            await asyncio.sleep(WEBSOCKET_PAUSE_S * self._chance.uniform(0.5, 1.5))
            await self.publishes.wait()
            number += 1
            channel, source = self.trace.channel, self.trace.subscriber
            name = named(channel, source, self._connection, number)
            await connection.send(payload_of(name, size_of(self._chance)))
            self.published += 1


class Poster:
    """A backend: it publishes by POST, one request after the other, to any relay.

    Args:
        repeats: it sends a request again until it is answered with 202, with an Idempotency-Key.
        runs_curl: it is curl that sends and repeats the requests. Each start stops this process for
            some milliseconds.
    """

    def __init__(
        self,
        run: Surroundings,
        name: str,
        channel: str,
        *,
        repeats: bool = False,
        runs_curl: bool = False,
    ) -> None:
        self.name = name
        self._repeats = repeats
        self._ask = self._run_curl if runs_curl else self._request
        self.channel = channel
        self._run = run
        self._chance = random.Random(name)
        self._connection = 0
        self._number = 0
        self._is_ended = False
        self._http = httpx2.AsyncClient(
            verify=NO_CA, trust_env=False, timeout=httpx2.Timeout(POST_S, connect=OPEN_S)
        )

    def end(self) -> None:
        """Publish no more."""
        self._is_ended = True

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def run(self) -> None:
        """Publish, until `end`."""
        while not self._is_ended:
            await asyncio.sleep(POST_PAUSE_S * self._chance.uniform(0.5, 1.5))
            place = self._chance.choice(self._run.places)
            is_batch = self._chance.random() < BATCH_SHARE
            count = self._chance.randint(2, 10) if is_batch else 1
            size = 100 if is_batch else size_of(self._chance)
            await self.post(place, count, size)

    async def post(self, place: Place, count: int = 1, size: int = 100) -> Answer:
        """Publish some messages with one request."""
        names = [self._next_name() for _ in range(count)]
        payloads = [payload_of(name, size) for name in names]
        body = payloads[0] if count == 1 else "".join(f'"{each}"\n' for each in payloads)
        kind = "text/plain" if count == 1 else "application/x-ndjson"
        headers = {"Content-Type": kind}
        if self._repeats:
            headers["Idempotency-Key"] = names[0].replace("/", ".")
        while True:
            relay = place.name
            url = f"http://{HOST}:{place.port}/channels/{self.channel}"
            status, position = await self._ask(url, body, headers)
            if status == 202 or not self._repeats:
                break
            await asyncio.sleep(self._chance.uniform(*RETURN_S))
            place = self._chance.choice(self._run.places)
        answer = Answer(tuple(names), status, position, relay, self._run.now_s())
        self._run.record.answers.append(answer)
        if status != 202:  # a later message may overtake it
            self._connection += 1
        return answer

    async def _request(self, url: str, body: str, headers: dict[str, str]) -> tuple[int, str]:
        try:
            found = await self._http.post(url, content=body, headers=headers)
            position = found.json()["position"] if found.status_code == 202 else ""
        except (httpx2.HTTPError, OSError):
            return 0, ""
        self._check(found.status_code)
        return found.status_code, position

    def _check(self, status: int) -> None:
        if status not in {202, 408, 503, 504}:  # 408: a partition has swallowed the body
            self._run.record.failures.append(f"POST answered {status}")

    async def _run_curl(self, url: str, body: str, headers: dict[str, str]) -> tuple[int, str]:
        """Publish by curl, which retries whatever its exit status would be."""
        arguments = [part for header in headers.items() for part in ("--header", ": ".join(header))]
        process = await asyncio.create_subprocess_exec(
            *("curl", "--silent", "--fail", "--noproxy", "*"),
            *("--retry", "2", "--retry-all-errors", "--retry-max-time", f"{POST_S:.0f}"),
            *("--max-time", str(POST_S), "--connect-timeout", str(OPEN_S)),
            *(*arguments, "--data-binary", "@-", "--write-out", "\n%{http_code}", url),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            output, _ = await process.communicate(body.encode())
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        answer, _, last_line = output.decode().rpartition("\n")
        status = int(last_line)
        if status:  # curl has 0 where there was no answer
            self._check(status)
        # An answer that breaks off has a status, too.
        return (0, "") if process.returncode else (status, json.loads(answer)["position"])

    def _next_name(self) -> str:
        self._number += 1
        return named(self.channel, self.name, self._connection, self._number)


class RosterReader:
    """A backend: it asks one relay by HTTP who is in channels.

    Args:
        place: of the relay.
    """

    def __init__(self, run: Surroundings, place: Place, channels: Sequence[str]) -> None:
        self.place = place
        self._run = run
        self._channels = channels
        self._is_ended = asyncio.Event()
        self._http = httpx2.AsyncClient(verify=NO_CA, trust_env=False, timeout=OPEN_S)

    def end(self) -> None:
        """Ask no more."""
        self._is_ended.set()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def run(self) -> None:
        """Ask, until `end`."""
        while not self._is_ended.is_set():
            for channel in self._channels:
                answer = await self.ask(channel)
                if answer is not None:
                    self._run.record.roster_answers.append(answer)
            with suppress(TimeoutError):
                async with asyncio.timeout(ASK_PAUSE_S):
                    await self._is_ended.wait()

    async def ask(self, channel: str) -> RosterAnswer | None:
        """Return who is in a channel; None: there is no answer."""
        relay = self.place.name
        url = f"http://{HOST}:{self.place.port}/channels/{channel}/presence"
        try:
            found = await self._http.get(url)
            if found.status_code == 503:
                return None
            fields = found.raise_for_status().json()
        except (httpx2.TransportError, OSError):
            return None
        except httpx2.HTTPError as error:
            self._run.record.failures.append(f"GET of presence: {error!r:.200}")
            return None
        clients = tuple(each["client"] for each in fields["clients"])
        return RosterAnswer(relay, channel, clients, fields["count"], self._run.now_s())


def websocket_options() -> dict[str, Any]:
    """Return options of `connect` for a client that detects a dead connection in seconds."""
    return {
        "proxy": None,
        "compression": None,
        "open_timeout": OPEN_S,
        "close_timeout": 0.5,
        "ping_interval": 2,
        "ping_timeout": 3,
        "max_size": None,
        "max_queue": None,
    }


def _end_of(connection: ClientConnection) -> str:
    frame = connection.protocol.close_rcvd
    return f"close {frame.code} {frame.reason.partition(';')[0]}" if frame else "cut off"


async def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds, with a timeout; return whether it does."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not condition():
        if loop.time() > deadline:
            return False
        await asyncio.sleep(LOOK_S)
    return True
