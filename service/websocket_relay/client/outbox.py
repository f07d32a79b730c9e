"""Keep published messages until the relay answers them. Knows no connection and no frame."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from websocket_relay.client.errors import UnconfirmedError

MESSAGE_BYTES = 64
"""Overhead that is counted for each message, so that empty messages are bounded too."""


@dataclass(slots=True)
class PendingPublish:
    """A message that the relay has not answered.

    Attributes:
        id: of the command; ids grow.
        channel: the name of the channel.
        payload: the data, encoded.
        is_text: whether the data is text.
        answer: the message's position.
        seen: the last position that was received before it was sent; empty: it was never sent.
    """

    id: int
    channel: str
    payload: bytes
    is_text: bool
    answer: asyncio.Future[str]
    seen: str = ""

    @property
    def size(self) -> int:
        """The size that the message is counted with, in bytes."""
        return len(self.payload) + MESSAGE_BYTES

    def fail(self, error: Exception) -> None:
        """Raise an error to the caller, if there still is one."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Outbox:
    """The unanswered messages of one client, in the order of their ids.

    Args:
        max_bytes: size limit; a larger message is accepted when the outbox is empty.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._pending: dict[int, PendingPublish] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def __iter__(self) -> Iterator[PendingPublish]:
        return iter(list(self._pending.values()))

    def has_capacity_for(self, payload: bytes) -> bool:
        """Return whether a message fits."""
        size = len(payload) + MESSAGE_BYTES
        return not self._pending or self._bytes + size <= self._max_bytes

    def append(self, pending: PendingPublish) -> None:
        """Append a message."""
        self._pending[pending.id] = pending
        self._bytes += pending.size

    def pop(self, id_: int) -> PendingPublish | None:
        """Remove the message with this id, which is answered; None: there is none."""
        pending = self._pending.pop(id_, None)
        if pending is not None:
            self._bytes -= pending.size
        return pending

    @property
    def oldest_seen(self) -> str:
        """The position received before the oldest message was sent; empty: none was sent."""
        return next(iter(self._pending.values())).seen if self._pending else ""

    @property
    def largest_sent(self) -> PendingPublish | None:
        """The largest message that was sent; None: none was sent."""
        sent = (pending for pending in self._pending.values() if pending.seen)
        return max(sent, key=lambda pending: pending.size, default=None)

    def abandon(self, reason: str, unsent_error: Exception | None = None) -> None:
        """Fail each message that was sent: it may or may not be published.

        Args:
            reason: the cause.
            unsent_error: fails the others, which were never sent; None: they stay.
        """
        for pending in self:
            error = UnconfirmedError(1, reason) if pending.seen else unsent_error
            if error is not None:
                self.pop(pending.id)
                pending.fail(error)
