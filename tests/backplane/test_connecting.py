"""Connect to a broker: names that resolve slowly, and a Redis that permits little."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from websocket_relay.backplane.timings import Timings

from tests.support.broker_logs import (
    WAIT_TIMEOUT_S,
    BackplaneLog,
    BrokerLog,
    RedisLog,
    wait_until,
)
from tests.support.programs import ANY_REDIS, needed
from tests.support.redis_groups import GroupedRedis
from tests.support.tcp_proxy import TcpProxy

SLOW_NAME = "slow.example"


def resolve_slowly(monkeypatch: pytest.MonkeyPatch, pause: Callable[[], object]) -> None:
    """Call `pause`, in a thread, before `SLOW_NAME` is resolved."""
    resolve = socket.getaddrinfo

    def resolve_after_pause(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == SLOW_NAME:
            pause()
            host = "localhost"
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_after_pause)


RESOLVING_S = 0.5
CONNECT_TIMEOUT_S = 0.3


@pytest.fixture
def slow_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolve `SLOW_NAME` in more time than the deadline to connect allows."""
    resolve_slowly(monkeypatch, lambda: time.sleep(RESOLVING_S))


async def test_a_replica_is_up_although_the_name_of_its_broker_is_resolved_slowly(
    broker_log: BrokerLog, slow_name: None
) -> None:
    broker_log.timings = Timings(connect_timeout_s=CONNECT_TIMEOUT_S)
    await broker_log.start_replica(url=broker_log.url.replace("localhost", SLOW_NAME))


async def test_a_name_that_is_not_resolved_in_time_is_logged_as_the_cause(
    broker_log: BrokerLog, slow_name: None, caplog: pytest.LogCaptureFixture
) -> None:
    broker_log.timings = Timings(resolve_timeout_s=RESOLVING_S / 2)
    url = broker_log.url.replace("localhost", SLOW_NAME)
    await broker_log.start_replica(url=url, await_up=False)
    error = f"{SLOW_NAME}: the name was not resolved in time"
    await wait_until(lambda: error in {each.__dict__.get("error") for each in caplog.records})


async def test_a_message_that_is_rejected_while_connecting_is_not_sent_once_connected(
    broker_log: BrokerLog,
    stack: AsyncExitStack,
    monkeypatch: pytest.MonkeyPatch,
    short_outage_timeout: None,
) -> None:
    is_resolvable = threading.Event()
    is_resolvable.set()
    resolve_slowly(monkeypatch, lambda: is_resolvable.wait(WAIT_TIMEOUT_S))
    port = broker_log.broker.port
    proxy = await stack.enter_async_context(TcpProxy(port))
    url = broker_log.url.replace(f"localhost:{port}", f"{SLOW_NAME}:{proxy.port}")
    replica = await broker_log.start_replica(url=url)
    proxy.lose_client_bytes()
    replica.publish(b"rejected")
    await proxy.await_lost_bytes()
    is_resolvable.clear()
    proxy.cut()
    await replica.await_outage()
    assert replica.publisher.failures == 1
    is_resolvable.set()
    await replica.await_up()
    replica.publish(b"after")
    await replica.await_payloads(b"after")
    assert replica.payloads == [b"after"]


async def test_a_server_that_hangs_and_a_malformed_name_are_logged_by_name(
    stack: AsyncExitStack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as hanging, socket.create_server(("127.0.0.1", 0)) as other:
        hanging.bind(path)
        hanging.listen()
        server = f"127.0.0.1:{other.getsockname()[1]}"
        errors = {
            f"unix://{path}": f"{path}: not connected in time",
            f"redis+sentinel://{server}/log": "no Sentinel names the primary:"
            f" {server}: not reached in time",
            "redis://a..b": "a..b: not the name of a host",
            "nats://a..b": "a..b: not the name of a host",
        }
        for url, error in errors.items():
            caplog.clear()
            log = BackplaneLog(stack, None, url)
            log.timings = Timings(connect_timeout_s=0.1, sentinels_timeout_s=0.05)
            replica = await log.start_replica(await_up=False)
            await wait_until(lambda: caplog.records)
            await replica.stop()
            assert {each.__dict__.get("error") for each in caplog.records} == {error}


@pytest.mark.parametrize(
    "line", ['rename-command INFO ""', "user default on nopass ~* &* +@all -info"]
)
async def test_a_redis_without_info_is_used(
    stack: AsyncExitStack, tmp_path: Path, line: str
) -> None:
    broker = GroupedRedis(needed(*ANY_REDIS), tmp_path, lines=[line])
    await stack.enter_async_context(broker)
    replica = await RedisLog(stack, broker).start_replica()
    replica.publish(b"message")
    await replica.await_count(1)


@pytest.mark.parametrize("kind", ["redis"])
async def test_valkey_is_a_name_for_redis(broker_log: BackplaneLog) -> None:
    await broker_log.start_replica(url=broker_log.url.replace("redis://", "valkey://"))
