"""The log of a single replica, kept in the process: a counter and a direct call.

Knows no broker and no other replica.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from websocket_relay.backplane.interface import (
    BackplaneState,
    Identity,
    OnEntries,
    OnGap,
    OnHeartbeat,
    Position,
    new_entry,
    new_position,
)
from websocket_relay.counters import BackplaneCounters
from websocket_relay.messages import Message, Publisher


class MemoryBackplane:
    """`memory://`: delivers entries before `append` returns."""

    is_local = True
    is_relaying_alone = False
    relays_locally = True

    def __init__(self, describe: Callable[[], bytes]) -> None:
        self._describe = describe
        self.counters = BackplaneCounters()
        self.state = BackplaneState.UP
        self.started, self.up = asyncio.Event(), asyncio.Event()
        self.started.set()
        self.up.set()
        self.on_heartbeat: OnHeartbeat = lambda _position, _description: None
        # Milliseconds since 1970: greater than the epoch of any earlier process.
        self._epoch = time.time_ns() // 1_000_000
        self._offset = 0
        self._deliver: OnEntries

    @property
    def position(self) -> Position:
        """The position of the latest message."""
        return Position(self._epoch, self._offset, 0)

    @property
    def complete_until(self) -> float:
        """The current time: messages are delivered at once."""
        return time.monotonic()

    def replicas(self) -> Sequence[bytes]:
        """Return the description of this replica, the only one."""
        return [self._describe()]

    @property
    def unconfirmed_messages(self) -> int:
        """Zero: no message is ever pending."""
        return 0

    def consume(self, deliver: OnEntries, lost: OnGap) -> None:
        """Pass every entry from now on to `deliver`."""
        self._deliver = deliver
        lost(Position(self._epoch, self._offset, 0))  # messages of earlier processes are lost

    def append(
        self,
        channel: str,
        messages: Sequence[Message],
        payload_bytes: int,
        publisher: Publisher,
        identity: Identity | None = None,
    ) -> None:
        """Append messages and deliver them."""
        epoch, offset, entries = self._epoch, self._offset, []
        for kind, payload in messages:
            offset += 1
            entries.append(new_entry((new_position((epoch, offset, 0)), channel, kind, payload)))
        self._offset = offset
        self._deliver(entries, None if identity is None else identity.of_each())

    def when_delivered(self, callback: Callable[[Position | None], object]) -> None:
        """Call `callback` at once: the latest message has been delivered."""
        callback(self.position)

    def when_settled(self, callback: Callable[[], None]) -> None:
        """Call `callback` at once: all messages have been delivered."""
        callback()

    def pause_reading(self) -> None:
        """Do nothing: no message is buffered here, and flow control pauses the publishers."""

    def resume_reading(self) -> None:
        """Do nothing."""

    async def run(self) -> None:
        """Wait until cancelled."""
        await asyncio.get_running_loop().create_future()

    async def flush(self) -> None:
        """Return at once."""
