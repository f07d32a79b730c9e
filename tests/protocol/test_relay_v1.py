"""The subprotocol relay.v1: commands, answers, limits, and what its clients share with others."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from tests.support.accounting import assert_counters_add_up_at_rest
from tests.support.events_client import subscribe_events
from tests.support.raw_client import CLOSE, TEXT, RawClient, close_payload, frame
from tests.support.relay_process import (
    RelayProcess,
    StartRelay,
    await_close,
    path_of,
    receive,
    receive_many,
)
from tests.support.relay_v1 import (
    Message,
    Notice,
    RelayV1Client,
    connect_relay_v1,
    decode,
    encode_command,
    number_texts,
    open_relay_v1,
    parse_position,
    path_with_query,
    publish_all,
)

KIB = 1_024
PAYLOADS: list[Message] = [
    *(
        "text",
        "",
        "\n",
        "two\nlines\n",
        "\r\n",
        '{"type":"ping","id":1}',
        "grüße 😀",
        "x" * 100_000,
    ),
    *(b"", b"\n", b"\n\n\x00\xff", bytes(range(256)), b"x" * 100_000),
]


def command_frame(kind: str, payload: str = "", **fields: object) -> bytes:
    """Return a command as a frame."""
    text = encode_command(kind, payload, **fields)
    assert isinstance(text, str)
    return frame(TEXT, text.encode())


@asynccontextmanager
async def open_raw(
    relay: RelayProcess, path: str = "/", *, receive_buffer_bytes: int | None = None
) -> AsyncIterator[RawClient]:
    """Connect a raw client with relay.v1, and read its welcome."""
    async with await relay.connect_tcp(receive_buffer_bytes=receive_buffer_bytes) as raw:
        await raw.upgrade(path, Sec_WebSocket_Protocol="relay.v1")
        assert (await next_header(raw))["type"] == "welcome"
        yield raw


async def next_header(raw: RawClient) -> Notice:
    return decode(await raw.read_message())[0]


async def next_kinds(raw: RawClient, count: int) -> list[tuple[str, int | None]]:
    """Return the types and ids of the next messages."""
    headers = [await next_header(raw) for _ in range(count)]
    return [(header.get("type", "message"), header.get("id")) for header in headers]


async def refusals(relay: RelayProcess, reason: str) -> float:
    return await relay.metric("websocket_refusals_total", reason=reason)


# The welcome


async def test_the_welcome_names_the_client_its_session_and_a_position(
    relay: RelayProcess, channel: str
) -> None:
    await publish_all(relay, channel, "before")
    async with open_relay_v1(relay) as one, open_relay_v1(relay) as two:
        for client in (one, two):
            welcome = client.welcome
            assert set(welcome) == {
                *("type", "client", "session", "resumed", "position", "heartbeat_ms")
            }
            assert welcome["resumed"] is False
            assert welcome["heartbeat_ms"] == 20_000
            assert welcome["session"].startswith(f"{welcome['position']}.")
        assert one.welcome["client"] != two.welcome["client"]
        assert one.welcome["session"] != two.welcome["session"]
        before = parse_position(two.welcome["position"])
        await one.send("publish", "message", channel=channel)
        assert parse_position((await one.next_notice("published"))["position"]) > before


async def test_a_client_on_the_root_path_has_no_channel_until_it_subscribes(
    relay: RelayProcess,
) -> None:
    async with open_relay_v1(relay, "/?history=5&since=1-1-1") as client:
        await publish_all(relay, "default", "to the default channel")
        await client.send("ping")
        assert await client.next_notice() == {"type": "pong", "id": 1}
        assert (await client.subscribe("default"))["type"] == "subscribed"


# Commands


async def test_a_subscription_is_answered_then_live_and_delivers_until_it_ends(
    relay: RelayProcess, channel: str
) -> None:
    async with open_relay_v1(relay) as client, relay.client(channel) as plain:
        subscribed = await client.subscribe(channel)
        position = subscribed["position"]
        assert subscribed == {
            "type": "subscribed",
            "channel": channel,
            "id": 1,
            "recovered": True,
            "position": position,
        }
        live = {"type": "live", "channel": channel, "position": position}
        assert await client.next_notice("live") == live
        await plain.send("delivered")
        header, payload = await client.receive()
        assert (set(header), payload) == ({"channel", "position"}, "delivered")
        assert header["channel"] == channel
        number = await client.send("unsubscribe", channel=channel)
        unsubscribed = {"type": "unsubscribed", "channel": channel, "id": number}
        assert await client.next_notice() == unsubscribed
        await plain.send("not delivered")
        assert await receive_many(plain, 2) == ["delivered", "not delivered"]
        number = await client.send("ping")
        assert await client.next_notice() == {"type": "pong", "id": number}


async def test_payloads_are_unchanged_in_both_directions(relay: RelayProcess, channel: str) -> None:
    async with connect_relay_v1(relay, channel) as client, relay.client(channel) as plain:
        for payload in PAYLOADS:
            await client.publish(payload)
            await plain.send(payload)
        received = await client.next_messages(2 * len(PAYLOADS))
        assert sorted(map(repr, received)) == sorted(map(repr, PAYLOADS * 2))
        assert await receive_many(plain, 2 * len(PAYLOADS)) == received


async def test_each_publish_is_answered_with_the_position_of_its_message(
    relay: RelayProcess, channel: str
) -> None:
    async with open_relay_v1(relay) as publisher, connect_relay_v1(relay, channel) as subscriber:
        for number in range(1, 301):  # without a subscription of its own
            await publisher.send("publish", str(number), channel=channel)
        published = [await publisher.next_notice("published") for _ in range(300)]
        assert [notice["id"] for notice in published] == list(range(1, 301))
        for notice in published:
            assert await subscriber.next_message() == str(notice["id"])
            assert subscriber.position == notice["position"]


async def test_publish_ids_may_have_gaps_and_must_not_go_back(
    relay: RelayProcess, channel: str
) -> None:
    async with connect_relay_v1(relay, channel) as client:
        await client.next_notice("live")
        for number, answer in (
            *((5, "published"), (5, "error"), (4, "error"), (1, "error")),
            *((6, "published"), (2**53 - 2, "published"), (7, "error"), (2**53 - 1, "published")),
        ):
            await client.publish(f"{number} {answer}", id=number)
            while "type" not in (header := (await client.receive())[0]):
                pass
            assert (header["type"], header["id"]) == (answer, number)
            if answer == "error":
                reason = "invalid command: id is not greater than the one before"
                assert (header["status"], header["reason"]) == (400, reason)
    async with connect_relay_v1(relay, channel, history=10) as reader:
        for number in (5, 6, 2**53 - 2, 2**53 - 1):
            assert await reader.next_message() == f"{number} published"


async def test_ids_of_other_commands_are_free(relay: RelayProcess) -> None:
    async with open_relay_v1(relay) as client:
        for number in (7, 3, 3, 1, 2**53 - 1):
            await client.send("ping", id=number)
            assert await client.next_notice() == {"type": "pong", "id": number}


async def test_a_token_is_accepted_where_none_is_required(relay: RelayProcess) -> None:
    async with open_relay_v1(relay) as client:
        number = await client.send("token", token="any")
        assert await client.next_notice() == {"type": "token", "id": number}


async def test_unknown_fields_and_payloads_of_other_commands_are_ignored(
    relay: RelayProcess, channel: str
) -> None:
    async with open_relay_v1(relay) as client:
        await client.send("ping", "payload", more={"a": [1, None]})
        assert await client.next_notice() == {"type": "pong", "id": 1}
        await client.send("subscribe", b"\xff\x00", channel=channel, since=None, more=1)
        assert (await client.next_notice())["type"] == "subscribed"


async def test_each_of_several_channels_on_one_connection_is_in_its_order(
    relay: RelayProcess, channel: str
) -> None:
    names = [f"{channel}.{number}" for number in range(5)]
    async with open_relay_v1(relay) as client, open_relay_v1(relay) as publisher:
        for name in names:
            assert (await client.subscribe(name))["channel"] == name
            await client.next_notice("live")
        for number in range(200):
            for name in names:
                await publisher.send("publish", f"{name} {number}", channel=name)
        received = defaultdict(list)
        positions = []
        for _ in range(200 * len(names)):
            header, payload = await client.receive()
            received[header["channel"]].append(payload)
            positions.append((header["channel"], parse_position(header["position"])))
        for name in names:
            assert received[name] == [f"{name} {number}" for number in range(200)]
            of_channel = [position for each, position in positions if each == name]
            assert of_channel == sorted(set(of_channel))


async def test_commands_in_one_write_are_carried_out_in_their_order(
    relay: RelayProcess, channel: str
) -> None:
    other = f"{channel}.other"
    async with open_raw(relay) as raw:
        await raw.send(
            b"".join(
                (
                    command_frame("publish", "first", channel=channel, id=1),
                    command_frame("publish", "second", channel=other, id=2),
                    command_frame("publish", "third", channel=channel, id=3),
                    command_frame("ping", id=4),
                    command_frame("publish", "fourth", channel=channel, id=5),
                )
            )
        )
        kinds = await next_kinds(raw, 5)
        assert [number for kind, number in kinds if kind == "published"] == [1, 2, 3, 5]
        assert ("pong", 4) in kinds
    async with connect_relay_v1(relay, channel, history=9) as reader:
        assert await reader.next_messages(3) == ["first", "third", "fourth"]


# Subscriptions that change


async def test_a_subscribe_and_an_unsubscribe_in_one_write_are_both_answered(
    relay: RelayProcess, channel: str
) -> None:
    async with open_raw(relay) as raw:
        for number in range(1, 20, 4):
            await raw.send(
                command_frame("subscribe", channel=channel, id=number)
                + command_frame("unsubscribe", channel=channel, id=number + 1)
                + command_frame("ping", id=number + 2)
            )
            answers = await next_kinds(raw, 3)
            assert sorted(answers) == [
                *(("pong", number + 2), ("subscribed", number), ("unsubscribed", number + 1))
            ]
            assert answers.index(("subscribed", number)) < answers.index(
                ("unsubscribed", number + 1)
            )


async def test_alternating_commands_while_a_fan_out_is_queued_are_carried_out_in_their_order(
    relay_with: StartRelay,
) -> None:
    """Another client of the channel lags, so that the channel delays what is published."""
    relay = relay_with(limits={"send_backlog_bytes": 128 * KIB, "max_message_bytes": 32 * KIB})
    async with (
        relay.raw_client("news", receive_buffer_bytes=4_096),
        open_raw(relay, "/channels/news") as raw,
        open_relay_v1(relay) as publisher,
    ):
        assert await next_kinds(raw, 2) == [("subscribed", 0), ("live", None)]
        last = await fill_until_paused(relay, publisher)
        rounds = 20
        await raw.send(
            b"".join(
                command_frame("unsubscribe", channel="news", id=number)
                + command_frame("subscribe", channel="news", id=number + 1)
                for number in range(1, 2 * rounds, 2)
            )
            + command_frame("unsubscribe", channel="news", id=99)
        )
        answers: list[tuple[str, int]] = []
        messages: list[int] = []
        is_subscribed = True
        while not answers or answers[-1] != ("unsubscribed", 99):
            header, payload = decode(await raw.read_message())
            match header.get("type"):
                case None:
                    assert is_subscribed, "a message of a channel that was left"
                    messages.append(int(str(payload).split()[0]))
                case "live":
                    assert is_subscribed
                case answer:
                    answers.append((str(answer), header["id"]))
                    is_subscribed = answer == "subscribed"
        expected = [
            answer
            for number in range(1, 2 * rounds, 2)
            for answer in (("unsubscribed", number), ("subscribed", number + 1))
        ]
        assert answers == [*expected, ("unsubscribed", 99)]
        assert messages == sorted(set(messages))
        assert messages[0] == 0
        assert len(messages) <= last + 1
        await raw.send(command_frame("unsubscribe", channel="news", id=100))
        assert await next_header(raw) == {
            "type": "error",
            "id": 100,
            "status": 404,
            "reason": "not subscribed",
        }
    await assert_counters_add_up_at_rest(relay)


async def fill_until_paused(relay: RelayProcess, publisher: RelayV1Client) -> int:
    """Publish numbered messages until the relay pauses their publisher; return the last number.

    Then the fan-out is queued for a subscriber that does not read.
    """
    number = -1

    async def publish() -> None:
        nonlocal number
        while True:
            number += 1
            await publisher.send("publish", f"{number} ".ljust(16_000, "x"), channel="news")

    publishing = asyncio.create_task(publish())
    try:
        await relay.await_metric_at_least("websocket_paused_publishers", 1)
    finally:
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
    return number


async def test_commands_above_the_bound_while_a_channel_is_left_are_refused(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"send_backlog_bytes": 128 * KIB, "max_message_bytes": 32 * KIB})
    async with (
        relay.raw_client("news", receive_buffer_bytes=4_096),
        open_raw(relay, "/channels/news") as raw,
        open_relay_v1(relay) as publisher,
    ):
        assert await next_kinds(raw, 2) == [("subscribed", 0), ("live", None)]
        await fill_until_paused(relay, publisher)
        count = 200
        await raw.send(
            command_frame("unsubscribe", channel="news", id=1)
            + b"".join(
                command_frame("subscribe", channel="news", id=number)
                for number in range(2, count + 2)
            )
            + command_frame("ping", id=9_999)
        )
        answered: dict[int, str] = {}
        while len(answered) < count + 2:
            header = await next_header(raw)
            if "id" in header:
                assert header["id"] not in answered
                answered[header["id"]] = str(header.get("reason", header["type"]))
        assert answered.pop(9_999) == "pong"
        assert answered.pop(1) == "unsubscribed"
        assert answered[2] == "subscribed"
        assert set(answered.values()) <= {
            "subscribed",
            "already subscribed",
            "invalid command: too many commands in progress",
        }


async def test_thousands_of_subscriptions_that_end_at_once_leave_nothing(
    relay: RelayProcess, channel: str
) -> None:
    pairs = 2_000
    async with open_raw(relay) as raw:
        write = b"".join(
            command_frame("subscribe", channel=f"{channel}.{number % 7}", id=2 * number + 1)
            + command_frame("unsubscribe", channel=f"{channel}.{number % 7}", id=2 * number + 2)
            for number in range(pairs)
        )
        sending = asyncio.create_task(raw.send(write + command_frame("ping", id=9_999)))
        unsubscribed = 0
        while unsubscribed < pairs:
            header = await next_header(raw)
            assert header["type"] in {"subscribed", "unsubscribed", "live", "pong", "heartbeat"}
            unsubscribed += header["type"] == "unsubscribed"
        await sending
        await relay.await_metric("websocket_channels", 0)


async def test_an_unsubscribe_during_a_replay_ends_it(relay_with: StartRelay) -> None:
    relay = relay_with()
    await publish_all(relay, "news", *["x" * 10_000] * 1_000)
    async with open_raw(relay, receive_buffer_bytes=4_096) as raw:
        await raw.send(command_frame("subscribe", channel="news", history=1_000, id=1))
        await relay.await_metric("websocket_slow_clients", 1)
        await raw.send(
            command_frame("unsubscribe", channel="news", id=2) + command_frame("ping", id=3)
        )
        await publish_all(relay, "news", "later")
        await relay.await_metric("websocket_channels", 0)
        kinds = [kind async for kind in kinds_until(raw, "pong")]
        assert kinds[0] == "subscribed"
        assert kinds[-2] == "unsubscribed"
        assert set(kinds[1:-2]) == {"message"}
        assert len(kinds) < 1_000
    await assert_counters_add_up_at_rest(relay)


async def kinds_until(raw: RawClient, last: str) -> AsyncIterator[str]:
    """Yield the types of all messages up to one."""
    while True:
        header = await next_header(raw)
        yield header.get("type", "message")
        if header.get("type") == last:
            return


async def test_a_subscription_after_another_resumes_where_the_first_ended(
    relay: RelayProcess, channel: str
) -> None:
    async with open_relay_v1(relay) as client, relay.client(channel) as plain:
        await client.subscribe(channel)
        received: list[Message] = []
        for number in range(0, 40, 2):
            await plain.send(str(number))
            received.append(await client.next_message())
            await client.send("unsubscribe", channel=channel)
            assert (await client.next_notice("unsubscribed"))["channel"] == channel
            await plain.send(str(number + 1))
            await receive_many(plain, 2)
            again = await client.subscribe(channel, since=client.position)
            assert (again["recovered"], again["position"]) == (True, client.position)
            received.append(await client.next_message())
        assert received == number_texts(0, 40)


# The path


async def test_a_path_subscribes_with_id_0_and_the_values_of_its_query(
    relay: RelayProcess, channel: str
) -> None:
    await publish_all(relay, channel, *number_texts(0, 5))
    async with connect_relay_v1(relay, channel, history=2) as client:
        assert client.subscribed["id"] == 0
        assert await client.next_messages(2) == number_texts(3, 5)
        since = client.position
        assert (await client.next_notice("live"))["position"] == since
    await publish_all(relay, channel, "5")
    async with connect_relay_v1(relay, channel, since=since, history=9) as client:
        assert client.recovery == (True, since)
        assert await client.next_message() == "5"
        refused = await client.subscribe(channel)
        assert (refused["status"], refused["reason"]) == (409, "already subscribed")
        await client.send("unsubscribe", channel=channel)
        assert (await client.next_notice("unsubscribed"))["id"] == client.last_id


async def test_a_replay_of_several_channels_at_once_delivers_each_in_order_and_then_is_live(
    relay: RelayProcess, channel: str
) -> None:
    names = [f"{channel}.{number}" for number in range(3)]
    for name in names:
        await publish_all(relay, name, *(text.ljust(2_000, "x") for text in number_texts(0, 300)))
    async with open_raw(relay) as raw:
        await raw.send(
            b"".join(
                command_frame("subscribe", channel=name, id=number, history=1_000)
                for number, name in enumerate(names, 1)
            )
        )
        for name in names:
            await publish_all(relay, name, "new")
        seen: dict[str, list[str]] = defaultdict(list)
        last: dict[str, str] = {}
        while sum(map(len, seen.values())) < len(names) * (1 + 301 + 1):
            header, payload = decode(await raw.read_message())
            kind = header.get("type", str(payload).rstrip("x"))
            seen[header["channel"]].append(kind)
            if kind == "live":
                assert header["position"] == last[header["channel"]]
            last[header["channel"]] = header["position"]
        for name in names:
            texts = [kind for kind in seen[name] if kind != "live"]
            assert texts == ["subscribed", *number_texts(0, 300), "new"]
            assert seen[name].index("live") > seen[name].index("299")


# Errors that leave the connection open


INVALID_COMMANDS: list[tuple[str, dict[str, Any]]] = [
    ("subscribe", {}),
    ("subscribe", {"channel": 1}),
    ("subscribe", {"channel": None}),
    ("subscribe", {"channel": ["news"]}),
    ("unsubscribe", {}),
    ("publish", {}),
    ("publish", {"channel": {}}),
    ("subscribe", {"channel": "c", "echo": 1}),
    ("subscribe", {"channel": "c", "echo": None}),
    ("subscribe", {"channel": "c", "echo": "false"}),
    ("subscribe", {"channel": "c", "since": "yesterday"}),
    ("subscribe", {"channel": "c", "since": ""}),
    ("subscribe", {"channel": "c", "since": 1}),
    ("subscribe", {"channel": "c", "since": ["1-1-1"]}),
    ("subscribe", {"channel": "c", "since": "1-1-" + "9" * 11}),
    ("subscribe", {"channel": "c", "since": "\u0661-1-1"}),
    ("subscribe", {"channel": "c", "history": -1}),
    ("subscribe", {"channel": "c", "history": True}),
    ("subscribe", {"channel": "c", "history": 1.0}),
    ("subscribe", {"channel": "c", "history": "5"}),
    ("subscribe", {"channel": "c", "history": None}),
    ("subscribe", {"channel": "c", "history": 10**9}),
    ("token", {}),
    ("token", {"token": 1}),
]

WRONG_NAMES = ["", " ", "a b", "a/b", "ä", "a\n", "a,b", "\ud800", "\x00", "x" * 129]


async def test_an_invalid_field_is_answered_with_400_and_the_connection_stays(
    relay: RelayProcess, channel: str
) -> None:
    before = await refusals(relay, "invalid_command")
    async with connect_relay_v1(relay, channel) as client, relay.client(channel) as other:
        await client.next_notice("live")
        for kind, fields in INVALID_COMMANDS:
            number = await client.send(kind, **fields)
            error = await client.next_notice("error")
            assert set(error) == {"type", "id", "status", "reason"}
            assert (error["id"], error["status"]) == (number, 400), (kind, fields)
            assert error["reason"].startswith("invalid command: "), (kind, fields)
        after = before + len(INVALID_COMMANDS)
        assert await refusals(relay, "invalid_command") == after
        await other.send("still there")
        assert await client.next_message() == "still there"
        await client.publish("and publishes")
        assert await receive_many(other, 2) == ["still there", "and publishes"]


async def test_a_wrong_channel_name_is_answered_with_404(relay: RelayProcess) -> None:
    before = await refusals(relay, "no_such_channel")
    async with open_relay_v1(relay) as client:
        for name in WRONG_NAMES:
            for kind in ("subscribe", "unsubscribe", "publish"):
                number = await client.send(kind, channel=name)
                error = {"status": 404, "reason": "no such channel"}
                expected = {"type": "error", "id": number, **error}
                assert await client.next_notice() == expected, name
        await client.send("ping")
        await client.next_notice("pong")
    assert await refusals(relay, "no_such_channel") == before + 3 * len(WRONG_NAMES)
    assert await relay.metric("websocket_channels") == 0


async def test_a_repeated_subscription_and_one_that_does_not_exist_are_refused_and_counted(
    relay: RelayProcess, channel: str
) -> None:
    reasons = ("already_subscribed", "not_subscribed")
    before = [await refusals(relay, reason) for reason in reasons]
    async with connect_relay_v1(relay, channel) as client:
        await client.next_notice("live")
        again = await client.subscribe(channel, history=5)
        assert (again["status"], again["reason"]) == (409, "already subscribed")
        number = await client.send("unsubscribe", channel=f"{channel}.other")
        error = await client.next_notice("error")
        assert (error["id"], error["status"]) == (number, 404)
        assert error["reason"] == "not subscribed"
        await client.publish("once")
        assert await client.next_message() == "once"
    assert [await refusals(relay, reason) for reason in reasons] == [each + 1 for each in before]


async def test_subscriptions_of_a_connection_are_limited_and_one_that_ended_frees_its_place(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"max_channels_per_connection": 2})
    async with connect_relay_v1(relay, "a") as client, open_relay_v1(relay) as other:
        await client.next_notice("live")
        assert (await client.subscribe("b"))["type"] == "subscribed"
        await client.next_notice("live")
        refused = await client.subscribe("c")
        assert refused["status"] == 400
        assert refused["reason"] == "too many channels on this connection"
        assert await refusals(relay, "channels_per_connection") == 1
        assert (await client.subscribe("a"))["status"] == 409
        await client.publish("not limited", channel="c")
        await client.next_notice("published")
        await client.send("unsubscribe", channel="a")
        await client.next_notice("unsubscribed")
        assert (await client.subscribe("c", history=1))["type"] == "subscribed"
        assert await client.next_message() == "not limited"
        assert (await other.subscribe("c"))["type"] == "subscribed"


async def test_above_the_limit_of_channels_a_subscription_is_refused_with_a_time_to_try_again(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(channels={"max_channels": 2})
    async with open_relay_v1(relay) as client:
        for name in ("a", "b"):
            assert (await client.subscribe(name))["type"] == "subscribed"
            await client.next_notice("live")
        refused = await client.subscribe("c")
        assert (refused["status"], refused["reason"]) == (503, "too many channels")
        assert 1 <= refused["retry_after_s"] <= 5
        assert await refusals(relay, "channels") == 1
        await client.publish("to a channel without subscribers", channel="c")
        await client.next_notice("published")
        assert await relay.metric("websocket_channels") == 2
        await client.send("unsubscribe", channel="a")
        await client.next_notice("unsubscribed")
        assert (await client.subscribe("c"))["type"] == "subscribed"


async def test_a_payload_may_have_max_message_bytes_and_one_byte_more_is_refused(
    relay_with: StartRelay,
) -> None:
    size = 1_000
    relay = relay_with(limits={"max_message_bytes": size})
    async with connect_relay_v1(relay, "news") as client, relay.client("news") as other:
        await client.next_notice("live")
        for padding in ("", " " * 20_000):  # the header does not count
            number = await client.publish("x" * size, padding=padding)
            assert (await client.next_message(), number) == ("x" * size, client.last_id)
        await client.publish("ä" * (size // 2))
        assert await client.next_message() == "ä" * (size // 2)
        for payload in ("x" * (size + 1), b"x" * (size + 1), "ä" * (size // 2) + "x"):
            number = await client.publish(payload)
            error = await client.next_notice("error")
            assert (error["id"], error["status"]) == (number, 413)
            assert error["reason"] == "message too big"
        assert await refusals(relay, "message_too_big") == 3
        await client.publish("after")
        assert await client.next_message() == "after"
        assert len(await receive_many(other, 4)) == 4


async def test_the_largest_payload_is_accepted_after_the_longest_header(
    relay_with: StartRelay,
) -> None:
    size = 1_000
    relay = relay_with(limits={"max_message_bytes": size})
    header = encode_command("publish", channel="news", id=1)
    assert isinstance(header, str)
    line = header.rstrip("\n").ljust(32_768)
    async with connect_relay_v1(relay, "news") as client:
        await client.connection.send(f"{line}\n{'x' * size}")
        assert await client.next_message() == "x" * size


async def test_a_message_far_above_the_limit_closes_with_1009(relay_with: StartRelay) -> None:
    relay = relay_with(limits={"max_message_bytes": 1_000})
    async with connect_relay_v1(relay, "news") as other:
        async with connect_relay_v1(relay, "news") as client:
            await client.publish("x" * 40_000)
            assert await await_close(client.connection) == (1009, "message too big")
        await relay.await_metric("websocket_closes_total", 1, reason="message_too_big")
        await other.publish("unharmed")
        assert await other.next_message() == "unharmed"


# Violations that close


@pytest.mark.parametrize(
    ("message", "detail"),
    [
        ("hello", "header is not JSON"),
        ("", "header is not JSON"),
        (b"\xff\xfe", "header is not JSON"),
        ("[" * 30_000, "header is not JSON"),
        ("[]", "header is not a JSON object"),
        ('{"type":"ping","id":1,"id":1}', "header is not JSON"),
        ('{"type":"dance","id":1}', "unknown type of command"),
        ('{"type":"welcome","id":1}', "unknown type of command"),
        ('{"id":1}', "header has no type"),
        ('{"type":"publish","channel":"c"}\npayload', "header has no valid id"),
        ('{"type":"ping","id":9007199254740992}', "header has no valid id"),
        (" " * 40_000, "header too long"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_an_invalid_header_closes_with_1002_and_nothing_else_is_affected(
    relay: RelayProcess, channel: str, message: Message, detail: str
) -> None:
    before = await relay.metric("websocket_closes_total", reason="protocol_error")
    async with connect_relay_v1(relay, channel) as other:
        async with connect_relay_v1(relay, channel) as client:
            await client.publish("before")
            await client.connection.send(message)
            await client.publish("after")
            assert await await_close(client.connection) == (1002, f"protocol error: {detail}")
        expected = before + 1
        await relay.await_metric("websocket_closes_total", expected, reason="protocol_error")
        await other.publish("unharmed")
        assert await other.next_messages(2) == ["before", "unharmed"]
        assert other.notices == []


async def test_commands_before_an_invalid_header_are_answered_and_those_after_it_not_carried_out(
    relay: RelayProcess, channel: str
) -> None:
    async with open_raw(relay) as raw:
        await raw.send(
            command_frame("publish", "before", channel=channel, id=1)
            + command_frame("ping", id=2)
            + frame(TEXT, b"no header")
            + command_frame("publish", "after", channel=channel, id=3)
            + command_frame("ping", id=4)
        )
        assert sorted(await next_kinds(raw, 2)) == [("pong", 2), ("published", 1)]
        assert await raw.complete_close() == (1002, "protocol error: header is not JSON")
    async with connect_relay_v1(relay, channel, history=9) as reader:
        assert await reader.next_message() == "before"
        await reader.next_notice("live")


async def test_a_publish_before_the_close_frame_is_answered_before_the_connection_closes(
    relay: RelayProcess, channel: str
) -> None:
    async with open_raw(relay) as raw:
        await raw.send(
            command_frame("publish", "last", channel=channel, id=1)
            + frame(CLOSE, close_payload(4000))
            + command_frame("publish", "after the close frame", channel=channel, id=2)
            + command_frame("subscribe", channel=channel, id=3)
        )
        assert await next_kinds(raw, 1) == [("published", 1)]
        assert (await raw.read_close_frame())[0] == 4000
        assert await raw.read_to_end() == b""
    async with connect_relay_v1(relay, channel, history=9) as reader:
        assert await reader.next_message() == "last"
        await reader.next_notice("live")


# Limits over all channels


async def test_the_rate_limit_counts_all_messages_over_all_channels(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"max_messages_per_s": 10})
    async with open_raw(relay) as raw, open_relay_v1(relay) as other:
        await raw.send(
            b"".join(
                command_frame("publish", channel=f"channel-{number}", id=number)
                for number in range(1, 25)
            )
        )
        answers = [kind async for kind in kinds_until_close(raw)]
        assert 20 <= len(answers) < 24
        assert set(answers) == {"published"}
        await other.send("ping")
        await other.next_notice("pong")
    await relay.await_metric("websocket_closes_total", 1, reason="rate_limit")


async def kinds_until_close(raw: RawClient) -> AsyncIterator[str]:
    """Yield the types of all messages up to the close frame."""
    while await raw.peek_opcode() != CLOSE:
        yield (await next_header(raw)).get("type", "message")
    assert await raw.complete_close() == (1008, "rate limit")


async def test_a_client_that_reads_none_of_its_channels_has_one_backlog_and_is_closed(
    relay_with: StartRelay,
) -> None:
    limits = {
        "send_backlog_bytes": 256 * KIB,
        "max_message_bytes": 64 * KIB,
        "handshake_timeout_s": 1,
    }
    relay = relay_with(limits=limits)
    names = [f"news.{number}" for number in range(8)]
    async with (
        open_raw(relay, receive_buffer_bytes=4_096) as slow,
        open_relay_v1(relay) as publisher,
    ):
        for number, name in enumerate(names, 1):
            await slow.send(command_frame("subscribe", channel=name, id=number))
            assert await next_kinds(slow, 2) == [("subscribed", number), ("live", None)]
        number = 0
        while not await relay.metric("websocket_closes_total", reason="slow_consumer"):
            for name in names:
                number += 1
                await publisher.send("publish", f"{number} ".ljust(16_000, "x"), channel=name)
                await publisher.next_notice("published")
        await relay.await_metric("websocket_backlog_bytes", 0)
    await assert_counters_add_up_at_rest(relay)


async def test_a_client_that_reads_none_of_its_answers_is_closed(relay_with: StartRelay) -> None:
    limits = {
        "send_backlog_bytes": 64 * KIB,
        "max_message_bytes": 32 * KIB,
        "handshake_timeout_s": 1,
    }
    relay = relay_with(limits=limits, keepalive={"ping_interval_s": 3_600})
    async with open_raw(relay, receive_buffer_bytes=4_096) as raw:
        write = command_frame("subscribe", channel="x" * 129, id=1) * 2_000

        async def send() -> None:
            while True:
                await raw.send(write)

        sending = asyncio.create_task(send())
        await relay.await_metric("websocket_closes_total", 1, reason="slow_consumer")
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    await relay.await_metric("websocket_closes_total", 1, reason="slow_consumer")
    await assert_counters_add_up_at_rest(relay)


# Echo


async def test_own_messages_are_not_delivered_to_a_subscription_without_echo(
    relay: RelayProcess, channel: str
) -> None:
    other = f"{channel}.other"
    async with open_relay_v1(relay) as client, relay.client(channel) as plain:
        await client.subscribe(channel, echo=False)
        await client.next_notice("live")
        await client.subscribe(other)
        await client.next_notice("live")
        for number in range(20):
            await client.publish(f"own {number}", channel=channel)
            await plain.send(f"of another {number}")
        await client.publish("with echo", channel=other)
        received: dict[str, list[Message]] = defaultdict(list)
        while len(received[channel]) < 20 or not received[other]:
            header, payload = await client.receive()
            if "type" not in header:
                received[header["channel"]].append(payload)
        assert received[channel] == [f"of another {number}" for number in range(20)]
        assert received[other] == ["with echo"]
        assert len(await receive_many(plain, 40)) == 40
    await assert_counters_add_up_at_rest(relay)


@pytest.mark.parametrize("subscribed", ["command", "path", "plain", "plain with history"])
async def test_own_messages_in_the_same_write_as_the_subscription_are_not_delivered_without_echo(
    relay: RelayProcess, channel: str, subscribed: str
) -> None:
    """The subscription is in recovery when they are published."""
    async with await relay.connect_tcp() as raw, relay.client(channel) as other:
        query = {"echo": "false"} | ({"history": 5} if "history" in subscribed else {})
        if "plain" in subscribed:
            publishes = b"".join(frame(TEXT, b"own %d" % number) for number in range(3))
            await raw.upgrade(path_with_query(channel, **query), trailing=publishes)
        else:
            publishes = b"".join(
                command_frame("publish", f"own {number}", channel=channel, id=number + 2)
                for number in range(3)
            )
            path = path_with_query(channel, **query)
            if subscribed == "command":
                path = "/"
                publishes = (
                    command_frame("subscribe", channel=channel, id=1, echo=False) + publishes
                )
            await raw.upgrade(path, trailing=publishes, Sec_WebSocket_Protocol="relay.v1")
        assert await receive_many(other, 3) == [f"own {number}" for number in range(3)]
        await other.send("of another")
        while True:
            received = str(await raw.read_message())
            if not received.startswith('{"type"'):
                break
        assert received.endswith("of another")


async def test_a_plain_client_without_echo_receives_the_messages_of_others_only(
    relay: RelayProcess, channel: str
) -> None:
    """Several messages of several such clients are in one batch."""
    async with AsyncExitStack() as stack:
        path = f"{path_of(channel)}?echo=false"
        raws = [await stack.enter_async_context(await relay.connect_tcp()) for _ in range(3)]
        for raw in raws:
            await raw.upgrade(path)
        with_echo = await stack.enter_async_context(relay.client(channel))
        for round_number in range(5):
            for number, raw in enumerate(raws):
                texts = [f"{number}: {round_number}.{each}" for each in range(50)]
                await raw.send(b"".join(frame(TEXT, text.encode()) for text in texts))
        total = 3 * 5 * 50
        everything = [str(each) for each in await receive_many(with_echo, total)]
        for number, raw in enumerate(raws):
            expected = [text for text in everything if not text.startswith(f"{number}: ")]
            assert [await raw.read_message() for _ in range(len(expected))] == expected
            assert not raw.has_received()
    await assert_counters_add_up_at_rest(relay)


async def test_deliveries_and_drops_add_up_when_clients_without_echo_are_reset(
    relay: RelayProcess, channel: str
) -> None:
    write = b"".join(frame(TEXT, b"x" * 500) for _ in range(100))
    async with relay.client(channel, max_queue=None) as other:
        for _ in range(10):
            async with await relay.connect_tcp() as raw:
                await raw.upgrade(f"{path_of(channel)}?echo=false", trailing=write)
                raw.reset()
            await other.send("between")
        await relay.await_metric("websocket_connected_clients", 1)
    await assert_counters_add_up_at_rest(relay)


# All kinds of clients


async def test_all_kinds_of_clients_of_a_channel_receive_the_same_messages_in_one_order(
    relay: RelayProcess, channel: str
) -> None:
    other = f"{channel}.other"
    count = 50
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        plains = [await enter(relay.client(channel, max_queue=None)) for _ in range(2)]
        clients = [await enter(connect_relay_v1(relay, channel)) for _ in range(2)]
        one_stream = await enter(subscribe_events(relay, channel))
        two_channels = await enter(
            subscribe_events(relay, None, f"?channel={channel}&channel={other}")
        )
        for number in range(count):
            for index, plain in enumerate(plains):
                await plain.send(f"plain {index}: {number}")
            for index, client in enumerate(clients):
                await client.publish(f"relay.v1 {index}: {number}")
        total = 4 * count
        order = await receive_many(plains[0], total)
        assert sorted(map(str, order)) == sorted(
            f"{kind} {index}: {number}"
            for kind in ("plain", "relay.v1")
            for index in range(2)
            for number in range(count)
        )
        assert await receive_many(plains[1], total) == order
        assert [await client.next_messages(total) for client in clients] == [order, order]
        assert clients[0].position == clients[1].position
        events = [await one_stream.next_event() for _ in range(total)]
        assert [event.data for event in events] == order
        assert events[-1].id == clients[0].position
        named = [await two_channels.next_event() for _ in range(total)]
        assert [event.data for event in named] == order
        assert {event.name for event in named} == {f"message:{channel}"}


async def test_relay_v1_with_compression_and_over_tls_is_the_same(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with(compression={"enabled": True, "min_message_bytes": 10})
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                connect_relay_v1(relay, "news", compression=compression)
            )
            for compression in ("deflate", None)
        ]
        for payload in PAYLOADS:
            for client in clients:
                await client.publish(payload)
        total = len(PAYLOADS) * 2
        received = [await client.next_messages(total) for client in clients]
        assert received[0] == received[1]
        assert sorted(map(repr, received[0])) == sorted(map(repr, PAYLOADS * 2))


async def test_all_subscribers_are_sent_the_same_bytes(relay: RelayProcess, channel: str) -> None:
    async with (
        open_raw(relay, path_of(channel)) as one,
        open_raw(relay) as two,
        relay.client(channel) as plain,
    ):
        await two.send(command_frame("subscribe", channel=channel, id=1))
        assert await next_kinds(one, 2) == [("subscribed", 0), ("live", None)]
        assert await next_kinds(two, 2) == [("subscribed", 1), ("live", None)]
        await plain.send("message")
        first, second = await one.read_message(), await two.read_message()
        assert first == second
        header, _, payload = str(first).partition("\n")
        assert list(json.loads(header)) == ["channel", "position"]
        assert payload == "message"


async def test_heartbeats_carry_the_latest_position(relay_with: StartRelay) -> None:
    relay = relay_with(keepalive={"ping_interval_s": 0.2})
    async with open_relay_v1(relay) as client:
        assert client.welcome["heartbeat_ms"] == 200
        first = await client.next_notice("heartbeat")
        assert first == {"type": "heartbeat", "position": client.welcome["position"]}
        await publish_all(relay, "news", "message", "of a channel without this client")
        positions = [(await client.next_notice("heartbeat"))["position"] for _ in range(2)]
        assert parse_position(positions[1]) > parse_position(first["position"])


async def test_an_invalid_session_is_refused_and_plain_clients_may_have_a_parameter_of_that_name(
    relay: RelayProcess, channel: str
) -> None:
    for query in ("session=made-up", "session=1-2-3.x&seen=now", "session=a&session=b"):
        with pytest.raises(InvalidStatus) as refused:
            async with open_relay_v1(relay, f"/?{query}"):
                pass
        assert refused.value.response.status_code == 400
        async with relay.client(path=f"{path_of(channel)}?{query}") as plain:
            await plain.send("plain")
            assert await receive(plain) == "plain"
