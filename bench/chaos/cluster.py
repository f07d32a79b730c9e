"""Own the processes of a run: one broker, relays on it, and the proxies between all of them.

Knows how each fault is caused, not when.
"""

import asyncio
import json
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import httpx2
import nats
import redis.asyncio as redis
from nats.errors import Error as NatsError
from nats.js.errors import Error as JetStreamError
from redis.exceptions import RedisError
from websocket_relay.backplane.codec import FormatError, unpack

from bench.chaos.checker import LEFT_AT_REST, STOP_GRACE_S
from bench.chaos.faults import Fault, FaultKind, Plan
from bench.chaos.network import BreakableProxy, Direction
from bench.chaos.observations import Record, Rest, StopRecord, Unsettled, name_of
from bench.servers import FailedError
from tests.support.brokers import Broker, NatsBroker, RedisBroker
from tests.support.programs import ANY_REDIS, NATS, find
from tests.support.relay_process import NO_CA, MetricsPage, RelayProcess
from tests.support.tcp_proxy import HOST

STREAM = "relay"
READS, APPENDS = "reads", "appends"
ROLES: dict[type[Broker], dict[str, bytes]] = {
    RedisBroker: {READS: b"XREAD", APPENDS: b"XADD"},
    NatsBroker: {READS: b"$JS.API.CONSUMER.", APPENDS: b"PUB relay "},
}
"""Text that is part of the requests on each of a relay's connections to the broker."""

POLL_S = 0.05
READY_S = 30.0
ENTRIES_PER_S = 100  # of the stream, about

OPERATOR_S = 2.0
"""After this time without an answer of the broker the operator gives up."""

UNREAD_S = 1.5
"""One relay reads nothing for so long, at most, before an entry is deleted: entries that it has
requested already arrive all the same."""

NEWEST = 4
"""Number of newest entries among which one with a message is searched."""

LATELY_S = 0.6
"""An entry older than this was read over half a second ago by all relays that read."""

SETTINGS: dict[str, Any] = {
    "history": {"max_messages": 100_000, "max_bytes": 64 << 20},
    "keepalive": {"ping_interval_s": 2, "ping_timeout_s": 3},
    "shutdown": {"spread_s": 1, "timeout_s": 5},
}

WITH_PRESENCE = ("c0", "c1")
"""The channels that have presence."""

UNSETTLED_S = {"backplane lost messages": (2.0, 4.0), "presence incomplete": (6.0, 8.0)}
"""Events of a relay that may have missed entries: how long before and after them its rosters may be
incomplete. A loss is detected at the next entry of its producer, which sends a heartbeat each
second; then the others are asked, and as a rule it takes a second until all have answered. One that
did not answer in five seconds is frozen, or cut off, for as long as the longest fault."""

COUNTERS = ("expected_deliveries", "deliveries", "drops", "connections", "disconnections")
BACKPLANE_COUNTERS = (
    "backplane_outages",
    "backplane_gaps",
    "backplane_lost",
    "backplane_duplicates",
)


def broker_for(plan: Plan, directory: Path) -> Broker:
    """Return the broker of a plan, not started."""
    if plan.broker == "redis":
        program = find(*ANY_REDIS)
        if program is None:
            raise FailedError("redis: no server on this machine")
        fsync = "" if plan.persistence == "none" else plan.persistence
        return RedisBroker(program, directory, fsync=fsync)
    program = find(NATS)
    if program is None:
        raise FailedError("nats: no server on this machine")
    return NatsBroker(program, directory, max_payload=plan.max_payload)


