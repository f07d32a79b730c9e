"""Rank channels by how much of one bound they use, and find one that uses most of it.

Knows no message. Channels of similar size share a class, so a size that grows seldom changes its
class, and every operation takes constant time on average, however many channels there are. Until
the bound is reached for the first time, the ranking is empty and costs nothing.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable
from sys import maxsize
from typing import Generic, TypeVar

PRECISION = 8
"""A class is an eighth of its sizes wide. Sizes up to twice as many have a class each."""

STARTS = (
    *range(PRECISION),
    *(first << shift for shift in range(50) for first in range(PRECISION, 2 * PRECISION)),
)
"""The smallest size of each class."""

T = TypeVar("T")


class Usage:
    """What one channel uses of one bound.

    Attributes:
        size: messages or bytes. Its owner changes it, and calls `UsageRanking.reclassify` at `end`.
        rank: the class in which the ranking holds it: sizes from `start`, below `end`.
    """

    __slots__ = ("end", "rank", "size", "start")

    def __init__(self, size: int) -> None:
        self.size = size
        self.rank = self.start = 0
        self.end = maxsize

    @property
    def surplus(self) -> int:
        """How much it has to shrink to leave its class."""
        return self.size - self.start + 1


class UsageRanking(Generic[T]):
    """All shares of one bound.

    A share that shrank stays in its class until `largest` finds it there: no class is too low.

    Args:
        everybody: gives all shares that were not removed, and their owners.
    """

    def __init__(self, everybody: Callable[[], Iterable[tuple[Usage, T]]]) -> None:
        self._everybody = everybody
        self._classes: list[OrderedDict[Usage, T]] = []  # empty before the first `largest`
        self._top = 0  # no share is in a class above it

    def insert(self, share: Usage, owner: T) -> None:
        """Add a share, behind the others of its class."""
        if self._classes:
            self._insert(share, owner)

    def remove(self, share: Usage) -> None:
        """Remove a share."""
        if self._classes:
            del self._classes[share.rank][share]

    def reclassify(self, share: Usage) -> None:
        """Move a share to the class of its size."""
        self._insert(share, self._classes[share.rank].pop(share))

    def largest(self) -> T:
        """Return the owner of a share that no other exceeds by more than an eighth.

        Of those in one class it is the one that entered the class first. There must be one.
        """
        if not self._classes:
            self._classes = [OrderedDict() for _ in STARTS]
            for share, owner in self._everybody():
                self._insert(share, owner)
        while True:
            ranked = self._classes[self._top]
            if not ranked:
                self._top -= 1
                continue
            share = next(iter(ranked))
            if share.surplus > 0:
                return ranked[share]
            self.reclassify(share)

    def _insert(self, share: Usage, owner: T) -> None:
        rank = share.rank = bisect_right(STARTS, share.size) - 1
        share.start = STARTS[rank]
        share.end = STARTS[rank + 1]
        self._classes[rank][share] = owner
        if rank > self._top:
            self._top = rank
