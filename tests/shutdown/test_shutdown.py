"""The stop: readiness ends, clients are closed one after another, and the process ends in time."""

import asyncio
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus

from tests.support.raw_client import BINARY, CLOSE, PATIENCE_S, RawClient, frame
from tests.support.relay_process import (
    RelayProcess,
    StartRelay,
    await_close,
    environment,
    eventually,
    open_pipe_when_read,
    receive,
    receive_many,
)

MIB = 1_048_576
DRAINING = re.compile(r"draining; retry_ms=(\d+)")
SHORT = {"spread_s": 0.2, "timeout_s": 5}


async def connect_many(
    stack: AsyncExitStack, relay: RelayProcess, count: int
) -> list[ClientConnection]:
    return [await stack.enter_async_context(relay.client("news")) for _ in range(count)]


def retry_ms(close: tuple[int | None, str | None]) -> int:
    """Assert that a close is that of a draining relay; return the delay of the reconnection."""
    code, reason = close
    assert code == 1001
    found = DRAINING.fullmatch(reason or "")
    assert found, reason
    return int(found[1])


async def readiness_is(relay: RelayProcess, status: int) -> None:
    """Wait until /readyz on the metrics port has this status."""

    async def look() -> tuple[bool, object]:
        answer = await relay.get_metrics("/readyz")
        return answer.status_code == status, answer.text

    await eventually(look, f"readiness {status}")


async def test_a_stop_refuses_an_incomplete_request_and_does_not_wait_for_it(
    relay_with: StartRelay,
) -> None:
    """The time-out of the stop is longer than that of the test."""
    relay = relay_with(shutdown={"spread_s": 0, "timeout_s": 60})
    async with await relay.connect_tcp() as publisher:
        await publisher.send(b"POST / HTTP/1.1\r\nHost: relay\r\nContent-Length: 5\r\n\r\nhel")
        await relay.await_metric("websocket_partial_message_bytes", 3)
        relay.signal()
        assert (await publisher.read_response()).status == 503
        assert await publisher.read_to_end() == b"draining\n"
        assert await relay.exit_code() == 0


async def test_a_connection_without_a_request_is_closed_without_a_response(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    async with await relay.connect_tcp() as silent:
        await relay.await_metric("websocket_http_connections", 1, port="relay")
        relay.signal()
        assert await silent.read_to_end() == b""
        assert await relay.exit_code() == 0


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
async def test_every_client_is_closed_with_a_reconnect_delay_and_the_process_ends_with_0(
    relay_with: StartRelay, number: Signals
) -> None:
    relay = relay_with(shutdown=SHORT)
    async with AsyncExitStack() as stack:
        clients = await connect_many(stack, relay, 20)
        started = time.monotonic()
        relay.signal(number)
        closes = await asyncio.gather(*(await_close(client) for client in clients))
        assert await relay.exit_code() == 0
        assert time.monotonic() - started < 5 + 3
    delays_ms = {retry_ms(close) for close in closes}
    assert len(delays_ms) > 1, "the clients would all reconnect at the same moment"
    with pytest.raises(ConnectionRefusedError):
        await relay.connect_tcp()
    assert (await relay.await_log("draining"))["clients"] == 20
    assert relay.log_events[-1]["event"] == "stopped"


async def test_clients_over_tls_are_closed_with_a_reconnect_delay(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with(shutdown=SHORT)
    async with AsyncExitStack() as stack:
        clients = await connect_many(stack, relay, 5)
        relay.signal()
        for client in clients:
            retry_ms(await await_close(client))
        assert await relay.exit_code() == 0


async def test_a_relay_without_clients_does_not_spread_its_stop(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 40, "timeout_s": 60})
    started = time.monotonic()
    assert await relay.stop() == 0
    assert time.monotonic() - started < 10


async def test_a_client_that_never_reads_does_not_delay_the_stop_beyond_its_timeout(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 0.1, "timeout_s": 1})
    async with (
        relay.raw_client("news", receive_buffer_bytes=4_096),
        relay.raw_client("news") as publisher,
    ):
        while await relay.metric("websocket_backlog_bytes") == 0:
            await publisher.send(frame(BINARY, bytes(MIB // 4)))
            await publisher.read_message()
        started = time.monotonic()
        relay.signal()
        retry_ms(await publisher.complete_close())
        assert await relay.exit_code() == 0
        assert time.monotonic() - started < 1 + 3


async def test_a_client_that_answers_no_close_does_not_delay_the_stop_beyond_its_timeout(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 0.1, "timeout_s": 1})
    async with relay.raw_client("news") as unresponsive:
        await relay.await_metric("websocket_connected_clients", 1)
        started = time.monotonic()
        relay.signal()
        retry_ms(await unresponsive.read_close_frame())
        assert await relay.exit_code() == 0
        assert time.monotonic() - started < 1 + 3


async def test_incomplete_requests_and_idle_connections_do_not_delay_the_stop(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 0.1, "timeout_s": 1})
    async with (
        await relay.connect_tcp() as silent,
        await relay.connect_tcp() as incomplete,
        await relay.connect_tcp() as idle,
    ):
        await incomplete.send(b"GET / HTTP/1.1\r\nX-Slow: ")
        await idle.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await idle.read_response()).status == 200
        started = time.monotonic()
        assert await relay.stop() == 0
        assert time.monotonic() - started < 1 + 3
        await silent.read_to_end()


