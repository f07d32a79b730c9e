"""Clients of server-sent events: they hear what all hear, and come back without a gap."""

import asyncio
import base64

import pytest

from tests.support.events_client import asking, listening
from tests.support.relay_process import Relay, StartRelay, receive
from tests.support.relay_v1 import say


async def test_a_listener_hears_what_websocket_clients_say(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as speaker, listening(relay, channel) as events:
        for text in ("one", "two", ""):
            await speaker.send(text)
        assert await events.messages(3) == ["one", "two", ""]


async def test_a_listener_that_heard_nothing_yet_comes_back_without_a_gap(
    relay: Relay, channel: str
) -> None:
    await say(relay, channel, "before")
    async with asking(relay, channel) as events:
        welcome = await events.event()
        assert welcome.id == welcome.said["position"]
    await say(relay, channel, "meanwhile")
    async with listening(relay, channel, headers={"Last-Event-ID": welcome.id}) as events:
        assert await events.messages(1) == ["meanwhile"]


async def test_the_answer_is_one_that_proxies_pass_on_at_once(relay: Relay, channel: str) -> None:
    async with listening(relay, channel) as events:
        assert events.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert {"no-store", "no-transform"} <= set(events.headers["cache-control"].split(", "))
        assert events.headers["x-accel-buffering"] == "no"
        assert "transfer-encoding" not in events.headers
        assert "content-length" not in events.headers


async def test_a_proxy_that_speaks_http_1_0_gets_events_too(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as speaker, listening(relay, channel, version="1.0") as old:
        await speaker.send("old")
        assert await old.messages(1) == ["old"]


async def test_binary_comes_as_base64_under_a_name_of_its_own(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as speaker, listening(relay, channel) as events:
        payload = bytes(range(256))
        await speaker.send(payload)
        event = await events.event()
        assert event.name == "binary"
        assert base64.b64decode(event.data) == payload


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("two\nlines", "two\nlines"),
        ("two\r\nlines", "two\nlines"),
        ("two\rlines", "two\nlines"),
        ("\r\r\n\n\rsix lines\r\n", "\n\n\n\nsix lines\n"),
        ("\n", "\n"),
        ("ends with one\n", "ends with one\n"),
        ("data: not a field\nid: 7\n\nretry: 1", "data: not a field\nid: 7\n\nretry: 1"),
        (" space and : colon", " space and : colon"),
        ("grüße 😀", "grüße 😀"),
    ],
)
async def test_what_looks_like_an_event_arrives_as_what_was_said(
    relay: Relay, channel: str, said: str, heard: str
) -> None:
    async with relay.client(channel) as speaker, listening(relay, channel) as events:
        await speaker.send(said)
        await speaker.send("next")
        event = await events.event()
        assert (event.name, event.data) == ("message", heard)
        assert await events.messages(1) == ["next"]


async def test_history_comes_first(relay: Relay, channel: str) -> None:
    await say(relay, channel, *map(str, range(10)))
    async with listening(relay, channel, "?history=3") as events:
        assert await events.messages(3) == ["7", "8", "9"]


@pytest.mark.parametrize("by_header", [True, False])
async def test_a_listener_that_comes_back_misses_nothing(
    relay: Relay, channel: str, by_header: bool
) -> None:
    async with listening(relay, channel) as events:
        await say(relay, channel, "heard")
        last = (await events.event()).id
    await say(relay, channel, *map(str, range(500)))
    headers = {"Last-Event-ID": last} if by_header else {}
    query = "" if by_header else f"?since={last}"
    async with asking(relay, channel, query, headers=headers) as events:
        assert (await events.event()).said["recovered"] is True
        await say(relay, channel, "live")
        assert await events.messages(501) == [*map(str, range(500)), "live"]


async def test_the_id_of_a_browser_goes_before_the_query_of_its_first_request(
    relay: Relay, channel: str
) -> None:
    async with listening(relay, channel) as events:
        await say(relay, channel, "first")
        last = (await events.event()).id
    async with asking(relay, channel, "?since=1-1-1", headers={"Last-Event-ID": last}) as events:
        assert (await events.event()).said["recovered"] is True


async def test_a_listener_is_told_that_something_was_missed(relay: Relay, channel: str) -> None:
    async with asking(relay, channel, "?since=1-1-1") as events:
        assert (await events.event()).said["recovered"] is False


@pytest.mark.parametrize("query", ["?since=yesterday", "?history=many"])
async def test_a_bad_query_is_refused(relay: Relay, channel: str, query: str) -> None:
    async with asking(relay, channel, query) as events:
        assert events.status == 400
        assert (await events.body()).startswith("bad query: ")


async def test_listeners_are_counted_like_any_client(relay: Relay, channel: str) -> None:
    before = await relay.metrics()
    async with relay.client(channel) as speaker, listening(relay, channel) as events:
        await relay.metric_is("websocket_connected_clients", 2)
        await speaker.send("counted")
        assert await events.messages(1) == ["counted"]
        assert await receive(speaker) == "counted"
        for name, more in (("expected_deliveries", 2), ("deliveries", 2), ("connections", 2)):
            was = before.value(f"websocket_{name}_total")
            await relay.metric_is(f"websocket_{name}_total", was + more)
    await relay.metric_is("websocket_connected_clients", 0)
    connection_lost = before.value("websocket_closes_total", reason="connection_lost")
    await relay.metric_is("websocket_closes_total", connection_lost + 1, reason="connection_lost")


async def test_an_idle_listener_is_sent_signs_of_life(relay_with: StartRelay) -> None:
    relay = relay_with(keepalive={"ping_interval_s": 0.2})
    async with relay.client("a") as speaker, listening(relay, "a") as events:
        await asyncio.sleep(1)
        await speaker.send("awake")
        assert await events.messages(1) == ["awake"]
        assert events.comments >= 3