@dataclass(slots=True)
class RelaySlot:
    """The place of one relay: its process changes, its address for clients stays.

    Attributes:
        front: between clients and the relay.
        back: between the relay and the broker.
    """

    index: int
    directory: Path
    broker: Broker
    tree: Path | None
    grace_s: float
    record: Record
    now_s: Callable[[], float]
    front: BreakableProxy = field(init=False)
    back: BreakableProxy = field(init=False)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    starts: int = 0
    process: RelayProcess = field(init=False)
    ready_rss_bytes: int = 0
    _watch: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.front = BreakableProxy()
        self.back = BreakableProxy(self.broker.port, ROLES[type(self.broker)])

    @property
    def name(self) -> str:
        """The name of the current process."""
        return f"relay-{self.index}.{self.starts}"

    @property
    def port(self) -> int:
        """The port for clients."""
        return self.front.port

    @property
    def direct_port(self) -> int:
        """The port of the relay itself, without a proxy."""
        return self.process.port

    async def start(self) -> None:
        """Start a process, and route clients to it once it listens."""
        self.starts += 1
        directory = self.directory / self.name
        directory.mkdir(parents=True)
        url = f"{self.broker.schemes[0]}://{HOST}:{self.back.port}"
        presence = {"channels": list(WITH_PRESENCE), "grace_s": self.grace_s}
        backplane = {"url": url, "stream": STREAM}
        settings = {**SETTINGS, "presence": presence, "backplane": backplane}
        env = {"PYTHONPATH": str(self.tree)} if self.tree else None
        self.process = RelayProcess(directory, settings, env)
        self.process.launch()
        await self.process.await_log("relay listening")
        self.front.target = self.process.port
        self._watch = asyncio.create_task(self._await_ready())

    async def _await_ready(self) -> None:
        def is_ready() -> bool:
            return any(event["event"] == "ready" for event in self.process.log_events)

        while not is_ready():  # noqa: ASYNC110 - a thread reads the log
            await asyncio.sleep(POLL_S)
        self.ready_rss_bytes = self.process.rss_bytes()

    async def is_ready(self) -> bool:
        """Return whether the relay accepts clients."""
        with suppress(httpx2.HTTPError, AssertionError):
            async with httpx2.AsyncClient(verify=NO_CA, trust_env=False, timeout=2) as http:
                return (await http.get(self.process.metrics_url("/readyz"))).is_success
        return False

    async def kill(self) -> None:
        """Kill the process, and keep its log."""
        if self._watch is not None:
            self._watch.cancel()
        self.front.target = None
        await asyncio.to_thread(self.process.end)
        lines = self.process.log_lines
        (self.directory / f"{self.name}.log").write_text("\n".join(lines))
        # The last line of a process that was killed may be cut off.
        for line in self.process.unexpected_lines:
            if line is not lines[-1]:
                self.record.complaints.append(f"{self.name}: {_brief(line)}")
        events = self.process.log_events
        if any(event["event"] == "backplane lost messages" for event in events):
            self.record.relays_with_losses.add(self.name)
        self._record_unsettled(events)

    def _record_unsettled(self, events: list[dict[str, Any]]) -> None:
        began = time.time() - self.now_s()
        ready_s = float("inf")
        for event in events:
            at_s = datetime.fromisoformat(event["timestamp"]).timestamp() - began
            if event["event"] == "ready":
                ready_s = at_s
            elif event["event"] in UNSETTLED_S:
                before_s, after_s = UNSETTLED_S[event["event"]]
                until_s = at_s + after_s
                self.record.unsettled += [
                    Unsettled(self.name, at_s - before_s, until_s),
                    Unsettled(self.name, until_s, until_s + self.grace_s, has_all=True),
                ]
        self.record.unsettled.append(Unsettled(self.name, 0.0, ready_s))

    async def stop(self) -> None:
        """Send SIGTERM, and record whether the process ends in time with status 0."""
        limit_s = float(SETTINGS["shutdown"]["timeout_s"])
        started = time.monotonic()
        at_s = self.now_s()
        self.process.signal(signal.SIGTERM)
        status: int | None = None
        while time.monotonic() - started <= limit_s + STOP_GRACE_S and status is None:
            await asyncio.sleep(POLL_S)
            status = self.process.process.poll()
        seconds = time.monotonic() - started
        self.record.stops.append(StopRecord(self.name, status, seconds, limit_s, at_s))
        await self.kill()

    async def rest(self) -> tuple[Rest, dict[str, float]]:
        """Return the counters once they have settled, or after a timeout."""
        deadline = time.monotonic() + READY_S / 2
        while True:
            metrics = await self.process.metrics()
            counters = _counters(metrics)
            settled = counters["deliveries_total"] + counters["drops_total"]
            is_settled = counters["expected_deliveries_total"] == settled
            if is_settled and not any(counters[name] for name in LEFT_AT_REST):
                break
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(4 * POLL_S)
        backplane_counters = {
            name: metrics.value(f"websocket_{name}_total") for name in BACKPLANE_COUNTERS
        }
        rss_bytes = self.process.rss_bytes()
        return Rest(self.name, counters, self.ready_rss_bytes, rss_bytes), backplane_counters


