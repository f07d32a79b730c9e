"""Hear one channel and send to it, over as many connections as it takes. Knows no frame.

What is promised:

- Heard: every message once, in the channel's one order, as long as the relay remembers what was
  missed between two connections. Where it does not, or its log lost some, the client is told:
  `Message.after_gap`.
- Sent: in order, and never twice what is known to have been relayed. A message is known to have
  been relayed when it came back. When a connection ends before, the client looks for it among what
  it missed; and some closes tell: behind all that was relayed (a limit), or that all is (a drain).
  Of the rest nobody knows: it is given up, so that each message is relayed once at most, or, with
  `repeats`, sent again, so that each is relayed once at least.
"""

import asyncio
import contextlib
import math
import random
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from inspect import isawaitable
from types import TracebackType
from typing import Self

from websockets.exceptions import ConnectionClosed

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

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # at most, and doubled each time; half of it is by chance
LASTING_S = 10.0
"""A connection that held so long was a good one: the next wait is a first one."""

QUIET_ROUNDS, QUIET_S = 2, 0.05
SEARCH_S = 2.0
"""What was missed is searched for echoes until nothing came in two rounds of ping and pong; on a
channel that is never silent, for so long."""

MAX_PENDING_BYTES = 1_048_576
MAX_WAITING_BYTES = 4_194_304
MAX_MESSAGE_BYTES = 67_108_864
CLOSE_TIMEOUT_S = 10.0

Token = str | Callable[[], str | Awaitable[str]]


