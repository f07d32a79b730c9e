"""A model of clients that wait for confirmations while appends fail and outages start.

The broker is a list that confirms an append, loses the confirmation, applies it late or rejects it.
The backplane is the real one. Each wait ends once: with the position of its own message, or without
one. A client that leaves is released after all messages that were published before. The examples
are the same in every run.
"""

import asyncio
from collections.abc import Sequence
from enum import Enum, auto
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from websocket_relay.backplane.codec import unpack
from websocket_relay.backplane.interface import BackplaneState, LogEntry, Position
from websocket_relay.backplane.replicated import ReplicatedBackplane
from websocket_relay.backplane.stream import BrokerError, StreamEntry
from websocket_relay.backplane.timings import Timings
from websocket_relay.messages import TEXT

from tests.support.broker_logs import CountingPublisher, Pending

pytestmark = pytest.mark.fast

APPEND_TURNS = 3
"""Turns of the event loop that an append takes."""

MANY_TURNS = 50

IMMEDIATE_RETRIES = Timings(first_pause_s=0)
"""Appends are retried in the next turn of the event loop."""


class Step(Enum):
    """An event, or how the broker handles appends from now on."""

    PUBLISH = auto()  # a client publishes a message, and waits for its position
    LEAVE = auto()  # a client waits for all messages published so far
    READ = auto()  # the next entry is read
    TURN = auto()  # the event loop runs: an append is completed
    OUTAGE = auto()  # an outage starts
    ARRIVE = auto()  # late appends are applied
    CONFIRM = auto()  # appends are applied and confirmed
    LOSE_CONFIRMATION = auto()  # they are applied, and not confirmed
    APPLY_LATE = auto()  # they are applied later, and not confirmed
    REJECT = auto()  # they are not applied


BROKER_MODES = (Step.CONFIRM, Step.LOSE_CONFIRMATION, Step.APPLY_LATE, Step.REJECT)


class ListBroker:
    """A stream in a list."""

    max_entry_bytes = 1_048_576

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.late_entries: list[bytes] = []
        self.mode = Step.CONFIRM

    async def open_writer(self) -> None:
        pass

    async def append(self, packed: bytes, timeout_s: float) -> None:
        await asyncio.sleep(0)
        if self.mode in {Step.CONFIRM, Step.LOSE_CONFIRMATION}:
            self.entries.append(packed)
        elif self.mode is Step.APPLY_LATE:
            self.late_entries.append(packed)
        if self.mode is not Step.CONFIRM:
            raise BrokerError("no confirmation")

    def apply_late_entries(self) -> None:
        self.entries += self.late_entries
        self.late_entries.clear()


def backplane_on(
    broker: ListBroker, pending: Pending, *, relays_locally: bool
) -> ReplicatedBackplane:
    return ReplicatedBackplane(
        broker,  # type: ignore[arg-type]
        address="model",
        pending=pending,
        relays_locally=relays_locally,
        max_message_bytes=1000,
        describe=lambda: b"",
        observe_append=lambda _: None,
        observe_lag=lambda _: None,
        timings=IMMEDIATE_RETRIES,
    )


class OneMessageClient(CountingPublisher):
    """A client with one message. If that can't be relayed it leaves, as WebSocket clients do."""

    def __init__(self, run: "WaitingRun", payload: bytes) -> None:
        super().__init__()
        self.payload = payload
        self.results: list[Position | None] = []
        self.is_rejected = self.is_unconfirmed = False
        self._run = run

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        self.is_rejected, self.is_unconfirmed = not is_unconfirmed, is_unconfirmed
        self._run.leave()


