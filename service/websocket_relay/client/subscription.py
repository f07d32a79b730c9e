"""One subscription: its unread messages, and the position after which it resumes.

The number of unread bytes is bounded. A subscription that reaches the bound unsubscribes, and
subscribes again after its last message when half of it is read: the client never stops reading from
the network, because the answers to its commands arrive there, too. Knows no connection.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Protocol, Self

from websocket_relay.client.connection import Received
from websocket_relay.client.errors import RejectedError, UnavailableError
from websocket_relay.client.events import Message
from websocket_relay.client.outbox import MESSAGE_BYTES

RETRY_S = 1.0
"""Delay after a temporary refusal that names none."""


class SendCommand(Protocol):
    """Sends a command on the present connection."""

    def __call__(
        self, kind: str, on_answer: Callable[[Received], None] | None = None, **fields: object
    ) -> int:
        """Return the id of the command; 0: there is no connection, and nothing was sent."""


class Subscription:
    """The messages of one channel: an async iterator and an async context manager.

    A loop over it ends the subscription when it is left; inside of `async with` the block does.

    Args:
        channel: the name of the channel.
        send: sends the commands.
        on_end: called with the name of the channel when the subscription has ended.
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
        send: SendCommand,
        on_end: Callable[[str], object],
        *,
        since: str,
        history: int,
        echo: bool,
        follow: bool,
        max_unread_bytes: int,
    ) -> None:
        self.channel = channel
        self._send = send
        self._on_end = on_end
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

    async def __aexit__(self, *exception: object) -> None:
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
            self.start()
        return message

    def unsubscribe(self) -> None:
        """End the subscription: no further message is returned."""
        self._unread.clear()
        self.end()

    @property
    def unread(self) -> int:
        """The number of received messages that are not read yet."""
        return len(self._unread)

    # For the client

    def start(self) -> None:
        """Subscribe on the present connection, if that is to be done."""
        if self._command_id or self._is_paused or self._is_ended:
            return
        fields: dict[str, object] = {"channel": self.channel}
        if self._position:
            fields["since"] = self._position
        elif self._history:
            fields["history"] = self._history
        if not self._echo:
            fields["echo"] = False
        self._command_id = self._send("subscribe", self._on_answer, **fields)

    def on_disconnected(self) -> None:
        """Forget the command: the connection has ended."""
        self._command_id = 0
        self._is_subscribed = False

    def on_received(self, received: Received) -> None:
        """Process a message of the relay about the channel."""
        if not self._is_subscribed:
            return  # it belongs to an earlier subscription
        match received.type:
            case "":
                self._on_message(received)
            case "gap":
                self._has_gap = True
            case "live" if not self._follow:
                self.end()
            case "unsubscribed" if "status" in received.fields:
                self._refuse(received)

    def end(self, error: Exception | None = None) -> None:
        """End the iteration after the unread messages.

        Args:
            error: raised then; None: the iteration stops.
        """
        if self._is_ended:
            return
        self._is_ended = True
        self._error = error
        self._stop()
        self._on_end(self.channel)
        self._changed.set()

    def _stop(self) -> None:
        """Unsubscribe. What arrives from now on is ignored."""
        if self._command_id:
            self._send("unsubscribe", channel=self.channel)
        self.on_disconnected()

    def _on_answer(self, received: Received) -> None:
        if received.id != self._command_id:
            return  # of a subscription that was stopped
        if received.type == "error":
            self._refuse(received)
            return
        self._has_gap |= not received.fields.get("recovered", True)
        self._position = received.position
        self._is_subscribed = self._was_subscribed = True
        self._changed.set()

    def _refuse(self, received: Received) -> None:
        """End, or try again later, because the relay does not carry out the command."""
        self.on_disconnected()
        error = received.error
        if isinstance(error, UnavailableError):
            asyncio.get_running_loop().call_later(error.retry_after_s or RETRY_S, self.start)
        else:
            self.end(RejectedError(f"{self.channel}: {error}"))

    def _on_message(self, received: Received) -> None:
        self._position = received.position
        message = Message(received.data, self.channel, received.position, self._has_gap)
        self._has_gap = False
        self._unread.append(message)
        self._unread_bytes += _size_of(message)
        if self._unread_bytes >= self._max_unread_bytes:
            self._is_paused = True
            self._stop()
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
