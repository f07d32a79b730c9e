"""Receive one channel and send to it, over as many connections as needed. Knows no frame.

Guarantees:

- Receive: each message once, in the channel's one order, as long as the relay's history still has
  the messages between two connections. Where it has not, or the relay's log lost messages, the
  next message has `Message.after_gap`.
- Send: in order, and never again what is known to have been relayed. A message is confirmed when
  its echo arrives. After a connection has ended, the client looks for the missing echoes among the
  messages that the relay replays. Some closes settle the question: a close for a limit comes after
  the echoes of everything that was relayed, a drain means that everything is relayed. Any other
  message is unconfirmed: it is abandoned, so that it is relayed at most once, or, with `repeats`,
  sent again, so that it is relayed at least once.
"""

import asyncio
import contextlib
import math
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from inspect import isawaitable
from types import TracebackType
from typing import Self

from websockets.exceptions import ConnectionClosed

from websocket_relay.backoff import backoff
from websocket_relay.cancellation import cancel_until_done
from websocket_relay.client.connection import (
    ConnectionEnd,
    Data,
    RelayConnection,
    connect_to_relay,
    connection_end_of,
    is_gap,
)
from websocket_relay.client.errors import RejectedError, UnavailableError, UnconfirmedError
from websocket_relay.client.events import Connected, Disconnected, Event, Message, Unconfirmed
from websocket_relay.client.outbox import MESSAGE_BYTES, Outbox, size_of
from websocket_relay.client.url import ChannelUrl, authorization
from websocket_relay.trust import verifying_context

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
"""The first and the longest upper bound of the delay between two attempts to connect."""

BACKOFF_RESET_S = 10.0
"""A connection that lasted longer resets the backoff."""

QUIET_ROUNDS, QUIET_S = 2, 0.05
REPLAY_TIMEOUT_S = 2.0
"""The client waits for echoes among the replayed messages until two rounds of ping and pong brought
no message, and on a channel that is never quiet for this time."""

MAX_PENDING_BYTES = 1_048_576
MAX_WAITING_BYTES = 4_194_304
MAX_MESSAGE_BYTES = 67_108_864
CLOSE_TIMEOUT_S = 10.0
START_PATIENCE_S = 30.0
"""A program and its relay are often started together."""

Token = str | Callable[[], str | Awaitable[str]]


