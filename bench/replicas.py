"""The command: measures several relays on one broker, with real brokers that it starts.

usage: python -m bench.replicas [--scale S] [--only A,B] [--output DIR]
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from bench import machine, prepare, replicas_report, report
from bench.loads import Generator, Values
from bench.servers import RELAY, ROOT, FailedError, Running, started
from bench.targets import DISTURBED, Measurement
from tests.support.brokers import Broker, NatsBroker, RedisBroker
from tests.support.programs import ANY_REDIS, NATS, find

RESULTS = prepare.HERE / "results"
BROKERS = ("redis", "nats")
BOTH_CORES = "0,1"
SERVER_CORE, CLIENT_CORE = 0, 1
READY_TIMEOUT_S = 20.0
DELIVERY_TIMEOUT_S = 10.0
START_DELAY_S = 0.3  # until all ends of a flood have received its start time
MOST_TRIES = 3
REPEATS = 30  # in one run

TOGETHER = (1, 10, 100, 900)  # messages of one packet; 900 of them are nearly a full one
FLOODS = {  # whether each end writes, or only reads
    "1 writes": (True,),
    "1 writes, 1 listens": (True, False),
    "2 write": (True, True),
}
COUNTS = (1, 2, 4)  # relays
LOADS = {  # clients of each relay, publishers among all clients, messages that each has in flight
    "fanout": (500, 100, 1),
    "single": (500, 1, 1),
    "publish": (4, 4, 256),
}


class End:
    """A process of `bench.ends`."""

    def __init__(self, how: str, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.ends", how, url],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def __enter__(self) -> Self:
        self.answer()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(READY_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send(self, *command: Any) -> None:
        """Send a command; a call of `answer` has to follow."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Values:
        """Wait for the result."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise FailedError(f"an end died with exit status {self._process.wait()}")
        values: Values = json.loads(line)
        return values

    def ask(self, *command: Any) -> Values:
        """Send a command, and wait for the result."""
        self.send(*command)
        return self.answer()


def cpu_seconds(pid: int) -> float:
    """Read the clock of a process: all its threads, user and system (clock_getcpuclockid(3))."""
    return time.clock_gettime((~pid << 3) | 2)


class Watch:
    """Measure the CPU time of other programs while some processes are measured."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._before = self._read()

    def foreign(self, besides_s: float = 0.0) -> float:
        """Return the share of all cores' time that no measured process used.

        Args:
            besides_s: CPU time of measured processes that have ended.
        """
        wall, busy, own = (b - a for a, b in zip(self._before, self._read(), strict=True))
        return max(0.0, busy - own - besides_s) / wall / len(os.sched_getaffinity(0))

    def _read(self) -> tuple[float, float, float]:
        ticks = [int(text) for text in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
        idle = ticks[3] + ticks[4] + ticks[7]  # and waiting for a disk, and the hypervisor's
        busy = (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, sum(map(cpu_seconds, self._pids))


@contextmanager
def broker_of(kind: str, core: int | None = None) -> Iterator[Broker]:
    """Start a broker with persistence as in production: written to disk about every second.

    Args:
        core: the only core that it may use.
    """
    programs, make = {"redis": (ANY_REDIS, RedisBroker), "nats": ((NATS,), NatsBroker)}[kind]
    program = find(*programs)
    if program is None:
        raise FailedError(f"{kind}: no server on this machine")
    allowed = os.sched_getaffinity(0)
    options = {"fsync": "everysec"} if kind == "redis" else {}
    with tempfile.TemporaryDirectory() as directory:
        broker: Broker = make(program, Path(directory), **options)
        os.sched_setaffinity(0, {core} if core is not None else allowed)  # is inherited
        try:
            asyncio.run(broker.start())
        finally:
            os.sched_setaffinity(0, allowed)
        try:
            yield broker
        finally:
            broker.kill()


@contextmanager
def relay_on(url: str, name: str, core: int | str) -> Iterator[Running]:
    """Start a relay, and wait until it is ready."""
    environment = (*RELAY.environment, ("RELAY__BACKPLANE__URL", url))
    with started(replace(RELAY, name=f"relay_{name}", environment=environment), core) as running:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not _is_ready(running):
            if time.monotonic() > deadline:
                raise FailedError(f"relay on {name}: not ready after {READY_TIMEOUT_S} s")
            time.sleep(0.02)
        yield running


def _is_ready(running: Running) -> bool:
    try:
        url = f"http://127.0.0.1:{running.metrics_port}/readyz"
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError):
        return False


@dataclass(slots=True)
class Bench:
    """The measurements of a run, and their results."""

    scale: float
    found: list[Measurement] = field(default_factory=list)
    repeats_left: int = REPEATS

    def seconds(self, full: float) -> float:
        """Return a duration of the full run, scaled."""
        return max(0.3, full * self.scale)

    def rounds(self, full: int) -> range:
        """Return the numbers of so many rounds, scaled."""
        return range(1, 1 + max(1, round(full * self.scale)))

    def record(self, what: str, who: str, number: int, measure: Callable[[], Values]) -> None:
        """Measure, and repeat while other programs use the cores; the calmest try counts."""
        best: Measurement | None = None
        for tries in range(1, MOST_TRIES + 1):
            try:
                found = Measurement(what, who, number, measure(), tries=tries)
            except FailedError as error:
                found = Measurement(what, who, number, {}, str(error), tries)
            if best is None or found.disturbed < best.disturbed:
                best = found
            if best.disturbed <= DISTURBED or not self.repeats_left:
                break
            self.repeats_left -= 1
        assert best is not None
        self.found.append(best)
        print(f"round {number}  {what:<10}  {who:<26}  {best.error or _brief(best)}", flush=True)

    # What a packet costs

    def cost(self) -> None:
        """Append messages together, wait for their delivery: CPU time of replica and broker."""
        for kind in BROKERS:
            with broker_of(kind) as broker, End("log", broker.url) as end:
                self._together(kind, end, broker.pid)
        with End("log", "memory://") as end:
            self._together("memory", end, None)

    def _together(self, kind: str, end: End, broker: int | None) -> None:
        end.ask("together", 1, 0.2)
        for count in TOGETHER:
            measure = partial(self._packet, end, broker, count)
            self.record("cost", f"{kind}: {count} together", 1, measure)

    def _packet(self, end: End, broker: int | None, count: int) -> Values:
        before = cpu_seconds(broker) if broker else 0.0
        values = end.ask("together", count, self.seconds(1))
        after = cpu_seconds(broker) if broker else 0.0
        turns = values["turns"]
        return {
            "messages": count,
            "replica": values["cpu_seconds"] / turns,
            "broker": (after - before) / turns,
            "there_and_back": values["seconds"] / turns,
            **end.ask("codec", count),
        }

    # How long it takes

    def latency(self) -> None:
        """One message after another: bare, through the log, and from client to client."""
        for kind in BROKERS:
            with ExitStack() as stack:
                broker = stack.enter_context(broker_of(kind))
                url = broker.url
                ends = {
                    how: [stack.enter_context(End(how, url)) for _ in range(2)]
                    for how in ("bare", "log")
                }
                relays = [
                    stack.enter_context(relay_on(url, f"{kind}_{i}", BOTH_CORES)) for i in range(2)
                ]
                alone = [stack.enter_context(relay_on("memory://", "memory", BOTH_CORES))]
                ways: dict[str, Callable[[], Values]] = {
                    "bare": partial(self._across, broker.pid, *ends["bare"]),
                    "log": partial(self._across, broker.pid, *ends["log"]),
                    "clients": partial(self._clients, broker.pid, relays),
                    "hops": partial(self._clients, broker.pid, alone),
                }
                for number in self.rounds(9):
                    for how in ways if number % 2 else reversed(ways):
                        self.record("latency", f"{kind}: {how}", number, ways[how])

    def _across(self, broker: int, writer: End, reader: End) -> Values:
        count = int(500 * min(1.0, self.scale))
        watch = Watch(broker, writer.pid, reader.pid)
        writer.ask("steadily", count)
        time.sleep(0.05)
        writer.ask("latencies")
        values = reader.ask("latencies")
        lost = count - values["samples"]
        return {**values, "lost": lost, "server_core_foreign": watch.foreign()}

    def _clients(self, broker: int, relays: Sequence[Running]) -> Values:
        watch = Watch(broker, *(relay.pid for relay in relays))
        generator = Generator(BOTH_CORES, -1, self.scale)
        values = generator.run(
            "open",
            *relays,
            listeners=1,
            publishers=1,
            rate=600,
            spin=0,
            across=1,
            warmup=0.1,
            duration=self.seconds(0.8),
        )
        foreign = watch.foreign(values["client_cpu_seconds"])
        return {**values["latency"], **values, "server_core_foreign": foreign}

    # How much goes through

    def throughput(self) -> None:
        """As many messages as two cores carry: broker, writers and readers on both of them."""
        for kind in BROKERS:
            for name, publishes in FLOODS.items():
                with broker_of(kind) as broker, ExitStack() as stack:
                    ends = [stack.enter_context(End("log", broker.url)) for _ in publishes]
                    for number in self.rounds(3):
                        measure = partial(self._flood, broker.pid, ends, publishes)
                        self.record("throughput", f"{kind}: {name}", number, measure)

    def _flood(self, broker: int, ends: Sequence[End], publishes: Sequence[bool]) -> Values:
        start = time.monotonic() + START_DELAY_S
        stop = start + self.seconds(2)
        for end, publishing in zip(ends, publishes, strict=True):
            end.send("flood", start, stop, publishing)
        time.sleep(max(0.0, start - time.monotonic()))
        before, since = cpu_seconds(broker), time.monotonic()
        watch = Watch(broker, *(end.pid for end in ends))
        time.sleep(max(0.0, stop - time.monotonic()))
        foreign = watch.foreign()
        share = (cpu_seconds(broker) - before) / (time.monotonic() - since)
        answers = [end.answer() for end in ends]
        published = sum(each["published"] for each in answers)
        delivered = _await_delivery(ends, published)
        return {
            "messages_per_s": min(each["delivered_per_s"] for each in answers),
            "cpu_shares": [each["cpu_share"] for each in answers],
            "broker_share": share,
            "server_core_foreign": foreign,
            "lost": sum(max(0, published - each["delivered"]) for each in delivered),
            "duplicated": sum(max(0, each["delivered"] - published) for each in delivered),
        }

    # What a replica's clients get

    def fanout(self) -> None:
        """500 clients of one relay, without a broker and with one, in short turns."""
        with ExitStack() as stack:
            relays = {kind: self._relays(stack, kind, 1) for kind in ("memory", *BROKERS)}
            for number in self.rounds(6):
                for kind in relays if number % 2 else reversed(relays):
                    for load, clients in LOADS.items():
                        measure = partial(self._closed, *relays[kind], *clients)
                        self.record(load, kind, number, measure)

    def several(self) -> None:
        """One, two and four relays on a broker, 500 clients each; all on one core."""
        for kind in BROKERS:
            for count in COUNTS:
                with ExitStack() as stack:
                    relays = self._relays(stack, kind, count)
                    for number in self.rounds(3):
                        measure = partial(self._closed, *relays, *LOADS["fanout"])
                        self.record("several", f"{kind}: {count}", number, measure)

    def _relays(
        self, stack: ExitStack, kind: str, count: int
    ) -> tuple[Sequence[Running], Sequence[int]]:
        """Start relays and their broker on one core; return also the broker's process."""
        url, beside = "memory://", []
        if kind != "memory":
            broker = stack.enter_context(broker_of(kind, SERVER_CORE))
            url, beside = broker.url, [broker.pid]
        relays = [
            stack.enter_context(relay_on(url, f"{kind}_{number}", SERVER_CORE))
            for number in range(count)
        ]
        return relays, beside

    def _closed(
        self,
        relays: Sequence[Running],
        beside: Sequence[int],
        clients: int,
        publishers: int,
        in_flight: int,
    ) -> Values:
        values = Generator(CLIENT_CORE, SERVER_CORE, self.scale).run(
            "closed",
            *relays,
            beside=beside,
            listeners=clients * len(relays) - publishers,
            publishers=publishers,
            inflight=in_flight,
            warmup=0.4,
            duration=self.seconds(1.2),
        )
        for relay in relays:
            relay.settle()
        of_relays = values["cpu_seconds"][: len(relays)]
        return values | {
            "relay_cpu_seconds": of_relays,
            "broker_cpu_seconds": sum(values["cpu_seconds"][len(relays) :]),
            "deliveries_per_relay_cpu_s": values["deliveries"] / sum(of_relays),
        }


def _await_delivery(ends: Sequence[End], published: int) -> list[Values]:
    """Wait until a flood is delivered to all ends, or until a timeout."""
    deadline = time.monotonic() + DELIVERY_TIMEOUT_S
    while True:
        delivered = [end.ask("delivered") for end in ends]
        if all(each["delivered"] >= published for each in delivered) or time.monotonic() > deadline:
            return delivered
        time.sleep(0.05)


def _brief(found: Measurement) -> str:
    """Return the main value, for the terminal."""
    values = found.values
    shown = {
        "cost": lambda: f"{values['replica'] * 1e6:.0f} us of the replica's CPU time",
        "latency": lambda: f"p50 {values['p50'] * 1e6:.0f} us, p99 {values['p99'] * 1e6:.0f} us",
        "throughput": lambda: f"{values['messages_per_s']:,.0f} messages/s",
    }
    per_cpu = "deliveries_per_relay_cpu_s"
    text = shown.get(found.load, lambda: f"{values[per_cpu] / 1e6:.2f} M/CPU-s")()
    note = f"  (disturbed: {found.disturbed:.0%})" if found.disturbed > DISTURBED else ""
    return text + note


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _facts() -> dict[str, Any]:
    facts = machine.facts()
    redis, nats = find(*ANY_REDIS), find(NATS)
    if redis:
        found = re.search(r"v=(\S+)", _output(redis, "--version"))
        facts["versions"]["redis-server"] = found.group(1) if found else None
    if nats:
        facts["versions"]["nats-server"] = _output(nats, "--version").rpartition(" ")[2]
    return facts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.replicas",
        description="Measure several relays on one broker. See bench/README.md.",
        epilog="Only a full run writes to bench/results; any other to bench/build/results.",
    )
    parser.add_argument("--only", metavar="A,B", help=", ".join(PARTS))
    parser.add_argument("--scale", type=float, default=1.0, help="of durations and rounds")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write the result")
    return parser


