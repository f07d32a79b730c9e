"""The stop: told to go, the relay lets its clients go first, one after another, and in time."""

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
    Relay,
    StartRelay,
    closed,
    environment,
    eventually,
    receive,
    receive_many,
    somebody_reads,
)

MIB = 1_048_576
DRAINING = re.compile(r"draining; retry_ms=(\d+)")
SHORT = {"spread_s": 0.2, "timeout_s": 5}


async def come_in(stack: AsyncExitStack, relay: Relay, count: int) -> list[ClientConnection]:
    return [await stack.enter_async_context(relay.client("news")) for _ in range(count)]


def retry_ms(close: tuple[int | None, str | None]) -> int:
    """Insist that a close is that of a draining relay; return when the client may return."""
    code, reason = close
    assert code == 1001
    found = DRAINING.fullmatch(reason or "")
    assert found, reason
    return int(found[1])


async def readiness_is(relay: Relay, status: int) -> None:
    """Wait until the metrics port says that the relay is ready, or that it is not."""

    async def look() -> tuple[bool, object]:
        answer = await relay.get_metrics("/readyz")
        return answer.status_code == status, answer.text

    await eventually(look, f"readiness {status}")


async def test_a_request_whose_client_is_late_is_refused_and_holds_up_no_stop(
    relay_with: StartRelay,
) -> None:
    """The time-out of the stop is longer than the test waits."""
    relay = relay_with(shutdown={"spread_s": 0, "timeout_s": 60})
    async with await relay.tcp() as publisher:
        await publisher.send(b"POST / HTTP/1.1\r\nHost: relay\r\nContent-Length: 5\r\n\r\nhel")
        await relay.metric_is("websocket_partial_message_bytes", 3)
        relay.signal()
        assert (await publisher.response()).status == 503
        assert await publisher.ended() == b"draining\n"
        assert await relay.exit_code() == 0


async def test_a_connection_that_has_asked_for_nothing_ends_without_an_answer(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    async with await relay.tcp() as silent:
        await relay.metric_is("websocket_http_connections", 1, port="relay")
        relay.signal()
        assert await silent.ended() == b""
        assert await relay.exit_code() == 0


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
async def test_every_client_is_told_to_come_back_and_the_process_ends_cleanly(
    relay_with: StartRelay, number: Signals
) -> None:
    relay = relay_with(shutdown=SHORT)
    async with AsyncExitStack() as stack:
        clients = await come_in(stack, relay, 20)
        started = time.monotonic()
        relay.signal(number)
        closes = await asyncio.gather(*(closed(client) for client in clients))
        assert await relay.exit_code() == 0
        assert time.monotonic() - started < 5 + 3
    returns = {retry_ms(close) for close in closes}
    assert len(returns) > 1, "the clients would all return in the same moment"
    assert (await relay.wait_for_log("draining"))["clients"] == 20
    assert relay.log_events[-1]["event"] == "stopped"


async def test_clients_over_tls_are_told_too(tls_relay_with: StartRelay) -> None:
    relay = tls_relay_with(shutdown=SHORT)
    async with AsyncExitStack() as stack:
        clients = await come_in(stack, relay, 5)
        relay.signal()
        for client in clients:
            retry_ms(await closed(client))
        assert await relay.exit_code() == 0


async def test_a_relay_without_clients_stops_without_waiting(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 40, "timeout_s": 60})
    started = time.monotonic()
    assert await relay.stop() == 0
    assert time.monotonic() - started < 10


async def test_a_client_that_never_reads_does_not_hold_up_the_stop(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 0.2, "timeout_s": 2})
    async with (
        relay.raw_client("news", receive_buffer_bytes=4_096),
        relay.raw_client("news") as publisher,
    ):
        while await relay.metric("websocket_backlog_bytes") == 0:
            await publisher.send(frame(BINARY, bytes(MIB // 4)))
            await publisher.message()
        started = time.monotonic()
        relay.signal()
        retry_ms(await publisher.answer_close())
        assert await relay.exit_code() == 0
        assert time.monotonic() - started < 2 + 3


async def test_a_client_that_never_answers_the_close_does_not_hold_up_the_stop(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 0.2, "timeout_s": 2})
    async with relay.raw_client("news") as rude:
        await relay.metric_is("websocket_connected_clients", 1)
        started = time.monotonic()
        relay.signal()
        retry_ms(await rude.close_frame())
        assert await relay.exit_code() == 0
        assert time.monotonic() - started < 2 + 3


async def test_half_requests_and_kept_connections_do_not_hold_up_the_stop(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 0.2, "timeout_s": 2})
    async with (
        await relay.tcp() as silent,
        await relay.tcp() as half,
        await relay.tcp() as kept,
    ):
        await half.send(b"GET / HTTP/1.1\r\nX-Slow: ")
        await kept.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await kept.response()).status == 200
        started = time.monotonic()
        assert await relay.stop() == 0
        assert time.monotonic() - started < 2 + 3
        await silent.ended()


