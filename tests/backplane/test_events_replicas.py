"""Server-sent events of several replicas on one broker: resuming on any of them, and gaps."""

import pytest

from tests.support.events_client import asking, listening
from tests.support.logs_kept import BrokerLog
from tests.support.relay_process import StartReplicas, receive
from tests.support.relay_v1 import as_numbers, say


@pytest.mark.parametrize("kind", ["nats"])
async def test_an_event_stream_resumes_on_another_replica_without_a_gap(
    replicas_with: StartReplicas,
) -> None:
    one, two = replicas_with(2)
    async with listening(one, "news") as events:
        await say(two, "news", "received")
        assert await events.messages(1) == ["received"]
        await say(two, "news", "last")
        last = await events.event()
    await say(one, "news", *map(str, range(100)))
    async with asking(two, "news", headers={"Last-Event-ID": last.id}) as resumed:
        assert (await resumed.event()).said["recovered"] is True
        await say(one, "news", "live")
        assert await resumed.messages(101) == [*map(str, range(100)), "live"]


@pytest.mark.parametrize("kind", ["redis"])
async def test_an_event_stream_receives_a_gap_event_and_resumes_after_it(
    broker_log: BrokerLog, replicas_with: StartReplicas
) -> None:
    (relay,) = replicas_with(1)
    async with listening(relay, "news") as events, relay.client("news") as publisher:
        await publisher.send("before")
        before = await events.event()
        assert (before.data, await receive(publisher)) == ("before", "before")
        await broker_log.delete()
        await broker_log.broker.restart()
        gap = await events.event()
        assert gap.name == "gap"
        assert gap.said == {"type": "gap", "position": gap.id}
        assert as_numbers(gap.id) > as_numbers(before.id)
        await publisher.send("after")
        while (event := await events.event()).name == "gap":
            gap = event
        assert event.data == "after"
    async with asking(relay, "news", headers={"Last-Event-ID": before.id}) as resumed:
        assert (await resumed.event()).said["recovered"] is False
    async with asking(relay, "news", headers={"Last-Event-ID": gap.id}) as resumed:
        assert (await resumed.event()).said["recovered"] is True
        assert await resumed.messages(1) == ["after"]
