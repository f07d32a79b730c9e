"""One connection to a relay, which speaks relay.v1 (docs/reference/relay-v1.md).

Knows no earlier and no later connection, no subscription and no outbox.
"""

import asyncio
import contextlib
import json
import re
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidProxy, ProtocolError
from websockets.protocol import State
from websockets.proxy import get_proxy
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from websocket_relay.cancellation import cancel_until_done
from websocket_relay.client.errors import RejectedError, UnavailableError, error_for
from websocket_relay.client.events import Data
from websocket_relay.outcomes import Close

SUBPROTOCOL = Subprotocol("relay.v1")
OPEN_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 10.0
MAX_HEADER_BYTES = 32_768
RETRY_MS = re.compile(r"retry_ms=(\d{1,9})")

QUIET_CHECKS, QUIET_SHARE = 2, 0.75
"""A connection is dead when so many checks in a row, each after this share of the time between two
heartbeats, find that nothing arrived. A single check may run before a read that is due as well."""

PERMANENT_CLOSE_CODES = frozenset({1002, 1003, 1007, 1010})
"""A retry would be closed with the same code: the data that was sent is the cause."""

SESSION_TAKEN = (1008, "session resumed elsewhere")
"""A copy of this client has its session, for example in a fork: they would close each other."""


class Received(NamedTuple):
    """A message from the relay.

    Attributes:
        type: empty: a message of a channel.
        fields: of the header.
        data: the payload.
    """

    type: str
    fields: Mapping[str, Any]
    data: Data

    @property
    def id(self) -> int:
        """The id of the command that is answered; 0: none."""
        found: int = self.fields.get("id", 0)
        return found

    @property
    def position(self) -> str:
        """The position in the header; empty: none."""
        return self.fields.get("position") or ""

    @property
    def error(self) -> RejectedError | UnavailableError:
        """The client's error for a command that was not carried out."""
        reason = str(self.fields.get("reason", "without a reason"))
        if self.fields.get("status") == 503:
            return UnavailableError(reason, self.fields.get("retry_after_s"))
        return RejectedError(reason)


class Welcome(NamedTuple):
    """The relay's first message.

    Attributes:
        session: continues on the next connection.
        is_resumed: whether it is the session that was asked for.
        position: the position of the log.
        heartbeat_s: the time between two heartbeats, in seconds.
    """

    session: str
    is_resumed: bool
    position: str
    heartbeat_s: float


class ConnectionEnd(NamedTuple):
    """How a connection ended.

    Attributes:
        reason: the cause, as text.
        rejection: the error that makes a retry useless; None if a retry may help.
        retry_after_s: seconds after which the relay asks the client to reconnect; None if unset.
        token_expired: whether the next connection needs another token.
        message_too_big: whether the relay refused a message for its size.
    """

    reason: str
    rejection: RejectedError | None = None
    retry_after_s: float | None = None
    token_expired: bool = False
    message_too_big: bool = False


