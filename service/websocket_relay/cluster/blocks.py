"""Own which users are blocked, on all replicas. Knows no client and no broker.

A block is decided by an order, at its position in the log. The latest order about a user counts. A
replica that starts may not find the order in the log any more: it asks the others, which state
their blocks.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from websocket_relay.backplane.interface import Position
from websocket_relay.cluster.control_log import ControlEntry, ControlLog

MAX_BLOCKS = 10_000

RELEASED_S = 60.0
"""The end of a block is remembered for so long: a statement from before it may still arrive."""

STATE_WITHIN_S = 0.2
"""The replicas state their blocks one after the other, in a random order: each leaves out what was
stated by others."""

PART_BLOCKS = 200


class Block(NamedTuple):
    """What an order has decided about a user.

    Attributes:
        until: the user is blocked until then, in seconds since 1970.
        position: of the order.
        kept_until: it is remembered until then.
    """

    until: float
    position: Position
    kept_until: float


class Blocks:
    """The users that are blocked, by the orders that were read.

    Args:
        clock: seconds since 1970.
        max_blocks: of more, the one that ends first is dropped.

    Attributes:
        dropped: number of those that were dropped.
    """

    def __init__(
        self, clock: Callable[[], float] = time.time, max_blocks: int = MAX_BLOCKS
    ) -> None:
        self._clock = clock
        self._max_blocks = max_blocks
        self._blocks: dict[str, Block] = {}
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def metrics(self) -> dict[str, int]:
        """Return the values of the metrics of blocks."""
        return {"blocked_users": sum(1 for _ in self.current()), "blocks_dropped": self.dropped}

    def has_capacity(self, user: str, until: float) -> bool:
        """Return whether `decide` would drop no block of another user."""
        self._remove_ended()
        is_release = until <= self._clock()
        return is_release or user in self._blocks or len(self._blocks) < self._max_blocks

    def decide(self, user: str, until: float, position: Position) -> bool:
        """Block a user, or end the block, unless a later order has decided.

        Args:
            user: not empty.
            until: seconds since 1970; in the past: the user is not blocked any more.
            position: of the order.

        Returns:
            Whether the user is blocked by it.
        """
        known = self._blocks.get(user)
        if known is not None and known.position >= position:
            return False
        now = self._clock()
        self._blocks[user] = Block(until, position, max(until, now + RELEASED_S))
        if len(self._blocks) > self._max_blocks:
            self._remove_ended()
        if len(self._blocks) > self._max_blocks:
            # A release is dropped before a block: it only keeps out a late statement.
            first = min(self._blocks.items(), key=lambda each: (each[1].until > now, each[1].until))
            self.dropped += first[1].until > now
            del self._blocks[first[0]]
        return until > now

    def is_blocked(self, user: str) -> bool:
        """Return whether a user is blocked now."""
        block = self._blocks.get(user)
        return block is not None and block.until > self._clock()

    def current(self) -> Iterator[tuple[str, Block]]:
        """Yield the users that are blocked now."""
        now = self._clock()
        for user, block in self._blocks.items():
            if block.until > now:
                yield user, block

    def _remove_ended(self) -> None:
        now = self._clock()
        self._blocks = {user: each for user, each in self._blocks.items() if each.kept_until > now}


class BlockStatements:
    """The entries by which a replica that starts learns of blocks.

    Args:
        blocks: those that are known here.
        control: the entries.
        is_alone: whether there are no other replicas.
        up: is set while entries can be appended.
        learned: is called with a user whose block another replica has stated.
    """

    def __init__(
        self,
        blocks: Blocks,
        control: ControlLog,
        *,
        is_alone: bool,
        up: asyncio.Event,
        learned: Callable[[str], None],
    ) -> None:
        self._blocks = blocks
        self._control = control
        self._is_alone = is_alone
        self._up = up
        self._learned = learned
        self._must_ask = not is_alone
        self._unstated: set[str] = set()  # users, since another replica has asked
        self._awake = asyncio.Event()
        self._awake.set()
        control.handle("blocks.ask", self._on_question)
        control.handle("blocks.state", self._on_statement)

    async def run(self) -> None:
        """Ask and answer, until cancelled."""
        while True:
            await self._awake.wait()
            self._awake.clear()
            await asyncio.sleep(random.uniform(0, STATE_WITHIN_S))
            await self._up.wait()
            self.append_due()

    def append_due(self) -> None:
        """Append what is due."""
        if self._must_ask:
            self._must_ask = False
            self._control.append("blocks.ask", {}, failed=self.on_gap)
        unstated, self._unstated = self._unstated, set()
        due = [
            (user, block.until, str(block.position))
            for user, block in self._blocks.current()
            if user in unstated
        ]
        for start in range(0, len(due), PART_BLOCKS):
            part = due[start : start + PART_BLOCKS]
            self._control.append("blocks.state", {"blocks": part}, failed=self._state_all)

    def on_gap(self) -> None:
        """Ask again: orders may be lost."""
        if not self._is_alone:
            self._must_ask = True
            self._awake.set()

    def _state_all(self) -> None:
        self._unstated = {user for user, _ in self._blocks.current()}
        if self._unstated:
            self._awake.set()

    def _on_question(self, entry: ControlEntry) -> None:
        self._state_all()

    def _on_statement(self, entry: ControlEntry) -> None:
        stated: Sequence[tuple[str, float, Any]] = entry.fields["blocks"]
        for user, until, position in stated:
            self._unstated.discard(user)
            if self._blocks.decide(user, until, Position.parse(position)):
                self._learned(user)
