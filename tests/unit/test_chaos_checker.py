"""The checker of the chaos runs reports each kind of violation, and nothing in a valid record."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from websocket_relay.backplane.interface import Position

from bench.chaos.checker import (
    HISTORY_FACTOR,
    LEFT_AT_REST,
    MEMORY_SLACK_BYTES,
    Kind,
    RunVerdict,
    judge,
)
from bench.chaos.faults import DELETIONS, WEIGHTS, FaultKind, plan_of
from bench.chaos.observations import (
    Answer,
    ConnectStep,
    Delivered,
    DisconnectStep,
    GapReported,
    Record,
    Rest,
    Step,
    StopRecord,
    Trace,
    name_of,
    named,
    payload_of,
)

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
