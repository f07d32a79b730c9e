"""One end of a broker, in a process of its own: a replica's log, or the broker's plain client.

usage: python -m bench.ends log|bare URL

Reads commands as lines of JSON from standard input, and answers each with one. Knows no measurement
and no relay: the log is built as `websocket_relay.app` builds it, without clients.
"""

import asyncio
import json
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import nats
import redis.asyncio as redis
import uvloop
from nats.js.api import StreamConfig
from websocket_relay.backplane.codec import Packet, pack, unpack
from websocket_relay.backplane.factory import open_backplane
from websocket_relay.backplane.interface import LogEntry
from websocket_relay.config.model import Settings
from websocket_relay.messages import TEXT
from websocket_relay.wire.flow_control import HighWaterMark

MESSAGE_BYTES = 128
STAMP = struct.Struct("<q")
PAUSE_S = 1 / 600
IN_FLIGHT_BYTES = 4 << 20  # of a writer that appends as fast as it can
AT_ONCE = 100  # messages of one turn of its loop, as a relay with 100 busy clients has
CODEC_S = 0.1  # for each direction, when packing alone is measured
LOG, STREAM = "ends", "bare"  # neither is the relays' own

Values = dict[str, Any]


class EndLatencies:
    """The times from the stamp in a message to its delivery."""

    def __init__(self) -> None:
        self._latencies_ns: list[int] = []

    def record(self, payload: bytes) -> None:
        self._latencies_ns.append(time.monotonic_ns() - STAMP.unpack_from(payload)[0])

    def take_quantiles(self) -> Values:
        """Return the quantiles, in seconds, and start again."""
        latencies_ns, self._latencies_ns = sorted(self._latencies_ns), []
        count = len(latencies_ns)
        names = (("p10", 0.1), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
        quantiles = {name: latencies_ns[int(count * share)] / 1e9 for name, share in names if count}
        return {"samples": count, **quantiles}


def stamped() -> bytes:
    """Return a message that contains the time at which it was made."""
    return STAMP.pack(time.monotonic_ns()).ljust(MESSAGE_BYTES, b".")


class FloodPublisher:
    """The publisher of this end: it is paused while too many bytes wait to be appended."""

    def __init__(self) -> None:
        self.may_publish = asyncio.Event()
        self.may_publish.set()

    def pause_reading(self) -> None:
        self.may_publish.clear()

    def resume_reading(self) -> None:
        self.may_publish.set()

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        """Exit: a message that is not relayed invalidates the measurement."""
        sys.exit("a message was not appended to the log")


class Log:
    """A replica's log."""

    def __init__(self, url: str) -> None:
        history = Settings().history
        self.latencies = EndLatencies()
        self._pending = HighWaterMark(IN_FLIGHT_BYTES)
        self._publisher = FloodPublisher()
        self._prefix = STAMP.pack(time.monotonic_ns())  # of its own messages in a flood
        self._published = self._own_delivered = self._delivered = 0
        self._has_progress = asyncio.Event()
        self._on_entry: Callable[[LogEntry], None] = self._record_latency
        self.backplane = open_backplane(
            url,
            LOG,
            relays_locally=False,
            max_message_bytes=1 << 20,
            history_bytes=history.max_bytes,
            history_age_s=history.max_age_s,
            pending=self._pending,
            describe=lambda: b"",
            observe_append=lambda _: None,
            observe_lag=lambda _: None,
        )
        self.backplane.consume(self._deliver, lambda _: None)

    def _deliver(self, entries: Sequence[LogEntry], _: object) -> None:
        for entry in entries:
            self._on_entry(entry)

    async def publish(self, payload: bytes) -> None:
        self._append(payload)

    def _append(self, payload: bytes) -> None:
        self.backplane.append("default", [(TEXT, payload)], len(payload), self._publisher)

    async def together(self, count: int, seconds: float) -> Values:
        """Append messages in one go, repeatedly: again when all of them are delivered."""
        self._on_entry, self._delivered = self._count, 0
        payload, turns = b"." * MESSAGE_BYTES, 0
        started, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() < started + seconds:
            turns += 1
            for _ in range(count):
                self._append(payload)
            while self._delivered < turns * count:
                self._has_progress.clear()
                await self._has_progress.wait()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - started
        return {"turns": turns, "cpu_seconds": cpu, "seconds": wall}

    async def flood(self, start: float, end: float, publishes: bool) -> Values:
        """Append as fast as is delivered between two times of the monotonic clock, and count."""
        self._on_entry = self._count_own
        self._delivered = self._published = self._own_delivered = 0
        payload = self._prefix.ljust(MESSAGE_BYTES, b".")
        await asyncio.sleep(start - time.monotonic())
        began, cpu = time.monotonic(), time.process_time()
        while time.monotonic() < end:
            if publishes:
                await self._publish_some(payload)
            else:
                await asyncio.sleep(0.01)
        cpu, delivered, ended = time.process_time() - cpu, self._delivered, time.monotonic()
        return {
            "published": self._published,
            "delivered_per_s": delivered / (ended - began),
            "cpu_share": cpu / (ended - began),
        }

    async def _publish_some(self, payload: bytes) -> None:
        await self._publisher.may_publish.wait()
        for _ in range(AT_ONCE):
            self._append(payload)
        self._published += AT_ONCE
        if self._pending.is_exceeded:
            self._pending.pause_publisher(self._publisher)
        await asyncio.sleep(0)
        while (self._published - self._own_delivered) * MESSAGE_BYTES > IN_FLIGHT_BYTES:
            self._has_progress.clear()
            await self._has_progress.wait()

    async def delivered(self) -> Values:
        """Return how much of a flood has been delivered in all."""
        counters = self.backplane.counters
        return {
            "delivered": self._delivered,
            "lost": counters.lost,
            "duplicates": counters.duplicates,
        }

    def _record_latency(self, entry: LogEntry) -> None:
        self.latencies.record(entry.payload)

    def _count(self, entry: LogEntry) -> None:
        self._delivered += 1
        self._has_progress.set()

    def _count_own(self, entry: LogEntry) -> None:
        self._delivered += 1
        if entry.payload.startswith(self._prefix):
            self._own_delivered += 1
            self._has_progress.set()

    async def codec(self, count: int) -> Values:
        """Return the CPU seconds of packing and unpacking one packet of so many messages."""
        payloads = [b"." * MESSAGE_BYTES for _ in range(count)]
        packet = Packet(1, 1, ["default"] * count, b"\x01" * count, payloads)
        data = pack(packet)
        return {"pack": _cpu_of(lambda: pack(packet)), "unpack": _cpu_of(lambda: unpack(data))}


def _cpu_of(act: Callable[[], object]) -> float:
    started, times = time.process_time(), 0
    while time.process_time() < started + CODEC_S:
        act()
        times += 1
    return (time.process_time() - started) / times


class Bare:
    """A broker's own client, used as its documentation describes."""

    def __init__(
        self, publish: Callable[[bytes], Awaitable[object]], latencies: EndLatencies
    ) -> None:
        self.publish = publish
        self.latencies = latencies


@asynccontextmanager
async def _log(url: str) -> AsyncIterator[Log]:
    log = Log(url)
    task = asyncio.create_task(log.backplane.run())
    await log.backplane.up.wait()
    yield log
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@asynccontextmanager
async def _redis(url: str) -> AsyncIterator[Bare]:
    writer, reader, latencies = redis.Redis.from_url(url), redis.Redis.from_url(url), EndLatencies()

    async def read() -> None:
        last: Any = "$"
        while True:
            found: Any = await reader.xread({STREAM: last}, count=16, block=1000)
            for _, entries in found or ():
                for identity, fields in entries:
                    last = identity
                    latencies.record(fields[b"d"])

    task = asyncio.create_task(read())
    yield Bare(lambda payload: writer.xadd(STREAM, {"d": payload}), latencies)
    task.cancel()
    await writer.aclose()
    await reader.aclose()


@asynccontextmanager
async def _nats(url: str) -> AsyncIterator[Bare]:
    writer, reader = await nats.connect(url, tls=None), await nats.connect(url, tls=None)
    latencies = EndLatencies()

    async def on_message(message: Any) -> None:
        latencies.record(message.data)

    await writer.jetstream().add_stream(StreamConfig(name=STREAM, subjects=[STREAM]))
    await reader.jetstream().subscribe(STREAM, cb=on_message, ordered_consumer=True)
    stream = writer.jetstream()
    yield Bare(lambda payload: stream.publish(STREAM, payload), latencies)
    await writer.close()
    await reader.close()


async def _steadily(end: Log | Bare, count: int) -> Values:
    """Publish messages one after another, with a pause before each."""
    for _ in range(count):
        await asyncio.sleep(PAUSE_S)
        await end.publish(stamped())
    return {}


async def _execute(end: Log | Bare, name: str, arguments: Sequence[Any]) -> Values:
    if name == "steadily":
        return await _steadily(end, *arguments)
    if name == "latencies":
        return end.latencies.take_quantiles()
    assert isinstance(end, Log)
    commands = {
        "together": end.together,
        "flood": end.flood,
        "delivered": end.delivered,
        "codec": end.codec,
    }
    found: Values = await commands[name](*arguments)  # type: ignore[operator]
    return found


async def _serve(how: str, url: str) -> None:
    opened: Any = _log if how == "log" else _redis if url.startswith("redis") else _nats
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with opened(url) as end:
        print("{}", flush=True)
        while line := await lines.readline():
            name, *arguments = json.loads(line)
            print(json.dumps(await _execute(end, name, arguments)), flush=True)


if __name__ == "__main__":
    uvloop.run(_serve(*sys.argv[1:]))