class Relay:
    """A client of one channel. It is also what its messages are iterated over.

    Args:
        url: the channel's address; a `since` or `history` in its query is heeded.
        token: a bearer token, or what is called for one before every connection.
        ssl: how a wss:// relay's certificate is checked; None: with the system's authorities.
        since: the position behind which to begin; empty: with what comes now.
        history: how many of the last messages to hear first, where `since` is empty.
        listens: False throws away what is heard: for who only sends.
        repeats: send again what may have been relayed or not.
        start_patience_s: how long to try for the first connection; 0: once.
        patience_s: how long to try for a connection after that.
        max_pending_bytes: of messages sent and not known to be relayed; `send` waits then.
        max_waiting_bytes: of messages that nobody took yet; the network waits then.
        max_message_bytes: a larger message is neither sent nor heard.
        on_event: called with what happens to the connection.
    """

    def __init__(
        self,
        url: str,
        *,
        token: Token = "",
        ssl: ssl.SSLContext | None = None,
        since: str = "",
        history: int = 0,
        listens: bool = True,
        repeats: bool = False,
        start_patience_s: float = 0.0,
        patience_s: float = math.inf,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        self._address = ChannelUrl.parse(url)
        self._token = token
        self._ssl = ssl if self._address.is_secure else None
        self._position = since or self._address.since
        self._history = history or self._address.history
        self._listens = listens
        self._repeats = repeats
        self._start_patience_s = start_patience_s
        self._patience_s = patience_s
        self._max_waiting_bytes = max_waiting_bytes
        self._max_message_bytes = max_message_bytes
        self._on_event = on_event

        self._outbox = Outbox(max_pending_bytes)
        self._waiting: deque[Message] = deque()
        self._waiting_bytes = 0
        self._heard = 0  # messages, over all connections
        self._has_gap = False  # before the next message
        self._was_iterated = False
        self._is_open = False  # since the first connection
        self._is_connected = False
        self._is_leaving = False
        self._is_gone = False  # having left
        self._unsettled: ConnectionEnd | None = (
            None  # how the connection ended whose echoes are missing
        )
        self._abandoned: Unconfirmed | None = None
        self._bell = asyncio.Event()  # rung whenever anything above changed
        self._sleepers = 0
        self._fault: Exception | None = None
        self._is_told = False  # somebody was given the fault
        self._task: asyncio.Task[None] | None = None

    # What it is used by

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            AddressError: the token is none.
            DeniedError: the relay refuses.
            AwayError: there is none within `start_patience_s`.
        """
        self._task = asyncio.create_task(self._live())
        try:
            await self._until(lambda: self._is_open)
        except BaseException:
            await self._end()
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
            await self._end()

    async def send(self, data: Data) -> None:
        """Have a message sent, now or as soon as there is a connection.

        Waits while `max_pending_bytes` are not known to be relayed. Returns before this one is:
        `flush` tells.

        Raises:
            TypeError, UnicodeEncodeError: that is no message.
            ValueError: it is larger than `max_message_bytes`.
            RelayError: the relay refuses, or was away for longer than `patience_s`.
        """
        if not isinstance(data, str | bytes):
            raise TypeError(f"a message is str or bytes, not {type(data).__name__}")
        size = size_of(data)
        if size - MESSAGE_BYTES > self._max_message_bytes:
            raise ValueError(f"a message has at most {self._max_message_bytes:,} bytes")
        self._raise_fault()
        await self._until_heard(lambda: self._outbox.has_room_for(size))
        self._outbox.put(data)
        self._ring()

    async def flush(self) -> None:
        """Wait until all that was sent is known to have been relayed.

        Raises:
            UnsentError: some of it was given up.
            RelayError: the relay refuses, or was away for longer than `patience_s`.
        """
        await self._until_heard(lambda: not len(self._outbox))
        self._tell_abandoned()

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Send what waits, say goodbye, and be gone.

        The relay answers a goodbye when all that was said before it is relayed.

        Raises:
            UnsentError: something is not known to have been relayed.
            RelayError: the relay refuses, and nobody was told so far.
        """
        self._is_leaving = True
        self._ring()
        try:
            if not self._is_told and (self._is_connected or len(self._outbox)):
                async with asyncio.timeout(timeout_s):
                    await self._until(lambda: self._is_gone)
        except TimeoutError:
            if len(self._outbox):
                raise UnconfirmedError(
                    len(self._outbox), "the relay did not answer in time"
                ) from None
        finally:
            await self._end()
        self._tell_abandoned()

    @property
    def unconfirmed(self) -> int:
        """How many messages are not known to have been relayed."""
        return len(self._outbox)

    @property
    def waiting(self) -> int:
        """How many messages were heard and not taken yet."""
        return len(self._waiting)

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        """Return the next message of the channel.

        Raises:
            RelayError: the relay refuses, or was away for longer than `patience_s`.
            StopAsyncIteration: `close` was called.
        """
        self._was_iterated = True
        if not self._waiting:
            await self._until(lambda: self._waiting or self._is_leaving)
        if not self._waiting:
            raise StopAsyncIteration
        message = self._waiting.popleft()
        self._waiting_bytes -= size_of(message.data)
        self._ring()
        return message

    # One thing waits for another

    def _ring(self) -> None:
        if self._sleepers:
            self._bell.set()
            self._bell = asyncio.Event()

    def _raise_fault(self) -> None:
        if self._fault is not None:
            self._is_told = True
            raise self._fault

    async def _until(self, is_so: Callable[[], object]) -> None:
        while not is_so():
            self._raise_fault()
            self._sleepers += 1
            try:
                await self._bell.wait()
            finally:
                self._sleepers -= 1

    async def _until_heard(self, is_so: Callable[[], object]) -> None:
        """Wait for what comes back. It never would if nobody took what is heard before it."""
        await self._until(lambda: is_so() or self._is_stuck)
        if not is_so():
            raise RuntimeError("nobody takes what is heard: iterate, or say listens=False")

    @property
    def _is_stuck(self) -> bool:
        return self._is_full and not self._was_iterated and not self._is_leaving

    @property
    def _is_full(self) -> bool:
        return self._waiting_bytes > self._max_waiting_bytes

    def _tell_abandoned(self) -> None:
        if self._abandoned is not None:
            abandoned, self._abandoned = self._abandoned, None
            raise UnconfirmedError(abandoned.count, abandoned.reason)

    async def _end(self) -> None:
        if self._task is not None:
            await cancel_until_done(self._task)

    # From connection to connection

    async def _live(self) -> None:
        try:
            await self._go_on()
        except asyncio.CancelledError:
            self._fault = self._fault or RuntimeError("the client was closed")
            raise
        except Exception as fault:  # noqa: BLE001 - whoever waits is given it, be it what it may
            self._fault = fault
        finally:
            self._ring()

    async def _go_on(self) -> None:
        clock = asyncio.get_running_loop().time
        attempt = 0
        while True:
            attempt, link = await self._connect(attempt)
            since = clock()
            ending = await self._talk(link)
            if self._is_leaving and not len(self._outbox):
                self._is_gone = True
                return
            if self._unsettled is None and self._outbox.has_unheard:
                self._unsettled = ending
            if ending.denial is not None:
                raise ending.denial
            if ending.token_expired and not callable(self._token):
                raise RejectedError(ending.reason)
            attempt = 0 if clock() - since > LASTING_S else attempt
            await self._pause(ending.reason, delay_s(attempt, ending.retry_after_s))
            attempt += 1

    async def _connect(self, attempt: int) -> tuple[int, RelayConnection]:
        """Try until there is a connection; return it and how many attempts there were."""
        clock = asyncio.get_running_loop().time
        patience_s = self._patience_s if self._is_open else self._start_patience_s
        until = clock() + patience_s
        while True:
            try:
                link = await self._open()
            except UnavailableError as away:
                wait_s = delay_s(attempt, away.retry_after_s)
                if clock() + wait_s > until:
                    raise
                await self._pause(str(away), wait_s)
                attempt += 1
            else:
                return attempt, link

    async def _open(self) -> RelayConnection:
        token = self._token() if callable(self._token) else self._token
        headers = authorization(await token if isawaitable(token) else token)
        url = self._address.asking(since=self._position, history=self._history)
        return await connect_to_relay(url, headers, self._ssl, self._max_message_bytes)

    async def _pause(self, reason: str, wait_s: float) -> None:
        self._on_event(Disconnected(reason, wait_s))
        await asyncio.sleep(wait_s)

    # One connection

    async def _talk(self, link: RelayConnection) -> ConnectionEnd:
        """Hear and send until the connection ends."""
        self._position = link.welcome.position
        self._has_gap |= not link.welcome.is_recovered
        self._is_open = self._is_connected = True
        self._ring()
        self._on_event(Connected(link.welcome.is_recovered))
        writer = asyncio.create_task(self._write(link))
        try:
            ending = await self._listen(link)
        finally:
            self._is_connected = False
            link.leave()
            await cancel_until_done(writer)
        if not writer.cancelled():
            writer.result()
        if ending.is_goodbye:
            self._outbox.hear_all()
        return ending

    async def _listen(self, link: RelayConnection) -> ConnectionEnd:
        try:
            while True:
                position, data = await link.receive()
                if position:  # what has none the relay says for itself
                    self._hear(position, data)
                elif is_gap(data):
                    self._has_gap = True
                if self._is_full:
                    await self._until(lambda: not self._is_full or self._is_leaving)
        except ConnectionClosed as closed:
            return connection_end_of(closed)

    def _hear(self, position: str, data: Data) -> None:
        self._position = position
        self._heard += 1
        self._outbox.hear(data)
        if self._listens and not self._is_leaving:
            self._waiting.append(Message(data, position, self._has_gap))
            self._waiting_bytes += size_of(data)
            self._has_gap = False
        self._ring()

    async def _write(self, link: RelayConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            if self._unsettled is not None:
                await self._settle(link, self._unsettled)
            while not self._is_leaving or self._outbox.has_unsent:
                while self._outbox.has_unsent:
                    if not link.is_open:
                        return  # or it would count as sent
                    await link.send(self._outbox.take())
                await self._until(lambda: self._outbox.has_unsent or self._is_leaving)
            await link.close()

    async def _settle(self, link: RelayConnection, ending: ConnectionEnd) -> None:
        """Decide what becomes of messages that were sent on the connection before."""
        if link.welcome.is_recovered:
            await self._search(link)
        self._unsettled = None
        if ending.is_relayed and not link.welcome.is_recovered:
            self._outbox.hear_all()
            self._ring()
        elif ending.is_settled or self._repeats:
            self._outbox.send_again()
        elif count := self._outbox.abandon():
            before = self._abandoned.count if self._abandoned else 0
            self._abandoned = Unconfirmed(before + count, ending.reason)
            self._on_event(Unconfirmed(count, ending.reason))
            self._ring()

    async def _search(self, link: RelayConnection) -> None:
        """Listen to what was missed, until there is no more of it."""
        clock = asyncio.get_running_loop().time
        until, quiet = clock() + SEARCH_S, 0
        while self._outbox.has_unheard and quiet < QUIET_ROUNDS and clock() < until:
            heard = self._heard
            await link.ping()
            await asyncio.sleep(QUIET_S)  # the pong overtakes what waits to be heard
            is_quiet = heard == self._heard and not self._is_full
            quiet = quiet + 1 if is_quiet else 0


def delay_s(attempt: int, told_s: float | None) -> float:
    """Return how long to wait: what the relay told, or else longer each time, and by chance."""
    if told_s is not None:
        return min(told_s, LONGEST_WAIT_S)
    most = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(attempt, 10))
    return random.uniform(most / 2, most)
