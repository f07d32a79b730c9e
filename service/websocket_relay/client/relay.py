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
from dataclasses import dataclass
from functools import partial
from inspect import isawaitable
from typing import Self

from websocket_relay.backoff import backoff
from websocket_relay.cancellation import cancel_until_done
from websocket_relay.client.connection import RelayConnection, connect_to_relay
from websocket_relay.client.errors import (
    ClosedError,
    Failure,
    RejectedError,
    UnavailableError,
    UnconfirmedError,
    error_in,
)
from websocket_relay.client.events import (
    Connected,
    Data,
    Disconnected,
    Event,
    Header,
    PresenceEvent,
    encoded,
)
from websocket_relay.client.subscription import Subscription
from websocket_relay.client.tokens import Token, expiry_of
from websocket_relay.client.url import RelayUrl
from websocket_relay.outcomes import Close
from websocket_relay.trust import verifying_context

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""The first and the longest upper bound of the delay between two attempts to connect."""

BACKOFF_RESET_S = 10.0
"""A connection that lasted longer resets the backoff."""

RENEWAL_MARGIN_S = 30.0
"""A token is renewed so long before it expires, but not in the first half of its time."""

LAST_RENEWAL_S = 1.0
"""A token that expires so soon is not renewed: the next connection has a new one."""

CLOSE_TIMEOUT_S = 10.0


@dataclass(slots=True, eq=False)
class _PendingCommand:
    """A command that is sent on each connection until it is answered.

    Attributes:
        header: with the type and the id.
        payload: of a publish.
        answer: the header of the relay's answer.
        seen: the last position that was received before it was sent; empty: it was never sent.
    """

    header: Header
    payload: Data
    answer: asyncio.Future[Header]
    seen: str = ""


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
        max_unread_bytes: limit of the unread messages of each subscription.
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
        start_patience_s: float = 30.0,  # a program and its relay are often started together
        patience_s: float = math.inf,
        max_unread_bytes: int = 1_048_576,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        urls = [RelayUrl.parse(each) for each in ([url] if isinstance(url, str) else url)]
        self.channel = urls[0].channel
        self._urls = itertools.cycle(urls)
        self._token = token
        context = (ssl or verifying_context()) if any(each.is_secure for each in urls) else None
        self._open = partial(connect_to_relay, context=context, uses_proxy=uses_proxy)
        self._start_patience_s = start_patience_s
        self._patience_s = patience_s
        self._max_unread_bytes = max_unread_bytes
        self._on_event = on_event

        self._backoff = backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
        self._ids = itertools.count(1)
        self._session = ""
        self._position = ""  # the highest that was received
        self._pending: dict[int, _PendingCommand] = {}  # by the id, which grows
        self._subscriptions: dict[str, Subscription] = {}
        self._token_expiry: float | None = None
        self._connection: RelayConnection | None = None
        self._unusable: Exception | None = RuntimeError(
            "the client is not connected: use it in `async with`"
        )
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
        connection = await self._connect(self._start_patience_s)
        self._unusable = None
        self._task = asyncio.create_task(self._run(connection))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        await self.close(CLOSE_TIMEOUT_S if kind is None else 0.0)

    def subscribe(
        self,
        channel: str,
        *,
        since: str = "",
        history: int = 0,
        echo: bool = True,
        follow: bool = True,
        presence: bool = False,
        on_presence: Callable[[PresenceEvent], None] = lambda _: None,
    ) -> Subscription:
        """Subscribe to a channel. The command is sent before those of later calls.

        Args:
            channel: the name of the channel.
            since: the position after which to start; empty: with new messages.
            history: number of past messages to start with, where `since` is empty.
            echo: whether the messages that this client publishes are delivered.
            follow: whether to continue after the replay; False ends the iteration there.
            presence: whether to receive who is in the channel.
            on_presence: called with each change of that.

        Raises:
            RuntimeError: the client is subscribed to the channel already, not connected, or closed.
            RelayError: the client has given up.
        """
        self._raise_unusable()
        if channel in self._subscriptions:
            raise RuntimeError(f"already subscribed to {channel!r}")
        options: Header = {"since": since} if since else {"history": history}
        if presence:
            options["presence"] = True
        subscription = self._subscriptions[channel] = Subscription(
            {"type": "subscribe", "channel": channel, "echo": echo, **options},
            self._send_command,
            self._subscriptions.pop,
            follow=follow,
            max_unread_bytes=self._max_unread_bytes,
            on_presence=on_presence,
        )
        subscription.start()
        return subscription

    async def publish(self, channel: str, data: Data) -> str:
        """Publish a message; return its position, once the relay has answered.

        A call that is cancelled before its message was sent publishes nothing.

        Raises:
            TypeError, UnicodeEncodeError: the data is not a valid message.
            RuntimeError: the client is not connected yet, or was closed.
            RejectedError: the relay refuses the message, or rejects the client.
            UnavailableError: the relay can't publish it now, or was unavailable for `patience_s`.
            UnconfirmedError: the message may or may not have been published.
        """
        if not isinstance(data, str | bytes):
            raise TypeError(f"a message is str or bytes, not {type(data).__name__}")
        encoded(data)  # raises if it is not valid text
        answer = await self._request({"type": "publish", "channel": channel}, data)
        return str(answer["position"])

    async def renew_token(self) -> None:
        """Replace the token of the connection by a new one, without reconnecting.

        The client does this by itself before a JSON Web Token expires.

        Raises:
            RejectedError: the relay refuses the token; the previous one still counts.
            RelayError: the client has given up.
        """
        token = await self._new_token()
        await self._request({"type": "token", "token": token})
        self._token_expiry = expiry_of(token)

    async def wait_closed(self) -> None:
        """Wait until the client is closed.

        Raises:
            RelayError: the client has given up.
        """
        if self._task is not None:
            await asyncio.wait([self._task])
        with suppress(ClosedError):
            self._raise_unusable()

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """End all subscriptions, wait for the answers to all messages, and disconnect.

        Args:
            timeout_s: the limit of all this. A message without an answer is unconfirmed then.
        """
        if self._task is None:
            return
        error = self._unusable = self._unusable or ClosedError()
        for subscription in list(self._subscriptions.values()):
            subscription.end()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    if self._pending:
                        await asyncio.wait([each.answer for each in self._pending.values()])
                    if self._connection is not None:
                        await self._connection.close()
        finally:
            await cancel_until_done(self._task)
            self._fail_pending(str(error), error)

    def _raise_unusable(self) -> None:
        if self._unusable is not None:
            raise self._unusable

    # All connections

    async def _run(self, connection: RelayConnection) -> None:
        """Use one connection after another, until the client is closed or gives up."""
        try:
            while True:
                connected_at = time.monotonic()
                end = await self._use(connection)
                if self._unusable is not None and not self._unanswered():
                    return  # closed
                if isinstance(end, RejectedError):
                    raise end
                if end.code == Close.MESSAGE_TOO_BIG.code:
                    self._reject_largest(str(end))
                if time.monotonic() - connected_at > BACKOFF_RESET_S:
                    self._backoff = backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
                await self._wait_before_retry(end)
                connection = await self._connect(self._patience_s)
        except Exception as error:  # noqa: BLE001 - the task's edge: all calls raise it
            self._unusable = error
            self._fail_pending(str(error), error)
            for subscription in list(self._subscriptions.values()):
                subscription.end(error)

    async def _connect(self, patience_s: float) -> RelayConnection:
        """Try until connected."""
        deadline = time.monotonic() + patience_s
        while True:
            token = await self._new_token()
            self._token_expiry = expiry_of(token)
            seen = next((pending.seen for pending in self._unanswered()), "") or self._position
            url = next(self._urls).with_session(self._session, seen)
            try:
                connection = await self._open(url, token)
            except UnavailableError as error:
                await self._wait_before_retry(error, deadline)
            else:
                self._start(connection)
                return connection

    async def _new_token(self) -> str:
        token = self._token() if callable(self._token) else self._token
        return await token if isawaitable(token) else token

    async def _wait_before_retry(self, error: UnavailableError, deadline: float = math.inf) -> None:
        """Wait as long as the relay asks, or else as the backoff; not beyond the deadline."""
        asked_s = error.retry_after_s
        wait_s = next(self._backoff) if asked_s is None else min(asked_s, LONGEST_WAIT_S)
        if time.monotonic() + wait_s > deadline:
            raise error
        self._on_event(Disconnected(str(error), wait_s))
        await asyncio.sleep(wait_s)

    def _reject_largest(self, reason: str) -> None:
        """Reject the largest message that was sent: one of them is over the relay's limit."""
        sent = [pending for pending in self._unanswered() if pending.seen]
        if sent:
            largest = max(sent, key=lambda pending: len(encoded(pending.payload)))
            largest.answer.set_exception(RejectedError(reason))

    # One connection

    def _start(self, connection: RelayConnection) -> None:
        """Continue on a new connection: send what is not answered, then new commands."""
        self._session = connection.session
        if not connection.is_resumed:
            self._fail_pending("the relay no longer knows the session")
            self._position = ""  # the log may be another one
        self._position = max(self._position, connection.position, key=_numbers)
        self._connection = connection
        for subscription in self._subscriptions.values():
            subscription.start()
        for pending in self._unanswered():
            self._send_pending(pending)

    async def _use(self, connection: RelayConnection) -> Failure:
        """Send and receive until the connection ends; return the cause."""
        renewing = asyncio.create_task(self._renew_tokens())
        try:
            self._on_event(Connected(connection.is_resumed))
            return await connection.run(self._on_received)
        finally:
            self._connection = None
            for subscription in self._subscriptions.values():
                subscription.on_disconnected()
            await cancel_until_done(renewing)

    async def _renew_tokens(self) -> None:
        """Renew the token before it expires. If that fails, the next connection has a new one."""
        while callable(self._token) and self._token_expiry is not None:
            left_s = self._token_expiry - time.time()
            if left_s < LAST_RENEWAL_S:
                return
            await asyncio.sleep(max(left_s - RENEWAL_MARGIN_S, left_s / 2))
            with suppress(Exception):  # of the user's function, too; the old token still counts
                await self.renew_token()

    # Commands

    async def _request(self, header: Header, payload: Data = "") -> Header:
        """Send a command on each connection until it is answered; return the answer."""
        self._raise_unusable()
        id_ = next(self._ids)
        answer: asyncio.Future[Header] = asyncio.get_running_loop().create_future()
        pending = _PendingCommand({**header, "id": id_}, payload, answer)
        self._send_pending(pending)
        self._pending[id_] = pending
        try:
            answered = await answer
        finally:
            del self._pending[id_]
        if answered["type"] == "error":
            raise error_in(answered)
        return answered

    def _send_pending(self, pending: _PendingCommand) -> None:
        if self._connection is not None:
            pending.seen = pending.seen or self._position
            self._connection.enqueue(pending.header, pending.payload)

    def _send_command(self, header: Header) -> int:
        """Send a command on the present connection only; return its id, 0 if there is none."""
        if self._connection is None:
            return 0
        id_ = next(self._ids)
        self._connection.enqueue({**header, "id": id_})
        return id_

    def _unanswered(self) -> list[_PendingCommand]:
        return [pending for pending in self._pending.values() if not pending.answer.done()]

    def _fail_pending(self, reason: str, unsent: Exception | None = None) -> None:
        """Fail each message that was sent: it may or may not be published.

        Args:
            reason: the cause.
            unsent: fails all other commands, too; None: they stay.
        """
        for pending in self._unanswered():
            if pending.seen and pending.header["type"] == "publish":
                pending.answer.set_exception(UnconfirmedError(reason))
            elif unsent is not None:
                pending.answer.set_exception(unsent)

    def _on_received(self, header: Header, payload: Data) -> None:
        if position := header.get("position"):
            # Those of a replay are lower.
            self._position = max(self._position, position, key=_numbers)
        if pending := self._pending.get(header.get("id", 0)):
            if not pending.answer.done():  # else the caller was cancelled
                pending.answer.set_result(header)
        elif header.get("type") == "error":  # of `subscribe`: it has the id, and not the channel
            for each in list(self._subscriptions.values()):
                each.on_received(header, payload)
        elif subscription := self._subscriptions.get(header.get("channel", "")):
            subscription.on_received(header, payload)


def _numbers(position: str) -> tuple[int, ...]:
    return tuple(map(int, position.split("-"))) if position else ()
