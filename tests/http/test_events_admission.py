"""Who may listen to server-sent events: limits, tokens, origins, a relay that is full or stops."""

import time
from contextlib import AsyncExitStack

import pytest

from tests.support.events_client import Events, asking, listening
from tests.support.issuer import SECRET, token
from tests.support.relay_process import Relay, StartRelay


def assert_refused(events: Events, status: int) -> None:
    assert events.status == status
    if status == 503:
        assert 1 <= int(events.headers["retry-after"]) <= 5


async def test_a_listener_needs_a_token_where_clients_do(relay_with: StartRelay) -> None:
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": SECRET}})
    rights = token(relay={"subscribe": ["news"]})
    bearer = {"Authorization": f"Bearer {rights}"}
    async with asking(relay, "news") as events:
        assert_refused(events, 401)
        assert events.headers["www-authenticate"] == "Bearer"
    async with asking(relay, "news", f"?access_token={rights}") as events:
        assert events.status == 200
    async with asking(relay, "news", headers=bearer) as events:
        assert events.status == 200
    async with asking(relay, "other", headers=bearer) as events:
        assert_refused(events, 403)
    publisher = {"Authorization": f"Bearer {token(relay={'publish': ['*']})}"}
    async with asking(relay, "news", headers=publisher) as events:
        assert_refused(events, 403)


async def test_a_stream_ends_when_its_token_expires(relay_with: StartRelay) -> None:
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": SECRET}})
    rights = token(exp=time.time() + 1.2, relay={"subscribe": ["news"]})
    bearer = {"Authorization": f"Bearer {rights}"}
    async with listening(relay, "news", headers=bearer) as events:
        close = await events.event()
        assert close.name == "close"
        assert close.said == {"code": 3000, "reason": "token expired"}
        with pytest.raises(EOFError):
            await events.event()
    await relay.metric_is("websocket_closes_total", 1, reason="token_expired")
    async with asking(relay, "news", headers=bearer) as events:
        assert_refused(events, 401)


@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_ip"])
async def test_listeners_and_clients_share_the_limits(relay_with: StartRelay, limit: str) -> None:
    relay = relay_with(limits={limit: 2})
    reason = limit.removeprefix("max_")
    async with relay.client("a"):
        async with listening(relay, "a"):
            async with asking(relay, "b") as third:
                assert_refused(third, 503)
            await relay.metric_is("websocket_refusals_total", 1, reason=reason)
        await relay.metric_is("websocket_connected_clients", 1)
        async with asking(relay, "b") as third:
            assert third.status == 200


async def test_the_limit_holds_for_who_has_not_read_earlier_answers(
    relay_with: StartRelay,
) -> None:
    """Each asks while there is room, and would come in when it reads, all at once."""
    relay = relay_with(limits={"max_connections": 1})
    ask = b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with AsyncExitStack() as stack:
        waiting = []
        for _ in range(4):
            raw = await stack.enter_async_context(await relay.tcp(receive_buffer_bytes=4096))
            await raw.send(ask % b"/relay.js" * 30 + ask % b"/events")
            waiting.append(raw)
        for raw in waiting:
            heard = b""
            while b"text/event-stream; ch" not in heard and b"too many connections\n" not in heard:
                heard = heard[-100:] + await raw.chunk()
        assert await relay.metric("websocket_connected_clients") == 1
        await relay.metric_is("websocket_refusals_total", 3, reason="connections")


async def test_channels_that_listeners_make_are_bounded(relay_with: StartRelay) -> None:
    relay = relay_with(channels={"max_channels": 1})
    async with listening(relay, "a"):
        async with asking(relay, "b") as events:
            assert_refused(events, 503)
        async with asking(relay, "a") as events:
            assert events.status == 200


@pytest.mark.parametrize("name", ["a%20b", "..%2f", "x" * 129])
async def test_no_channel_of_another_name(relay: Relay, name: str) -> None:
    async with asking(relay, name) as events:
        assert_refused(events, 404)


async def test_a_relay_that_stops_lets_no_listener_in(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 1})
    async with AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(listening(relay, "a"))
        relay.signal()
        await relay.wait_for_log("draining")
        async with asking(relay, "a") as events:
            assert_refused(events, 503)
            assert await events.body() == "draining\n"
        assert (await relay.get_metrics("/readyz")).status_code == 503
        assert (await relay.metrics()).value("websocket_refusals_total", reason="draining") == 1
