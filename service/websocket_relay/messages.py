"""Define messages and publishers. Knows no protocol, no channel and no broker."""

from typing import Protocol

TEXT, BINARY, CONTROL = 1, 2, 3
"""The kinds of messages. The packets on a broker contain these numbers (see `backplane.codec`).
What replicas write for each other is no message, and sent to no client: `cluster.control_log`."""

Message = tuple[int, bytes]
"""A kind and a payload."""


class Pausable(Protocol):
    """A source of messages that can be paused."""

    def pause_reading(self) -> None:
        """Pass on nothing more until `resume_reading` was called as often."""

    def resume_reading(self) -> None:
        """Undo one `pause_reading`."""


class Publisher(Protocol):
    """A publisher, as the backplane sees it."""

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        """Report that messages were not relayed.

        Args:
            is_unconfirmed: whether they may have been relayed all the same.
        """
