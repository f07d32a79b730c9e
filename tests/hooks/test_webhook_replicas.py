"""Webhooks of several replicas on one log: one of them delivers, and any other can go on."""

import asyncio
from collections.abc import Iterator, Sequence
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM, Signals
from typing import Any

import pytest

from tests.support.brokers import Broker
from tests.support.hook_receiver import HookReceiver
from tests.support.http_requests import TEXT_TYPE, publish_by_post
from tests.support.relay_process import RelayProcess, StartReplicas, eventually

SHUTDOWN = {"spread_s": 0, "timeout_s": 10}


@pytest.fixture
def receiver() -> Iterator[HookReceiver]:
    with HookReceiver() as started:
        yield started


async def publish(relay: RelayProcess, *texts: str) -> None:
    for text in texts:
        answer = await publish_by_post(relay, "news", text.encode(), TEXT_TYPE)
        answer.raise_for_status()


async def accepted(receiver: HookReceiver, count: int) -> Sequence[dict[str, Any]]:
    return await asyncio.to_thread(receiver.block_until_accepted, count)


async def started_replicas(
    replicas_with: StartReplicas, receiver: HookReceiver, count: int = 2
) -> Sequence[RelayProcess]:
    """Start replicas; return them once one delivers, that one first."""
    replicas = replicas_with(
        count,
        hooks={**receiver.settings, "messages": ["*"]},
        presence={"channels": ["news"], "grace_s": 1},
        shutdown=SHUTDOWN,
    )
    await publish(replicas[0], "started")
    await accepted(receiver, 1)
    counts: list[float] = []

    async def check() -> tuple[bool, object]:
        counts[:] = [await each.metric("websocket_hook_events_total") for each in replicas]
        return sorted(counts) == [0] * (count - 1) + [1], counts

    await eventually(check, "one replica that has delivered one event")
    return sorted(replicas, key=lambda each: counts[replicas.index(each)] == 0)


async def test_each_event_is_delivered_by_one_replica(
    replicas_with: StartReplicas, receiver: HookReceiver
) -> None:
    replicas = await started_replicas(replicas_with, receiver, count=3)
    async with replicas[1].client("news"), replicas[2].client("news"):
        for number in range(12):
            await publish(replicas[number % 3], str(number))
        events = await accepted(receiver, 1 + 3 + 12)
    assert [event["text"] for event in events if "text" in event][1:] == [
        str(number) for number in range(12)
    ]
    await accepted(receiver, 1 + 3 + 12 + 3)
    kinds = [event["type"] for event in receiver.accepted if event["type"] != "published"]
    assert kinds[0] == "occupied"
    assert sorted(kinds[1:3]) == ["joined"] * 2
    assert kinds[3:] == ["left", "left", "vacated"]
    assert len(receiver.accepted) == 19
    for replica in replicas:
        await replica.await_metric("websocket_hook_pending_events", 0)
    await replicas[0].await_metric("websocket_hook_events_total", 19)
    for replica in replicas[1:]:
        assert await replica.metric("websocket_hook_events_total") == 0


async def test_another_replica_delivers_what_a_killed_one_has_not(
    replicas_with: StartReplicas, receiver: HookReceiver
) -> None:
    delivering, other = await started_replicas(replicas_with, receiver)
    async with delivering.client("news"):
        await accepted(receiver, 3)
        receiver.status = 503
        await publish(other, "first", "second")
        await asyncio.to_thread(receiver.block_until_requested, receiver.requests + 1)
        delivering.signal(SIGKILL)
        receiver.status = 200
        await publish(other, "third")
        events = await accepted(receiver, 8)
    assert [event["text"] for event in events if "text" in event][1:] == [
        "first",
        "second",
        "third",
    ]
    assert [(event["type"], event.get("code")) for event in events[-2:]] == [
        ("left", 1006),
        ("vacated", None),
    ]
    await other.await_metric_at_least("websocket_hook_events_total", 5)


