"""The loads: what the load generator does to a running server, and the values that it measures.

Knows only the names of the servers that a load is for.
"""

import json
import math
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench import prepare
from bench.servers import SERVERS, FailedError, Running

Values = dict[str, Any]

IDLE_CLIENTS = 5000
ARRIVING_CLIENTS = 3000
TLS_CLIENTS = 2000
V1_CLIENTS, V1_CHANNELS = 5000, 10
STORM_CLIENTS = 10_000
WARM_CLIENTS = 200
FEED_BYTES = 1024
CHECKS_TURN_S = 0.6  # short, and many: a twentieth has to be detected on a machine whose own speed
CHECKS_ROUNDS = 40  # varies by more than that within seconds
SETTLE_S = 2.0
ANSWER_TIMEOUT_S = 240.0
LAG_METRIC = "websocket_event_loop_lag_seconds_bucket"


@dataclass(frozen=True, slots=True)
class Generator:
    """How the load generator is called: on which core, for how long at a time."""

    core: int | str  # as `taskset -c` names it
    server_core: int  # -1: none is watched
    scale: float  # of all durations

    @contextmanager
    def started(
        self, mode: str, *servers: Running, beside: Sequence[int] = (), **options: object
    ) -> Iterator[subprocess.Popen[str]]:
        """Start it against servers; its standard input stays open until the load ends.

        Args:
            servers: each has an equal share of the clients.
            beside: processes that work for the servers: their CPU time is read, too.
        """
        if servers[0].server.header:
            options["header"] = servers[0].server.header
        if servers[0].server.tls:
            options["tls"] = 1
        if servers[0].server.v1:
            options["v1"] = servers[0].server.v1
        if servers[0].server.size:
            options["size"] = servers[0].server.size
        pids = (*(pid for server in servers for pid in server.pids), *beside)
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        process = subprocess.Popen(
            [
                *("taskset", "-c", str(self.core), str(prepare.LOADGEN), mode),
                *("--port", ",".join(str(server.port) for server in servers)),
                *("--pid", ",".join(map(str, pids))),
                *("--core", str(self.server_core), *arguments),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def run(
        self, mode: str, *servers: Running, beside: Sequence[int] = (), **options: object
    ) -> Values:
        """Run it to its end, and return its result."""
        with self.started(mode, *servers, beside=beside, **options) as process:
            return result(process)

    def seconds(self, full: float) -> float:
        """Return a duration of the full run, scaled."""
        return max(1.0, full * self.scale)


def result(process: subprocess.Popen[str]) -> Values:
    """Close its standard input, which ends a load that waits for it, and read the result."""
    try:
        output, errors = process.communicate(timeout=ANSWER_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise FailedError("the load generator did not end") from error
    if process.returncode:
        raise FailedError(errors.strip() or f"load generator: exit status {process.returncode}")
    values: Values = json.loads(output.strip().splitlines()[-1])
    return values


def _wait_open(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    if not process.stdout.readline():
        raise FailedError(f"the clients did not connect: {result(process)}")


def _fanout(generator: Generator, server: Running) -> Values:
    return generator.run(
        "closed",
        server,
        listeners=400,
        publishers=100,
        inflight=1,
        warmup=0.7,
        duration=generator.seconds(2),
    )


def _single(generator: Generator, server: Running) -> Values:
    return generator.run(
        "closed",
        server,
        listeners=499,
        publishers=1,
        inflight=1,
        warmup=0.5,
        duration=generator.seconds(2),
    )


def _steady(generator: Generator, server: Running) -> Values:
    return generator.run(
        "open",
        server,
        listeners=450,
        publishers=50,
        rate=200,
        warmup=0.5,
        duration=generator.seconds(3),
    )


def _checks(generator: Generator, server: Running) -> Values:
    return generator.run(
        "closed",
        server,
        listeners=400,
        publishers=100,
        inflight=1,
        warmup=0.3,
        duration=CHECKS_TURN_S,
    )


def _v1_queue(generator: Generator, server: Running) -> Values:
    """Ten messages of each publisher in flight: whom a server serves first does not matter."""
    return generator.run(
        "closed",
        server,
        listeners=400,
        publishers=100,
        inflight=10,
        warmup=0.3,
        duration=CHECKS_TURN_S,
    )


def _checks_single(generator: Generator, server: Running) -> Values:
    return generator.run(
        "closed",
        server,
        listeners=499,
        publishers=1,
        inflight=1,
        warmup=0.3,
        duration=CHECKS_TURN_S,
    )


def _compression(generator: Generator, server: Running) -> Values:
    values = generator.run(
        "closed",
        server,
        listeners=400,
        publishers=100,
        inflight=1,
        size=FEED_BYTES,
        json=1,
        deflate=1,
        warmup=1,
        duration=generator.seconds(2),
    )
    compressed = values["received"] if server.server.deflates else 0
    if values["deflated"] != compressed:
        raise FailedError(f"{values['deflated']} messages compressed, expected {compressed}")
    return values | {"bytes_per_delivery": values["bytes"] / max(1, values["received"])}


def _idle(generator: Generator, server: Running) -> Values:
    return _hold_idle(generator, server, IDLE_CLIENTS)


def _v1_idle(generator: Generator, server: Running) -> Values:
    """Measure clients without a channel, then the same with some."""
    empty = _hold_idle(generator, server, V1_CLIENTS, channels=0)
    subscribed = _hold_idle(generator, server, V1_CLIENTS, channels=V1_CHANNELS)
    added = subscribed["private_bytes_after"] - empty["private_bytes_after"]
    return empty | {
        "subscribed": subscribed,
        "bytes_per_channel": added / V1_CLIENTS / V1_CHANNELS,
    }


def _tls_idle(generator: Generator, server: Running) -> Values:
    return _hold_idle(generator, server, TLS_CLIENTS)


def _hold_idle(generator: Generator, server: Running, count: int, **options: Any) -> Values:
    generator.run("idle", server, clients=WARM_CLIENTS, hold=0, **options)
    time.sleep(SETTLE_S / 2)
    before = server.private_bytes()
    with generator.started("idle", server, clients=count, **options) as process:
        _wait_open(process)
        time.sleep(SETTLE_S)
        after = server.private_bytes()
        values = result(process)
    return values | {
        "private_bytes_before": before,
        "private_bytes_after": after,
        "bytes_per_connection": (after - before) / count,
    }


def _handshakes(generator: Generator, server: Running) -> Values:
    return generator.run(
        "handshakes", server, clients=ARRIVING_CLIENTS, warmup=WARM_CLIENTS, hold=0, browser=1
    )


def _tls_single(generator: Generator, server: Running) -> Values:
    return _to_300(generator, server, in_flight=1)


def _tls_queue(generator: Generator, server: Running) -> Values:
    return _to_300(generator, server, in_flight=64)


def _to_300(generator: Generator, server: Running, in_flight: int) -> Values:
    return generator.run(
        "closed",
        server,
        listeners=299,
        publishers=1,
        inflight=in_flight,
        warmup=0.5,
        duration=generator.seconds(2),
    )


def _tls_arrivals(generator: Generator, server: Running) -> Values:
    return _arrive(generator, server, resume=0)


def _tls_resumed(generator: Generator, server: Running) -> Values:
    return _arrive(generator, server, resume=1)


def _arrive(generator: Generator, server: Running, resume: int) -> Values:
    values = generator.run(
        "handshakes",
        server,
        clients=TLS_CLIENTS,
        warmup=WARM_CLIENTS,
        hold=0,
        browser=1,
        resume=resume,
    )
    expected = TLS_CLIENTS if resume else 0
    if values["resumed"] < expected:
        raise FailedError(f"{values['resumed']} sessions resumed, expected {expected}")
    return values


def _tls_storm(generator: Generator, server: Running) -> Values:
    return generator.run("handshakes", server, clients=STORM_CLIENTS, warmup=WARM_CLIENTS, hold=0)


def _stall(generator: Generator, server: Running) -> Values:
    window_s = generator.seconds(7)
    with generator.started(
        "open",
        server,
        listeners=IDLE_CLIENTS - 1,
        publishers=1,
        rate=1,
        spin=0,
        warmup=1,
        duration=window_s + 1,
    ) as messages:
        _wait_open(messages)
        lag_before = _lag_buckets(server)
        probed = generator.run("probe", server, rate=1000, duration=window_s)
        lag_after = _lag_buckets(server)
        values = result(messages) | {"pong": probed["pong"], "probe": probed}
    if probed["unanswered"]:
        raise FailedError(f"{probed['unanswered']} of {probed['pings']} pings were not answered")
    if lag_before and lag_after:
        values["loop_lag"] = _lag(lag_before, lag_after)
    return values


def _lag_buckets(server: Running) -> dict[float, float]:
    """Read the event-loop lag histogram of a server that has one: upper edge to count."""
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text: str = answer.read().decode()
    except (urllib.error.URLError, TimeoutError):
        return {}
    buckets = {}
    for line in text.splitlines():
        if line.startswith(LAG_METRIC):
            edge, _, count = line.partition('le="')[2].partition('"} ')
            buckets[float(edge)] = float(count)
    return buckets


def _lag(before: dict[float, float], after: dict[float, float]) -> Values:
    """Return the upper edges of the buckets with the quantiles of the observations in between."""
    added = {edge: after[edge] - before.get(edge, 0.0) for edge in sorted(after)}
    total = added.get(math.inf, 0.0)
    edges = {
        name: next((edge for edge, count in added.items() if count >= total * share), math.inf)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }
    finite = {name: (edge if math.isfinite(edge) else None) for name, edge in edges.items()}
    return {"samples": total, **finite, "buckets": {str(e): c for e, c in added.items()}}


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a load's result: its path, how it is printed, which way is better."""

    path: str  # keys, with dots between
    title: str
    unit: str
    factor: float = 1.0
    more_is_better: bool = False

    def value(self, result: Values) -> float | None:
        """Take it from a result, in its unit; None where a server does not have it."""
        at: Any = result
        for key in self.path.split("."):
            at = at.get(key) if isinstance(at, dict) else None
        return None if at is None else float(at) * self.factor


ALL_BUT_VARIANTS = tuple(server.name for server in SERVERS if not server.variant)


@dataclass(frozen=True, slots=True)
class Load:
    """One load: what is done, the figure that is judged, and others beside it."""

    name: str
    title: str
    run: Callable[[Generator, Running], Values]
    main: Figure
    others: tuple[Figure, ...] = ()
    messages: bool = True  # it sends messages, so loss is counted
    spread: tuple[Figure, Figure] | None = None  # least and most, where the main is a quantile
    rounds: int = 5
    servers: tuple[str, ...] = ALL_BUT_VARIANTS


_RATE = Figure("deliveries_per_s", "deliveries per second", "M/s", 1e-6, True)
_PER_CPU = Figure("deliveries_per_cpu_s", "deliveries per server-CPU-second", "M", 1e-6, True)
_P50 = Figure("latency.p50", "latency p50", "ms", 1e3)
_P99 = Figure("latency.p99", "latency p99", "ms", 1e3)
_MAX = Figure("latency.max", "latency max", "ms", 1e3)
_PONG_P50 = Figure("pong.p50", "pong p50", "ms", 1e3)
_PONG_MAX = Figure("pong.max", "pong max", "ms", 1e3)
_ARRIVALS = Figure("handshakes_per_s", "handshakes per second", "/s", 1.0, True)
_ARRIVALS_PER_CPU = Figure(
    "handshakes_per_cpu_s", "handshakes per server-CPU-second", "", 1.0, True
)

TLS_SERVERS = ("relay_tls", "gorilla_tls", "nginx_tls")

LOADS = (
    Load(
        "fanout",
        "400 listeners, 100 publishers with one message in flight each",
        _fanout,
        _PER_CPU,
        (_RATE, _P50, _P99, _MAX),
    ),
    Load(
        "single",
        "500 clients, one publisher with one message in flight",
        _single,
        _PER_CPU,
        (_RATE, _P50, _P99, _MAX),
    ),
    Load(
        "steady",
        "500 clients, 50 publishers with 200 messages a second in all",
        _steady,
        _P99,
        (_P50, _MAX, _RATE),
        spread=(_P50, _MAX),
    ),
    Load(
        "idle",
        f"{IDLE_CLIENTS:,} idle clients",
        _idle,
        Figure("bytes_per_connection", "memory per idle connection", "KB", 1 / 1024),
        messages=False,
        rounds=1,  # memory is not noisy, and a second round would include what the first one left
        servers=tuple(name for name in ALL_BUT_VARIANTS if name != "floor"),  # it keeps no state
    ),
    Load(
        "handshakes",
        f"{ARRIVING_CLIENTS:,} clients with a browser's headers arriving as fast as they can",
        _handshakes,
        _ARRIVALS_PER_CPU,
        (_ARRIVALS,),
        messages=False,
        servers=(*ALL_BUT_VARIANTS, "relay_checks"),
    ),
    Load(
        "stall",
        f"one message a second to {IDLE_CLIENTS:,} clients, and 1,000 pings a second",
        _stall,
        Figure("pong.p99", "pong p99, how long the server stalls", "ms", 1e3),
        (_PONG_P50, _PONG_MAX, Figure("loop_lag.p99", "own loop lag p99, at most", "ms", 1e3)),
        spread=(_PONG_P50, _PONG_MAX),
        rounds=2,
    ),
    Load(
        "compression",
        "fanout with 1 KB of JSON in each message, to clients that offer permessage-deflate",
        _compression,
        _PER_CPU,
        (_RATE, Figure("bytes_per_delivery", "bytes on the wire each", "B"), _P50, _P99),
        servers=("relay_deflate", "relay", "textbook", "websockets_deflate", "gorilla_deflate"),
    ),
    Load(
        "checks",
        "fanout again, with a token for every client and all limits on, or without",
        _checks,
        _PER_CPU,
        (_RATE, _P50, _P99),
        rounds=CHECKS_ROUNDS,
        servers=("relay", "relay_checks"),
    ),
    Load(
        "checks_single",
        "single again, with a token for every client and all limits on, or without",
        _checks_single,
        _PER_CPU,
        (_RATE, _P50, _P99),
        rounds=CHECKS_ROUNDS,
        servers=("relay", "relay_checks"),
    ),
    Load(
        "v1",
        "fanout again: plain, listeners of relay.v1, and publishers, too, with acknowledgements",
        _checks,
        _PER_CPU,
        (_RATE, _P50, _P99),
        rounds=CHECKS_ROUNDS,
        servers=("relay", "relay_wide", "relay_v1_listeners", "relay_v1"),
    ),
    Load(
        "v1_queue",
        "ten messages of each publisher in flight: plain, as wide as relay.v1, listeners of it",
        _v1_queue,
        _PER_CPU,
        (_RATE, _P50, _P99),
        rounds=CHECKS_ROUNDS,
        servers=("relay", "relay_wide", "relay_v1_listeners"),
    ),
    Load(
        "v1_single",
        "single again, with relay.v1 or without",
        _checks_single,
        _PER_CPU,
        (_RATE, _P50, _P99),
        rounds=CHECKS_ROUNDS,
        servers=("relay", "relay_v1"),
    ),
    Load(
        "v1_idle",
        f"{V1_CLIENTS:,} idle clients of relay.v1",
        _v1_idle,
        Figure("bytes_per_connection", "memory per idle connection", "KB", 1 / 1024),
        (Figure("bytes_per_channel", "and of each channel", "B"),),
        messages=False,
        rounds=1,
        servers=("relay_v1",),
    ),
    Load(
        "tls_idle",
        f"wss: {TLS_CLIENTS:,} idle clients",
        _tls_idle,
        Figure("bytes_per_connection", "memory per idle connection", "KB", 1 / 1024),
        messages=False,
        rounds=1,
        servers=TLS_SERVERS,
    ),
    Load(
        "tls_single",
        "wss: 300 clients, one publisher with one message in flight",
        _tls_single,
        _PER_CPU,
        (_RATE, _P50, _P99),
        servers=TLS_SERVERS,
    ),
    Load(
        "tls_queue",
        "wss: 300 clients, one publisher with 64 messages in flight",
        _tls_queue,
        _PER_CPU,
        (_RATE, _P50, _P99),
        servers=TLS_SERVERS,
    ),
    Load(
        "tls_handshakes",
        f"wss: {TLS_CLIENTS:,} clients with a browser's headers arriving as fast as they can",
        _tls_arrivals,
        _ARRIVALS_PER_CPU,
        (_ARRIVALS,),
        messages=False,
        servers=(*TLS_SERVERS, "relay_tls_checks"),
    ),
    Load(
        "tls_resumed",
        "wss: the same, with sessions that are resumed",
        _tls_resumed,
        _ARRIVALS_PER_CPU,
        (_ARRIVALS,),
        messages=False,
        servers=TLS_SERVERS,
    ),
    Load(
        "tls_storm",
        f"wss: {STORM_CLIENTS:,} clients with tokens return at once",
        _tls_storm,
        _ARRIVALS,
        (_ARRIVALS_PER_CPU,),
        messages=False,
        rounds=2,
        servers=("relay_tls_checks",),
    ),
)
