"""Close clients gradually at shutdown, so that they do not reconnect at the same moment.

Knows no port and no signal.
"""

import asyncio
import random

from websocket_relay.outcomes import Close
from websocket_relay.wire.registry import ConnectionRegistry

STEP_S = 0.01  # clients that are due within one step are closed together

RETRY_WINDOW_S = 1.0
"""Clients reconnect after a random delay up to this time. The reconnects are spread by the pace of
the closes; this delay separates the clients that were closed in the same step
(bench/results/simulation.md)."""


async def close_all(clients: ConnectionRegistry, *, spread_s: float, rng: random.Random) -> None:
    """Close every client with 1001, evenly spread over time, each after its pending messages.

    The close reason has a random `retry_ms`, so that clients that were closed together do not
    reconnect together.

    Args:
        clients: the connections; no new ones are accepted any more.
        spread_s: time from the first close to the last.
        rng: chooses the order of the clients, and `retry_ms`.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    remaining = list(clients)
    rng.shuffle(remaining)
    for index, client in enumerate(remaining):
        due = start + spread_s * index / len(remaining)
        if due - loop.time() > STEP_S:
            await asyncio.sleep(due - loop.time())
        elif index % 100 == 99:
            await asyncio.sleep(0)
        retry_ms = rng.randint(0, round(RETRY_WINDOW_S * 1000))
        client.close(Close.DRAINING, retry_ms, when_written=True)


async def wait_until_closed(clients: ConnectionRegistry, *, until: float) -> int:
    """Wait for the closing handshakes; abort the connections that remain at the deadline.

    Args:
        clients: the connections.
        until: the deadline, by the event loop's clock.

    Returns:
        The number of connections aborted.
    """
    try:
        async with asyncio.timeout_at(until):
            await clients.all_closed.wait()
    except TimeoutError:
        pass
    remaining = list(clients)
    for client in remaining:
        client.abort(Close.DRAINING)
    return len(remaining)
