"""Keep the latest messages for clients that come back, or want to see some first.

Filled with what the log says, like the channels: so what is replayed and what comes live are one
sequence, and every replica can serve a client that was on another.

Where a bound is passed, the channel that holds most of it loses its oldest messages. A channel that
holds less than seven eighths of its share loses nothing to others. Its share is the bound, less
what the channels themselves take, divided by their number.
"""

import asyncio
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

from websocket_relay.backplane.interface import START, LogEntry, Position
from websocket_relay.channels.usage_ranking import Usage, UsageRanking

ENTRY_BYTES = 320
"""What a message takes besides its payload: the objects that it is made of, and its place in a
list."""

CHANNEL_BYTES = 600
"""What a channel takes of which messages are kept: its list, its two shares, and its places in the
tables."""

AGE_STEP_S = 1.0
"""How exact ages are."""

OLD_AT_ONCE = 256
"""So many messages that are too old are forgotten before others have a turn."""

ROOM_PART = 64
"""Where there are too many, this part of the bound is forgotten at once."""

COMPACT_FROM = 64

EVICTED = LogEntry(START, "", 0, b"")

_position_of = attrgetter("position")
_newest_of = attrgetter("newest")


class ChannelHistory:
    """What is kept of one channel, oldest first.

    Attributes:
        channel: its name.
        floor: no message of the channel behind this position is missing here.
        messages, bytes: what its messages use of each bound.
        peers: the channels that become too old when this one does.
    """

    __slots__ = ("_entries", "_gone", "bytes", "channel", "floor", "messages", "peers")

    def __init__(self, channel: str, floor: Position, peers: "SameAge") -> None:
        self.channel = channel
        self.floor = floor
        self.peers = peers
        peers[self] = None
        self.messages = Usage(0)
        self.bytes = Usage(0)
        self._entries: list[LogEntry] = []
        self._gone = 0  # entries at the front that are forgotten and not taken out yet

    @property
    def oldest(self) -> Position:
        """The position of the oldest entry. There must be one."""
        return self._entries[self._gone].position

    def add(self, entry: LogEntry, size: int) -> None:
        """Add the newest entry."""
        self._entries.append(entry)
        self.messages.size += 1
        self.bytes.size += size

    def forget_oldest(self) -> int:
        """Let go of the oldest entry.

        Returns:
            What it took.
        """
        gone, entries = self._gone, self._entries
        self.floor, _, _, payload = entries[gone]
        entries[gone] = EVICTED
        gone += 1
        if gone >= COMPACT_FROM and gone * 2 >= len(entries):
            del entries[:gone]
            gone = 0
        self._gone = gone
        size = len(payload) + ENTRY_BYTES
        self.messages.size -= 1
        self.bytes.size -= size
        return size

    def after(self, position: Position, count: int) -> Sequence[LogEntry]:
        """Return the first entries behind a position."""
        start = bisect_right(self._entries, position, lo=self._gone, key=_position_of)
        return self._entries[start : start + count]

    def last(self, count: int) -> Sequence[LogEntry]:
        """Return the newest entries."""
        return self._entries[max(self._gone, len(self._entries) - count) :]


SameAge = OrderedDict[ChannelHistory, None]


class AgeStep(NamedTuple):
    """A step of time.

    Attributes:
        ended_at: when, by the history's clock.
        newest: the newest position by then.
        peers: channels whose oldest message came in this step, or in an earlier one and is
            forgotten.
    """

    ended_at: float
    newest: Position
    peers: SameAge


