"""Keep those who wait until messages of this replica come back from the log. Knows no broker.

A message is identified by the life of the replica in which it was appended, and by its number in
that life. Waiting for it ends when it is read, when it is given up, when a message of a later life
is read (then it is lost, or is left out when it comes), or when it takes too long.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from websocket_relay.backplane.interface import Position

OnPosition = Callable[[Position | None], object]
"""Told the position of the message; None where it has none, or none that is known."""


class Confirmation(NamedTuple):
    """Who waits for one message, and so for all before it.

    Attributes:
        origin: the life of the message.
        following: the number of the message after it.
        answer: what is called.
    """

    origin: int
    following: int
    answer: OnPosition


class Confirmations:
    """Those who wait, in the order of the messages."""

    def __init__(self) -> None:
        self._waiters: deque[Confirmation] = deque()

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, origin: int, following: int, answer: OnPosition) -> None:
        """Call `answer` when the message before `following` is read, or will not be."""
        self._waiters.append(Confirmation(origin, following, answer))

    def add_to_last(self, answer: OnPosition) -> None:
        """Call `answer` when the one who came last is answered."""
        self._waiters.append(self._waiters[-1]._replace(answer=answer))

    def on_packet(self, origin: int, number: int, last: Position) -> None:
        """Answer those whose messages were read, or can't come any more.

        Args:
            origin, number: of the first message of a packet that was delivered last.
            last: the position of its last message.
        """
        major, minor, nth = last
        waiters = self._waiters
        while waiters:
            life, following, answer = waiters[0]
            if life > origin or (life == origin and following > number + nth + 1):
                return
            waiters.popleft()
            is_of_packet = life == origin and following > number
            answer(Position(major, minor, following - 1 - number) if is_of_packet else None)

    def take_given_up(self, origin: int, number: int) -> Sequence[Confirmation]:
        """Let go of those who wait for messages from this one on, and return them."""
        given_up: deque[Confirmation] = deque()
        waiters = self._waiters
        while waiters and waiters[-1].origin == origin and waiters[-1].following > number:
            given_up.appendleft(waiters.pop())
        return given_up

    def expire(self, origin: int) -> None:
        """Answer those who wait for messages of other lives than this one."""
        waiters = self._waiters
        while waiters and waiters[0].origin != origin:
            waiters.popleft().answer(None)
