"""Logs for the contract suite of the backplanes, and replicas that hold on to them."""

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import nats
import redis.asyncio as redis
from websocket_relay.backplane.factory import open_backplane
from websocket_relay.backplane.interface import Backplane, BackplaneState, LogEntry, Position

from tests.support.brokers import (
    Broker,
    NatsBroker,
    RedisBroker,
)
from tests.support.programs import ANY_REDIS, NATS, REDIS_6, REDIS_7, needed

WAIT_TIMEOUT_S = 15.0


async def wait_until(condition: Callable[[], object]) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(WAIT_TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - whatever it is, it has no event
            await asyncio.sleep(0.005)


class Pending:
    """What waits to be appended."""

    def __init__(self) -> None:
        self.bytes = 0
        self.peak_bytes = 0

    def drained(self, size: int) -> None:
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        self.bytes -= size


class CountingPublisher:
    """A client that publishes."""

    def __init__(self) -> None:
        self.failures = 0

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        self.failures += 1


class BackplaneReplica:
    """One replica's hold on a log, and all that it heard."""

    def __init__(self, url: str, stream: str, on_outage: str, max_message_bytes: int) -> None:
        self.entries: list[LogEntry] = []
        self.gap_positions: list[Position] = []
        self.counts_at_gaps: list[int] = []  # how much it had heard when it was told each of them
        self.pending = Pending()
        self.publisher = CountingPublisher()
        self.lags_s: list[float] = []
        self.backplane: Backplane = open_backplane(
            url,
            stream,
            relays_locally=on_outage == "local",
            max_message_bytes=max_message_bytes,
            history_bytes=0,
            history_age_s=0,
            pending=self.pending,
            describe=lambda: b"",
            observe_append=lambda _: None,
            observe_lag=self.lags_s.append,
        )
        self.backplane.consume(self.entries.append, self._on_gap)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.backplane.run())
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stop it; that takes no time, whatever the broker does."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        async with asyncio.timeout(1.5):
            with suppress(asyncio.CancelledError):
                await task

    def _on_gap(self, position: Position) -> None:
        self.gap_positions.append(position)
        self.counts_at_gaps.append(len(self.entries))

    @property
    def payloads(self) -> list[bytes]:
        """What it heard."""
        return [entry.payload for entry in self.entries]

    @property
    def positions(self) -> list[Position]:
        """Where that stands."""
        return [entry.position for entry in self.entries]

    def publish(self, *payloads: bytes, channel: str = "default", opcode: int = 1) -> None:
        """Append messages, as one client's."""
        for payload in payloads:
            self.backplane.append(channel, opcode, payload, self.publisher)

    async def await_up(self) -> None:
        """Wait until it is."""
        async with asyncio.timeout(WAIT_TIMEOUT_S):
            await self.backplane.up.wait()

    async def await_outage(self) -> None:
        """Wait until it has an outage."""
        await wait_until(lambda: self.backplane.state is BackplaneState.OUTAGE)

    async def await_duplicates(self, count: int) -> None:
        """Wait until so many packets were there twice."""
        await wait_until(lambda: self.backplane.counters.duplicates == count)

    async def await_payloads(self, *payloads: bytes) -> None:
        """Wait until it heard some messages."""
        await wait_until(lambda: set(payloads) <= set(self.payloads))

    async def await_count(self, count: int) -> None:
        """Wait until it heard so many messages."""
        await wait_until(lambda: len(self.entries) >= count)


class BackplaneLog:
    """A log that a broker keeps, or nobody (`memory`)."""

    def __init__(self, stack: AsyncExitStack, broker: Broker | None, url: str) -> None:
        self.broker = broker
        self.url = url
        self.stream = "relay"
        self._stack = stack

    async def start_replica(
        self,
        *,
        url: str = "",
        stream: str = "",
        on_outage: str = "reject",
        max_message_bytes: int = 4 << 20,
        await_up: bool = True,
    ) -> BackplaneReplica:
        """Start a replica."""
        replica = BackplaneReplica(
            url or self.url, stream or self.stream, on_outage, max_message_bytes
        )
        await self._stack.enter_async_context(replica)
        if await_up:
            await replica.await_up()
        return replica

    async def start_replicas(self, count: int) -> Sequence[BackplaneReplica]:
        """Start several replicas, or one, where there can't be more."""
        return [await self.start_replica() for _ in range(count if self.broker else 1)]