def _counters(metrics: MetricsPage) -> dict[str, float]:
    names = [*(f"{name}_total" for name in COUNTERS), *LEFT_AT_REST, "history_bytes"]
    return {name: metrics.value(f"websocket_{name}") for name in names}


class Cluster:
    """All processes of one run.

    Args:
        directory: for logs and the files of the broker.
        tree: the source tree that relays run from; None: this one.
        log: called with one line for each fault.
    """

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        tree: Path | None,
        record: Record,
        now_s: Callable[[], float],
        log: Callable[[str], None],
    ) -> None:
        self.broker = broker_for(plan, directory / "broker")
        self.slots = [
            RelaySlot(index, directory, self.broker, tree, plan.grace_s, record, now_s)
            for index in range(plan.relays)
        ]
        self.backplane_counters: dict[str, dict[str, float]] = {}
        self._record = record
        self._log = log
        self._broker_lock = asyncio.Lock()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._stack.enter_async_context(self.broker)
            for slot in self.slots:
                await self._stack.enter_async_context(slot.front)
                await self._stack.enter_async_context(slot.back)
            for slot in self.slots:
                await slot.start()
                self._stack.push_async_callback(self._end, slot)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _end(self, slot: RelaySlot) -> None:
        if slot.process.process.poll() is None:
            await slot.kill()

    async def __aexit__(self, *exception: object) -> None:
        await self._stack.aclose()

    async def await_ready(self) -> None:
        """Wait until all relays are ready; record those that do not become ready."""
        deadline = time.monotonic() + READY_S
        for slot in self.slots:
            while not await slot.is_ready():
                if time.monotonic() > deadline:
                    text = f"{slot.name} is not ready {READY_S:g} s after everything was healed"
                    self._record.failures.append(text)
                    break
                await asyncio.sleep(2 * POLL_S)

    async def rest(self) -> None:
        """Record each relay's counters and memory."""
        for slot in self.slots:
            try:
                found, self.backplane_counters[slot.name] = await slot.rest()
            except (httpx2.HTTPError, AssertionError) as error:
                self._record.failures.append(f"{slot.name} shows no metrics: {error!r:.200}")
            else:
                self._record.rests.append(found)

    async def stop(self) -> None:
        """Stop all relays as an operator does."""
        await asyncio.gather(*(slot.stop() for slot in self.slots))

    # Faults

    async def do(self, fault: Fault) -> None:
        """Cause a fault, and end it."""
        target, _, action = fault.kind.partition("_")
        slot = self.slots[fault.relay]
        match target:
            case "relay":
                async with slot.lock:
                    await self._relay(slot, action, fault)
            case "broker" if action in {"kill", "freeze", "stop"}:
                async with self._broker_lock:
                    await self._broker(action, fault)
            case "broker":
                await self._network(slot.back, action, fault)
            case "client":
                await self._network(slot.front, action, fault)
            case _:
                await self._delete(slot, fault)

    async def _relay(self, slot: RelaySlot, action: str, fault: Fault) -> None:
        self._log(f"{slot.name}: {fault}")
        if action == "freeze":
            slot.process.signal(signal.SIGSTOP)
            await asyncio.sleep(fault.duration_s)
            slot.process.signal(signal.SIGCONT)
            return
        await (slot.kill() if action == "kill" else slot.stop())
        await asyncio.sleep(fault.duration_s / 2)
        await slot.start()
        self._log(f"{slot.name}: started")

    async def _broker(self, action: str, fault: Fault) -> None:
        self._log(f"broker: {fault}")
        if action == "freeze":
            await asyncio.to_thread(self.broker.freeze)
            await asyncio.sleep(fault.duration_s)
            self.broker.thaw()
            return
        await asyncio.to_thread(self.broker.kill if action == "kill" else self.broker.stop)
        await asyncio.sleep(fault.duration_s)
        await self.broker.start()
        self._log("broker: started")

    async def _network(self, proxy: BreakableProxy, action: str, fault: Fault) -> None:
        self._log(f"network: {fault}")
        match action:
            case "reset":
                proxy.reset(proxy.connections)
            case "tear":
                proxy.tear()
            case "hold_reads":
                proxy.hold_role(READS)
            case "hold_appends":
                proxy.hold_role(APPENDS)
            case "hold":
                proxy.hold(proxy.connections, Direction.REPLIES)
            case "stall":
                proxy.hold(proxy.connections, *Direction)
            case "mute":
                proxy.lose_client_bytes()
            case "deafen":
                proxy.lose_server_bytes()
            case "partition":
                proxy.partition()
        await asyncio.sleep(fault.duration_s)
        proxy.heal()

    # The operator

    async def _delete(self, slot: RelaySlot, fault: Fault) -> None:
        is_unread = fault.kind is FaultKind.DELETE_UNREAD
        if is_unread:
            slot.back.hold_role(READS)
            await asyncio.sleep(min(fault.duration_s, UNREAD_S))
        lately_s = LATELY_S + 5 * fault.choice if fault.kind is FaultKind.DELETE_OLD else 0.0
        delete = self._delete_redis if isinstance(self.broker, RedisBroker) else self._delete_nats
        deleted = "nothing: the broker does not answer"
        with suppress(OSError, TimeoutError, RedisError, NatsError, JetStreamError):
            async with asyncio.timeout(OPERATOR_S):
                deleted = await delete(lately_s)
        self._log(f"operator: {fault}: deleted {deleted}")
        if is_unread:
            slot.back.heal()

    async def _delete_redis(self, lately_s: float) -> str:
        latest = "+" if not lately_s else f"{round((time.time() - lately_s) * 1000)}"
        async with redis.Redis(port=self.broker.port) as operator:
            found: Any = await operator.xrevrange(STREAM, latest, "-", count=NEWEST)
            for identity, fields in found:
                content = _content(fields.get(b"d", b""))
                if content:
                    await operator.xdel(STREAM, identity)
                    return f"{identity.decode()}: {content}"
        return "nothing: no entry found"

    async def _delete_nats(self, lately_s: float) -> str:
        operator = await nats.connect(self.broker.url, allow_reconnect=False, connect_timeout=1)
        try:
            stream = operator.jetstream(timeout=OPERATOR_S)
            last = (await stream.stream_info(STREAM)).state.last_seq
            last -= round(lately_s * ENTRIES_PER_S)
            for sequence in range(last, max(0, last - NEWEST), -1):
                message = await stream.get_msg(STREAM, sequence)
                content = _content(message.data or b"")
                if content:
                    await stream.delete_msg(STREAM, sequence)
                    return f"{sequence}: {content}"
        finally:
            await operator.close()
        return "nothing: no entry found"


def _brief(line: str) -> str:
    """Return the cause of an error, from a line of the log."""
    try:
        event = json.loads(line)
    except ValueError:
        return line[:200]
    last_line = event.get("exception", "").rpartition("\n")[2]
    return f"{event['event'].strip()}: {last_line}"


def _content(data: bytes) -> str:
    """Return the names of an entry's messages; an empty text where it has none."""
    try:
        payloads = unpack(data).payloads
    except FormatError:
        return "a part"
    return ", ".join(str(name_of(payload.decode().strip('"'))) for payload in payloads)
