"""Clients that resume on any replica while replicas stop, and publishers that reconnect."""

import asyncio
from collections.abc import Sequence

from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support.relay_process import RelayProcess
from tests.support.relay_v1 import Message, RelayV1Client, connect_relay_v1

LAST_MESSAGE = "the end"
"""Followers end after it."""


class ResumingFollower:
    """A client that resumes on one replica after another, and records all messages.

    Args:
        position: the position from which it resumes first.
        turn: selects the replica of its first connection.

    Attributes:
        received: all messages, in order.
        reconnections: how many connections were established.
    """

    def __init__(self, position: str, turn: int = 0) -> None:
        self.received: list[Message] = []
        self.reconnections = 0
        self._position = position
        self._turn = turn

    async def follow(self, relays: Sequence[RelayProcess]) -> None:
        """Receive messages until the last one.

        Args:
            relays: the running replicas; the list may change.
        """
        while LAST_MESSAGE not in self.received[-1:]:
            self._turn += 1
            try:
                relay = relays[self._turn % len(relays)]
                async with connect_relay_v1(relay, "news", since=self._position) as client:
                    assert client.subscribed["recovered"] is True
                    self.reconnections += 1
                    await self._receive(client)
            except (OSError, ConnectionClosed, InvalidStatus, EOFError):
                await asyncio.sleep(0.05)

    async def _receive(self, client: RelayV1Client) -> None:
        while LAST_MESSAGE not in self.received[-1:]:
            self.received.append(await client.next_message())
            self._position = client.position


async def make_followers(relay: RelayProcess, count: int) -> Sequence[ResumingFollower]:
    """Return clients that receive all messages published from now on."""
    async with connect_relay_v1(relay, "news") as first:
        return [ResumingFollower(first.position, turn) for turn in range(count)]


async def publish_until(
    relays: Sequence[RelayProcess], name: str, is_over: asyncio.Event
) -> Sequence[Message]:
    """Publish messages on the last replica until an event; reconnect after each end.

    A relay that drains relays all messages that it received before it closes. The publisher
    therefore repeats none.

    Returns:
        The published messages.
    """
    published: list[Message] = []
    while not is_over.is_set():
        try:
            async with relays[-1].client("news", max_queue=None) as client:
                while not is_over.is_set():
                    message = f"{name}: {len(published)}"
                    await client.send(message)
                    published.append(message)
                    await asyncio.sleep(0.005)
        except (OSError, ConnectionClosed, InvalidStatus, EOFError):
            await asyncio.sleep(0.05)
    return published
