"""History and recovery: `history` and `since`."""

import asyncio
from collections.abc import Mapping
from contextlib import AsyncExitStack

import pytest

from tests.support.raw_client import CLOSE, TEXT, close_payload, frame, upgrade_request
from tests.support.relay_process import (
    MetricsPage,
    RelayProcess,
    StartRelay,
    path_of,
    receive,
    receive_many,
)
from tests.support.relay_v1 import (
    Message,
    RelayV1Client,
    connect_relay_v1,
    number_texts,
    parse_position,
    path_with_query,
    publish_all,
)


def assert_deliveries_add_up(metrics: MetricsPage) -> None:
    done = metrics.value("websocket_deliveries_total") + metrics.value("websocket_drops_total")
    assert metrics.value("websocket_expected_deliveries_total") == done


# history=N


async def test_the_last_messages_of_the_channel_precede_new_ones(
    relay: RelayProcess, channel: str
) -> None:
    await publish_all(relay, channel, *number_texts(0, 10))
    await publish_all(relay, f"not-{channel}", "message of another channel")
    published = number_texts(0, 10)
    for count in (1, 3, 10, 1_000):
        async with relay.client(path=path_with_query(channel, history=count)) as client:
            expected = published[-count:]
            assert await receive_many(client, len(expected)) == expected
            await client.send(f"new {count}")
            assert await receive(client) == f"new {count}"
            published.append(f"new {count}")


async def test_without_a_request_for_history_a_client_receives_only_new_messages(
    relay: RelayProcess, channel: str
) -> None:
    await publish_all(relay, channel, "old")
    for query in ("", "?history=0", "?other=1"):
        async with relay.client(path=path_of(channel) + query) as client:
            await client.send("new")
            assert await receive(client) == "new"


async def test_replayed_messages_are_unchanged(relay: RelayProcess, channel: str) -> None:
    published: list[Message] = ["text", b"\x00\xff", "", b"", "grüß dich", "x" * 300_000]
    await publish_all(relay, channel, *published)
    async with relay.client(path=path_with_query(channel, history=10)) as client:
        assert await receive_many(client, len(published)) == published


async def test_the_history_of_a_channel_outlives_its_last_client(
    relay: RelayProcess, channel: str
) -> None:
    await publish_all(relay, channel, "last message")
    await relay.await_metric("websocket_channels", 0)
    async with relay.client(path=path_with_query(channel, history=1)) as client:
        assert await receive(client) == "last message"


# relay.v1


async def test_a_relay_v1_client_receives_positions_and_a_plain_client_does_not(
    relay: RelayProcess, channel: str
) -> None:
    async with connect_relay_v1(relay, channel) as resumable, relay.client(channel) as plain:
        assert resumable.subscribed["recovered"] is True
        published: list[Message] = ["text", b"\x00\xff", "", b"", "two\nlines"]
        for message in published:
            await plain.send(message)
        assert await resumable.next_messages(len(published)) == published
        assert await receive_many(plain, len(published)) == published
        await resumable.publish("from a client of relay.v1")
        assert await receive(plain) == "from a client of relay.v1"
        assert await resumable.next_message() == "from a client of relay.v1"


async def test_the_position_of_a_message_is_the_same_for_all_clients(
    relay: RelayProcess, channel: str
) -> None:
    async with connect_relay_v1(relay, channel) as one, connect_relay_v1(relay, channel) as two:
        for number in range(20):
            await one.publish(str(number))
        for _ in range(20):
            assert await one.next_message() == await two.next_message()
            assert one.position == two.position


async def test_a_client_that_resumes_receives_the_messages_after_its_position_and_new_ones(
    relay: RelayProcess, channel: str
) -> None:
    before = await relay.metric("websocket_history_replays_total", result="recovered")
    async with connect_relay_v1(relay, channel) as client:
        await publish_all(relay, channel, *number_texts(0, 5))
        assert await client.next_messages(5) == number_texts(0, 5)
    await publish_all(relay, channel, *number_texts(5, 10))
    async with connect_relay_v1(relay, channel, since=client.position) as resumed:
        assert resumed.recovery == (True, client.position)
        assert await resumed.next_messages(5) == number_texts(5, 10)
        await publish_all(relay, channel, "new")
        assert await resumed.next_message() == "new"
    after = await relay.metric("websocket_history_replays_total", result="recovered")
    assert after == before + 1
    async with connect_relay_v1(relay, channel, since=resumed.position) as up_to_date:
        assert up_to_date.subscribed["recovered"] is True
        await publish_all(relay, channel, "newer")
        assert await up_to_date.next_message() == "newer"