PARTS: dict[str, Callable[[Bench], None]] = {
    "cost": Bench.cost,
    "latency": Bench.latency,
    "throughput": Bench.throughput,
    "fanout": Bench.fanout,
    "several": Bench.several,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; the exit status is 0 whether or not the targets were met."""
    parser = _parser()
    options = parser.parse_args(arguments)
    chosen = options.only.split(",") if options.only else list(PARTS)
    if not set(chosen) <= PARTS.keys():
        parser.error(f"--only: of {', '.join(PARTS)}")
    if not {SERVER_CORE, CLIENT_CORE} <= os.sched_getaffinity(0):
        parser.error("needs the cores 0 and 1")
    started_at = time.monotonic()
    prepare.loadgen()
    facts = _facts()
    bench = Bench(options.scale)
    for name in chosen:
        PARTS[name](bench)
    facts["seconds"] = time.monotonic() - started_at
    is_full = options.scale == 1.0 and not options.only
    folder = options.output or (RESULTS if is_full else prepare.BUILD / "results")
    folder.mkdir(parents=True, exist_ok=True)
    page = replicas_report.markdown(facts, bench.found)
    print(f"\n{page}")
    document = {
        **facts,
        "targets": [asdict(each) for each in replicas_report.verdicts(bench.found)],
        "measurements": [each.to_json() for each in bench.found],
    }
    (folder / "replicas.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "replicas.md").write_text(page)
    print(f"written: {folder}/replicas.json, {folder}/replicas.md")
    if is_full or not options.only:
        report.draw("replicas_plot", folder / "replicas.png", facts, bench.found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
