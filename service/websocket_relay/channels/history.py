"""Keep the latest messages in memory, for clients that resume or request history.

The history is filled from the log, as the channels are. So replayed and live messages are one
sequence, and every replica can serve a client that was connected to another one.

When a bound is exceeded, the channel that uses most of it loses its oldest messages. A channel that
uses less than seven eighths of its share loses nothing to others. Its share is the bound, less the
memory of the channels themselves, divided by the number of channels.

Knows no connection and no broker.
"""

import asyncio
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

from websocket_relay.backplane.interface import ENTRY_BYTES, START, LogEntry, Position
from websocket_relay.channels.usage_ranking import Usage, UsageRanking

CHANNEL_BYTES = 600
"""Memory of a channel that has messages: its list, its two usages and its entries in the tables."""

AGE_STEP_S = 1.0
"""Resolution of ages."""

EXPIRY_SLICE_MESSAGES = 256
"""Expired messages that are evicted before the event loop runs other tasks."""

EVICTION_DIVISOR = 64
"""When a bound is exceeded, the eviction frees this fraction of it: 1 / EVICTION_DIVISOR."""

COMPACT_FROM = 64
"""Evicted entries at the front of a list before it is compacted."""

EVICTED = LogEntry(START, "", 0, b"")

_position_of = attrgetter("position")
_newest_of = attrgetter("newest")


class ChannelHistory:
    """The messages that are kept of one channel, oldest first.

    Attributes:
        channel: its name.
        floor: no message of the channel after this position is missing here.
        messages, bytes: its usage of each bound.
        age_group: the channels that are checked for expired messages together with this one.
    """

    __slots__ = ("_entries", "_evicted_count", "age_group", "bytes", "channel", "floor", "messages")

    def __init__(self, channel: str, floor: Position, age_group: "AgeGroup") -> None:
        self.channel = channel
        self.floor = floor
        self.age_group = age_group
        age_group[self] = None
        self.messages = Usage(0)
        self.bytes = Usage(0)
        self._entries: list[LogEntry] = []
        self._evicted_count = 0  # entries at the front that are evicted and still in the list

    @property
    def oldest(self) -> Position:
        """The position of the oldest entry. The history must not be empty."""
        return self._entries[self._evicted_count].position

    def append(self, entry: LogEntry, size: int) -> None:
        """Append the newest entry.

        Args:
            entry: the message.
            size: memory that it takes, in bytes.
        """
        self._entries.append(entry)
        self.messages.size += 1
        self.bytes.size += size

    def evict_oldest(self) -> int:
        """Evict the oldest entry; return the bytes of memory that it took."""
        evicted, entries = self._evicted_count, self._entries
        self.floor, _, _, payload = entries[evicted]
        entries[evicted] = EVICTED
        evicted += 1
        if evicted >= COMPACT_FROM and evicted * 2 >= len(entries):
            del entries[:evicted]
            evicted = 0
        self._evicted_count = evicted
        size = len(payload) + ENTRY_BYTES
        self.messages.size -= 1
        self.bytes.size -= size
        return size

    def entries_after(self, position: Position, count: int) -> Sequence[LogEntry]:
        """Return the first `count` entries after a position."""
        start = bisect_right(self._entries, position, lo=self._evicted_count, key=_position_of)
        return self._entries[start : start + count]

    def latest_entries(self, count: int) -> Sequence[LogEntry]:
        """Return the newest `count` entries, oldest first."""
        return self._entries[max(self._evicted_count, len(self._entries) - count) :]


AgeGroup = OrderedDict[ChannelHistory, None]


class AgeStep(NamedTuple):
    """The interval between two calls of `History.evict_expired`.

    Attributes:
        ended_at: its end, by the history's clock.
        newest: the newest position at its end.
        peers: channels whose oldest message arrived in this step, or in an earlier one and has
            been evicted since.
    """

    ended_at: float
    newest: Position
    peers: AgeGroup