async def test_clients_that_disconnect_before_their_close_do_not_disturb_the_stop(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 0.5, "timeout_s": 5})
    async with AsyncExitStack() as stack:
        clients = await connect_many(stack, relay, 10)
        relay.signal()
        await asyncio.gather(*(client.close() for client in clients))
        assert await relay.exit_code() == 0


async def test_readiness_ends_at_once_and_the_relay_serves_during_the_readiness_delay(
    relay_with: StartRelay,
) -> None:
    """A second interrupt ends the stop, so that the delay can be long."""
    relay = relay_with(shutdown={"readiness_delay_s": 60, "spread_s": 0, "timeout_s": 100})
    assert (await relay.get("/readyz")).status_code == 200
    async with relay.client("news") as early, relay.client("news") as other:
        relay.signal(SIGINT)
        await readiness_is(relay, 503)
        for answer in (await relay.get("/readyz"), await relay.get_metrics("/readyz")):
            assert answer.status_code == 503
            assert "drain" in str(answer.json())
        for answer in (await relay.get("/healthz"), await relay.get_metrics("/healthz")):
            assert answer.status_code == 200
        assert await relay.metric("websocket_draining") == 1

        await early.send("relayed")
        assert await receive(other) == "relayed"
        async with relay.client("news") as late:
            await late.send("admitted")
            assert await receive(other) == "admitted"
            relay.signal(SIGINT)
            assert await relay.exit_code() == 0


async def test_clients_are_closed_after_the_readiness_delay(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"readiness_delay_s": 0.3, "spread_s": 0, "timeout_s": 10})
    async with relay.client("news") as client:
        started = time.monotonic()
        relay.signal()
        retry_ms(await await_close(client))
        assert time.monotonic() - started >= 0.3
        assert await relay.exit_code() == 0


async def test_between_closes_the_ports_answer_messages_are_relayed_and_new_clients_refused(
    relay_with: StartRelay,
) -> None:
    """The first client is closed at once, the next after 15 s; a second interrupt ends the stop."""
    relay = relay_with(shutdown={"spread_s": 300, "timeout_s": 400})
    async with AsyncExitStack() as stack:
        clients = await connect_many(stack, relay, 20)
        relay.signal(SIGINT)
        ends = {asyncio.create_task(await_close(client)): client for client in clients}
        done, _ = await asyncio.wait(ends, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        retry_ms(done.pop().result())

        with pytest.raises(InvalidStatus) as refusal:
            await relay.client("news")
        assert refusal.value.response.status_code == 503
        assert int(refusal.value.response.headers["Retry-After"]) >= 1
        assert (await relay.get("/healthz")).status_code == 200
        assert (await relay.get("/readyz")).status_code == 503
        assert (await relay.get_metrics("/healthz")).status_code == 200
        assert (await relay.get_metrics("/readyz")).status_code == 503
        metrics = await relay.metrics()
        assert metrics.value("websocket_refusals_total", reason="draining") == 1
        assert metrics.value("websocket_draining") == 1
        assert 0 < metrics.value("websocket_draining_clients") < 20

        publisher, subscriber, *_ = [client for end, client in ends.items() if not end.done()]
        await publisher.send("to the remaining clients")
        assert await receive(subscriber) == "to the remaining clients"
        relay.signal(SIGINT)
        assert await relay.exit_code() == 0
        await asyncio.gather(*ends)


async def test_the_closes_are_spread_over_the_configured_time(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 2, "timeout_s": 10})

    async def end_of(client: ClientConnection) -> float:
        await await_close(client)
        return time.monotonic()

    async with AsyncExitStack() as stack:
        clients = await connect_many(stack, relay, 40)
        signalled_at = time.monotonic()
        relay.signal()
        ends = sorted(await asyncio.gather(*(end_of(client) for client in clients)))
        # No close is early; that each has its time is shown without a busy machine's delays by
        # `test_a_draining_relay_closes_and_delays_clients_as_simulated`.
        for number, end in enumerate(ends):
            assert end - signalled_at > 2 * number / len(ends) - 0.05
        assert await relay.exit_code() == 0


