"""Track callbacks that wait until messages of this replica are read back. Knows no broker.

A message is identified by its producer and its sequence number. A wait ends when the message is
read, when it is abandoned, when a message of a later producer epoch is read (then the message is
lost, or is discarded as a duplicate if it still arrives), or when it times out.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from websocket_relay.backplane.interface import Position

OnPosition = Callable[[Position | None], object]
"""Receives the position of the message; None if it has no position, or an unknown one."""


class Confirmation(NamedTuple):
    """A wait for one message, and thereby for all messages before it.

    Attributes:
        producer: producer of the message, with its producer epoch.
        next_sequence: sequence number after that of the message.
        callback: called once, when the wait ends.
    """

    producer: int
    next_sequence: int
    callback: OnPosition


class Confirmations:
    """The pending waits, in the order of their messages."""

    def __init__(self) -> None:
        self._waiters: deque[Confirmation] = deque()

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, producer: int, following: int, callback: OnPosition) -> None:
        """Call `callback` once the message before `following` is read, or can't be any more."""
        self._waiters.append(Confirmation(producer, following, callback))

    def add_to_latest(self, callback: OnPosition) -> None:
        """Call `callback` once the latest of the pending waits ends."""
        self._waiters.append(self._waiters[-1]._replace(callback=callback))

    def on_packet(self, producer: int, sequence: int, last: Position) -> None:
        """End the waits for messages that were read, or can't be any more.

        Args:
            producer, sequence: of the first message of the packet that was delivered last.
            last: position of the last message of that packet.
        """
        epoch, offset, index = last
        waiters = self._waiters
        while waiters:
            awaited_producer, following, callback = waiters[0]
            if awaited_producer > producer or (
                awaited_producer == producer and following > sequence + index + 1
            ):
                return
            waiters.popleft()
            is_of_packet = awaited_producer == producer and following > sequence
            callback(Position(epoch, offset, following - 1 - sequence) if is_of_packet else None)

    def pop_abandoned(self, producer: int, sequence: int) -> Sequence[Confirmation]:
        """Remove and return the waits for messages from `sequence` on, without calling them."""
        abandoned: deque[Confirmation] = deque()
        waiters = self._waiters
        while waiters and waiters[-1].producer == producer and waiters[-1].next_sequence > sequence:
            abandoned.appendleft(waiters.pop())
        return abandoned

    def expire(self, producer: int) -> None:
        """End the waits for messages of other producer epochs than that of `producer`."""
        waiters = self._waiters
        while waiters and waiters[0].producer != producer:
            waiters.popleft().callback(None)
