"""Own one connection of relay.v1: its commands, its subscriptions, and what it publishes.

It is the sink of the connection. What it publishes carries the session and the id of the command
through the log, and is acknowledged when it is read back from there: see `publications`.

Knows no HTTP, no broker and no token.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from websocket_relay.backplane.interface import START, Identity, Position, Source
from websocket_relay.channels.broadcaster import Broadcaster, LocalPublisher
from websocket_relay.channels.channel import Channel
from websocket_relay.channels.names import CHANNEL_NAME
from websocket_relay.channels.publications import (
    Decision,
    SessionName,
    SessionRecord,
    Verdict,
)
from websocket_relay.channels.recovery import ReplayRequest
from websocket_relay.identity import client_id_of
from websocket_relay.messages import Message
from websocket_relay.outcomes import Close, Refusal, RefusedError
from websocket_relay.wire.asgi import start_now
from websocket_relay.wire.close_states import ConnectionState
from websocket_relay.wire.connection import Connection, WireProtocol
from websocket_relay.wire.delivery_format import DeliveryFormat
from websocket_relay.wire.flow_control import HighWaterMark
from websocket_relay.wire.frames import ProtocolViolationError
from websocket_relay.wire.relay_v1 import Command, encode_notice, encode_published, parse_command

MAX_HISTORY = 10**9 - 1
"""As in a query: nine digits."""

MAX_DEFERRED = 100
"""Commands of one connection that wait until a channel is left. They are run in one turn of the
event loop."""


RETURN_S = 0.05
"""A client that subscribes anew so soon after it has left a channel was not away. Clients do so to
change an option; the two commands may be read one after the other."""


class ChannelAccess(Protocol):
    """What the client of a connection may do. Each check raises a RefusedError."""

    @property
    def user(self) -> str:
        """The user of the client's token; empty: there is no token."""

    def check_subscribe(self, channel: str) -> None:
        """Check that the client may subscribe to a channel now."""

    def check_publish(self, channel: str) -> None:
        """Check that the client may publish to a channel."""

    def may_subscribe(self, channel: str) -> bool:
        """Return whether the client has the permission to subscribe to a channel."""

    async def renew(self, token: str) -> float | None:
        """Replace the token; return the seconds until it expires, None: never."""


class WhoIsHere(Protocol):
    """The presence in channels."""

    def check(self, channel: str) -> None:
        """Check that a channel has presence; raise a RefusedError if it has none."""

    def encoded(self, channel: str) -> str:
        """Return who is in a channel, as members of a JSON object."""


class Subscription(NamedTuple):
    """A subscription of a connection."""

    channel: Channel
    delivery_format: DeliveryFormat


class DeferredCommand(NamedTuple):
    """A command that waits until a channel is left. It keeps no payload and no header in memory.

    Attributes:
        id: of the command.
        run: carries it out.
    """

    id: int
    run: Callable[[], None]


class ReplayNotices(NamedTuple):
    """The notices of a replay: see `recovery.ReplayListener`.

    Attributes:
        connection: that subscribes.
        channel: the name of the channel.
        command_id: of the command.
        watches: whether the client is notified of joins and leaves from then on.
    """

    connection: "RelayV1Connection"
    channel: str
    command_id: int
    watches: bool

    def on_replay_started(self, position: Position, *, is_recovered: bool) -> None:
        """Answer the command."""
        self.connection.send_notice(
            "subscribed",
            channel=self.channel,
            id=self.command_id,
            recovered=is_recovered,
            position=str(position),
        )

    def on_replay_finished(self, position: Position) -> None:
        """Report that the replay is complete."""
        self.connection.send_notice("live", channel=self.channel, position=str(position))
        if self.watches:
            self.connection.watch(self.channel, self.command_id)

    def is_own(self, position: Position) -> bool:
        """Return whether the session is known to have published the message at a position."""
        return self.connection.has_published(position)