class RelayConnection:
    """An open connection.

    Args:
        connection: the connection of websockets.
        welcome: the relay's first message.
    """

    def __init__(self, connection: ClientConnection, welcome: Welcome) -> None:
        self._connection = connection
        self.welcome = welcome
        self._queue: deque[tuple[bytes, bool]] = deque()
        self._queue_grew = asyncio.Event()
        self._is_quiet = False

    def enqueue(
        self, header: Mapping[str, Any], payload: bytes = b"", *, is_text: bool = True
    ) -> None:
        """Queue a command. Commands are sent in the order of these calls."""
        line = json.dumps(header, separators=(",", ":")).encode()
        self._queue.append((line + b"\n" + payload, is_text))
        self._queue_grew.set()

    async def run(self, on_received: Callable[[Received], None]) -> ConnectionEnd:
        """Send what is queued, and receive, until the connection ends.

        Args:
            on_received: called with each message.

        Raises:
            RejectedError: a message is not of the protocol.
        """
        tasks = [asyncio.create_task(self._send_queue()), asyncio.create_task(self._abort_quiet())]
        try:
            while True:
                received = _received(await self._connection.recv())
                self._is_quiet = False
                on_received(received)
        except ConnectionClosed as closed:
            return _end_of(closed)
        finally:
            await cancel_until_done(*tasks)

    async def close(self) -> None:
        """Do the closing handshake."""
        await self._connection.close()

    def close_nowait(self) -> None:
        """Close at once: with a close frame if the send buffer is empty, else abort."""
        connection = self._connection
        if connection.state is State.OPEN and not connection.transport.get_write_buffer_size():
            connection.protocol.send_close(Close.CLIENT.code)
            connection.send_data()
            connection.transport.close()
        else:
            connection.transport.abort()

    async def _send_queue(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                while self._queue:
                    frame, is_text = self._queue.popleft()
                    await self._connection.send(frame, text=is_text)
                self._queue_grew.clear()
                await self._queue_grew.wait()

    async def _abort_quiet(self) -> None:
        quiet_checks = 0
        while quiet_checks < QUIET_CHECKS:
            self._is_quiet = True
            await asyncio.sleep(self.welcome.heartbeat_s * QUIET_SHARE)
            quiet_checks = quiet_checks + 1 if self._is_quiet else 0
        self._connection.transport.abort()


async def connect_to_relay(
    url: str,
    headers: dict[str, str],
    context: ssl.SSLContext | None,
    max_message_bytes: int,
    *,
    uses_proxy: bool,
) -> RelayConnection:
    """Connect, and receive the welcome.

    Args:
        url: with the session to resume.
        headers: additional headers of the request.
        context: verifies the relay's certificate; None: the library's default.
        max_message_bytes: a larger message closes the connection.
        uses_proxy: whether a proxy of the environment is used.

    Raises:
        RejectedError: a retry would not help.
        UnavailableError: a retry may help.
    """
    options: dict[str, Any] = {"ssl": context} if context is not None else {}
    proxy = get_proxy(parse_uri(url)) if uses_proxy else None
    try:
        connection = await connect(
            url,
            subprotocols=[SUBPROTOCOL],
            additional_headers=headers,
            proxy=proxy,
            open_timeout=OPEN_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            ping_interval=None,  # the relay sends heartbeats
            max_size=max_message_bytes + MAX_HEADER_BYTES,
            **options,
        )
    except (
        OSError, InvalidHandshake, InvalidProxy, ProtocolError, ValueError, ImportError
    ) as error:  # fmt: skip
        raise error_for(error, is_secure=urlsplit(url).scheme == "wss", proxy=proxy) from None
    if connection.subprotocol != SUBPROTOCOL:
        connection.transport.abort()
        raise RejectedError(f"not a relay: subprotocol {SUBPROTOCOL} not accepted")
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            return RelayConnection(connection, _welcome(_received(await connection.recv())))
    except ConnectionClosed as closed:
        end = _end_of(closed)
        raise end.rejection or UnavailableError(end.reason, end.retry_after_s) from None
    except TimeoutError:
        connection.transport.abort()
        raise UnavailableError("timed out") from None
    except BaseException:  # cancelled, or no welcome: nothing else owns the connection
        connection.transport.abort()
        raise


def _end_of(closed: ConnectionClosed) -> ConnectionEnd:
    """Return what the end of a connection means."""
    frame = closed.rcvd
    if frame is None:
        return _end_without_close_frame(closed)
    code, close_reason = frame.code, frame.reason
    reason = f"closed by the relay: {close_reason or 'without a reason'} ({code})"
    if code in PERMANENT_CLOSE_CODES or (code, close_reason) == SESSION_TAKEN:
        return ConnectionEnd(reason, RejectedError(reason))
    retry_ms = RETRY_MS.search(close_reason)
    return ConnectionEnd(
        reason,
        retry_after_s=int(retry_ms[1]) / 1000 if retry_ms else None,
        token_expired=code == Close.TOKEN_EXPIRED.code,
        message_too_big=code == Close.MESSAGE_TOO_BIG.code,
    )


def _end_without_close_frame(closed: ConnectionClosed) -> ConnectionEnd:
    sent = closed.sent
    if sent is not None and sent.code == Close.MESSAGE_TOO_BIG.code:
        reason = f"received a message over the client's size limit: {sent.reason}"
        return ConnectionEnd(reason, RejectedError(reason))  # resuming would replay the message
    if sent is not None and sent.code in PERMANENT_CLOSE_CODES:
        return ConnectionEnd(f"connection lost: {sent.reason or 'received invalid data'}")
    return ConnectionEnd("connection lost")


def _received(raw: Data) -> Received:
    """Split a message into header and payload.

    Raises:
        RejectedError: it has no header.
    """
    head: Data
    data: Data
    if isinstance(raw, str):
        head, _, data = raw.partition("\n")
    else:
        head, _, data = raw.partition(b"\n")
    try:
        fields = json.loads(head)
        return Received(fields.get("type", ""), fields, data)
    except (ValueError, AttributeError, RecursionError):
        raise RejectedError("not a relay: invalid message") from None


def _welcome(received: Received) -> Welcome:
    try:
        fields = received.fields
        return Welcome(
            str(fields["session"]),
            bool(fields["resumed"]),
            str(fields["position"]),
            float(fields["heartbeat_ms"]) / 1000,
        )
    except (ValueError, TypeError, KeyError):
        raise RejectedError("not a relay: invalid welcome message") from None
