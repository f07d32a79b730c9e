"""Stop relays at random moments while their broker misbehaves, and check how each process ends.

`make stops` stops 400 relays; `tests/shutdown/test_stops.py` stops a few in each condition. Signals
are blocked when a relay starts, as in the image, so that a signal can be sent before the
interpreter runs.
"""

import argparse
import asyncio
import itertools
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from pathlib import Path

from tests.support.broker_logs import NatsLog, RedisLog, make_broker
from tests.support.brokers import free_port
from tests.support.relay_process import POLL_S, RelayProcess
from tests.support.tcp_proxy import HOST, READ_BYTES, ProxiedConnection, TcpProxy, forward

KINDS = ("nats", "redis")

TIMEOUT_S = 3.0
"""shutdown.timeout_s of these relays."""

SCHEDULING_S = 1.0
"""A busy machine may run the thread of the signal, and this process, so late."""

HUNG_S = 5.0
"""A process that still runs so long after its deadline is killed and reported."""

START_S = 100.0

START_SPAN_S = 1.5
RUN_SPAN_S = 2.5
"""Signals are sent within these times, after the start or after the relay listens."""

BLOCKED = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
}


@dataclass(frozen=True, slots=True)
class StopResult:
    """How one relay ended.

    Attributes:
        status: its exit status; below 0: the signal that killed it; None: it hung.
        took_s: the time from the first signal to its end.
        log: its standard error.
    """

    status: int | None
    took_s: float
    log: str

    @property
    def is_clean(self) -> bool:
        """Whether the process ended with status 0 and in time."""
        return self.status == 0 and self.took_s < TIMEOUT_S + SCHEDULING_S


# Conditions: each yields the URL of a broker


@asynccontextmanager
async def healthy(kind: str, directory: Path) -> AsyncIterator[str]:
    """Run a broker without a fault."""
    async with make_broker(kind, directory) as broker:
        yield broker.url


@asynccontextmanager
async def misconfigured(kind: str, directory: Path) -> AsyncIterator[str]:
    """Run a broker whose stream has a configuration that the relay can not use."""
    async with make_broker(kind, directory) as broker, AsyncExitStack() as stack:
        if kind == "nats":
            config = b'{"name":"relay","subjects":["relay"],"retention":"workqueue"}'
            await NatsLog(stack, broker).request("$JS.API.STREAM.CREATE.relay", config)
        else:
            await RedisLog(stack, broker).execute("SET", "relay", "not a stream")
        yield broker.url


@asynccontextmanager
async def unsupported(kind: str, directory: Path) -> AsyncIterator[str]:
    """Run a NATS without JetStream, or a Redis that reports an old version."""
    options = {"jetstream": False} if kind == "nats" else {}
    async with (
        make_broker(kind, directory, **options) as broker,
        OldRedisProxy(broker.port) as proxy,
    ):
        yield f"{kind}://localhost:{broker.port if kind == 'nats' else proxy.port}"


class OldRedisProxy(TcpProxy):
    """A proxy in front of a Redis 7 that makes it report version 5."""

    def on_response(self, data: bytes, connection: ProxiedConnection) -> bytes:
        """Replace the version."""
        return data.replace(b"redis_version:7", b"redis_version:5")


@asynccontextmanager
async def flapping(kind: str, directory: Path) -> AsyncIterator[str]:
    """Run a broker whose connections are cut every few milliseconds."""
    async with (
        make_broker(kind, directory) as broker,
        TcpProxy(broker.port) as proxy,
        repeated(proxy.cut, 0.002, 0.08),
    ):
        yield f"{kind}://localhost:{proxy.port}"


@asynccontextmanager
async def closed_port(kind: str, directory: Path) -> AsyncIterator[str]:
    """Name a port without a listener."""
    yield f"{kind}://localhost:{free_port()}"


@asynccontextmanager
async def slow(kind: str, directory: Path) -> AsyncIterator[str]:
    """Run a broker whose answers take up to 0.2 seconds each."""
    async with make_broker(kind, directory) as broker, DelayingProxy(broker.port) as proxy:
        yield f"{kind}://localhost:{proxy.port}"


class DelayingProxy(TcpProxy):
    """A proxy that delays the bytes from the server."""

    async def _connect(self, reader: asyncio.StreamReader, connection: ProxiedConnection) -> None:
        server_reader, server = await asyncio.open_connection(HOST, self.target)
        connection.server = server
        async with asyncio.TaskGroup() as group:
            group.create_task(forward(reader, server, lambda data: data))
            while data := await server_reader.read(READ_BYTES):
                await asyncio.sleep(random.uniform(0, 0.2))
                connection.client.write(data)


@asynccontextmanager
async def frozen(kind: str, directory: Path) -> AsyncIterator[str]:
    """Run a broker that is frozen."""
    async with make_broker(kind, directory) as broker:
        broker.freeze()
        yield broker.url


@asynccontextmanager
async def freezing(kind: str, directory: Path) -> AsyncIterator[str]:
    """Run a broker that is frozen and thawed again and again."""
    async with make_broker(kind, directory) as broker:
        actions = itertools.cycle((broker.freeze, broker.thaw))

        def freeze_or_thaw() -> None:
            next(actions)()

        async with repeated(freeze_or_thaw, 0.05, 0.5):
            yield broker.url


