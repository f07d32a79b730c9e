"""Server-sent events: all messages of a channel, and resuming without a gap."""

import asyncio
import base64

import pytest

from tests.support.events_client import request_events, subscribe_events
from tests.support.relay_process import RelayProcess, StartRelay, eventually, receive
from tests.support.relay_v1 import publish_all


async def test_an_event_stream_delivers_what_websocket_clients_publish(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as publisher, subscribe_events(relay, channel) as events:
        for text in ("one", "two", ""):
            await publisher.send(text)
        assert await events.next_messages(3) == ["one", "two", ""]


async def test_an_event_stream_without_a_message_resumes_from_its_welcome(
    relay: RelayProcess, channel: str
) -> None:
    await publish_all(relay, channel, "before")
    async with request_events(relay, channel) as events:
        welcome = await events.next_event()
        assert welcome.id == welcome.json["position"]
    await publish_all(relay, channel, "meanwhile")
    async with subscribe_events(relay, channel, headers={"Last-Event-ID": welcome.id}) as events:
        assert await events.next_messages(1) == ["meanwhile"]


async def test_response_headers_prevent_buffering_and_transformation_by_proxies(
    relay: RelayProcess, channel: str
) -> None:
    async with subscribe_events(relay, channel) as events:
        assert events.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert {"no-store", "no-transform"} <= set(events.headers["cache-control"].split(", "))
        assert events.headers["x-accel-buffering"] == "no"
        assert "transfer-encoding" not in events.headers
        assert "content-length" not in events.headers


async def test_an_http_1_0_client_receives_events(relay: RelayProcess, channel: str) -> None:
    async with (
        relay.client(channel) as publisher,
        subscribe_events(relay, channel, version="1.0") as events,
    ):
        await publisher.send("message")
        assert await events.next_messages(1) == ["message"]


async def test_a_binary_message_is_a_base64_event_named_binary(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as publisher, subscribe_events(relay, channel) as events:
        payload = bytes(range(256))
        await publisher.send(payload)
        event = await events.next_event()
        assert event.name == "binary"
        assert base64.b64decode(event.data) == payload


DATA_OF_TEXTS = {
    "two\nlines": "two\nlines",
    "two\r\nlines": "two\nlines",
    "two\rlines": "two\nlines",
    "\r\r\n\n\rsix lines\r\n": "\n\n\n\nsix lines\n",
    "\n": "\n",
    "ends with one\n": "ends with one\n",
    "data: not a field\nid: 7\n\nretry: 1": "data: not a field\nid: 7\n\nretry: 1",
    " space and : colon": " space and : colon",
    "grüße 😀": "grüße 😀",
}
"""Texts that could be read as fields of an event, or that contain line terminators."""


async def test_a_text_that_looks_like_an_event_is_the_data_of_one_event(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as publisher, subscribe_events(relay, channel) as events:
        for text, expected in DATA_OF_TEXTS.items():
            await publisher.send(text)
            event = await events.next_event()
            assert (event.name, event.data) == ("message", expected)


async def test_history_is_sent_before_live_messages(relay: RelayProcess, channel: str) -> None:
    await publish_all(relay, channel, *map(str, range(10)))
    async with subscribe_events(relay, channel, "?history=3") as events:
        await publish_all(relay, channel, "live")
        assert await events.next_messages(4) == ["7", "8", "9", "live"]


@pytest.mark.parametrize("by_header", [True, False])
async def test_an_event_stream_resumes_without_a_gap(
    relay: RelayProcess, channel: str, by_header: bool
) -> None:
    async with subscribe_events(relay, channel) as events:
        await publish_all(relay, channel, "received")
        last_id = (await events.next_event()).id
    await publish_all(relay, channel, *map(str, range(200)))
    headers = {"Last-Event-ID": last_id} if by_header else {}
    query = "" if by_header else f"?since={last_id}"
    async with request_events(relay, channel, query, headers=headers) as events:
        assert (await events.next_event()).json["recovered"] is True
        await publish_all(relay, channel, "live")
        assert await events.next_messages(201) == [*map(str, range(200)), "live"]


async def test_last_event_id_of_a_browser_takes_precedence_over_the_first_query(
    relay: RelayProcess, channel: str
) -> None:
    async with subscribe_events(relay, channel) as events:
        await publish_all(relay, channel, "first")
        last_id = (await events.next_event()).id
    async with request_events(
        relay, channel, "?since=1-1-1", headers={"Last-Event-ID": last_id}
    ) as events:
        assert (await events.next_event()).json["recovered"] is True


async def test_the_welcome_reports_that_the_history_does_not_hold_the_position(
    relay: RelayProcess, channel: str
) -> None:
    async with request_events(relay, channel, "?since=1-1-1") as events:
        assert (await events.next_event()).json["recovered"] is False


async def test_an_invalid_query_is_refused(relay: RelayProcess, channel: str) -> None:
    for query in ("?since=yesterday", "?history=many"):
        async with request_events(relay, channel, query) as events:
            assert events.status == 400
            assert (await events.read_body()).startswith("invalid query: ")


async def test_event_streams_are_counted_like_websocket_clients(
    relay: RelayProcess, channel: str
) -> None:
    before = await relay.metrics()
    async with relay.client(channel) as publisher, subscribe_events(relay, channel) as events:
        await relay.await_metric("websocket_connected_clients", 2)
        await publisher.send("counted")
        assert await events.next_messages(1) == ["counted"]
        assert await receive(publisher) == "counted"
        for name, added in (("expected_deliveries", 2), ("deliveries", 2), ("connections", 2)):
            value_before = before.value(f"websocket_{name}_total")
            await relay.await_metric(f"websocket_{name}_total", value_before + added)
    await relay.await_metric("websocket_connected_clients", 0)
    connection_lost = before.value("websocket_closes_total", reason="connection_lost")
    await relay.await_metric(
        "websocket_closes_total", connection_lost + 1, reason="connection_lost"
    )


async def test_an_idle_event_stream_receives_keepalive_comments(relay_with: StartRelay) -> None:
    relay = relay_with(keepalive={"ping_interval_s": 0.2})
    async with (
        relay.client("a") as publisher,
        subscribe_events(relay, "a") as events,
        asyncio.TaskGroup() as group,
    ):
        receiving = group.create_task(events.next_messages(1))

        async def comments() -> tuple[bool, object]:
            return events.comments >= 3, events.comments

        await eventually(comments, "three comments")
        await publisher.send("after the comments")
        assert await receiving == ["after the comments"]
