"""Redis Sentinel and Redis Cluster: replicas follow the server that holds the stream."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from websocket_relay.backplane.access import BrokerAccess

from tests.support.broker_logs import (
    BackplaneLog,
    BackplaneReplica,
    assert_increasing,
    wait_until,
)
from tests.support.brokers import free_port
from tests.support.certificates import make_pair
from tests.support.programs import ANY_REDIS, REDIS_7, needed
from tests.support.redis_groups import SERVICE, RedisCluster, SentinelGroup


async def publish_until_delivered(replicas: Sequence[BackplaneReplica], payload: bytes) -> None:
    """Publish a message on the first replica, again after each rejection."""
    publisher = replicas[0].publisher
    replicas[0].publish(payload)

    def is_delivered() -> bool:
        if publisher.failures:
            publisher.failures = 0
            replicas[0].publish(payload)
        return all(payload in each.payloads for each in replicas)

    await wait_until(is_delivered)


@pytest.fixture
async def sentinels(stack: AsyncExitStack, tmp_path: Path) -> SentinelGroup:
    """A primary, a replica and a Sentinel, with TLS and passwords."""
    group = SentinelGroup(needed(REDIS_7), tmp_path, pair=make_pair())
    await group.start(stack)
    return group


@pytest.fixture
def sentinel_log(sentinels: SentinelGroup, stack: AsyncExitStack, tmp_path: Path) -> BackplaneLog:
    """The log on the primary; one of the Sentinels in its URL is down."""
    sentinel, password_file = sentinels.sentinel, tmp_path / "password"
    password_file.write_text("of-redis\n")
    url = (
        f"rediss+sentinel://localhost:{free_port()},localhost:{sentinel.port}/{SERVICE}/0"
        "?sentinel_password=of-sentinel"
    )
    access = BrokerAccess(
        password_file=str(password_file), ca_file=str(sentinel.directory / "cert.pem")
    )
    return BackplaneLog(stack, sentinel, url, access)


async def test_replicas_follow_sentinel_to_the_new_primary_and_report_what_it_lacks(
    sentinels: SentinelGroup, sentinel_log: BackplaneLog
) -> None:
    replicas = await sentinel_log.start_replicas(2)
    await publish_until_delivered(replicas, b"both")
    await sentinels.primary.execute("WAIT", 1, 5000)
    await sentinels.stop_replication()
    await publish_until_delivered(replicas, b"lost")
    sentinels.primary.kill()
    sentinels.replica.thaw()
    await publish_until_delivered(replicas, b"after")
    for replica in replicas:
        assert list(dict.fromkeys(replica.payloads)) == [b"both", b"lost", b"after"]
        assert replica.backplane.counters.gaps == 1
        assert replica.positions[1] < replica.gap_positions[-1] < replica.positions[2]
        assert_increasing(replica.positions)
    assert b"lost" not in (await sentinel_log.start_replica()).payloads


@pytest.fixture
async def cluster(stack: AsyncExitStack, tmp_path: Path) -> RedisCluster:
    group = RedisCluster(needed(*ANY_REDIS), tmp_path, "relay")
    await group.start(stack)
    return group


@pytest.fixture
def cluster_log(cluster: RedisCluster, stack: AsyncExitStack) -> BackplaneLog:
    return BackplaneLog(stack, cluster.holder, cluster.url)


async def test_replicas_follow_a_cluster_that_moves_the_stream_and_fails_over(
    cluster: RedisCluster, cluster_log: BackplaneLog
) -> None:
    replicas = await cluster_log.start_replicas(2)
    await publish_until_delivered(replicas, b"before")
    await cluster.holder.execute("WAIT", 1, 5000)
    cluster.holder.kill()
    await publish_until_delivered(replicas, b"on the new primary")
    source = cluster.replica
    target = next(node for node in cluster.nodes[:3] if node is not cluster.holder)
    source_id, target_id = [await each.execute("CLUSTER", "MYID") for each in (source, target)]
    await target.execute("CLUSTER", "SETSLOT", cluster.slot, "IMPORTING", source_id)
    await source.execute("CLUSTER", "SETSLOT", cluster.slot, "MIGRATING", target_id)
    await source.execute("MIGRATE", "127.0.0.1", target.port, "relay", 0, 5000)
    await publish_until_delivered(replicas, b"while the slot is moved")
    for node in (target, source):
        await node.execute("CLUSTER", "SETSLOT", cluster.slot, "NODE", target_id)
    await publish_until_delivered(replicas, b"after")
    for replica in [*replicas, await cluster_log.start_replica()]:
        assert list(dict.fromkeys(replica.payloads)) == [
            b"before",
            b"on the new primary",
            b"while the slot is moved",
            b"after",
        ]
        assert_increasing(replica.positions)
