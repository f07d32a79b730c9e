"""Publish to channels and subscribe to them, over one connection after another. Knows no frame.

Guarantees:

- Receive: each message once, in the one order of its channel, as long as the relay's history still
  has the messages between two connections. Where it has not, or the relay's log lost messages, the
  next message has `Message.after_gap`.
- Publish: exactly once. After a broken connection the client resumes its session, and sends what is
  not answered again, with the same ids. Only where the relay no longer knows the session, or the
  client gives up, a message is unconfirmed: it is published once or not at all.
"""

import asyncio
import itertools
import math
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import isawaitable
from types import TracebackType
from typing import Self

from websocket_relay.backoff import backoff
from websocket_relay.cancellation import cancel_until_done
from websocket_relay.client.connection import (
    ConnectionEnd,
    Received,
    RelayConnection,
    connect_to_relay,
)
from websocket_relay.client.errors import RejectedError, UnavailableError, UnconfirmedError
from websocket_relay.client.events import Connected, Data, Disconnected, Event
from websocket_relay.client.outbox import Outbox, PendingPublish
from websocket_relay.client.subscription import Subscription
from websocket_relay.client.tokens import Token, authorization, expiry_of
from websocket_relay.client.url import RelayUrl
from websocket_relay.trust import verifying_context

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""The first and the longest upper bound of the delay between two attempts to connect."""

BACKOFF_RESET_S = 10.0
"""A connection that lasted longer resets the backoff."""

RENEWAL_MARGIN_S = 30.0
"""A token is renewed so long before it expires, but not in the first half of its time."""

MAX_PENDING_BYTES = 1_048_576
MAX_UNREAD_BYTES = 1_048_576
MAX_MESSAGE_BYTES = 67_108_864
CLOSE_TIMEOUT_S = 10.0
START_PATIENCE_S = 30.0
"""A program and its relay are often started together."""

CLOSED = "the client was closed"
ANSWERS = frozenset({"published", "subscribed", "token", "error"})
UNCONFIRMED_STATUS = 504


class Relay:
    """A client of a relay: any number of channels on one connection.

    Args:
        url: the relay's URL, or those of its replicas: each attempt to connect uses the next one.
        token: a bearer token, or a function that returns one, which is called for each connection
            and before its token expires.
        ssl: verifies the certificate of a wss:// relay; None: the system's authorities.
        uses_proxy: connect through the proxy that the environment names; False: directly.
        start_patience_s: how long to try to connect the first time; 0: one attempt.
        patience_s: how long to try to reconnect.
        max_pending_bytes: limit of unanswered messages; `publish` waits while it is exceeded.
        max_unread_bytes: limit of the unread messages of each subscription.
        max_message_bytes: a larger message is neither published nor accepted.
        on_event: called when the state of the connection changes.

    Attributes:
        channel: the channel in the (first) URL; `default` if it has none.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        token: Token = "",
        ssl: ssl.SSLContext | None = None,
        uses_proxy: bool = True,
        start_patience_s: float = START_PATIENCE_S,
        patience_s: float = math.inf,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        max_unread_bytes: int = MAX_UNREAD_BYTES,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        urls = [RelayUrl.parse(each) for each in ([url] if isinstance(url, str) else url)]
        self.channel = urls[0].channel
        self._urls = itertools.cycle(urls)
        self._token = token
        is_secure = any(each.is_secure for each in urls)
        self._ssl = (ssl or verifying_context()) if is_secure else None
        self._uses_proxy = uses_proxy
        self._start_patience_s = start_patience_s
        self._patience_s = patience_s
        self._max_unread_bytes = max_unread_bytes
        self._max_message_bytes = max_message_bytes
        self._on_event = on_event

        self._backoff = backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
        self._ids = itertools.count(1)
        self._session = ""
        self._position = ""  # the highest that was received, and its numbers
        self._position_numbers: tuple[int, ...] = ()
        self._outbox = Outbox(max_pending_bytes)
        self._publish_order = asyncio.Lock()
        self._subscriptions: dict[str, Subscription] = {}
        self._on_answer: dict[int, Callable[[Received], None]] = {}  # by the id of the command
        self._token_expiry: float | None = None
        self._connection: RelayConnection | None = None
        self._was_connected = False  # at least once
        self._is_closing = False
        self._changed = asyncio.Event()  # set, and replaced, when anything above changes
        self._fault: Exception | None = None
        self._task: asyncio.Task[None] | None = None

    # Public interface

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            InvalidUrlError: the token is invalid.
            RejectedError: the relay rejects the client.
            UnavailableError: no connection within `start_patience_s`.
            RuntimeError: the client was connected before.
        """
        if self._task is not None:
            raise RuntimeError("the client was connected before: make a new one")
        self._task = asyncio.create_task(self._run())
        try:
            await self._wait_until(lambda: self._was_connected)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            await self.close()
        else:
            await self._stop()

    def subscribe(
        self,
        channel: str,
        *,
        since: str = "",
        history: int = 0,
        echo: bool = True,
        follow: bool = True,
    ) -> Subscription:
        """Subscribe to a channel. The command is sent before those of later calls.

        Args:
            channel: the name of the channel.
            since: the position after which to start; empty: with new messages.
            history: number of past messages to start with, where `since` is empty.
            echo: whether the messages that this client publishes are delivered.
            follow: whether to continue after the replay; False ends the iteration there.

        Raises:
            RuntimeError: the client is subscribed to the channel already, not connected, or closed.
            RelayError: the client has given up.
        """
        self._raise_unusable()
        if channel in self._subscriptions:
            raise RuntimeError(f"already subscribed to {channel!r}")
        subscription = self._subscriptions[channel] = Subscription(
            channel,
            self._send_command,
            self._subscriptions.pop,
            since=since,
            history=history,
            echo=echo,
            follow=follow,
            max_unread_bytes=self._max_unread_bytes,
        )
        subscription.start()
        return subscription

    async def publish(self, channel: str, data: Data) -> str:
        """Publish a message; return its position, once the relay has answered.

        Waits while more than `max_pending_bytes` are unanswered. A call that is cancelled before
        its message was sent publishes nothing.

        Raises:
            TypeError, UnicodeEncodeError: the data is not a valid message.
            ValueError: the message is larger than `max_message_bytes`.
            RuntimeError: the client is not connected yet, or was closed.
            RejectedError: the relay refuses the message, or rejects the client.
            UnavailableError: the relay can't publish it now, or was unavailable for `patience_s`.
            UnconfirmedError: the message may or may not have been published.
        """
        if not isinstance(data, str | bytes):
            raise TypeError(f"a message is str or bytes, not {type(data).__name__}")
        payload = data if isinstance(data, bytes) else data.encode()
        if len(payload) > self._max_message_bytes:
            raise ValueError(f"a message has at most {self._max_message_bytes:,} bytes")
        async with self._publish_order:
            self._raise_unusable()
            await self._wait_until(
                lambda: self._is_closing or self._outbox.has_capacity_for(payload)
            )
            self._raise_unusable()
            answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            pending = PendingPublish(
                next(self._ids), channel, payload, isinstance(data, str), answer
            )
            self._outbox.append(pending)
            self._send_publish(pending)
        try:
            return await answer
        except asyncio.CancelledError:
            if not pending.seen:
                self._outbox.pop(pending.id)
                self._notify_waiters()
            raise

    async def renew_token(self) -> None:
        """Replace the token of the connection by a new one, without reconnecting.

        The client does this by itself before a JSON Web Token expires.

        Raises:
            RejectedError: the relay refuses the token; the previous one still counts.
            RelayError: the client has given up.
        """
        token = await self._new_token()
        authorization(token)  # raises if it is invalid
        self._raise_unusable()
        answers: list[Received] = []
        connection = self._connection
        if self._send_command("token", answers.append, token=token):
            # The next connection has a new token.
            await self._wait_until(lambda: answers or self._connection is not connection)
        for answer in answers:
            if answer.type == "error":
                raise answer.error
            self._token_expiry = expiry_of(token)

    async def wait_closed(self) -> None:
        """Wait until the client is closed.

        Raises:
            RelayError: the client has given up.
        """
        await self._wait_until(lambda: self._is_closing)

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """End all subscriptions, wait for the answers to all messages, and disconnect.

        Args:
            timeout_s: the limit of all this. A message without an answer is unconfirmed then.
        """
        self._is_closing = True
        for subscription in list(self._subscriptions.values()):
            subscription.end()
        self._notify_waiters()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._wait_until(lambda: not len(self._outbox) or self._fault)
                    if self._connection is not None:
                        await self._connection.close()
        finally:
            await self._stop()

    # Waiting for a change of state

    def _notify_waiters(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _raise_unusable(self) -> None:
        if self._task is None:
            raise RuntimeError("the client is not connected: use it in `async with`")
        if self._fault is not None:
            raise self._fault
        if self._is_closing:
            raise RuntimeError(CLOSED)

    async def _wait_until(self, condition: Callable[[], object]) -> None:
        while not condition():
            if self._fault is not None:
                raise self._fault
            await self._changed.wait()

    async def _stop(self) -> None:
        self._is_closing = True
        if self._task is not None:
            await cancel_until_done(self._task)
        self._settle_all(RuntimeError(CLOSED))

    def _settle_all(self, error: Exception) -> None:
        """End everything that waits for the relay: there is no further connection."""
        self._outbox.abandon(str(error), error)
        for subscription in list(self._subscriptions.values()):
            subscription.end(None if self._is_closing else error)
        self._notify_waiters()

    # All connections

    async def _run(self) -> None:
        try:
            await self._run_connections()
        except Exception as fault:  # noqa: BLE001 - the task's edge: all calls raise it
            self._fault = fault
            self._settle_all(fault)

    async def _run_connections(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            connection = await self._connect()
            connected_at = clock()
            end = await self._run_connection(connection)
            if self._is_closing and not len(self._outbox):
                return
            rejection = end.rejection
            if end.token_expired and not callable(self._token):
                rejection = RejectedError(end.reason)
            if end.message_too_big and not self._reject_largest(end.reason):
                rejection = RejectedError(end.reason)
            if rejection is not None:
                raise rejection
            if clock() - connected_at > BACKOFF_RESET_S:
                self._backoff = backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
            await self._wait_before_retry(end.reason, self._delay_s(end.retry_after_s))

    async def _connect(self) -> RelayConnection:
        """Try until connected."""
        clock = asyncio.get_running_loop().time
        patience_s = self._patience_s if self._was_connected else self._start_patience_s
        deadline = clock() + patience_s
        while True:
            try:
                return await self._connect_once()
            except UnavailableError as error:
                wait_s = self._delay_s(error.retry_after_s)
                if clock() + wait_s > deadline:
                    raise
                await self._wait_before_retry(str(error), wait_s)

    async def _connect_once(self) -> RelayConnection:
        token = await self._new_token()
        headers = authorization(token)
        self._token_expiry = expiry_of(token)
        url = next(self._urls)
        seen = self._outbox.oldest_seen or self._position
        return await connect_to_relay(
            url.with_session(self._session, seen),
            headers,
            self._ssl if url.is_secure else None,
            self._max_message_bytes,
            uses_proxy=self._uses_proxy,
        )

    async def _new_token(self) -> str:
        token = self._token() if callable(self._token) else self._token
        return await token if isawaitable(token) else token

    def _delay_s(self, retry_after_s: float | None) -> float:
        """Return the reconnect delay: the relay's, or else that of the backoff."""
        if retry_after_s is not None:
            return min(retry_after_s, LONGEST_WAIT_S)
        return next(self._backoff)

    async def _wait_before_retry(self, reason: str, wait_s: float) -> None:
        self._on_event(Disconnected(reason, wait_s))
        await asyncio.sleep(wait_s)

    def _reject_largest(self, reason: str) -> bool:
        """Reject the largest message that was sent; return whether there was one.

        The relay closed the connection because one of them is over its limit. So the largest is.
        """
        largest = self._outbox.largest_sent
        if largest is not None:
            self._outbox.pop(largest.id)
            largest.fail(RejectedError(reason))
        return largest is not None

    # One connection

    async def _run_connection(self, connection: RelayConnection) -> ConnectionEnd:
        """Receive and send until the connection ends."""
        welcome = connection.welcome
        self._session = welcome.session
        if not welcome.is_resumed:
            self._outbox.abandon("the relay no longer knows the session")
            self._position_numbers = ()  # the log may be another one
        self._on_position(welcome.position)
        self._connection = connection
        self._was_connected = True
        for subscription in self._subscriptions.values():
            subscription.start()
        for pending in self._outbox:
            self._send_publish(pending)
        self._notify_waiters()
        renewing = asyncio.create_task(self._renew_tokens())
        try:
            self._on_event(Connected(welcome.is_resumed))
            return await connection.run(self._on_received)
        finally:
            self._connection = None
            connection.close_nowait()
            for subscription in self._subscriptions.values():
                subscription.on_disconnected()
            self._on_answer.clear()
            self._notify_waiters()
            await cancel_until_done(renewing)

    async def _renew_tokens(self) -> None:
        """Renew the token before it expires; if that fails, the next connection has a new one."""
        while callable(self._token) and (expiry := self._token_expiry) is not None:
            left_s = expiry - time.time()
            if left_s <= 0:
                return
            await asyncio.sleep(max(left_s - RENEWAL_MARGIN_S, left_s / 2))
            if self._token_expiry != expiry:
                continue  # the program has renewed it
            try:
                await self.renew_token()
            except Exception:  # noqa: BLE001 - of the user's function, too; the old token counts
                return
            if self._token_expiry == expiry:
                return  # there is no newer token yet

    def _send_publish(self, pending: PendingPublish) -> None:
        if self._connection is None:
            return
        pending.seen = pending.seen or self._position
        header = {"type": "publish", "channel": pending.channel, "id": pending.id}
        self._connection.enqueue(header, pending.payload, is_text=pending.is_text)

    def _send_command(
        self, kind: str, on_answer: Callable[[Received], None] | None = None, **fields: object
    ) -> int:
        """Send a command on the present connection; return its id, 0 if there is none."""
        if self._connection is None:
            return 0
        id_ = next(self._ids)
        self._connection.enqueue({"type": kind, "id": id_, **fields})
        if on_answer is not None:
            self._on_answer[id_] = on_answer
        return id_

    def _on_position(self, position: str) -> None:
        """Keep the highest position: those of a replay are lower."""
        numbers = tuple(map(int, position.split("-")))
        if numbers > self._position_numbers:
            self._position, self._position_numbers = position, numbers

    def _on_received(self, received: Received) -> None:
        if received.position:
            self._on_position(received.position)
        if received.type in ANSWERS:
            if pending := self._outbox.pop(received.id):
                _settle(pending, received)
            elif on_answer := self._on_answer.pop(received.id, None):
                on_answer(received)
            self._notify_waiters()
        elif subscription := self._subscriptions.get(received.fields.get("channel", "")):
            subscription.on_received(received)


def _settle(pending: PendingPublish, received: Received) -> None:
    """Pass the answer to a publish to its caller."""
    if received.type != "error":
        if not pending.answer.done():
            pending.answer.set_result(received.position)
    elif received.fields.get("status") == UNCONFIRMED_STATUS:
        pending.fail(UnconfirmedError(1, str(received.error)))
    else:
        pending.fail(received.error)
