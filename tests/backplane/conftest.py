"""Fixtures of backplanes: a real broker for each test, its log, and shorter time limits."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.support.broker_logs import (
    FREQUENT_HEARTBEATS,
    QUICK_OUTAGES,
    BrokerLog,
    make_broker,
    make_log,
)
from tests.support.brokers import Broker
from tests.support.tcp_proxy import BlockedReadsProxy


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """Brokers, proxies and replicas of a test, which end in reverse order."""
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture(params=["redis", "nats"])
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of broker.

    What a broker has to do is tested with both of them, and with `redis-6.2` where the commands
    differ. What the relay does above the interface of a backplane is tested with one of them:
    `parametrize("kind", ["nats"])`.
    """
    return str(request.param)


@pytest.fixture
async def broker(kind: str, stack: AsyncExitStack, tmp_path: Path) -> Broker:
    return await stack.enter_async_context(make_broker(kind, tmp_path / "broker"))


@pytest.fixture
def broker_log(kind: str, broker: Broker, stack: AsyncExitStack) -> BrokerLog:
    """The log on the broker."""
    return make_log(kind, stack, broker)


@pytest.fixture
async def reads_proxy(broker: Broker, stack: AsyncExitStack) -> BlockedReadsProxy:
    """A proxy to the broker that can withhold the entries of the stream."""
    return await stack.enter_async_context(BlockedReadsProxy(broker.port))


@pytest.fixture
def reads_proxy_url(broker: Broker, reads_proxy: BlockedReadsProxy) -> str:
    """The URL of the broker through `reads_proxy`."""
    return broker.url.replace(str(broker.port), str(reads_proxy.port))


@pytest.fixture
def short_outage_timeout(broker_log: BrokerLog) -> None:
    """Start an outage one second after a heartbeat instead of three."""
    broker_log.timings = QUICK_OUTAGES


@pytest.fixture
def frequent_heartbeats(broker_log: BrokerLog) -> None:
    """Append a heartbeat every 0.2 seconds instead of every second."""
    broker_log.timings = FREQUENT_HEARTBEATS
