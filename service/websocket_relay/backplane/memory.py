"""Keep the log in the process: one replica, a counter, a plain call."""

import asyncio
import time
from collections.abc import Callable, Sequence

from websocket_relay.backplane.interface import (
    BackplaneState,
    LogEntry,
    OnEntry,
    OnGap,
    Position,
    Rejectable,
)
from websocket_relay.counters import BackplaneCounters


class MemoryBackplane:
    """`memory://`: an entry is delivered before `append` returns."""

    turns = 0
    relays_locally = True

    def __init__(self, describe: Callable[[], bytes]) -> None:
        self._describe = describe
        self.books = BackplaneCounters()
        self.state = BackplaneState.UP
        self.begun, self.up = asyncio.Event(), asyncio.Event()
        self.begun.set()
        self.up.set()
        # Milliseconds since 1970: ahead of all earlier lives of the relay.
        self._major = time.time_ns() // 1_000_000
        self._minor = 0
        self._deliver: OnEntry | None = None

    @property
    def position(self) -> Position:
        """Where the latest message stands."""
        return Position(self._major, self._minor, 0)

    @property
    def complete_until(self) -> float:
        """Now: every message is delivered at once."""
        return time.monotonic()

    def replicas(self) -> Sequence[bytes]:
        """Return what this one says of itself."""
        return [self._describe()]

    @property
    def waiting(self) -> int:
        """None ever do."""
        return 0

    def tail(self, deliver: OnEntry, lost: OnGap) -> None:
        """Give every entry from now on to `deliver`."""
        self._deliver = deliver
        lost(Position(self._major, self._minor, 0))  # what was said in earlier lives is gone

    def append(self, channel: str, opcode: int, payload: bytes, publisher: Rejectable) -> None:
        """Add a message at the end, and deliver it."""
        self._minor += 1
        if self._deliver is not None:
            self._deliver(LogEntry(Position(self._major, self._minor, 0), channel, opcode, payload))

    def append_all(
        self, channel: str, said: Sequence[tuple[int, bytes]], publisher: Rejectable
    ) -> None:
        """Add messages at the end, and deliver them."""
        for opcode, payload in said:
            self.append(channel, opcode, payload, publisher)

    def when_delivered(self, answer: Callable[[Position | None], object]) -> None:
        """Call it: the message has been."""
        answer(self.position)

    def when_settled(self, act: Callable[[], None]) -> None:
        """Call it: all has been."""
        act()

    def pause_reading(self) -> None:
        """Go on: nothing waits here, and publishers are held elsewhere."""

    def resume_reading(self) -> None:
        """Go on."""

    async def run(self) -> None:
        """Wait to be cancelled."""
        await asyncio.get_running_loop().create_future()

    async def flush(self) -> None:
        """Return at once."""
