"""One connection to a relay, with the subprotocol that transmits positions.

Knows no earlier and no later connection, and no outbox.
"""

import json
import re
import ssl
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidProxy, ProtocolError
from websockets.protocol import State
from websockets.typing import Subprotocol

from websocket_relay.client.errors import RejectedError, UnavailableError, error_for
from websocket_relay.client.proxy import proxy_for
from websocket_relay.outcomes import Close

SUBPROTOCOL = Subprotocol("relay.v1")
OPEN_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 10.0
MAX_POSITION_BYTES = 256  # before each message; usually about 20
RETRY_MS = re.compile(r"retry_ms=(\d{1,9})")

PERMANENT_CLOSE_CODES = frozenset({1002, 1003, 1007, 1009, 1010})
"""A retry would be closed with the same code: the data that was sent is the cause."""

CLOSES_AFTER_ECHOES = frozenset({Close.BACKPLANE_UNAVAILABLE, Close.PARTIAL_MESSAGES})
"""The closes with code 1013 that the relay sends after the echoes of everything it relayed."""

Data = str | bytes


class ReceivedMessage(NamedTuple):
    """A message from the relay.

    Attributes:
        position: empty for the relay's own messages.
        data: as published.
    """

    position: str
    data: Data


class Welcome(NamedTuple):
    """The relay's first message.

    Attributes:
        is_recovered: whether the relay has every message since the requested position.
        position: the position after which the messages start.
    """

    is_recovered: bool
    position: str


class ConnectionEnd(NamedTuple):
    """How a connection ended.

    Attributes:
        reason: the cause, as text.
        rejection: the error that makes a retry useless; None if a retry may help.
        retry_after_s: seconds after which the relay asks the client to reconnect; None if unset.
        has_all_echoes: whether the echo of every relayed message arrived before the end, so that
            a message without an echo was not relayed.
        is_all_relayed: whether every message that was sent is relayed, with or without an echo: a
            draining relay continues to relay until its close frame is answered.
        is_close_reply: whether the relay answered this client's close frame, which it does after
            relaying everything that was sent before.
        token_expired: whether the next connection needs another token.
    """

    reason: str
    rejection: RejectedError | None = None
    retry_after_s: float | None = None
    has_all_echoes: bool = False
    is_all_relayed: bool = False
    is_close_reply: bool = False
    token_expired: bool = False


class RelayConnection:
    """An open connection.

    Args:
        connection: the connection of websockets.
        welcome: the relay's first message.
    """

    def __init__(self, connection: ClientConnection, welcome: Welcome) -> None:
        self._connection = connection
        self.welcome = welcome

    @property
    def is_open(self) -> bool:
        """Whether a message that is sent now is sent before any close frame."""
        return self._connection.state is State.OPEN

    async def receive(self) -> ReceivedMessage:
        """Return the next message.

        Raises:
            ConnectionClosed: there is none.
        """
        return _received(await self._connection.recv())

    async def send(self, data: Data) -> None:
        """Send a message; wait while the send buffer is full.

        Raises:
            ConnectionClosed: the message may have been sent all the same.
        """
        await self._connection.send(data)

    async def ping(self) -> None:
        """Send a ping and wait for its pong.

        Raises:
            ConnectionClosed: no pong arrived.
        """
        await (await self._connection.ping())

    async def close(self) -> None:
        """Do the closing handshake. The relay's reply comes after everything that it relayed."""
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
        url: with the position or the history to start with.
        headers: additional headers of the request.
        context: verifies the relay's certificate; None: the library's default.
        max_message_bytes: a larger message closes the connection.
        uses_proxy: whether a proxy of the environment is used.

    Raises:
        RejectedError: a retry would not help.
        UnavailableError: a retry may help.
    """
    options: dict[str, Any] = {"ssl": context} if context is not None else {}
    proxy = proxy_for(url) if uses_proxy else None
    try:
        connection = await connect(
            url,
            subprotocols=[SUBPROTOCOL],
            additional_headers=headers,
            proxy=proxy,
            open_timeout=OPEN_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            max_size=max_message_bytes + MAX_POSITION_BYTES,
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
        return RelayConnection(connection, _welcome(_received(await connection.recv())))
    except ConnectionClosed as closed:
        end = connection_end_of(closed)
        raise end.rejection or UnavailableError(end.reason, end.retry_after_s) from None
    except BaseException:  # cancelled, or no welcome: nothing else owns the connection
        connection.transport.abort()
        raise


def connection_end_of(closed: ConnectionClosed) -> ConnectionEnd:
    """Return what the end of a connection means."""
    frame = closed.rcvd
    if frame is None:
        return _end_without_close_frame(closed)
    code, close_reason = frame.code, frame.reason
    reason = f"closed by the relay: {close_reason or 'without a reason'} ({code})"
    if code == Close.CLIENT.code:
        return ConnectionEnd(reason, is_close_reply=closed.rcvd_then_sent is False)
    if code == Close.DRAINING.code:
        retry_ms = RETRY_MS.search(close_reason)
        was_cut_off = closed.__cause__ is not None
        return ConnectionEnd(
            reason,
            retry_after_s=int(retry_ms[1]) / 1000 if retry_ms else None,
            is_all_relayed=not was_cut_off,
        )
    if code == Close.TOKEN_EXPIRED.code:
        return ConnectionEnd(reason, has_all_echoes=True, token_expired=True)
    if code in PERMANENT_CLOSE_CODES or (code, close_reason) == Close.PUBLISH_NOT_ALLOWED.value:
        return ConnectionEnd(reason, RejectedError(reason), has_all_echoes=True)
    is_after_echoes = (code, close_reason) in {each.value for each in CLOSES_AFTER_ECHOES}
    return ConnectionEnd(reason, has_all_echoes=is_after_echoes or code == Close.RATE_LIMIT.code)


def _end_without_close_frame(closed: ConnectionClosed) -> ConnectionEnd:
    sent = closed.sent
    if sent is not None and sent.code == 1011:
        return ConnectionEnd("connection lost: ping timeout")
    if sent is not None and sent.code == Close.MESSAGE_TOO_BIG.code:
        reason = f"received a message over the client's size limit: {sent.reason}"
        return ConnectionEnd(reason, RejectedError(reason))  # resuming would replay the message
    if sent is not None and sent.code in PERMANENT_CLOSE_CODES:
        return ConnectionEnd(f"connection lost: {sent.reason or 'received invalid data'}")
    return ConnectionEnd("connection lost")


def _received(raw: Data) -> ReceivedMessage:
    """Split a message as received into position and data."""
    if isinstance(raw, str):
        position, _, text = raw.partition("\n")
        return ReceivedMessage(position, text)
    head, _, payload = raw.partition(b"\n")
    return ReceivedMessage(head.decode("ascii", "replace"), payload)


def is_gap(data: Data) -> bool:
    """Return whether one of the relay's own messages reports that its log lost messages."""
    try:
        return bool(json.loads(data)["type"] == "gap")
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _welcome(message: ReceivedMessage) -> Welcome:
    try:
        fields = json.loads(message.data)
        return Welcome(bool(fields["recovered"]), str(fields["position"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise RejectedError("not a relay: invalid welcome message") from None
