"""Logs on real brokers, and replicas that append to them and read them, without a relay."""

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import nats
import pytest
import redis.asyncio as redis
from websocket_relay.backplane.access import ANONYMOUS, BrokerAccess
from websocket_relay.backplane.factory import open_backplane
from websocket_relay.backplane.interface import Backplane, BackplaneState, LogEntry, Position
from websocket_relay.backplane.timings import DEFAULT_TIMINGS, Timings
from websocket_relay.messages import TEXT

from tests.support.brokers import Broker, NatsBroker, RedisBroker
from tests.support.programs import ANY_REDIS, NATS, REDIS_6, REDIS_7, needed

ONLY_REDIS = pytest.mark.parametrize("kind", ["redis"])
ONLY_NATS = pytest.mark.parametrize("kind", ["nats"])

WAIT_TIMEOUT_S = 15.0

FREQUENT_HEARTBEATS = Timings(heartbeat_interval_s=0.2)
QUICK_OUTAGES = replace(FREQUENT_HEARTBEATS, outage_after_s=1.0, append_timeout_s=0.7)
"""An outage starts one second after a heartbeat instead of three."""


async def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(WAIT_TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - conditions have no event
            await asyncio.sleep(0.005)


class Pending:
    """Counts the bytes that wait to be appended.

    Attributes:
        bytes: that wait now.
        peak_bytes: the largest number so far.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.peak_bytes = 0

    def drained(self, size: int) -> None:
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        self.bytes -= size


class CountingPublisher:
    """A publisher that counts its failed messages."""

    def __init__(self) -> None:
        self.failures = 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        self.failures += 1


class BackplaneReplica:
    """The backplane of one replica, and everything that it has read.

    Attributes:
        entries: all entries read, in order.
        gap_positions: the position of each gap that was reported.
        counts_at_gaps: the number of entries read before each gap.
        pending: counts the bytes that wait to be appended.
        publisher: the publisher of all messages.
        lags_s: the time from each append of a heartbeat to reading it.
    """

    def __init__(
        self,
        url: str,
        stream: str,
        on_outage: str,
        max_message_bytes: int,
        access: BrokerAccess = ANONYMOUS,
        **options: Any,
    ) -> None:
        self.entries: list[LogEntry] = []
        self.gap_positions: list[Position] = []
        self.counts_at_gaps: list[int] = []
        self.pending = Pending()
        self.publisher = CountingPublisher()
        self.lags_s: list[float] = []
        self.backplane: Backplane = open_backplane(
            url,
            stream,
            access,
            relays_locally=on_outage == "local",
            max_message_bytes=max_message_bytes,
            history_bytes=0,
            history_age_s=0,
            pending=self.pending,
            describe=lambda: b"",
            observe_append=lambda _: None,
            observe_lag=self.lags_s.append,
            **options,
        )
        self.backplane.consume(self._on_entries, self._on_gap)
        self._task: asyncio.Task[None] | None = None

    def _on_entries(self, entries: Sequence[LogEntry], _: object) -> None:
        self.entries.extend(entries)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.backplane.run())
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stop the backplane; assert that a broken broker does not delay it."""
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
        """The payloads of all entries read."""
        return [entry.payload for entry in self.entries]

    @property
    def positions(self) -> list[Position]:
        """The positions of all entries read."""
        return [entry.position for entry in self.entries]

    def publish(self, *payloads: bytes, channel: str = "default", kind: int = TEXT) -> None:
        """Append messages of one publisher, one after the other."""
        for payload in payloads:
            self.backplane.append(channel, [(kind, payload)], len(payload), self.publisher)

    async def await_up(self) -> None:
        """Wait until the backplane is up."""
        async with asyncio.timeout(WAIT_TIMEOUT_S):
            await self.backplane.up.wait()

    async def await_outage(self) -> None:
        """Wait until the backplane is in an outage."""
        await wait_until(lambda: self.backplane.state is BackplaneState.OUTAGE)

    async def await_duplicates(self, count: int) -> None:
        """Wait until so many duplicates were skipped."""
        await wait_until(lambda: self.backplane.counters.duplicates == count)

    async def await_payloads(self, *payloads: bytes) -> None:
        """Wait until these payloads were read."""
        await wait_until(lambda: set(payloads) <= set(self.payloads))

    async def await_count(self, count: int) -> None:
        """Wait until so many entries were read."""
        await wait_until(lambda: len(self.entries) >= count)


class BackplaneLog:
    """A log in a broker, or in the process (`memory`).

    Attributes:
        broker: None: the log is in the process.
        url: of the backplane.
        access: the settings for the access to the broker.
        stream: the name of the stream.
        timings: of replicas that are started from now on.
    """

    def __init__(
        self,
        stack: AsyncExitStack,
        broker: Broker | None,
        url: str,
        access: BrokerAccess = ANONYMOUS,
    ) -> None:
        self.broker = broker
        self.url = url
        self.access = access
        self.stream = "relay"
        self.timings = DEFAULT_TIMINGS
        self._stack = stack

    async def start_replica(
        self,
        *,
        url: str = "",
        stream: str = "",
        access: BrokerAccess | None = None,
        on_outage: str = "reject",
        max_message_bytes: int = 4 << 20,
        await_up: bool = True,
        **options: Any,
    ) -> BackplaneReplica:
        """Start a replica.

        Args:
            url, stream, access: others than those of the log.
            on_outage, max_message_bytes: settings of the replica.
            await_up: whether to wait until its backplane is up.
            options: further arguments of `open_backplane`.
        """
        replica = BackplaneReplica(
            url or self.url,
            stream or self.stream,
            on_outage,
            max_message_bytes,
            access or self.access,
            timings=self.timings,
            **options,
        )
        await self._stack.enter_async_context(replica)
        if await_up:
            await replica.await_up()
        return replica

    async def start_replicas(self, count: int) -> Sequence[BackplaneReplica]:
        """Start several replicas; in `memory`, which has one only, start that one."""
        return [await self.start_replica() for _ in range(count if self.broker else 1)]


class BrokerLog(BackplaneLog):
    """A log in a broker."""

    broker: Broker

    def __init__(self, stack: AsyncExitStack, broker: Broker) -> None:
        super().__init__(stack, broker, broker.url)

    async def append_raw(self, data: bytes) -> None:
        """Append an entry that no relay wrote."""
        raise NotImplementedError

    async def size_bytes(self) -> int:
        """Return the size of the stream in the broker."""
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
        """Make the next positions of the stream smaller than those that a replica has read."""
        raise NotImplementedError

    async def roll_back(self, during: Callable[[], Awaitable[None]]) -> None:
        """Restore the stream to its state before a call, as after a failover."""
        raise NotImplementedError


class RedisLog(BrokerLog):
    """A log in Redis."""

    async def execute(self, *arguments: Any) -> Any:
        """Run a command of Redis; return its reply."""
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

    async def roll_back(self, during: Callable[[], Awaitable[None]]) -> None:
        dumped = await self.execute("DUMP", self.stream)
        await during()
        await self.execute("RESTORE", self.stream, 0, dumped, "REPLACE")

    async def rewind(self, replica: BackplaneReplica) -> None:
        # As if the clock of an earlier broker had been ahead.
        before = replica.backplane.counters.unreadable
        await self.execute("XADD", self.stream, "99999999999999-0", "d", "from the future")
        await wait_until(lambda: replica.backplane.counters.unreadable > before)
        await self.execute("DEL", self.stream)


class NatsLog(BrokerLog):
    """A log in JetStream."""

    async def request(self, subject: str, content: bytes = b"") -> Any:
        """Send a request to NATS; return the parsed reply."""
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
        async def publish_lost_messages() -> None:
            await replica.await_up()
            count = len(replica.entries)
            for number in range(20):
                replica.publish(b"will be lost")
                await replica.await_count(count + number + 1)

        await self.roll_back(publish_lost_messages)

    async def delete_entry(self, position: Position) -> None:
        request = json.dumps({"seq": position.offset}).encode()
        await self.request(f"$JS.API.STREAM.MSG.DELETE.{self.stream}", request)

    async def roll_back(self, during: Callable[[], Awaitable[None]]) -> None:
        # As if the machine had lost power before it wrote the last entries to its disk.
        streams = self.broker.directory / "streams"
        copy = self.broker.directory / "copy"
        self.broker.stop()
        shutil.copytree(streams, copy)
        await self.broker.start()
        await during()
        self.broker.kill()
        shutil.rmtree(streams)
        copy.rename(streams)
        await self.broker.start()


def make_broker(kind: str, directory: Path, **options: Any) -> Broker:
    """Return a broker of a kind, not started."""
    if kind == "nats":
        return NatsBroker(needed(NATS), directory, **options)
    programs = (REDIS_6,) if kind != "redis" else (REDIS_7,) if "pair" in options else ANY_REDIS
    return RedisBroker(needed(*programs), directory, **options)


def make_log(kind: str, stack: AsyncExitStack, broker: Broker) -> BrokerLog:
    """Return the log of a broker."""
    return NatsLog(stack, broker) if kind == "nats" else RedisLog(stack, broker)


def assert_increasing(positions: list[Position]) -> None:
    """Assert that each position is larger than the one before it."""
    assert all(earlier < later for earlier, later in pairwise(positions))
