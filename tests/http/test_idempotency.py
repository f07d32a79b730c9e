"""POSTs with an Idempotency-Key: a repeat is answered like the first request, and not relayed."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx2
import pytest

from tests.support.admission import jwt_settings
from tests.support.brokers import Broker
from tests.support.fixtures import BROKERS
from tests.support.http_requests import BATCH_TYPE, TEXT_TYPE, post_request, publish_by_post
from tests.support.issuer import sign_token
from tests.support.programs import needed
from tests.support.relay_process import RelayProcess, StartRelay, StartReplicas, receive
from tests.support.relay_v1 import connect_relay_v1, parse_position
from tests.support.server_api import WITH_KEY, request_api

Relays = tuple[RelayProcess, RelayProcess]


@pytest.fixture(params=["memory", "redis", "nats"])
async def relays(
    request: pytest.FixtureRequest, relay_with: StartRelay, tmp_path: Path
) -> AsyncIterator[Relays]:
    """Two replicas; with `memory` one relay twice."""
    if request.param == "memory":
        relay = relay_with(**WITH_KEY)
        yield relay, relay
        return
    kind, programs = BROKERS[request.param]
    async with kind(needed(*programs), tmp_path / "broker") as broker:
        settings = {"backplane": {"url": broker.url}, **WITH_KEY}
        yield relay_with(**settings), relay_with(**settings)


async def post(
    relay: RelayProcess,
    body: str | bytes,
    *keys: str,
    channel: str = "news",
    content_type: str = TEXT_TYPE,
    token: str = "",
) -> httpx2.Response:
    """Publish with a key."""
    headers = {"Idempotency-Key": keys[0]} if keys else {}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    content = body.encode() if isinstance(body, str) else body
    return await publish_by_post(relay, channel, content, content_type, headers)


def position_of(response: httpx2.Response) -> str:
    assert response.status_code == 202, response.text
    return str(response.json()["position"])


async def totals(relays: Sequence[RelayProcess]) -> tuple[float, float]:
    """Return the messages and the repeats that all replicas have counted."""
    distinct = list(dict.fromkeys(relays))
    messages = [await relay.metric("websocket_messages_total") for relay in distinct]
    repeats = [await relay.metric("websocket_publish_repeats_total") for relay in distinct]
    return sum(messages), sum(repeats)


async def test_a_repeat_on_any_replica_is_answered_like_the_first_and_not_relayed(
    relays: Relays,
) -> None:
    one, two = relays
    async with connect_relay_v1(one, "news") as first, connect_relay_v1(two, "news") as second:
        response = await post(one, "message", "key")
        position = position_of(response)
        for relay in (two, one, two):
            repeat = await post(relay, "message", "key")
            assert repeat.json() == response.json()
        after = position_of(await post(two, "after", "other-key"))
        for subscriber in (first, second):
            assert await subscriber.next_message() == "message"
            assert subscriber.position == position
            assert await subscriber.next_message() == "after"
            assert subscriber.position == after
    assert await totals(relays) == (2, 3)


async def test_of_concurrent_requests_with_one_key_one_is_relayed_and_all_get_its_position(
    relays: Relays,
) -> None:
    one, two = relays
    async with connect_relay_v1(two, "news") as subscriber:
        for number in range(5):
            body, key = f"message {number}", f"key {number}".replace(" ", "-")
            responses = await asyncio.gather(
                *(post(relay, body, key) for relay in (one, two) for _ in range(5))
            )
            (position,) = set(map(position_of, responses))
            assert await subscriber.next_message() == body
            assert subscriber.position == position
        await post(one, "after")
        assert await subscriber.next_message() == "after"
    assert await totals(relays) == (6, 45)


async def test_a_batch_with_a_key_is_relayed_as_a_whole_and_once(relays: Relays) -> None:
    one, two = relays
    lines = [f'{{"n":{number}}}' for number in range(500)]
    body = "\n".join(lines)
    async with connect_relay_v1(one, "news") as subscriber:
        responses = await asyncio.gather(
            *(post(relay, body, "batch", content_type=BATCH_TYPE) for relay in (one, two, one))
        )
        later = await post(two, body, "batch", content_type=BATCH_TYPE)
        answers = [response.json() for response in (*responses, later)]
        assert answers == [answers[0]] * 4
        assert answers[0]["messages"] == 500
        await post(two, "after")
        assert await subscriber.next_messages(500) == lines
        assert subscriber.position == answers[0]["position"]
        assert await subscriber.next_message() == "after"
    assert await totals(relays) == (501, 1_500)


async def test_other_content_with_a_key_is_refused_on_any_replica(relays: Relays) -> None:
    one, two = relays
    async with connect_relay_v1(two, "news") as subscriber:
        position = position_of(await post(one, "message", "key"))
        before = await totals(relays)
        for relay in (one, two):
            for body, content_type in (
                ("another message", TEXT_TYPE),
                ("message", "application/octet-stream"),
                ("", TEXT_TYPE),
                ("1", BATCH_TYPE),
                ("1\n2", BATCH_TYPE),
            ):
                response = await post(relay, body, "key", content_type=content_type)
                assert (response.status_code, response.text) == (422, "idempotency key reused\n")
        assert position_of(await post(two, "message", "key")) == position
        await post(one, "after")
        assert await subscriber.next_messages(2) == ["message", "after"]
    refused = [
        await relay.metric("websocket_refusals_total", reason="idempotency_key_reused")
        for relay in dict.fromkeys(relays)
    ]
    assert sum(refused) == 10
    assert await totals(relays) == (before[0] + 1, before[1] + 1)


async def test_of_concurrent_requests_with_one_key_and_different_content_one_is_relayed(
    relays: Relays,
) -> None:
    one, two = relays
    async with connect_relay_v1(two, "news") as subscriber:
        responses = await asyncio.gather(
            *(post(relay, f"{n}", "key") for n, relay in enumerate((one, two, one, two)))
        )
        relayed = str(await subscriber.next_message())
        statuses = {str(n): response.status_code for n, response in enumerate(responses)}
        assert statuses.pop(relayed) == 202
        assert set(statuses.values()) == {422}
        assert position_of(responses[int(relayed)]) == subscriber.position
        await post(one, "after")
        assert await subscriber.next_message() == "after"


async def test_a_key_is_that_of_one_channel(relay: RelayProcess, channel: str) -> None:
    other = f"{channel}.other"
    async with connect_relay_v1(relay, channel) as one, connect_relay_v1(relay, other) as two:
        first = position_of(await post(relay, "message", "key", channel=channel))
        second = position_of(await post(relay, "message", "key", channel=other))
        assert parse_position(second) > parse_position(first)
        assert await one.next_message() == await two.next_message() == "message"
        assert (one.position, two.position) == (first, second)


async def test_the_default_channel_has_the_same_keys_under_both_paths(
    relay: RelayProcess, channel: str
) -> None:
    headers = {"Idempotency-Key": channel}
    first, second = [
        await publish_by_post(relay, path, b"message", TEXT_TYPE, headers)
        for path in (None, "default")
    ]
    assert first.json() == second.json()


async def test_a_key_is_that_of_one_user(relay_with: StartRelay) -> None:
    relay = relay_with(auth=jwt_settings())
    users = ("ann", "bob", "", None, "\ud800")
    positions: dict[str, str] = {}
    for user in users:
        for _ in range(2):  # with another token
            token = sign_token(sub=user, jti=str(len(positions)))
            position = position_of(await post(relay, "message", "key", token=token))
            positions.setdefault(user or "", position)
            assert positions[user or ""] == position
    assert len(set(positions.values())) == 4


async def test_messages_of_sessions_and_of_other_requests_have_other_identities(
    relay: RelayProcess, channel: str
) -> None:
    async with connect_relay_v1(relay, channel) as client:
        for _ in range(2):
            await post(relay, "without a key", channel=channel)
        await client.publish("without a key")
        await post(relay, "without a key", "key", channel=channel)
        assert await client.next_messages(4) == ["without a key"] * 4


INVALID_KEYS = ["", " ", "a b", "a\tb", "x" * 129, "grün"]


async def test_an_invalid_key_and_several_keys_are_refused_with_400(
    relay: RelayProcess, channel: str
) -> None:
    before = await relay.metric("websocket_refusals_total", reason="invalid_idempotency_key")
    lines = [[f"Idempotency-Key: {key}"] for key in INVALID_KEYS]
    lines += [["Idempotency-Key: a", f"Idempotency-Key: {key}"] for key in ("a", "b", "")]
    for each in lines:
        async with await relay.connect_tcp() as raw:
            await raw.send(post_request(channel, b"message", *each))
            response = await raw.read_response()
            assert response.status == 400, each
            body = await raw.read_exactly(int(response.headers["content-length"]))
            assert body == b"invalid idempotency key\n"
    after = await relay.metric("websocket_refusals_total", reason="invalid_idempotency_key")
    assert after == before + len(lines)
    async with connect_relay_v1(relay, channel, history=9) as client:
        await client.next_notice("live")


async def test_keys_have_up_to_128_visible_ascii_characters_and_their_case_counts(
    relay: RelayProcess, channel: str
) -> None:
    visible = "".join(map(chr, range(0x21, 0x7F)))
    keys = ["a", "A", "0", '"quoted"', visible, "x" * 128]
    positions = [position_of(await post(relay, "m", key, channel=channel)) for key in keys]
    assert len(set(positions)) == len(keys)
    repeats = [position_of(await post(relay, "m", key, channel=channel)) for key in keys]
    assert repeats == positions


async def test_a_refused_request_does_not_use_its_key(relay: RelayProcess, channel: str) -> None:
    refused = await post(relay, b"\xff", "key", channel=channel)
    assert refused.status_code == 400
    refused = await post(relay, "1\n{", "key", channel=channel, content_type=BATCH_TYPE)
    assert refused.status_code == 400
    async with connect_relay_v1(relay, channel) as client:
        position = position_of(await post(relay, "message", "key", channel=channel))
        assert await client.next_message() == "message"
        assert client.position == position


async def test_an_empty_batch_publishes_nothing_and_does_not_use_its_key(
    relay: RelayProcess, channel: str
) -> None:
    for _ in range(2):
        empty = await post(relay, "\n", "key", channel=channel, content_type=BATCH_TYPE)
        assert (empty.status_code, empty.json()["messages"]) == (202, 0)
    async with connect_relay_v1(relay, channel) as client:
        await post(relay, "message", "key", channel=channel)
        assert await client.next_message() == "message"


async def test_a_client_that_disconnects_before_its_answer_repeats_the_request(
    relay: RelayProcess, channel: str
) -> None:
    async with connect_relay_v1(relay, channel) as client:
        for number in range(20):
            key, body = f"key-{number}", f"message {number}"
            async with await relay.connect_tcp() as raw:
                await raw.send(post_request(channel, body.encode(), f"Idempotency-Key: {key}"))
                raw.reset()
            position = position_of(await post(relay, body, key, channel=channel))
            assert await client.next_message() == body
            assert client.position == position


async def test_in_an_outage_a_request_is_refused_and_its_repeat_is_relayed_once(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    """One is in flight when the outage starts: whether it is relayed is unknown to its client."""
    one, two = replicas_with(2)
    async with connect_relay_v1(two, "news") as subscriber:
        await post(one, "before", "before")
        broker.freeze()
        in_flight = await post(one, "in flight", "in-flight")
        assert in_flight.status_code in {503, 504}
        refused = await post(one, "refused", "refused")
        assert (refused.status_code, refused.text) == (503, "backplane unavailable\n")
        broker.thaw()
        for relay in (one, two):
            await relay.await_metric("websocket_backplane_up", 1)
        positions = {}
        for key, body in (("in-flight", "in flight"), ("refused", "refused")):
            answers = [await post(relay, body, key) for relay in (two, one)]
            (positions[body],) = set(map(position_of, answers))
        assert await subscriber.next_message() == "before"
        for body, position in positions.items():
            assert await subscriber.next_message() == body
            assert subscriber.position == position
        await post(two, "after")
        assert await subscriber.next_message() == "after"
    messages, _ = await totals([one, two])
    assert messages == 4


async def test_a_repeat_on_a_replica_that_has_just_started_is_not_relayed(
    replicas_with: StartReplicas,
) -> None:
    (one,) = await asyncio.to_thread(replicas_with, 1)
    position = position_of(await post(one, "message", "key"))
    (two,) = await asyncio.to_thread(replicas_with, 1)
    assert position_of(await post(two, "message", "key")) == position
    assert (await post(two, "other", "key")).status_code == 422
    async with one.client("news") as subscriber:
        await post(two, "after")
        assert await receive(subscriber) == "after"


# The server API, whose requests have messages for several channels

LINES = [("news", "one"), ("chat", "two"), ("news", "three"), ("news", "three")]


async def publish_lines(
    relay: RelayProcess, *lines: tuple[str, str], key: str = "key"
) -> httpx2.Response:
    """Publish texts to channels with the server API, and a key."""
    body = "\n".join(json.dumps({"channel": channel, "text": text}) for channel, text in lines)
    headers = {"Idempotency-Key": key}
    return await request_api(relay, "POST", "/publish", body, headers=headers)


def positions_of(response: httpx2.Response) -> list[str]:
    assert response.status_code == 202, response.text
    return list(response.json()["positions"])


async def test_a_repeat_of_lines_on_any_replica_is_answered_like_the_first_and_not_relayed(
    relays: Relays,
) -> None:
    one, two = relays
    async with connect_relay_v1(one, "news") as news, connect_relay_v1(two, "chat") as chat:
        positions = positions_of(await publish_lines(one, *LINES))
        assert sorted(set(positions), key=parse_position) == positions
        for relay in (two, one, two):
            assert positions_of(await publish_lines(relay, *LINES)) == positions
        later = positions_of(
            await publish_lines(two, ("news", "later"), ("chat", "later"), key="k")
        )
        assert await news.next_messages(3) == ["one", "three", "three"]
        assert news.position == positions[3]
        assert await chat.next_message() == "two"
        assert chat.position == positions[1]
        assert await news.next_message() == await chat.next_message() == "later"
        assert [news.position, chat.position] == later
    assert await totals(relays) == (6, 12)


async def test_of_concurrent_requests_with_one_key_each_line_is_relayed_once(
    relays: Relays,
) -> None:
    one, two = relays
    lines = [("news", str(number)) for number in range(300)]
    async with connect_relay_v1(two, "news") as subscriber:
        responses = await asyncio.gather(
            *(publish_lines(relay, *lines) for relay in (one, two, one, two))
        )
        (positions,) = {tuple(positions_of(response)) for response in responses}
        assert len(set(positions)) == 300
        await post(two, "after")
        received = await subscriber.next_messages(301)
        assert sorted(received[:-1], key=int) == [text for _, text in lines]
        assert received[-1] == "after"
    assert await totals(relays) == (301, 900)


async def test_a_request_of_which_a_part_was_relayed_is_completed_by_its_repeat(
    relays: Relays,
) -> None:
    """As after an outage that began in between."""
    one, two = relays
    async with connect_relay_v1(two, "news") as subscriber:
        part = positions_of(await publish_lines(one, *LINES[:3]))
        whole = positions_of(await publish_lines(two, *LINES))
        assert whole[:3] == part
        assert await subscriber.next_messages(3) == ["one", "three", "three"]
        assert subscriber.position == whole[3]
    assert await totals(relays) == (4, 3)


async def test_other_lines_with_a_key_are_refused_and_none_is_relayed(relays: Relays) -> None:
    one, two = relays
    async with connect_relay_v1(two, "news") as subscriber:
        await publish_lines(one, *LINES)
        assert await subscriber.next_messages(3) == ["one", "three", "three"]
        for relay in (one, two):
            other = [("news", "new"), *LINES[1:]]
            response = await publish_lines(relay, ("other", "new"), *other)
            assert (response.status_code, response.text) == (422, "idempotency key reused\n")
        await post(one, "after")
        assert await subscriber.next_message() == "after"
    assert await totals(relays) == (5, 0)


async def test_a_key_of_the_server_api_is_no_key_of_another_post(relay_with: StartRelay) -> None:
    relay = relay_with(**WITH_KEY)
    posted = position_of(await post(relay, "message", "key"))
    (published,) = positions_of(await publish_lines(relay, ("news", "message")))
    assert parse_position(published) > parse_position(posted)


async def test_an_invalid_key_of_the_server_api_is_refused(relay_with: StartRelay) -> None:
    relay = relay_with(**WITH_KEY)
    for key in ("", "a b", "x" * 129):
        response = await publish_lines(relay, *LINES, key=key)
        assert (response.status_code, response.text) == (400, "invalid idempotency key\n")
