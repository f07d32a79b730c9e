"""Own the writes that wait for lagging connections, and the bounds on them. Knows no protocol.

A connection *lags* from the write that its transport could not complete at once until its backlog
is empty. While it lags, its transport is given one chunk at a time; all later bytes wait here. So
the write that the transport has sent in part is known: it is the first one in the queue, and counts
whole until its last byte is sent.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Protocol

WRITE_BYTES = 128
"""Memory that each queued write takes besides its bytes: an object, a tuple and a queue slot."""


class SendBacklog:
    """The queued writes of one lagging connection, oldest first.

    Args:
        count_complete_messages: returns how many messages end within the first n bytes of a write.
        copy_bytes: memory of what the transport has copied of the chunk that it has.

    Attributes:
        memory_bytes: memory in use: whole writes, including parts that were sent already.
        messages: number of messages in these writes.
        is_blocked: whether the transport could not send its last chunk at once.
        first_chunk_bytes: how much of the first write the transport was given; None: all of it.
    """

    __slots__ = (
        "_chunk_bytes",
        "_count_whole",
        "_drained_bytes",
        "_queued_bytes",
        "_sent_bytes",
        "_writes",
        "first_chunk_bytes",
        "is_blocked",
        "memory_bytes",
        "messages",
    )

    def __init__(
        self, count_complete_messages: Callable[[bytes, int], int], copy_bytes: int = 0
    ) -> None:
        self._count_whole = count_complete_messages
        self._writes: deque[tuple[bytes, int]] = deque()
        self._queued_bytes = 0  # size of all these writes
        self._sent_bytes = 0  # of the first write: sent in earlier chunks
        self._chunk_bytes = 0  # after these: the chunk that the transport has
        self._drained_bytes = 0  # sum of all earlier chunks
        self.memory_bytes = copy_bytes
        self.messages = 0
        self.is_blocked = True
        self.first_chunk_bytes: int | None = None

    def add_blocked_write(self, data: bytes, messages: int) -> int:
        """Add the write that the transport could not complete; return the memory that it takes."""
        chunk_bytes = self.first_chunk_bytes
        self._chunk_bytes = len(data) if chunk_bytes is None else chunk_bytes
        return self.add_write(data, messages)

    def add_write(self, data: bytes, messages: int) -> int:
        """Queue a write; return the memory that it takes.

        Args:
            data: the bytes of the write.
            messages: number of messages in it.
        """
        self._writes.append((data, messages))
        size = len(data)
        self._queued_bytes += size
        self.messages += messages
        memory_bytes = size + WRITE_BYTES
        self.memory_bytes += memory_bytes
        return memory_bytes

    def unsent_bytes(self, buffered_bytes: int) -> int:
        """Return how many bytes were not sent to the socket.

        Args:
            buffered_bytes: size of the transport's buffer. TLS adds its overhead to it.
        """
        return self._queued_bytes - self._sent_bytes - self._chunk_bytes + buffered_bytes

    def drained(self, buffered_bytes: int) -> int:
        """Return how many bytes of this backlog have left the transport's buffer so far."""
        return self._drained_bytes + max(0, self._chunk_bytes - buffered_bytes)

    def advance(self) -> int:
        """Remove the chunk that the transport has sent; return how many messages that completed."""
        self._drained_bytes += self._chunk_bytes
        self._sent_bytes += self._chunk_bytes
        self._chunk_bytes = 0
        writes, completed = self._writes, 0
        while writes and len(writes[0][0]) <= self._sent_bytes:
            data, messages = writes.popleft()
            self._sent_bytes -= len(data)
            self._queued_bytes -= len(data)
            self.memory_bytes -= len(data) + WRITE_BYTES
            completed += messages
        self.messages -= completed
        return completed

    def next_chunk(self, max_bytes: int) -> bytes | memoryview:
        """Return the next chunk for a transport whose buffer is empty; empty if the backlog is."""
        if not self._writes:
            return b""
        first = memoryview(self._writes[0][0])[self._sent_bytes :][:max_bytes]
        parts, size = [first], len(first)
        if len(first) < max_bytes:  # one system call for several small writes
            for data, _ in islice(self._writes, 1, None):
                if size + len(data) > max_bytes:
                    break
                parts.append(memoryview(data))
                size += len(data)
        self._chunk_bytes = size
        return first if len(parts) == 1 else b"".join(parts)

    def count_sent_messages(self, unsent: int) -> tuple[int, int]:
        """Return how many of the queued messages were sent whole, and how many were not.

        Args:
            unsent_bytes: bytes that were never sent to the socket.
        """
        sent = max(0, self._queued_bytes - unsent)
        completed = 0
        for data, messages in self._writes:
            if len(data) > sent:
                # The frames of the write in progress show how many of its messages were sent.
                completed += self._count_whole(data, sent) if messages else 0
                break
            sent -= len(data)
            completed += messages
        return completed, self.messages - completed


class SlowConsumer(Protocol):
    """A lagging connection, as `SendBacklogs` sees it."""

    @property
    def memory_bytes(self) -> int: ...
    def abort_slow_consumer(self) -> None: ...


class SendBacklogs:
    """All lagging connections, and the bound on the memory of their backlogs together.

    Bytes that several connections share count for each of them, though they are in memory once.

    Args:
        limit_bytes: maximum backlog of one connection.
        total_limit_bytes: maximum memory of all backlogs together.
    """

    def __init__(self, limit_bytes: int, total_limit_bytes: int) -> None:
        self._slow_consumers: dict[SlowConsumer, None] = {}
        # Never below the exact sum. That sum iterates over all lagging connections, so it is
        # computed only when it could pass the bound, then again after growth of 1 % of the bound.
        self._estimate_bytes = 0
        self.set_limits(limit_bytes, total_limit_bytes)

    def set_limits(self, limit_bytes: int, total_limit_bytes: int) -> None:
        """Set both bounds; a backlog that grows beyond one from now on closes its connection."""
        self.limit_bytes = limit_bytes
        self.total_limit_bytes = total_limit_bytes
        self._recompute_above_bytes = total_limit_bytes

    def __len__(self) -> int:
        return len(self._slow_consumers)

    def __iter__(self) -> Iterator[SlowConsumer]:
        return iter(self._slow_consumers)

    @property
    def total_bytes(self) -> int:
        """Memory that all backlogs take now."""
        return sum(consumer.memory_bytes for consumer in self._slow_consumers)

    def add_slow_consumer(self, consumer: SlowConsumer) -> None:
        """Start to count the backlog of a connection that began to lag."""
        self._slow_consumers[consumer] = None
        self.record_growth(consumer.memory_bytes)

    def remove_slow_consumer(self, consumer: SlowConsumer) -> None:
        """Stop counting a backlog that is empty, or whose connection was lost."""
        self._slow_consumers.pop(consumer, None)

    def record_growth(self, size: int) -> None:
        """Record that the backlog of a lagging connection grew by `size` bytes of memory."""
        self._estimate_bytes += size
        if self._estimate_bytes > self._recompute_above_bytes:
            self._enforce_total_limit()

    def _enforce_total_limit(self) -> None:
        total = self.total_bytes
        if total > self.total_limit_bytes:
            for consumer in sorted(
                self._slow_consumers, key=lambda each: each.memory_bytes, reverse=True
            ):
                total -= consumer.memory_bytes
                consumer.abort_slow_consumer()
                if total <= self.total_limit_bytes:
                    break
        self._estimate_bytes = total
        step_bytes = self.total_limit_bytes // 100
        self._recompute_above_bytes = max(self.total_limit_bytes, total + step_bytes)
