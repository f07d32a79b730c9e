"""One subscription: its unread messages, and the position after which it resumes.

The number of unread bytes is bounded. A subscription that reaches the bound unsubscribes, and
subscribes again after its last message when half of it is read: the client never stops reading from
the network, because the answers to its commands arrive there, too. Knows no connection.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self

from websocket_relay.client.connection import Received
from websocket_relay.client.errors import RejectedError
from websocket_relay.client.events import Message
from websocket_relay.client.outbox import MESSAGE_BYTES


class SubscriptionOwner(Protocol):
    """Sends the commands of its subscriptions."""

    def send_subscribe(self, subscription: "Subscription") -> None:
        """Send `subscribe`, now or with the next connection."""

    def send_unsubscribe(self, subscription: "Subscription") -> None:
        """Send `unsubscribe`, if there is a connection."""

    def remove(self, subscription: "Subscription") -> None:
        """Forget a subscription that has ended."""


class Subscription:
    """The messages of one channel: an async iterator and an async context manager.

    A loop over it ends the subscription when it is left; inside of `async with` the block does.

    Args:
        channel: the name of the channel.
        owner: sends the commands.
        since: the position after which to start; empty: with new messages.
        history: number of past messages to start with, where `since` is empty.
        echo: whether the messages that this client publishes are delivered.
        follow: whether to continue after the replay.
        max_unread_bytes: limit of received messages that are not read yet.

    Attributes:
        channel: the name of the channel.
    """

    def __init__(
        self,
        channel: str,
        owner: SubscriptionOwner,
        *,
        since: str,
        history: int,
        echo: bool,
        follow: bool,
        max_unread_bytes: int,
    ) -> None:
        self.channel = channel
        self._owner = owner
        self._position = since
        self._history = history
        self._echo = echo
        self._follow = follow
        self._max_unread_bytes = max_unread_bytes
        self._unread: deque[Message] = deque()
        self._unread_bytes = 0
        self._has_gap = False  # before the next message
        self._command_id = 0  # of the last `subscribe` on this connection; 0: none
        self._is_subscribed = False  # that command was answered
        self._was_subscribed = False  # at least once
        self._is_paused = False
        self._is_ended = False
        self._error: Exception | None = None
        self._is_block = False  # of `async with`
        self._changed = asyncio.Event()

    # Public interface

    async def __aenter__(self) -> Self:
        """Wait until the relay has confirmed the subscription.

        Raises:
            RejectedError: the relay refuses the subscription, or the client.
            UnavailableError: the relay was unavailable for `patience_s`.
        """
        self._is_block = True
        try:
            while not self._was_subscribed and not self._is_ended:
                await self._wait()
            if self._error is not None:
                raise self._error
        except BaseException:
            self.unsubscribe()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unsubscribe()

    def __aiter__(self) -> AsyncIterator[Message]:
        return self if self._is_block else _Loop(self)

    async def __anext__(self) -> Message:
        """Return the next message.

        Raises:
            RejectedError: the relay refuses or has ended the subscription, or rejects the client.
            UnavailableError: the relay was unavailable for `patience_s`.
            StopAsyncIteration: the subscription has ended.
        """
        while not self._unread:
            if self._error is not None:
                raise self._error
            if self._is_ended:
                raise StopAsyncIteration
            await self._wait()
        message = self._unread.popleft()
        self._unread_bytes -= _size_of(message)
        if self._is_paused and self._unread_bytes <= self._max_unread_bytes // 2:
            self._is_paused = False
            self._owner.send_subscribe(self)
        return message

    def unsubscribe(self) -> None:
        """End the subscription: no further message is returned."""
        self._unread.clear()
        self.end()

    @property
    def unread(self) -> int:
        """The number of received messages that are not read yet."""
        return len(self._unread)

    # For the owner

    @property
    def is_wanted(self) -> bool:
        """Whether the command has to be sent on the present connection."""
        return not self._command_id and not self._is_paused and not self._is_ended

    def command(self, id_: int) -> dict[str, Any]:
        """Return the command `subscribe`; what arrives before its answer is ignored."""
        self._command_id = id_
        self._is_subscribed = False
        start: dict[str, Any] = {}
        if self._position:
            start = {"since": self._position}
        elif self._history:
            start = {"history": self._history}
        if not self._echo:
            start["echo"] = False
        return {"type": "subscribe", "channel": self.channel, "id": id_, **start}

    def is_refused_by(self, received: Received) -> bool:
        """Return whether an error is the answer to the command."""
        return received.id == self._command_id

    def on_disconnected(self) -> None:
        """Forget the command: the connection has ended."""
        self._command_id = 0
        self._is_subscribed = False

    def on_received(self, received: Received) -> None:
        """Process a message of the relay about the channel."""
        if received.type == "subscribed":
            self._on_subscribed(received)
        elif not self._is_subscribed:
            pass  # it belongs to an earlier subscription
        elif not received.type:
            self._on_message(received)
        elif received.type == "gap":
            self._has_gap = True
        elif received.type == "live" and not self._follow:
            self.end()
        elif received.type == "unsubscribed" and "status" in received.fields:
            self.refuse(received.error)

    def end(self, error: Exception | None = None) -> None:
        """End the iteration after the unread messages.

        Args:
            error: raised then; None: the iteration stops.
        """
        if self._is_ended:
            return
        self._is_ended = True
        self._error = error
        if self._command_id:
            self._owner.send_unsubscribe(self)
        self.on_disconnected()
        self._owner.remove(self)
        self._changed.set()

    def refuse(self, error: Exception) -> None:
        """End the subscription, because the relay refuses it."""
        self.end(RejectedError(f"{self.channel}: {error}"))

    def _on_subscribed(self, received: Received) -> None:
        if received.id != self._command_id:
            return
        self._has_gap |= not received.fields.get("recovered", True)
        self._position = received.position
        self._is_subscribed = self._was_subscribed = True
        self._changed.set()

    def _on_message(self, received: Received) -> None:
        self._position = received.position
        message = Message(received.data, self.channel, received.position, self._has_gap)
        self._has_gap = False
        self._unread.append(message)
        self._unread_bytes += _size_of(message)
        if self._unread_bytes >= self._max_unread_bytes:
            self._is_paused = True
            self._owner.send_unsubscribe(self)
            self.on_disconnected()
        self._changed.set()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class _Loop(AsyncIterator[Message]):
    """The iterator of one `async for`, which ends its subscription when the loop drops it."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        self._loop = asyncio.get_running_loop()

    async def __anext__(self) -> Message:
        return await self._subscription.__anext__()

    def __del__(self) -> None:
        try:
            is_here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            is_here = False
        if is_here:
            self._subscription.unsubscribe()
            return
        with suppress(RuntimeError):  # collected in another thread, or when the loop is closed
            self._loop.call_soon_threadsafe(self._subscription.unsubscribe)


def _size_of(message: Message) -> int:
    data = message.data
    return MESSAGE_BYTES + (len(data) if isinstance(data, bytes) else len(data.encode()))
