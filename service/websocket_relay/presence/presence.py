"""Own what this replica announces of its clients, and keep the rosters of all replicas.

It appends entries when its clients join and leave, and states who they are when another replica
asks, or when entries of its own may be lost. Others' ends it declares after their silence. What an
entry means is in `roster`.

Knows no connection, no protocol and no broker.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from websocket_relay.backplane.interface import START, Position
from websocket_relay.cluster.control_log import CLUSTER, ControlEntry, ControlLog, Fields
from websocket_relay.cluster.incarnations import SILENCE_S, Incarnations
from websocket_relay.outcomes import Close
from websocket_relay.patterns import matches_any
from websocket_relay.presence.roster import Change, Person, Rosters, Stated

log = logging.getLogger(__name__)

TICK_S = 0.25
ANSWER_S = 1.5
"""A replica that is alive has sent a heartbeat in this time, and stated who its clients are."""

COMPLETE_S = 5.0
"""A replica that starts does not wait longer for the others."""

TURN_S = 0.5
"""One replica after the other declares the end of a third: one entry is enough."""

PART_PEOPLE = 200
STATEMENT_BYTES = 4


class PresentConnection(Protocol):
    """What presence requires of a client's connection."""

    def close(self, why: Close) -> None:
        """Close the connection."""


class _OwnClient:
    """A client in a channel that is connected to this replica, or was until lately."""

    __slots__ = (
        "absent_until",
        "claimed_at",
        "code",
        "connection",
        "entered_after",
        "entered_at",
        "person",
    )

    def __init__(self, person: Person, connection: PresentConnection) -> None:
        self.person = person
        self.connection: PresentConnection | None = connection  # None: it may resume its session
        self.absent_until = 0.0  # by the clock
        self.code = 0  # with which it was closed
        self.claimed_at = START  # where its entry was read back
        self.entered_after = START  # what this replica had read when it came last
        self.entered_at = 0.0  # when that was, in seconds since 1970


