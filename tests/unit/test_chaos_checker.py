"""The checker of the chaos runs reports each kind of violation, and nothing in a valid record."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from websocket_relay.backplane.interface import Position

from bench.chaos.checker import (
    HISTORY_FACTOR,
    LEFT_AT_REST,
    MEMORY_SLACK_BYTES,
    judge,
)
from bench.chaos.faults import DELETIONS, WEIGHTS, FaultKind, plan_of
from bench.chaos.observations import (
    Answer,
    ConnectStep,
    Delivered,
    DisconnectStep,
    GapReported,
    Proof,
    Record,
    Rest,
    RosterAnswer,
    RosterAtRest,
    RosterChanged,
    RosterShown,
    Stay,
    Step,
    StopRecord,
    Trace,
    Unsettled,
    name_of,
    named,
    payload_of,
)
from bench.chaos.verdict import Kind, PresenceCounts, RunVerdict

pytestmark = pytest.mark.fast

AT_REST: Mapping[str, float] = {
    "expected_deliveries_total": 10,
    "deliveries_total": 7,
    "drops_total": 3,
    "connections_total": 5,
    "disconnections_total": 5,
    "history_bytes": 1000,
    **dict.fromkeys(LEFT_AT_REST, 0),
}
REST = Rest("r0", AT_REST, 50 << 20, 60 << 20)


def at(number: int) -> Position:
    return Position(1, number, 0)


def message_name(number: int, source: str = "p") -> str:
    return named("c", source, 0, number)


def message(number: int, position: int | None = None) -> Delivered:
    """Deliver message N, at position N by default."""
    return Delivered(message_name(number), at(number if position is None else position))


def messages(*numbers: int) -> list[Delivered]:
    return [message(number) for number in numbers]


def plain(*numbers: int) -> list[Delivered]:
    return [Delivered(message_name(number)) for number in numbers]


def welcome(position: int, since: int | None = None, *, recovered: bool = True) -> ConnectStep:
    return ConnectStep("r0", None if since is None else at(since), recovered, at(position))


def gap(position: int) -> GapReported:
    return GapReported(at(position))


def resuming(*steps: Step) -> Trace:
    return Trace("resuming", "c", True, list(steps))


def shown(*clients: str, count: int | None = None, is_answer: bool = False) -> RosterShown:
    return RosterShown(clients, len(clients) if count is None else count, is_answer)


def joined(client: str) -> RosterChanged:
    return RosterChanged(client, is_joined=True)


def left(client: str) -> RosterChanged:
    return RosterChanged(client, is_joined=False)


def watching(relay: str, *steps: Step) -> Trace:
    """Trace a client that watches who is in the channel."""
    return Trace(f"watcher of {relay}", "c", True, [welcome_of(relay), *steps])


def welcome_of(relay: str) -> ConnectStep:
    return ConnectStep(relay, None, True, at(0))


def answer_of(relay: str, *clients: str, count: int | None = None) -> RosterAnswer:
    return RosterAnswer(relay, "c", clients, len(clients) if count is None else count)


def stay(*proofs: tuple[float, int], closed: bool = False) -> Stay:
    """Let client `a` stay: it sent messages at these times, which got these positions at once."""
    acknowledged = [Proof(sent_at_s, sent_at_s + 0.1, at(number)) for sent_at_s, number in proofs]
    return Stay("a", "c", acknowledged, is_closed_by_client=closed)


GRACE_S = 4.0
SEES_A_LEAVE = watching(
    "r0", shown("a"), *messages(1, 2), left("a"), *messages(3, 4), joined("a"), message(5)
)
"""Client `a` leaves between 2 and 3, and joins between 4 and 5."""

SEES_A_STAY = watching("r1", shown("a"), *messages(1, 2, 3, 4, 5))


def presence_of(*traces: Trace, **parts: object) -> Record:
    """Record a run with presence."""
    return record_of(*traces, **{"grace_s": GRACE_S, **parts})  # type: ignore[arg-type]


WITNESS = Trace(
    "witness", "c", True, [ConnectStep("r1", None, True, at(0)), *messages(*range(1, 9))]
)


def record_of(*traces: Trace, keeps_all: bool = True, **parts: object) -> Record:
    """Record a run: a witness received messages 1 to 8, and these traces were observed."""
    record = Record(keeps_all, [WITNESS, *traces])
    for part, value in parts.items():
        setattr(record, part, value)
    return record


def kinds(verdict: RunVerdict) -> set[Kind]:
    return {violation.kind for violation in verdict.violations}


def accepted(number: int, position: str) -> Answer:
    return Answer((message_name(number),), 202, position)


def batch(*numbers: int) -> Answer:
    return Answer(tuple(map(message_name, numbers)), 202, str(at(numbers[-1])))


def other_source(number: int, position: int) -> Delivered:
    return Delivered(message_name(number, "q"), at(position))


READY_BYTES = 50 << 20
TOO_MANY_BYTES = READY_BYTES + MEMORY_SLACK_BYTES + HISTORY_FACTOR * 1000 + 1

VALID: Mapping[str, Record] = {
    "resumed without a gap": record_of(
        resuming(
            welcome(0), *messages(1, 2), DisconnectStep("left"), welcome(2, 2), *messages(3, 4)
        )
    ),
    "a gap before the message after a hole": record_of(
        resuming(welcome(0), *messages(1, 2), gap(3), *messages(4, 5)), keeps_all=False
    ),
    "not recovered, and started after the hole": record_of(
        resuming(welcome(0), *messages(1), welcome(3, 1, recovered=False), *messages(4)),
        keeps_all=False,
    ),
    "a gap without a hole, on a broker that loses": record_of(
        resuming(welcome(0), *messages(1, 2), gap(2), *messages(3)), keeps_all=False
    ),
    "a plain client that reconnected": record_of(
        Trace("plain", "c", False, [welcome(0), *plain(1, 2), welcome(0), *plain(5, 6)])
    ),
    "a plain client on a relay with a loss": record_of(
        Trace("plain", "c", False, [welcome(0), *plain(1, 3)]), relays_with_losses={"r0"}
    ),
    "a plain client on a relay that reported the gap to others": record_of(
        resuming(welcome(0), gap(2), *messages(3)),
        Trace("plain", "c", False, [welcome(0), *plain(1, 3)]),
        keeps_all=False,
    ),
    "answers": record_of(
        answers=[
            accepted(3, "1-3-0"),
            batch(4, 5, 6),
            Answer((message_name(7),), 504),
            Answer((message_name(8),), 0),
            Answer((message_name(20),), 503),
        ]
    ),
    "accepted, and lost with a gap": record_of(
        resuming(welcome(0), *messages(1, 2, 3, 4, 5, 6, 7, 8), gap(9), message(11)),
        answers=[accepted(9, "1-9-0")],
        keeps_all=False,
    ),
    "a copy of a deleted message": record_of(
        resuming(welcome(0), *messages(1, 2), gap(3), *messages(4, 5, 6, 7, 8), message(3, 9)),
        answers=[accepted(3, "1-9-0")],
        keeps_all=False,
    ),
    "joins and leaves alike on two relays": presence_of(
        *(
            watching(
                relay,
                shown("a"),
                *messages(1, 2),
                joined("b"),
                left("a"),
                *messages(3, 4),
                shown("b", is_answer=True),
                left("b"),
                joined("a"),
                *messages(5, 6),
            )
            for relay in ("r0", "r1")
        ),
    ),
    "a watcher that was disconnected while a client left": presence_of(
        SEES_A_LEAVE,
        watching(
            "r1",
            shown("a"),
            *messages(1, 2),
            DisconnectStep("cut off"),
            welcome(2, 2),
            *messages(3, 4),
            shown(),
            joined("a"),
            *messages(5),
        ),
    ),
    "a watcher that missed messages, and no notice": presence_of(
        watching("r0", shown("a"), message(1), gap(3), left("a"), *messages(4, 5)),
        watching("r1", shown("a"), *messages(1, 2), left("a"), *messages(3, 4, 5)),
        keeps_all=False,
    ),
    "a relay that does not know all others yet": presence_of(
        SEES_A_STAY,
        watching("r0", shown(), *messages(1, 2, 3, 4), joined("a"), *messages(5)),
        unsettled=[Unsettled("r0", 0.0, 1.0)],
    ),
    "a relay that has missed the end of another one": presence_of(
        SEES_A_LEAVE,
        SEES_A_STAY,
        watching("r0", shown("a"), *messages(1, 2, 3, 4, 5)),
        unsettled=[Unsettled(relay, 0.0, 1.0, has_all=True) for relay in ("r0", "r1")],
    ),
    "a client that closed its connection, and returned": presence_of(
        SEES_A_LEAVE, stays=[stay((1.0, 1), (1.5, 2), closed=True), stay((2.0, 5))]
    ),
    "a client that was away for the grace": presence_of(
        SEES_A_LEAVE, stays=[stay((1.0, 1), (1.5, 2)), stay((6.0, 5))]
    ),
    "a client of a relay that was frozen for the grace": presence_of(
        SEES_A_LEAVE, stays=[stay((1.0, 1), (1.5, 2), (6.0, 5))]
    ),
    "a client that left after its last message": presence_of(
        SEES_A_LEAVE, stays=[stay((1.0, 1), (1.5, 2))]
    ),
    "a client that returned in time, and left later": presence_of(
        SEES_A_LEAVE, stays=[stay((1.0, 1)), stay((2.0, 2)), stay((9.0, 6))]
    ),
    "a return in time that the relay missed": presence_of(
        SEES_A_LEAVE,
        stays=[stay((1.0, 1)), stay((2.0, 5))],
        unsettled=[Unsettled("r0", 0.0, 1.0)],
    ),
    "a leave that no message follows": presence_of(
        watching("r0", shown("a"), *messages(1, 2), left("a")),
        stays=[stay((1.0, 1), (2.0, 5))],
    ),
    "rosters at rest": presence_of(
        rosters_at_rest=[
            RosterAtRest(answer_of(relay, "a", "b", "stream"), frozenset("ab"), 1)
            for relay in ("r0", "r1")
        ],
        roster_answers=[answer_of("r0", "a"), answer_of("r1")],
    ),
    "relays": record_of(stops=[StopRecord("r0", 0, 1.0, 5.0)], rests=[REST]),
}

VIOLATIONS: Sequence[tuple[Kind, Record]] = [
    (Kind.CONFLICT, record_of(resuming(welcome(2), other_source(1, 3)))),
    (Kind.REPEATED, record_of(resuming(welcome(8), message(3, 9)))),
    (Kind.ORDER, record_of(resuming(welcome(2), *messages(2, 3)))),
    (Kind.ORDER, record_of(Trace("plain", "c", False, [welcome(0), *plain(4, 3)]))),
    (Kind.SOURCE_ORDER, record_of(resuming(welcome(8), message(10, 9), message(9, 10)))),
    (Kind.BATCH, record_of(answers=[batch(4, 6)])),
    (Kind.CHANNEL, record_of(Trace("other", "d", True, [welcome(0), message(1)]))),
    (Kind.CONTENT, record_of(resuming(welcome(0), Delivered("", at(1))))),
    (Kind.DUPLICATE, record_of(resuming(welcome(0), *messages(1, 2), welcome(2, 2), message(2)))),
    (Kind.HOLE, record_of(resuming(welcome(0), *messages(1, 3)))),
    (Kind.HOLE, record_of(resuming(welcome(0), *messages(1), welcome(1, 1), message(3)))),
    (Kind.HOLE, record_of(resuming(welcome(0), message(1), gap(2), *messages(4)))),
    (Kind.HOLE, record_of(Trace("plain", "c", False, [welcome(0), *plain(1, 3)]))),
    (
        Kind.HOLE,  # accepted, and never delivered
        record_of(
            resuming(welcome(8), message(11)), answers=[accepted(9, "1-9-0")], keeps_all=False
        ),
    ),
    (Kind.LATE_GAP, record_of(resuming(welcome(0), *messages(1, 3), gap(2)), keeps_all=False)),
    (
        Kind.LATE_GAP,
        record_of(
            resuming(welcome(0), *messages(1, 3), welcome(3, 3, recovered=False)), keeps_all=False
        ),
    ),
    (Kind.FALSE_ALARM, record_of(resuming(welcome(0), *messages(1, 2), gap(2)))),
    (
        Kind.FALSE_ALARM,
        record_of(resuming(welcome(0), *messages(1, 2), welcome(2, 2, recovered=False))),
    ),
    (
        Kind.WELCOME_BEFORE,
        record_of(
            resuming(welcome(0), *messages(1, 2), welcome(1, 2, recovered=False)), keeps_all=False
        ),
    ),
    (Kind.WELCOME_AHEAD, record_of(resuming(welcome(0), *messages(1, 2), welcome(3, 2)))),
    (Kind.ANSWER, record_of(answers=[accepted(3, "1-4-0")])),
    (Kind.ANSWER, record_of(answers=[accepted(20, "1-4-0")])),
    (Kind.ANSWER, record_of(answers=[accepted(20, "1-20-0"), accepted(21, "1-20-0")])),
    (Kind.ANSWER, record_of(answers=[accepted(3, "1-20-0")])),
    (Kind.ANSWER, record_of(answers=[accepted(3, "1-3--1")])),
    (Kind.REFUSED, record_of(answers=[Answer((message_name(3),), 503)])),
    (Kind.ROSTER, presence_of(SEES_A_STAY, watching("r0", shown(), *messages(1, 2)))),
    (Kind.ROSTER, presence_of(SEES_A_STAY, SEES_A_LEAVE)),
    (
        Kind.ROSTER,  # that another relay is not settled does not count
        presence_of(SEES_A_STAY, SEES_A_LEAVE, unsettled=[Unsettled("r2", 0.0, 1.0)]),
    ),
    (
        Kind.ROSTER,  # it may have more clients, and has less
        presence_of(SEES_A_STAY, SEES_A_LEAVE, unsettled=[Unsettled("r0", 0.0, 1.0, has_all=True)]),
    ),
    (
        Kind.ROSTER,  # settled, once the time is over
        presence_of(SEES_A_STAY, SEES_A_LEAVE, unsettled=[Unsettled("r0", -2.0, -1.0)]),
    ),
    (
        Kind.ROSTER,  # the same clients, notified of in another order
        presence_of(
            watching("r0", shown(), message(1), joined("a"), joined("b"), message(2)),
            watching("r1", shown(), message(1), joined("b"), joined("a"), message(2)),
        ),
    ),
    (
        Kind.ROSTER,  # of a join and a leave between two messages one relay is silent
        presence_of(
            watching("r0", shown(), message(1), joined("a"), left("a"), message(2)),
            watching("r1", shown(), *messages(1, 2)),
        ),
    ),
    (
        Kind.ROSTER,
        presence_of(watching("r0", shown("a"), joined("b"), shown("a", is_answer=True))),
    ),
    (
        Kind.ROSTER,
        presence_of(
            rosters_at_rest=[
                RosterAtRest(answer_of("r0", "one stream"), frozenset(), 1),
                RosterAtRest(answer_of("r1", "another one"), frozenset(), 1),
            ]
        ),
    ),
    (
        Kind.ROSTER_AT_REST,
        presence_of(rosters_at_rest=[RosterAtRest(answer_of("r0", "a"), frozenset("ab"), 0)]),
    ),
    (
        Kind.ROSTER_AT_REST,
        presence_of(rosters_at_rest=[RosterAtRest(answer_of("r0", "a", "b"), frozenset("a"), 0)]),
    ),
    (
        Kind.ROSTER_AT_REST,
        presence_of(rosters_at_rest=[RosterAtRest(answer_of("r0", "a", "b"), frozenset("ac"), 0)]),
    ),
    (Kind.LEFT, presence_of(SEES_A_LEAVE, stays=[stay((1.0, 1), (2.0, 5))])),
    (Kind.LEFT, presence_of(SEES_A_LEAVE, stays=[stay((1.0, 1)), stay((2.0, 5))])),
    (Kind.LEFT, presence_of(SEES_A_LEAVE, stays=[stay((1.0, 2)), stay(), stay((3.0, 3))])),
    (
        Kind.LEFT,  # the watcher has not received the message in between
        presence_of(
            watching("r0", shown("a"), message(1), gap(3), left("a"), message(4)),
            stays=[stay((1.0, 1), (3.0, 2)), stay((5.0, 6))],
            keeps_all=False,
        ),
    ),
    (Kind.ALTERNATION, presence_of(watching("r0", shown("a"), joined("a")))),
    (Kind.ALTERNATION, presence_of(watching("r0", shown(), joined("a"), message(1), joined("a")))),
    (Kind.ALTERNATION, presence_of(watching("r0", shown("a"), left("b")))),
    (Kind.ALTERNATION, presence_of(watching("r0", joined("a"), shown("a")))),
    (
        Kind.ALTERNATION,  # a gap is no reason, nor that the relay may lack a client
        presence_of(
            watching("r0", shown("a"), message(1), gap(2), joined("a"), message(3)),
            unsettled=[Unsettled("r0", 0.0, 1.0)],
            keeps_all=False,
        ),
    ),
    (Kind.TWICE, presence_of(watching("r0", shown("a", "b", "a")))),
    (Kind.TWICE, presence_of(watching("r0", shown("a", count=2)))),
    (Kind.TWICE, presence_of(roster_answers=[answer_of("r0", "a", "a")])),
    (
        Kind.COUNTERS,
        record_of(rests=[replace(REST, counters={**AT_REST, "expected_deliveries_total": 11})]),
    ),
    (
        Kind.COUNTERS,
        record_of(rests=[replace(REST, counters={**AT_REST, "connections_total": 6})]),
    ),
    *(
        (Kind.COUNTERS, record_of(rests=[replace(REST, counters={**AT_REST, counter: 1})]))
        for counter in LEFT_AT_REST
    ),
    (
        Kind.MEMORY,
        record_of(
            rests=[
                replace(
                    REST, ready_rss_bytes=READY_BYTES, end_rss_bytes=READY_BYTES + TOO_MANY_BYTES
                )
            ]
        ),
    ),
    (Kind.STOP, record_of(stops=[StopRecord("r0", None, 6.5, 5.0)])),
    (Kind.STOP, record_of(stops=[StopRecord("r0", 143, 0.1, 5.0)])),
    (Kind.STOP, record_of(stops=[StopRecord("r0", 0, 6.8, 5.0)])),
    (Kind.LOG, record_of(complaints=["r0: KeyError"])),
    (Kind.RUN, record_of(failures=["r0 is not ready"])),
]


@pytest.mark.parametrize("record", VALID.values(), ids=VALID)
def test_a_valid_record_has_no_violation(record: Record) -> None:
    assert judge(record).violations == []


@pytest.mark.parametrize(
    ("kind", "record"),
    VIOLATIONS,
    ids=[f"{kind.value} {n}" for n, (kind, _) in enumerate(VIOLATIONS)],
)
def test_a_violation_is_reported_as_its_kind_and_no_other(kind: Kind, record: Record) -> None:
    assert kinds(judge(record)) == {kind}


def test_there_is_a_record_for_each_kind_of_violation() -> None:
    assert {kind for kind, _ in VIOLATIONS} == set(Kind)


def test_gaps_with_and_without_a_loss_are_counted() -> None:
    trace = resuming(welcome(0), message(1), gap(1), gap(3), *messages(4))
    verdict = judge(record_of(trace, keeps_all=False))
    assert (verdict.false_alarms, verdict.covered_holes) == (1, 2)


def test_what_was_judged_of_presence_is_counted() -> None:
    stays = [
        *(stay((1.0, 1)), stay((2.0, 2), closed=True), stay((3.0, 3))),
        *(stay((20.0, 4)), stay((21.0, 5))),
    ]
    verdict = judge(
        presence_of(
            watching("r0", shown(), *messages(1, 2), joined("b"), *messages(3, 4)),
            watching("r1", shown(), *messages(1, 2), joined("b"), message(3), left("b")),
            watching("r2", shown(), shown(is_answer=True), *messages(1)),
            stays=stays,
            roster_answers=[answer_of("r0", "b")],
            unsettled=[Unsettled("r2", 0.0, 1.0)],
        )
    )
    assert verdict.violations == []
    assert verdict.presence == PresenceCounts(
        joined=2,
        left=1,
        resumed_in_time=2,
        returned_late=2,
        positions=3,
        unsettled=1,
        answers=2,
    )


def test_a_payload_names_its_message_unless_it_was_changed() -> None:
    for size in (0, 20, 1000):
        payload = payload_of(message_name(7), size)
        assert name_of(payload) == message_name(7)
        assert len(payload) >= size
        assert name_of(payload + "x") is None
        assert name_of(payload[:-1]) is None
    assert name_of("") is None


def test_a_seed_makes_one_plan_and_many_seeds_make_all_faults() -> None:
    plans = [plan_of(seed, broker, 45) for broker in ("redis", "nats") for seed in range(20)]
    assert plans == [
        plan_of(seed, broker, 45) for broker in ("redis", "nats") for seed in range(20)
    ]
    assert {fault.kind for plan in plans for fault in plan.faults} == set(FaultKind)
    assert {*WEIGHTS, *DELETIONS} == set(FaultKind)
    assert any(plan.keeps_all for plan in plans)
    for plan in plans:
        deletions = [fault for fault in plan.faults if fault.kind in DELETIONS]
        assert not deletions or not plan.keeps_all
