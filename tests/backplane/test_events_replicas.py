"""Clients of server-sent events where several relays are one: they come back to any of them."""

from tests.support.brokers import Broker
from tests.support.events_client import asking, listening
from tests.support.logs_kept import deleted
from tests.support.relay_process import StartReplicas, receive
from tests.support.relay_v1 import as_numbers, say


async def test_a_listener_goes_on_at_another_replica(replicas_with: StartReplicas) -> None:
    one, two = replicas_with(2)
    async with listening(one, "news") as events:
        await say(two, "news", "heard")
        assert await events.messages(1) == ["heard"]
        await say(two, "news", "unheard")
        last = await events.event()
    await say(one, "news", *map(str, range(100)))
    async with asking(two, "news", headers={"Last-Event-ID": last.id}) as again:
        assert (await again.event()).said["recovered"] is True
        await say(one, "news", "live")
        assert await again.messages(101) == [*map(str, range(100)), "live"]


async def test_a_listener_is_told_of_a_gap_and_comes_back_behind_it(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    (relay,) = replicas_with(1)
    async with listening(relay, "news") as events, relay.client("news") as speaker:
        await speaker.send("before")
        before = await events.event()
        assert (before.data, await receive(speaker)) == ("before", "before")
        await deleted(broker)
        await broker.restart()
        gap = await events.event()
        assert gap.name == "gap"
        assert gap.said == {"type": "gap", "position": gap.id}
        assert as_numbers(gap.id) > as_numbers(before.id)
        await speaker.send("after")
        while (event := await events.event()).name == "gap":
            gap = event
        assert event.data == "after"
    async with asking(relay, "news", headers={"Last-Event-ID": before.id}) as again:
        assert (await again.event()).said["recovered"] is False
    async with asking(relay, "news", headers={"Last-Event-ID": gap.id}) as again:
        assert (await again.event()).said["recovered"] is True
        assert await again.messages(1) == ["after"]