class Presence:
    """The clients in channels with presence, on all replicas.

    Args:
        patterns: of channel names; a `*` at the end stands for any rest.
        grace_s: a client whose connection broke has left after so long; so have the clients of a
            replica that is silent.
        control: the entries.
        incarnations: the replicas.
        is_alone: whether there are no others, and nothing is read at the start.
        is_up: returns whether entries can be appended. In an outage the rosters stand still.
        clock: monotonic time in seconds.

    Attributes:
        rosters: who is in which channel.
        complete: set once all that the other replicas have stated is read.
        listeners: are called with each change, in the order of the log.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        *,
        grace_s: float,
        control: ControlLog,
        incarnations: Incarnations,
        is_alone: bool,
        is_up: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grace_s = grace_s
        self._control = control
        self._incarnations = incarnations
        self._clock = clock
        self.rosters = Rosters()
        self.listeners: list[Callable[[Change], None]] = []
        self._patterns = patterns
        self._is_alone = is_alone
        self._is_up = is_up
        self._own: dict[tuple[str, str], _OwnClient] = {}  # by channel and client
        # Clients that may resume their session: until when, channel and client.
        self._absent: deque[tuple[float, tuple[str, str], _OwnClient]] = deque()
        self._started_at = clock()
        self._asked_at = 0.0  # by the clock; 0: nothing was asked, or all was answered
        self._asked_position = START
        self._answered: set[str] = set()
        self._unclaimed: dict[tuple[str, str], None] = {}  # clients whose entry is lost
        self._must_ask = not is_alone
        self._must_state = False
        self._awake = asyncio.Event()
        self.complete = asyncio.Event()
        if is_alone:
            self.complete.set()
        for kind, handler in (
            ("join", self._on_join),
            ("leave", self._on_leave),
            ("state", self._on_statement),
            ("end", self._on_end),
            ("ask", self._on_question),
        ):
            control.handle(f"presence.{kind}", handler)

    async def run(self) -> None:
        """Do what is due, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(TICK_S):
                    await self._awake.wait()
            except TimeoutError:
                pass
            self._awake.clear()
            self.tick()

    # Clients of this replica

    def covers(self, channel: str) -> bool:
        """Return whether a channel has presence."""
        return matches_any(self._patterns, channel)

    def enter(self, channel: str, person: Person, connection: PresentConnection) -> None:
        """Record that a client has subscribed to a channel here.

        Args:
            channel: with presence.
            person: the client; if it is in the channel already, it stays what it is there.
            connection: of the client; closed if the client moves to another replica.
        """
        key = channel, person.client
        own = self._own.get(key)
        if own is not None and own.connection is connection:
            return  # it subscribes anew, and has not left
        if own is None:
            known = self.rosters.find(channel, person.client)  # at another replica: it moves
            own = self._own[key] = _OwnClient(known or person, connection)
        else:  # It is back. It may have been at another replica, whose claim is not read yet.
            own.connection, own.claimed_at = connection, START
        own.entered_after, own.entered_at = self._control.position, person.since
        self._claim(key)

    def _claim(self, key: tuple[str, str]) -> None:
        """Append that a client is here since it came."""
        channel, _ = key
        own = self._own[key]
        fields = {
            "person": own.person.fields(),
            "after": str(own.entered_after),
            "entered": own.entered_at,
        }
        self._append("join", fields, channel, failed=partial(self._on_claim_lost, key))

    def _on_claim_lost(self, key: tuple[str, str]) -> None:
        # A statement is not enough: it takes no client from the replica that it was at before.
        self._unclaimed[key] = None
        self._wake()

    def exit(
        self,
        channel: str,
        client: str,
        connection: PresentConnection,
        *,
        code: int,
        may_return: bool,
    ) -> None:
        """Record that a subscription of a client has ended.

        Args:
            channel: of the subscription.
            client: id of the client.
            connection: as it was for `enter`; nothing ends if the client has another one.
            code: the close code; 0: the client stays connected.
            may_return: whether it can resume its session.
        """
        key = channel, client
        own = self._own.get(key)
        if own is None or own.connection is not connection:
            return
        own.connection, own.code = None, code
        if may_return and self._grace_s:
            own.absent_until = self._clock() + self._grace_s
            self._absent.append((own.absent_until, key, own))
        else:
            self._leave(key, own)

    def _leave(self, key: tuple[str, str], own: _OwnClient) -> None:
        del self._own[key]
        channel, client = key
        self._append("leave", {"client": client, "code": own.code}, channel)

    # What is due

    def tick(self) -> None:
        """Do what is due now."""
        now = self._clock()
        self._end_absences(now)
        if not self._is_up():
            if (
                now - self._started_at > COMPLETE_S
            ):  # with `on_outage: local`, it serves all the same
                self.complete.set()
            return
        if self._must_ask:
            self._must_ask, self._asked_at = False, now
            self._asked_position = START
            self._append("ask", {})
        unclaimed, self._unclaimed = self._unclaimed, {}
        for key in unclaimed:
            own = self._own.get(key)
            if own is not None and own.connection is not None and own.claimed_at == START:
                self._claim(key)
        if self._must_state:
            self._must_state = False
            self._state()
        if self._asked_at:
            self._check_answers(now)
        self._end_silent()

    def _end_absences(self, now: float) -> None:
        """Let clients leave that have not returned in time."""
        while self._absent and self._absent[0][0] <= now:
            until, key, own = self._absent.popleft()
            is_absent = own.connection is None and own.absent_until == until
            if is_absent and self._own.get(key) is own:
                self._leave(key, own)

    def _state(self) -> None:
        """Append who is here, and who belongs to replicas that are silent."""
        own = [
            Stated(channel, each.person, each.claimed_at)
            for (channel, _), each in self._own.items()
        ]
        self._append_statement(self._incarnations.own, own, is_whole=True)
        alive = self._incarnations.alive(SILENCE_S)
        for incarnation in self.rosters.incarnations():
            if incarnation != self._incarnations.own and incarnation not in alive:
                people = list(self.rosters.of_incarnation(incarnation))
                self._append_statement(incarnation, people, is_whole=False)

    def _append_statement(
        self, incarnation: str, people: Sequence[Stated], *, is_whole: bool
    ) -> None:
        statement = secrets.token_hex(STATEMENT_BYTES)
        seen = str(self._incarnations.position(incarnation))
        starts = range(0, max(1, len(people)), PART_PEOPLE)
        for start in starts:
            part = [
                {"channel": channel, "at": str(claimed_at), **person.fields()}
                for channel, person, claimed_at in people[start : start + PART_PEOPLE]
            ]
            is_last = is_whole and start == starts[-1]
            fields = {"of": incarnation, "seen": seen, "id": statement, "people": part}
            self._append("state", {**fields, "last": is_last})

    def _check_answers(self, now: float) -> None:
        """Become complete once each replica that is alive has answered."""
        waited_s = now - self._asked_at
        if waited_s < ANSWER_S or (self._asked_position == START and waited_s < COMPLETE_S):
            return
        missing = [
            incarnation
            for incarnation in self._incarnations.alive(SILENCE_S)
            if incarnation not in self._answered
            and self._incarnations.position(incarnation) > self._asked_position
        ]
        if missing and waited_s < COMPLETE_S:
            return
        if missing:
            log.warning("presence incomplete", extra={"replicas": len(missing)})
        self._asked_at = 0.0
        self.complete.set()

    def _end_silent(self) -> None:
        """Declare the end of replicas that are silent, if it is this one's turn."""
        alive = sorted(self._incarnations.alive(SILENCE_S))
        turn = alive.index(self._incarnations.own) if self._incarnations.own in alive else 0
        limit_s = max(self._grace_s, SILENCE_S) + turn * TURN_S
        for incarnation in self._incarnations.silent(limit_s):
            if incarnation in self.rosters.incarnations():
                self._append(
                    "end",
                    {"of": incarnation, "seen": str(self._incarnations.position(incarnation))},
                )
                self._incarnations.hush(incarnation)
            else:
                self._incarnations.remove(incarnation)

    # What is read

    def on_gap(self) -> None:
        """Record that entries may be lost, of all replicas."""
        if not self._is_alone and (self._asked_at or self.complete.is_set()):
            self._must_ask = self._must_state = True
            self._reclaim()

    def _on_join(self, entry: ControlEntry) -> None:
        position, channel, fields = entry
        incarnation, person = fields["incarnation"], Person.of(fields["person"])
        if self.rosters.has_ended(incarnation):
            return
        self._incarnations.record_sign(incarnation, position)
        key = channel, person.client
        own = self._own.get(key)
        if own is None or own.connection is None or incarnation == self._incarnations.own:
            self._on_claim(incarnation, Stated(channel, person, position))
        elif self._has_moved_on(own, fields):
            del self._own[key]
            own.connection.close(Close.SESSION_RESUMED)
            if own.claimed_at == START:  # the claim here may be in the log all the same, or follow
                self._restate()
        elif own.claimed_at != START:  # or its claim follows
            own.claimed_at = START
            self._claim(key)
        self._notify(self.rosters.join(incarnation, channel, person, position))

    def _has_moved_on(self, own: _OwnClient, fields: Fields) -> bool:
        """Return whether a client came to another replica, by its claim, later than here.

        Either that one had read of the claim here when the client came. Or neither had read of the
        other: in an outage, or while appends are delayed, claims are not in the order in which the
        client came. Then the time decides. A dead connection would take the client from a live one
        otherwise.
        """
        if START < own.claimed_at <= Position.parse(fields["after"]):
            return True
        there = float(fields["entered"]), str(fields["incarnation"])
        return there > (own.entered_at, self._incarnations.own)

    def _on_claim(self, incarnation: str, stated: Stated) -> None:
        """Record a claim of a client that may be one of this replica."""
        channel, person, claimed_at = stated
        own = self._own.get((channel, person.client))
        if own is None:
            return
        if incarnation == self._incarnations.own:
            own.claimed_at = claimed_at
        elif START < own.claimed_at < claimed_at:  # it has moved on
            del self._own[channel, person.client]
            if own.connection is not None:
                own.connection.close(Close.SESSION_RESUMED)

    def _on_leave(self, entry: ControlEntry) -> None:
        position, channel, fields = entry
        incarnation = fields["incarnation"]
        self._incarnations.record_sign(incarnation, position)
        self._notify(self.rosters.leave(incarnation, channel, fields["client"], fields["code"]))

    def _on_statement(self, entry: ControlEntry) -> None:
        position, _, fields = entry
        incarnation, of, is_last = fields["incarnation"], fields["of"], fields["last"]
        self._incarnations.record_sign(incarnation, position)
        if of != incarnation:
            if self._has_written_since(of, fields["seen"]):
                return  # its clients may have left since; it is alive, and states them itself
            self._incarnations.learn_of(of, Position.parse(fields["seen"]), SILENCE_S)
        people = [
            Stated(each["channel"], Person.of(each), Position.parse(each["at"]))
            for each in fields["people"]
        ]
        for change in self.rosters.state(of, fields["id"], people, is_last=is_last):
            self._notify(change)
        if not self.rosters.has_ended(of) and of != self._incarnations.own:
            for stated in people:
                self._on_claim(of, stated)
        if is_last and self._asked_position != START:
            self._answered.add(of)

    def _on_end(self, entry: ControlEntry) -> None:
        of = entry.fields["of"]
        if self._has_written_since(of, entry.fields["seen"]):  # it is alive
            return
        for change in self.rosters.end(of):
            self._notify(change)
        self._incarnations.remove(of)
        if of == self._incarnations.own:
            log.warning("replica taken for dead")
            self._incarnations.begin_anew()
            self._reclaim()  # a claim of the incarnation that has ended counts for nothing
            self._restate()

    def _on_question(self, entry: ControlEntry) -> None:
        if entry.fields["incarnation"] == self._incarnations.own:
            self._asked_position = entry.position
            self._answered = {self._incarnations.own}
        else:
            self._restate()

    # Inside

    def _has_written_since(self, incarnation: str, seen: str) -> bool:
        """Return whether a replica has written something after what another one had read of it."""
        return self._incarnations.position(incarnation) > Position.parse(seen)

    def _append(
        self,
        kind: str,
        fields: Fields,
        channel: str = CLUSTER,
        failed: Callable[[], None] | None = None,
    ) -> None:
        failed = failed or self._restate
        if self._is_up():
            fields = {"incarnation": self._incarnations.own, **fields}
            self._control.append(f"presence.{kind}", fields, channel, failed)
        else:
            failed()

    def _reclaim(self) -> None:
        """Append soon once more that clients are here whose entry is not read yet."""
        self._unclaimed |= {key: None for key, own in self._own.items() if own.claimed_at == START}

    def _restate(self) -> None:
        """State soon who is here: what was appended before may be lost."""
        self._must_state = True
        self._wake()

    def _wake(self) -> None:
        """Do soon what is due; in an outage, that is after it."""
        if self._is_up():
            self._awake.set()

    def _notify(self, change: Change | None) -> None:
        if change is not None:
            for listener in self.listeners:
                listener(change)
