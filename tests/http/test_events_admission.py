"""Admission of server-sent events: limits, tokens, channel names, a draining relay."""

import time
from contextlib import AsyncExitStack

import pytest

from tests.support.events_client import EventStreamResponse, request_events, subscribe_events
from tests.support.issuer import SECRET, sign_token
from tests.support.relay_process import RelayProcess, StartRelay


def assert_refused(events: EventStreamResponse, status: int) -> None:
    assert events.status == status
    if status == 503:
        assert 1 <= int(events.headers["retry-after"]) <= 5


async def test_an_event_stream_needs_a_token_in_mode_jwt(relay_with: StartRelay) -> None:
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": SECRET}})
    subscriber = sign_token(relay={"subscribe": ["news"]})
    bearer = {"Authorization": f"Bearer {subscriber}"}
    async with request_events(relay, "news") as events:
        assert_refused(events, 401)
        assert events.headers["www-authenticate"] == "Bearer"
    async with request_events(relay, "news", f"?access_token={subscriber}") as events:
        assert events.status == 200
    async with request_events(relay, "news", headers=bearer) as events:
        assert events.status == 200
    async with request_events(relay, "other", headers=bearer) as events:
        assert_refused(events, 403)
    publisher = {"Authorization": f"Bearer {sign_token(relay={'publish': ['*']})}"}
    async with request_events(relay, "news", headers=publisher) as events:
        assert_refused(events, 403)


async def test_an_event_stream_ends_when_its_token_expires(relay_with: StartRelay) -> None:
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": SECRET}})
    expiring = sign_token(exp=time.time() + 1.2, relay={"subscribe": ["news"]})
    bearer = {"Authorization": f"Bearer {expiring}"}
    async with subscribe_events(relay, "news", headers=bearer) as events:
        close = await events.next_event()
        assert close.name == "close"
        assert close.json == {"code": 3000, "reason": "token expired"}
        with pytest.raises(EOFError):
            await events.next_event()
    await relay.await_metric("websocket_closes_total", 1, reason="token_expired")
    async with request_events(relay, "news", headers=bearer) as events:
        assert_refused(events, 401)


@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_ip"])
async def test_event_streams_and_websocket_clients_share_the_connection_limits(
    relay_with: StartRelay, limit: str
) -> None:
    relay = relay_with(limits={limit: 2})
    reason = limit.removeprefix("max_")
    async with relay.client("a"):
        async with subscribe_events(relay, "a"):
            async with request_events(relay, "b") as third:
                assert_refused(third, 503)
            await relay.await_metric("websocket_refusals_total", 1, reason=reason)
        await relay.await_metric("websocket_connected_clients", 1)
        async with request_events(relay, "b") as third:
            assert third.status == 200


async def test_the_limit_covers_requests_that_wait_for_earlier_responses_to_be_read(
    relay_with: StartRelay,
) -> None:
    """Each request arrives below the limit, and would be admitted when its client reads."""
    relay = relay_with(limits={"max_connections": 1})
    line = b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with AsyncExitStack() as stack:
        clients = []
        for _ in range(4):
            raw = await stack.enter_async_context(
                await relay.connect_tcp(receive_buffer_bytes=4096)
            )
            await raw.send(line % b"/relay.js" * 30 + line % b"/events")
            clients.append(raw)
        for raw in clients:
            received = b""
            while not any(
                end in received for end in (b"text/event-stream; ch", b"too many connections\n")
            ):
                received = received[-100:] + await raw.read_chunk()
        assert await relay.metric("websocket_connected_clients") == 1
        await relay.await_metric("websocket_refusals_total", 3, reason="connections")


async def test_event_streams_create_no_more_channels_than_the_limit(relay_with: StartRelay) -> None:
    relay = relay_with(channels={"max_channels": 1})
    async with subscribe_events(relay, "a"):
        async with request_events(relay, "b") as events:
            assert_refused(events, 503)
        async with request_events(relay, "a") as events:
            assert events.status == 200


async def test_an_invalid_channel_name_is_not_found(relay: RelayProcess) -> None:
    for name in ("a%20b", "..%2f", "x" * 129):
        async with request_events(relay, name) as events:
            assert_refused(events, 404)


async def test_a_draining_relay_refuses_event_streams(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 1})
    async with AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(subscribe_events(relay, "a"))
        relay.signal()
        await relay.await_log("draining")
        async with request_events(relay, "a") as events:
            assert_refused(events, 503)
            assert await events.read_body() == "draining\n"
        assert (await relay.get_metrics("/readyz")).status_code == 503
        assert (await relay.metrics()).value("websocket_refusals_total", reason="draining") == 1
