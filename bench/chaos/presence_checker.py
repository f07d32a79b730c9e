"""Judge the presence of a run. Pure: a record in, violations out.

Rosters and notices have no position of their own. They are in one order with the messages of their
channel, which have one: so the roster of a watcher is known at each message that it received while
it watched. All watchers of a channel must have the same roster at the same message, on whatever
replica each of them is.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from websocket_relay.backplane.interface import Position

from bench.chaos.observations import (
    ConnectStep,
    Delivered,
    DisconnectStep,
    Proof,
    Record,
    RosterAtRest,
    RosterChanged,
    RosterShown,
    Stay,
    Trace,
)
from bench.chaos.verdict import Kind, PresenceCounts, RunVerdict

SILENCE_MARGIN_S = 1.5
"""Others count the silence of a replica from its latest heartbeat: up to a second before the
message that proves that it was alive, and more where the machine is busy. So much less than the
grace is in time for certain."""

Changes = tuple[tuple[str, bool], ...]
"""Clients that joined (true) or left, in order."""


class Seen(NamedTuple):
    """A watcher at one message.

    Attributes:
        subscriber, relay: the watcher, and the process that it is connected to.
        roster: who is in the channel.
        may_have_more: whether it may have clients that have left.
    """

    subscriber: str
    relay: str
    roster: frozenset[str]
    may_have_more: bool = False


@dataclass(slots=True)
class Departure:
    """A client that was seen to leave, after the message at `after`."""

    client: str
    after: Position
    at_s: float


@dataclass(slots=True)
class Certainty:
    """When a client's return cannot have been noticed, by positions.

    Between two proofs next to each other the client was connected, or away in time: if they are
    close enough, and it did not close its connection itself in between.

    Attributes:
        positions: of its proofs.
        joined_until: for each proof, the last one that it is joined to without interruption.
    """

    positions: list[Position] = field(default_factory=list)
    joined_until: list[Position] = field(default_factory=list)

    def covers(self, after: Position, before: Position) -> bool:
        """Return whether the client was certainly present all the time between two positions."""
        index = bisect_right(self.positions, after) - 1
        return index >= 0 and before <= self.joined_until[index]


class PresenceChecker:
    """Compare the presence in one record with the promises."""

    def __init__(self, record: Record, verdict: RunVerdict) -> None:
        self._record = record
        self._report = verdict.report
        self._counts = verdict.presence
        self._first_seen = _first_seen(record.traces)
        self._certainties = _certainties(record, self._counts)
        self._unsettled: dict[tuple[str, bool], list[tuple[float, float]]] = {}
        for each in record.unsettled:
            window = each.from_s, each.until_s
            self._unsettled.setdefault((each.relay, each.has_all), []).append(window)
        self._seen: dict[Position, Seen] = {}
        self._compared: set[Position] = set()
        # By two messages next to each other on one connection: what its watcher was notified of.
        self._between: dict[tuple[Position, Position], tuple[str, Changes]] = {}

    def check(self) -> None:
        """Check all of it."""
        for trace in self._record.traces:
            Watch(self, trace).follow()
        self._counts.positions = len(self._compared)
        for answer in self._record.roster_answers:
            self._counts.answers += 1
            self.check_answer(
                f"{answer.relay} {answer.channel}", answer.clients, answer.count, answer.at_s
            )
        for rest in self._record.rosters_at_rest:
            self._check_rest(rest)

    def report(self, kind: Kind, text: str, at_s: float) -> None:
        """Report a violation."""
        self._report(kind, text, at_s)

    @property
    def counts(self) -> PresenceCounts:
        """How much was judged."""
        return self._counts

    def check_answer(self, whose: str, clients: Sequence[str], count: int, at_s: float) -> None:
        """Check that each client is listed once, and counted."""
        if len(set(clients)) != len(clients) or count != len(clients):
            self._report(Kind.TWICE, f"{whose}: {count} clients, {sorted(clients)}", at_s)

    def is_settled(self, relay: str, position: Position) -> bool:
        """Return whether the rosters of a relay have to be right at a message.

        A replica that starts does not know the clients of the others before they have stated them,
        which is when it is ready; it admits clients earlier. One that has missed entries, which the
        broker lost or an operator deleted, asks the others to state theirs. Until they have, its
        roster may lack a client, or have one that has left; so has the roster before the loss is
        detected, which is at the next entry of the same producer. The time of an entry is that at
        which any client received it: how late this relay read it does not count, since by then it
        has read the statements before it, too.
        """
        return not self._is_within(position, self._unsettled.get((relay, False), ()))

    def may_have_more(self, relay: str, position: Position) -> bool:
        """Return whether a roster of a relay may have clients that have left.

        What was lost may have been the end of another replica, as a third one has declared it. No
        replica states it again: this one declares it, once that one was silent for the grace.
        """
        return self._is_within(position, self._unsettled.get((relay, True), ()))

    def _is_within(self, position: Position, windows: Iterable[tuple[float, float]]) -> bool:
        at_s = self._first_seen[position]
        return any(from_s <= at_s <= until_s for from_s, until_s in windows)

    def compare(self, position: Position, seen: Seen) -> str:
        """Compare a roster with that of others at the same message; return the difference."""
        if not self.is_settled(seen.relay, position):
            self._counts.unsettled += 1
            return ""
        other = self._seen.setdefault(position, seen)
        if other.may_have_more:  # an exact roster is the better one to compare others with
            self._seen[position] = seen
        if other.relay != seen.relay:
            self._compared.add(position)
        here, there = seen.roster - other.roster, other.roster - seen.roster
        if not (here and not seen.may_have_more) and not (there and not other.may_have_more):
            return ""
        return (
            f"at {position} {seen.subscriber} on {seen.relay} and {other.subscriber} on"
            f" {other.relay}: {sorted(here)} and {sorted(there)} only there"
        )

    def compare_changes(
        self, after: Position, before: Position, watcher: str, changes: Changes
    ) -> str:
        """Compare the notices between two messages with those of others; return the difference."""
        other, theirs = self._between.setdefault((after, before), (watcher, changes))
        if theirs == changes:
            return ""
        return f"{after} to {before}: {watcher} is notified of {changes}, {other} of {theirs}"

    def check_departure(
        self, trace: Trace, relay: str, departure: Departure, before: Position
    ) -> None:
        """Check that a client that was seen to leave may have left, at any place in between."""
        certainty = self._certainties.get((trace.channel, departure.client))
        if certainty is None or not certainty.covers(departure.after, before):
            return
        # The claim of the return may be what the broker lost: see `is_settled`.
        if self.is_settled(relay, before):
            text = (
                f"{departure.client}, between {departure.after} and {before}, seen by"
                f" {trace.subscriber} on {relay}"
            )
            self._report(Kind.LEFT, text, departure.at_s)

    def _check_rest(self, rest: RosterAtRest) -> None:
        answer = rest.answer
        whose = f"{answer.relay} {answer.channel}"
        self.check_answer(whose, answer.clients, answer.count, answer.at_s)
        if not rest.is_true:
            absent = sorted(rest.connected - set(answer.clients))
            others = sorted(set(answer.clients) - rest.connected)
            text = f"{whose}: without {absent}; {len(others)} more, {rest.unnamed} expected"
            self._report(Kind.ROSTER_AT_REST, f"{text}: {others}", answer.at_s)
        same = [
            each.answer
            for each in self._record.rosters_at_rest
            if each.answer.channel == answer.channel
        ]
        if set(same[0].clients) != set(answer.clients):
            self._report(Kind.ROSTER, f"at rest: {whose} and {same[0].relay}", answer.at_s)


class Watch:
    """Follow one watcher through all its connections.

    Each connection begins with a roster, and that alone counts: what the watcher was not notified
    of while it was disconnected is in the roster that it is sent after it. Within a connection
    nothing is forgiven, a gap included: the notices are changes of the roster of its replica,
    whatever that has missed.
    """

    def __init__(self, checker: PresenceChecker, trace: Trace) -> None:
        self._checker = checker
        self._trace = trace
        self._relay = ""
        self._roster: frozenset[str] | None = None  # None: not sent yet
        self._last: Position | None = None  # of the message before
        self._changes: list[tuple[str, bool]] | None = None  # since then; None: not all
        self._departures: list[Departure] = []
        self._differs = False  # already reported

    def follow(self) -> None:
        """Check all steps in their order."""
        for step in self._trace.steps:
            match step:
                case ConnectStep():
                    self._begin(step.relay, step.position)
                case DisconnectStep():
                    self._begin("", None)
                case RosterShown():
                    self._show(step)
                case RosterChanged():
                    self._change(step)
                case Delivered(position=Position() as position):
                    self._deliver(position, step.at_s)

    def _begin(self, relay: str, position: Position | None) -> None:
        # Departures that no message follows are not judged: it is not known until which position
        # they may be. Watchers that stayed have them, too.
        self._relay, self._last = relay, position
        self._roster, self._changes, self._departures = None, None, []

    def _report(self, kind: Kind, text: str, at_s: float) -> None:
        whose = f"{self._trace.subscriber} on {self._relay}"
        self._checker.report(kind, f"{whose}: {text}", at_s)

    def _show(self, step: RosterShown) -> None:
        clients = frozenset(step.clients)
        whose = f"{self._trace.subscriber} on {self._relay}"
        self._checker.check_answer(whose, step.clients, step.count, step.at_s)
        self._checker.counts.answers += step.is_answer
        if self._roster is not None and clients != self._roster:
            text = f"answered {sorted(clients)}, notified of {sorted(self._roster)}"
            self._report(Kind.ROSTER, text, step.at_s)
        self._roster = clients

    def _change(self, step: RosterChanged) -> None:
        counts = self._checker.counts
        counts.joined += step.is_joined
        counts.left += not step.is_joined
        what = f"{step.client} {'joined' if step.is_joined else 'left'}"
        if self._roster is None:
            self._report(Kind.ALTERNATION, f"{what} before the roster was sent", step.at_s)
            return
        if (step.client in self._roster) == step.is_joined:
            state = "there already" if step.is_joined else "not there"
            self._report(Kind.ALTERNATION, f"{what} and was {state}", step.at_s)
        if step.is_joined:
            self._roster |= {step.client}
        else:
            self._roster -= {step.client}
            if self._last is not None:
                self._departures.append(Departure(step.client, self._last, step.at_s))
        if self._changes is not None:
            self._changes.append((step.client, step.is_joined))

    def _deliver(self, position: Position, at_s: float) -> None:
        if self._roster is not None:
            self._compare(position, self._roster, at_s)
            for departure in self._departures:
                self._checker.check_departure(self._trace, self._relay, departure, position)
            self._departures, self._changes = [], []
        self._last = position

    def _compare(self, position: Position, roster: frozenset[str], at_s: float) -> None:
        checker, name = self._checker, self._trace.subscriber
        may_have_more = checker.may_have_more(self._relay, position)
        difference = checker.compare(position, Seen(name, self._relay, roster, may_have_more))
        # The order of notices counts only where a roster has to be right, before and after them.
        last, changes = self._last, self._changes
        is_exact = not difference and not may_have_more
        if is_exact and last is not None and changes is not None:
            ends = (last, position)
            if all(checker.is_settled(self._relay, end) for end in ends):
                difference = checker.compare_changes(last, position, name, tuple(changes))
        if difference and not self._differs:  # once, until it is right again
            checker.report(Kind.ROSTER, difference, at_s)
        self._differs = bool(difference)


def _first_seen(traces: Sequence[Trace]) -> Mapping[Position, float]:
    """Return when any client received a message first."""
    first: dict[Position, float] = {}
    for trace in traces:
        for step in trace.steps:
            if isinstance(step, Delivered) and step.position is not None:
                first[step.position] = min(first.get(step.position, step.at_s), step.at_s)
    return first


def _certainties(record: Record, counts: PresenceCounts) -> Mapping[tuple[str, str], Certainty]:
    """Return when the clients of sessions were certainly present, by channel and client.

    A client has left if its absence lasts for the grace. It begins after the client sent the first
    of two proofs, since its replica received that; and it ends before the second one was answered,
    since the claim is before that in the log. What a client believes of its connection counts for
    nothing: a relay may detect its end earlier, or later. A replica that is frozen or partitioned
    for as long as the grace is declared to have ended; it acknowledges nothing in that time, so its
    clients have no proofs close enough.
    """
    limit_s = record.grace_s - SILENCE_MARGIN_S
    stays: dict[tuple[str, str], list[Stay]] = {}
    for stay in record.stays:
        stays.setdefault((stay.channel, stay.client), []).append(stay)
    certainties = {}
    for client, connections in stays.items():
        proofs = [
            (proof, number) for number, stay in enumerate(connections) for proof in stay.proofs
        ]
        # The log is the order: an answer may arrive after the client has moved on.
        proofs.sort(key=lambda each: each[0].position)
        joins = []
        for (one, its), (two, others) in pairwise(proofs):
            closed = any(stay.is_closed_by_client for stay in connections[its:others])
            is_joined = not closed and _is_in_time(one, two, limit_s)
            joins.append(is_joined)
            if its != others:
                counts.resumed_in_time += is_joined
                counts.returned_late += not is_joined
        certainties[client] = _joined([proof.position for proof, _ in proofs], joins)
    return certainties


def _is_in_time(one: Proof, two: Proof, limit_s: float) -> bool:
    return two.answered_at_s - one.sent_at_s < limit_s


def _joined(positions: list[Position], joins: Sequence[bool]) -> Certainty:
    """Return the certainty of a client by its proofs, and which of them are joined to the next."""
    until = positions.copy()
    for index in range(len(positions) - 2, -1, -1):
        if joins[index]:
            until[index] = until[index + 1]
    return Certainty(positions, until)
