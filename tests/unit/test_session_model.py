"""A model of exactly-once publishing: replicas that read one log, and clients that send again.

The table and the outgoing packets are the real ones; the log is a list. Packets reach the log late,
also those of dead replicas. Connections break in either direction, and bytes of a broken one arrive
after its client has moved to another replica, or has replaced it on the same one. Replicas forget
by number and by age, miss packets, and start at the trimmed start of the log.

What the model requires of a relay, besides the table:

- A source has the position after which its replica knew all publishes when the connection was
  opened, also after that replica has forgotten or missed some. It is not after the client's own
  evidence, that is, the opening of the session and the position that it had received: the replica
  may have missed what is before the session's last publish.
- A connection keeps the greatest number of its session that its replica has read: in the table when
  the session was resumed, and in the log since. A publish up to that number is answered, and not
  appended. The table alone is not enough: it may forget the session in the meantime.
- A repeat without a known position is answered with an error, `publish unconfirmed`: its number may
  be that of a message that was refused, with an answer that did not arrive.

What replicas decide is compared with what one decides that has read all of the log and forgets
nothing. A replica delivers a copy that is a repeat for the others only if it has missed, in a gap
or before its start, the first copy, and each publish of the session with a greater number that was
in the log before this copy. So:

- The messages that one replica delivers contain each publish of a session once at most, in the
  order of the numbers. This is also what a subscriber receives that stays on the replica.
- A subscriber that moves receives a publish again, or after a later one, only where the replica
  that it moves to has missed all that it had received from this number on.
- About requests with a key, and about clients that lie, replicas may also disagree later: about a
  source of which one of them has missed a packet.

What the model excludes:

- A replica that has forgotten what the connection of a publish had not read: what was not in the
  log yet, what its replica missed, or read after the connection was replaced. Its memory is shorter
  than a message takes to arrive. In the model such a replica ends before it reads the packet.

The examples are the same in every run.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from websocket_relay.backplane.interface import (
    START,
    Identities,
    Identity,
    LogEntry,
    Position,
    Source,
)
from websocket_relay.backplane.producer import OutgoingPacket
from websocket_relay.channels.publications import (
    Decision,
    Publications,
    SessionName,
    SessionRecord,
    Verdict,
    content_digest,
    key_source,
)
from websocket_relay.messages import TEXT, Message

pytestmark = pytest.mark.fast

CHANNEL = "news"
LIAR = "liar"
MAX_PACKET_MESSAGES = 4
UNBOUNDED, FOREVER_S = 100_000, 1e9

NUMBERS = st.integers(0, 11)
"""Choose one of the replicas or clients that there are."""

PROGRESS = st.sampled_from([0, 1, 2, 3, 4, 4])
"""How far messages get at once: they are sent; their replica receives them; they reach the log;
their replica reads all of the log; all replicas do."""

MAX_RECORDS = st.sampled_from([1, 1, 3, 3, 5, 10, UNBOUNDED, UNBOUNDED])
AGES_S = st.sampled_from([60.0, FOREVER_S, FOREVER_S])

FAR_AHEAD = Position(1, 1_000_000, 0)


def end_of(packet_count: int) -> Position:
    """Return the greatest position in the first packets of the log."""
    return Position(1, packet_count + 1, 0).before()


@dataclass
class PendingPacket:
    """A packet that is not in the log yet.

    Attributes:
        publisher: the replica that appends it.
        read_up_to: the position up to which its connections had read all entries at the latest.
        publishes: the connections of its messages, and their numbers.
    """

    publisher: "ModelReplica"
    read_up_to: Position
    packet: OutgoingPacket = field(default_factory=OutgoingPacket)
    publishes: "list[tuple[Connection, int]]" = field(default_factory=list)


@dataclass
class LogPacket:
    """A packet in the log.

    Attributes:
        offset: in the log, counted from 1.
        decisions: of a replica that has read all of the log and forgets nothing.
    """

    offset: int
    pending: PendingPacket
    entries: Sequence[LogEntry]
    identities: Identities | None
    decisions: Sequence[Decision]


class Delivery(NamedTuple):
    """A message that a replica delivers, and that is the first one with its number, or its key."""

    number: int
    position: Position


Deliveries = dict[bytes, list[Delivery]]
"""What a replica delivers, by source."""


@dataclass
class ClientMessage:
    """A message of a client.

    Attributes:
        seen: the last position that the client had received when it sent the message first.
        sent_count: how often it was sent.
    """

    number: int
    payload: bytes
    seen: Position
    sent_count: int = 0


@dataclass(eq=False)
class ModelClient:
    """A client that follows the protocol."""

    user: str
    is_subscribed: bool
    session: SessionName | None = None
    source: bytes = b""
    last_number: int = 0
    last_position: Position = START
    connection: "Connection | None" = None
    unanswered: dict[int, ClientMessage] = field(default_factory=dict)


@dataclass(eq=False)
class Connection:
    """A connection, as its replica knows it.

    Attributes:
        source: of the session. It has the position after which all was known when the session was
            opened or resumed.
        client: None: it lies.
        record: of the session, as it was resumed.
        last_known: the greatest number of the session that the replica has read.
        read_up_to: the position up to which `last_known` includes all entries, if it does not
            include all that the replica has reached.
        unanswered: what it has appended and not read back.
        in_transit: messages that the replica has not received yet.
        answers_arrive: whether the client receives what the replica sends.
    """

    source: Source
    client: ModelClient | None
    record: SessionRecord | None
    last_known: int
    read_up_to: Position = FAR_AHEAD
    unanswered: deque[int] = field(default_factory=deque)
    in_transit: deque[ClientMessage] = field(default_factory=deque)
    answers_arrive: bool = True


class ModelReplica:
    """A replica, from its start at a packet of the log on.

    Attributes:
        forgets: whether it may not know a publish that is in the log after its start.
        forgotten_up_to: the position of the latest record that it has forgotten.
        missed: the offsets of the packets before its start, and in its gaps.
        connections: by session.
        replaced: connections that another one of their session has replaced.
    """

    def __init__(self, packets_trimmed: int, max_records: int, max_age_s: float) -> None:
        self.now_s = 0.0
        self.forgets = max_records < UNBOUNDED or max_age_s < FOREVER_S
        self.forgotten_up_to = START
        self.max_records = max_records
        self.packets_read = packets_trimmed
        self.missed = set(range(1, packets_trimmed + 1))
        self.start = self.position = end_of(packets_trimmed)
        self.table = Publications(max_age_s, lambda: self.now_s, max_records)
        self.table.record_gap(self.start)
        self.outbox: deque[PendingPacket] = deque()
        self.connections: dict[bytes, Connection] = {}
        self.replaced: list[Connection] = []
        self.delivered: Deliveries = {}

    def all_connections(self) -> list[Connection]:
        return [*self.replaced, *self.connections.values()]

    def record_forgotten(self) -> None:
        for key, deliveries in self.delivered.items():
            if deliveries and self.table.session(key) is None and self.table.key(key) is None:
                self.forgotten_up_to = max(self.forgotten_up_to, deliveries[-1].position)


@dataclass(eq=False)
class Subscriber:
    """A client that receives what its replica delivers, and moves to others with its position.

    Attributes:
        received: of each session that does not lie.
    """

    replica: ModelReplica
    position: Position
    received: Deliveries = field(default_factory=dict)


class SessionModel(RuleBasedStateMachine):
    """All events that can happen to replicas, their log and their clients."""

    @initialize(forgets=st.sampled_from([True, True, True, False]), data=st.data())
    def begin(self, forgets: bool, data: st.DataObject) -> None:
        self.forgets = forgets
        self.log: list[LogPacket] = []
        self.packets_trimmed = self.starts = 0
        self.orphans: list[deque[PendingPacket]] = []  # of dead replicas; they may still arrive
        self.clients = [ModelClient("a", is_subscribed=True), ModelClient("b", is_subscribed=False)]
        self.liar_sessions = [
            SessionName.create(opened_at, LIAR) for opened_at in (START, FAR_AHEAD)
        ]
        self.message_count = 0
        # What a replica decides and delivers that has read all of the log and forgets nothing.
        self.reader = Publications(FOREVER_S, lambda: 0.0, UNBOUNDED)
        self.delivered: Deliveries = {}
        self.offsets: dict[bytes, set[int]] = {}  # by source: of its packets
        self.payloads_delivered: set[bytes] = set()  # of sessions of clients that do not lie
        self.payloads_refused: set[bytes] = set()
        self.honest_sources: set[bytes] = set()
        self.replicas = [
            self._new_replica(data.draw(MAX_RECORDS), data.draw(AGES_S)) for _ in range(2)
        ]
        self.subscribers = [Subscriber(each, START) for each in self.replicas]

    # Replicas and the log

    def _new_replica(self, max_records: int, max_age_s: float) -> ModelReplica:
        bounds = (max_records, max_age_s) if self.forgets else (UNBOUNDED, FOREVER_S)
        return ModelReplica(self.packets_trimmed, *bounds)

    def _replica(self, number: int) -> ModelReplica:
        if not self.replicas:
            self.replicas.append(self._new_replica(UNBOUNDED, FOREVER_S))
        return self.replicas[number % len(self.replicas)]

    def _end(self, replica: ModelReplica, arriving_packets: int) -> None:
        self.replicas.remove(replica)
        for connection in list(replica.connections.values()):
            self._close(replica, connection)
        arriving = list(replica.outbox)[:arriving_packets]
        if arriving:
            self.orphans.append(deque(arriving))
        replica.outbox.clear()

    @precondition(lambda self: len(self.log) >= 3 * self.starts)
    @rule(
        number=NUMBERS,
        arriving_packets=st.integers(0, 3),
        max_records=MAX_RECORDS,
        max_age_s=AGES_S,
        is_killed=st.sampled_from([False, False, True]),
    )
    def start_replica(
        self,
        number: int,
        arriving_packets: int,
        max_records: int,
        max_age_s: float,
        is_killed: bool,
    ) -> None:
        """Start a replica, after another one is killed or while it runs; not all the time."""
        self.starts += 1
        if is_killed or len(self.replicas) > 2:
            self._end(self._replica(number), arriving_packets)
        self.replicas.append(self._new_replica(max_records, max_age_s))

    @rule(number=NUMBERS, duration_s=st.sampled_from([20.0, 40.0, 61.0]))
    def pass_time(self, number: int, duration_s: float) -> None:
        self._replica(number).now_s += duration_s

    @precondition(lambda self: self.forgets)
    @rule(count=st.sampled_from([1, 4, 100]))
    def trim(self, count: int) -> None:
        """Trim the log up to what every replica has read: one that starts misses the rest."""
        trimmed = min([len(self.log), *(each.packets_read for each in self.replicas)])
        self.packets_trimmed = max(self.packets_trimmed, min(trimmed, self.packets_trimmed + count))

    @precondition(lambda self: self.forgets)
    @rule(number=NUMBERS, count=st.integers(1, 2))
    def lose_packets(self, number: int, count: int) -> None:
        """Let a replica miss packets."""
        self._lose_packets(self._replica(number), count)

    def _lose_packets(self, replica: ModelReplica, count: int) -> None:
        missed = self.log[replica.packets_read :][:count]
        if not missed:
            return
        for connection in replica.all_connections():
            connection.read_up_to = min(connection.read_up_to, replica.position)
        replica.forgets = True
        replica.packets_read += len(missed)
        replica.position = end_of(replica.packets_read)
        replica.table.record_gap(replica.position)
        for packet in missed:
            replica.missed.add(packet.offset)
            if packet.pending.publisher is replica:
                for connection, number_sent in packet.pending.publishes:
                    self._report_lost(replica, connection, number_sent)

    def _close(self, replica: ModelReplica, connection: Connection) -> None:
        del replica.connections[connection.source.key]
        if connection.client is not None and connection.client.connection is connection:
            connection.client.connection = None

    @rule(number=NUMBERS, progress=PROGRESS, count=st.integers(1, 3))
    def advance(self, number: int, progress: int, count: int) -> None:
        """Let messages and packets get further; without progress, only so many of them."""
        replica = self._replica(number)
        if progress:
            self._advance(replica, progress)
            return
        for connection in replica.all_connections():
            if connection.in_transit:
                self._receive_next(replica, connection, starts_packet=True)
        self._read(replica, count)

    def _advance(self, replica: ModelReplica, progress: int) -> None:
        """Let the messages of a replica get so far, see PROGRESS."""
        if progress >= 1:
            for connection in replica.all_connections():
                while connection.in_transit:
                    self._receive_next(replica, connection)
        self._advance_packets(replica, progress)

    def _advance_packets(self, replica: ModelReplica, progress: int) -> None:
        while progress >= 2 and replica.outbox:
            self._append_to_log(replica.outbox.popleft())
        for each in list(self.replicas):
            if progress >= 4 or (progress == 3 and each is replica):
                self._read(each, len(self.log))

    @rule(number=NUMBERS)
    def append_orphan(self, number: int) -> None:
        """Let the oldest packet of a dead replica reach the log."""
        if self.orphans:
            packets = self.orphans[number % len(self.orphans)]
            self._append_to_log(packets.popleft())
            if not packets:
                self.orphans.remove(packets)

    def _append_to_log(self, pending: PendingPacket) -> None:
        packet, offset = pending.packet, len(self.log) + 1
        entries = [
            LogEntry(Position(1, offset, index), CHANNEL, kind, payload)
            for index, (kind, payload) in enumerate(zip(packet.kinds, packet.payloads, strict=True))
        ]
        identities, decisions = packet.identities(), list[Decision]()
        if identities is not None:
            decisions = self.reader.decide(entries, identities)
            for key, _ in identities.sources:
                self.offsets.setdefault(key, set()).add(offset)
            for entry, decision, index, number in zip(
                entries, decisions, identities.indices, identities.numbers, strict=True
            ):
                if index and decision is Verdict.NEW:
                    source = identities.sources[index - 1]
                    self._record_delivery(None, entry, source, number)
                    if source.key in self.honest_sources:
                        assert entry.payload not in self.payloads_refused
                        self.payloads_delivered.add(entry.payload)
        self.log.append(LogPacket(offset, pending, entries, identities, decisions))

    def _publish(
        self,
        replica: ModelReplica,
        messages: Sequence[Message],
        identity: Identity | None,
        *,
        starts_packet: bool = False,
    ) -> PendingPacket:
        """Add messages to the packet of a replica, as its producer does."""
        outbox = replica.outbox
        if not outbox or starts_packet or len(outbox[-1].packet.payloads) >= MAX_PACKET_MESSAGES:
            outbox.append(PendingPacket(replica, end_of(replica.packets_read)))
        pending = outbox[-1]
        if identity is not None:
            pending.packet.add_identity(identity)
        for kind, payload in messages:
            pending.packet.kinds.append(kind)
            pending.packet.payloads.append(payload)
        return pending

    def _read(self, replica: ModelReplica, count: int) -> None:
        """Read so many packets at most."""
        for packet in self.log[replica.packets_read :][:count]:
            if replica.forgotten_up_to > packet.pending.read_up_to:
                self._end(replica, len(replica.outbox))  # its memory is too short
                return
            replica.packets_read += 1
            replica.position = packet.entries[-1].position
            if packet.identities is not None:
                decisions = replica.table.decide(packet.entries, packet.identities)
                self._check(replica, packet, packet.identities, decisions)
                replica.record_forgotten()
            for connection in replica.connections.values():
                if connection.client is not None and connection.client.is_subscribed:
                    self._send_position(connection, replica.position)

    def _acknowledge(
        self, replica: ModelReplica, key: bytes, number: int, decision: Decision
    ) -> None:
        """Let the connection of a session answer a publish that its replica has read."""
        connection = replica.connections.get(key)
        if connection is None:
            return
        connection.last_known = max(connection.last_known, number)
        self._report_lost(replica, connection, number - 1)
        if connection.unanswered and connection.unanswered[0] == number:
            connection.unanswered.popleft()
            self._answer(replica, connection, number, decision)

    def _report_lost(self, replica: ModelReplica, connection: Connection, number: int) -> None:
        """Answer what a connection will not read back: publishes up to a number."""
        while connection.unanswered and connection.unanswered[0] <= number:
            lost = connection.unanswered.popleft()
            self._answer(replica, connection, lost, Verdict.UNKNOWN)

    # Clients

    @rule(number=NUMBERS, replica=NUMBERS, is_lost=st.booleans(), progress=PROGRESS)
    def reconnect(self, number: int, replica: int, is_lost: bool, progress: int) -> None:
        client = self._client(number)
        self._cut(client, is_lost=is_lost)
        self._connect(client, self._replica(replica))
        self._advance(self._replica(replica), progress)

    def _client(self, number: int) -> ModelClient:
        return self.clients[number % len(self.clients)]

    def _connect(self, client: ModelClient, replica: ModelReplica) -> Connection:
        """Connect a client that is not connected; resume its session if that is possible."""
        seen = next((each.seen for each in client.unanswered.values()), None)
        session = client.session
        table = replica.table
        if session is None or not table.is_known(session, client.source, seen):
            if session is not None:
                assert not self._is_surely_known(client, replica, session, seen)
                client.unanswered.clear()  # reported as unconfirmed
            client.session = session = SessionName.create(replica.position, client.user)
            client.source = session.source_of(client.user)
            self.honest_sources.add(client.source)
        evidence = max(session.opened_at, seen or START)
        connection = client.connection = self._accept(replica, client.source, client, evidence)
        self._send_position(connection, replica.position)
        for message in client.unanswered.values():
            self._send(connection, message)
        return connection

    def _is_surely_known(
        self,
        client: ModelClient,
        replica: ModelReplica,
        session: SessionName,
        seen: Position | None,
    ) -> bool:
        published = [
            position
            for _, position in self.delivered.get(client.source, ())
            if position <= replica.position
        ]
        known_at = max(session.opened_at, seen or START, *published[-1:])
        return not replica.forgets and known_at >= replica.start

    def _accept(
        self,
        replica: ModelReplica,
        source: bytes,
        client: ModelClient | None,
        evidence: Position,
    ) -> Connection:
        """Return a new connection of a session; it replaces the previous one on the replica."""
        record = replica.table.session(source)
        connection = Connection(
            Source(source, min(replica.table.complete_after, evidence)),
            client,
            record,
            0 if record is None else record.last,
        )
        previous = replica.connections.get(source)
        if previous is not None:
            previous.answers_arrive = False
            previous.read_up_to = min(previous.read_up_to, replica.position)
            replica.replaced.append(previous)
        replica.connections[source] = connection
        return connection

    @rule(
        number=NUMBERS,
        replica=NUMBERS,
        step=st.sampled_from([1, 1, 2]),
        count=st.integers(1, 3),
        loses_answers=st.sampled_from([False, False, True]),
        is_permitted=st.sampled_from([True, True, False]),
        progress=PROGRESS,
    )
    def publish(
        self,
        number: int,
        replica: int,
        step: int,
        count: int,
        loses_answers: bool,
        is_permitted: bool,
        progress: int,
    ) -> None:
        """Let a client publish; it connects to a replica if it is not connected.

        Args:
            step: from each number to the next.
            loses_answers: the client receives nothing over the connection any more.
            is_permitted: if not, the message that the replica receives next is refused.
        """
        client = self._client(number)
        connection = client.connection or self._connect(client, self._replica(replica))
        connection.answers_arrive &= not loses_answers
        publishers = [each for each in self.replicas if connection in each.all_connections()]
        for at in range(count):
            client.last_number += step
            message = self._new_message(client.last_number, client.last_position)
            client.unanswered[message.number] = message
            self._send(connection, message)
            for each in publishers if not at and not is_permitted else ():
                self._receive_next(each, connection, is_permitted=False)
        for each in publishers:
            self._advance(each, progress)

    @rule(
        number=NUMBERS,
        replica=NUMBERS,
        count=st.integers(1, 2),
        progress=PROGRESS,
        effect=st.sampled_from(["none", "misses", "forgets"]),
    )
    def publish_twice(
        self, number: int, replica: int, count: int, progress: int, effect: str
    ) -> None:
        """Let a client move while what it has published is in transit, and send it again.

        Args:
            effect: whether the replica that it leaves misses what is in the log now, or forgets it.
        """
        client = self._client(number)
        connection = client.connection or self._connect(client, self._replica(number))
        for _ in range(count):
            client.last_number += 1
            message = self._new_message(client.last_number, client.last_position)
            client.unanswered[message.number] = message
            self._send(connection, message)
        left = [each for each in self.replicas if connection in each.all_connections()]
        self._cut(client, is_lost=False)
        self._connect(client, self._replica(replica))
        self._advance(self._replica(replica), progress)
        for each in left:
            if effect == "misses" and self.forgets:
                self._lose_packets(each, len(self.log))
            elif effect == "forgets":
                self._let_forget(each, client.source)

    def _new_message(self, number: int, seen: Position) -> ClientMessage:
        self.message_count += 1
        return ClientMessage(number, b"%d" % self.message_count, seen)

    def _send(self, connection: Connection, message: ClientMessage) -> None:
        message.sent_count += 1
        connection.in_transit.append(message)

    def _cut(self, client: ModelClient, *, is_lost: bool) -> None:
        """Break the connection of a client; what it has sent may still arrive."""
        if client.connection is not None:
            client.connection.answers_arrive = False
            if is_lost:
                client.connection.in_transit.clear()
            client.connection = None

    def _send_position(self, connection: Connection, position: Position) -> None:
        client = connection.client
        if client is not None and connection.answers_arrive:
            client.last_position = max(client.last_position, position)

    def _answer(
        self, replica: ModelReplica, connection: Connection, number: int, decision: Decision
    ) -> None:
        client = connection.client
        if client is None or not connection.answers_arrive:
            return
        message = client.unanswered.pop(number, None)
        if message is None:
            return
        if isinstance(decision, Position):
            assert Delivery(number, decision) in replica.delivered[connection.source.key]
            assert self._entry_at(decision).payload == message.payload
            self._send_position(connection, decision)
        else:
            # Where nothing is forgotten, it was refused, and that answer did not arrive.
            assert self.forgets or message.payload not in self.payloads_delivered

    # Connections

    def _receive_next(
        self,
        replica: ModelReplica,
        connection: Connection,
        *,
        starts_packet: bool = False,
        is_permitted: bool = True,
    ) -> None:
        message = connection.in_transit.popleft()
        number = message.number
        if number <= connection.last_known:
            record = replica.table.session(connection.source.key) or connection.record
            decision = record.find(number) if record is not None else Verdict.UNKNOWN
            self._answer(replica, connection, number, decision)
        elif not is_permitted:
            self._refuse(connection, message)
        else:
            content = [(TEXT, message.payload)]
            identity = Identity(connection.source, [number])
            pending = self._publish(replica, content, identity, starts_packet=starts_packet)
            pending.read_up_to = min(pending.read_up_to, connection.read_up_to)
            pending.publishes.append((connection, number))
            if connection in replica.connections.values():
                connection.unanswered.append(number)

    def _refuse(self, connection: Connection, message: ClientMessage) -> None:
        client = connection.client
        if client is not None and connection.answers_arrive:
            client.unanswered.pop(message.number, None)
            if message.sent_count == 1:  # else the first one may still reach the log
                self.payloads_refused.add(message.payload)

    def _let_forget(self, replica: ModelReplica, source: bytes) -> None:
        """Let a replica read all, and then requests with keys until it has forgotten a session."""
        self._advance_packets(replica, 4)
        for _ in range(3):
            if replica in self.replicas and replica.table.session(source) is not None:
                self.message_count += 1
                self._post(replica, f"new {self.message_count}", [(TEXT, b"2 0")])
                self._advance_packets(replica, 4)

    # Requests with a key, and clients that lie

    @rule(
        number=NUMBERS,
        keys=st.lists(st.sampled_from([None, *"1234"]), min_size=1, max_size=3),
        is_other=st.sampled_from([False, False, True]),
        progress=PROGRESS,
    )
    def post(self, number: int, keys: Sequence[str | None], is_other: bool, progress: int) -> None:
        """Send requests, again and blindly if a key was used, and some without a key."""
        replica = self._replica(number)
        for key in keys:
            messages = [(TEXT, b"%d %d" % (part, is_other)) for part in (1, 2)]
            self._post(replica, key, messages)
        self._advance(replica, progress)

    def _post(self, replica: ModelReplica, key: str | None, messages: Sequence[Message]) -> None:
        if key is None:
            self._publish(replica, messages, None)
            return
        source = key_source(key, CHANNEL, "user")
        record = replica.table.key(source)
        if record is None:
            identity = Identity(Source(source, replica.table.complete_after), [0] * len(messages))
            self._publish(replica, messages, identity)
            return
        assert Delivery(0, record.position) in replica.delivered[source]
        is_same = self._entry_at(record.position).payload == messages[-1][1]
        assert (record.digest == content_digest(messages)) == is_same

    @rule(
        number=NUMBERS,
        session=st.integers(0, 1),
        seen=st.sampled_from([None, START, FAR_AHEAD, FAR_AHEAD]),
        numbers=st.sets(st.integers(1, 4), min_size=1, max_size=3),
        progress=PROGRESS,
        forgets=st.booleans(),
    )
    def lie(
        self,
        number: int,
        session: int,
        seen: Position | None,
        numbers: set[int],
        progress: int,
        forgets: bool,
    ) -> None:
        """Send any numbers in a session that was made up, with a made up position."""
        replica, name = self._replica(number), self.liar_sessions[session]
        source = name.source_of(LIAR)
        if replica.table.is_known(name, source, seen):
            evidence = max(name.opened_at, seen or START)
            connection = self._accept(replica, source, None, evidence)
            for each in sorted(numbers):
                self._send(connection, self._new_message(each, START))
            self._advance(replica, progress)
        if forgets:
            self._let_forget(replica, source)

    # Checks

    def _entry_at(self, position: Position) -> LogEntry:
        return self.log[position.offset - 1].entries[position.index]

    def _check(
        self,
        replica: ModelReplica,
        packet: LogPacket,
        identities: Identities,
        decisions: Sequence[Decision],
    ) -> None:
        """Check what a replica decided about a packet, and answer its messages."""
        sources, indices, numbers, _ = identities
        columns = packet.entries, indices, numbers, decisions, packet.decisions
        for entry, index, number, decision, decision_of_reader in zip(*columns, strict=True):
            if not index:
                assert decision is Verdict.NEW
                continue
            source = sources[index - 1]
            self._compare(replica, entry, source.key, number, decision, decision_of_reader)
            if decision is Verdict.NEW:
                self._record_delivery(replica, entry, source, number)
            elif isinstance(decision, Position):
                assert Delivery(number, decision) in replica.delivered[source.key]
                if source.key in self.honest_sources:
                    assert self._entry_at(decision).payload == entry.payload
            is_new = decision is Verdict.NEW
            answer = entry.position if is_new else decision
            self._acknowledge(replica, source.key, number, answer)

    def _compare(
        self,
        replica: ModelReplica,
        entry: LogEntry,
        key: bytes,
        number: int,
        decision: Decision,
        decision_of_reader: Decision,
    ) -> None:
        """Compare a decision with that of a replica that has read all, and forgets nothing."""
        if decision == decision_of_reader:
            return
        has_missed = self._has_missed(replica, key)
        if Verdict.NEW not in (decision, decision_of_reader):
            assert has_missed or (replica.forgets and decision is Verdict.UNKNOWN)
        elif key in self.honest_sources:
            assert decision is Verdict.NEW, f"{entry} is not delivered"
            later = [
                each
                for each in self.delivered[key]
                if each.number >= number and each.position < entry.position
            ]
            assert later
            assert self._are_missed(replica, later), f"{entry} is not decided alike"
        else:
            assert has_missed, f"{entry} is not decided alike"

    def _has_missed(self, replica: ModelReplica | None, key: bytes) -> bool:
        """Return whether a replica has missed a packet of a source."""
        return replica is not None and not replica.missed.isdisjoint(self.offsets[key])

    def _are_missed(self, replica: ModelReplica, deliveries: Sequence[Delivery]) -> bool:
        return all(each.position.offset in replica.missed for each in deliveries)

    def _record_delivery(
        self, replica: ModelReplica | None, entry: LogEntry, source: Source, number: int
    ) -> None:
        """Record, and check, what a replica delivers; None: one that has read all."""
        deliveries = self.delivered if replica is None else replica.delivered
        delivered = deliveries.setdefault(source.key, [])
        if source.key in self.honest_sources:
            assert not delivered or number > delivered[-1].number, f"{entry} is delivered twice"
        elif not number:  # with a key
            if entry.payload[:1] == b"1":
                return  # the last message of the request counts
            if delivered:
                assert self.forgets
                is_forgotten = delivered[-1].position <= source.complete_after
                assert is_forgotten or self._has_missed(replica, source.key), f"{entry} twice"
        delivered.append(Delivery(number, entry.position))

    @rule(number=st.integers(0, 1), replica=NUMBERS)
    def move_subscriber(self, number: int, replica: int) -> None:
        """Let a subscriber receive all from its replica, and move to another one."""
        subscriber = self.subscribers[number]
        self._receive(subscriber)
        subscriber.replica = self._replica(replica)

    def _receive(self, subscriber: Subscriber) -> None:
        replica = subscriber.replica
        for key in self.honest_sources & replica.delivered.keys():
            received = subscriber.received.setdefault(key, [])
            for delivery in replica.delivered[key]:
                if delivery.position <= subscriber.position:
                    continue
                later = [each for each in received if each.number >= delivery.number]
                assert self._are_missed(replica, later), f"{delivery} is received twice"
                received.append(delivery)
        subscriber.position = max(subscriber.position, replica.position)

    @invariant()
    def a_table_keeps_its_bounds(self) -> None:
        for replica in self.replicas:
            table = replica.table
            assert len(table) <= replica.max_records
            assert table.complete_after <= end_of(replica.packets_read)
            if not replica.forgets:
                assert table.complete_after == replica.start

    def _catch_up(self) -> None:
        """Let all messages and packets arrive."""
        for packets in self.orphans:
            for packet in packets:
                self._append_to_log(packet)
        self.orphans.clear()
        for progress in (2, 4):
            for replica in list(self.replicas):
                self._advance(replica, progress)

    def teardown(self) -> None:
        """Check that each message is answered once its client reaches a replica."""
        if not hasattr(self, "clients"):
            return
        self._catch_up()
        survivor = self._new_replica(UNBOUNDED, FOREVER_S)
        self.replicas.append(survivor)
        for client in self.clients:
            if client.connection is not None and client.connection.answers_arrive:
                assert not client.unanswered
            else:
                self._cut(client, is_lost=True)
                self._connect(client, survivor)
        self._catch_up()
        assert survivor in self.replicas
        for number in range(len(self.subscribers)):
            self.move_subscriber(number, len(self.replicas) - 1)
            self._receive(self.subscribers[number])
        assert not any(client.unanswered for client in self.clients)


def test_every_replica_delivers_each_publish_of_a_session_and_of_a_key_once() -> None:
    run_state_machine_as_test(
        SessionModel,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
        ),
    )
