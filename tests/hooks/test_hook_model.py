"""A model of replicas that deliver webhooks: none is lost, and first deliveries are in order.

The log is a list, which each replica reads at its own pace. Events, queue, heartbeats and the
choice of the replica that delivers are the real ones. A replica ends at any moment: before, during
or after a request, or before it is known in the log what was accepted. Requests are accepted,
refused, or accepted without an answer. The log is trimmed, though never the latest entry of
webhooks.

What the model excludes: all replicas end that have read what is trimmed and not delivered. The
examples are the same in every run.
"""

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from websocket_relay.backplane.interface import START, LogEntry, Position
from websocket_relay.cluster.control_log import ControlEntry, ControlLog
from websocket_relay.cluster.incarnations import Incarnations
from websocket_relay.hooks.duty import Duty
from websocket_relay.hooks.events import NO_EVENT, Event, EventId
from websocket_relay.hooks.pending import PendingEvents
from websocket_relay.hooks.queue import EventQueue
from websocket_relay.messages import CONTROL, TEXT, Message

pytestmark = pytest.mark.fast

HEARTBEAT = -1
MAX_REPLICAS = 4
NUMBERS = st.integers(0, MAX_REPLICAS - 1)


class ModelLog:
    """The log.

    Attributes:
        entries: all of them; the first ones may be trimmed.
        trimmed: how many of them are.
        seconds: the time.
    """

    def __init__(self) -> None:
        self.entries: list[LogEntry | tuple[Position, int, str, dict[str, str]]] = []
        self.trimmed = 0
        self.seconds = 1000.0

    def position(self) -> Position:
        return Position(1, len(self.entries) + 1, 0)

    def append(
        self, channel: str, messages: Sequence[Message], payload_bytes: int, publisher: object
    ) -> None:
        for kind, payload in messages:
            self.entries.append(LogEntry(self.position(), channel, kind, payload))


class ModelReplica:
    """A replica, and the request that it has in flight."""

    def __init__(self, log: ModelLog, max_pending: int) -> None:
        self._log = log
        self.read = self.started_at = log.trimmed
        self.position = START
        self.control = ControlLog(log, lambda: log.seconds)  # type: ignore[arg-type]
        self.incarnations = Incarnations(lambda: log.seconds)
        self.is_complete = False
        self.pending = PendingEvents(
            self.control,
            EventQueue(max_pending, 1 << 40),
            ["news*"],
            is_alone=False,
            is_presence_complete=lambda: True,
            is_relayed_alone=lambda: False,
        )
        self.duty = Duty(
            self.control,
            self.incarnations,
            is_alone=False,
            is_up=lambda: True,
            is_complete=lambda: self.is_complete,
            is_started=lambda: self.pending.is_started,
            position=lambda: self.position,
            clock=lambda: log.seconds,
        )
        self.control.handle("presence.join", self._on_join)
        self.accepted = NO_EVENT
        self.in_flight: Sequence[Event] = ()

    def _on_join(self, entry: ControlEntry) -> None:
        for client in entry.fields["clients"]:  # as at the end of a replica: several in one entry
            self.pending.on_change(entry.channel, client, "", None, 2)

    def read_entries(self, count: int) -> None:
        for entry in self._log.entries[self.read : self.read + count]:
            self.read += 1
            self.position = entry[0]
            if not isinstance(entry, LogEntry):
                _, _, incarnation, facts = entry
                self.incarnations.record_sign(incarnation, self.position, facts)
                self.is_complete = self.is_complete or incarnation == self.incarnations.own
            elif entry.kind == CONTROL:
                self.control.on_entry(entry)
            else:
                self.pending.on_message(entry)

    def send_heartbeat(self) -> None:
        self.duty.tick()
        beat = (self._log.position(), HEARTBEAT, self.incarnations.own, dict(self.duty.facts()))
        self._log.entries.append(beat)

    def send_request(self, count: int) -> None:
        self.duty.tick()
        if self.duty.is_own() and not self.in_flight:
            self.in_flight = self.pending.queue.following(self.accepted, count)

    def append_done(self) -> None:
        up_to = max(self.accepted, self.pending.done)
        if self.duty.is_own():
            self.control.append("hooks.done", {"up_to": str(up_to)})