async def test_messages_of_before_the_stop_are_delivered_before_the_close(
    relay_with: StartRelay,
) -> None:
    limits = {"send_backlog_bytes": 64 * MIB}
    relay = relay_with(shutdown={"spread_s": 0.2, "timeout_s": 15}, limits=limits)
    count = 64
    async with (
        relay.raw_client("news", receive_buffer_bytes=65_536) as slow_reader,
        relay.raw_client("news") as publisher,
    ):
        # More than the buffers of the kernel take, so that the relay has a backlog.
        for number in range(count):
            await publisher.send(frame(BINARY, bytes([number]) * (MIB // 4)))
            await publisher.read_message()
        assert await relay.metric("websocket_backlog_bytes") > 0
        relay.signal()
        retry_ms(await publisher.complete_close())
        for number in range(count):
            assert await slow_reader.read_message() == bytes([number]) * (MIB // 4)
        retry_ms(await slow_reader.complete_close())
        assert await relay.exit_code() == 0


async def test_a_message_that_one_client_received_reaches_the_others_before_their_close(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 0, "timeout_s": 10})
    async with relay.client("news") as publisher, relay.client("news") as other:
        sent = 500
        for number in range(sent):
            await publisher.send(str(number))
        assert await receive_many(publisher, sent) == [str(number) for number in range(sent)]
        relay.signal()
        assert await receive_many(other, sent) == [str(number) for number in range(sent)]
        retry_ms(await await_close(other))
        assert await relay.exit_code() == 0


async def test_a_stop_while_a_client_publishes_without_pause_is_clean_and_in_time(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 0.2, "timeout_s": 5})
    wire = frame(BINARY, bytes(65_536)) * 8

    async def publish(raw: RawClient) -> None:
        with suppress(ConnectionError):  # the relay closed it
            while True:
                await raw.send(wire)

    async with (
        relay.raw_client("news") as publisher,
        relay.raw_client("news") as subscriber,
        asyncio.TaskGroup() as group,
    ):
        publishing = group.create_task(publish(publisher))
        for _ in range(50):
            await publisher.read_message()
            await subscriber.read_message()
        started = time.monotonic()
        relay.signal()
        closes = [group.create_task(raw.read_close_frame()) for raw in (publisher, subscriber)]
        for close in closes:
            retry_ms(await close)
        publishing.cancel()
        for raw in (publisher, subscriber):
            raw.reset()
        assert await relay.exit_code() == 0
        assert time.monotonic() - started < 5 + 3


async def test_a_second_interrupt_ends_the_stop_at_once(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"readiness_delay_s": 30, "spread_s": 20, "timeout_s": 60})
    async with relay.client("news"):
        started = time.monotonic()
        relay.signal(SIGINT)
        await relay.await_log("draining")
        relay.signal(SIGINT)
        assert await relay.exit_code() == 0
        assert time.monotonic() - started < 15


async def test_a_second_sigterm_does_not_disturb_the_stop(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 0.3, "timeout_s": 10})
    async with AsyncExitStack() as stack:
        clients = await connect_many(stack, relay, 5)
        relay.signal(SIGTERM)
        await relay.await_log("draining")
        relay.signal(SIGTERM)
        for client in clients:
            retry_ms(await await_close(client))
        assert await relay.exit_code() == 0


async def test_a_spread_as_long_as_the_timeout_ends_by_the_timeout(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 1, "timeout_s": 1})
    async with AsyncExitStack() as stack:
        clients = await connect_many(stack, relay, 5)
        started = time.monotonic()
        relay.signal()
        for client in clients:
            retry_ms(await await_close(client))
        assert await relay.exit_code() == 0
        assert time.monotonic() - started < 1 + 3


@pytest.fixture
def starting_relay(tmp_path: Path) -> Iterator[RelayProcess]:
    """A relay that was started and may not serve yet."""
    relay = RelayProcess(tmp_path)
    try:
        relay.start()
        yield relay
    finally:
        relay.end()
    assert relay.unexpected_lines == []


async def test_a_stop_while_the_relay_starts_is_clean(starting_relay: RelayProcess) -> None:
    await starting_relay.await_log("metrics listening")
    assert await starting_relay.stop(SIGTERM) == 0


async def test_a_stop_before_the_settings_are_read_is_clean(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    relay = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "websocket_relay", cwd=tmp_path, env=environment()
    )
    try:
        async with open_pipe_when_read(tmp_path / "config.yaml"):
            relay.terminate()
        async with asyncio.timeout(PATIENCE_S):
            assert await relay.wait() == 0
    finally:
        with suppress(ProcessLookupError):
            relay.kill()
        await relay.wait()


async def test_the_counters_balance_during_the_stop(relay_with: StartRelay) -> None:
    """One client answers its close later, so that the stop lasts until the metrics are read."""
    relay = relay_with(shutdown={"spread_s": 0.1, "timeout_s": 3})
    async with relay.raw_client("news") as late, relay.client("news") as client:
        await client.send("hello")
        assert await receive(client) == "hello"
        assert await late.read_message() == "hello"
        relay.signal()
        retry_ms(await await_close(client))
        metrics = await relay.metrics()
        assert metrics.value("websocket_expected_deliveries_total") == 2
        assert metrics.value("websocket_deliveries_total") == 2
        assert metrics.value("websocket_closes_total", code="1001") >= 1
        retry_ms(await late.complete_close())
        assert await relay.exit_code() == 0


async def test_a_close_frame_without_a_code_completes_the_closing_handshake(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 0})
    async with relay.raw_client("news") as raw:
        relay.signal()
        code, _ = await raw.read_close_frame()
        assert code == 1001
        await raw.send(frame(CLOSE, b""))
        assert await raw.read_to_end() == b""
    assert await relay.exit_code() == 0
    assert relay.unexpected_lines == []
