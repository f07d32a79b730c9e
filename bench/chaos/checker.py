"""Judge what a run observed against what the relay promises. Pure: a record in, violations out.

The truth about a channel is every message that any subscriber received, and every message that was
accepted by a 202. A message that the broker lost before any relay read it is in neither, and cannot
be judged.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus

from websocket_relay.backplane.interface import Position

from bench.chaos.observations import (
    Answer,
    ConnectStep,
    Delivered,
    GapReported,
    Record,
    Rest,
    Step,
    StopRecord,
    Trace,
)
from bench.chaos.presence_checker import PresenceChecker
from bench.chaos.verdict import Kind, RunVerdict

MEMORY_SLACK_BYTES = 32 << 20
"""Growth that a relay is allowed beside its history: fragments of what was pending at the worst
moment, which the allocator keeps."""

HISTORY_FACTOR = 2
"""Memory per byte that the history counts, at most."""

STOP_GRACE_S = 1.5
"""Beside `shutdown.timeout_s`, for a machine whose cores are busy."""

LEFT_AT_REST = (
    "connected_clients",
    "channels",
    "backlog_bytes",
    "partial_message_bytes",
    "paused_publishers",
    "backplane_pending_bytes",
)
"""Gauges that are zero once all clients have left."""


@dataclass(slots=True)
class Truth:
    """Which message has which position in one channel."""

    by_position: dict[Position, str] = field(default_factory=dict)
    by_message: dict[str, Position] = field(default_factory=dict)
    positions: list[Position] = field(default_factory=list)  # sorted, once all are known
    copies: set[Position] = field(default_factory=set)  # of messages that have another position

    def between(self, after: Position, before: Position) -> list[Position]:
        """Return the positions strictly between two others."""
        start = bisect_right(self.positions, after)
        return self.positions[start : bisect_left(self.positions, before)]

    def up_to(self, after: Position, last: Position) -> list[Position]:
        """Return the positions after one and up to another."""
        start = bisect_right(self.positions, after)
        return self.positions[start : bisect_right(self.positions, last)]


def judge(record: Record) -> RunVerdict:
    """Check everything that a run observed."""
    checker = Checker(record)
    checker.check()
    return checker.verdict


class Checker:
    """Compare one record with the promises."""

    def __init__(self, record: Record) -> None:
        self.verdict = RunVerdict()
        self._report = self.verdict.report
        self._record = record
        self._truths: dict[str, Truth] = defaultdict(Truth)
        self._gaps_of_relays = _gaps_of_relays(record.traces)

    def check(self) -> None:
        """Check all of it; the verdict has the result."""
        self._check_order()
        for trace in self._record.traces:
            (self._follow if trace.resumes else self._follow_plain)(trace)
        PresenceChecker(self._record, self.verdict).check()
        for stop in self._record.stops:
            self._check_stop(stop)
        for rest in self._record.rests:
            self._check_rest(rest)
        for complaint in self._record.complaints:
            self._report(Kind.LOG, complaint)
        for failure in self._record.failures:
            self._report(Kind.RUN, failure)

    # One order

    def _check_order(self) -> None:
        record = self._record
        for trace in record.traces:
            self._learn(trace)
        for answer in record.answers:
            self._check_answer(answer)
        for truth in self._truths.values():
            truth.positions = sorted(truth.by_position)
            self._check_sources(truth)
        for answer in record.answers:
            self._check_batch(answer)

    def _learn(self, trace: Trace) -> None:
        for step in trace.steps:
            if not isinstance(step, Delivered):
                continue
            if not step.message:
                self._report(Kind.CONTENT, f"{trace.subscriber} at {step.position}", step.at_s)
            elif not step.message.startswith(f"{trace.channel}/"):
                self._report(Kind.CHANNEL, f"{trace.subscriber}: {step.message}", step.at_s)
            elif step.position is not None:
                self._place(self._truths[trace.channel], step.message, step.position, step.at_s)

    def _place(self, truth: Truth, message: str, position: Position, at_s: float) -> None:
        other = truth.by_position.setdefault(position, message)
        if other != message:
            self._report(Kind.CONFLICT, f"{position}: {other} and {message}", at_s)
        elsewhere = truth.by_message.setdefault(message, position)
        if elsewhere == position:
            return
        if self._record.keeps_all:
            self._report(Kind.REPEATED, f"{message}: {elsewhere} and {position}", at_s)
            return
        # A repeated append may be in the log twice. Where the first copy is deleted or lost, relays
        # that had not read it deliver the second one, which the others skip.
        truth.by_message[message], copy = sorted((elsewhere, position))
        truth.by_position.pop(copy, None)
        truth.copies.add(copy)

    def _check_sources(self, truth: Truth) -> None:
        """Check that the messages of one publishing connection kept their order."""
        latest: dict[str, int] = {}
        for position in truth.positions:
            message = truth.by_position[position]
            if truth.by_message[message] != position:
                continue  # a duplicate, which is reported as such
            connection, _, number = message.rpartition(":")
            if int(number) <= latest.get(connection, -1):
                text = f"{connection}: {number} after {latest[connection]}, at {position}"
                self._report(Kind.SOURCE_ORDER, text)
            latest[connection] = int(number)

    # Answers to POST requests

    def _check_answer(self, answer: Answer) -> None:
        truth = self._truths[_channel_of(answer.messages[-1])]
        if answer.status == HTTPStatus.SERVICE_UNAVAILABLE:
            for message in answer.messages:
                if message in truth.by_message:
                    text = f"{message} at {truth.by_message[message]}, refused by {answer.relay}"
                    self._report(Kind.REFUSED, text, answer.at_s)
        elif answer.status == HTTPStatus.ACCEPTED:
            self._check_position(truth, answer)

    def _check_position(self, truth: Truth, answer: Answer) -> None:
        message = answer.messages[-1]
        try:
            position = Position.parse(answer.position)
        except ValueError:
            self._report(Kind.ANSWER, f"{message}: {answer.position!r}", answer.at_s)
            return
        if position in truth.copies:
            return
        there = truth.by_position.get(position, message)
        true = truth.by_message.get(message, position)
        if (there, true) == (message, position):
            truth.by_position[position], truth.by_message[message] = message, position
            return
        found = f"it is at {true}" if message in truth.by_message else "it was never delivered"
        text = f"{message} answered {position} by {answer.relay}; that is {there}, {found}"
        self._report(Kind.ANSWER, text, answer.at_s)

    def _check_batch(self, answer: Answer) -> None:
        """Check that no other message is between the messages of one request."""
        truth = self._truths[_channel_of(answer.messages[-1])]
        found = [truth.by_message[name] for name in answer.messages if name in truth.by_message]
        if len(found) > 1 and len(truth.up_to(found[0], found[-1])) != len(found) - 1:
            self._report(Kind.BATCH, f"{answer.messages[0]} to {found[-1]}", answer.at_s)

    # What clients received

    def _follow(self, trace: Trace) -> None:
        truth, keeps_all = self._truths[trace.channel], self._record.keeps_all
        Follower(self.verdict, trace, truth, keeps_all=keeps_all).follow()

    def _follow_plain(self, trace: Trace) -> None:
        truth = self._truths[trace.channel]
        last: Position | None = None
        relay = ""
        for step in trace.steps:
            if isinstance(step, ConnectStep):
                relay, last = step.relay, None
            elif isinstance(step, Delivered) and step.message in truth.by_message:
                position = truth.by_message[step.message]
                if last is not None and position <= last:
                    if not self._record.keeps_all:
                        continue  # a copy, see `_place`, that no client with positions received
                    text = f"{trace.subscriber}: {step.message} at {position} after {last}"
                    self._report(Kind.ORDER, text, step.at_s)
                elif last is not None and relay not in self._record.relays_with_losses:
                    self._check_plain_hole(trace, relay, truth.between(last, position), step.at_s)
                last = position

    def _check_plain_hole(
        self, trace: Trace, relay: str, missing: list[Position], at_s: float
    ) -> None:
        covered_up_to = self._gaps_of_relays.get(relay)
        for position in missing:
            if covered_up_to is None or position > covered_up_to:
                text = f"{trace.subscriber} (plain) on {relay}: {position} is missing"
                self._report(Kind.HOLE, text, at_s)

    # Relays

    def _check_stop(self, stop: StopRecord) -> None:
        if stop.exit_status != 0 or stop.seconds > stop.limit_s + STOP_GRACE_S:
            ended = "did not end" if stop.exit_status is None else f"status {stop.exit_status}"
            text = f"{stop.relay}: {ended} after {stop.seconds:.1f} s of {stop.limit_s:g}"
            self._report(Kind.STOP, text, stop.at_s)

    def _check_rest(self, rest: Rest) -> None:
        counters = rest.counters
        settled = counters["deliveries_total"] + counters["drops_total"]
        if counters["expected_deliveries_total"] != settled:
            text = (
                f"{rest.relay}: expected {counters['expected_deliveries_total']:g},"
                f" delivered or dropped {settled:g}"
            )
            self._report(Kind.COUNTERS, text)
        if counters["connections_total"] != counters["disconnections_total"]:
            self._report(Kind.COUNTERS, f"{rest.relay}: connections and disconnections differ")
        for name in LEFT_AT_REST:
            if counters[name]:
                self._report(Kind.COUNTERS, f"{rest.relay}: {name} {counters[name]:g}")
        allowed = HISTORY_FACTOR * counters["history_bytes"] + MEMORY_SLACK_BYTES
        if rest.end_rss_bytes - rest.ready_rss_bytes > allowed:
            grown = (rest.end_rss_bytes - rest.ready_rss_bytes) >> 20
            text = f"{rest.relay}: {grown} MiB more than when it was ready; {int(allowed) >> 20}"
            self._report(Kind.MEMORY, f"{text} MiB are allowed")


class Follower:
    """Follow one client that resumes, from its first welcome to its end.

    Args:
        keeps_all: see `Record`.
    """

    def __init__(self, verdict: RunVerdict, trace: Trace, truth: Truth, *, keeps_all: bool) -> None:
        self._verdict = verdict
        self._trace = trace
        self._truth = truth
        self._keeps_all = keeps_all
        self._received = {step.position for step in trace.steps if isinstance(step, Delivered)}
        self._last: Position | None = None  # of the message that was delivered last
        self._covered_up_to: Position | None = None  # messages up to there may be missing

    def follow(self) -> None:
        """Check all steps in their order."""
        for index, step in enumerate(self._trace.steps):
            if isinstance(step, ConnectStep):
                self._connected(step)
            elif isinstance(step, GapReported):
                self._alarmed(step.position, f"gap {step.position}", step.at_s)
            elif isinstance(step, Delivered) and step.position is not None:
                self._delivered(index, step.position, step)

    def _report(self, kind: Kind, text: str, at_s: float) -> None:
        self._verdict.report(kind, f"{self._trace.subscriber}: {text}", at_s)

    def _connected(self, step: ConnectStep) -> None:
        position, since = step.position, step.since
        assert position is not None
        if since is None:
            self._last = position if self._last is None else self._last
            return
        text = f"since {since}, welcome {position} on {step.relay}"
        if position < since:
            self._report(Kind.WELCOME_BEFORE, text, step.at_s)
        elif step.is_recovered and position != since:
            self._report(Kind.WELCOME_AHEAD, text, step.at_s)
        if not step.is_recovered:
            self._alarmed(position, f"not recovered: {text}", step.at_s)

    def _alarmed(self, up_to: Position, text: str, at_s: float) -> None:
        covered, last = self._covered_up_to, self._last
        self._covered_up_to = up_to if covered is None else max(covered, up_to)
        missed = self._truth.up_to(last, up_to) if last is not None else []
        if any(position not in self._received for position in missed):
            return
        self._verdict.false_alarms += 1
        if self._keeps_all:
            self._report(Kind.FALSE_ALARM, text, at_s)

    def _delivered(self, index: int, position: Position, step: Delivered) -> None:
        if self._last is not None and position <= self._last:
            kind = Kind.DUPLICATE if position in self._before(index) else Kind.ORDER
            self._report(kind, f"{step.message} at {position} after {self._last}", step.at_s)
            return
        missing = self._truth.between(self._last, position) if self._last is not None else []
        for hole in missing:
            if self._covered_up_to is not None and hole <= self._covered_up_to:
                self._verdict.covered_holes += 1
            else:
                self._hole(index, hole, step)
        self._last = position

    def _before(self, index: int) -> set[Position | None]:
        steps = self._trace.steps[:index]
        return {each.position for each in steps if isinstance(each, Delivered)}

    def _hole(self, index: int, hole: Position, step: Delivered) -> None:
        text = f"{self._truth.by_position[hole]} at {hole} is missing before {step.position}"
        later = next(_alarms(self._trace.steps[index:], hole), None)
        if later is None:
            self._report(Kind.HOLE, text, step.at_s)
        else:
            late = f"{text}; reported {later.at_s - step.at_s:.2f} s later"
            self._report(Kind.LATE_GAP, late, step.at_s)


def _alarms(steps: Iterable[Step], hole: Position) -> Iterator[GapReported | ConnectStep]:
    """Yield the reports that cover a hole."""
    for step in steps:
        if not isinstance(step, GapReported | ConnectStep):
            continue
        is_report = isinstance(step, GapReported) or not step.is_recovered
        if is_report and step.position is not None and step.position >= hole:
            yield step


def _gaps_of_relays(traces: Iterable[Trace]) -> dict[str, Position]:
    """Return the latest position of a gap that each relay reported to any client."""
    latest: dict[str, Position] = {}
    for trace in traces:
        relay = ""
        for step in trace.steps:
            if isinstance(step, ConnectStep):
                relay = step.relay
            elif isinstance(step, GapReported):
                latest[relay] = max(latest.get(relay, step.position), step.position)
    return latest


def _channel_of(message: str) -> str:
    return message.partition("/")[0]
