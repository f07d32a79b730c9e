"""Publishers that are held back: all of them go on again."""

import asyncio
from contextlib import AsyncExitStack
from signal import SIGCONT, SIGSTOP

from websockets.asyncio.client import ClientConnection

from tests.support.raw_client import PONG, TEXT, frame
from tests.support.relay_process import StartRelay, receive, receive_many

KIB = 1_024
MIB = 1_048_576


async def test_publishers_that_were_held_together_all_get_to_say_what_they_have(
    relay_with: StartRelay,
) -> None:
    """Those that are released first may have nothing left to say; the others go on all the same."""
    relay = relay_with(limits={"send_backlog_bytes": 256 * KIB})
    publishers = 40
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(relay.client("news")) for _ in range(publishers)]

        async def publish(client: ClientConnection, number: int) -> None:
            await client.send(bytes([number]) * 100 * KIB)

        async with asyncio.TaskGroup() as group:
            heard = [group.create_task(receive_many(client, publishers)) for client in clients]
            for number, client in enumerate(clients):
                group.create_task(publish(client, number))
        first = [message[0] for message in heard[0].result()]
        assert sorted(first) == list(range(publishers))
        assert all([message[0] for message in each.result()] == first for each in heard)
        assert await relay.metric("websocket_publisher_pauses_total") > 0
        await relay.metric_is("websocket_paused_publishers", 0)


async def test_a_flood_of_tiny_frames_keeps_nobody_waiting(relay_with: StartRelay) -> None:
    """One read brings ten thousands of them; others have their turn in between."""
    relay = relay_with(keepalive={"ping_interval_s": 3_600})
    flood = frame(PONG) * 2_000_000
    async with relay.raw_client("loud") as loud, relay.client("calm") as calm:
        flooding = asyncio.create_task(loud.send(flood, patience_s=50))
        for number in range(20):
            await calm.send(str(number))
            assert await receive(calm) == str(number)
        assert not flooding.done(), "twenty messages took as long as two million pongs"
        await flooding


async def test_what_many_have_said_at_once_is_read_no_faster_than_it_is_heard(
    relay_with: StartRelay,
) -> None:
    """They all have it ready while the relay stands still: what is read of it has a bound, too."""
    total, count, size = 8 * MIB, 400, 96 * KIB
    relay = relay_with(limits={"total_backlog_bytes": total}, keepalive={"ping_interval_s": 3_600})
    pong = frame(PONG, bytes(125))
    flood = pong * (size // len(pong)) + frame(TEXT, b"the end")
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(relay.raw_client(f"of-{number}"))
            for number in range(count)
        ]
        before_bytes = relay.forget_peak()
        relay.signal(SIGSTOP)
        sending = [asyncio.create_task(client.send(flood)) for client in clients]
        await asyncio.sleep(0)  # all that the kernel takes
        relay.signal(SIGCONT)
        await asyncio.gather(*sending)
        for client in clients:
            assert await client.message() == "the end"
        assert relay.peak_rss_bytes() < before_bytes + total + 4 * MIB
        await relay.metric_is("websocket_paused_publishers", 0)
        assert await relay.metric("websocket_disconnections_total") == 0
