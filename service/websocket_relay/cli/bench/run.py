"""The command `bench`: put a load on a relay and measure it. Knows no server code and no frame."""

import asyncio
import json
import math
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Coroutine
from pathlib import Path
from time import perf_counter_ns, process_time
from typing import Any

from websockets.uri import parse_uri

from websocket_relay.cancellation import cancel_until_done
from websocket_relay.cli.bench.clients import (
    MIN_MESSAGE_BYTES,
    BenchClient,
    BenchMessage,
    connect_all,
)
from websocket_relay.cli.bench.summary import BenchLoad, BenchResult, milliseconds, table
from websocket_relay.cli.bench.tally import Latencies, Slice, Tally
from websocket_relay.cli.common import (
    add_command,
    non_negative_seconds,
    positive_int,
    print_notice,
    run_with_url,
    show_progress,
    shown_url,
    tls_context,
    token_source,
)
from websocket_relay.client.tokens import authorization
from websocket_relay.client.url import RelayUrl
from websocket_relay.outcomes import FAILED, INTERRUPTED

DESCRIPTION = f"""\
Put a load on a relay and measure it.

All clients subscribe to the channel; some of them also publish. With --rate the publishers together
send this number of messages a second, and the latency of a message counts from the time at which it
was due. With --window each publisher has this number of messages in flight and sends the next one
when an echo arrives: as fast as possible. Use a channel of its own: other subscribers receive the
load too. Messages are binary, of {MIN_MESSAGE_BYTES} bytes or more.

All clients run in one process on one core. If that is the bottleneck, the summary reports it: the
result then measures the clients, not the relay."""

EXAMPLES = """\
examples:
  websocket-relay bench ws://localhost:8443/channels/bench
  websocket-relay bench --clients 500 --rate 200 --duration 30 ws://localhost:8443/channels/bench
  websocket-relay bench --window 1 --json bench.json ws://localhost:8443/channels/bench

"""

WARMUP_S = 1.0
PROGRESS_S = 0.5
TICK_S = 0.001
POLL_S = 0.02
TIMER_CHECK_S = 0.005
DRAIN_TIMEOUT_S = 5.0  # for deliveries in flight at the end, from the last one that arrived
DEFAULT_MAX_PUBLISHERS = 10
MAX_DURATION_S = 3_600.0


