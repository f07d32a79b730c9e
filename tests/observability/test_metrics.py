"""What is counted is what happened, to the last message."""

import asyncio
import subprocess
from contextlib import AsyncExitStack

import httpx2
import pytest
import websocket_relay.metrics
from prometheus_client.parser import text_string_to_metric_families

from tests.support.books import assert_books_balance
from tests.support.programs import PROMTOOL, needed
from tests.support.raw_client import TEXT, frame
from tests.support.relay_process import (
    HOST,
    PLAIN,
    Relay,
    StartRelay,
    closed,
    receive,
    receive_many,
)

FOUR = (
    "websocket_connected_clients",
    "websocket_messages_total",
    "websocket_connections_total",
    "websocket_disconnections_total",
)
OTHERS = (
    "websocket_expected_deliveries_total",
    "websocket_deliveries_total",
    "websocket_drops_total",
    "websocket_received_bytes_total",
    "websocket_sent_bytes_total",
    "websocket_closes_total",
    "websocket_refusals_total",
    "websocket_backlog_bytes",
    "websocket_slow_clients",
    "websocket_channels",
    "websocket_paused_publishers",
    "websocket_publisher_pauses_total",
    "websocket_delivery_seconds",
    "websocket_event_loop_lag_seconds",
    "websocket_draining",
    "websocket_draining_clients",
)


async def test_counts_are_exact_before_during_and_after(relay_with: StartRelay) -> None:
    relay = relay_with()
    before = await relay.metrics()
    assert [before.value(name) for name in FOUR] == [0, 0, 0, 0]
    assert_books_balance(before)

    async with AsyncExitStack() as stack:
        news = [await stack.enter_async_context(relay.client("news")) for _ in range(3)]
        chat = await stack.enter_async_context(relay.client("chat"))
        for client in (news[0], news[0], news[1], chat):
            await client.send("12345")
        for client in news:
            await receive_many(client, 3)
        await receive(chat)
        await relay.metric_is("websocket_deliveries_total", 10)
        during = await relay.metrics()
        assert [during.value(name) for name in FOUR] == [4, 4, 4, 0]
        assert during.value("websocket_expected_deliveries_total") == 10
        assert during.value("websocket_channels") == 2
        assert during.value("websocket_received_bytes_total") >= 4 * 5
        assert during.value("websocket_sent_bytes_total") >= 10 * 5
        assert during.value("websocket_backlog_bytes") == 0
        assert during.value("websocket_delivery_seconds_count") > 0
        assert_books_balance(during)

    await relay.metric_is("websocket_connected_clients", 0)
    after = await relay.metrics()
    assert [after.value(name) for name in FOUR] == [0, 4, 4, 4]
    assert after.value("websocket_closes_total", code="1000") == 4
    assert after.value("websocket_drops_total") == 0
    assert after.value("websocket_channels") == 0
    assert_books_balance(after)