class Relay:
    """A client of one channel, and the async iterator over its messages.

    Args:
        url: the channel's URL; `since` or `history` in its query apply.
        token: a bearer token, or a function that returns one and is called before each connection.
        ssl: verifies the certificate of a wss:// relay; None: the system's authorities.
        uses_proxy: connect through the proxy that the environment names; False: directly.
        since: the position after which to start; empty: with new messages.
        history: number of past messages to start with, where `since` is empty.
        listens: False discards received messages: for a client that only publishes.
        repeats: send unconfirmed messages again; some may be relayed twice.
        start_patience_s: how long to try to connect the first time; 0: one attempt.
        patience_s: how long to try to reconnect.
        max_pending_bytes: limit of unconfirmed messages; `send` waits while it is exceeded.
        max_waiting_bytes: limit of received messages that are not read yet; above it the client
            pauses reading from the network.
        max_message_bytes: a larger message is neither sent nor accepted.
        on_event: called when the state of the connection changes.
    """

    def __init__(
        self,
        url: str,
        *,
        token: Token = "",
        ssl: ssl.SSLContext | None = None,
        uses_proxy: bool = True,
        since: str = "",
        history: int = 0,
        listens: bool = True,
        repeats: bool = False,
        start_patience_s: float = START_PATIENCE_S,
        patience_s: float = math.inf,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        self._url = ChannelUrl.parse(url)
        self._token = token
        self._ssl = (ssl or verifying_context()) if self._url.is_secure else None
        self._uses_proxy = uses_proxy
        self._position = since or self._url.since
        self._history = history or self._url.history
        self._listens = listens
        self._repeats = repeats
        self._start_patience_s = start_patience_s
        self._patience_s = patience_s
        self._max_unread_bytes = max_waiting_bytes
        self._max_message_bytes = max_message_bytes
        self._on_event = on_event

        self._backoff = backoff(FIRST_WAIT_S, LONGEST_WAIT_S)
        self._outbox = Outbox(max_pending_bytes)
        self._unread: deque[Message] = deque()
        self._unread_bytes = 0
        self._received_count = 0  # over all connections
        self._has_gap = False  # before the next message
        self._was_iterated = False
        self._was_connected = False  # at least once
        self._is_connected = False
        self._is_closing = False
        self._is_closed = False  # everything was sent, then the connection ended
        # The end of the connection whose echoes are missing.
        self._unresolved_end: ConnectionEnd | None = None
        self._abandoned: Unconfirmed | None = None
        self._changed = asyncio.Event()  # set, and replaced, when anything above changes
        self._waiter_count = 0
        self._fault: Exception | None = None
        self._was_fault_raised = False
        self._task: asyncio.Task[None] | None = None

    # Public interface

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            InvalidUrlError: the token is invalid.
            RejectedError: the relay rejects the client.
            UnavailableError: no connection within `start_patience_s`.
        """
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

    async def send(self, data: Data) -> None:
        """Queue a message, which is sent as soon as there is a connection.

        Waits while more than `max_pending_bytes` are unconfirmed. Returns before this message is
        confirmed; `flush` waits for that.

        Raises:
            TypeError, UnicodeEncodeError: the data is not a valid message.
            ValueError: the message is larger than `max_message_bytes`.
            RuntimeError: the client is not connected yet, or was closed.
            RelayError: the relay rejects the client, or was unavailable for `patience_s`.
        """
        if not isinstance(data, str | bytes):
            raise TypeError(f"a message is str or bytes, not {type(data).__name__}")
        size = size_of(data)
        if size - MESSAGE_BYTES > self._max_message_bytes:
            raise ValueError(f"a message has at most {self._max_message_bytes:,} bytes")
        if self._is_closing:
            raise RuntimeError("the client was closed")
        self._raise_fault()
        await self._wait_for_echoes_until(lambda: self._outbox.has_capacity_for(size))
        self._outbox.append(data)
        self._notify_waiters()

    async def flush(self) -> None:
        """Wait until every message is confirmed.

        Raises:
            UnconfirmedError: messages were abandoned.
            RelayError: the relay rejects the client, or was unavailable for `patience_s`.
        """
        await self._wait_for_echoes_until(lambda: not len(self._outbox))
        self._raise_abandoned()

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Send the queued messages, do the closing handshake and disconnect.

        The relay replies to a close frame when it has relayed everything that was sent before.

        Raises:
            UnconfirmedError: messages may not have been relayed.
            RelayError: the relay rejects the client, and no other call has raised that yet.
        """
        self._is_closing = True
        self._notify_waiters()
        try:
            if not self._was_fault_raised and (self._is_connected or len(self._outbox)):
                async with asyncio.timeout(timeout_s):
                    await self._wait_until(lambda: self._is_closed)
        except TimeoutError:
            if len(self._outbox):
                raise UnconfirmedError(len(self._outbox), "close timed out") from None
        finally:
            await self._stop()
        self._raise_abandoned()

    @property
    def unconfirmed(self) -> int:
        """The number of messages that are not confirmed."""
        return len(self._outbox)

    @property
    def unsent(self) -> int:
        """The number of unconfirmed messages that are certainly not relayed."""
        return self._outbox.unsent_count

    @property
    def waiting(self) -> int:
        """The number of received messages that are not read yet."""
        return len(self._unread)

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        """Return the next message of the channel.

        Raises:
            RelayError: the relay rejects the client, or was unavailable for `patience_s`.
            StopAsyncIteration: `close` was called.
        """
        self._was_iterated = True
        if not self._unread:
            await self._wait_until(lambda: self._unread or self._is_closing)
        if not self._unread:
            raise StopAsyncIteration
        message = self._unread.popleft()
        self._unread_bytes -= size_of(message.data)
        self._notify_waiters()
        return message

    # Waiting for a change of state

    def _notify_waiters(self) -> None:
        if self._waiter_count:
            self._changed.set()
            self._changed = asyncio.Event()

    def _raise_fault(self) -> None:
        if self._task is None:
            raise RuntimeError("the client is not connected: use it in `async with`")
        if self._fault is not None:
            self._was_fault_raised = True
            raise self._fault

    async def _wait_until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._raise_fault()
            self._waiter_count += 1
            try:
                await self._changed.wait()
            finally:
                self._waiter_count -= 1

    async def _wait_for_echoes_until(self, condition: Callable[[], object]) -> None:
        """Wait for echoes. None arrives while unread messages before them pause the connection."""
        await self._wait_until(lambda: condition() or self._is_stuck)
        if not condition():
            raise RuntimeError(
                "unread messages block the client: iterate over it, or pass listens=False"
            )

    @property
    def _is_stuck(self) -> bool:
        return self._is_full and not self._was_iterated and not self._is_closing

    @property
    def _is_full(self) -> bool:
        return self._unread_bytes > self._max_unread_bytes

    def _raise_abandoned(self) -> None:
        if self._abandoned is not None:
            abandoned, self._abandoned = self._abandoned, None
            raise UnconfirmedError(abandoned.count, abandoned.reason)

    async def _stop(self) -> None:
        if self._task is not None:
            await cancel_until_done(self._task)

    # All connections

    async def _run(self) -> None:
        try:
            await self._run_connections()
        except asyncio.CancelledError:
            self._fault = self._fault or RuntimeError("the client was closed")
            raise
        except Exception as fault:  # noqa: BLE001 - the task's edge: the next call raises it
            self._fault = fault
        finally:
            self._notify_waiters()

    async def _run_connections(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            connection = await self._connect()
            connected_at = clock()
            end = await self._run_connection(connection)
            if self._is_closing and not len(self._outbox):
                self._is_closed = True
                return
            if self._unresolved_end is None and self._outbox.has_unconfirmed:
                self._unresolved_end = end
            rejection = end.rejection
            if end.token_expired and not callable(self._token):
                rejection = RejectedError(end.reason)
            if rejection is not None:
                if self._unresolved_end is end and end.has_all_echoes:
                    self._outbox.send_again()  # `unsent` counts them: they are not relayed
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
        token = self._token() if callable(self._token) else self._token
        headers = authorization(await token if isawaitable(token) else token)
        url = self._url.url_with_start(since=self._position, history=self._history)
        return await connect_to_relay(
            url, headers, self._ssl, self._max_message_bytes, uses_proxy=self._uses_proxy
        )

    def _delay_s(self, retry_after_s: float | None) -> float:
        """Return the reconnect delay: the relay's, or else that of the backoff."""
        backoff_s = next(self._backoff)
        return backoff_s if retry_after_s is None else min(retry_after_s, LONGEST_WAIT_S)

    async def _wait_before_retry(self, reason: str, wait_s: float) -> None:
        self._on_event(Disconnected(reason, wait_s))
        await asyncio.sleep(wait_s)

    # One connection

    async def _run_connection(self, connection: RelayConnection) -> ConnectionEnd:
        """Receive and send until the connection ends."""
        self._position = connection.welcome.position
        self._has_gap |= not connection.welcome.is_recovered
        self._was_connected = self._is_connected = True
        self._notify_waiters()
        self._on_event(Connected(connection.welcome.is_recovered))
        writer = asyncio.create_task(self._send_messages(connection))
        try:
            end = await self._receive_messages(connection)
        finally:
            self._is_connected = False
            connection.close_nowait()
            await cancel_until_done(writer)
        if not writer.cancelled():
            writer.result()
        if end.is_close_reply:
            self._outbox.confirm_all()
        return end

    async def _receive_messages(self, connection: RelayConnection) -> ConnectionEnd:
        try:
            while True:
                position, data = await connection.receive()
                if position:  # the relay's own messages have none
                    self._on_message(position, data)
                elif is_gap(data):
                    self._has_gap = True
                if self._is_full:
                    await self._wait_until(lambda: not self._is_full or self._is_closing)
        except ConnectionClosed as closed:
            return connection_end_of(closed)

    def _on_message(self, position: str, data: Data) -> None:
        self._position = position
        self._received_count += 1
        self._outbox.confirm_echo(data)
        if self._listens and not self._is_closing:
            self._unread.append(Message(data, position, self._has_gap))
            self._unread_bytes += size_of(data)
            self._has_gap = False
        self._notify_waiters()

    async def _send_messages(self, connection: RelayConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            if self._unresolved_end is not None:
                await self._resolve_unconfirmed(connection, self._unresolved_end)
            while not self._is_closing or self._outbox.has_unsent:
                while self._outbox.has_unsent:
                    if not connection.is_open:
                        return  # else the outbox would count the message as sent
                    await connection.send(self._outbox.next_to_send())
                await self._wait_until(lambda: self._outbox.has_unsent or self._is_closing)
            await connection.close()

    async def _resolve_unconfirmed(self, connection: RelayConnection, end: ConnectionEnd) -> None:
        """Confirm, send again or abandon the messages of the previous connection."""
        if connection.welcome.is_recovered:
            await self._wait_for_replayed_echoes(connection)
        self._unresolved_end = None
        if end.is_all_relayed and not connection.welcome.is_recovered:
            self._outbox.confirm_all()
            self._notify_waiters()
        elif end.has_all_echoes or self._repeats:
            self._outbox.send_again()
        elif count := self._outbox.abandon():
            abandoned_before = self._abandoned.count if self._abandoned else 0
            self._abandoned = Unconfirmed(abandoned_before + count, end.reason)
            self._on_event(Unconfirmed(count, end.reason))
            self._notify_waiters()

    async def _wait_for_replayed_echoes(self, connection: RelayConnection) -> None:
        """Wait until every echo arrived, or the relay has replayed all messages."""
        clock = asyncio.get_running_loop().time
        deadline, quiet_rounds = clock() + REPLAY_TIMEOUT_S, 0
        while self._outbox.has_unconfirmed and quiet_rounds < QUIET_ROUNDS and clock() < deadline:
            received_before = self._received_count
            await connection.ping()
            # The pong overtakes messages in the receive queue of websockets.
            await asyncio.sleep(QUIET_S)
            is_quiet = received_before == self._received_count and not self._is_full
            quiet_rounds = quiet_rounds + 1 if is_quiet else 0
