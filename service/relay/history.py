"""Keep the latest messages for clients that come back, or want to see some first.

Filled with what the log says, like the channels: so what is replayed and what comes live are one
sequence, and every replica can serve a client that was on another.
"""

import asyncio
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from operator import attrgetter

from service.backplane.base import START, Entry, Position

ENTRY_BYTES = 320
"""What a message takes besides its payload: the objects that it is made of, and its places in two
lists."""

AGE_STEP_S = 1.0
"""How exact ages are."""

ROOM_PART = 64
"""Where there are too many, this part of them is forgotten at once."""

COMPACT_FROM = 64

FORGOTTEN = Entry(START, "", 0, b"")

_position_of = attrgetter("position")


class Past:
    """What is kept of one channel, oldest first."""

    __slots__ = ("_entries", "_gone")

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._gone = 0  # entries at the front that are forgotten and not taken out yet

    def __len__(self) -> int:
        return len(self._entries) - self._gone

    def add(self, entry: Entry) -> None:
        """Add the newest entry."""
        self._entries.append(entry)

    def forget_oldest(self) -> None:
        """Let go of the oldest entry."""
        gone, entries = self._gone + 1, self._entries
        if gone >= COMPACT_FROM and gone * 2 >= len(entries):
            del entries[:gone]
            gone = 0
        else:
            entries[gone - 1] = FORGOTTEN
        self._gone = gone

    def after(self, position: Position, count: int) -> Sequence[Entry]:
        """Return the first entries behind a position."""
        start = bisect_right(self._entries, position, lo=self._gone, key=_position_of)
        return self._entries[start : start + count]

    def last(self, count: int) -> Sequence[Entry]:
        """Return the newest entries."""
        return self._entries[max(self._gone, len(self._entries) - count) :]


class History:
    """The latest messages of all channels.

    Args:
        max_messages, max_bytes, max_age_s: what is kept of all of them together.
        max_channels: of so many channels, the latest, is known from where on they are complete.
        clock: seconds, growing.
    """

    def __init__(
        self,
        *,
        max_messages: int,
        max_bytes: int,
        max_age_s: float,
        max_channels: int,
        clock: Callable[[], float],
    ) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._max_channels = max_channels
        self._clock = clock
        self._entries: deque[Entry] = deque()
        self._channels: dict[str, Past] = {}
        self._added = 0
        self._marks: deque[tuple[float, int]] = deque()  # when, and what had been added by then
        # Nothing is missing behind the newest one that was forgotten: of each channel, and of all.
        self._forgotten: OrderedDict[str, Position] = OrderedDict()
        self._floor = START
        self.newest = START
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        """Keep what the log says; forget what is too much."""
        self.newest, channel, _, payload = entry
        past = self._channels.get(channel)
        if past is None:
            past = self._channels[channel] = Past()
        past.add(entry)
        self._entries.append(entry)
        self._added += 1
        self.bytes += len(payload) + ENTRY_BYTES
        if self.bytes > self._max_bytes or len(self._entries) > self._max_messages:
            self._make_room()

    async def grow_old(self) -> None:
        """Forget what is too old, for ever."""
        while True:
            await asyncio.sleep(AGE_STEP_S)
            self.forget_old()

    def forget_old(self) -> None:
        """Forget what was too old when this was called before, or since."""
        now = self._clock()
        self._marks.append((now, self._added))
        too_old = 0
        while self._marks and self._marks[0][0] <= now - self._max_age_s:
            _, too_old = self._marks.popleft()
        self._forget(too_old - (self._added - len(self._entries)))

    def begin_after(self, position: Position) -> None:
        """Take note that something up to this position may be missing, and nothing behind it."""
        self._floor = max(self._floor, position)
        self.newest = max(self.newest, position)

    def known_after(self, channel: str) -> Position:
        """Return a position behind which nothing is missing of a channel."""
        return max(self._floor, self._forgotten.get(channel, self._floor))

    def has_all_after(self, channel: str, position: Position) -> bool:
        """Tell whether nothing is missing of a channel behind a position."""
        return position >= self.known_after(channel)

    def after(self, channel: str, position: Position, count: int) -> Sequence[Entry]:
        """Return the first entries of a channel behind a position."""
        past = self._channels.get(channel)
        return past.after(position, count) if past is not None else ()

    def last(self, channel: str, count: int) -> Sequence[Entry]:
        """Return the newest entries of a channel."""
        past = self._channels.get(channel)
        return past.last(count) if past is not None else ()

    def _make_room(self) -> None:
        """Forget as much as is too much, and some more, so that it need not be done each time."""
        count = len(self._entries) - self._max_messages + self._max_messages // ROOM_PART
        while count > 0 or self.bytes > self._max_bytes:
            self._forget(max(1, count))
            count = 0

    def _forget(self, count: int) -> None:
        """Forget so many entries, the oldest."""
        channels, entries = self._channels, self._entries
        last: dict[str, Position] = {}
        for _ in range(count):
            position, channel, _, payload = entries.popleft()
            self.bytes -= len(payload) + ENTRY_BYTES
            past = channels[channel]
            past.forget_oldest()
            if not past:
                del channels[channel]
            last[channel] = position
        forgotten = self._forgotten
        for channel, position in last.items():
            forgotten[channel] = position
            forgotten.move_to_end(channel)
            if len(forgotten) > self._max_channels:
                _, unknown_before = forgotten.popitem(last=False)
                self.begin_after(unknown_before)