async def test_a_replica_that_was_frozen_does_not_disturb_its_successor(
    replicas_with: StartReplicas, receiver: HookReceiver
) -> None:
    frozen, other = await started_replicas(replicas_with, receiver)
    frozen.signal(SIGSTOP)
    await publish(other, *map(str, range(10)))
    await accepted(receiver, 11)
    await other.await_metric_at_least("websocket_hook_events_total", 10)
    frozen.signal(SIGCONT)
    await publish(other, *map(str, range(10, 20)))
    events = await accepted(receiver, 21)
    assert [event["text"] for event in events] == ["started", *map(str, range(20))]
    for replica in (frozen, other):
        await replica.await_metric("websocket_hook_pending_events", 0)


async def test_another_replica_goes_on_where_a_stopped_one_ended(
    replicas_with: StartReplicas, receiver: HookReceiver
) -> None:
    delivering, other = await started_replicas(replicas_with, receiver)
    await publish(other, *map(str, range(20)))
    assert await delivering.stop() == 0
    await publish(other, "after the stop")
    events = await accepted(receiver, 22)
    texts = ["started", *map(str, range(20)), "after the stop"]
    assert [event["text"] for event in events] == texts
    assert [event["text"] for event in receiver.accepted] == texts  # no event was repeated


async def test_a_replica_that_can_be_replaced_does_not_wait_for_a_receiver_that_fails(
    replicas_with: StartReplicas, receiver: HookReceiver
) -> None:
    delivering, other = await started_replicas(replicas_with, receiver)
    receiver.status = 503
    await publish(other, "pending")
    started_at = asyncio.get_running_loop().time()
    assert await delivering.stop() == 0
    assert asyncio.get_running_loop().time() - started_at < SHUTDOWN["timeout_s"] / 2
    receiver.status = 200
    assert [event["text"] for event in await accepted(receiver, 2)] == ["started", "pending"]


@pytest.mark.parametrize("end", [SIGKILL, SIGTERM])
async def test_a_replica_that_starts_alone_delivers_what_is_left_in_the_log(
    replicas_with: StartReplicas, receiver: HookReceiver, end: Signals
) -> None:
    (first,) = await started_replicas(replicas_with, receiver, count=1)
    receiver.status = 503
    await publish(first, "first", "second")
    assert await first.stop(end) == (0 if end is SIGTERM else -SIGKILL)
    assert "messages unconfirmed" not in [event["event"] for event in first.log_events]
    receiver.status = 200
    replicas_with(1, hooks={**receiver.settings, "messages": ["*"]})
    events = await accepted(receiver, 3)
    assert [event["text"] for event in events] == ["started", "first", "second"]
    assert len([event for event in receiver.accepted if event["text"] == "started"]) <= 2


async def test_delivery_continues_after_an_outage_of_the_broker(
    replicas_with: StartReplicas, receiver: HookReceiver, broker: Broker
) -> None:
    replicas = await started_replicas(replicas_with, receiver)
    receiver.status = 503
    await publish(replicas[0], "before")
    broker.stop()
    for replica in replicas:
        await replica.await_log("backplane outage")
    receiver.status = 200
    await broker.start()
    for replica in replicas:
        await replica.await_metric("websocket_backplane_up", 1)
    await publish(replicas[1], "after")
    events = await accepted(receiver, 3)
    assert [event["text"] for event in events] == ["started", "before", "after"]


async def test_what_is_in_the_log_before_webhooks_are_enabled_is_not_delivered(
    replicas_with: StartReplicas, receiver: HookReceiver
) -> None:
    (without,) = replicas_with(1)
    await publish(without, "before")
    with_hooks = replicas_with(2, hooks={**receiver.settings, "messages": ["*"]})
    await publish(without, "after")
    events = await accepted(receiver, 1)
    assert [event["text"] for event in events] == ["after"]
    for replica in with_hooks:
        await replica.await_metric("websocket_hook_pending_events", 0)
        assert await replica.metric("websocket_hook_events_dropped_total") == 0