class WebhookModel(RuleBasedStateMachine):
    """The replicas, the log and the receiver."""

    @initialize(max_pending=st.sampled_from([3, 1000]), is_started=st.booleans())
    def start(self, max_pending: int, is_started: bool) -> None:
        self.max_pending = max_pending
        self.log = ModelLog()
        self.replicas: list[ModelReplica] = []
        self.received: list[Event] = []
        self.published: list[EventId] = []
        for _ in range(2):
            self.start_replica()
        if is_started:
            self._rest()

    @rule(channel=st.sampled_from(["news", "news.b", "other"]), count=st.integers(1, 4))
    def publish(self, channel: str, count: int) -> None:
        if channel == "other":
            fields = {"clients": [f"c{number}" for number in range(count)]}
            self.published += [EventId(self.log.position(), number) for number in range(count)]
            self.replicas[0].control.append("presence.join", fields, channel)
            return
        for _ in range(count):
            self.published.append(EventId(self.log.position(), 0))
            self.log.append(channel, [(TEXT, b"x")], 1, None)

    @rule(number=NUMBERS, count=st.integers(1, 20))
    def read(self, number: int, count: int) -> None:
        self._replica(number).read_entries(count)

    @rule(number=NUMBERS)
    def heartbeat(self, number: int) -> None:
        self._replica(number).send_heartbeat()

    @rule(seconds=st.sampled_from([0.5, 1.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self.log.seconds += seconds

    @rule()
    def advance(self) -> None:
        self.log.seconds += 1
        for replica in self.replicas:
            replica.send_heartbeat()
        for replica in self.replicas:
            replica.read_entries(10_000)

    @rule(number=NUMBERS, count=st.integers(1, 5))
    def send_request(self, number: int, count: int) -> None:
        self._replica(number).send_request(count)

    @rule(number=NUMBERS, arrives=st.booleans(), is_answered=st.booleans())
    def answer(self, number: int, arrives: bool, is_answered: bool) -> None:
        replica = self._replica(number)
        events, replica.in_flight = replica.in_flight, ()
        if arrives and events:
            self.received += events
            if is_answered:
                replica.accepted = max(replica.accepted, events[-1].event_id)

    @rule(number=NUMBERS)
    def append_done(self, number: int) -> None:
        self._replica(number).append_done()

    @precondition(lambda self: len(self.replicas) < MAX_REPLICAS)
    @rule()
    def start_replica(self) -> None:
        self.replicas.append(ModelReplica(self.log, self.max_pending))

    @rule(number=NUMBERS, is_received=st.booleans())
    def kill(self, number: int, is_received: bool) -> None:
        replica = self._replica(number)
        others = [each for each in self.replicas if each is not replica]
        if not self._know_all(others):
            return
        if is_received:
            self.received += replica.in_flight
        self.replicas = others
        if not others:
            self.start_replica()

    @rule(number=NUMBERS)
    def drain(self, number: int) -> None:
        replica = self._replica(number)
        others = [each for each in self.replicas if each is not replica]
        if others and self._know_all(others) and not replica.in_flight:
            replica.append_done()
            replica.duty.resign()
            self.replicas = others

    def _know_all(self, replicas: Sequence[ModelReplica]) -> bool:
        """Return whether the one that will deliver has read all that is not delivered."""
        received = {event.event_id for event in self.received}
        missing = [each.position.offset for each in self.due() if each not in received]
        if not missing:
            return True
        ready = [each for each in replicas if each.duty.facts()]
        ready.sort(key=lambda each: Position.parse(each.duty.facts()["hooks"]))
        candidates = ready[:1] or replicas
        starts = [each.started_at for each in candidates] or [self.log.trimmed]
        return max(starts) < missing[0]

    @rule(count=st.integers(1, 30))
    def trim(self, count: int) -> None:
        first_kept = 0
        for place, entry in enumerate(self.log.entries):
            if isinstance(entry, LogEntry) and b'"kind":"hooks.' in entry.payload:
                first_kept = place
        self.log.trimmed = max(self.log.trimmed, min(first_kept, self.log.trimmed + count))

    def _replica(self, number: int) -> ModelReplica:
        return self.replicas[number % len(self.replicas)]

    def _rest(self) -> None:
        """Let everything happen that is due, with a receiver that accepts."""
        for _ in range(12):
            self.advance()
            for number, replica in enumerate(self.replicas):
                replica.send_request(100)
                self.answer(number, True, True)
                replica.append_done()
            for replica in self.replicas:
                replica.read_entries(10_000)
        assert [len(replica.pending.queue) for replica in self.replicas] == [0] * len(self.replicas)

    def due(self) -> list[EventId]:
        """Return the events that are to be delivered: those after the first `hooks.start`."""
        for entry in self.log.entries:
            if isinstance(entry, LogEntry) and b'"kind":"hooks.start"' in entry.payload:
                return [each for each in self.published if each.position > entry.position]
        return []

    def teardown(self) -> None:
        if not hasattr(self, "published"):
            return
        self._rest()
        first_deliveries = list(dict.fromkeys(event.event_id for event in self.received))
        assert first_deliveries == sorted(first_deliveries)
        if self.max_pending == 1000:
            assert first_deliveries == self.due()
        else:  # each one is delivered, or is one of those that a later event counts
            kinds = {event.event_id: event for event in self.received}
            counted = sum(each.facts.get("count", 1) for each in kinds.values())
            assert counted >= len(self.due())
            assert set(first_deliveries) <= set(self.due())


def test_no_event_is_lost_and_first_deliveries_are_in_order() -> None:
    run_state_machine_as_test(
        WebhookModel,
        settings=settings(
            max_examples=100,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            database=None,
        ),
    )
