"""One event stream of several channels: its events, their order, and resuming without a gap."""

import asyncio
import base64
from urllib.parse import quote

import httpx2
import pytest

from tests.support.accounting import assert_counters_add_up_at_rest
from tests.support.admission import jwt_settings
from tests.support.events_client import (
    EventStreamResponse,
    ServerSentEvent,
    request_events,
    subscribe_events,
)
from tests.support.http_requests import TEXT_TYPE, publish_by_post
from tests.support.issuer import sign_token
from tests.support.raw_client import TEXT, frame
from tests.support.relay_process import (
    NO_CA,
    RelayProcess,
    StartRelay,
    StartReplicas,
    receive_many,
)
from tests.support.relay_v1 import (
    connect_relay_v1,
    number_texts,
    open_relay_v1,
    parse_position,
    publish_all,
)


def query_of(*channels: str, **parameters: object) -> str:
    pairs = [*(("channel", name) for name in channels), *parameters.items()]
    return "?" + "&".join(f"{name}={quote(str(value), safe='')}" for name, value in pairs)


async def next_events(events: EventStreamResponse, count: int) -> list[tuple[str, str]]:
    """Return the names and data of the next events."""
    received = [await events.next_event() for _ in range(count)]
    return [(event.name, event.data) for event in received]


async def refusal_of(relay: RelayProcess, query: str, token: str = "") -> tuple[int, str]:
    """Return the status and the text of the answer to a request that is refused."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx2.AsyncClient(verify=NO_CA, trust_env=False) as http:
        response = await http.get(relay.http_url(f"/events{query}"), headers=headers)
        return response.status_code, response.text.strip()


async def test_events_are_named_after_their_channels_and_have_positions_as_ids(
    relay: RelayProcess, channel: str
) -> None:
    names = [f"{channel}.b", f"{channel}.a", f"{channel}:c"]
    async with (
        subscribe_events(relay, None, query_of(*names)) as events,
        open_relay_v1(relay) as publisher,
    ):
        for name in (*names, f"{channel}.of-none"):
            for payload in (f"text of {name}", name.encode() + b"\x00\xff"):
                await publisher.publish(payload, channel=name)
        positions = [(await publisher.next_notice("published"))["position"] for _ in range(8)]
        received = [await events.next_event() for _ in range(6)]
        assert [event.id for event in received] == positions[:6]
        for name, text, binary in zip(names, received[::2], received[1::2], strict=True):
            assert (text.name, text.data) == (f"message:{name}", f"text of {name}")
            assert binary.name == f"binary:{name}"
            assert base64.b64decode(binary.data) == name.encode() + b"\x00\xff"


async def test_a_stream_of_one_channel_by_the_query_is_that_of_its_path(
    relay: RelayProcess, channel: str
) -> None:
    async with (
        subscribe_events(relay, None, query_of(channel, channel)) as by_query,
        subscribe_events(relay, channel, query_of("ignored")) as by_path,
        subscribe_events(relay, None) as of_default,
    ):
        await publish_all(relay, channel, "message", "two\nlines")
        for events in (by_query, by_path):
            expected = [("message", "message"), ("message", "two\nlines")]
            assert await next_events(events, 2) == expected
        await publish_all(relay, "default", "to the default channel")
        assert await next_events(of_default, 1) == [("message", "to the default channel")]
        assert await relay.metric("websocket_channels") == 2


async def test_all_streams_have_the_messages_of_all_channels_in_one_order(
    relay: RelayProcess, channel: str
) -> None:
    names = [f"{channel}.{number}" for number in range(4)]
    count = 100
    async with (
        subscribe_events(relay, None, query_of(*names)) as all_four,
        subscribe_events(relay, None, query_of(*reversed(names))) as in_another_order,
        subscribe_events(relay, None, query_of(names[1], names[3])) as two,
        subscribe_events(relay, names[3]) as one,
    ):

        async def publish(name: str) -> None:
            await publish_all(relay, name, *(f"{name} {number}" for number in range(count)))

        await asyncio.gather(*map(publish, names))
        everything = [await all_four.next_event() for _ in range(4 * count)]
        assert [await in_another_order.next_event() for _ in range(4 * count)] == everything
        positions = [parse_position(event.id) for event in everything]
        assert positions == sorted(set(positions))
        of_two = [event for event in everything if event.name[-1] in "13"]
        assert [await two.next_event() for _ in range(2 * count)] == of_two
        of_one = [event.data for event in everything if event.name[-1] == "3"]
        assert await one.next_messages(count) == of_one
        assert of_one == [f"{names[3]} {number}" for number in range(count)]
        assert await relay.metric("websocket_channels") == 3
    await assert_counters_add_up_at_rest(relay)
    await relay.await_metric("websocket_channels", 0)


async def test_history_is_that_of_all_channels_together(relay: RelayProcess, channel: str) -> None:
    names = [f"{channel}.{number}" for number in range(3)]
    for number in range(9):
        await publish_all(relay, names[number % 3], str(number))
    for count in (1, 4, 9, 100):
        query = query_of(*names[:2], history=count)
        expected = [str(number) for number in range(9) if number % 3 != 2][-count:]
        async with subscribe_events(relay, None, query) as events:
            assert await events.next_messages(len(expected)) == expected
            await publish_all(relay, f"{channel}.2", "of another channel")


@pytest.mark.parametrize("by_header", [True, False])
async def test_a_stream_resumes_over_all_channels_without_a_gap(
    relay: RelayProcess, channel: str, by_header: bool
) -> None:
    names = [f"{channel}.a", f"{channel}.b"]
    async with subscribe_events(relay, None, query_of(*names)) as events:
        await publish_all(relay, names[0], "received")
        last = await events.next_event()
    for number in range(20):
        await publish_all(relay, names[number % 2], str(number))
    query = query_of(*names) if by_header else query_of(*names, since=last.id)
    headers = {"Last-Event-ID": last.id} if by_header else {}
    async with request_events(relay, None, query, headers=headers) as events:
        welcome = await events.next_event()
        assert (welcome.name, welcome.id) == ("welcome", last.id)
        assert welcome.json["recovered"] is True
        await publish_all(relay, names[1], "live")
        assert await events.next_messages(21) == [*number_texts(0, 20), "live"]


async def test_streams_that_resume_during_traffic_have_every_event_once(
    relay: RelayProcess, channel: str
) -> None:
    names = [f"{channel}.{number}" for number in range(3)]
    count = 600

    async def follow(start: str, events_at_a_time: int) -> list[ServerSentEvent]:
        received: list[ServerSentEvent] = []
        last_id = start
        while len(received) < count:
            headers = {"Last-Event-ID": last_id}
            async with request_events(relay, None, query_of(*names), headers=headers) as events:
                assert (await events.next_event()).json["recovered"] is True
                wanted = min(events_at_a_time, count - len(received))
                received += [await events.next_event() for _ in range(wanted)]
                last_id = received[-1].id
        return received

    async def publish() -> None:
        async with open_relay_v1(relay) as client:
            for number in range(count):
                await client.publish(str(number), channel=names[number * number % 3])
                await client.next_notice("published")

    async with request_events(relay, None, query_of(*names)) as events:
        start = (await events.next_event()).id
    async with asyncio.TaskGroup() as group:
        following = [group.create_task(follow(start, 31 + 17 * number)) for number in range(4)]
        group.create_task(publish())
    for task in following:
        assert [event.data for event in task.result()] == number_texts(0, count)
        expected = [f"message:{names[number * number % 3]}" for number in range(count)]
        assert [event.name for event in task.result()] == expected
    await assert_counters_add_up_at_rest(relay)


async def test_a_stream_is_not_recovered_if_messages_of_one_channel_are_missing(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(history={"max_messages": 8})
    async with subscribe_events(relay, None, query_of("a", "b")) as events:
        await publish_all(relay, "a", "received")
        last_id = (await events.next_event()).id
    await publish_all(relay, "a", "of a")
    await publish_all(relay, "b", *number_texts(0, 30))
    headers = {"Last-Event-ID": last_id}
    async with request_events(relay, None, query_of("a", "b"), headers=headers) as events:
        assert (await events.next_event()).json["recovered"] is False
        await publish_all(relay, "a", "live")
        received = [await events.next_event()]
        while received[-1].data != "live":
            received.append(await events.next_event())
        positions = [parse_position(event.id) for event in received]
        assert positions == sorted(set(positions))
        assert received[-2].data == "29"
    async with request_events(relay, None, query_of("a"), headers=headers) as events:
        assert (await events.next_event()).json["recovered"] is True
        assert await events.next_messages(2) == ["of a", "live"]


async def test_a_stream_resumes_on_another_replica(
    replicas_with: StartReplicas,
) -> None:
    one, two = replicas_with(2)
    query = query_of("a", "b")
    async with subscribe_events(one, None, query) as events:
        await publish_by_post(two, "a", b"0", TEXT_TYPE)
        assert await next_events(events, 1) == [("message:a", "0")]
        await publish_by_post(one, "b", b"1", TEXT_TYPE)
        last = await events.next_event()
    for number in range(2, 12):
        await publish_by_post((one, two)[number % 2], "ab"[number % 2], b"%d" % number, TEXT_TYPE)
    headers = {"Last-Event-ID": last.id}
    for relay in (two, one):
        async with request_events(relay, None, query, headers=headers) as events:
            assert (await events.next_event()).json["recovered"] is True
            assert await events.next_messages(10) == number_texts(2, 12)


# Refusals and limits


async def test_wrong_names_and_too_many_channels_are_refused(relay_with: StartRelay) -> None:
    relay = relay_with(limits={"max_channels_per_connection": 3})
    for query in ("?channel=", "?channel=a&channel=", "?channel=a%2Cb", "?channel=a&channel=%00"):
        assert await refusal_of(relay, query) == (404, "no such channel"), query
    assert await refusal_of(relay, query_of("a", "x" * 129)) == (404, "no such channel")
    assert await refusal_of(relay, query_of(*"abcd")) == (400, "invalid query: at most 3 channels")
    many = query_of(*["a"] * 1_001)
    assert await refusal_of(relay, many) == (400, "invalid query: too many parameters")
    async with subscribe_events(relay, None, query_of(*"abcabc")) as events:
        await publish_all(relay, "c", "message")
        assert await next_events(events, 1) == [("message:c", "message")]
    await relay.await_metric("websocket_channels", 0)


async def test_a_stream_of_several_channels_is_one_of_the_relays_channels(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(channels={"max_channels": 2})
    async with relay.client("a") as client:
        async with (
            subscribe_events(relay, None, query_of("a", "b")) as one,
            subscribe_events(relay, None, query_of("b", "a")) as two,
        ):
            assert await relay.metric("websocket_channels") == 2
            assert await refusal_of(relay, query_of("a", "c")) == (503, "too many channels")
            await client.send("message")
            for events in (one, two):
                assert await next_events(events, 1) == [("message:a", "message")]
        await relay.await_metric("websocket_channels", 1)
        async with relay.client("b"):
            assert await refusal_of(relay, query_of("a", "b")) == (503, "too many channels")


async def test_a_stream_needs_the_permission_for_each_channel(relay_with: StartRelay) -> None:
    relay = relay_with(auth=jwt_settings())
    token = sign_token(relay={"subscribe": ["a", "b.*"]})
    for channels in (("a", "c"), ("c",), ("b.1", "b"), ()):
        refused = await refusal_of(relay, query_of(*channels) if channels else "", token)
        assert refused == (403, "not authorized for this channel"), channels
    headers = {"Authorization": f"Bearer {token}"}
    query = query_of("b.1", "a", "b.2")
    async with subscribe_events(relay, None, query, headers=headers) as events:
        response = await publish_by_post(
            relay, "b.2", b"message", TEXT_TYPE, {"Authorization": f"Bearer {sign_token()}"}
        )
        assert response.status_code == 202
        assert await next_events(events, 1) == [("message:b.2", "message")]


async def test_publishers_adapt_to_a_slow_stream_of_several_channels_which_loses_nothing(
    relay_with: StartRelay,
) -> None:
    # The stream is all that subscribes: half of the channels' members, so it is waited for.
    relay = relay_with()
    texts = [f"{number} ".ljust(10_000, "x") for number in range(200)]
    async with await relay.connect_tcp(receive_buffer_bytes=4_096) as slow:
        await slow.send(f"GET /events{query_of('a', 'b')} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert (await slow.read_response()).status == 200
        await relay.await_metric("websocket_connected_clients", 1)

        async def publish() -> None:
            async with open_relay_v1(relay) as publisher:
                for number, text in enumerate(texts):
                    await publisher.publish(text, channel="ab"[number % 2])

        received = bytearray()
        async with asyncio.TaskGroup() as group:
            group.create_task(publish())
            while texts[-1].encode() not in received[-20_000:]:
                chunk = await slow.read_chunk(16_384)
                assert chunk, "the stream has ended"
                received += chunk
        found = [line for line in received.decode().splitlines() if line.startswith("data: ")]
        assert [line.removeprefix("data: ") for line in found[1:]] == texts
    await relay.await_metric("websocket_channels", 0)
    await assert_counters_add_up_at_rest(relay)


async def test_a_stream_that_stalls_slows_the_publishers_of_its_channels_only_and_is_closed(
    relay_with: StartRelay,
) -> None:
    limits = {
        "send_backlog_bytes": 131_072,
        "max_message_bytes": 65_536,
        "handshake_timeout_s": 1,
    }
    relay = relay_with(limits=limits)
    async with (
        await relay.connect_tcp(receive_buffer_bytes=4_096) as stalled,
        open_relay_v1(relay) as publisher,
        open_relay_v1(relay) as other,
    ):
        await stalled.send(f"GET /events{query_of('a', 'b')} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert (await stalled.read_response()).status == 200
        published = 0

        async def publish() -> None:
            nonlocal published
            while True:
                await publisher.publish("x" * 16_000, channel="a")
                published += 1

        publishing = asyncio.create_task(publish())
        await relay.await_metric_at_least("websocket_publisher_pauses_total", 1)
        assert published * 16_000 < 24 << 20, "what the kernel buffers, and the limits"
        await other.publish("to another channel", channel="c")
        await other.next_notice("published")
        await relay.await_metric("websocket_closes_total", 1, reason="slow_consumer")
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        last = await publisher.publish("after", channel="a")
        while (await publisher.next_notice("published"))["id"] < last:
            pass
    await relay.await_metric("websocket_channels", 0)
    await relay.await_metric("websocket_paused_publishers", 0)
    await assert_counters_add_up_at_rest(relay)


async def test_clients_with_and_without_echo_share_channels_with_streams(
    relay: RelayProcess, channel: str
) -> None:
    names = [f"{channel}.a", f"{channel}.b"]
    async with (
        subscribe_events(relay, None, query_of(*names)) as events,
        connect_relay_v1(relay, names[0]) as client,
        relay.client(names[1]) as plain,
        await relay.connect_tcp() as silent,
    ):
        await silent.upgrade(f"/channels/{names[1]}?echo=false")
        await client.publish("one")
        assert await next_events(events, 1) == [(f"message:{names[0]}", "one")]
        await silent.send(frame(TEXT, b"two"))
        await plain.send("three")
        assert await receive_many(plain, 2) in (["two", "three"], ["three", "two"])
        assert await silent.read_message() == "three"
        of_b = await next_events(events, 2)
        assert sorted(of_b) == [(f"message:{names[1]}", "three"), (f"message:{names[1]}", "two")]
    await assert_counters_add_up_at_rest(relay)
