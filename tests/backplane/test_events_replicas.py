"""Server-sent events of several replicas on one broker: resuming on any of them, and gaps."""

import pytest

from tests.support.broker_logs import BrokerLog
from tests.support.events_client import request_events, subscribe_events
from tests.support.relay_process import StartReplicas, receive
from tests.support.relay_v1 import parse_position, publish_all


@pytest.mark.parametrize("kind", ["nats"])
async def test_an_event_stream_resumes_on_another_replica_without_a_gap(
    replicas_with: StartReplicas,
) -> None:
    one, two = replicas_with(2)
    async with subscribe_events(one, "news") as events:
        await publish_all(two, "news", "received")
        assert await events.next_messages(1) == ["received"]
        await publish_all(two, "news", "last")
        last = await events.next_event()
    await publish_all(one, "news", *map(str, range(100)))
    async with request_events(two, "news", headers={"Last-Event-ID": last.id}) as resumed:
        assert (await resumed.next_event()).json["recovered"] is True
        await publish_all(one, "news", "live")
        assert await resumed.next_messages(101) == [*map(str, range(100)), "live"]


@pytest.mark.parametrize("kind", ["redis"])
async def test_an_event_stream_receives_a_gap_event_and_resumes_after_it(
    broker_log: BrokerLog, replicas_with: StartReplicas
) -> None:
    (relay,) = replicas_with(1)
    async with subscribe_events(relay, "news") as events, relay.client("news") as publisher:
        await publisher.send("before")
        before = await events.next_event()
        assert (before.data, await receive(publisher)) == ("before", "before")
        await broker_log.delete_stream()
        await broker_log.broker.restart()
        gap = await events.next_event()
        assert gap.name == "gap"
        assert gap.json == {"type": "gap", "position": gap.id}
        assert parse_position(gap.id) > parse_position(before.id)
        await publisher.send("after")
        while (event := await events.next_event()).name == "gap":
            gap = event
        assert event.data == "after"
    async with request_events(relay, "news", headers={"Last-Event-ID": before.id}) as resumed:
        assert (await resumed.next_event()).json["recovered"] is False
    async with request_events(relay, "news", headers={"Last-Event-ID": gap.id}) as resumed:
        assert (await resumed.next_event()).json["recovered"] is True
        assert await resumed.next_messages(1) == ["after"]
