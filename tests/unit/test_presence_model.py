"""Rosters on several replicas, against the truth: a list as the log, replicas as objects.

Replicas start, lag, die, freeze and forget; clients come, move to another replica, and go; the log
is trimmed, and appends fail.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

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
from websocket_relay.backplane.interface import LogEntry, Position
from websocket_relay.cluster.control_log import ControlLog
from websocket_relay.cluster.incarnations import Incarnations
from websocket_relay.messages import CONTROL
from websocket_relay.outcomes import Close
from websocket_relay.presence.presence import Presence
from websocket_relay.presence.roster import Change, Person

pytestmark = pytest.mark.fast

GRACE_S = 4.0
CHANNELS = ("a", "b")
HEARTBEAT = ""  # stands in the place of a channel
MAX_REPLICAS = 3
SETTLE_TURNS = 80
TURN_S = 0.5


@dataclass(eq=False)
class Client:
    """A client of one channel; with a session, it may move."""

    name: str
    channel: str
    has_session: bool
    connection: "Connected | None" = None


@dataclass(eq=False)
class Connected:
    """A connection, as presence sees it."""

    client: Client
    replica: "Replica"
    is_ended: bool = False

    def close(self, why: Close) -> None:
        """End the connection: its client has another one."""
        assert why is Close.SESSION_RESUMED
        self.is_ended = True
        if self.client.connection is self:
            self.client.connection = None

    def end(self, *, may_return: bool) -> None:
        """End the connection, from the client's side or by the network."""
        if not self.is_ended:
            self.is_ended = True
            arguments = self.client.channel, self.client.name, self
            self.replica.presence.exit(*arguments, code=1000, may_return=may_return)


