"""A model of clients that wait for their messages, while appends fail and outages begin.

The broker is a list that confirms an append, loses its answer, takes it late or refuses it. What
appends and reads is the real backplane. Each client is answered once: with the position of its own
message, or that it is not known; and whoever leaves is let go after all that it said before.
"""

import asyncio
from enum import Enum, auto
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from websocket_relay.backplane import replicated
from websocket_relay.backplane.codec import unpack
from websocket_relay.backplane.interface import BackplaneState, LogEntry, Position
from websocket_relay.backplane.replicated import BrokerError, ReplicatedBackplane, StreamEntry

from tests.support.logs_kept import Pending

pytestmark = pytest.mark.fast

APPEND_TURNS = 3
"""Turns of the event loop that an append takes."""

MANY_TURNS = 50


class Step(Enum):
    """What may happen."""

    SAY = auto()  # a client says something, and waits for it
    LEAVE = auto()  # a client waits for all that was said
    READ = auto()  # the next entry is read
    TURN = auto()  # the event loop goes on: an append is answered
    OUTAGE = auto()  # an outage begins
    CONFIRM = auto()  # from now on appends are confirmed
    LOSE_ANSWER = auto()  # they are done, and not confirmed
    TAKE_LATE = auto()  # they are done later, and not confirmed
    REFUSE = auto()  # they are not done
    ARRIVE = auto()  # what was taken late is done


class Broker:
    """A stream in a list."""

    max_entry_bytes = 1_048_576

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.late: list[bytes] = []
        self.does = Step.CONFIRM

    async def append(self, data: bytes) -> None:
        await asyncio.sleep(0)
        if self.does in {Step.CONFIRM, Step.LOSE_ANSWER}:
            self.entries.append(data)
        elif self.does is Step.TAKE_LATE:
            self.late.append(data)
        if self.does is not Step.CONFIRM:
            raise BrokerError("no answer")


def backplane_on(broker: Broker, pending: Pending, *, relays_locally: bool) -> ReplicatedBackplane:
    return ReplicatedBackplane(
        broker,  # type: ignore[arg-type]
        address="model",
        pending=pending,
        relays_locally=relays_locally,
        max_message_bytes=1000,
        describe=lambda: b"",
        observe_append=lambda _: None,
        observe_lag=lambda _: None,
    )


class Sayer:
    """A client with one message. It leaves where that can't be relayed, as WebSocket clients do."""

    def __init__(self, run: "Run", name: bytes) -> None:
        self.name = name
        self.answers: list[Position | None] = []
        self.is_refused = self.is_in_doubt = False
        self._run = run

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        self.is_refused, self.is_in_doubt = not is_unconfirmed, is_unconfirmed
        self._run.leave()


