"""Publish for somebody who does not stay: by HTTP, say."""

import asyncio
from collections.abc import Iterable, Sequence

from websocket_relay.backplane.interface import Backplane, Position
from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.wire.flow_control import HighWaterMark


class OneShotPublisher:
    """Carries some messages to the log, and waits until they are back from there.

    Args:
        gates: the bounds on what waits; it waits while one is shut.
    """

    def __init__(self, gates: Iterable[HighWaterMark]) -> None:
        self._gates = tuple(gates)
        self._fault: Refusal | None = None  # why a message could not be relayed
        self._holds = 0
        self._is_free = asyncio.Event()
        self._is_free.set()

    async def wait_for_room(self) -> None:
        """Return when no gate is shut: deliver then, before anything else is waited for."""
        try:
            while self._is_held():  # again: those who were let go first may have taken the room
                await self._is_free.wait()
        finally:
            for gate in self._gates:
                gate.release(self)

    async def deliver(
        self, backplane: Backplane, channel: str, said: Sequence[tuple[int, bytes]]
    ) -> Position:
        """Append messages, next to each other; return where the last one stands.

        Raises:
            RefusedError: they could not be relayed.
        """
        backplane.append_all(channel, said, self)
        back: asyncio.Future[Position | None] = asyncio.get_running_loop().create_future()

        def tell(position: Position | None) -> None:
            if not back.done():  # nobody waits any more
                back.set_result(position)

        backplane.when_delivered(tell)
        position = await back
        if self._fault is not None:
            raise RefusedError(self._fault)
        if position is None:  # the broker took them, and did not give them back
            raise RefusedError(Refusal.IN_DOUBT)
        return position

    def pause_reading(self) -> None:
        """Wait."""
        self._holds += 1
        self._is_free.clear()

    def resume_reading(self) -> None:
        """Go on."""
        self._holds -= 1
        if not self._holds:
            self._is_free.set()

    def tell_unavailable(self, *, in_doubt: bool) -> None:
        """Take note that a message could not be relayed, or that nobody knows."""
        if in_doubt or self._fault is None:
            self._fault = Refusal.IN_DOUBT if in_doubt else Refusal.UNAVAILABLE

    def _is_held(self) -> bool:
        for gate in self._gates:
            if gate.is_shut:
                gate.hold(self)
        return not self._is_free.is_set()