async def test_a_client_is_closed_by_itself_before_it_is_its_turn(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 0.5, "timeout_s": 5})
    async with AsyncExitStack() as stack:
        clients = await come_in(stack, relay, 10)
        relay.signal()
        await asyncio.gather(*(client.close() for client in clients))
        assert await relay.exit_code() == 0


async def test_readiness_ends_at_once_while_the_relay_serves_on(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"readiness_delay_s": 3, "spread_s": 0.2, "timeout_s": 10})
    ready = await relay.get("/readyz")
    assert ready.status_code == 200
    async with relay.client("news") as early, relay.client("news") as other:
        relay.signal()
        await readiness_is(relay, 503)
        for answer in (await relay.get("/readyz"), await relay.get_metrics("/readyz")):
            assert answer.status_code == 503
            assert "drain" in str(answer.json())
        for answer in (await relay.get("/healthz"), await relay.get_metrics("/healthz")):
            assert answer.status_code == 200
        assert await relay.metric("websocket_draining") == 1

        await early.send("still relayed")
        assert await receive(other) == "still relayed"
        async with relay.client("news") as late:
            await late.send("still let in")
            assert await receive(other) == "still let in"
            retry_ms(await closed(late))
        retry_ms(await closed(other))
        assert await relay.exit_code() == 0


async def test_while_clients_are_closed_the_ports_answer_and_newcomers_are_refused(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 4, "timeout_s": 10})
    async with AsyncExitStack() as stack:
        clients = await come_in(stack, relay, 20)
        relay.signal()
        ends = [asyncio.create_task(closed(client)) for client in clients]
        await asyncio.wait(ends, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)

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
        assert not all(end.done() for end in ends), "all was over before it could be seen"

        for close in await asyncio.gather(*ends):
            retry_ms(close)
        assert await relay.exit_code() == 0


async def test_messages_are_relayed_to_who_is_left_while_clients_are_closed(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 3, "timeout_s": 10})
    async with AsyncExitStack() as stack:
        clients = await come_in(stack, relay, 20)
        relay.signal()
        ends = {asyncio.create_task(client.wait_closed()): client for client in clients}
        await asyncio.wait(ends, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        sender, other, *_ = [client for end, client in ends.items() if not end.done()]
        await sender.send("to who is left")
        assert await receive(other) == "to who is left"
        await asyncio.gather(*ends)
        assert await relay.exit_code() == 0


async def test_the_closes_are_spread_over_the_time_that_is_set(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 2, "timeout_s": 10})

    async def end_of(client: ClientConnection) -> float:
        await closed(client)
        return time.monotonic()

    async with AsyncExitStack() as stack:
        clients = await come_in(stack, relay, 40)
        relay.signal()
        ends = sorted(await asyncio.gather(*(end_of(client) for client in clients)))
        assert ends[-1] - ends[0] > 1, "all at once"
        assert ends[29] - ends[9] > 0.3, "in two bursts"
        assert await relay.exit_code() == 0


