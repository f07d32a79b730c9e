"""Paused publishers: flow control bounds what is read, and every publisher resumes."""

import asyncio
from contextlib import AsyncExitStack
from signal import SIGCONT, SIGSTOP

from websocket_relay.cancellation import cancel_until_done
from websockets.asyncio.client import ClientConnection

from tests.support.raw_client import PONG, TEXT, RawClient, frame
from tests.support.relay_process import StartRelay, receive, receive_many

KIB = 1_024
MIB = 1_048_576


async def test_publishers_that_are_paused_together_all_resume(relay_with: StartRelay) -> None:
    """The first ones to resume may have nothing more to send; the others resume all the same."""
    relay = relay_with(limits={"send_backlog_bytes": 256 * KIB})
    publishers = 25
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(relay.client("news")) for _ in range(publishers)]

        async def publish(client: ClientConnection, number: int) -> None:
            await client.send(bytes([number]) * 100 * KIB)

        async with asyncio.TaskGroup() as group:
            received = [group.create_task(receive_many(client, publishers)) for client in clients]
            for number, client in enumerate(clients):
                group.create_task(publish(client, number))
        order = [message[0] for message in received[0].result()]
        assert sorted(order) == list(range(publishers))
        assert all([message[0] for message in each.result()] == order for each in received)
        assert await relay.metric("websocket_publisher_pauses_total") > 0
        await relay.await_metric("websocket_paused_publishers", 0)


async def test_a_flood_of_tiny_frames_does_not_delay_other_clients(relay_with: StartRelay) -> None:
    """One read contains ten thousand frames; other clients have their turns in between."""
    relay = relay_with(keepalive={"ping_interval_s": 3_600})
    flood = frame(PONG) * 100_000

    async def send_without_end(flooding: RawClient) -> None:
        while True:
            await flooding.send(flood, patience_s=50)

    async with relay.raw_client("busy") as flooding, relay.client("calm") as calm:
        sending = asyncio.create_task(send_without_end(flooding))
        for number in range(10):
            await calm.send(str(number))
            assert await receive(calm) == str(number)
        assert not sending.done(), sending
        await cancel_until_done(sending)


async def test_data_that_many_clients_sent_at_once_is_read_no_faster_than_it_is_processed(
    relay_with: StartRelay,
) -> None:
    """All of them send while the relay is stopped. Memory for what it then reads is bounded."""
    total, count, size = 4 * MIB, 200, 96 * KIB
    relay = relay_with(limits={"total_backlog_bytes": total}, keepalive={"ping_interval_s": 3_600})
    pong = frame(PONG, bytes(125))
    flood = pong * (size // len(pong)) + frame(TEXT, b"the end")
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(relay.raw_client(f"of-{number}"))
            for number in range(count)
        ]
        before_bytes = relay.reset_peak_rss()
        relay.signal(SIGSTOP)
        sending = [asyncio.create_task(client.send(flood)) for client in clients]
        await asyncio.sleep(0)  # each task sends as much as the kernel accepts
        relay.signal(SIGCONT)
        await asyncio.gather(*sending)
        for client in clients:
            assert await client.read_message() == "the end"
        assert relay.peak_rss_bytes() < before_bytes + total + 4 * MIB
        await relay.await_metric("websocket_paused_publishers", 0)
        assert await relay.metric("websocket_disconnections_total") == 0
