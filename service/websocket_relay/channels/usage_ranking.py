"""Rank the usages of one bound, and find an owner that uses most of it.

Usages of similar size are in one class, so a size that grows seldom changes its class, and every
operation takes amortized constant time, however many channels there are. Until the bound is reached
for the first time, the ranking is empty and costs nothing.

Knows no message and no channel.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable
from sys import maxsize
from typing import Generic, TypeVar

PRECISION = 8
"""The width of a class is an eighth of its sizes. Each size below 2 * PRECISION has its own."""

STARTS = (
    *range(PRECISION),
    *(first << shift for shift in range(50) for first in range(PRECISION, 2 * PRECISION)),
)
"""The smallest size of each class."""

T = TypeVar("T")


class Usage:
    """The amount that one owner uses of one bound.

    Attributes:
        size: messages or bytes. The owner changes it, and calls `UsageRanking.reclassify` once it
            reaches `end`.
        rank: index of the class that the ranking has it in: sizes from `start`, below `end`.
    """

    __slots__ = ("end", "rank", "size", "start")

    def __init__(self, size: int) -> None:
        self.size = size
        self.rank = self.start = 0
        self.end = maxsize

    @property
    def surplus(self) -> int:
        """The amount by which the size has to shrink to leave the class."""
        return self.size - self.start + 1


class UsageRanking(Generic[T]):
    """All usages of one bound.

    A usage that shrank stays in its class until `largest` finds it there. So its class may be too
    high, and is never too low.

    Args:
        list_usages: returns all usages that are not removed, with their owners.
    """

    def __init__(self, list_usages: Callable[[], Iterable[tuple[Usage, T]]]) -> None:
        self._list_usages = list_usages
        self._classes: list[OrderedDict[Usage, T]] = []  # empty before the first `largest`
        self._top = 0  # no usage is in a class above this one

    def insert(self, usage: Usage, owner: T) -> None:
        """Add a usage, after the others of its class."""
        if self._classes:
            self._insert(usage, owner)

    def remove(self, usage: Usage) -> None:
        """Remove a usage."""
        if self._classes:
            del self._classes[usage.rank][usage]

    def reclassify(self, usage: Usage) -> None:
        """Move a usage to the class of its size."""
        self._insert(usage, self._classes[usage.rank].pop(usage))

    def largest(self) -> T:
        """Return the owner of a usage that no other exceeds by more than an eighth.

        Within a class it is the usage that entered the class first. The ranking must have a usage.
        """
        if not self._classes:
            self._classes = [OrderedDict() for _ in STARTS]
            for usage, owner in self._list_usages():
                self._insert(usage, owner)
        while True:
            top_class = self._classes[self._top]
            if not top_class:
                self._top -= 1
                continue
            usage = next(iter(top_class))
            if usage.surplus > 0:
                return top_class[usage]
            self.reclassify(usage)

    def _insert(self, usage: Usage, owner: T) -> None:
        rank = usage.rank = bisect_right(STARTS, usage.size) - 1
        usage.start = STARTS[rank]
        usage.end = STARTS[rank + 1]
        self._classes[rank][usage] = owner
        if rank > self._top:
            self._top = rank