class History:
    """The latest messages of all channels.

    Args:
        max_messages, max_bytes, max_age_s: bounds on the messages of all channels together.
        max_channels: channels without messages whose last evicted position is kept: the ones that
            lost their last message most recently.
        clock: monotonic time in seconds.

    Attributes:
        floor: the log may have lost messages of any channel up to this position.
        newest: the position that was read last.
        bytes: memory that the history takes.
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
        self._channels: dict[str, ChannelHistory] = {}  # those that have messages
        self._by_messages = UsageRanking(
            lambda: ((each.messages, each) for each in self._channels.values())
        )
        self._by_bytes = UsageRanking(
            lambda: ((each.bytes, each) for each in self._channels.values())
        )
        self._steps: list[AgeStep] = []
        self._peers = AgeGroup()  # of the step that has not ended
        # The last evicted position of channels without messages: of each of the latest ones, and
        # the maximum over all others.
        self._emptied: OrderedDict[str, Position] = OrderedDict()
        self._others_evicted_up_to = START
        self.floor = START
        self._message_count = 0
        self.newest = START
        self.bytes = 0

    def __len__(self) -> int:
        return self._message_count

    def add(self, entry: LogEntry) -> None:
        """Append an entry of the log; evict messages if a bound is exceeded."""
        self.newest, name, _, payload = entry
        channel_history = self._channels.get(name) or self._add_channel(name)
        size = len(payload) + ENTRY_BYTES
        channel_history.append(entry, size)
        self._message_count += 1
        self.bytes += size
        if channel_history.messages.size >= channel_history.messages.end:
            self._by_messages.reclassify(channel_history.messages)
        if channel_history.bytes.size >= channel_history.bytes.end:
            self._by_bytes.reclassify(channel_history.bytes)
        if self._message_count > self._max_messages or self.bytes > self._max_bytes:
            self._evict_surplus()

    def metrics(self) -> dict[str, int]:
        """Return the values of the metrics of the history."""
        return {"history_messages": self._message_count, "history_bytes": self.bytes}

    async def run(self) -> None:
        """Evict expired messages once every AGE_STEP_S, until cancelled."""
        while True:
            await asyncio.sleep(AGE_STEP_S)
            for _ in self.evict_expired():
                await asyncio.sleep(0)

    def evict_expired(self) -> Iterator[None]:
        """Evict messages whose age step ended `max_age_s` ago or earlier.

        Yields:
            After every EXPIRY_SLICE_MESSAGES messages: other tasks may run then, and add messages.
        """
        now = self._clock()
        self._steps.append(AgeStep(now, self.newest, self._peers))
        self._peers = AgeGroup()
        checked = 0
        while self._steps and self._steps[0].ended_at <= now - self._max_age_s:
            _, newest_expired, age_group = self._steps[0]
            while age_group:
                channel_history = next(iter(age_group))
                if channel_history.oldest <= newest_expired:
                    self._evict_oldest(channel_history)  # the last removes it from its group
                else:
                    del age_group[channel_history]
                    self._assign_age_group(channel_history)
                checked += 1
                if checked % EXPIRY_SLICE_MESSAGES == 0:
                    yield
            del self._steps[0]

    def record_gap(self, position: Position) -> None:
        """Record a gap: messages up to a position may be missing, and none after it is."""
        self.floor = max(self.floor, position)
        self.newest = max(self.newest, position)

    def complete_after(self, channel: str) -> Position:
        """Return a position after which no message of a channel is missing."""
        return max(self.floor, self.evicted_up_to(channel))

    def evicted_up_to(self, channel: str) -> Position:
        """Return a position after which no message that was read of a channel is evicted."""
        channel_history = self._channels.get(channel)
        if channel_history is not None:
            return channel_history.floor
        return self._emptied.get(channel, self._others_evicted_up_to)

    def is_complete_after(self, channel: str, position: Position) -> bool:
        """Return whether no message of a channel after a position is missing."""
        return position >= self.complete_after(channel)

    def entries_after(self, channel: str, position: Position, count: int) -> Sequence[LogEntry]:
        """Return the first `count` entries of a channel after a position."""
        channel_history = self._channels.get(channel)
        return channel_history.entries_after(position, count) if channel_history is not None else ()

    def latest_entries(self, channel: str, count: int) -> Sequence[LogEntry]:
        """Return the newest `count` entries of a channel, oldest first."""
        channel_history = self._channels.get(channel)
        return channel_history.latest_entries(count) if channel_history is not None else ()

    def _add_channel(self, name: str) -> ChannelHistory:
        """Add a channel that had no messages."""
        floor = self._emptied.pop(name, self._others_evicted_up_to)
        channel_history = self._channels[name] = ChannelHistory(name, floor, self._peers)
        self._by_messages.insert(channel_history.messages, channel_history)
        self._by_bytes.insert(channel_history.bytes, channel_history)
        self.bytes += CHANNEL_BYTES
        return channel_history

    def _assign_age_group(self, channel_history: ChannelHistory) -> None:
        """Add a channel to the age group of the step in which its oldest message arrived."""
        step = bisect_left(self._steps, channel_history.oldest, key=_newest_of)
        channel_history.age_group = (
            self._steps[step].peers if step < len(self._steps) else self._peers
        )
        channel_history.age_group[channel_history] = None

    def _evict_surplus(self) -> None:
        """Evict messages over the bounds, and some more, so that not every message evicts one."""
        if self._message_count > self._max_messages:
            target = self._max_messages - self._max_messages // EVICTION_DIVISOR
            while self._message_count > target:
                channel_history = self._by_messages.largest()
                for _ in range(min(self._message_count - target, channel_history.messages.surplus)):
                    self._evict_oldest(channel_history)
        if self.bytes > self._max_bytes:
            target = self._max_bytes - self._max_bytes // EVICTION_DIVISOR
            while self.bytes > target:
                channel_history = self._by_bytes.largest()
                while self.bytes > target and channel_history.bytes.surplus > 0:
                    self._evict_oldest(channel_history)

    def _evict_oldest(self, channel_history: ChannelHistory) -> None:
        """Evict the oldest message of a channel; remove the channel if it has no other."""
        self.bytes -= channel_history.evict_oldest()
        self._message_count -= 1
        if not channel_history.messages.size:
            self._remove_channel(channel_history)

    def _remove_channel(self, channel_history: ChannelHistory) -> None:
        """Remove a channel without messages; keep its last evicted position."""
        del self._channels[channel_history.channel], channel_history.age_group[channel_history]
        self._by_messages.remove(channel_history.messages)
        self._by_bytes.remove(channel_history.bytes)
        self.bytes -= CHANNEL_BYTES
        self._emptied[channel_history.channel] = channel_history.floor
        if len(self._emptied) > self._max_channels:
            _, floor = self._emptied.popitem(last=False)
            self._others_evicted_up_to = max(self._others_evicted_up_to, floor)
