"""Watch what clients have waiting: who is behind, by how much, and who goes when it is too much.

The transport's own write buffer is a client's backlog; there is no second queue. A client is
*behind* from the moment its transport could not write all at once until that buffer is empty.
While it is, its writes are noted here so that the books can say which messages reached its socket.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol


class Backlog:
    """The writes that one client is behind with, oldest first.

    Args:
        count_whole: tells how many messages end within so many bytes of a write.
    """

    __slots__ = (
        "_count_whole",
        "_drained_bytes",
        "_waiting_bytes",
        "_writes",
        "messages",
        "noted_bytes",
    )

    def __init__(self, count_whole: Callable[[bytes, int], int]) -> None:
        self._count_whole = count_whole
        self._writes: deque[tuple[bytes, int]] = deque()
        self._waiting_bytes = 0  # when last looked at
        self._drained_bytes = 0
        self.noted_bytes = 0  # of the writes still noted, sent parts included
        self.messages = 0  # in the writes still noted

    def note(self, data: bytes, messages: int, waiting: int) -> None:
        """Add a write that the transport took.

        Args:
            data: its bytes.
            messages: how many messages they hold.
            waiting: bytes in the transport's buffer with this write.
        """
        self._writes.append((data, messages))
        self._waiting_bytes = waiting
        self.noted_bytes += len(data)
        self.messages += messages

    def drained(self, waiting: int) -> int:
        """Return how many bytes were seen to leave the transport's buffer so far.

        TLS makes more bytes of what is written: only what the buffer held from one look to the
        next is compared, never what was noted with what waits.

        Args:
            waiting: bytes in the transport's buffer now.
        """
        self._drained_bytes += max(0, self._waiting_bytes - waiting)
        self._waiting_bytes = waiting
        return self._drained_bytes

    def trim(self, waiting: int) -> int:
        """Forget what left the buffer; return how many messages that completed.

        Args:
            waiting: bytes still in the transport's buffer.
        """
        self.drained(waiting)
        sent = self.noted_bytes - waiting
        done = 0
        while self._writes and len(self._writes[0][0]) <= sent:
            data, messages = self._writes.popleft()
            sent -= len(data)
            self.noted_bytes -= len(data)
            done += messages
        self.messages -= done
        return done

    def split(self, waiting: int) -> tuple[int, int]:
        """Return how many of the noted messages were sent whole, and how many were not.

        Args:
            waiting: bytes that never left the transport's buffer.
        """
        done = self.trim(waiting)
        if self._writes and self._writes[0][1]:
            data = self._writes[0][0]
            # The write that was under way: what of it left the buffer can be read off its frames.
            part = self._count_whole(data, self.noted_bytes - waiting)
            return done + part, self.messages - part
        return done, self.messages


class Laggard(Protocol):
    """What is asked of a client that is behind."""

    @property
    def backlog_bytes(self) -> int: ...
    def drop_backlog(self) -> None: ...


class Backlogs:
    """All clients that are behind, and the bound on what they have waiting together.

    Args:
        limit_bytes: what one client may have waiting.
        total_limit_bytes: what all of them together may have waiting.
    """

    def __init__(self, limit_bytes: int, total_limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._total_limit_bytes = total_limit_bytes
        self._laggards: dict[Laggard, None] = {}
        # Never below the truth, so that the exact sum is taken only when it could matter, and
        # again only when a hundredth of the bound came on top: it walks over all of them.
        self._estimate_bytes = 0
        self._sum_again_at = total_limit_bytes

    def __len__(self) -> int:
        return len(self._laggards)

    def __iter__(self) -> Iterator[Laggard]:
        return iter(self._laggards)

    @property
    def total_bytes(self) -> int:
        """What all clients have waiting now."""
        return sum(laggard.backlog_bytes for laggard in self._laggards)

    def add(self, laggard: Laggard) -> None:
        """Watch a client that fell behind."""
        self._laggards[laggard] = None
        self.grew(laggard.backlog_bytes)

    def discard(self, laggard: Laggard) -> None:
        """Watch it no longer: it caught up or is gone."""
        self._laggards.pop(laggard, None)

    def grew(self, size: int) -> None:
        """Take note that a client that is behind got so many bytes more."""
        self._estimate_bytes += size
        if self._estimate_bytes > self._sum_again_at:
            self._shed()

    def _shed(self) -> None:
        total = self.total_bytes
        if total > self._total_limit_bytes:
            for laggard in sorted(self._laggards, key=lambda one: one.backlog_bytes, reverse=True):
                total -= laggard.backlog_bytes
                laggard.drop_backlog()
                if total <= self._total_limit_bytes:
                    break
        self._estimate_bytes = total
        step = self._total_limit_bytes // 100
        self._sum_again_at = max(self._total_limit_bytes, total + step)
