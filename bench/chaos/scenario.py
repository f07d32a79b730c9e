"""Run one plan from its start to its verdict: publishers, subscribers, and faults in time."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.chaos.checker import judge
from bench.chaos.clients import (
    EventSubscriber,
    Place,
    PlainPublisher,
    Poster,
    Resuming,
    RosterReader,
    SessionClient,
    SlowSubscriber,
    Subscriber,
    Watcher,
    WebSocketSubscriber,
    wait_until,
)
from bench.chaos.cluster import WITH_PRESENCE, Cluster
from bench.chaos.faults import Fault, FaultKind, Plan
from bench.chaos.observations import (
    ConnectStep,
    Delivered,
    DisconnectStep,
    GapReported,
    Record,
    RosterAtRest,
)
from bench.chaos.verdict import RunVerdict

CHANNELS = ("c0", "c1", "c2", "c3")
JOIN_S = 15.0
CALM_S = 1.0
MARKER_S = 20.0
MARKER_TRIES = 20
POSTERS_PER_CHANNEL = 3
LIMIT_S = 180.0
"""Time limit of a run, besides the time with faults."""

ROSTER_S = 12.0
"""Beside the grace: until a dead connection is detected, and the end of a replica declared."""

ROSTER_POLL_S = 0.25

FLOOD_REQUESTS = 12
FLOOD_BYTES = 400_000


@dataclass(slots=True)
class RunOutcome:
    """The outcome of a run."""

    plan: Plan
    record: Record
    verdict: RunVerdict
    stats: dict[str, Any] = field(default_factory=dict)
    directory: Path | None = None

    @property
    def passed(self) -> bool:
        """Whether every promise was kept."""
        return not self.verdict.violations


class Run:
    """One run.

    Args:
        directory: for logs.
        tree: the source tree that relays run from; None: this one.
        show_event: called with one line for each fault; None: faults go to the log only.
    """

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        tree: Path | None,
        show_event: Callable[[str], None] | None,
    ) -> None:
        self.record = Record(plan.keeps_all, grace_s=plan.grace_s)
        self._plan = plan
        self._directory = directory
        self._show_event = show_event
        self._began = time.monotonic()
        self._events = (directory / "events.log").open("w")
        self._cluster = Cluster(plan, directory, tree, self.record, self.now_s, self._log)
        self._subscribers: list[Subscriber] = []
        self._posters: list[Poster] = []
        self._readers: list[RosterReader] = []
        self._markers: dict[str, set[str]] = {channel: set() for channel in CHANNELS}

    @property
    def places(self) -> Sequence[Place]:
        """Return where clients can connect."""
        return self._cluster.slots

    def now_s(self) -> float:
        """Return seconds since the run's start."""
        return time.monotonic() - self._began

    def _log(self, text: str) -> None:
        line = f"{self.now_s():7.3f} {text}"
        self._events.write(f"{line}\n")
        self._events.flush()
        if self._show_event is not None:
            self._show_event(line)

    async def outcome(self) -> RunOutcome:
        """Run it, and judge what was observed."""
        try:
            async with asyncio.timeout(self._plan.seconds + LIMIT_S), self._cluster:
                await self._clients_and_faults()
                self._log("stopping")
                await self._cluster.stop()
        except (AssertionError, ExceptionGroup, OSError, TimeoutError) as error:
            self.record.failures.append(f"broke off: {error!r:.500}")
        finally:
            self._events.close()
        verdict = judge(self.record)
        outcome = RunOutcome(self._plan, self.record, verdict, self._stats())
        if not outcome.passed:
            self._keep(outcome)
        return outcome

    async def _clients_and_faults(self) -> None:
        await self._cluster.await_ready()
        self._make_clients()
        async with asyncio.TaskGroup() as group:
            for subscriber in self._subscribers:
                group.create_task(subscriber.run())
            await wait_until(lambda: all(each.is_connected for each in self._subscribers), JOIN_S)
            asking = [group.create_task(each.run()) for each in self._readers]
            posting = [group.create_task(each.run()) for each in self._posters]
            self._publish(True)
            await self._break_things()
            self._log("healed")
            await self._cluster.await_ready()
            await asyncio.sleep(CALM_S)
            self._publish(False)
            for poster in self._posters:
                poster.end()
            await asyncio.gather(*posting)
            await self._await_markers()
            await self._await_answers()
            for reader in self._readers:
                reader.end()
            await asyncio.gather(*asking)
            await self._await_rosters()
            for subscriber in self._subscribers:
                subscriber.end()
        for poster in self._posters:
            await poster.close()
        for reader in self._readers:
            await reader.close()
        self._log("at rest")
        await self._cluster.rest()

    def _make_clients(self) -> None:
        seed = self._plan.seed
        for channel in CHANNELS:
            kinds: list[tuple[type[Subscriber], str, dict[str, Any]]] = [
                (WebSocketSubscriber, "steady", {"moves": False}),
                (WebSocketSubscriber, "moving", {"moves": True}),
                (WebSocketSubscriber, "obstinate", {"moves": True, "heeds_gaps": False}),
                (EventSubscriber, "events", {"moves": True}),
                (SlowSubscriber, "slow", {"moves": False}),
                (PlainPublisher, "plain", {"moves": False}),
                (SessionClient, "session", {"moves": False}),
                (SessionClient, "roaming", {"moves": True}),
            ]
            has_presence = channel in WITH_PRESENCE
            for make, kind, options in kinds:
                name = f"{kind}-{channel}-{seed}"
                options["watches"] = has_presence and make is not PlainPublisher
                self._subscribers.append(make(self, name, channel, **options))
            for index in range(len(self.places) if has_presence else 0):
                name = f"watcher{index}-{channel}-{seed}"
                self._subscribers.append(Watcher(self, name, channel, index=index))
            self._posters += [Poster(self, f"post{n}-{channel}-{seed}", channel) for n in range(2)]
            name = f"keyed-{channel}-{seed}"
            is_first = channel == CHANNELS[0]
            self._posters.append(Poster(self, name, channel, repeats=True, runs_curl=is_first))
        self._readers = [RosterReader(self, place, WITH_PRESENCE) for place in self.places]

    def _publish(self, is_on: bool) -> None:
        for subscriber in self._subscribers:
            if isinstance(subscriber, PlainPublisher | SessionClient):
                (subscriber.publishes.set if is_on else subscriber.publishes.clear)()

    # What breaks

    async def _break_things(self) -> None:
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for fault in self._plan.faults:
                group.create_task(_later(began + fault.at_s, self._do(fault)))
        rest_s = began + self._plan.seconds - time.monotonic()
        await asyncio.sleep(max(0.0, rest_s))

    async def _do(self, fault: Fault) -> None:
        if fault.kind is FaultKind.SLOW_CLIENT:
            await self._slow_down(fault)
        else:
            await self._cluster.do(fault)

    async def _slow_down(self, fault: Fault) -> None:
        """Make one client read nothing while megabytes are published to its channel."""
        slow = [each for each in self._subscribers if isinstance(each, SlowSubscriber)]
        subscriber = slow[int(fault.choice * len(slow))]
        self._log(f"{subscriber.trace.subscriber}: {fault}")
        pausing = asyncio.create_task(subscriber.pause(fault.duration_s))
        channel = subscriber.trace.channel
        poster = Poster(self, f"flood{fault.at_s:.3f}", channel)
        with suppress(TimeoutError):
            async with asyncio.timeout(fault.duration_s):
                for _ in range(FLOOD_REQUESTS):
                    await poster.post(self.places[fault.relay], size=FLOOD_BYTES)
        await poster.close()
        await pausing

    # The end

    async def _await_markers(self) -> None:
        """Publish the last message of each channel, and wait until all subscribers have it."""
        markers: dict[str, str] = {}
        for poster in self._posters[::POSTERS_PER_CHANNEL]:
            for _ in range(MARKER_TRIES):
                answer = await poster.post(random.choice(self.places))
                if answer.status == 202:
                    markers[poster.channel] = answer.messages[0]
                    break
                await asyncio.sleep(0.5)
            else:
                text = f"{poster.channel}: nothing can be published after everything was healed"
                self.record.failures.append(text)
        waiting = [each for each in self._subscribers if isinstance(each, Resuming)]

        def late() -> list[Subscriber]:
            return [each for each in waiting if markers.get(each.trace.channel) not in each.names]

        if not await wait_until(lambda: not late(), MARKER_S):
            for each in late():
                marker = markers.get(each.trace.channel)
                text = f"{each.trace.subscriber} is not delivered {marker} in {MARKER_S:g} s"
                self.record.failures.append(text)

    async def _await_answers(self) -> None:
        """Wait until each publish of a session is answered."""
        sessions = self._sessions

        def unanswered() -> list[SessionClient]:
            return [each for each in sessions if each.unanswered]

        if not await wait_until(lambda: not unanswered(), MARKER_S):
            for each in unanswered():
                text = f"{each.trace.subscriber}: {len(each.unanswered)} publishes without answer"
                self.record.failures.append(text)

    async def _await_rosters(self) -> None:
        """Wait until all relays list who is connected, or for as long as that may take."""
        for subscriber in self._subscribers:
            subscriber.settle()
        deadline = self.now_s() + self._plan.grace_s + ROSTER_S
        while True:
            rests = await self._read_rosters()
            if rests is not None and all(each.is_true for each in rests):
                break
            if self.now_s() > deadline:
                break
            await asyncio.sleep(ROSTER_POLL_S)
        if rests is None:
            self.record.failures.append("a relay does not answer who is in its channels")
        else:
            self.record.rosters_at_rest += rests

    async def _read_rosters(self) -> list[RosterAtRest] | None:
        """Return what all relays answer at rest; None: one does not answer."""
        rests = []
        for channel in WITH_PRESENCE:
            for reader in self._readers:
                answer = await reader.ask(channel)
                if answer is None:
                    return None
                present = [
                    each
                    for each in self._subscribers
                    if each.is_connected and each.trace.channel == channel
                ]
                connected = frozenset(each.client for each in present if each.client)
                unnamed = sum(not each.client for each in present)
                rests.append(RosterAtRest(answer, connected, unnamed))
        return rests

    @property
    def _sessions(self) -> list[SessionClient]:
        return [each for each in self._subscribers if isinstance(each, SessionClient)]

    def _stats(self) -> dict[str, Any]:
        record = self.record
        steps = [step for trace in record.traces for step in trace.steps]
        welcomes = [each for each in steps if isinstance(each, ConnectStep) and each.since]
        plain = [each for each in self._subscribers if isinstance(each, PlainPublisher)]
        relays = self._cluster.backplane_counters.values()
        return {
            "sessions": {
                "published": sum(each.published for each in self._sessions),
                "resumed": sum(each.resumed for each in self._sessions),
                "unconfirmed": sum(each.unconfirmed for each in self._sessions),
            },
            "published": sum(each.published for each in plain)
            + sum(len(each.messages) for each in record.answers),
            "delivered": sum(isinstance(each, Delivered) for each in steps),
            "answers": dict(Counter(str(each.status) for each in record.answers)),
            "ends": dict(
                Counter(each.reason for each in steps if isinstance(each, DisconnectStep))
            ),
            "recovered": sum(each.is_recovered for each in welcomes),
            "not_recovered": sum(not each.is_recovered for each in welcomes),
            "gaps": sum(isinstance(each, GapReported) for each in steps),
            "outages": sum(each["backplane_outages"] for each in relays),
            "stops_s": [round(each.seconds, 2) for each in record.stops],
            "grown_mib": [
                round((each.end_rss_bytes - each.ready_rss_bytes) / 2**20, 1)
                for each in record.rests
            ],
            "history_mib": [
                round(each.counters["history_bytes"] / 2**20, 1) for each in record.rests
            ],
            "seconds": round(self.now_s(), 1),
        }

    def _keep(self, outcome: RunOutcome) -> None:
        """Write all observations beside the logs."""
        outcome.directory = self._directory
        violations = [
            f"{each.at_s:7.3f} {each.kind.name}: {each.text}" for each in outcome.verdict.violations
        ]
        (self._directory / "violations.txt").write_text("\n".join(violations) + "\n")
        with (self._directory / "traces.jsonl").open("w") as file:
            for trace in self.record.traces:
                for step in trace.steps:
                    line = [trace.subscriber, type(step).__name__, asdict(step)]
                    file.write(json.dumps(line, default=str) + "\n")
            for kind in ("answers", "stays", "roster_answers", "rosters_at_rest", "unsettled"):
                for each in getattr(self.record, kind):
                    line = [kind, type(each).__name__, asdict(each)]
                    file.write(json.dumps(line, default=list) + "\n")


async def _later(at: float, work: Coroutine[Any, Any, None]) -> None:
    """Run work at a time of the monotonic clock."""
    await asyncio.sleep(max(0.0, at - time.monotonic()))
    await work