async def test_a_fragmented_message_counts_as_one_and_a_ping_as_none(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    async with relay.raw_client("news") as raw:
        await raw.send(frame(TEXT, b"a", fin=False) + frame(9, b"ping") + frame(0, b"b"))
        assert await raw.message() == "ab"
        await relay.metric_is("websocket_messages_total", 1)
        assert await relay.metric("websocket_expected_deliveries_total") == 1


async def test_the_books_balance_after_clients_came_went_and_vanished_under_load(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()

    async def visit(name: int) -> None:
        for _ in range(10):
            async with relay.raw_client("news") as visitor:
                await visitor.send(frame(TEXT, b"x" * 1_000) * 20)
                await visitor.message()
                if name % 2:
                    visitor.vanish()

    async with relay.client("news", max_queue=None) as listener:
        await asyncio.gather(*(visit(name) for name in range(6)))
        await relay.metric_is("websocket_connected_clients", 1)
        await listener.send("the end")
        while await receive(listener) != "the end":
            pass
    await relay.metric_is("websocket_connected_clients", 0)
    metrics = await relay.metrics()
    assert metrics.value("websocket_connections_total") == 61
    assert metrics.value("websocket_messages_total") <= 6 * 10 * 20 + 1
    assert_books_balance(metrics)


async def test_a_refused_client_is_no_connection(relay_with: StartRelay) -> None:
    relay = relay_with()
    async with await relay.tcp() as raw:
        await raw.send(b"GET /channels/news HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await raw.response()).status == 426
    metrics = await relay.metrics()
    assert [metrics.value(name) for name in FOUR] == [0, 0, 0, 0]


async def test_the_closes_are_counted_by_code(relay_with: StartRelay) -> None:
    relay = relay_with()
    async with relay.client("news") as polite:
        await polite.close(4321, "bye")
        await closed(polite)
    async with relay.raw_client("news") as rude:
        await rude.send(frame(TEXT, b"bare", mask=False))
        await rude.close_frame()
    async with relay.raw_client("news") as lost:
        await relay.metric_is("websocket_connected_clients", 1)
        lost.vanish()
    await relay.metric_is("websocket_connected_clients", 0)
    metrics = await relay.metrics()
    assert metrics.value("websocket_closes_total", code="1002") == 1
    assert_books_balance(metrics)


async def test_a_client_cannot_make_new_labels(relay_with: StartRelay) -> None:
    """Labels with a client's own words would grow the page without bound."""
    relay = relay_with()
    for code in range(3_000, 3_060):
        async with relay.client("news") as client:
            await client.close(code, f"reason {code}")
    await relay.metric_is("websocket_disconnections_total", 60)
    series = [s for s in (await relay.metrics()).samples if s.name == "websocket_closes_total"]
    assert len(series) < 40
    assert not [s for s in series if "reason 30" in s.labels["reason"]]


async def test_bounds_stand_beside_what_they_bound(relay_with: StartRelay) -> None:
    relay = relay_with(limits={"max_connections": 7, "total_backlog_bytes": 1_000_000})
    assert await relay.metric("websocket_connections_limit") == 7
    assert await relay.metric("websocket_backlog_limit_bytes") == 1_000_000


async def test_the_page_says_whether_the_relay_is_ready(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"readiness_delay_s": 3})
    assert await relay.metric("websocket_ready") == 1
    relay.signal()
    await relay.metric_is("websocket_ready", 0)
    assert await relay.metric("websocket_draining") == 1


async def test_everything_promised_is_on_the_page(relay: Relay) -> None:
    metrics = await relay.metrics()
    assert not [name for name in (*FOUR, *OTHERS) if name not in metrics.names]
    for name in FOUR:
        (sample,) = (sample for sample in metrics.samples if sample.name == name)
        assert sample.labels == {}


async def test_process_and_garbage_collector_are_on_the_page(relay: Relay) -> None:
    metrics = await relay.metrics()
    assert metrics.value("process_resident_memory_bytes") > 1_000_000
    assert metrics.value("process_open_fds") > 0
    assert metrics.value("process_cpu_seconds_total") > 0
    assert metrics.value("python_gc_collections_total") > 0


async def test_plain_requests_are_measured(relay: Relay) -> None:
    await relay.get("/healthz")  # a series is there from the first on
    before = await relay.metric("http_requests_total", handler="/healthz")
    for _ in range(3):
        await relay.get("/healthz")
    assert await relay.metric("http_requests_total", handler="/healthz") >= before + 3
    assert await relay.metric("http_request_duration_seconds_count") > 0


async def test_unknown_paths_make_no_new_series(relay: Relay) -> None:
    await relay.get("/nowhere-0")
    before = len((await relay.metrics()).samples)
    for number in range(1, 30):
        await relay.get(f"/nowhere-{number}")
        await relay.get(f"/channels/plain-{number}")
    assert len((await relay.metrics()).samples) < before + 40


async def test_the_page_is_prometheus_text(relay: Relay) -> None:
    answer = await relay.get_metrics()
    assert answer.headers["Content-Type"].startswith("text/plain")
    families = list(text_string_to_metric_families(answer.text))
    assert all(family.documentation for family in families)
    assert all(family.type != "unknown" for family in families)
    names = [family.name for family in families]
    assert len(names) == len(set(names))


async def test_promtool_finds_no_fault_with_the_page(relay: Relay) -> None:
    page = (await relay.get_metrics()).text
    verdict = await asyncio.to_thread(
        subprocess.run,
        [str(needed(PROMTOOL)), "check", "metrics"],
        input=page,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    faults = [line for line in verdict.stderr.splitlines() if "websocket_" in line]
    assert faults == []
    assert verdict.returncode in (0, 3)  # 3: advice, here only for others' metrics


TEXT_FORMAT, OPENMETRICS = (
    "text/plain; version=0.0.4;",
    "application/openmetrics-text; version=1.0.0;",
)


@pytest.mark.parametrize(
    ("accept", "format_"),
    [
        ("*/*", TEXT_FORMAT),
        ("text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3", TEXT_FORMAT),
        ("text/plain; version=none", TEXT_FORMAT),
        ("application/openmetrics-text;version=0.0.1,text/plain;version=0.0.4", TEXT_FORMAT),
        ("application/openmetrics-text", OPENMETRICS),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2", OPENMETRICS),
        ("application/openmetrics-text; version=none", OPENMETRICS),
    ],
)
async def test_the_page_has_the_format_that_is_asked_for(
    relay: Relay, accept: str, format_: str
) -> None:
    async with httpx2.AsyncClient(verify=PLAIN) as http:
        url = f"http://{HOST}:{relay.metrics_port}/metrics"
        answer = await http.get(url, headers={"Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(format_)


async def test_requests_share_a_page_whatever_versions_of_a_format_they_name() -> None:
    metrics = websocket_relay.metrics.Metrics()
    accepts = [f"application/openmetrics-text; version=1.0.{number}" for number in range(20)]
    pages = await asyncio.gather(*map(metrics.page, accepts))
    assert all(page is pages[0][0] for page, _ in pages)