class Log:
    """What is read by all."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, bytes]] = []
        self.first = 0  # what is before is trimmed
        self.now_s = 1000.0


@dataclass(eq=False)
class Replica:
    """One replica, between its log and its clients."""

    log: Log
    outbox: list[tuple[str, bytes, object]] = field(default_factory=list)
    notified: list[Change] = field(default_factory=list)
    connections: list[Connected] = field(default_factory=list)
    is_up: bool = True
    is_frozen: bool = False

    def __post_init__(self) -> None:
        """Start reading what the log still holds."""
        self.cursor = self.log.first
        control = ControlLog(self, lambda: self.log.now_s)  # type: ignore[arg-type]
        self.control = control
        self.incarnations = Incarnations(lambda: self.log.now_s)
        self.presence = Presence(
            ["*"],
            grace_s=GRACE_S,
            control=control,
            incarnations=self.incarnations,
            is_alone=False,
            is_up=lambda: self.is_up,
            clock=lambda: self.log.now_s,
        )
        self.presence.listeners.append(self._on_change)

    def _on_change(self, change: Change) -> None:
        if self.presence.complete.is_set():
            self.notified.append(change)

    def append(self, channel: str, messages: list[tuple[int, bytes]], _: int, by: object) -> None:
        """Take an entry, as a backplane does."""
        self.outbox += [(channel, payload, by) for _, payload in messages]

    @property
    def position(self) -> Position:
        """The position up to which everything was read."""
        return Position(1, self.cursor, 0)

    def send(self, count: int) -> None:
        """Append some of what was taken."""
        sent, self.outbox = self.outbox[:count], self.outbox[count:]
        self.log.entries += [(channel, payload) for channel, payload, _ in sent]

    def beat(self) -> None:
        """Append a heartbeat, behind all else."""
        self.send(len(self.outbox))
        self.log.entries.append((HEARTBEAT, self.incarnations.own.encode()))

    def read(self, count: int) -> None:
        """Read some entries."""
        if self.cursor < self.log.first:  # they are gone
            self.cursor = self.log.first
            self.presence.on_gap()
        for channel, payload in self.log.entries[self.cursor : self.cursor + count]:
            position = Position(1, self.cursor + 1, 0)
            self.cursor += 1
            if channel == HEARTBEAT:
                self.incarnations.record_sign(payload.decode(), position, {})
            else:
                self.control.on_entry(LogEntry(position, channel, CONTROL, payload))

    def lose(self) -> None:
        """Lose what was taken, in an outage."""
        lost, self.outbox = self.outbox, []
        for _, _, by in lost:
            by.fail_publish(is_unconfirmed=False)  # type: ignore[attr-defined]

    @property
    def is_exact(self) -> bool:
        """Whether nothing is known to be missing here."""
        presence = self.presence
        return presence.complete.is_set() and not (presence._must_ask or presence._asked_at)

    def table(self) -> dict[str, dict[str, str]]:
        """Return who is in which channel, and where."""
        return self.presence.rosters.owners()

    def people(self) -> dict[str, list[Person]]:
        """Return who is in which channel, as it is listed."""
        return {channel: self.presence.rosters.people(channel) for channel in CHANNELS}


class Replicas(RuleBasedStateMachine):
    """What may happen to replicas and their clients."""

    @initialize()
    def begin(self) -> None:
        """Start the first replica."""
        self.log = Log()
        self.replicas = [Replica(self.log)]
        self.clients: list[Client] = []
        self.settle()

    def pick(self, number: int, *, running: bool = False) -> Replica:
        """Return one of the replicas."""
        found = [each for each in self.replicas if not (running and each.is_frozen)]
        return (found or self.replicas)[number % len(found or self.replicas)]

    def connected(self) -> list[Client]:
        """Return the clients that are connected."""
        return [each for each in self.clients if each.connection is not None]

    # Replicas

    @precondition(lambda self: len(self.replicas) < MAX_REPLICAS)
    @rule()
    def start(self) -> None:
        """Start another replica."""
        self.replicas.append(Replica(self.log))

    @precondition(lambda self: len(self.replicas) > 1)
    @rule(number=st.integers(0, 9), sent=st.integers(0, 3))
    def kill(self, number: int, sent: int) -> None:
        """End a replica; some of what it took is appended."""
        replica = self.pick(number)
        replica.send(sent)
        self.replicas.remove(replica)
        for connection in replica.connections:
            connection.is_ended = True
            if connection.client.connection is connection:
                connection.client.connection = None

    @rule(number=st.integers(0, 9))
    def freeze(self, number: int) -> None:
        """Freeze a replica."""
        self.pick(number).is_frozen = True

    @rule()
    def thaw(self) -> None:
        """Let all replicas go on."""
        for replica in self.replicas:
            replica.is_frozen = False

    @rule(number=st.integers(0, 9))
    def break_off(self, number: int) -> None:
        """Begin an outage of one replica, or end it."""
        replica = self.pick(number)
        replica.is_up = not replica.is_up
        replica.lose()

    @rule(kept=st.integers(0, 30))
    def trim(self, kept: int) -> None:
        """Trim the log."""
        self.log.first = max(self.log.first, len(self.log.entries) - kept)

    @rule(number=st.integers(0, 9), count=st.integers(1, 20))
    def read(self, number: int, count: int) -> None:
        """Let a replica read some entries."""
        replica = self.pick(number)
        if not replica.is_frozen:
            replica.read(count)

    @rule(number=st.integers(0, 9), count=st.integers(1, 5))
    def send(self, number: int, count: int) -> None:
        """Let a replica append some of what it took."""
        replica = self.pick(number)
        if not replica.is_frozen and replica.is_up:
            replica.send(count)

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.0]))
    def pass_time(self, seconds: float) -> None:
        """Let time pass."""
        self.turn(seconds)

    def turn(self, seconds: float) -> None:
        """Let time pass, and the replicas do what is due."""
        self.log.now_s += seconds
        for replica in self.replicas:
            if not replica.is_frozen:
                replica.presence.tick()
                if replica.is_up:
                    replica.beat()

    # Clients

    @rule(number=st.integers(0, 9), channel=st.sampled_from(CHANNELS), has_session=st.booleans())
    def connect(self, number: int, channel: str, has_session: bool) -> None:
        """Connect a new client."""
        client = Client(f"client-{len(self.clients)}", channel, has_session)
        self.clients.append(client)
        self.attach(client, self.pick(number, running=True))

    def attach(self, client: Client, replica: Replica) -> None:
        """Connect a client to a replica."""
        if replica.is_frozen or not replica.presence.complete.is_set():
            return
        client.connection = connection = Connected(client, replica)
        replica.connections.append(connection)
        person = Person(self.log.now_s, client.name, "", None)
        replica.presence.enter(client.channel, person, connection)

    @precondition(lambda self: self.connected())
    @rule(number=st.integers(0, 99), is_final=st.booleans())
    def disconnect(self, number: int, is_final: bool) -> None:
        """Disconnect a client."""
        clients = self.connected()
        client = clients[number % len(clients)]
        connection, client.connection = client.connection, None
        assert connection is not None
        if not connection.replica.is_frozen:
            connection.end(may_return=client.has_session and not is_final)
        elif not client.has_session or is_final:
            client.has_session = False
            connection.client = client

    @rule(number=st.integers(0, 99), to=st.integers(0, 9))
    def resume(self, number: int, to: int) -> None:
        """Let a client resume its session; its old connection may still look open."""
        clients = [each for each in self.clients if each.has_session]
        if clients:
            self.attach(clients[number % len(clients)], self.pick(to, running=True))

    # What holds

    @invariant()
    def replicas_agree(self) -> None:
        """Compare replicas that have read as far."""
        exact = [each for each in self.replicas if each.is_exact]
        for one, two in pairwise(exact):
            if one.cursor == two.cursor:
                assert one.table() == two.table()
                assert one.people() == two.people()

    @precondition(lambda self: len(self.log.entries) > 60)
    @rule()
    def settle(self) -> None:
        """Heal everything, and wait."""
        for replica in self.replicas:
            replica.is_frozen, replica.is_up = False, True
            for connection in replica.connections:
                if connection.client.connection is not connection:  # TCP finds out
                    connection.end(may_return=connection.client.has_session)
            replica.connections = [each for each in replica.connections if not each.is_ended]
        for _ in range(SETTLE_TURNS):
            self.turn(TURN_S)
            for replica in self.replicas:
                replica.read(len(self.log.entries))
        self.check_truth()

    def check_truth(self) -> None:
        """Compare the rosters with who is connected, and what was notified with the rosters."""
        truth: dict[str, set[str]] = {}
        for client in self.connected():
            truth.setdefault(client.channel, set()).add(client.name)
        for replica in self.replicas:
            assert replica.is_exact
            found = {channel: set(clients) for channel, clients in replica.table().items()}
            assert found == truth
            for notified in self.notices_of_each(replica):
                assert all(one != two for one, two in pairwise(notified))

    def notices_of_each(self, replica: Replica) -> Iterator[list[bool]]:
        """Yield what a replica has notified of each client."""
        notified: dict[tuple[str, str], list[bool]] = {}
        for change in replica.notified:
            notified.setdefault((change.channel, change.person.client), []).append(change.joined)
        yield from notified.values()

    def teardown(self) -> None:
        """Settle at the end of each run."""
        if hasattr(self, "log"):
            self.settle()


def test_rosters_are_alike_on_all_replicas_and_true_at_rest() -> None:
    run_state_machine_as_test(
        Replicas,
        settings=settings(
            max_examples=60, stateful_step_count=50, deadline=None, derandomize=True, database=None
        ),
    )


def replicas_at_rest(count: int) -> Replicas:
    """Return replicas that know each other, outside of a run of the model."""
    model = Replicas()
    model.begin()
    for _ in range(count - 1):
        model.start()
    model.settle()
    return model


def leave_for_a_moment(client: Client) -> None:
    """Break the connection of a client that has a session; it returns some milliseconds later."""
    connection, client.connection = client.connection, None
    assert connection is not None
    connection.end(may_return=True)
    connection.replica.log.now_s += 0.01


def test_a_client_whose_claim_was_lost_while_it_was_away_is_listed_once_it_is_back() -> None:
    model = replicas_at_rest(2)
    one = model.replicas[0]
    model.break_off(0)  # its claim fails
    model.connect(0, "a", has_session=True)
    (client,) = model.clients
    leave_for_a_moment(client)
    model.break_off(0)  # the outage ends
    model.turn(TURN_S)
    model.attach(client, one)
    model.settle()
    assert set(one.table()["a"]) == {client.name}


def test_a_client_that_is_back_at_its_replica_before_that_has_read_of_its_move_stays() -> None:
    model = replicas_at_rest(2)
    one, two = model.replicas
    model.connect(0, "a", has_session=True)
    (client,) = model.clients
    model.settle()
    leave_for_a_moment(client)
    model.attach(client, two)
    model.turn(0)  # its claim is in the log, and only the second replica reads it
    two.read(len(model.log.entries))
    leave_for_a_moment(client)
    model.attach(client, one)
    connection = client.connection
    model.settle()
    assert client.connection is connection, "it has one connection only, and that is the latest"
    assert set(one.table()["a"]) == {client.name}


@pytest.mark.parametrize("reads_in_time", [True, False])
def test_a_dead_connection_takes_no_client_from_a_live_one_after_an_outage(
    reads_in_time: bool,
) -> None:
    model = replicas_at_rest(2)
    one, two = model.replicas
    model.break_off(0)
    if not reads_in_time:
        model.break_off(1)
    model.connect(0, "a", has_session=True)  # its claim is lost
    (client,) = model.clients
    model.log.now_s += TURN_S
    model.attach(client, two)  # the first replica has not noticed yet that it has gone
    connection = client.connection
    for replica in (two, one):
        replica.is_up = True
        replica.send(len(replica.outbox))
        if reads_in_time:
            one.read(len(model.log.entries))
        replica.presence.tick()
        replica.send(len(replica.outbox))
    for _ in range(4):
        model.turn(TURN_S)
        for replica in model.replicas:
            replica.read(len(model.log.entries))
    assert client.connection is connection
    assert one.table() == {"a": {client.name: two.incarnations.own}}
    model.settle()
    assert client.connection is connection


def test_a_client_that_has_moved_is_listed_alike_by_a_replica_that_starts_later() -> None:
    model = replicas_at_rest(2)
    one, two = model.replicas
    model.connect(0, "a", has_session=True)
    (client,) = model.clients
    model.settle()
    (first,) = one.people()["a"]
    leave_for_a_moment(client)
    model.attach(client, two)
    model.settle()
    model.trim(kept=0)
    model.start()
    model.settle()
    for replica in model.replicas:
        assert replica.people()["a"] == [first]


def test_a_late_claim_of_a_connection_that_has_ended_does_not_close_the_present_one() -> None:
    model = replicas_at_rest(2)
    one, two = model.replicas
    model.connect(0, "a", has_session=True)  # its claim waits
    (client,) = model.clients
    leave_for_a_moment(client)
    model.attach(client, two)
    two.beat()
    two.read(len(model.log.entries))
    one.beat()  # the claim is in the log, after that of the other replica
    connection = client.connection
    model.settle()
    assert client.connection is connection
    assert set(one.table()["a"]) == {client.name}


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_connections_of_a_session_one_stays(first: int) -> None:
    model = replicas_at_rest(2)
    one, two = model.replicas
    model.connect(0, "a", has_session=True)
    (client,) = model.clients
    earlier = client.connection
    assert earlier is not None
    model.attach(client, two)  # it is a copy, of the same moment: the first one stays open
    for replica in (two, one) if first else (one, two):
        replica.beat()
    for _ in range(5):
        model.turn(TURN_S)
        for replica in (one, two):
            replica.read(len(model.log.entries))
    connections = [*one.connections, *two.connections]
    assert [each.is_ended for each in connections].count(False) == 1


def test_a_client_that_connects_to_a_replica_declared_to_have_ended_is_listed() -> None:
    model = replicas_at_rest(2)
    one, two = model.replicas
    model.connect(0, "a", has_session=False)
    model.settle()
    model.freeze(0)
    while one.incarnations.own in two.presence.rosters.incarnations():
        model.turn(TURN_S)
        two.read(len(model.log.entries))
    model.thaw()
    model.connect(0, "a", has_session=False)  # the replica has not read of its end yet
    model.settle()
    assert set(one.table()["a"]) == {client.name for client in model.clients}


def test_clients_of_a_replica_leave_that_was_dead_before_all_others_began() -> None:
    model = replicas_at_rest(2)
    model.connect(0, "a", has_session=False)
    model.settle()
    model.kill(0, sent=0)
    (two,) = model.replicas
    for _ in range(7):  # longer than those that are silent state themselves, less than the grace
        model.turn(TURN_S)
        two.read(len(model.log.entries))
    model.trim(kept=0)
    model.start()
    _, third = model.replicas
    third.beat()
    third.presence.tick()  # it asks
    third.beat()
    two.read(len(model.log.entries))
    two.presence.tick()  # it states the clients of the dead one
    two.beat()
    third.read(len(model.log.entries))
    assert third.table()
    model.kill(0, sent=0)
    model.settle()


def test_a_client_that_has_left_is_not_stated_by_a_replica_that_has_not_read_of_it() -> None:
    model = replicas_at_rest(2)
    one, two = model.replicas
    model.connect(0, "a", has_session=False)
    model.settle()
    model.freeze(0)
    for _ in range(7):  # longer than those that are silent state themselves, less than the grace
        model.turn(TURN_S)
        two.read(len(model.log.entries))
    model.start()
    third = model.replicas[2]
    third.beat()
    third.read(len(model.log.entries))
    third.presence.tick()
    third.beat()  # it asks
    two.read(len(model.log.entries))
    model.thaw()
    model.disconnect(0, is_final=True)
    one.read(len(model.log.entries))
    one.presence.tick()
    one.beat()  # the client has left, and is not in its statement
    two.presence.tick()
    two.beat()
    model.settle()
