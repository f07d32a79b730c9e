"""Put a load on a relay and measure it: how much, how fast, and whether anything is missing."""

import asyncio
import json
import math
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from time import perf_counter_ns, process_time
from typing import Any

from websocket_relay.cancellation import cancel_until_done
from websocket_relay.cli.bench import chart
from websocket_relay.cli.bench.clients import LEAST_BYTES, BenchClient, BenchMessage, connect_all
from websocket_relay.cli.bench.summary import BenchLoad, BenchResult, milliseconds, table
from websocket_relay.cli.bench.tally import Latencies, Slice, Tally
from websocket_relay.cli.common import (
    EPILOG,
    FAILED,
    INTERRUPTED,
    add_target,
    count,
    note,
    run,
    seconds,
    token_of,
    trust_of,
)
from websocket_relay.client.url import ChannelUrl, authorization

DESCRIPTION = f"""\
Put a load on a relay and measure it.

All clients hear the channel; some of them publish. With --rate they send so many messages a second
in all, and a latency is counted from the moment at which a message was due. With --window each
of them has so many messages on the way and sends the next when one came back: as fast as it goes.
Use a channel of its own: whoever else listens there gets all of it. Messages are binary, of
{LEAST_BYTES} bytes or more.

Everything is done by one process on one core. Where that was the bottleneck, the summary says so:
then the figures are its own, and not the relay's."""

EXAMPLES = """\
examples:
  websocket-relay bench ws://localhost:8443/channels/bench
  websocket-relay bench --clients 500 --rate 200 --duration 30 ws://localhost:8443/channels/bench
  websocket-relay bench --window 1 --json bench.json --plot bench.svg ws://localhost:8443/channels/b

"""

WARMUP_S = 1.0
PROGRESS_S = 0.5
TICK_S = 0.001
LOOK_S = 0.02
CLOCK_S = 0.005
PATIENCE_S = 5.0  # for what is on the way at the end, from the last that came
MOST_PUBLISHERS = 10
LONGEST_S = 3_600.0


