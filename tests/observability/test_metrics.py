"""The metrics: exact counters, bounded labels, and valid formats."""

import asyncio
import platform
import re
import subprocess
from contextlib import AsyncExitStack

import httpx2
import pytest
import websocket_relay.metrics
from prometheus_client.parser import text_string_to_metric_families
from websocket_relay import __version__

from tests.support.accounting import assert_counters_add_up
from tests.support.programs import PROMTOOL, needed
from tests.support.raw_client import TEXT, frame
from tests.support.relay_process import (
    NO_CA,
    RelayProcess,
    StartRelay,
    await_close,
    receive,
    receive_many,
)

CLIENT_METRICS = (
    "websocket_connected_clients",
    "websocket_messages_total",
    "websocket_connections_total",
    "websocket_disconnections_total",
)
OTHER_METRICS = (
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


async def test_counters_are_exact_before_during_and_after_connections(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    before = await relay.metrics()
    assert [before.value(name) for name in CLIENT_METRICS] == [0, 0, 0, 0]
    assert_counters_add_up(before)

    async with AsyncExitStack() as stack:
        news = [await stack.enter_async_context(relay.client("news")) for _ in range(3)]
        chat = await stack.enter_async_context(relay.client("chat"))
        for client in (news[0], news[0], news[1], chat):
            await client.send("12345")
        for client in news:
            await receive_many(client, 3)
        await receive(chat)
        await relay.await_metric("websocket_deliveries_total", 10)
        during = await relay.metrics()
        assert [during.value(name) for name in CLIENT_METRICS] == [4, 4, 4, 0]
        assert during.value("websocket_expected_deliveries_total") == 10
        assert during.value("websocket_channels") == 2
        assert during.value("websocket_received_bytes_total") >= 4 * 5
        assert during.value("websocket_sent_bytes_total") >= 10 * 5
        assert during.value("websocket_backlog_bytes") == 0
        assert during.value("websocket_delivery_seconds_count") > 0
        assert_counters_add_up(during)

    await relay.await_metric("websocket_connected_clients", 0)
    after = await relay.metrics()
    assert [after.value(name) for name in CLIENT_METRICS] == [0, 4, 4, 4]
    assert after.value("websocket_closes_total", code="1000") == 4
    assert after.value("websocket_drops_total") == 0
    assert after.value("websocket_channels") == 0
    assert_counters_add_up(after)


async def test_a_fragmented_message_counts_as_one_and_a_ping_as_none(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    async with relay.raw_client("news") as raw:
        await raw.send(frame(TEXT, b"a", fin=False) + frame(9, b"ping") + frame(0, b"b"))
        assert await raw.read_message() == "ab"
        await relay.await_metric("websocket_messages_total", 1)
        assert await relay.metric("websocket_expected_deliveries_total") == 1


async def test_the_counters_balance_after_clients_close_or_abort_connections_under_load(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()

    async def publish_and_disconnect(*, aborts: bool) -> None:
        for _ in range(10):
            async with relay.raw_client("news") as publisher:
                await publisher.send(frame(TEXT, b"x" * 1_000) * 20)
                await publisher.read_message()
                if aborts:
                    publisher.reset()

    async with relay.client("news", max_queue=None) as subscriber:
        clients = (publish_and_disconnect(aborts=bool(number % 2)) for number in range(6))
        await asyncio.gather(*clients)
        await relay.await_metric("websocket_connected_clients", 1)
        await subscriber.send("the end")
        while await receive(subscriber) != "the end":
            pass
    await relay.await_metric("websocket_connected_clients", 0)
    metrics = await relay.metrics()
    assert metrics.value("websocket_connections_total") == 61
    assert metrics.value("websocket_messages_total") <= 6 * 10 * 20 + 1
    assert_counters_add_up(metrics)


async def test_a_refused_client_is_not_counted_as_a_connection(relay_with: StartRelay) -> None:
    relay = relay_with()
    async with await relay.connect_tcp() as raw:
        await raw.send(b"GET /channels/news HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await raw.read_response()).status == 426
    metrics = await relay.metrics()
    assert [metrics.value(name) for name in CLIENT_METRICS] == [0, 0, 0, 0]


async def test_closes_are_counted_by_code(relay_with: StartRelay) -> None:
    relay = relay_with()
    async with relay.client("news") as closing:
        await closing.close(4321, "finished")
        await await_close(closing)
    async with relay.raw_client("news") as violating:
        await violating.send(frame(TEXT, b"unmasked", mask=False))
        await violating.read_close_frame()
    async with relay.raw_client("news") as aborting:
        await relay.await_metric("websocket_connected_clients", 1)
        aborting.reset()
    await relay.await_metric("websocket_connected_clients", 0)
    metrics = await relay.metrics()
    assert metrics.value("websocket_closes_total", code="1002") == 1
    assert_counters_add_up(metrics)


async def test_the_close_codes_and_reasons_of_clients_make_no_labels(
    relay_with: StartRelay,
) -> None:
    """Labels that clients choose would make the page grow without bound."""
    relay = relay_with()
    for code in range(3_000, 3_045):
        async with relay.client("news") as client:
            await client.close(code, f"reason {code}")
    await relay.await_metric("websocket_disconnections_total", 45)
    samples = (await relay.metrics()).samples
    series = [sample.labels for sample in samples if sample.name == "websocket_closes_total"]
    assert len(series) < 40
    assert not [labels for labels in series if "reason 30" in labels["reason"]]


async def test_limits_are_metrics(relay_with: StartRelay) -> None:
    relay = relay_with(limits={"max_connections": 7, "total_backlog_bytes": 1_000_000})
    assert await relay.metric("websocket_connections_limit") == 7
    assert await relay.metric("websocket_backlog_limit_bytes") == 1_000_000


async def test_readiness_and_draining_are_metrics(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"readiness_delay_s": 3})
    assert await relay.metric("websocket_ready") == 1
    relay.signal()
    await relay.await_metric("websocket_ready", 0)
    assert await relay.metric("websocket_draining") == 1


async def test_the_page_has_all_metrics_of_clients_and_messages(relay: RelayProcess) -> None:
    metrics = await relay.metrics()
    assert not [name for name in (*CLIENT_METRICS, *OTHER_METRICS) if name not in metrics.names]
    for name in CLIENT_METRICS:
        (sample,) = (sample for sample in metrics.samples if sample.name == name)
        assert sample.labels == {}


async def test_the_page_has_metrics_of_the_process_and_the_garbage_collector(
    relay: RelayProcess,
) -> None:
    metrics = await relay.metrics()
    assert metrics.value("process_resident_memory_bytes") > 1_000_000
    assert metrics.value("process_open_fds") > 0
    assert metrics.value("process_cpu_seconds_total") > 0
    assert metrics.value("python_gc_collections_total") > 0


async def test_http_requests_are_measured(relay: RelayProcess) -> None:
    await relay.get("/healthz")  # creates the series
    before = await relay.metric("http_requests_total", handler="/healthz")
    for _ in range(3):
        await relay.get("/healthz")
    assert await relay.metric("http_requests_total", handler="/healthz") >= before + 3
    assert await relay.metric("http_request_duration_seconds_count") > 0


async def test_unknown_paths_and_channel_names_make_no_series(relay: RelayProcess) -> None:
    await relay.get("/nowhere-0")
    await relay.get("/channels/plain-0")
    before = len((await relay.metrics()).samples)
    for number in range(1, 6):
        await relay.get(f"/nowhere-{number}")
        await relay.get(f"/channels/plain-{number}")
    assert len((await relay.metrics()).samples) == before


async def test_the_page_is_prometheus_text_with_unique_documented_families(
    relay: RelayProcess,
) -> None:
    answer = await relay.get_metrics()
    assert answer.headers["Content-Type"].startswith("text/plain")
    families = list(text_string_to_metric_families(answer.text))
    texts = [each.documentation for each in families if each.name.startswith("websocket_")]
    assert all(re.fullmatch(r"[A-Z][^\n]+[^.\n]\.", text) for text in texts), texts
    assert len(texts) == len(set(texts))
    assert all(family.type != "unknown" for family in families)
    names = [family.name for family in families]
    assert len(names) == len(set(names))


async def test_a_metric_names_the_version_of_the_relay_and_of_python(relay: RelayProcess) -> None:
    labels = {"version": __version__, "python": platform.python_version()}
    assert await relay.metric("websocket_relay_build_info", **labels) == 1


async def test_promtool_accepts_the_page(relay: RelayProcess) -> None:
    page = (await relay.get_metrics()).text
    done = await asyncio.to_thread(
        subprocess.run,
        [str(needed(PROMTOOL)), "check", "metrics"],
        input=page,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    problems = [line for line in done.stderr.splitlines() if "websocket_" in line]
    assert problems == []
    assert done.returncode in (0, 3)  # 3: advice, here for metrics of libraries only


TEXT_FORMAT, OPENMETRICS = (
    "text/plain; version=0.0.4;",
    "application/openmetrics-text; version=1.0.0;",
)


@pytest.mark.parametrize(
    ("accept", "content_type"),
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
@pytest.mark.fast
async def test_the_page_has_the_format_of_the_accept_header(accept: str, content_type: str) -> None:
    _, chosen = await websocket_relay.metrics.Metrics().page(accept)
    assert chosen.startswith(content_type)


async def test_a_response_with_openmetrics_has_its_content_type(relay: RelayProcess) -> None:
    async with httpx2.AsyncClient(verify=NO_CA) as http:
        answer = await http.get(
            relay.metrics_url(), headers={"Accept": "application/openmetrics-text"}
        )
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(OPENMETRICS)


@pytest.mark.fast
async def test_concurrent_requests_for_versions_of_a_format_share_one_page() -> None:
    metrics = websocket_relay.metrics.Metrics()
    accepts = [f"application/openmetrics-text; version=1.0.{number}" for number in range(20)]
    pages = await asyncio.gather(*map(metrics.page, accepts))
    assert all(page is pages[0][0] for page, _ in pages)
