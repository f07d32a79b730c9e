"""The client for programs without asyncio: one event loop in one daemon thread. Knows no protocol.

Each call runs in that loop, and the calling thread waits for it. So several threads may use one
client, and Ctrl-C interrupts a call. The thread does not survive a fork: connect in the process
that uses the client.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from websocket_relay.client.errors import ClosedError
from websocket_relay.client.events import Data, Member, Message
from websocket_relay.client.relay import CLOSE_TIMEOUT_S, Relay
from websocket_relay.client.subscription import Subscription

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

END_TIMEOUT_S = 1.0
"""Limit of the end of the thread, after the client was closed."""


def _with_parameters_of(
    method: Callable[Concatenate[Any, Parameters], object],
) -> Callable[[Callable[..., Result]], Callable[Concatenate[Any, Parameters], Result]]:
    """Give a method the parameters and the documentation of another class's method."""
    return wraps(method)


class SyncRelay:
    """A client of a relay for programs without asyncio. It has the guarantees of `Relay`.

    Its arguments are those of `Relay`. Functions among them are called in the client's thread.

    Attributes:
        channel: the channel in the (first) URL; `default` if it has none.
    """

    @_with_parameters_of(Relay.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        self._relay = Relay(*args, **options)
        self.channel = self._relay.channel
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process_id = 0  # the process of the loop's thread
        self._is_ended = False
        self._order = threading.Lock()  # no call is passed to the loop after it was stopped

    def connect(self) -> Self:
        """Start the thread and connect; `close` ends both. The same as entering a `with` block.

        Raises:
            InvalidUrlError, RejectedError, UnavailableError: see `Relay`.
            RuntimeError: the client was connected before.
        """
        if self._loop is not None:
            raise RuntimeError("the client was connected before: make a new one")
        self._loop = asyncio.new_event_loop()
        self._process_id = os.getpid()
        self._thread = threading.Thread(
            target=_run, args=[self._loop], name="websocket-relay-client", daemon=True
        )
        self._thread.start()
        try:
            self._call(self._relay.__aenter__)
        except BaseException:
            self._end_thread()
            raise
        return self

    __enter__ = connect

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.close(CLOSE_TIMEOUT_S if kind is None else 0.0)

    def publish(self, channel: str, data: Data) -> str:
        """Publish a message; return its position. Raises what `Relay.publish` does."""
        return self._call(lambda: self._relay.publish(channel, data))

    @_with_parameters_of(Relay.subscribe)
    def subscribe(self, *args: Any, **options: Any) -> "SyncSubscription":
        async def subscribe() -> Subscription:
            return self._relay.subscribe(*args, **options)

        return SyncSubscription(self._call, self._call(subscribe))

    def renew_token(self) -> None:
        """Replace the token of the connection. Raises what `Relay.renew_token` does."""
        self._call(self._relay.renew_token)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Close as `Relay.close` does, and end the thread. Loops over subscriptions end.

        Args:
            timeout_s: the limit of the wait for answers.
        """
        if self._loop is not None:
            with suppress(ClosedError):  # it was closed before
                self._call(lambda: self._relay.close(timeout_s))
                self._end_thread()

    def _call(self, function: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Run a coroutine in the thread; when the wait for it is interrupted, cancel it."""
        if self._loop is None:
            raise RuntimeError("the client is not connected: use it in `with`")
        if os.getpid() != self._process_id:
            raise RuntimeError("the client was connected before a fork: connect it in this process")
        with self._order:
            if self._is_ended:
                raise ClosedError
            future = asyncio.run_coroutine_threadsafe(function(), self._loop)
        try:
            return future.result()
        except CancelledError:  # by the end of the loop
            raise ClosedError from None
        finally:
            future.cancel()

    def _end_thread(self) -> None:
        """End the thread; that cancels the calls of other threads."""
        assert self._loop is not None
        with self._order:
            if not self._is_ended:
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._is_ended = True
        self._thread.join(END_TIMEOUT_S)


class SyncSubscription:
    """The messages of one channel: an iterator and a context manager.

    A loop over it ends the subscription when it is left; inside of `with` the block does.
    """

    def __init__(self, call: Callable[..., Any], subscription: Subscription) -> None:
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
            yield from iter(self.__next__, None)
        finally:
            if not self._is_block:
                self.unsubscribe()

    def __next__(self) -> Message:
        """Return the next message; raises what `Subscription` does."""
        try:
            message: Message = self._call(self._subscription.__anext__)
        except (StopAsyncIteration, ClosedError):
            raise StopIteration from None
        return message

    @property
    def members(self) -> dict[str, Member] | None:
        """A copy of the clients in the channel; None: not known, or they are too many."""
        members = self._subscription.members
        return None if members is None else dict(members)

    @property
    def count(self) -> int | None:
        """The number of clients in the channel; None: not known."""
        return self._subscription.count

    def unsubscribe(self) -> None:
        """End the subscription: no further message is returned."""
        with suppress(ClosedError):
            self._call(self._subscription.__aexit__)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.get_loop().run_forever()
