"""Track callbacks that wait until messages of this replica are read back. Knows no broker.

A message is identified by its producer and its sequence number. A wait ends when the message is
read, when it is abandoned, when a message of a later producer epoch is read (then the message is
lost, or is discarded as a duplicate if it still arrives), or when it times out.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from websocket_relay.backplane.codec import PRODUCER_EPOCHS
from websocket_relay.backplane.interface import Position

OnPosition = Callable[[Position | None], object]
"""Receives the position of the message; None if it has no position, or an unknown one."""


class Confirmation(NamedTuple):
    """A wait for one message, and thereby for all messages before it.

    Attributes:
        producer: producer of the message, with its producer epoch.
        next_sequence: sequence number after that of the message.
        callback: called once, when the wait ends.
        awaits_all: whether the messages before it are awaited also if it is abandoned.
    """

    producer: int
    next_sequence: int
    callback: OnPosition
    awaits_all: bool


class Confirmations:
    """The pending waits, in the order of their messages.

    Args:
        waits: the first of them.
    """

    def __init__(self, waits: Iterable[Confirmation] = ()) -> None:
        self._waits = deque(waits)

    def __len__(self) -> int:
        return len(self._waits)

    def add(
        self, producer: int, following: int, callback: OnPosition, *, awaits_all: bool = False
    ) -> None:
        """Call `callback` once the message before `following` is read, or can't be any more."""
        self._waits.append(Confirmation(producer, following, callback, awaits_all))

    def add_to_latest(self, callback: OnPosition) -> None:
        """Call `callback` once all pending waits have ended."""
        latest = self._waits[-1]
        self.add(latest.producer, latest.next_sequence, callback, awaits_all=True)

    def on_delivered(self, producer: int, sequence: int, count: int, last: Position) -> None:
        """End the waits for messages that were delivered, or can't be any more.

        Args:
            producer, sequence: of the first message that was delivered now.
            count: number of messages that were delivered, next to each other.
            last: position of the last of them.
        """
        waits = self._waits
        if not waits or waits[0].producer // PRODUCER_EPOCHS != producer // PRODUCER_EPOCHS:
            return  # messages of another replica
        epoch, offset, index = last
        following_last = sequence + count
        while waits:
            awaited_producer, following, callback, _ = waits[0]
            if awaited_producer > producer or (
                awaited_producer == producer and following > following_last
            ):
                return
            waits.popleft()
            is_delivered = awaited_producer == producer and following > sequence
            position = Position(epoch, offset, index - (following_last - following))
            callback(position if is_delivered else None)

    def pop_abandoned(self, producer: int, sequence: int) -> Sequence[Confirmation]:
        """Remove and return the waits for messages from `sequence` on, without calling them."""
        abandoned: deque[Confirmation] = deque()
        waits = self._waits
        while waits and waits[-1].producer == producer and waits[-1].next_sequence > sequence:
            abandoned.appendleft(waits.pop())
        return abandoned

    def expire(self, producer: int) -> None:
        """End the waits for messages of other producer epochs than that of `producer`."""
        waits = self._waits
        while waits and waits[0].producer != producer:
            waits.popleft().callback(None)