class History:
    """The latest messages of all channels.

    Args:
        max_messages, max_bytes, max_age_s: what is kept of all of them together.
        max_channels: of so many channels that lost all their messages, the latest, is known from
            where on they are complete.
        clock: seconds, growing.

    Attributes:
        floor: the log may have lost messages of any channel up to this position.
        newest: the position that was read last.
        bytes: what is kept takes so much memory.
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
        self._channels: dict[str, ChannelHistory] = {}  # those of which something is kept
        self._by_messages = UsageRanking(
            lambda: ((past.messages, past) for past in self._channels.values())
        )
        self._by_bytes = UsageRanking(
            lambda: ((past.bytes, past) for past in self._channels.values())
        )
        self._steps: list[AgeStep] = []
        self._peers = SameAge()  # of the step that has not ended
        # Where channels are complete of which nothing is kept: each of the latest, and all others.
        self._emptied: OrderedDict[str, Position] = OrderedDict()
        self._emptied_before = START
        self.floor = START
        self._messages = 0
        self.newest = START
        self.bytes = 0

    def __len__(self) -> int:
        return self._messages

    def add(self, entry: LogEntry) -> None:
        """Keep what the log says; forget what is too much."""
        self.newest, channel, _, payload = entry
        past = self._channels.get(channel) or self._begin(channel)
        size = len(payload) + ENTRY_BYTES
        past.add(entry, size)
        self._messages += 1
        self.bytes += size
        if past.messages.size >= past.messages.end:
            self._by_messages.reclassify(past.messages)
        if past.bytes.size >= past.bytes.end:
            self._by_bytes.reclassify(past.bytes)
        if self._messages > self._max_messages or self.bytes > self._max_bytes:
            self._make_room()

    async def grow_old(self) -> None:
        """Forget what is too old, for ever."""
        while True:
            await asyncio.sleep(AGE_STEP_S)
            for _ in self.forget_old():
                await asyncio.sleep(0)

    def forget_old(self) -> Iterator[None]:
        """Forget what was too old when this was called before, or since.

        Yields:
            After every so many messages: others may do something then, and add messages.
        """
        now = self._clock()
        self._steps.append(AgeStep(now, self.newest, self._peers))
        self._peers = SameAge()
        done = 0
        while self._steps and self._steps[0].ended_at <= now - self._max_age_s:
            _, too_old, peers = self._steps[0]
            while peers:
                past = next(iter(peers))
                if past.oldest <= too_old:
                    self._forget_oldest(past)  # its last takes the channel out of its peers
                else:
                    del peers[past]
                    self._regroup(past)
                done += 1
                if done % OLD_AT_ONCE == 0:
                    yield
            del self._steps[0]

    def begin_after(self, position: Position) -> None:
        """Take note that something up to this position may be missing, and nothing behind it."""
        self.floor = max(self.floor, position)
        self.newest = max(self.newest, position)

    def known_after(self, channel: str) -> Position:
        """Return a position behind which nothing is missing of a channel."""
        return max(self.floor, self.kept_after(channel))

    def kept_after(self, channel: str) -> Position:
        """Return a position after which no message of a channel that was read is forgotten."""
        past = self._channels.get(channel)
        if past is not None:
            return past.floor
        return self._emptied.get(channel, self._emptied_before)

    def has_all_after(self, channel: str, position: Position) -> bool:
        """Tell whether nothing is missing of a channel behind a position."""
        return position >= self.known_after(channel)

    def after(self, channel: str, position: Position, count: int) -> Sequence[LogEntry]:
        """Return the first entries of a channel behind a position."""
        past = self._channels.get(channel)
        return past.after(position, count) if past is not None else ()

    def last(self, channel: str, count: int) -> Sequence[LogEntry]:
        """Return the newest entries of a channel."""
        past = self._channels.get(channel)
        return past.last(count) if past is not None else ()

    def _begin(self, channel: str) -> ChannelHistory:
        """Begin to keep messages of a channel."""
        floor = self._emptied.pop(channel, self._emptied_before)
        past = self._channels[channel] = ChannelHistory(channel, floor, self._peers)
        self._by_messages.insert(past.messages, past)
        self._by_bytes.insert(past.bytes, past)
        self.bytes += CHANNEL_BYTES
        return past

    def _regroup(self, past: ChannelHistory) -> None:
        """Put a channel among those whose oldest message came in the same step."""
        step = bisect_left(self._steps, past.oldest, key=_newest_of)
        past.peers = self._steps[step].peers if step < len(self._steps) else self._peers
        past.peers[past] = None

    def _make_room(self) -> None:
        """Forget what is too much, and some more, so that it need not be done each time."""
        if self._messages > self._max_messages:
            target = self._max_messages - self._max_messages // ROOM_PART
            while self._messages > target:
                past = self._by_messages.largest()
                for _ in range(min(self._messages - target, past.messages.surplus)):
                    self._forget_oldest(past)
        if self.bytes > self._max_bytes:
            target = self._max_bytes - self._max_bytes // ROOM_PART
            while self.bytes > target:
                past = self._by_bytes.largest()
                while self.bytes > target and past.bytes.surplus > 0:
                    self._forget_oldest(past)

    def _forget_oldest(self, past: ChannelHistory) -> None:
        """Forget the oldest message of a channel; of one that has no other, the channel, too."""
        self.bytes -= past.forget_oldest()
        self._messages -= 1
        if not past.messages.size:
            self._end(past)

    def _end(self, past: ChannelHistory) -> None:
        """Keep of a channel only from where on it is complete."""
        del self._channels[past.channel], past.peers[past]
        self._by_messages.remove(past.messages)
        self._by_bytes.remove(past.bytes)
        self.bytes -= CHANNEL_BYTES
        self._emptied[past.channel] = past.floor
        if len(self._emptied) > self._max_channels:
            _, floor = self._emptied.popitem(last=False)
            self._emptied_before = max(self._emptied_before, floor)
