"""Detect dead connections: one sweep pings all clients, a later one closes the silent ones.

Knows no channel, no message and no HTTP.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from websocket_relay.outcomes import Close
from websocket_relay.wire.frames import PING, control
from websocket_relay.wire.registry import ConnectionRegistry

CLIENTS_PER_SLICE = 200  # some microseconds each; then the sweep yields to the event loop


@dataclass(frozen=True, slots=True)
class Keepalive:
    """The detection of dead connections, by relay and clients.

    Any bytes from a client count as an answer, because a pong queues after a long message.

    Attributes:
        clients: the connections.
        ping_interval_s: seconds between two ping sweeps.
        ping_timeout_s: seconds from a ping to the close (1011) of a client that is silent since.
        encode_heartbeat: returns the notice for clients of relay.v1.
    """

    clients: ConnectionRegistry
    ping_interval_s: float
    ping_timeout_s: float
    encode_heartbeat: Callable[[], bytes]

    async def run(self) -> None:
        """Ping all clients every interval, and close silent ones a timeout later; until cancelled.

        All pings of a sweep are the same frame.
        """
        loop = asyncio.get_running_loop()
        next_ping_at = loop.time() + self.ping_interval_s
        unchecked_sweeps: deque[float] = deque()  # end times of ping sweeps, oldest first
        for sweep_number in count():
            while unchecked_sweeps and unchecked_sweeps[0] + self.ping_timeout_s <= next_ping_at:
                pinged_at = unchecked_sweeps.popleft()
                await asyncio.sleep(pinged_at + self.ping_timeout_s - loop.time())
                await _close_silent_clients(self.clients, pinged_at)
            await asyncio.sleep(next_ping_at - loop.time())
            frame = control(PING, sweep_number.to_bytes(8, "big"))
            heartbeat = self.encode_heartbeat()
            unchecked_sweeps.append(await _ping_clients(self.clients, frame, heartbeat))
            next_ping_at = max(next_ping_at + self.ping_interval_s, loop.time())


async def _ping_clients(clients: ConnectionRegistry, frame: bytes, heartbeat: bytes) -> float:
    """Ping all clients; return the loop time after the last ping."""
    loop = asyncio.get_running_loop()
    for number, client in enumerate(clients, 1):
        client.ping(frame, heartbeat, loop.time())
        if number % CLIENTS_PER_SLICE == 0:
            await asyncio.sleep(0)
    return loop.time()


async def _close_silent_clients(clients: ConnectionRegistry, since: float) -> None:
    # A relay that was suspended itself, with its machine for example, wakes up late. The event
    # loop reads what arrived in the meantime before any client counts as silent.
    for _ in range(2):
        await asyncio.sleep(0)
    for number, client in enumerate(clients, 1):
        if client.is_ping_overdue(since):
            client.close(Close.PING_TIMEOUT)
        if number % CLIENTS_PER_SLICE == 0:
            await asyncio.sleep(0)
