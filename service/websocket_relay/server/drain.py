"""Let clients go one after another when the relay stops, so that they do not return all at once."""

import asyncio
import random

from websocket_relay.outcomes import Close
from websocket_relay.wire.registry import ConnectionRegistry

STEP_S = 0.01  # clients that are due within one step are closed together

RETRY_WINDOW_S = 1.0
"""Clients are told to come back at random within this time. The pace of the closes is what spreads
them; this keeps those apart who were closed in the same moment (bench/results/simulation.md)."""


async def close_all(clients: ConnectionRegistry, *, spread_s: float, rng: random.Random) -> None:
    """Close every client with 1001, evenly spread over time, each after all it is owed.

    Each is told in `retry_ms` when to come back, so that those who left together do not return
    together.

    Args:
        clients: the connections; no new ones come any more.
        spread_s: how long it takes to say goodbye to all of them.
        rng: who goes first and comes back when.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    leaving = list(clients)
    rng.shuffle(leaving)
    for number, client in enumerate(leaving):
        due = start + spread_s * number / len(leaving)
        if due - loop.time() > STEP_S:
            await asyncio.sleep(due - loop.time())
        elif number % 100 == 99:
            await asyncio.sleep(0)
        retry_ms = rng.randint(0, round(RETRY_WINDOW_S * 1000))
        client.close_when_written(Close.DRAINING, f"{Close.DRAINING.reason}; retry_ms={retry_ms}")


async def wait_until_closed(clients: ConnectionRegistry, *, until: float) -> int:
    """Wait for the clients' answers; cut off who has not gone by then.

    Args:
        clients: the connections.
        until: by the loop's clock.

    Returns:
        How many were cut off.
    """
    try:
        async with asyncio.timeout_at(until):
            await clients.none_left.wait()
    except TimeoutError:
        pass
    left = list(clients)
    for client in left:
        client.abort(Close.DRAINING)
    return len(left)