async def test_a_client_without_messages_resumes_at_the_position_of_its_welcome(
    relay: RelayProcess, channel: str
) -> None:
    async with connect_relay_v1(relay, channel) as client:
        pass
    await publish_all(relay, channel, "after the disconnection")
    async with connect_relay_v1(relay, channel, since=client.position) as resumed:
        assert resumed.subscribed["recovered"] is True
        assert await resumed.next_message() == "after the disconnection"


async def test_a_client_that_disconnects_during_its_history_resumes_with_the_rest(
    relay: RelayProcess, channel: str
) -> None:
    await publish_all(relay, channel, *number_texts(0, 10))
    async with connect_relay_v1(relay, channel, history=5) as client:
        pass
    async with connect_relay_v1(relay, channel, since=client.position) as resumed:
        assert await resumed.next_messages(5) == number_texts(5, 10)


async def test_a_plain_client_may_resume_at_a_position(relay: RelayProcess, channel: str) -> None:
    async with connect_relay_v1(relay, channel) as client:
        await publish_all(relay, channel, "received")
        assert await client.next_message() == "received"
    await publish_all(relay, channel, "after the disconnection")
    async with relay.client(path=path_with_query(channel, since=client.position)) as plain:
        assert await receive(plain) == "after the disconnection"


async def test_since_precedes_history(relay: RelayProcess, channel: str) -> None:
    async with connect_relay_v1(relay, channel) as client:
        await publish_all(relay, channel, *number_texts(0, 5))
        await client.next_messages(4)
    async with connect_relay_v1(relay, channel, since=client.position, history=100) as resumed:
        assert await resumed.next_messages(1) == number_texts(4, 5)


# During traffic


async def test_clients_that_resume_during_traffic_receive_every_message_once(
    relay: RelayProcess, channel: str
) -> None:
    count = 1_500

    async def resume_repeatedly(start: str, messages_at_a_time: int) -> list[Message]:
        received: list[Message] = []
        position = start
        while len(received) < count:
            async with connect_relay_v1(relay, channel, since=position) as client:
                assert client.subscribed["recovered"] is True
                wanted = min(messages_at_a_time, count - len(received))
                received += await client.next_messages(wanted)
                position = client.position
        return received

    async def publish() -> None:
        async with relay.client(channel, max_queue=None) as client:
            for number in range(count):
                await client.send(str(number))
                if number % 20 == 0:  # so that clients resume while messages are published
                    await receive_many(client, 1 if number == 0 else 20)

    async with connect_relay_v1(relay, channel) as first:
        start = first.position
    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(resume_repeatedly(start, 47 + 31 * n)) for n in range(6)]
        group.create_task(publish())
    for client in clients:
        assert client.result() == number_texts(0, count)
    assert_deliveries_add_up(await relay.metrics())


async def test_a_history_above_the_backlog_limit_is_replayed_as_fast_as_its_client_reads(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"send_backlog_bytes": 65_536, "max_message_bytes": 16_384})
    published = [f"{number} ".ljust(10_000, "x") for number in range(1_000)]
    async with relay.client("news") as publisher:
        for first in range(0, len(published), 5):
            for message in published[first : first + 5]:
                await publisher.send(message)
            await receive_many(publisher, 5)
    async with await relay.connect_tcp() as raw:
        await raw.upgrade(path_with_query("news", history=1_000))
        await relay.await_metric("websocket_slow_clients", 1)
        await publish_all(relay, "news", "new")
        received = [await raw.read_message() for _ in range(len(published) + 1)]
    assert received == [*published, "new"]
    assert await relay.metric("websocket_drops_total") == 0


