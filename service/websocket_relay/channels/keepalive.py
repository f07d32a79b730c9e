"""Find the dead: one sweep pings every connection, and closes who stays silent."""

import asyncio
from collections import deque
from itertools import count

from websocket_relay.outcomes import Close
from websocket_relay.wire.frames import PING, control
from websocket_relay.wire.registry import ConnectionRegistry

CLIENTS_PER_SLICE = 200  # some microseconds each; then the loop gets its turn


async def keep_alive(
    clients: ConnectionRegistry, *, ping_interval_s: float, ping_timeout_s: float
) -> None:
    """Ping all clients every interval with one shared frame, and judge them a timeout later.

    Any bytes from a client count as life, for a pong waits its turn behind a long message.

    Args:
        clients: the connections.
        ping_interval_s: seconds between two sweeps.
        ping_timeout_s: seconds from a ping to the close of a client silent since (1011).
    """
    loop = asyncio.get_running_loop()
    next_ping = loop.time() + ping_interval_s
    pinged_at: deque[float] = deque()  # sweeps that were not judged yet
    for number in count():
        while pinged_at and pinged_at[0] + ping_timeout_s <= next_ping:
            sweep = pinged_at.popleft()
            await asyncio.sleep(sweep + ping_timeout_s - loop.time())
            await _judge(clients, sweep)
        await asyncio.sleep(next_ping - loop.time())
        pinged_at.append(await _ping(clients, control(PING, number.to_bytes(8, "big"))))
        next_ping = max(next_ping + ping_interval_s, loop.time())


async def _ping(clients: ConnectionRegistry, frame: bytes) -> float:
    """Ping everybody; return when the last one was pinged."""
    loop = asyncio.get_running_loop()
    for number, client in enumerate(clients, 1):
        client.ping(frame, loop.time())
        if number % CLIENTS_PER_SLICE == 0:
            await asyncio.sleep(0)
    return loop.time()


async def _judge(clients: ConnectionRegistry, since: float) -> None:
    # A relay that was stopped for a while itself, with its machine, say, wakes up late: what came
    # in meanwhile is heard first.
    for _ in range(2):
        await asyncio.sleep(0)
    for number, client in enumerate(clients, 1):
        if client.is_silent(since):
            client.close(Close.PING_TIMEOUT)
        if number % CLIENTS_PER_SLICE == 0:
            await asyncio.sleep(0)