def add_to(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "bench",
        help="put a load on a relay and measure it",
        description=DESCRIPTION,
        epilog=EXAMPLES + EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add_target(parser)
    _add_load(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all figures to a file, too"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the run as an SVG picture")
    parser.set_defaults(run=lambda options: run(bench, options, _loop_factory()))


def _add_load(parser: ArgumentParser) -> None:
    load = parser.add_argument_group("the load")
    load.add_argument(
        "--clients", type=count, default=100, metavar="N", help="how many hear (default: 100)"
    )
    load.add_argument(
        "--publishers",
        type=count,
        metavar="N",
        help=f"how many of them send (default: a tenth, {MOST_PUBLISHERS} at most)",
    )
    how = load.add_mutually_exclusive_group()
    how.add_argument(
        "--rate",
        type=count,
        default=0,
        metavar="R",
        help="messages a second, of all publishers together (default: 100)",
    )
    how.add_argument(
        "--window", type=count, default=0, metavar="W", help="or: each has W on the way"
    )
    load.add_argument(
        "--bytes",
        type=_message_bytes,
        default=128,
        metavar="B",
        help="of each message (default: 128)",
    )
    load.add_argument(
        "--duration",
        type=_duration,
        default=10.0,
        metavar="S",
        help="seconds to measure (default: 10)",
    )
    load.add_argument(
        "--warmup",
        type=seconds,
        default=WARMUP_S,
        metavar="S",
        help=f"seconds that do not count, before (default: {WARMUP_S:g})",
    )


def _message_bytes(text: str) -> int:
    value = int(text)
    if value < LEAST_BYTES:
        raise ArgumentTypeError(f"must be {LEAST_BYTES} or more")
    return value


def _duration(text: str) -> float:
    value = float(text)
    if not 0 < value <= LONGEST_S:
        raise ArgumentTypeError(f"must be more than 0 and {LONGEST_S:g} at most")
    return value


def load_of(options: Namespace) -> BenchLoad:
    """Return what is asked for."""
    publishers = options.publishers or min(MOST_PUBLISHERS, -(-options.clients // 10))
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
    """Measure, and tell."""
    _raise_limit()
    for file in filter(None, (options.json, options.plot)):
        file.touch()  # or a wrong path would be told when all is measured
    run_ = BenchRun(load_of(options), _show if sys.stderr.isatty() else lambda _: None)
    try:
        await run_.connect(options)
        was_interrupted = await _is_interrupted(run_.measure())
        if not run_.has_begun:
            return INTERRUPTED
        was_interrupted |= await _is_interrupted(run_.hear_the_rest())
    finally:
        run_.show("")
    result = run_.result()
    shown = ChannelUrl.parse(options.url).shown
    print(table(shown, result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result.as_json(shown), indent=2) + "\n")
    if options.plot:
        options.plot.write_text(chart.draw(shown, result.load.text, result.tally))
    if was_interrupted:
        return INTERRUPTED
    return _verdict(result)


async def _is_interrupted(step: Coroutine[Any, Any, None]) -> bool:
    try:
        await step
    except asyncio.CancelledError:
        return True
    return False


def _verdict(result: BenchResult) -> int:
    """Say in a line of its own what is missing."""
    missing, tally = result.owed - result.tally.deliveries, result.tally
    for reason, clients in tally.closed.items():
        note(f"{clients} {'client was' if clients == 1 else 'clients were'} closed: {reason}")
    if missing:
        note(f"{missing:,} of {result.owed:,} deliveries are missing")
    return FAILED if missing or tally.closed or not tally.deliveries else 0


class BenchRun:
    """One measurement.

    Args:
        load: what is done.
        show: called now and then, with how far it is.
    """

    def __init__(self, load: BenchLoad, show: Callable[[str], None]) -> None:
        self._load = load
        self.show = show
        self._tally = Tally()
        self._clients: list[BenchClient] = []
        self._publishers: list[BenchClient] = []
        self._is_over = False
        self._cpu_s = 0.0
        self._cpu_share = 0.0
        self._late = Latencies()

    async def connect(self, options: Namespace) -> None:
        """Have all clients in.

        Raises:
            RelayError: one of them is not let in.
        """
        form = BenchMessage.of(self._load.message_bytes)
        headers = authorization(token_of(options)())
        url = ChannelUrl.parse(options.url).url
        self.show(f"connecting {self._load.clients:,} clients")
        on_echo = self._send_next if self._load.window else None
        make = [
            partial(self._client, number, form, on_echo if number < self._load.publishers else None)
            for number in range(self._load.clients)
        ]
        self._clients = await connect_all(url, headers, trust_of(options), make)
        self._publishers = self._clients[: self._load.publishers]

    def _client(
        self,
        number: int,
        form: BenchMessage,
        on_echo: Callable[[BenchClient, int], None] | None,
        request: bytes,
    ) -> BenchClient:
        return BenchClient(number, request, form, self._tally, on_echo)

    async def measure(self) -> None:
        """Put the load on, for as long as it is to last."""
        load = self._load
        self.show("warming up")
        tasks = [asyncio.create_task(self._look_at_the_clock())]
        if load.rate_per_s:
            tasks.append(asyncio.create_task(self._send_at_rate()))
        for client in self._publishers:
            self._send_next(client, load.window)
        try:
            await asyncio.sleep(load.warmup_s)
            self._tally.start(perf_counter_ns())
            self._cpu_s = process_time()
            await self._watch()
        finally:
            self._is_over = True
            await cancel_until_done(*tasks)
            self._note_cpu()

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to tell."""
        return self._tally.start_ns > 0

    def result(self) -> BenchResult:
        """Say goodbye; return what was counted."""
        for client in self._clients:
            client.leave()
        tally = self._tally
        tally.close(PROGRESS_S)
        took_s = max(tally.last_ns - tally.start_ns, 1) / 1e9
        late_ms = self._late.quantile_ms(0.99) or 0.0
        return BenchResult(self._load, tally, took_s, self._cpu_share, late_ms)

    def _note_cpu(self) -> None:
        wall_s = (perf_counter_ns() - self._tally.start_ns) / 1e9
        self._cpu_share = (process_time() - self._cpu_s) / wall_s if self._cpu_s else 0.0

    def _send_next(self, client: BenchClient, count: int) -> None:
        if not self._is_over:
            now_ns = perf_counter_ns()
            for _ in range(count):
                client.send(now_ns)

    async def _send_at_rate(self) -> None:
        """Send each message when it is due, or as soon after it as possible."""
        step_ns = 1e9 / self._load.rate_per_s
        start_ns, number = perf_counter_ns(), 0
        while True:
            now_ns = perf_counter_ns()
            while (due_ns := start_ns + int(number * step_ns)) <= now_ns:
                client = self._publishers[number % len(self._publishers)]
                if not client.can_send and not client.is_gone:
                    break  # it is the relay that is late then, and that counts
                if not client.is_gone:
                    client.send(due_ns)
                number += 1
            await asyncio.sleep(max(TICK_S, (due_ns - now_ns) / 1e9))

    async def _look_at_the_clock(self) -> None:
        """Note how late this process is itself: so much of all latencies is not the relay's."""
        while True:
            due_ns = perf_counter_ns() + int(CLOCK_S * 1e9)
            await asyncio.sleep(CLOCK_S)
            self._late.note(perf_counter_ns() - due_ns)

    async def _watch(self) -> None:
        pieces = max(1, round(self._load.duration_s / PROGRESS_S))
        for number in range(1, pieces + 1):
            due_ns = self._tally.start_ns + int(self._load.duration_s * 1e9 * number / pieces)
            await asyncio.sleep((due_ns - perf_counter_ns()) / 1e9)
            piece = self._tally.cut(perf_counter_ns())
            self._note_cpu()
            self.show(_progress(self._load, piece, self._cpu_share))
            if self._tally.closed.total() == self._load.clients:
                break  # nobody is left to hear anything

    async def hear_the_rest(self) -> None:
        """Wait for what is on the way, as long as something of it comes."""
        owed, heard = self._tally.sent * self._load.clients, -1
        # Who was closed hears nothing any more: then something is missing for certain.
        patience_s = PATIENCE_S if not self._tally.closed else PROGRESS_S
        loop = asyncio.get_running_loop()
        until = math.inf
        while self._tally.deliveries < owed:
            if self._tally.deliveries != heard:
                heard, until = self._tally.deliveries, loop.time() + patience_s
                self.show(f"{owed - heard:,} deliveries on the way")
            elif loop.time() > until:
                break
            await asyncio.sleep(LOOK_S)


def _progress(load: BenchLoad, piece: Slice, cpu_share: float) -> str:
    return (
        f"{piece.at_s:.1f} of {load.duration_s:g} s  {piece.sent_per_s:,.0f} messages/s"
        f"  {piece.deliveries_per_s:,.0f} deliveries/s  p50 {milliseconds(piece.p50_ms)}"
        f"  p99 {milliseconds(piece.p99_ms)}  own CPU {cpu_share:.0%}"
    )


def _show(line: str) -> None:
    """Put a line in the place of the one before. One that is too long would be two."""
    columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
    print(f"\r\033[K{line[: columns - 1]}", end="", file=sys.stderr, flush=True)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # on Windows
        return None
    return uvloop.new_event_loop


def _raise_limit() -> None:
    try:
        from websocket_relay.file_descriptors import raise_limit
    except ImportError:  # the same
        return
    raise_limit()