async def test_a_client_that_reads_slower_than_its_history_is_removed_is_closed(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(history={"max_messages": 1_000})
    message = "x" * 10_000
    await publish_all(relay, "news", *[message] * 1_000)
    async with await relay.connect_tcp(receive_buffer_bytes=4096) as raw:
        await raw.upgrade(path_with_query("news", history=1_000))
        await relay.await_metric("websocket_slow_clients", 1)
        await publish_all(relay, "news", *[message] * 1_000)
        code, _ = await raw.read_close_frame()
    assert code == 1013
    await relay.await_metric("websocket_closes_total", 1, reason="slow_consumer")


async def test_nothing_is_left_of_a_client_that_is_reset_during_its_history(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    await publish_all(relay, "news", *["x" * 10_000] * 1_000)
    async with await relay.connect_tcp(receive_buffer_bytes=4096) as raw:
        await raw.upgrade(path_with_query("news", history=1_000))
        await relay.await_metric("websocket_slow_clients", 1)
        assert await relay.metric("websocket_channels") == 1
        raw.reset()
    await relay.await_metric("websocket_connected_clients", 0)
    await relay.await_metric("websocket_channels", 0)
    assert_deliveries_add_up(await relay.metrics())


async def test_a_message_in_the_same_packet_as_the_request_is_delivered_after_the_history(
    relay: RelayProcess, channel: str
) -> None:
    await publish_all(relay, channel, *number_texts(0, 3))
    async with await relay.connect_tcp() as raw:
        await raw.upgrade(path_with_query(channel, history=3), trailing=frame(TEXT, b"early"))
        assert [await raw.read_message() for _ in range(4)] == [*number_texts(0, 3), "early"]


async def test_a_close_frame_in_the_same_packet_as_the_request_is_answered(
    relay: RelayProcess, channel: str
) -> None:
    await publish_all(relay, channel, *number_texts(0, 3))
    async with await relay.connect_tcp() as raw:
        request = upgrade_request(path_with_query(channel, history=3))
        await raw.send(request + frame(CLOSE, close_payload(4000)))
        assert (await raw.read_response()).status == 101
        assert (await raw.read_close_frame())[0] == 4000
        await raw.read_to_end()


# Messages that history no longer has


async def resume_unrecovered(relay: RelayProcess, channel: str, since: str) -> RelayV1Client:
    """Resume, assert that the client is not recovered, and read up to a new message."""
    async with connect_relay_v1(relay, channel, since=since) as client:
        assert client.subscribed["recovered"] is False
        await publish_all(relay, channel, "new")
        while await client.next_message() != "new":
            pass
    return client


@pytest.mark.parametrize(
    "history", [{"max_messages": 5}, {"max_bytes": 3_000}, {"max_messages": 0}], ids=str
)
async def test_a_client_is_not_recovered_when_history_has_removed_messages_after_its_position(
    relay_with: StartRelay, channel: str, history: Mapping[str, int]
) -> None:
    relay = relay_with(history=history)
    async with connect_relay_v1(relay, channel) as client:
        pass
    await publish_all(relay, channel, *number_texts(0, 20))
    await resume_unrecovered(relay, channel, client.position)
    assert await relay.metric("websocket_history_replays_total", result="not_recovered") == 1
    assert await relay.metric("websocket_history_messages") <= 9


async def test_a_client_that_is_not_recovered_receives_the_messages_that_history_has(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(history={"max_messages": 5})
    async with connect_relay_v1(relay, channel) as client:
        pass
    await publish_all(relay, channel, *number_texts(0, 20))
    async with connect_relay_v1(relay, channel, since=client.position) as resumed:
        assert resumed.subscribed["recovered"] is False
        assert await resumed.next_messages(5) == number_texts(15, 20)
    async with connect_relay_v1(
        relay, channel, since=resumed.subscribed["position"]
    ) as resumed_again:
        assert resumed_again.subscribed["recovered"] is True
        assert await resumed_again.next_messages(5) == number_texts(15, 20)


async def test_messages_older_than_max_age_s_are_removed(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(history={"max_age_s": 0.1})
    async with connect_relay_v1(relay, channel) as client:
        pass
    await publish_all(relay, channel, "old")
    await relay.await_metric("websocket_history_messages", 0)
    assert await relay.metric("websocket_history_bytes") == 0
    await resume_unrecovered(relay, channel, client.position)


async def test_a_channel_keeps_its_history_however_many_messages_another_has(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(history={"max_messages": 10})
    async with connect_relay_v1(relay, "quiet") as client:
        await publish_all(relay, "quiet", *number_texts(0, 3))
    await publish_all(relay, "busy", *number_texts(0, 50))
    async with connect_relay_v1(relay, "quiet", since=client.position) as resumed:
        assert resumed.subscribed["recovered"] is True
        assert await resumed.next_messages(3) == number_texts(0, 3)
    async with connect_relay_v1(relay, "busy", since=client.position) as resumed:
        assert resumed.subscribed["recovered"] is False
        assert await resumed.next_messages(7) == number_texts(43, 50)


async def test_a_client_with_every_message_of_its_channel_is_recovered_after_their_removal(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(history={"max_messages": 5})
    async with connect_relay_v1(relay, "quiet") as client:
        await publish_all(relay, "quiet", "first", "last")
        assert await client.next_messages(2) == ["first", "last"]
    for number in range(12):
        await publish_all(
            relay, f"other-{number}", "fills the history with one message for each channel"
        )
    async with connect_relay_v1(relay, "quiet", history=5) as empty:
        assert parse_position(empty.subscribed["position"]) > parse_position(client.position)
    async with connect_relay_v1(relay, "quiet", since=client.position) as resumed:
        assert resumed.subscribed["recovered"] is True
        await publish_all(relay, "quiet", "new")
        assert await resumed.next_message() == "new"


async def test_after_a_restart_no_client_is_recovered_and_positions_are_greater(
    relay_with: StartRelay, channel: str
) -> None:
    first = relay_with()
    async with connect_relay_v1(first, channel) as client:
        await publish_all(first, channel, "old")
        await client.next_message()
    second = relay_with()
    resumed = await resume_unrecovered(second, channel, client.position)
    assert parse_position(resumed.position) > parse_position(client.position)


async def test_a_position_that_is_not_reached_soon_is_not_recovered(
    relay: RelayProcess, channel: str
) -> None:
    await resume_unrecovered(relay, channel, "9999999999999-0-0")


# Invalid queries


async def test_an_invalid_query_is_refused_with_400_before_the_upgrade(
    relay: RelayProcess, channel: str
) -> None:
    for query in (
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
        "echo=no",
        "echo=false&echo=true",
        "&".join(["since=1-2-3", *["a"] * 5_000]),
    ):
        async with await relay.connect_tcp() as raw:
            await raw.send(upgrade_request(f"{path_of(channel)}?{query}"))
            response = await raw.read_response()
            assert response.status == 400, query[:24]
            assert (await raw.read_to_end()).startswith(b"invalid query: "), query[:24]


# With compression and TLS


async def test_history_and_positions_are_compressed(relay_with: StartRelay, channel: str) -> None:
    relay = relay_with(compression={"enabled": True, "min_message_bytes": 100})
    published = ["short", *(f"{number} ".ljust(2_000, "x") for number in range(50))]
    await publish_all(relay, channel, *published)
    async with AsyncExitStack() as stack:
        for compression in ("deflate", None):
            client = await stack.enter_async_context(
                connect_relay_v1(relay, channel, history=100, compression=compression)
            )
            assert await client.next_messages(len(published)) == published
            await client.publish(published[1])
            assert await client.next_message() == published[1]
            published.append(published[1])


async def test_history_is_replayed_over_tls(tls_relay_with: StartRelay, channel: str) -> None:
    relay = tls_relay_with()
    published = [f"{number} ".ljust(5_000, "x") for number in range(500)]
    await publish_all(relay, channel, *published)
    async with connect_relay_v1(relay, channel, history=1_000) as client:
        assert await client.next_messages(len(published)) == published
