"""The client for programs without asyncio: one event loop in one daemon thread. Knows no protocol.

Each call runs in that loop, and the calling thread waits for it. So several threads may use one
client, and Ctrl-C interrupts a call. The thread does not survive a fork: connect in the process
that uses the client.
"""

import asyncio
import os
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

from websocket_relay.client.events import Data, Event, Message
from websocket_relay.client.relay import CLOSE_TIMEOUT_S, CLOSED, Relay
from websocket_relay.client.subscription import Subscription
from websocket_relay.client.tokens import Token

Result = TypeVar("Result")

END_TIMEOUT_S = 1.0
"""Limit of the end of the thread, after the client was closed."""


class _ClosedError(RuntimeError):
    """The client was closed."""


class RelayOptions(TypedDict, total=False):
    """The options of `Relay`. Functions among them are called in the client's thread."""

    token: Token
    ssl: ssl.SSLContext | None
    uses_proxy: bool
    start_patience_s: float
    patience_s: float
    max_pending_bytes: int
    max_unread_bytes: int
    max_message_bytes: int
    on_event: Callable[[Event], None]


class SyncSubscription:
    """The messages of one channel: an iterator and a context manager.

    A loop over it ends the subscription when it is left; inside of `with` the block does.
    """

    def __init__(self, call: "_Call", subscription: Subscription) -> None:
        self._call = call
        self._subscription = subscription
        self._is_block = False

    def __enter__(self) -> Self:
        """Wait until the relay has confirmed the subscription; raises what `Subscription` does."""
        self._is_block = True
        self._call(self._subscription.__aenter__)
        return self

    def __exit__(self, *exception: object) -> None:
        self.unsubscribe()

    def __iter__(self) -> Iterator[Message]:
        try:
            while True:
                try:
                    message = self.__next__()
                except StopIteration:
                    return
                yield message
        finally:
            if not self._is_block:
                self.unsubscribe()

    def __next__(self) -> Message:
        """Return the next message; raises what `Subscription` does."""
        try:
            message = self._call(self._next)
        except _ClosedError:
            message = None
        if message is None:
            raise StopIteration
        return message

    def unsubscribe(self) -> None:
        """End the subscription: no further message is returned."""
        with suppress(_ClosedError):
            self._call(self._unsubscribe)

    async def _next(self) -> Message | None:
        # A future can't raise StopAsyncIteration.
        return await anext(self._subscription, None)

    async def _unsubscribe(self) -> None:
        self._subscription.unsubscribe()


class _Call:
    """Run coroutines in an event loop of its own, in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._process_id = os.getpid()
        self._is_ended = False
        self._order = threading.Lock()  # no call is passed to the loop after it was stopped
        self._thread = threading.Thread(
            target=self._run, name="websocket-relay-client", daemon=True
        )
        self._thread.start()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()

    def __call__(self, function: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Run a coroutine; when the wait for it is interrupted, cancel it."""
        if os.getpid() != self._process_id:
            raise RuntimeError("the client was connected before a fork: connect it in this process")
        with self._order:
            if self._is_ended:
                raise _ClosedError(CLOSED)
            future = asyncio.run_coroutine_threadsafe(function(), self._loop)
        try:
            return future.result()
        except CancelledError:  # by the end of the loop
            raise _ClosedError(CLOSED) from None
        except BaseException:
            future.cancel()
            raise

    def end(self) -> None:
        """Cancel the calls of other threads, and end the thread."""
        with self._order:
            self._is_ended = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(END_TIMEOUT_S)


class SyncRelay:
    """A client of a relay for programs without asyncio. It has the guarantees of `Relay`.

    Args:
        url: the relay's URL, or those of its replicas.
        options: those of `Relay`.
    """

    def __init__(self, url: str | Sequence[str], **options: Unpack[RelayOptions]) -> None:
        self._relay = Relay(url, **options)
        self._call: _Call | None = None

    @property
    def channel(self) -> str:
        """The channel in the (first) URL; `default` if it has none."""
        return self._relay.channel

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(CLOSE_TIMEOUT_S if kind is None else 0.0)

    def connect(self) -> None:
        """Start the thread and connect; `close` ends both. The same as entering a `with` block.

        Raises:
            InvalidUrlError, RejectedError, UnavailableError: see `Relay`.
            RuntimeError: the client was connected before.
        """
        if self._call is not None:
            raise RuntimeError("the client was connected before: make a new one")
        self._call = _Call()
        try:
            self._call(self._relay.__aenter__)
        except BaseException:
            self._call.end()
            raise

    def publish(self, channel: str, data: Data) -> str:
        """Publish a message; return its position. Raises what `Relay.publish` does."""
        return self._run(lambda: self._relay.publish(channel, data))

    def subscribe(
        self,
        channel: str,
        *,
        since: str = "",
        history: int = 0,
        echo: bool = True,
        follow: bool = True,
    ) -> SyncSubscription:
        """Subscribe to a channel, with the arguments and errors of `Relay.subscribe`."""

        async def subscribe() -> Subscription:
            return self._relay.subscribe(
                channel, since=since, history=history, echo=echo, follow=follow
            )

        subscription = self._run(subscribe)
        assert self._call is not None
        return SyncSubscription(self._call, subscription)

    def renew_token(self) -> None:
        """Replace the token of the connection. Raises what `Relay.renew_token` does."""
        self._run(self._relay.renew_token)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Close as `Relay.close` does, and end the thread. Loops over subscriptions end.

        Args:
            timeout_s: the limit of the wait for answers.
        """
        if self._call is None:
            return
        try:
            self._call(lambda: self._relay.close(timeout_s))
        except _ClosedError:
            return
        self._call.end()

    def _run(self, function: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        if self._call is None:
            raise RuntimeError("the client is not connected: use it in `with`")
        return self._call(function)
