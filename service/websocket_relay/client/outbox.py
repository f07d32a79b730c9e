"""Keep messages until their echo confirms that the relay relayed them. Knows no connection.

The relay sends every message back to its publisher, in order, so the oldest unconfirmed message is
echoed first. Messages carry no id: an echo is recognized by its content. When another client
publishes the same content at the same time, its message counts as the echo.
"""

from collections import deque

Data = str | bytes

MESSAGE_BYTES = 64
"""Overhead that is counted for each message, so that empty messages are bounded too."""


def size_of(data: Data) -> int:
    """Return the size that a message is counted with, in bytes.

    Raises:
        UnicodeEncodeError: the text has an unpaired surrogate.
    """
    return MESSAGE_BYTES + len(data if isinstance(data, bytes) else data.encode())


class Outbox:
    """The unsent and the unconfirmed messages of one client, in order.

    Args:
        max_bytes: size limit; a larger message is accepted when the outbox is empty.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._unsent: deque[Data] = deque()
        self._unconfirmed: deque[Data] = deque()

    def __len__(self) -> int:
        """Return the number of messages that are not confirmed, sent or not."""
        return len(self._unsent) + len(self._unconfirmed)

    @property
    def unsent_count(self) -> int:
        """The number of messages that wait to be sent."""
        return len(self._unsent)

    @property
    def has_unsent(self) -> bool:
        """Whether a message waits to be sent."""
        return bool(self._unsent)

    @property
    def has_unconfirmed(self) -> bool:
        """Whether a message was sent and its echo has not arrived."""
        return bool(self._unconfirmed)

    def has_capacity_for(self, size: int) -> bool:
        """Return whether a message of this size fits."""
        return not len(self) or self._bytes + size <= self._max_bytes

    def append(self, data: Data) -> None:
        """Append a message to send."""
        self._unsent.append(data)
        self._bytes += size_of(data)

    def next_to_send(self) -> Data:
        """Return the next message to send, and expect its echo from now on."""
        data = self._unsent.popleft()
        self._unconfirmed.append(data)
        return data

    def confirm_echo(self, data: Data) -> bool:
        """Confirm the oldest unconfirmed message if `data` is its echo; return whether it is."""
        if not self._unconfirmed or self._unconfirmed[0] != data:
            return False
        self._bytes -= size_of(self._unconfirmed.popleft())
        return True

    def confirm_all(self) -> None:
        """Confirm every message that was sent."""
        while self._unconfirmed:
            self.confirm_echo(self._unconfirmed[0])

    def send_again(self) -> None:
        """Queue the unconfirmed messages for sending again, before all unsent ones."""
        self._unsent.extendleft(reversed(self._unconfirmed))
        self._unconfirmed.clear()

    def abandon(self) -> int:
        """Remove the unconfirmed messages; return their number."""
        count = len(self._unconfirmed)
        self.confirm_all()
        return count
