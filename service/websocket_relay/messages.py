"""Define what is published, and who publishes it. Knows no protocol, no channel and no broker."""

from typing import Protocol

TEXT, BINARY = 1, 2
"""The kinds of messages. The packets on a broker contain these numbers (see `backplane.codec`)."""

Message = tuple[int, bytes]
"""A kind and a payload."""


class Publisher(Protocol):
    """The source of messages: a connection, or a request that waits for the result."""

    def pause_reading(self) -> None:
        """Publish nothing more until `resume_reading` was called as often."""

    def resume_reading(self) -> None:
        """Undo one `pause_reading`."""

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        """Report that messages were not relayed.

        Args:
            is_unconfirmed: whether they may have been relayed all the same.
        """
