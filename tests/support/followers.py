"""Clients that follow a channel from relay to relay, and those who speak to them meanwhile."""

import asyncio
from collections.abc import Sequence

from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support.relay_process import RelayProcess
from tests.support.relay_v1 import Message, RelayV1Client, connect_relay_v1

LAST_MESSAGE = "the end"


class ResumingFollower:
    """A client that comes back, on whatever replica there is, and notes all that it hears."""

    def __init__(self, position: str, turn: int = 0) -> None:
        self.received: list[Message] = []
        self.reconnections = 0
        self._position = position
        self._turn = turn

    async def follow(self, relays: Sequence[RelayProcess]) -> None:
        """Listen until the end.

        Args:
            relays: those that there are now.
        """
        while LAST_MESSAGE not in self.received[-1:]:
            self._turn += 1
            try:
                relay = relays[self._turn % len(relays)]
                async with connect_relay_v1(relay, "news", since=self._position) as client:
                    assert client.welcome["recovered"] is True
                    self.reconnections += 1
                    await self._listen(client)
            except (OSError, ConnectionClosed, InvalidStatus, EOFError):
                await asyncio.sleep(0.05)

    async def _listen(self, client: RelayV1Client) -> None:
        while LAST_MESSAGE not in self.received[-1:]:
            self.received.append(await client.next_message())
            self._position = client.position


async def make_followers(relay: RelayProcess, count: int) -> Sequence[ResumingFollower]:
    """Return clients that will hear all that is said from now on."""
    async with connect_relay_v1(relay, "news") as first:
        return [ResumingFollower(first.position, turn) for turn in range(count)]


async def publish_until(
    relays: Sequence[RelayProcess], name: str, is_over: asyncio.Event
) -> Sequence[Message]:
    """Say one thing after another, wherever there is a relay; return what was said.

    What was sent before the close of a relay that drains was relayed: it need not be said again.
    """
    said: list[Message] = []
    while not is_over.is_set():
        try:
            async with relays[-1].client("news", max_queue=None) as client:
                while not is_over.is_set():
                    message = f"{name}: {len(said)}"
                    await client.send(message)
                    said.append(message)
                    await asyncio.sleep(0.005)
        except (OSError, ConnectionClosed, InvalidStatus, EOFError):
            await asyncio.sleep(0.05)
    return said