def add_to(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(
        commands, "bench", "put a load on a relay and measure it", DESCRIPTION, EXAMPLES
    )
    _add_load(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write all results to a file"
    )
    parser.set_defaults(
        run=lambda options: run_with_url(parser, options, bench, loop_factory=_loop_factory())
    )


def _add_load(parser: ArgumentParser) -> None:
    load = parser.add_argument_group("load")
    pace = load.add_mutually_exclusive_group()
    publishers = f"number that also publish (default: a tenth, {DEFAULT_MAX_PUBLISHERS} at most)"
    rate = "messages a second of all publishers together (default: 100)"
    window = "instead of --rate: W messages in flight of each publisher"
    warmup = "seconds under load before the measurement"
    options: list[tuple[Any, str, Callable[[str], float], str, float | None, str]] = [
        (load, "--clients", positive_int, "N", 100, "number of clients, which all subscribe"),
        (load, "--publishers", positive_int, "N", None, publishers),
        (pace, "--rate", positive_int, "R", 0, rate),
        (pace, "--window", positive_int, "W", 0, window),
        (load, "--bytes", _message_bytes, "B", 128, "size of each message"),
        (load, "--duration", _duration, "S", 10.0, "seconds of measurement"),
        (load, "--warmup", non_negative_seconds, "S", WARMUP_S, warmup),
    ]
    for group, name, parse, value, default, text in options:
        shown = f"{text} (default: {default:g})" if default else text
        group.add_argument(name, type=parse, metavar=value, default=default, help=shown)


def _message_bytes(text: str) -> int:
    value = int(text)
    if value < MIN_MESSAGE_BYTES:
        raise ArgumentTypeError(f"must be {MIN_MESSAGE_BYTES} or more")
    return value


def _duration(text: str) -> float:
    value = float(text)
    if not 0 < value <= MAX_DURATION_S:
        raise ArgumentTypeError(f"must be more than 0 and {MAX_DURATION_S:g} at most")
    return value


def load_of(options: Namespace) -> BenchLoad:
    """Return the load that the arguments describe."""
    publishers = options.publishers or min(DEFAULT_MAX_PUBLISHERS, -(-options.clients // 10))
    return BenchLoad(
        clients=max(options.clients, publishers),
        publishers=publishers,
        rate_per_s=options.rate or (0 if options.window else 100),
        window=options.window,
        message_bytes=options.bytes,
        duration_s=options.duration,
        warmup_s=options.warmup,
    )


async def bench(options: Namespace) -> int:
    """Run a load test and print its result; return the exit status."""
    _raise_limit()
    if options.json:
        options.json.touch()  # report a wrong path before the measurement, not after it
    bench_run = BenchRun(load_of(options), show_progress if sys.stderr.isatty() else lambda _: None)
    try:
        await bench_run.connect(options)
        was_interrupted = await _is_interrupted(bench_run.measure())
        if not bench_run.is_measured:
            return INTERRUPTED
        was_interrupted |= await _is_interrupted(bench_run.drain())
    finally:
        bench_run.show("")
    result = bench_run.result()
    url = shown_url(options)
    print(table(url, result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result.as_json(url), indent=2) + "\n")
    if was_interrupted:
        return INTERRUPTED
    return _report_failures(result)


async def _is_interrupted(step: Coroutine[Any, Any, None]) -> bool:
    try:
        await step
    except asyncio.CancelledError:
        return True
    return False


def _report_failures(result: BenchResult) -> int:
    """Print a line for each kind of failure; return the exit status."""
    missing, tally = result.expected_deliveries - result.tally.deliveries, result.tally
    for reason, clients in tally.closed.items():
        print_notice(
            f"{clients} {'client was' if clients == 1 else 'clients were'} closed: {reason}"
        )
    if missing:
        print_notice(f"{missing:,} of {result.expected_deliveries:,} deliveries are missing")
    return FAILED if missing or tally.closed or not tally.deliveries else 0


class BenchRun:
    """One load test.

    Args:
        load: the load.
        show: called with each line of progress.
    """

    def __init__(self, load: BenchLoad, show: Callable[[str], None]) -> None:
        self._load = load
        self.show = show
        self._tally = Tally()
        self._clients: list[BenchClient] = []
        self._publishers: list[BenchClient] = []
        self._is_finished = False
        self._cpu_s = 0.0
        self._cpu_share = 0.0
        self._timer_lag = Latencies()

    async def connect(self, options: Namespace) -> None:
        """Connect all clients.

        Raises:
            RelayError: a client could not connect.
        """
        load = self._load
        RelayUrl.parse(options.url)  # raises if it is invalid
        uri = parse_uri(options.url)
        headers = authorization(token_source(options)())
        layout = BenchMessage.of(load.message_bytes)
        echo_handler = self._send_next if load.window else None
        self._clients = [
            BenchClient(
                number,
                uri,
                headers,
                layout,
                self._tally,
                echo_handler if number < load.publishers else None,
            )
            for number in range(load.clients)
        ]
        self._publishers = self._clients[: load.publishers]
        self.show(f"connecting {load.clients:,} clients")
        await connect_all(uri, tls_context(options), self._clients)

    async def measure(self) -> None:
        """Apply the load for the warm-up and the measurement."""
        load = self._load
        if not load.warmup_s:
            self._start_measurement()  # before the first message: each is counted
        self.show("warming up")
        tasks = [asyncio.create_task(self._measure_timer_lag())]
        if load.rate_per_s:
            tasks.append(asyncio.create_task(self._send_at_rate()))
        for client in self._publishers:
            self._send_next(client, load.window)
        try:
            if load.warmup_s:
                await asyncio.sleep(load.warmup_s)
                self._start_measurement()
            await self._measure_slices()
        finally:
            self._is_finished = True
            await cancel_until_done(*tasks)
            self._update_cpu_share()

    def _start_measurement(self) -> None:
        self._tally.start(perf_counter_ns())
        self._cpu_s = process_time()

    @property
    def is_measured(self) -> bool:
        """Whether the measurement has started, so that there is a result."""
        return self._tally.start_ns > 0

    def result(self) -> BenchResult:
        """Close all clients; return the result."""
        for client in self._clients:
            client.start_close()
        tally = self._tally
        tally.close(PROGRESS_S)
        took_s = max(tally.last_ns - tally.start_ns, 1) / 1e9
        lag_ms = self._timer_lag.quantile_ms(0.99) or 0.0
        return BenchResult(self._load, tally, took_s, self._cpu_share, lag_ms)

    def _update_cpu_share(self) -> None:
        wall_s = (perf_counter_ns() - self._tally.start_ns) / 1e9
        self._cpu_share = (process_time() - self._cpu_s) / wall_s if self._cpu_s else 0.0

    def _send_next(self, client: BenchClient, count: int) -> None:
        if not self._is_finished:
            now_ns = perf_counter_ns()
            for _ in range(count):
                client.send(now_ns)

    async def _send_at_rate(self) -> None:
        """Send each message when it is due, or as soon as possible afterwards."""
        step_ns = 1e9 / self._load.rate_per_s
        start_ns, number = perf_counter_ns(), 0
        while True:
            now_ns = perf_counter_ns()
            while (due_ns := start_ns + int(number * step_ns)) <= now_ns:
                client = self._publishers[number % len(self._publishers)]
                if not client.can_send and not client.is_gone:
                    break  # the relay is late: that counts as latency
                if not client.is_gone:
                    client.send(due_ns)
                number += 1
            await asyncio.sleep(max(TICK_S, (due_ns - now_ns) / 1e9))

    async def _measure_timer_lag(self) -> None:
        """Measure the timer lag of this process, which is a part of all latencies."""
        while True:
            due_ns = perf_counter_ns() + int(TIMER_CHECK_S * 1e9)
            await asyncio.sleep(TIMER_CHECK_S)
            self._timer_lag.note(perf_counter_ns() - due_ns)

    async def _measure_slices(self) -> None:
        slice_count = max(1, round(self._load.duration_s / PROGRESS_S))
        for number in range(1, slice_count + 1):
            due_ns = self._tally.start_ns + int(self._load.duration_s * 1e9 * number / slice_count)
            await asyncio.sleep((due_ns - perf_counter_ns()) / 1e9)
            latest = self._tally.cut(perf_counter_ns())
            self._update_cpu_share()
            self.show(_progress(self._load, latest, self._cpu_share))
            if self._tally.closed.total() == self._load.clients:
                break  # no client is connected any more

    async def drain(self) -> None:
        """Wait for the deliveries in flight, as long as some arrive."""
        expected, received = self._tally.sent * self._load.clients, -1
        # A closed client receives nothing more: some deliveries are certainly missing then.
        timeout_s = DRAIN_TIMEOUT_S if not self._tally.closed else PROGRESS_S
        loop = asyncio.get_running_loop()
        deadline = math.inf
        while self._tally.deliveries < expected:
            if self._tally.deliveries != received:
                received, deadline = self._tally.deliveries, loop.time() + timeout_s
                self.show(f"{expected - received:,} deliveries in flight")
            elif loop.time() > deadline:
                break
            await asyncio.sleep(POLL_S)


def _progress(load: BenchLoad, latest: Slice, cpu_share: float) -> str:
    return (
        f"{latest.at_s:.1f} of {load.duration_s:g} s  {latest.sent_per_s:,.0f} messages/s"
        f"  {latest.deliveries_per_s:,.0f} deliveries/s  p50 {milliseconds(latest.p50_ms)}"
        f"  p99 {milliseconds(latest.p99_ms)}  own CPU {cpu_share:.0%}"
    )


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # on Windows
        return None
    return uvloop.new_event_loop


def _raise_limit() -> None:
    try:
        from websocket_relay.file_descriptors import raise_limit
    except ImportError:  # on Windows
        return
    raise_limit()