@asynccontextmanager
async def unreachable(kind: str, directory: Path) -> AsyncIterator[str]:
    """Name a port whose connections are never established: its backlog of connections is full."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for pending in (first, second):
            pending.setblocking(False)
            pending.connect_ex(listener.getsockname())
        yield f"{kind}://127.0.0.1:{listener.getsockname()[1]}"


@asynccontextmanager
async def restarting(kind: str, directory: Path) -> AsyncIterator[str]:
    """Run a broker that is killed and started again and again."""
    async with make_broker(kind, directory) as broker:

        async def restart() -> None:
            while True:
                await asyncio.sleep(random.uniform(0, 0.3))
                await broker.restart()

        task = asyncio.create_task(restart())
        try:
            yield broker.url
        finally:
            task.cancel()
            await asyncio.wait([task])


@asynccontextmanager
async def repeated(
    action: Callable[[], None], least_s: float, most_s: float
) -> AsyncIterator[None]:
    """Call a function again and again, after random pauses."""

    async def repeat() -> None:
        while True:
            await asyncio.sleep(random.uniform(least_s, most_s))
            action()

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


Condition = Callable[[str, Path], AbstractAsyncContextManager[str]]

CONDITIONS: Mapping[str, Condition] = {
    each.__name__: each
    for each in (
        healthy,
        misconfigured,
        unsupported,
        flapping,
        closed_port,
        slow,
        frozen,
        freezing,
        unreachable,
        restarting,
    )
}


# One stop, and many


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Start processes with blocked signals, as in the image."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def stop_relay(
    relay: RelayProcess,
    slots: asyncio.Semaphore,
    *,
    after_s: float,
    is_listening: bool,
    is_fork: bool = False,
    signals: Sequence[signal.Signals] = (signal.SIGTERM,),
    pause_s: float = 0.0,
) -> StopResult:
    """Start a relay, send it signals, and return how it ended.

    Args:
        relay: not started yet.
        slots: bounds how many relays run at a time.
        after_s: the time of the first signal, after the start or after the relay listens.
        is_listening: whether `after_s` begins when the relay listens.
        is_fork: whether it is a fork (forks.py), which starts without blocked signals.
        signals: to send, in order.
        pause_s: between two signals.
    """
    async with slots:
        try:
            if is_fork:
                relay.start()
            else:
                with blocked_signals():
                    relay.launch()
            if is_listening:
                await await_listening(relay)
            await asyncio.sleep(after_s)
            started = time.monotonic()
            for number in signals:
                relay.signal(number)
                await asyncio.sleep(pause_s)
            status = await asyncio.to_thread(_status_within, relay, TIMEOUT_S + HUNG_S)
            took_s = time.monotonic() - started
        finally:
            await asyncio.to_thread(relay.end)
    return StopResult(status, took_s, "\n".join(relay.log_lines))


async def await_listening(relay: RelayProcess) -> None:
    """Wait until a relay listens; the timeout allows for many starts at a time."""
    async with asyncio.timeout(START_S):
        while "relay listening" not in (  # noqa: ASYNC110 - a log has no event
            event["event"] for event in relay.log_events
        ):
            await asyncio.sleep(POLL_S)


def _status_within(relay: RelayProcess, timeout_s: float) -> int | None:
    """Return the exit status of a process; None: it is still running."""
    with suppress(subprocess.TimeoutExpired):
        return relay.process.wait(timeout_s)
    return None


async def stop_many(
    kind: str,
    name: str,
    count: int,
    directory: Path,
    slots: asyncio.Semaphore,
    span_s: float = RUN_SPAN_S,
    *,
    are_forks: bool = False,
) -> list[StopResult]:
    """Stop relays in one condition, each at a random moment.

    Args:
        kind: of the broker.
        name: of the condition.
        count: how many relays; every third is stopped while it starts.
        directory: for all of them.
        slots: bounds how many relays run at a time.
        span_s: the signals are sent within this time.
        are_forks: whether the relays are forks, see `stop_relay`.
    """

    async def stop(number: int, url: str) -> StopResult:
        is_listening = number % 3 < 2
        own = directory / str(number)
        own.mkdir()
        return await stop_relay(
            RelayProcess(own, settings_for(url)),
            slots,
            after_s=random.uniform(0, span_s if is_listening else min(span_s, START_SPAN_S)),
            is_listening=is_listening,
            is_fork=are_forks,
            signals=[signal.SIGTERM] * random.choice((1, 1, 2, 20)),
            pause_s=random.choice((0, 0.02)),
        )

    async with CONDITIONS[name](kind, directory / "broker") as url, asyncio.TaskGroup() as group:
        tasks = [group.create_task(stop(number, url)) for number in range(count)]
    return [task.result() for task in tasks]


def settings_for(url: str) -> dict[str, object]:
    """Return the settings of a relay that uses a broker."""
    shutdown = {"spread_s": 0.1, "timeout_s": TIMEOUT_S}
    return {"backplane": {"url": url}, "shutdown": shutdown}


async def main(arguments: Sequence[str] | None = None) -> int:
    """Stop many relays and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.stops", description=__doc__)
    parser.add_argument("--count", type=int, default=400, help="relays to stop in all")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--conditions", nargs="*", default=[*CONDITIONS], choices=CONDITIONS)
    parser.add_argument("--workers", type=int, default=4, help="relays at a time")
    options = parser.parse_args(arguments)
    cases = [(kind, name) for kind in options.kinds for name in options.conditions]
    slots, bad = asyncio.Semaphore(options.workers), 0
    for number, (kind, name) in enumerate(cases):
        count = options.count // len(cases) + (number < options.count % len(cases))
        with tempfile.TemporaryDirectory() as directory:
            ends = await stop_many(kind, name, count, Path(directory), slots)
        statuses = Counter(end.status for end in ends)
        slowest_s = max(end.took_s for end in ends)
        print(f"{kind:6} {name:12} {dict(statuses)}, slowest {slowest_s:.2f} s", flush=True)
        for end in ends:
            if not end.is_clean:
                bad += 1
                print(f"  status {end.status} after {end.took_s:.2f} s: {end.log[-1000:]}")
    print(f"{bad} of {options.count} did not end with status 0 in {TIMEOUT_S:g} s")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