class RelayV1Connection(LocalPublisher):
    """A connection of relay.v1, as the sink of its messages.

    Args:
        connection: the connection.
        broadcaster: owns the channels.
        access: what the client may do.
        presence: in channels; None: there is none.
    """

    __slots__ = (
        "_access",
        "_broadcaster",
        "_checked_channel",
        "_deferred",
        "_departed",
        "_last_known",
        "_last_number",
        "_leaving",
        "_marks",
        "_presence",
        "_record",
        "_renewal",
        "_source",
        "_subscriptions",
        "_unanswered",
        "connection",
    )

    def __init__(
        self,
        connection: Connection,
        broadcaster: Broadcaster,
        access: ChannelAccess,
        presence: WhoIsHere | None,
    ) -> None:
        self.connection = connection
        self._broadcaster = broadcaster
        self._access = access
        self._presence = presence
        self._subscriptions: dict[str, Subscription] = {}
        # By channel that is left, until what it had queued is written: the commands for it since.
        self._leaving: dict[str, list[DeferredCommand]] | None = None
        self._deferred = 0  # number of these commands
        # Channels that are left, and of which that is not recorded yet: the client may return.
        self._departed: dict[str, Channel] | None = None
        self._marks: set[HighWaterMark] | None = None  # at which the client was paused
        self._renewal: asyncio.Task[None] | None = None
        self._source = Source(b"", START)
        self._checked_channel = ""  # the client may publish to it; empty: none is checked
        self._last_number = 0  # of the latest publish over this connection
        # What the log held of the session when it was resumed; kept if the replica forgets it.
        self._record: SessionRecord | None = None
        self._last_known = 0  # the greatest number of the session that was read from the log
        self._unanswered: deque[int] | None = None  # publishes that are not read back yet

    # The session

    def open_session(self, name: SessionName | None, seen: Position | None) -> None:
        """Open a session, or resume one, and send the welcome.

        Args:
            name: of the session to resume; None: there is none.
            seen: a position that the client had received before it sent the oldest publish that
                was not answered; None: not known.
        """
        broadcaster, user = self._broadcaster, self._access.user
        publications = broadcaster.publications
        is_resumed = name is not None and publications.is_known(name, name.source_of(user), seen)
        if name is None or not is_resumed:
            name = SessionName.create(broadcaster.backplane.position, user)
        key = name.source_of(user)
        # Not after the client's own evidence: this replica may have missed what is before the
        # session's last publish, and the client may send it again.
        evidence = max(name.opened_at, seen or START)
        self._source = Source(key, min(publications.complete_after, evidence))
        self._record = publications.session(key) if is_resumed else None
        if self._record is not None:
            self._last_known = self._record.last
        previous = broadcaster.attach_publisher(key, self)
        if previous is not None:
            previous.connection.close(Close.SESSION_RESUMED)
        fields = {
            "type": "welcome",
            "client": self.client_id,
            "session": name.text,
            "resumed": is_resumed,
            "position": str(broadcaster.backplane.position),
            "heartbeat_ms": round(broadcaster.shared.ping_interval_s * 1000),
        }
        self.connection.write_control(encode_notice(fields))

    @property
    def client_id(self) -> str:
        """The id of the session's client."""
        return client_id_of(self._source.key)

    # MessageSink of the connection

    @property
    def channel_names(self) -> Sequence[str]:
        """The channels that the client is subscribed to."""
        return list(self._subscriptions)

    def publish(self, publisher: WireProtocol, messages: Sequence[Message]) -> None:
        """Carry out the client's commands.

        Raises:
            ProtocolViolationError: a header is not that of a command; those before are carried out.
        """
        channel, batch, numbers = "", list[Message](), list[int]()
        try:
            for kind, message in messages:
                command = parse_command(message)
                if command.type == "publish":
                    if not self._accept_publish(command):
                        continue
                    if command.fields["channel"] != channel:
                        self._append(channel, batch, numbers)
                        channel, batch, numbers = command.fields["channel"], [], []
                    batch.append((kind, command.payload))
                    numbers.append(command.id)
                else:
                    self._append(channel, batch, numbers)
                    batch, numbers = [], []
                    self._run(command)
        finally:
            self._append(channel, batch, numbers)

    def pause_if_over_limit(self, publisher: WireProtocol) -> None:
        """Pause reading from the client while a high-water mark is exceeded."""
        for mark in (*self._broadcaster.shared.publish_limits, *(self._marks or ())):
            self._pause_at(mark)

    def detach_connection(self, client: Connection) -> None:
        """Leave all channels: the client ends."""
        self._broadcaster.detach_publisher(self._source.key, self)
        if self._renewal is not None:
            self._renewal.cancel()
        for channel, delivery_format in self._subscriptions.values():
            channel.remove_member(client, delivery_format)
        left = {name: channel for name, (channel, _) in self._subscriptions.items()}
        left = {**(self._departed or {}), **left}
        self._departed = None
        self._subscriptions.clear()
        for each in left.values():
            self._broadcaster.on_left(each, client)
        for mark in (*self._broadcaster.shared.publish_limits, *(self._marks or ())):
            mark.resume_publisher(client.protocol)

    def on_backlog_started(self, client: Connection) -> None:
        """Mark the client as slow in all its channels."""
        for channel, _ in self._subscriptions.values():
            channel.on_backlog_started(client)

    def on_backlog_drained(self, client: Connection) -> None:
        """Clear the mark."""
        for channel, _ in list(self._subscriptions.values()):
            channel.on_backlog_drained(client)

    def call_when_written(self, callback: Callable[[], None]) -> None:
        """Call `callback` once all that was published so far in its channels has been written."""
        self._broadcaster.backplane.when_settled(partial(self._when_written, callback))

    def _when_written(self, callback: Callable[[], None]) -> None:
        channels = [channel for channel, _ in self._subscriptions.values()]
        remaining = len(channels) + 1

        def on_written() -> None:
            nonlocal remaining
            remaining -= 1
            if not remaining:
                callback()

        for channel in channels:
            channel.when_queue_is_written(on_written)
        on_written()

    # Publishing

    def _accept_publish(self, command: Command) -> bool:
        """Return whether a publish is to be appended; if not, it is answered."""
        _, number, fields, payload = command
        try:
            if number <= self._last_number:
                raise RefusedError(Refusal.INVALID_COMMAND, "id is not greater than the one before")
            if number <= self._last_known:
                self._answer_repeat(number)
                return False
            channel = fields.get("channel")
            if not channel or channel != self._checked_channel:
                channel = _channel_of(command)
                self._access.check_publish(channel)
                self._checked_channel = channel
            if len(payload) > self._broadcaster.shared.max_message_bytes:
                raise RefusedError(Refusal.MESSAGE_TOO_BIG)
        except RefusedError as error:
            self._send_error(number, error)
            return False
        self._last_number = number
        return True

    def _answer_repeat(self, number: int) -> None:
        """Answer a publish that the log holds, as far as is known: it is not appended again."""
        self._last_number = number
        record = self._broadcaster.publications.session(self._source.key) or self._record
        decision = record.find(number) if record is not None else Verdict.UNKNOWN
        self._broadcaster.shared.counters.publish_repeats += decision is not Verdict.UNKNOWN
        self._write(self._encode_answer(number, decision))

    def _append(self, channel: str, messages: Sequence[Message], numbers: Sequence[int]) -> None:
        if not messages:
            return
        broadcaster = self._broadcaster
        identity = Identity(self._source, numbers)
        is_answered = self.connection.is_member
        if is_answered:
            if self._unanswered is None:
                self._unanswered = deque()
            self._unanswered += numbers
        broadcaster.append(channel, messages, self.connection.protocol, identity)
        if is_answered and not broadcaster.backplane.is_local:
            broadcaster.backplane.when_delivered(partial(self._on_settled, numbers[-1]))
        for mark in broadcaster.publish_limits_of(channel):
            if mark.is_exceeded:
                self._pause_at(mark)

    def acknowledge(self, publishes: Sequence[tuple[int, Decision]]) -> None:
        """Answer publishes that were read back.

        Args:
            publishes: their numbers, and their positions or what they are.
        """
        unanswered = self._unanswered
        frames = b""
        for number, decision in publishes:
            self._last_known = max(self._last_known, number)
            if unanswered and unanswered[0] < number:
                self._report_lost(number - 1)
            if unanswered and unanswered[0] == number:
                unanswered.popleft()
                frames += self._encode_answer(number, decision)
        self._write(frames)

    def _encode_answer(self, number: int, decision: Decision) -> bytes:
        if decision is Verdict.UNKNOWN:
            return self._encode_error(number, RefusedError(Refusal.UNCONFIRMED))
        return encode_published(number, decision)

    def _on_settled(self, number: int, _: Position | None) -> None:
        """Record that all publishes up to a number are read back, or will not be.

        A connection that closes answers no more: in an outage, for example, its client sends the
        publishes again.
        """
        if self.connection.state is ConnectionState.OPEN and self.connection.is_member:
            self._report_lost(number)

    def _report_lost(self, number: int) -> None:
        """Answer publishes up to a number: the broker accepted them, and did not deliver them."""
        while self._unanswered and self._unanswered[0] <= number:
            self._send_error(self._unanswered.popleft(), RefusedError(Refusal.UNCONFIRMED))

    def _pause_at(self, mark: HighWaterMark) -> None:
        shared = self._broadcaster.shared
        if mark.is_exceeded and mark.pause_publisher(self.connection.protocol):
            shared.counters.publisher_pauses += 1
            if mark not in shared.publish_limits:
                self._marks = {mark} | {each for each in self._marks or () if each.is_exceeded}

    def has_published(self, position: Position) -> bool:
        """Return whether the session is known to have published the message at a position."""
        record = self._broadcaster.publications.session(self._source.key)
        return record is not None and record.holds(position)

    # Other commands

    def _run(self, command: Command) -> None:
        run = COMMANDS.get(command.type)
        if run is None:
            raise ProtocolViolationError(Close.PROTOCOL_ERROR, "unknown type of command")
        if not self.connection.is_member:  # it is closing: what it publishes is still relayed
            return
        try:
            run(self, command)
        except RefusedError as error:
            self._send_error(command.id, error)

    def _subscribe(self, command: Command) -> None:
        name = _channel_of(command)
        echo = _flag_of(command, "echo", default=True)
        request = _replay_request_of(command)
        watches = _flag_of(command, "presence", default=False)
        run = partial(self.subscribe, name, command.id, request, echoes=echo, watches=watches)
        self._run_when_left(name, DeferredCommand(command.id, run))

    def subscribe(
        self,
        name: str,
        command_id: int,
        request: ReplayRequest,
        *,
        echoes: bool,
        watches: bool = False,
    ) -> None:
        """Subscribe to a channel.

        Args:
            name: of the channel.
            command_id: of the command to answer.
            request: what to replay first.
            echoes: whether the client is sent its own messages.
            watches: whether it is notified of joins and leaves.

        Raises:
            RefusedError: the client may not, or a limit is reached.
        """
        broadcaster, connection = self._broadcaster, self.connection
        if name in self._subscriptions:
            raise RefusedError(Refusal.ALREADY_SUBSCRIBED)
        if len(self._subscriptions) >= broadcaster.shared.max_channels_per_connection:
            raise RefusedError(Refusal.CHANNELS_PER_CONNECTION)
        self._access.check_subscribe(name)
        if watches:
            self._check_presence(name)
        channel = broadcaster.channel(name)
        layout, encoding, _ = connection.delivery_format
        delivery_format = DeliveryFormat.of(layout, encoding, echoes=echoes)
        self._subscriptions[name] = Subscription(channel, delivery_format)
        notices = ReplayNotices(self, name, command_id, watches)
        broadcaster.subscribe(channel, connection, delivery_format, request, notices)

    def watch(self, name: str, command_id: int) -> None:
        """Send who is in a channel, and from now on who joins and leaves."""
        if subscription := self._subscriptions.get(name):
            send = partial(self._send_who_is_here, name, command_id)
            subscription.channel.add_watcher(self.connection, subscription.delivery_format, send)

    def _ask_presence(self, command: Command) -> None:
        name = _channel_of(command)
        if name not in self._subscriptions and not self._access.may_subscribe(name):
            raise RefusedError(Refusal.NOT_AUTHORIZED)
        self._check_presence(name)
        self._send_who_is_here(name, command.id)

    def _check_presence(self, name: str) -> None:
        if self._presence is None:
            raise RefusedError(Refusal.NO_PRESENCE)
        self._presence.check(name)

    def _send_who_is_here(self, name: str, command_id: int) -> None:
        assert self._presence is not None
        fields = {"type": "presence", "channel": name, "id": command_id}
        send = partial(self._write, encode_notice(fields, self._presence.encoded(name)))
        subscription = self._subscriptions.get(name)
        if subscription is None:
            send()
        else:  # behind the joins and leaves that it already has
            subscription.channel.when_queue_is_written(send)

    def _unsubscribe(self, command: Command) -> None:
        name = _channel_of(command)
        run = partial(self._end_subscription, name, command.id)
        self._run_when_left(name, DeferredCommand(command.id, run))

    def _end_subscription(self, name: str, command_id: int) -> None:
        if name not in self._subscriptions:
            raise RefusedError(Refusal.NOT_SUBSCRIBED)
        self._leave(name, {"id": command_id})

    def _leave(self, name: str, fields: Mapping[str, object]) -> None:
        """Leave a channel, and report it once what the channel had queued is written."""
        channel, delivery_format = self._subscriptions.pop(name)
        if self._leaving is None:
            self._leaving = {}
        self._leaving[name] = []
        channel.remove_member(self.connection, delivery_format)
        if self._presence is not None:
            if self._departed is None:
                self._departed = {}
            self._departed[name] = channel
        channel.when_queue_is_written(partial(self._on_left, name, fields))

    def _on_left(self, name: str, fields: Mapping[str, object]) -> None:
        """Report that a channel is left, and run the commands for it since.

        They are run at once: no later command comes in between. The first of them may leave the
        channel again, so that the others wait anew.
        """
        self.send_notice("unsubscribed", channel=name, **fields)
        deferred = self._leaving.pop(name, []) if self._leaving else []
        self._deferred -= len(deferred)
        for command in deferred:
            if self.connection.is_member:
                try:
                    self._run_when_left(name, command)
                except RefusedError as error:
                    self._send_error(command.id, error)
        if self._departed:
            asyncio.get_running_loop().call_later(RETURN_S, self._end_departure, name)

    def _end_departure(self, name: str) -> None:
        """Record that the client has left a channel, unless it has returned."""
        if self._departed is None or (self._leaving and name in self._leaving):
            return  # in the second case it has left again, and may return once that is reported
        channel = self._departed.pop(name, None)
        if channel is not None and name not in self._subscriptions:
            self._broadcaster.on_left(channel, self.connection)

    def _run_when_left(self, name: str, command: DeferredCommand) -> None:
        """Run a command for a channel: now, or once the channel is left."""
        deferred = self._leaving.get(name) if self._leaving else None
        if deferred is None:
            command.run()
            return
        if self._deferred >= MAX_DEFERRED:
            raise RefusedError(Refusal.INVALID_COMMAND, "too many commands in progress")
        self._deferred += 1
        deferred.append(command)

    def _ping(self, command: Command) -> None:
        self.send_notice("pong", id=command.id)

    def _renew_token(self, command: Command) -> None:
        token = command.fields.get("token")
        if type(token) is not str:
            raise RefusedError(Refusal.INVALID_COMMAND, "token must be text")
        if self._renewal is not None:
            raise RefusedError(Refusal.INVALID_COMMAND, "a token is being verified")
        self._renewal = start_now(self._replace_token(command.id, token))

    async def _replace_token(self, command_id: int, token: str) -> None:
        try:
            expires_in_s = await self._access.renew(token)
        except RefusedError as error:
            self._send_error(command_id, error)
        else:
            self._checked_channel = ""
            self.connection.start_expiry_timer(expires_in_s)
            refusal = Refusal.NOT_AUTHORIZED
            fields = {"status": int(refusal.status), "reason": refusal.reason}
            for name in list(self._subscriptions):
                if not self._access.may_subscribe(name):
                    self._leave(name, fields)
            self.send_notice("token", id=command_id)
        finally:
            self._renewal = None

    # Notices

    def send_notice(self, kind: str, **fields: object) -> None:
        """Send a message of the relay itself."""
        self._write(encode_notice({"type": kind, **fields}))

    def _send_error(self, command_id: int, error: RefusedError) -> None:
        self._write(self._encode_error(command_id, error))

    def _encode_error(self, command_id: int, error: RefusedError) -> bytes:
        """Count a refusal; return what answers the command."""
        self._broadcaster.shared.refusals.record(error)
        fields: dict[str, object] = {"type": "error", "id": command_id}
        fields |= {"status": int(error.status), "reason": str(error)}
        if error.retry_after_s is not None:
            fields["retry_after_s"] = error.retry_after_s
        return encode_notice(fields)

    def _write(self, frames: bytes) -> None:
        if frames:
            self._broadcaster.shared.write((self.connection,), frames, messages=0)