class Run:
    """One replica, those who wait there, and what it delivered."""

    def __init__(self, *, relays_locally: bool) -> None:
        self.broker = Broker()
        self.read = 0
        self.sayers: list[Sayer] = []
        self.delivered: dict[bytes, Position] = {}
        self.leaving = self.left = 0
        self.owed: list[tuple[list[Sayer], set[bytes]]] = []  # to who left, and what was delivered
        self.pending = Pending()
        self.backplane = backplane_on(self.broker, self.pending, relays_locally=relays_locally)
        self.backplane.consume(self._deliver, lambda _: None)
        self.backplane._send_heartbeat(1.0)

    def _deliver(self, entry: LogEntry) -> None:
        assert entry.payload not in self.delivered, "delivered twice"
        self.delivered[entry.payload] = entry.position

    def say(self) -> None:
        sayer = Sayer(self, b"%d" % len(self.sayers))
        self.sayers.append(sayer)
        self.backplane.append_batch("news", [(1, sayer.name)], sayer)
        self.backplane.when_delivered(sayer.answers.append)

    def leave(self) -> None:
        self.leaving += 1
        self.backplane.when_settled(partial(self._let_go, [*self.sayers]))

    def _let_go(self, sayers: list[Sayer]) -> None:
        self.left += 1
        self.owed.append((sayers, {*self.delivered}))

    def read_one(self) -> None:
        if self.read < len(self.broker.entries):
            self.read += 1
            data = self.broker.entries[self.read - 1]
            self.backplane.on_entry(StreamEntry((1, self.read), data, follows=True))

    def arrive(self) -> None:
        self.broker.entries += self.broker.late
        self.broker.late.clear()

    async def take(self, step: Step) -> None:
        """Let something happen."""
        match step:
            case Step.SAY:
                self.say()
            case Step.LEAVE:
                self.leave()
            case Step.READ:
                self.read_one()
            case Step.TURN:
                await turn(APPEND_TURNS)
            case Step.OUTAGE if self.backplane.state is not BackplaneState.OUTAGE:
                self.backplane._start_outage(1.0)
            case Step.ARRIVE:
                self.arrive()
            case Step.CONFIRM | Step.LOSE_ANSWER | Step.TAKE_LATE | Step.REFUSE:
                self.broker.does = step

    async def end(self) -> None:
        """Let the broker work again, and all be read."""
        self.broker.does = Step.CONFIRM
        self.arrive()
        await turn(MANY_TURNS)
        self.backplane._send_heartbeat(1.0)
        await turn(MANY_TURNS)
        while self.read < len(self.broker.entries):
            self.read_one()

    def check(self) -> None:
        """See that everyone was told what is true, once and in time."""
        for sayer in self.sayers:
            (position,) = sayer.answers
            assert position in {None, self.delivered.get(sayer.name)}
            assert not (sayer.is_refused and sayer.name in self.delivered)
            assert position is None or not (sayer.is_refused or sayer.is_in_doubt)
        assert self.left == self.leaving
        for sayers, delivered in self.owed:
            for sayer in sayers:
                is_late = sayer.name in self.delivered and sayer.name not in delivered
                assert sayer.is_in_doubt or not is_late, "let go too early"
        assert self.pending.bytes == 0
        assert self.lost_without() == 0, "what was given up is no loss"

    def lost_without(self, *payloads: bytes) -> int:
        """Return how many messages another replica misses that does not read those with these."""
        other = backplane_on(Broker(), Pending(), relays_locally=False)
        other.consume(lambda _: None, lambda _: None)
        for number, data in enumerate(self.broker.entries):
            if not set(payloads) & set(unpack(data).payloads):
                other.on_entry(StreamEntry((1, number), data, follows=True))
        return other.counters.lost


async def turn(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


OFTEN = (Step.SAY, Step.TURN, Step.READ)
STEPS = st.sampled_from([*Step, *2 * OFTEN])


async def run_through(steps: list[Step], *, relays_locally: bool) -> None:
    run = Run(relays_locally=relays_locally)
    writing = asyncio.create_task(run.backplane._write())
    try:
        for step in steps:
            await run.take(step)
        await run.end()
        run.check()
    finally:
        writing.cancel()
        await asyncio.wait([writing])


async def no_pause(pause_s: float) -> float:
    await asyncio.sleep(0)
    return pause_s


@pytest.fixture(scope="module", autouse=True)
def impatience() -> Any:
    """Repeat appends in the next turn of the event loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicated, "_pause", no_pause)
        yield


REFUSED_AFTER_A_CONFIRMED_ONE = [
    Step.SAY, Step.TURN, Step.REFUSE, Step.SAY, Step.TURN, Step.OUTAGE
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@example(steps=REFUSED_AFTER_A_CONFIRMED_ONE, relays_locally=False)
@given(steps=st.lists(STEPS, min_size=5, max_size=40), relays_locally=st.booleans())
def test_everyone_who_waits_is_told_what_is_true_once_and_in_time(
    steps: list[Step], relays_locally: bool
) -> None:
    asyncio.run(run_through(steps, relays_locally=relays_locally))


async def test_what_was_lost_before_an_outage_is_missed_after_it() -> None:
    run = Run(relays_locally=False)
    writing = asyncio.create_task(run.backplane._write())
    try:
        for step in (Step.TURN, Step.SAY, Step.TURN, Step.REFUSE, Step.SAY, Step.OUTAGE):
            await run.take(step)
        await run.end()
    finally:
        writing.cancel()
        await asyncio.wait([writing])
    assert run.lost_without(b"0") == 1
