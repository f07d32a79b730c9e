"""Webhooks of one replica: what a receiver is sent, and what becomes of it if it misbehaves."""

import asyncio
import base64
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from tests.support.hook_receiver import (
    LIES,
    HookReceiver,
    Misbehave,
    send_less_than_announced,
)
from tests.support.http_requests import TEXT_TYPE, publish_by_post
from tests.support.relay_process import RelayProcess, StartRelay, receive
from tests.support.relay_v1 import open_relay_v1
from tests.support.server_api import WITH_KEY, disconnect


@pytest.fixture
def receiver() -> Iterator[HookReceiver]:
    with HookReceiver() as started:
        yield started


def types_of(receiver: HookReceiver) -> list[str]:
    return [event["type"] for event in receiver.first_deliveries()]


async def publish(relay: RelayProcess, *texts: str, channel: str = "news") -> list[str]:
    """Publish texts; return their positions."""
    answers = [await publish_by_post(relay, channel, t.encode(), TEXT_TYPE) for t in texts]
    return [answer.raise_for_status().json()["position"] for answer in answers]


async def accepted(receiver: HookReceiver, count: int) -> list[dict[str, object]]:
    return list(await asyncio.to_thread(receiver.block_until_accepted, count))


async def requested(receiver: HookReceiver, count: int) -> None:
    await asyncio.to_thread(receiver.block_until_requested, count)


async def test_clients_that_join_and_leave_are_reported_in_order(
    relay_with: StartRelay, receiver: HookReceiver
) -> None:
    relay = relay_with(hooks=receiver.settings, presence={"channels": ["chat.*"]})
    started_at = time.time()
    async with relay.client("chat.1"), relay.client("news"):
        await accepted(receiver, 2)
        async with relay.client("chat.1"):
            await accepted(receiver, 3)
        await accepted(receiver, 4)
    events = await accepted(receiver, 6)
    kinds = ["occupied", "joined", "joined", "left", "left", "vacated"]
    assert [event["type"] for event in events] == kinds
    assert {event["channel"] for event in events} == {"chat.1"}
    first, second = events[1]["client"], events[2]["client"]
    assert [event["client"] for event in events if "client" in event] == [
        first,
        second,
        second,
        first,
    ]
    assert set(events[0]) == {"id", "at", "type", "channel"}
    assert events[3] == {**events[3], "code": 1000, "user": ""}
    assert len({event["id"] for event in receiver.accepted}) == len(receiver.accepted) == 6
    for event in events:
        assert started_at - 1 <= float(str(event["at"])) <= time.time() + 1


async def test_a_leave_has_the_close_code_that_the_client_or_an_operator_has_sent(
    relay_with: StartRelay, receiver: HookReceiver
) -> None:
    presence = {"channels": ["chat.*"]}
    relay = relay_with(hooks=receiver.settings, presence=presence, **WITH_KEY)
    async with relay.client("chat.1") as first, open_relay_v1(relay) as second:
        await second.subscribe("chat.1")
        await accepted(receiver, 3)
        await disconnect(relay, client=second.welcome["client"], code=4321)
        await accepted(receiver, 4)
        await first.close(4005)
        left = (await accepted(receiver, 5))[3:5]
    assert [event["code"] for event in left] == [4321, 4005]


async def test_messages_are_reported_where_the_settings_list_the_channel(
    relay_with: StartRelay, receiver: HookReceiver
) -> None:
    relay = relay_with(hooks={**receiver.settings, "messages": ["news", "chat.*"]})
    positions = await publish(relay, "first ä")
    await publish(relay, "not listed", channel="other")
    answer = await publish_by_post(relay, "chat.1", b"\x00\xff")
    text, binary = await accepted(receiver, 2)
    assert (text["type"], text["channel"], text["text"]) == ("published", "news", "first ä")
    assert text["position"] == positions[0]
    assert text["id"] == f"{positions[0]}/0"
    assert base64.b64decode(str(binary["base64"])) == b"\x00\xff"
    assert binary["position"] == answer.json()["position"]
    await relay.await_metric("websocket_hook_events_total", 2)


@pytest.mark.parametrize("status", [500, 400, 302])
async def test_what_is_not_accepted_is_sent_again(
    relay_with: StartRelay, receiver: HookReceiver, status: int
) -> None:
    receiver.status = status
    relay = relay_with(hooks={**receiver.settings, "messages": ["*"]})
    await publish(relay, "first")
    await requested(receiver, 2)
    await publish(relay, "second")
    assert await relay.metric("websocket_hook_pending_events") == 2
    receiver.status = 204
    assert [event["text"] for event in await accepted(receiver, 2)] == ["first", "second"]
    await relay.await_metric("websocket_hook_attempts_total", 1, result="accepted")
    assert await relay.metric("websocket_hook_attempts_total", result="rejected") >= 2
    assert relay.block_until_logged("hooks failed")["error"] == f"status {status}"
    relay.block_until_logged("hooks recovered")


