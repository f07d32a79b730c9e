"""One end of a broker, in a process of its own: a replica's log, or the broker's plain client.

usage: python -m bench.ends log|bare URL

Takes commands as lines of JSON on standard input, and answers each with one. Knows no measurement
and no relay: a log is held as `websocket_relay.app` holds it, with nobody on the other side.
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
from websocket_relay.wire.flow_control import HighWaterMark

MESSAGE_BYTES = 128
STAMP = struct.Struct("<q")
PAUSE_S = 1 / 600
UNDER_WAY_BYTES = 4 << 20  # of a writer that goes as fast as it can
AT_ONCE = 100  # messages of one turn of its loop, as a relay with 100 busy clients has
MADE_S = 0.1  # for each way, when packing alone is measured
LOG, STREAM = "ends", "bare"  # neither is the relays' own

Figures = dict[str, Any]
Heard = Callable[[bytes], None]


class Latencies:
    """From the stamp in a message to its coming."""

    def __init__(self) -> None:
        self._took_ns: list[int] = []

    def note(self, payload: bytes) -> None:
        self._took_ns.append(time.monotonic_ns() - STAMP.unpack_from(payload)[0])

    def taken(self) -> Figures:
        """Give the quantiles, in seconds, and begin anew."""
        took, self._took_ns = sorted(self._took_ns), []
        names = (("p10", 0.1), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
        quantiles = {name: took[int(len(took) * share)] / 1e9 for name, share in names if took}
        return {"samples": len(took), **quantiles}


def stamped() -> bytes:
    """Return a message that says when it was made."""
    return STAMP.pack(time.monotonic_ns()).ljust(MESSAGE_BYTES, b".")


class Speaker:
    """Whoever publishes: is held while too much waits to be appended."""

    def __init__(self) -> None:
        self.may_speak = asyncio.Event()
        self.may_speak.set()

    def pause_reading(self) -> None:
        self.may_speak.clear()

    def resume_reading(self) -> None:
        self.may_speak.set()

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        """Give up: a message that is not relayed makes all figures worthless."""
        sys.exit("the log took a message not")


class Log:
    """A replica's log."""

    def __init__(self, url: str) -> None:
        history = Settings().history
        self.latencies = Latencies()
        self._gate = HighWaterMark(UNDER_WAY_BYTES)
        self._speaker = Speaker()
        self._mine = STAMP.pack(time.monotonic_ns())  # what its own messages begin with in a flood
        self._said = self._own = self._heard = 0
        self._came = asyncio.Event()
        self._take: Callable[[LogEntry], None] = self._stamped
        self.backplane = open_backplane(
            url,
            LOG,
            relays_locally=False,
            max_message_bytes=1 << 20,
            history_bytes=history.max_bytes,
            history_age_s=history.max_age_s,
            pending=self._gate,
            describe=lambda: b"",
            observe_append=lambda _: None,
            observe_lag=lambda _: None,
        )
        self.backplane.consume(self._deliver, lambda _: None)

    def _deliver(self, entry: LogEntry) -> None:
        self._take(entry)

    async def say(self, payload: bytes) -> None:
        self.backplane.append("default", 1, payload, self._speaker)

    async def together(self, count: int, seconds: float) -> Figures:
        """Append so many messages in one go, again and again, each time when the last have come."""
        self._take, self._heard = self._counted, 0
        payload, turns = b"." * MESSAGE_BYTES, 0
        started, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() < started + seconds:
            turns += 1
            for _ in range(count):
                self.backplane.append("default", 1, payload, self._speaker)
            while self._heard < turns * count:
                self._came.clear()
                await self._came.wait()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - started
        return {"turns": turns, "cpu_seconds": cpu, "seconds": wall}

    async def flood(self, start: float, end: float, speaks: bool) -> Figures:
        """Append as fast as is delivered between two times of the monotonic clock, and count."""
        self._take, self._heard, self._said, self._own = self._owned, 0, 0, 0
        payload = self._mine.ljust(MESSAGE_BYTES, b".")
        await asyncio.sleep(start - time.monotonic())
        began, cpu = time.monotonic(), time.process_time()
        while time.monotonic() < end:
            if speaks:
                await self._speak(payload)
            else:
                await asyncio.sleep(0.01)
        cpu, heard, ended = time.process_time() - cpu, self._heard, time.monotonic()
        return {
            "said": self._said,
            "heard_per_s": heard / (ended - began),
            "cpu_share": cpu / (ended - began),
        }

    async def _speak(self, payload: bytes) -> None:
        await self._speaker.may_speak.wait()
        for _ in range(AT_ONCE):
            self.backplane.append("default", 1, payload, self._speaker)
        self._said += AT_ONCE
        if self._gate.is_exceeded:
            self._gate.pause_publisher(self._speaker)
        await asyncio.sleep(0)
        while (self._said - self._own) * MESSAGE_BYTES > UNDER_WAY_BYTES:
            self._came.clear()
            await self._came.wait()

    async def heard(self) -> Figures:
        """Say how much of a flood has come, in all."""
        books = self.backplane.counters
        return {"heard": self._heard, "lost": books.lost, "duplicates": books.duplicates}

    def _stamped(self, entry: LogEntry) -> None:
        self.latencies.note(entry.payload)

    def _counted(self, entry: LogEntry) -> None:
        self._heard += 1
        self._came.set()

    def _owned(self, entry: LogEntry) -> None:
        self._heard += 1
        if entry.payload.startswith(self._mine):
            self._own += 1
            self._came.set()

    async def made(self, count: int) -> Figures:
        """Give the CPU seconds of packing and unpacking one packet of so many messages."""
        payloads = [b"." * MESSAGE_BYTES for _ in range(count)]
        packet = Packet(1, 1, ["default"] * count, b"\x01" * count, payloads)
        data = pack(packet)
        return {"pack": _cpu_of(lambda: pack(packet)), "unpack": _cpu_of(lambda: unpack(data))}