async def test_what_was_sent_before_the_stop_arrives_before_the_close(
    relay_with: StartRelay,
) -> None:
    limits = {"send_backlog_bytes": 64 * MIB}
    relay = relay_with(shutdown={"spread_s": 0.2, "timeout_s": 15}, limits=limits)
    count = 64
    async with (
        relay.raw_client("news", receive_buffer_bytes=65_536) as late_reader,
        relay.raw_client("news") as publisher,
    ):
        # More than the kernel takes, so that a part of it waits in the relay itself.
        for number in range(count):
            await publisher.send(frame(BINARY, bytes([number]) * (MIB // 4)))
            await publisher.message()
        assert await relay.metric("websocket_backlog_bytes") > 0
        relay.signal()
        retry_ms(await publisher.answer_close())
        for number in range(count):
            assert await late_reader.message() == bytes([number]) * (MIB // 4)
        retry_ms(await late_reader.answer_close())
        assert await relay.exit_code() == 0


async def test_messages_in_flight_reach_all_or_nobody(relay_with: StartRelay) -> None:
    """What the publisher heard itself, the other client heard too before it was closed."""
    relay = relay_with(shutdown={"spread_s": 0, "timeout_s": 10})
    async with relay.client("news") as publisher, relay.client("news") as other:
        sent = 500
        for number in range(sent):
            await publisher.send(str(number))
        assert await receive_many(publisher, sent) == [str(number) for number in range(sent)]
        relay.signal()
        assert await receive_many(other, sent) == [str(number) for number in range(sent)]
        retry_ms(await closed(other))
        assert await relay.exit_code() == 0


async def test_a_stop_in_the_middle_of_a_flood_is_clean_and_in_time(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 0.2, "timeout_s": 5})
    wire = frame(BINARY, bytes(65_536)) * 8

    async def publish(raw: RawClient) -> None:
        with suppress(ConnectionError):  # the relay's end of it
            while True:
                await raw.send(wire)

    async with (
        relay.raw_client("news") as publisher,
        relay.raw_client("news") as reader,
        asyncio.TaskGroup() as group,
    ):
        flood = group.create_task(publish(publisher))
        for _ in range(50):
            await publisher.message()
            await reader.message()
        started = time.monotonic()
        relay.signal()
        endings = [group.create_task(raw.close_frame()) for raw in (publisher, reader)]
        for ending in endings:
            retry_ms(await ending)
        assert await relay.exit_code() == 0
        assert time.monotonic() - started < 5 + 3
        await flood


async def test_a_second_interrupt_ends_it_now(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"readiness_delay_s": 30, "spread_s": 20, "timeout_s": 60})
    async with relay.client("news"):
        started = time.monotonic()
        relay.signal(SIGINT)
        await relay.wait_for_log("draining")
        relay.signal(SIGINT)
        assert await relay.exit_code() == 0
        assert time.monotonic() - started < 15


async def test_a_second_sigterm_does_not_disturb_the_stop(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 1, "timeout_s": 10})
    async with AsyncExitStack() as stack:
        clients = await come_in(stack, relay, 5)
        relay.signal(SIGTERM)
        await relay.wait_for_log("draining")
        relay.signal(SIGTERM)
        for client in clients:
            retry_ms(await closed(client))
        assert await relay.exit_code() == 0


async def test_the_longest_spread_still_ends_by_the_timeout(relay_with: StartRelay) -> None:
    """A settings error would be as good; a stop that takes longer than it may is not."""
    relay = relay_with(shutdown={"spread_s": 2, "timeout_s": 2})
    async with AsyncExitStack() as stack:
        clients = await come_in(stack, relay, 5)
        started = time.monotonic()
        relay.signal()
        for client in clients:
            retry_ms(await closed(client))
        assert await relay.exit_code() == 0
        assert time.monotonic() - started < 2 + 3


@pytest.fixture
def starting_relay(tmp_path: Path) -> Iterator[Relay]:
    """A relay that is launched and not waited for."""
    relay = Relay(tmp_path)
    try:
        relay.launch()
        yield relay
    finally:
        relay.end()
    assert relay.complaints == []


async def test_a_stop_while_it_starts_is_a_clean_stop(starting_relay: Relay) -> None:
    await starting_relay.wait_for_log("metrics listening")
    assert await starting_relay.stop(SIGTERM) == 0


async def test_a_stop_before_the_settings_are_read_is_a_clean_stop(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    relay = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "websocket_relay", cwd=tmp_path, env=environment()
    )
    try:
        async with somebody_reads(tmp_path / "config.yaml"):
            relay.terminate()
        async with asyncio.timeout(PATIENCE_S):
            assert await relay.wait() == 0
    finally:
        with suppress(ProcessLookupError):
            relay.kill()
        await relay.wait()


async def test_clients_of_the_ended_relay_find_the_port_closed(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown=SHORT)
    async with relay.client("news") as client:
        relay.signal()
        retry_ms(await closed(client))
        assert await relay.exit_code() == 0
    with pytest.raises(ConnectionRefusedError):
        await relay.tcp()


async def test_the_books_are_right_while_it_stops(relay_with: StartRelay) -> None:
    """One client takes its time to answer, so that there is time to read them."""
    relay = relay_with(shutdown={"spread_s": 0.1, "timeout_s": 3})
    async with relay.raw_client("news") as late, relay.client("news") as client:
        await client.send("hello")
        assert await receive(client) == "hello"
        assert await late.message() == "hello"
        relay.signal()
        retry_ms(await closed(client))
        metrics = await relay.metrics()
        assert metrics.value("websocket_expected_deliveries_total") == 2
        assert metrics.value("websocket_deliveries_total") == 2
        assert metrics.value("websocket_closes_total", code="1001") >= 1
        retry_ms(await late.answer_close())
        assert await relay.exit_code() == 0


async def test_a_close_without_a_code_is_an_answer_too(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 0})
    async with relay.raw_client("news") as raw:
        relay.signal()
        code, _ = await raw.close_frame()
        assert code == 1001
        await raw.send(frame(CLOSE, b""))
        assert await raw.ended() == b""
    assert await relay.exit_code() == 0
    assert relay.complaints == []
