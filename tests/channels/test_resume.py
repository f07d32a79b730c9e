"""Clients that come back, or want to see some first: history, since, relay.v1."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from tests.support.raw_client import CLOSE, TEXT, close_payload, frame, upgrade_request
from tests.support.relay_process import Relay, StartRelay, path_of, receive, receive_many
from tests.support.relay_v1 import Heard, Message, as_numbers, numbers, resuming, say, wanting

# history=N


@pytest.mark.parametrize(("asked", "first"), [(1, 9), (3, 7), (10, 0), (1_000, 0)])
async def test_the_last_messages_of_a_channel_come_first_then_what_is_new(
    relay: Relay, channel: str, asked: int, first: int
) -> None:
    await say(relay, channel, *numbers(0, 10))
    await say(relay, f"not-{channel}", "something else")
    async with relay.client(path=wanting(channel, history=asked)) as client:
        assert await receive_many(client, 10 - first) == numbers(first, 10)
        await client.send("new")
        assert await receive(client) == "new"


@pytest.mark.parametrize("query", ["", "?history=0", "?other=1"])
async def test_who_does_not_ask_hears_only_what_is_new(
    relay: Relay, channel: str, query: str
) -> None:
    await say(relay, channel, "old")
    async with relay.client(path=path_of(channel) + query) as client:
        await client.send("new")
        assert await receive(client) == "new"


async def test_what_is_replayed_is_as_it_came(relay: Relay, channel: str) -> None:
    said: list[Message] = ["text", b"\x00\xff", "", b"", "grüß dich", "x" * 300_000]
    await say(relay, channel, *said)
    async with relay.client(path=wanting(channel, history=10)) as client:
        assert await receive_many(client, len(said)) == said


async def test_history_is_kept_of_a_channel_that_nobody_is_in(relay: Relay, channel: str) -> None:
    await say(relay, channel, "last words")
    await relay.metric_is("websocket_channels", 0)
    async with relay.client(path=wanting(channel, history=1)) as client:
        assert await receive(client) == "last words"


# relay.v1


async def test_a_client_of_relay_v1_is_welcomed_and_told_positions(
    relay: Relay, channel: str
) -> None:
    async with resuming(relay, channel) as told, relay.client(channel) as other:
        assert told.welcome["recovered"] is True
        said: list[Message] = ["text", b"\x00\xff", "", b"", "two\nlines"]
        for message in said:
            await other.send(message)
        assert await told.messages(len(said)) == said
        assert await receive_many(other, len(said)) == said, "who does not ask is told none"
        await told.connection.send("as it is")
        assert await receive(other) == "as it is"
        assert await told.message() == "as it is"


async def test_the_position_of_a_message_is_the_same_for_all(relay: Relay, channel: str) -> None:
    async with resuming(relay, channel) as one, resuming(relay, channel) as two:
        for number in range(20):
            await one.connection.send(str(number))
        assert [await one.numbered() for _ in range(20)] == [
            await two.numbered() for _ in range(20)
        ]


async def test_who_comes_back_hears_what_it_missed_and_goes_on(relay: Relay, channel: str) -> None:
    before = await relay.metric("websocket_history_replays_total", result="recovered")
    async with resuming(relay, channel) as client:
        await say(relay, channel, *numbers(0, 5))
        assert await client.messages(5) == numbers(0, 5)
    await say(relay, channel, *numbers(5, 10))
    async with resuming(relay, channel, since=client.position) as again:
        assert again.welcome == {
            "type": "welcome",
            "recovered": True,
            "position": client.position,
        }
        assert await again.messages(5) == numbers(5, 10)
        await say(relay, channel, "new")
        assert await again.message() == "new"
    after = await relay.metric("websocket_history_replays_total", result="recovered")
    assert after == before + 1


async def test_who_missed_nothing_is_sent_nothing_twice(relay: Relay, channel: str) -> None:
    async with resuming(relay, channel) as client:
        await say(relay, channel, "old")
        assert await client.message() == "old"
    async with resuming(relay, channel, since=client.position) as again:
        assert again.welcome["recovered"] is True
        await say(relay, channel, "new")
        assert await again.message() == "new"


async def test_who_heard_nothing_yet_comes_back_with_the_position_of_its_welcome(
    relay: Relay, channel: str
) -> None:
    async with resuming(relay, channel) as client:
        pass
    await say(relay, channel, "missed")
    async with resuming(relay, channel, since=client.position) as again:
        assert again.welcome["recovered"] is True
        assert await again.message() == "missed"


async def test_who_was_cut_off_in_the_middle_of_its_history_comes_back_for_the_rest(
    relay: Relay, channel: str
) -> None:
    await say(relay, channel, *numbers(0, 10))
    async with resuming(relay, channel, history=5) as client:
        pass
    async with resuming(relay, channel, since=client.position) as again:
        assert await again.messages(5) == numbers(5, 10)


async def test_a_client_that_speaks_something_else_may_bring_a_position_too(
    relay: Relay, channel: str
) -> None:
    async with resuming(relay, channel) as client:
        await say(relay, channel, "heard")
        assert await client.message() == "heard"
    await say(relay, channel, "missed")
    async with relay.client(path=wanting(channel, since=client.position)) as plain:
        assert await receive(plain) == "missed"


async def test_since_counts_before_history(relay: Relay, channel: str) -> None:
    async with resuming(relay, channel) as client:
        await say(relay, channel, *numbers(0, 5))
        await client.messages(4)
    async with resuming(relay, channel, since=client.position, history=100) as again:
        assert await again.messages(1) == numbers(4, 5)


# In the middle of traffic


async def test_clients_that_come_and_go_amid_traffic_miss_nothing_and_hear_nothing_twice(
    relay: Relay, channel: str
) -> None:
    count, comers = 3_000, 10

    async def come_and_go(start: str, often: int) -> list[Message]:
        heard: list[Message] = []
        position = start
        while len(heard) < count:
            async with resuming(relay, channel, since=position) as client:
                assert client.welcome["recovered"] is True
                heard += await client.messages(min(often, count - len(heard)))
                position = client.position
        return heard

    async def talk() -> None:
        async with relay.client(channel, max_queue=None) as client:
            for number in range(count):
                await client.send(str(number))
                if number % 20 == 0:  # not all of it before the others have begun
                    await receive_many(client, 1 if number == 0 else 20)

    async with resuming(relay, channel) as first:
        start = first.position
    async with asyncio.TaskGroup() as group:
        coming = [group.create_task(come_and_go(start, 97 + 31 * n)) for n in range(comers)]
        group.create_task(talk())
    for heard in coming:
        assert heard.result() == numbers(0, count)
    metrics = await relay.metrics()
    assert metrics.value("websocket_expected_deliveries_total") == metrics.value(
        "websocket_deliveries_total"
    ) + metrics.value("websocket_drops_total")


async def test_a_long_history_goes_at_its_readers_pace(relay_with: StartRelay) -> None:
    """It is more than a slow client may have waiting."""
    relay = relay_with(limits={"send_backlog_bytes": 65_536, "max_message_bytes": 16_384})
    said = [f"{number} ".ljust(10_000, "x") for number in range(1_000)]
    async with relay.client("news") as publisher:
        for first in range(0, len(said), 5):
            for message in said[first : first + 5]:
                await publisher.send(message)
            await receive_many(publisher, 5)
    async with await relay.tcp() as raw:
        await raw.upgrade(wanting("news", history=1_000))
        await relay.metric_is("websocket_slow_clients", 1)
        await say(relay, "news", "new")
        heard = [await raw.message() for _ in range(len(said) + 1)]
    assert heard == [*said, "new"]
    assert await relay.metric("websocket_drops_total") == 0


async def test_who_takes_its_history_slower_than_it_is_forgotten_is_closed(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(history={"max_messages": 1_000})
    message = "x" * 10_000
    await say(relay, "news", *[message] * 1_000)
    async with await relay.tcp(receive_buffer_bytes=4096) as raw:
        await raw.upgrade(wanting("news", history=1_000))
        await relay.metric_is("websocket_slow_clients", 1)
        await say(relay, "news", *[message] * 1_000)
        code, _ = await raw.close_frame()
    assert code == 1013
    await relay.metric_is("websocket_closes_total", 1, reason="slow_consumer")


async def test_a_client_that_leaves_amid_its_history_leaves_nothing(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    await say(relay, "news", *["x" * 10_000] * 1_000)
    async with await relay.tcp(receive_buffer_bytes=4096) as raw:
        await raw.upgrade(wanting("news", history=1_000))
        await relay.metric_is("websocket_slow_clients", 1)
        assert await relay.metric("websocket_channels") == 1
        raw.vanish()
    await relay.metric_is("websocket_connected_clients", 0)
    await relay.metric_is("websocket_channels", 0)
    metrics = await relay.metrics()
    assert metrics.value("websocket_expected_deliveries_total") == metrics.value(
        "websocket_deliveries_total"
    ) + metrics.value("websocket_drops_total")


async def test_a_client_may_talk_before_it_has_heard_its_history(
    relay: Relay, channel: str
) -> None:
    await say(relay, channel, *numbers(0, 3))
    async with await relay.tcp() as raw:
        await raw.upgrade(wanting(channel, history=3), behind=frame(TEXT, b"early"))
        assert [await raw.message() for _ in range(4)] == [*numbers(0, 3), "early"]


async def test_who_closes_amid_its_history_is_answered(relay: Relay, channel: str) -> None:
    await say(relay, channel, *numbers(0, 3))
    async with await relay.tcp() as raw:
        request = upgrade_request(wanting(channel, history=3))
        await raw.send(request + frame(CLOSE, close_payload(4000)))
        assert (await raw.response()).status == 101
        assert (await raw.close_frame())[0] == 4000
        await raw.ended()


# What is forgotten


async def comes_back_in_vain(relay: Relay, channel: str, since: str) -> Heard:
    async with resuming(relay, channel, since=since) as again:
        assert again.welcome["recovered"] is False
        await say(relay, channel, "new")
        while await again.message() != "new":
            pass
    return again


@pytest.mark.parametrize(
    "history", [{"max_messages": 5}, {"max_bytes": 3_000}, {"max_messages": 0}]
)
async def test_who_missed_more_than_is_kept_is_told(
    relay_with: StartRelay, channel: str, history: dict[str, int]
) -> None:
    relay = relay_with(history=history)
    async with resuming(relay, channel) as client:
        pass
    await say(relay, channel, *numbers(0, 20))
    await comes_back_in_vain(relay, channel, client.position)
    assert await relay.metric("websocket_history_replays_total", result="not_recovered") == 1
    assert await relay.metric("websocket_history_messages") <= 9


async def test_who_missed_more_than_is_kept_is_sent_what_there_is(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(history={"max_messages": 5})
    async with resuming(relay, channel) as client:
        pass
    await say(relay, channel, *numbers(0, 20))
    async with resuming(relay, channel, since=client.position) as again:
        assert again.welcome["recovered"] is False
        assert await again.messages(5) == numbers(15, 20)
    async with resuming(relay, channel, since=again.welcome["position"]) as once_more:
        assert once_more.welcome["recovered"] is True
        assert await once_more.messages(5) == numbers(15, 20)


async def test_what_is_too_old_is_forgotten(relay_with: StartRelay, channel: str) -> None:
    relay = relay_with(history={"max_age_s": 1})
    async with resuming(relay, channel) as client:
        pass
    await say(relay, channel, "old")
    assert await relay.metric("websocket_history_messages") == 1
    await relay.metric_is("websocket_history_messages", 0)
    assert await relay.metric("websocket_history_bytes") == 0
    await comes_back_in_vain(relay, channel, client.position)


async def test_a_quiet_channel_keeps_its_messages_whatever_is_said_in_another(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(history={"max_messages": 10})
    async with resuming(relay, "quiet") as client:
        await say(relay, "quiet", *numbers(0, 3))
    await say(relay, "noisy", *numbers(0, 50))
    async with resuming(relay, "quiet", since=client.position) as again:
        assert again.welcome["recovered"] is True
        assert await again.messages(3) == numbers(0, 3)
    async with resuming(relay, "noisy", since=client.position) as again:
        assert again.welcome["recovered"] is False
        assert await again.messages(7) == numbers(43, 50)


async def test_who_heard_all_of_a_channel_that_was_forgotten_missed_nothing(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(history={"max_messages": 5})
    async with resuming(relay, "quiet") as client:
        await say(relay, "quiet", "missed", "heard")
        assert await client.messages(2) == ["missed", "heard"]
    for number in range(12):
        await say(relay, f"other-{number}", "one each, so nothing is left of it")
    async with resuming(relay, "quiet", history=5) as empty:
        assert as_numbers(empty.welcome["position"]) > as_numbers(client.position)
    async with resuming(relay, "quiet", since=client.position) as again:
        assert again.welcome["recovered"] is True
        await say(relay, "quiet", "new")
        assert await again.message() == "new"


async def test_after_a_restart_nothing_is_recovered_and_positions_are_greater(
    relay_with: StartRelay, channel: str
) -> None:
    first = relay_with()
    async with resuming(first, channel) as client:
        await say(first, channel, "old")
        await client.message()
    second = relay_with()
    again = await comes_back_in_vain(second, channel, client.position)
    assert as_numbers(again.position) > as_numbers(client.position)


async def test_a_position_that_nobody_has_reached_is_waited_for_a_moment_then_not_recovered(
    relay: Relay, channel: str
) -> None:
    await comes_back_in_vain(relay, channel, "9999999999999-0-0")


# What is refused


@pytest.mark.parametrize(
    "query",
    [
        "since=",
        "since=yesterday",
        "since=1-2",
        "since=1-2-3-4",
        "since=-1-2-3",
        "since=1-2-3&since=1-2-3",
        "since=%F0%9F%98%80",
        "since=" + "9" * 400,
        "since=1-2-" + "9" * 11,
        "history=",
        "history=-1",
        "history=all",
        "history=1.5",
        "history=1&history=2",
        "history=" + "9" * 400,
        "history=%D9%A1",
        "&".join(["since=1-2-3", *["a"] * 5_000]),
    ],
    ids=lambda query: query[:24],
)
async def test_a_bad_query_is_refused_before_the_upgrade(
    relay: Relay, channel: str, query: str
) -> None:
    async with await relay.tcp() as raw:
        await raw.send(upgrade_request(f"{path_of(channel)}?{query}"))
        response = await raw.response()
        assert response.status == 400
        assert (await raw.ended()).startswith(b"bad query: ")


# With everything else


async def test_history_and_positions_go_compressed(relay_with: StartRelay, channel: str) -> None:
    relay = relay_with(compression={"enabled": True, "min_message_bytes": 100})
    said = ["short", *(f"{number} ".ljust(2_000, "x") for number in range(50))]
    await say(relay, channel, *said)
    async with AsyncExitStack() as stack:
        for compression in ("deflate", None):
            client = await stack.enter_async_context(
                resuming(relay, channel, history=100, compression=compression)
            )
            assert await client.messages(len(said)) == said
            await client.connection.send(said[1])
            assert await client.message() == said[1]
            said.append(said[1])


async def test_history_goes_over_tls(tls_relay_with: StartRelay, channel: str) -> None:
    relay = tls_relay_with()
    said = [f"{number} ".ljust(5_000, "x") for number in range(500)]
    await say(relay, channel, *said)
    async with resuming(relay, channel, history=1_000) as client:
        assert await client.messages(len(said)) == said
