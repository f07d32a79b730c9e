"""Publish messages for a caller without a connection in the channel: an HTTP request, for example.

Knows no HTTP and no channel's members.
"""

import asyncio
from collections.abc import Iterable, Sequence

from websocket_relay.backplane.interface import Backplane, Position
from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.wire.flow_control import HighWaterMark


class OneShotPublisher:
    """Appends messages to the log once, and waits until this replica has delivered them.

    Args:
        high_water_marks: the flow control; the publisher waits while one of them is exceeded.
    """

    def __init__(self, high_water_marks: Iterable[HighWaterMark]) -> None:
        self._high_water_marks = tuple(high_water_marks)
        self._failure: Refusal | None = None  # why a message could not be relayed
        self._pause_count = 0
        self._resumed = asyncio.Event()
        self._resumed.set()

    async def wait_for_capacity(self) -> None:
        """Return when no high-water mark is exceeded; publish then, before any other await."""
        try:
            # Checked again after each wait: publishers that resume earlier may exceed a mark.
            while self._is_paused():
                await self._resumed.wait()
        finally:
            for mark in self._high_water_marks:
                mark.resume_publisher(self)

    async def publish_all(
        self, backplane: Backplane, channel: str, messages: Sequence[tuple[int, bytes]]
    ) -> Position:
        """Append messages, adjacent in the log; return the position of the last one.

        Args:
            backplane: the log.
            channel: name of the channel.
            messages: opcodes and payloads.

        Raises:
            RefusedError: the messages could not be relayed.
        """
        backplane.append_batch(channel, messages, self)
        delivered: asyncio.Future[Position | None] = asyncio.get_running_loop().create_future()

        def set_position(position: Position | None) -> None:
            if not delivered.done():  # done: the caller was cancelled
                delivered.set_result(position)

        backplane.when_delivered(set_position)
        position = await delivered
        if self._failure is not None:
            raise RefusedError(self._failure)
        if position is None:  # the broker accepted the messages, and did not deliver them
            raise RefusedError(Refusal.UNCONFIRMED)
        return position

    def pause_reading(self) -> None:
        """Pause until `resume_reading` has been called as often."""
        self._pause_count += 1
        self._resumed.clear()

    def resume_reading(self) -> None:
        """Undo one `pause_reading`."""
        self._pause_count -= 1
        if not self._pause_count:
            self._resumed.set()

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        """Record that a message was not relayed, or that this is unknown."""
        if is_unconfirmed or self._failure is None:
            self._failure = Refusal.UNCONFIRMED if is_unconfirmed else Refusal.BACKPLANE_UNAVAILABLE

    def _is_paused(self) -> bool:
        for mark in self._high_water_marks:
            if mark.is_exceeded:
                mark.pause_publisher(self)
        return not self._resumed.is_set()
