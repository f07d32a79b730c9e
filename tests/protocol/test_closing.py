"""How connections end: in good order, and by a deadline where the other side does not care."""

import asyncio

import pytest

from tests.support.raw_client import (
    CLOSE,
    PING,
    PONG,
    TEXT,
    RawClient,
    close_payload,
    frame,
)
from tests.support.relay_process import POLL_S, Relay, closed, receive


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1011, 3000, 4999])
async def test_a_clients_close_is_answered_with_its_code(
    relay: Relay, channel: str, code: int
) -> None:
    async with relay.raw_client(channel) as raw:
        await raw.send(frame(CLOSE, close_payload(code, "bye é".encode())))
        assert (await raw.close_frame())[0] == code
        assert await raw.ended() == b""


async def test_an_empty_close_is_answered_with_1000(relay: Relay, channel: str) -> None:
    async with relay.raw_client(channel) as raw:
        await raw.send(frame(CLOSE))
        assert (await raw.close_frame())[0] == 1000
        assert await raw.ended() == b""


async def test_a_usual_client_closes_in_good_order(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as client:
        await client.close(1000, "done")
        assert (await closed(client))[0] == 1000


async def test_a_client_that_never_ends_the_close_it_started_is_dropped_by_the_deadline(
    hasty_relay: Relay, channel: str
) -> None:
    async with hasty_relay.raw_client(channel) as lingering:
        await lingering.send(frame(CLOSE, close_payload(1000)))
        await lingering.close_frame()
        assert await lingering.ended() == b""
        await hasty_relay.metric_is("websocket_connected_clients", 0)


async def test_what_a_client_sent_before_its_close_is_relayed(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as other:
        async with relay.raw_client(channel) as raw:
            await raw.send(frame(TEXT, b"last words") + frame(CLOSE, close_payload(1000)))
            assert (await raw.close_frame())[0] == 1000
        assert await receive(other) == "last words"


MANY = [f"{number} ".ljust(2_000, "x") for number in range(500)]
ALL_OF_THEM = b"".join(frame(TEXT, text.encode()) for text in MANY)
BREACH = frame(TEXT, b"bare", mask=False)


@pytest.mark.parametrize(
    ("end", "code"), [(frame(CLOSE, close_payload(4000)), 4000), (BREACH, 1002)]
)
@pytest.mark.parametrize("finishes", [False, True])
async def test_the_close_comes_behind_the_clients_own_messages(
    relay: Relay, channel: str, end: bytes, code: int, finishes: bool
) -> None:
    async with relay.raw_client(channel) as raw:
        await raw.send(ALL_OF_THEM + end)
        if finishes:
            raw.finish()
        assert [await raw.message() for _ in MANY] == MANY
        assert (await raw.close_frame())[0] == code
        assert await raw.ended() == b""


@pytest.mark.parametrize("end", [frame(CLOSE, close_payload(1000)), BREACH])
async def test_a_client_that_ends_and_reads_nothing_is_cut_off_by_the_deadline(
    hasty_relay: Relay, channel: str, end: bytes
) -> None:
    before = await hasty_relay.metrics()
    async with (
        hasty_relay.raw_client(channel, receive_buffer_bytes=4096) as raw,
        hasty_relay.client(channel) as other,
    ):
        await raw.send(ALL_OF_THEM + end)
        for text in MANY:
            assert await receive(other) == text
        await hasty_relay.metric_is("websocket_connected_clients", 1)
    await hasty_relay.metric_is("websocket_connected_clients", 0)
    after = await hasty_relay.metrics()
    owed, delivered, dropped = (
        after.value(name) - before.value(name)
        for name in (
            "websocket_expected_deliveries_total",
            "websocket_deliveries_total",
            "websocket_drops_total",
        )
    )
    assert owed == delivered + dropped == 2 * len(MANY)


async def test_a_client_that_closes_and_sends_fin_is_answered(relay: Relay, channel: str) -> None:
    async with relay.raw_client(channel) as raw:
        await raw.send(frame(TEXT, b"last words") + frame(CLOSE, close_payload(1000)))
        raw.finish()
        assert (await raw.close_frame())[0] == 1000
        assert await raw.ended() == b""


async def test_what_a_client_sends_behind_its_close_is_ignored(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as other:
        async with relay.raw_client(channel) as raw:
            behind = frame(TEXT, b"too late") + frame(PING, b"too late") + b"\xff\xff\xff"
            await raw.send(frame(CLOSE, close_payload(1000)) + behind)
            assert (await raw.close_frame())[0] == 1000
            assert await raw.ended() == b""
        await other.send("next")
        assert await receive(other) == "next"


async def test_a_message_to_a_channel_is_not_owed_to_who_has_closed(
    relay: Relay, channel: str
) -> None:
    async with relay.client(channel) as other, relay.raw_client(channel) as raw:
        await raw.send(frame(CLOSE, close_payload(1000)))
        await raw.close_frame()
        before = await relay.metric("websocket_expected_deliveries_total")
        await other.send("for one")
        await receive(other)
        await relay.metric_is("websocket_expected_deliveries_total", before + 1)


async def test_a_client_that_starts_a_close_and_reads_no_more_is_dropped_by_the_deadline(
    hasty_relay: Relay, channel: str
) -> None:
    relay = hasty_relay
    async with (
        relay.raw_client(channel, receive_buffer_bytes=4_096) as stuck,
        relay.raw_client(channel) as publisher,
    ):
        # Messages of the size that one backlog may hold, until the kernel takes no more of them.
        while await relay.metric("websocket_backlog_bytes") == 0:
            await publisher.send(frame(TEXT, b"x" * 262_144))
            await publisher.message()
        await stuck.send(frame(CLOSE, close_payload(1000)))
        await relay.metric_is("websocket_connected_clients", 1)
        await relay.metric_is("websocket_backlog_bytes", 0)
        await publisher.send(frame(TEXT, b"still here"))
        assert await publisher.message() == "still here"


async def test_a_client_that_never_answers_the_relays_close_is_dropped_by_the_deadline(
    hasty_relay: Relay, channel: str
) -> None:
    async with hasty_relay.raw_client(channel) as rude:
        await hasty_relay.metric_is("websocket_connected_clients", 1)
        await rude.send(frame(TEXT, b"bare", mask=False))
        assert (await rude.close_frame())[0] == 1002
        await rude.ended()
        await hasty_relay.metric_is("websocket_connected_clients", 0)


async def talk_on(chatty: RawClient) -> None:
    while True:
        await chatty.send(frame(TEXT, b"and another thing") + frame(PONG))
        await asyncio.sleep(POLL_S)


async def test_a_client_that_only_talks_on_after_the_relays_close_is_dropped_by_the_deadline(
    hasty_relay: Relay, channel: str
) -> None:
    async with hasty_relay.client(channel) as bystander:
        async with hasty_relay.raw_client(channel) as chatty:
            await chatty.send(frame(TEXT, b"bare", mask=False))
            assert (await chatty.close_frame())[0] == 1002
            with pytest.raises(ConnectionError):
                await talk_on(chatty)
        await bystander.send("still here")
        assert await receive(bystander) == "still here"
