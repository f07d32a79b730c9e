"""One subscription: its unread messages, and the position after which it resumes.

The number of unread bytes is bounded. A subscription that reaches the bound unsubscribes, and
subscribes again after its last message when half of it is read: the client never stops reading from
the network, because the answers to its commands arrive there, too. Knows no connection.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from sys import getsizeof
from typing import Self

from websocket_relay.client.errors import RejectedError, UnavailableError, error_in
from websocket_relay.client.events import Data, Header, Member, Message, PresenceEvent
from websocket_relay.client.members import Members

RETRY_S = 1.0
"""Delay after a temporary refusal that names none."""


class Subscription:
    """The messages of one channel: an async iterator and an async context manager.

    A loop over it ends the subscription when it is left; inside of `async with` the block does.

    Args:
        request: the command, without an id.
        send: sends a command on the present connection; returns its id, 0 if there is none.
        on_end: called with the name of the channel when the subscription has ended.
        follow: whether to continue after the replay.
        max_unread_bytes: limit of received messages that are not read yet.
        on_presence: called when the members of the channel change.

    Attributes:
        channel: the name of the channel.
    """

    def __init__(
        self,
        request: Header,
        send: Callable[[Header], int],
        on_end: Callable[[str], object],
        *,
        follow: bool,
        max_unread_bytes: int,
        on_presence: Callable[[PresenceEvent], None],
    ) -> None:
        self.channel: str = request["channel"]
        self._request = request
        self._send = send
        self._on_end = on_end
        self._follow = follow
        self._max_unread_bytes = max_unread_bytes
        self._members = Members(on_presence)
        self._unread: deque[Message] = deque()
        self._unread_bytes = 0
        self._has_gap = False  # before the next message
        self._command_id = 0  # of the last `subscribe` on this connection; 0: none
        self._is_subscribed = False  # that command was answered
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
            while not (self._is_subscribed or self._unread or self._is_ended):
                self._changed.clear()
                await self._changed.wait()
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
            if self._is_ended:
                raise self._error or StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        message = self._unread.popleft()
        self._unread_bytes -= getsizeof(message.data)
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

    @property
    def members(self) -> Mapping[str, Member] | None:
        """The clients in the channel; None: not known, or they are too many."""
        return self._members.by_client

    @property
    def count(self) -> int | None:
        """The number of clients in the channel; None: not known."""
        return self._members.count

    # For the client

    def start(self) -> None:
        """Subscribe on the present connection, unless that is done or too much is unread."""
        has_capacity = self._unread_bytes <= self._max_unread_bytes // 2
        if has_capacity and not self._command_id and not self._is_ended:
            self._command_id = self._send(self._request)

    def on_disconnected(self) -> None:
        """Forget the command: the connection has ended."""
        self._command_id = 0
        self._is_subscribed = False

    def on_received(self, header: Header, data: Data) -> None:
        """Process a message of the relay about the channel, or an error."""
        match header.get("type"):
            case "subscribed" if header.get("id") == self._command_id:
                self._has_gap |= not header.get("recovered", True)
                self._request["since"] = header["position"]
                self._is_subscribed = True
                self._changed.set()
            case "error" if header.get("id") == self._command_id:
                self._on_refusal(header)
            case _ if not self._is_subscribed:
                pass  # it belongs to an earlier subscription
            case None:
                self._on_message(Message(data, self.channel, header["position"], self._has_gap))
            case "gap":
                self._has_gap = True
            case "presence" | "joined" | "left":
                self._members.on_received(header)
            case "live" if not self._follow:
                self.end()
            case "unsubscribed" if "status" in header:  # a new token does not permit it
                self._on_refusal(header)

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
            self._send({"type": "unsubscribe", "channel": self.channel})
        self.on_disconnected()

    def _on_refusal(self, header: Header) -> None:
        """End, or try again later, because the relay does not carry out the command."""
        self.on_disconnected()
        error = error_in(header)
        if isinstance(error, UnavailableError):
            asyncio.get_running_loop().call_later(error.retry_after_s or RETRY_S, self.start)
        else:
            self.end(RejectedError(f"{self.channel}: {error}"))

    def _on_message(self, message: Message) -> None:
        self._request["since"] = message.position
        self._has_gap = False
        self._unread.append(message)
        self._unread_bytes += getsizeof(message.data)
        if self._unread_bytes >= self._max_unread_bytes:
            self._stop()
        self._changed.set()


class _Loop(AsyncIterator[Message]):
    """The iterator of one `async for`, which ends its subscription when the loop drops it."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        self._thread_id = threading.get_ident()
        self._loop = asyncio.get_running_loop()

    async def __anext__(self) -> Message:
        return await self._subscription.__anext__()

    def __del__(self) -> None:
        if threading.get_ident() == self._thread_id:
            self._subscription.unsubscribe()
        else:  # cyclic garbage is collected in any thread
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._subscription.unsubscribe)
