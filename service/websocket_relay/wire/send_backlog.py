"""Keep what clients have waiting: who is behind, by how much, and who goes when it is too much.

A client is *behind* from the moment its transport could not write all at once until nothing waits
any more. While it is, the transport is given one piece at a time, and all else waits here. So what
a transport still holds of a write that has left in part is known: it is the first write in the
queue, which is counted whole until its last byte has gone.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Protocol

WRITE_BYTES = 128
"""Memory that each write in a queue takes besides its bytes: an object, a pair and a place."""


class SendBacklog:
    """The writes that one client is behind with, oldest first.

    Args:
        count_whole: tells how many messages end within so many bytes of a write.

    Attributes:
        held_bytes: memory that is held: whole writes, parts that have left included.
        messages: in these writes.
        is_stuck: whether the transport could not pass on at once what it was given last.
        first_handed_bytes: how much of the first write the transport was given, if not all.
    """

    __slots__ = (
        "_count_whole",
        "_drained_bytes",
        "_gone_bytes",
        "_handed_bytes",
        "_noted_bytes",
        "_writes",
        "first_handed_bytes",
        "held_bytes",
        "is_stuck",
        "messages",
    )

    def __init__(self, count_whole: Callable[[bytes, int], int]) -> None:
        self._count_whole = count_whole
        self._writes: deque[tuple[bytes, int]] = deque()
        self._noted_bytes = 0  # of all these writes
        self._gone_bytes = 0  # of the first write: they left in earlier pieces
        self._handed_bytes = 0  # behind these: the piece that the transport has
        self._drained_bytes = 0  # of all earlier pieces
        self.held_bytes = 0
        self.messages = 0
        self.is_stuck = True
        self.first_handed_bytes: int | None = None

    def begin(self, data: bytes, messages: int) -> int:
        """Note the write that made the client fall behind; return the memory that it holds."""
        handed = self.first_handed_bytes
        self._handed_bytes = len(data) if handed is None else handed
        return self.note(data, messages)

    def note(self, data: bytes, messages: int) -> int:
        """Add a write; return the memory that it holds.

        Args:
            data: its bytes.
            messages: how many messages they hold.
        """
        self._writes.append((data, messages))
        size = len(data)
        self._noted_bytes += size
        self.messages += messages
        held = size + WRITE_BYTES
        self.held_bytes += held
        return held

    def unsent(self, waiting: int) -> int:
        """Return how many bytes have not left for the socket.

        Args:
            waiting: bytes in the transport's buffer. TLS makes more of them.
        """
        return self._noted_bytes - self._gone_bytes - self._handed_bytes + waiting

    def drained(self, waiting: int) -> int:
        """Return how many bytes were seen to leave the transport's buffer so far."""
        return self._drained_bytes + max(0, self._handed_bytes - waiting)

    def advance(self) -> int:
        """Forget the piece that the transport had; return how many messages that completed."""
        self._drained_bytes += self._handed_bytes
        self._gone_bytes += self._handed_bytes
        self._handed_bytes = 0
        writes, done = self._writes, 0
        while writes and len(writes[0][0]) <= self._gone_bytes:
            data, messages = writes.popleft()
            self._gone_bytes -= len(data)
            self._noted_bytes -= len(data)
            self.held_bytes -= len(data) + WRITE_BYTES
            done += messages
        self.messages -= done
        return done

    def piece(self, max_bytes: int) -> bytes | memoryview:
        """Return what the transport is given next, once it has nothing more; empty at the end."""
        if not self._writes:
            return b""
        first = memoryview(self._writes[0][0])[self._gone_bytes :][:max_bytes]
        parts, size = [first], len(first)
        if len(first) < max_bytes:  # small writes leave together: each would cost a system call
            for data, _ in islice(self._writes, 1, None):
                if size + len(data) > max_bytes:
                    break
                parts.append(memoryview(data))
                size += len(data)
        self._handed_bytes = size
        return first if len(parts) == 1 else b"".join(parts)

    def rest(self) -> bytes:
        """Return all that the transport was not given yet, for a transport that keeps a copy."""
        start = self._gone_bytes + self._handed_bytes
        rest = b"".join(data for data, _ in self._writes)[start:]
        self._handed_bytes += len(rest)
        self.held_bytes += len(rest)
        return rest

    def split(self, unsent: int) -> tuple[int, int]:
        """Return how many of the noted messages were sent whole, and how many were not.

        Args:
            unsent: bytes that never left for the socket.
        """
        sent = max(0, self._noted_bytes - unsent)
        done = 0
        for data, messages in self._writes:
            if len(data) > sent:
                # What of the write under way has left can be read off its frames.
                done += self._count_whole(data, sent) if messages else 0
                break
            sent -= len(data)
            done += messages
        return done, self.messages - done


class SlowConsumer(Protocol):
    """What is asked of a client that is behind."""

    @property
    def held_bytes(self) -> int: ...
    def drop_backlog(self) -> None: ...


class SendBacklogs:
    """All clients that are behind, and the bound on the memory that is held for them together.

    Bytes that several clients are sent are counted for each of them, though they are there once.

    Args:
        limit_bytes: what one client may have waiting.
        total_limit_bytes: what may be held for all of them together.
    """

    def __init__(self, limit_bytes: int, total_limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._total_limit_bytes = total_limit_bytes
        self._laggards: dict[SlowConsumer, None] = {}
        # Never below the truth, so that the exact sum is taken only when it could matter, and
        # again only when a hundredth of the bound came on top: it walks over all of them.
        self._estimate_bytes = 0
        self._sum_again_at = total_limit_bytes

    def __len__(self) -> int:
        return len(self._laggards)

    def __iter__(self) -> Iterator[SlowConsumer]:
        return iter(self._laggards)

    @property
    def total_bytes(self) -> int:
        """What is held for all clients now."""
        return sum(laggard.held_bytes for laggard in self._laggards)

    def add(self, laggard: SlowConsumer) -> None:
        """Watch a client that fell behind."""
        self._laggards[laggard] = None
        self.grew(laggard.held_bytes)

    def discard(self, laggard: SlowConsumer) -> None:
        """Watch it no longer: it caught up or is gone."""
        self._laggards.pop(laggard, None)

    def grew(self, size: int) -> None:
        """Take note that so many bytes more are held for a client that is behind."""
        self._estimate_bytes += size
        if self._estimate_bytes > self._sum_again_at:
            self._shed()

    def _shed(self) -> None:
        total = self.total_bytes
        if total > self._total_limit_bytes:
            for laggard in sorted(self._laggards, key=lambda one: one.held_bytes, reverse=True):
                total -= laggard.held_bytes
                laggard.drop_backlog()
                if total <= self._total_limit_bytes:
                    break
        self._estimate_bytes = total
        step = self._total_limit_bytes // 100
        self._sum_again_at = max(self._total_limit_bytes, total + step)