def _cpu_of(act: Callable[[], object]) -> float:
    started, times = time.process_time(), 0
    while time.process_time() < started + MADE_S:
        act()
        times += 1
    return (time.process_time() - started) / times


class Bare:
    """A broker's own client, used as its documentation has it."""

    def __init__(self, say: Callable[[bytes], Awaitable[object]], latencies: Latencies) -> None:
        self.say = say
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
    writer, reader, latencies = redis.Redis.from_url(url), redis.Redis.from_url(url), Latencies()

    async def read() -> None:
        last: Any = "$"
        while True:
            found: Any = await reader.xread({STREAM: last}, count=16, block=1000)
            for _, entries in found or ():
                for identity, fields in entries:
                    last = identity
                    latencies.note(fields[b"d"])

    task = asyncio.create_task(read())
    yield Bare(lambda payload: writer.xadd(STREAM, {"d": payload}), latencies)
    task.cancel()
    await writer.aclose()
    await reader.aclose()


@asynccontextmanager
async def _nats(url: str) -> AsyncIterator[Bare]:
    writer, reader = await nats.connect(url, tls=None), await nats.connect(url, tls=None)
    latencies = Latencies()

    async def take(message: Any) -> None:
        latencies.note(message.data)

    await writer.jetstream().add_stream(StreamConfig(name=STREAM, subjects=[STREAM]))
    await reader.jetstream().subscribe(STREAM, cb=take, ordered_consumer=True)
    stream = writer.jetstream()
    yield Bare(lambda payload: stream.publish(STREAM, payload), latencies)
    await writer.close()
    await reader.close()


async def _steadily(end: Log | Bare, count: int) -> Figures:
    """Say so much, each a while after the other."""
    for _ in range(count):
        await asyncio.sleep(PAUSE_S)
        await end.say(stamped())
    return {}


async def _obey(end: Log | Bare, name: str, arguments: Sequence[Any]) -> Figures:
    if name == "steadily":
        return await _steadily(end, *arguments)
    if name == "latencies":
        return end.latencies.taken()
    assert isinstance(end, Log)
    commands = {"together": end.together, "flood": end.flood, "heard": end.heard, "made": end.made}
    found: Figures = await commands[name](*arguments)  # type: ignore[operator]
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
            print(json.dumps(await _obey(end, name, arguments)), flush=True)


if __name__ == "__main__":
    uvloop.run(_serve(*sys.argv[1:]))
