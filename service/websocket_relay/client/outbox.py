"""Keep what is to be sent until it is known to have been relayed. Knows no connection.

The relay sends every message back to its sender as well, in order: what was sent first is heard
first. A message has no name of its own, so its echo is known by what it says; when somebody else
says the same at the same time, one stands for the other.
"""

from collections import deque

Data = str | bytes

MESSAGE_BYTES = 64
"""What a message takes beside its own bytes, so that empty ones are bounded too."""


def size_of(data: Data) -> int:
    """Return what a message counts for.

    Raises:
        UnicodeEncodeError: it is text that is none: with half a surrogate pair.
    """
    return MESSAGE_BYTES + len(data if isinstance(data, bytes) else data.encode())


class Outbox:
    """What one client sends, in order.

    Args:
        max_bytes: what may be in it; a larger message has it to itself.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._unsent: deque[Data] = deque()
        self._unheard: deque[Data] = deque()

    def __len__(self) -> int:
        """Return how many messages are not known to have been relayed."""
        return len(self._unsent) + len(self._unheard)

    @property
    def has_unsent(self) -> bool:
        """Whether there is something to send."""
        return bool(self._unsent)

    @property
    def has_unheard(self) -> bool:
        """Whether something was sent that did not come back yet."""
        return bool(self._unheard)

    def has_room_for(self, size: int) -> bool:
        """Tell whether a message of this size fits in."""
        return not len(self) or self._bytes + size <= self._max_bytes

    def put(self, data: Data) -> None:
        """Add a message."""
        self._unsent.append(data)
        self._bytes += size_of(data)

    def take(self) -> Data:
        """Return the next message to send; from now on its echo is awaited."""
        data = self._unsent.popleft()
        self._unheard.append(data)
        return data

    def hear(self, data: Data) -> bool:
        """Take note of what the relay relayed; return whether it is what was awaited."""
        if not self._unheard or self._unheard[0] != data:
            return False
        self._bytes -= size_of(self._unheard.popleft())
        return True

    def hear_all(self) -> None:
        """Take note that all that was sent was relayed."""
        while self._unheard:
            self.hear(self._unheard[0])

    def send_again(self) -> None:
        """Have all that did not come back sent once more, before all else."""
        self._unsent.extendleft(reversed(self._unheard))
        self._unheard.clear()

    def abandon(self) -> int:
        """Forget what was sent and did not come back; return how many messages it was."""
        count = len(self._unheard)
        self.hear_all()
        return count