COMMANDS: dict[str, Callable[[RelayV1Connection, Command], None]] = {
    "subscribe": RelayV1Connection._subscribe,
    "unsubscribe": RelayV1Connection._unsubscribe,
    "token": RelayV1Connection._renew_token,
    "ping": RelayV1Connection._ping,
    "presence": RelayV1Connection._ask_presence,
}
"""The commands besides `publish`."""


def _channel_of(command: Command) -> str:
    name = command.fields.get("channel")
    if type(name) is not str:
        raise RefusedError(Refusal.INVALID_COMMAND, "channel must be text")
    if not CHANNEL_NAME.fullmatch(name):
        raise RefusedError(Refusal.NO_SUCH_CHANNEL)
    return name


def _flag_of(command: Command, name: str, *, default: bool) -> bool:
    value = command.fields.get(name, default)
    if type(value) is not bool:
        raise RefusedError(Refusal.INVALID_COMMAND, f"{name} must be true or false")
    return value


def _replay_request_of(command: Command) -> ReplayRequest:
    since, history = command.fields.get("since"), command.fields.get("history", 0)
    if type(history) is not int or not 0 <= history <= MAX_HISTORY:
        raise RefusedError(Refusal.INVALID_COMMAND, "history must be a number of messages")
    if since is None:
        return ReplayRequest(None, history)
    try:
        return ReplayRequest(Position.parse(since if type(since) is str else ""), history)
    except ValueError:
        raise RefusedError(Refusal.INVALID_COMMAND, "since must be a position") from None