@pytest.mark.parametrize("lie", LIES)
async def test_a_receiver_that_lies_is_tried_again(
    relay_with: StartRelay, receiver: HookReceiver, lie: Misbehave
) -> None:
    receiver.misbehave = lie
    relay = relay_with(hooks={**receiver.settings, "messages": ["*"], "timeout_s": 1})
    await publish(relay, "first")
    await requested(receiver, 2)
    receiver.misbehave = None
    assert [event["text"] for event in await accepted(receiver, 1)] == ["first"]
    assert await relay.metric("websocket_hook_attempts_total", result="unanswered") >= 1
    async with relay.client("news") as client:
        await client.send("still relayed")
        assert await receive(client) == "still relayed"


async def test_an_event_whose_answer_is_lost_is_repeated_with_the_same_id(
    relay_with: StartRelay, receiver: HookReceiver
) -> None:
    receiver.loses_answers = True
    relay = relay_with(hooks={**receiver.settings, "messages": ["*"]})
    await publish(relay, "first")
    await requested(receiver, 2)
    receiver.loses_answers = False
    await publish(relay, "second")
    await relay.await_metric("websocket_hook_pending_events", 0)
    assert [event["text"] for event in receiver.first_deliveries()] == ["first", "second"]
    assert len(receiver.accepted) > 2


async def test_a_receiver_that_hangs_delays_no_client(
    relay_with: StartRelay, receiver: HookReceiver
) -> None:
    hanging = threading.Event()

    def hang(handler: BaseHTTPRequestHandler) -> None:
        hanging.wait(20)
        send_less_than_announced(handler)

    receiver.misbehave = hang
    relay = relay_with(hooks={**receiver.settings, "messages": ["*"], "timeout_s": 20})
    async with relay.client("news", compression=None) as client:
        for number in range(20):
            text = f"{number} " + "x" * 900_000
            await client.send(text)
            assert await receive(client) == text
    assert await relay.metric("websocket_hook_pending_events") == 20
    assert receiver.requests == 1
    receiver.misbehave = None
    hanging.set()
    events = await accepted(receiver, 20)
    assert [int(str(event["text"]).split()[0]) for event in events] == list(range(20))


async def test_a_receiver_that_restarts_is_sent_all_events_in_order(
    relay_with: StartRelay, receiver: HookReceiver
) -> None:
    relay = relay_with(hooks={**receiver.settings, "messages": ["*"]})
    texts = [str(number) for number in range(40)]
    await publish(relay, *texts[:10])
    receiver.stop()
    await publish(relay, *texts[10:30])
    await relay.await_metric_at_least("websocket_hook_pending_events", 20)
    receiver.start()
    await publish(relay, *texts[30:])
    assert [event["text"] for event in await accepted(receiver, 40)] == texts


async def test_the_receiver_learns_how_many_events_did_not_fit(
    relay_with: StartRelay, receiver: HookReceiver
) -> None:
    receiver.status = 503
    relay = relay_with(hooks={**receiver.settings, "messages": ["*"], "max_pending": 3})
    positions = await publish(relay, *map(str, range(10)))
    assert await relay.metric("websocket_hook_events_dropped_total") == 7
    receiver.status = 200
    events = await accepted(receiver, 4)
    assert [event.get("text", event["type"]) for event in events] == ["0", "1", "2", "dropped"]
    assert (events[3]["count"], events[3]["id"]) == (7, f"{positions[-1]}/0")


async def test_a_relay_that_stops_delivers_what_is_pending(
    relay_with: StartRelay, receiver: HookReceiver
) -> None:
    receiver.status = 503
    settings = {**receiver.settings, "messages": ["*"]}
    relay = relay_with(
        hooks=settings, presence={"channels": ["news"]}, shutdown={"spread_s": 0, "timeout_s": 10}
    )
    async with relay.client("news"):
        await publish(relay, "first")
        await requested(receiver, 3)
        relay.signal()
        await relay.await_log("draining")
        receiver.status = 200
        assert await relay.exit_code() == 0
    assert types_of(receiver) == ["occupied", "joined", "published", "left", "vacated"]
    assert receiver.first_deliveries()[3]["code"] == 1001


async def test_events_that_a_stopped_relay_could_not_deliver_are_logged(
    relay_with: StartRelay, receiver: HookReceiver
) -> None:
    receiver.status = 503
    relay = relay_with(
        hooks={**receiver.settings, "messages": ["*"]}, shutdown={"spread_s": 0, "timeout_s": 2}
    )
    await publish(relay, "first", "second")
    assert await relay.stop() == 0
    assert relay.block_until_logged("hook events lost")["events"] == 2