class BrokerLog(BackplaneLog):
    """A log that a broker keeps."""

    broker: Broker

    def __init__(self, stack: AsyncExitStack, broker: Broker) -> None:
        super().__init__(stack, broker, broker.url)

    async def append_raw(self, data: bytes) -> None:
        """Put an entry into the stream that no relay made."""
        raise NotImplementedError

    async def size_bytes(self) -> int:
        """Return what the stream takes."""
        raise NotImplementedError

    async def delete_stream(self) -> None:
        """Delete the stream."""
        raise NotImplementedError

    async def purge(self) -> None:
        """Delete all entries of the stream."""
        raise NotImplementedError

    async def delete_entry(self, position: Position) -> None:
        """Delete one entry of the stream."""
        raise NotImplementedError

    async def rewind(self, replica: BackplaneReplica) -> None:
        """Make the stream count from before what a replica read of it."""
        raise NotImplementedError

    async def roll_back(self, happens: Callable[[], Awaitable[None]]) -> None:
        """Let something happen, then let the stream be as it was before, as after a failover."""
        raise NotImplementedError


class RedisLog(BrokerLog):
    """A log in Redis."""

    async def execute(self, *arguments: Any) -> Any:
        """Have Redis do something."""
        client = redis.Redis.from_url(self.url)
        try:
            return await client.execute_command(*arguments)  # type: ignore[no-untyped-call]
        finally:
            await client.aclose()

    async def append_raw(self, data: bytes) -> None:
        await self.execute("XADD", self.stream, "*", "d", data)

    async def size_bytes(self) -> int:
        return int(await self.execute("MEMORY", "USAGE", self.stream, "SAMPLES", 0))

    async def delete_stream(self) -> None:
        await self.execute("DEL", self.stream)

    async def purge(self) -> None:
        await self.execute("XTRIM", self.stream, "MAXLEN", "=", 0)

    async def delete_entry(self, position: Position) -> None:
        await self.execute("XDEL", self.stream, f"{position.epoch}-{position.offset}")

    async def roll_back(self, happens: Callable[[], Awaitable[None]]) -> None:
        dumped = await self.execute("DUMP", self.stream)
        await happens()
        await self.execute("RESTORE", self.stream, 0, dumped, "REPLACE")

    async def rewind(self, replica: BackplaneReplica) -> None:
        # As if the clock of the broker, before it was replaced, had been ahead.
        before = replica.backplane.counters.unreadable
        await self.execute("XADD", self.stream, "99999999999999-0", "d", "from the future")
        await wait_until(lambda: replica.backplane.counters.unreadable > before)
        await self.execute("DEL", self.stream)


class NatsLog(BrokerLog):
    """A log in JetStream."""

    async def request(self, subject: str, content: bytes = b"") -> Any:
        """Have JetStream do something."""
        client = await nats.connect(self.url, tls=None)
        try:
            return json.loads((await client.request(subject, content, timeout=3)).data)
        finally:
            await client.close()

    async def append_raw(self, data: bytes) -> None:
        await self.request(self.stream, data)

    async def size_bytes(self) -> int:
        return int((await self.request(f"$JS.API.STREAM.INFO.{self.stream}"))["state"]["bytes"])

    async def delete_stream(self) -> None:
        await self.request(f"$JS.API.STREAM.DELETE.{self.stream}")

    async def purge(self) -> None:
        await self.request(f"$JS.API.STREAM.PURGE.{self.stream}")

    async def rewind(self, replica: BackplaneReplica) -> None:
        async def happens() -> None:
            await replica.await_up()
            heard = len(replica.entries)
            for number in range(20):
                replica.publish(b"will be lost")
                await replica.await_count(heard + number + 1)

        await self.roll_back(happens)

    async def delete_entry(self, position: Position) -> None:
        request = json.dumps({"seq": position.offset}).encode()
        await self.request(f"$JS.API.STREAM.MSG.DELETE.{self.stream}", request)

    async def roll_back(self, happens: Callable[[], Awaitable[None]]) -> None:
        # As if the machine had lost power before it wrote the last entries.
        streams = self.broker.directory / "streams"
        copy = self.broker.directory / "copy"
        self.broker.stop()
        shutil.copytree(streams, copy)
        await self.broker.start()
        await happens()
        self.broker.kill()
        shutil.rmtree(streams)
        copy.rename(streams)
        await self.broker.start()


def make_broker(kind: str, directory: Path, **options: Any) -> Broker:
    """Return a broker of a kind that is not started yet."""
    if kind == "nats":
        return NatsBroker(needed(NATS), directory, **options)
    programs = (REDIS_6,) if kind != "redis" else (REDIS_7,) if "pair" in options else ANY_REDIS
    return RedisBroker(needed(*programs), directory, **options)


def make_log(kind: str, stack: AsyncExitStack, broker: Broker) -> BrokerLog:
    """Return a broker's log."""
    return NatsLog(stack, broker) if kind == "nats" else RedisLog(stack, broker)


def assert_increasing(positions: list[Position]) -> None:
    assert all(one < next_ for one, next_ in pairwise(positions))