class WaitingRun:
    """One replica, its clients, and the messages that it has delivered."""

    def __init__(self, *, relays_locally: bool) -> None:
        self.broker = ListBroker()
        self.entries_read = 0
        self.clients: list[OneMessageClient] = []
        self.delivered: dict[bytes, Position] = {}
        self.leaving = 0
        # For each client that was released: the clients that had published before it left, and
        # the messages delivered by then.
        self.released: list[tuple[list[OneMessageClient], set[bytes]]] = []
        self.pending = Pending()
        self.backplane = backplane_on(self.broker, self.pending, relays_locally=relays_locally)
        self.backplane.consume(self._deliver, lambda _: None)
        self.backplane.outages.send_heartbeat(1.0)

    def _deliver(self, entries: Sequence[LogEntry], _: object) -> None:
        for entry in entries:
            assert entry.payload not in self.delivered, "delivered twice"
            self.delivered[entry.payload] = entry.position

    def publish(self) -> None:
        client = OneMessageClient(self, b"%d" % len(self.clients))
        self.clients.append(client)
        self.backplane.append("news", [(TEXT, client.payload)], len(client.payload), client)
        self.backplane.when_delivered(client.results.append)

    def leave(self) -> None:
        self.leaving += 1
        self.backplane.when_settled(partial(self._release, [*self.clients]))

    def _release(self, earlier_clients: list[OneMessageClient]) -> None:
        self.released.append((earlier_clients, {*self.delivered}))

    def read_next(self) -> None:
        if self.entries_read < len(self.broker.entries):
            self.entries_read += 1
            packed = self.broker.entries[self.entries_read - 1]
            entry = StreamEntry((1, self.entries_read), packed, follows=True)
            self.backplane.consumer.on_entry(entry)

    async def perform(self, step: Step) -> None:
        match step:
            case Step.PUBLISH:
                self.publish()
            case Step.LEAVE:
                self.leave()
            case Step.READ:
                self.read_next()
            case Step.TURN:
                await run_loop(APPEND_TURNS)
            case Step.OUTAGE if self.backplane.state is not BackplaneState.OUTAGE:
                self.backplane.outages.start_outage(1.0)
            case Step.ARRIVE:
                self.broker.apply_late_entries()
            case _ if step in BROKER_MODES:
                self.broker.mode = step

    async def finish(self) -> None:
        """Let the broker confirm again, and read all entries."""
        self.broker.mode = Step.CONFIRM
        self.broker.apply_late_entries()
        await run_loop(MANY_TURNS)
        self.backplane.outages.send_heartbeat(1.0)
        await run_loop(MANY_TURNS)
        while self.entries_read < len(self.broker.entries):
            self.read_next()

    def assert_results(self) -> None:
        """Assert that every wait ended once, in time, and with a correct result."""
        for client in self.clients:
            (position,) = client.results
            assert position in {None, self.delivered.get(client.payload)}
            assert not (client.is_rejected and client.payload in self.delivered)
            assert position is None or not (client.is_rejected or client.is_unconfirmed)
        assert len(self.released) == self.leaving
        for clients, delivered in self.released:
            for client in clients:
                is_late = client.payload in self.delivered and client.payload not in delivered
                assert client.is_unconfirmed or not is_late, "released too early"
        assert self.pending.bytes == 0
        assert self.lost_without() == 0, "abandoned messages are not lost"

    def lost_without(self, *payloads: bytes) -> int:
        """Return how many losses another replica counts that misses entries with these payloads."""
        other = backplane_on(ListBroker(), Pending(), relays_locally=False)
        other.consume(lambda *_: None, lambda _: None)
        for number, packed in enumerate(self.broker.entries):
            if not set(payloads) & set(unpack(packed).payloads):
                other.consumer.on_entry(StreamEntry((1, number), packed, follows=True))
        return other.counters.lost


async def run_loop(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


FREQUENT = (Step.PUBLISH, Step.TURN, Step.READ)
STEPS = st.sampled_from([*Step, *2 * FREQUENT])


async def perform_all(steps: list[Step], *, relays_locally: bool) -> WaitingRun:
    run = WaitingRun(relays_locally=relays_locally)
    writing = asyncio.create_task(run.backplane.producer.run())
    try:
        for step in steps:
            await run.perform(step)
        await run.finish()
    finally:
        writing.cancel()
        await asyncio.wait([writing])
    return run


REJECTED_AFTER_A_CONFIRMED_ONE = [
    Step.PUBLISH, Step.TURN, Step.REJECT, Step.PUBLISH, Step.TURN, Step.OUTAGE
]  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@example(steps=REJECTED_AFTER_A_CONFIRMED_ONE, relays_locally=False)
@given(steps=st.lists(STEPS, min_size=5, max_size=40), relays_locally=st.booleans())
def test_every_wait_for_a_confirmation_ends_once_in_time_and_with_a_correct_result(
    steps: list[Step], relays_locally: bool
) -> None:
    run = asyncio.run(perform_all(steps, relays_locally=relays_locally))
    run.assert_results()


async def test_a_message_lost_before_an_outage_is_counted_as_lost_after_it() -> None:
    steps = [Step.TURN, Step.PUBLISH, Step.TURN, Step.REJECT, Step.PUBLISH, Step.OUTAGE]
    run = await perform_all(steps, relays_locally=False)
    assert run.lost_without(b"0") == 1
