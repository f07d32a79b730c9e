"""One connection to a relay that tells positions. Knows nothing of the ones before and after it."""

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
from websocket_relay.outcomes import Close

POSITIONS = Subprotocol("relay.v1")
OPEN_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 10.0
POSITION_BYTES = 256  # at most, before a message; as a rule some 20
RETRY_MS = re.compile(r"retry_ms=(\d{1,9})")

REPEATED = frozenset({1002, 1003, 1007, 1009, 1010})
"""These closes would come again: what was said is at fault."""

RELAYS_NO_MORE = frozenset({Close.UNAVAILABLE, Close.UNFINISHED})
"""Of the closes with 1013, those that come behind all that was relayed."""

Data = str | bytes


class ReceivedMessage(NamedTuple):
    """What the relay said.

    Attributes:
        position: empty where the relay speaks for itself.
        data: as it was sent.
    """

    position: str
    data: Data


class Welcome(NamedTuple):
    """What the relay says first.

    Attributes:
        is_recovered: whether it holds all that was asked for.
        position: behind which it begins.
    """

    is_recovered: bool
    position: str


class ConnectionEnd(NamedTuple):
    """How a connection ended.

    Attributes:
        reason: in words.
        denial: what makes another try useless; None: nothing.
        retry_after_s: when the relay wants the client back; None: it did not say.
        is_settled: whether all that was relayed came back before: what did not was not relayed.
        is_relayed: whether all that was said is relayed, also what did not come back: a relay that
            drains goes on relaying until its close is answered.
        is_goodbye: whether the relay answered our own close, behind all that was said before it.
        token_expired: whether another token is needed.
    """

    reason: str
    denial: RejectedError | None = None
    retry_after_s: float | None = None
    is_settled: bool = False
    is_relayed: bool = False
    is_goodbye: bool = False
    token_expired: bool = False


class RelayConnection:
    """A connection that is open.

    Args:
        connection: of the library's.
        welcome: what the relay said first.
    """

    def __init__(self, connection: ClientConnection, welcome: Welcome) -> None:
        self._connection = connection
        self.welcome = welcome

    @property
    def is_open(self) -> bool:
        """Whether what is sent now is sent at all, and not too late."""
        return self._connection.state is State.OPEN

    async def receive(self) -> ReceivedMessage:
        """Return what comes next.

        Raises:
            ConnectionClosed: nothing does.
        """
        return _heard(await self._connection.recv())

    async def send(self, data: Data) -> None:
        """Send a message; wait while the network is slower.

        Raises:
            ConnectionClosed: it may have been sent all the same.
        """
        await self._connection.send(data)

    async def ping(self) -> None:
        """Return when the relay has answered a ping.

        Raises:
            ConnectionClosed: it did not.
        """
        await (await self._connection.ping())

    async def close(self) -> None:
        """Say goodbye and wait for the answer, which comes behind all that was relayed."""
        await self._connection.close()

    def leave(self) -> None:
        """End the connection at once; say goodbye where that takes no time."""
        connection = self._connection
        if connection.state is State.OPEN and not connection.transport.get_write_buffer_size():
            connection.protocol.send_close(Close.CLIENT.code)
            connection.send_data()
            connection.transport.close()
        else:
            connection.transport.abort()


async def connect_to_relay(
    url: str, headers: dict[str, str], context: ssl.SSLContext | None, max_message_bytes: int
) -> RelayConnection:
    """Connect, and hear the welcome.

    Args:
        url: with what is to be heard first.
        headers: further ones of the request.
        context: how the relay's certificate is checked; None: as usual.
        max_message_bytes: a larger message ends the connection.

    Raises:
        DeniedError: another try would not help.
        AwayError: another try might.
    """
    options: dict[str, Any] = {"ssl": context} if context is not None else {}
    try:
        connection = await connect(
            url,
            subprotocols=[POSITIONS],
            additional_headers=headers,
            open_timeout=OPEN_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            max_size=max_message_bytes + POSITION_BYTES,
            **options,
        )
    except (
        OSError, InvalidHandshake, InvalidProxy, ProtocolError, ValueError, ImportError
    ) as error:  # fmt: skip
        raise error_for(error, is_secure=urlsplit(url).scheme == "wss") from None
    if connection.subprotocol != POSITIONS:
        connection.transport.abort()
        raise RejectedError(f"that is no relay: it does not speak {POSITIONS}")
    try:
        return RelayConnection(connection, _welcome(_heard(await connection.recv())))
    except ConnectionClosed as closed:
        ending = connection_end_of(closed)
        raise ending.denial or UnavailableError(ending.reason, ending.retry_after_s) from None
    except BaseException:  # cancelled, or no welcome: nobody else knows of the connection
        connection.transport.abort()
        raise


def connection_end_of(closed: ConnectionClosed) -> ConnectionEnd:
    """Return what the end of a connection means."""
    frame = closed.rcvd
    if frame is None:
        return _loss(closed)
    code, words = frame.code, frame.reason
    reason = f"closed by the relay: {words or 'without a reason'} ({code})"
    if code == Close.CLIENT.code:
        return ConnectionEnd(reason, is_goodbye=closed.rcvd_then_sent is False)
    if code == Close.DRAINING.code:
        told = RETRY_MS.search(words)
        was_cut_off = closed.__cause__ is not None
        return ConnectionEnd(
            reason,
            retry_after_s=int(told[1]) / 1000 if told else None,
            is_relayed=not was_cut_off,
        )
    if code == Close.TOKEN_EXPIRED.code:
        return ConnectionEnd(reason, is_settled=True, token_expired=True)
    if code in REPEATED or (code, words) == Close.NOT_ALLOWED.value:
        return ConnectionEnd(reason, RejectedError(reason), is_settled=True)
    is_known = (code, words) in {each.value for each in RELAYS_NO_MORE}
    return ConnectionEnd(reason, is_settled=is_known or code == Close.RATE_LIMIT.code)


def _loss(closed: ConnectionClosed) -> ConnectionEnd:
    said = closed.sent
    if said is not None and said.code == 1011:
        return ConnectionEnd("connection lost: no answer to a ping")
    if said is not None and said.code == Close.TOO_BIG.code:
        reason = f"what came is larger than this client takes: {said.reason}"
        return ConnectionEnd(reason, RejectedError(reason))  # who resumes would be sent it again
    if said is not None and said.code in REPEATED:
        return ConnectionEnd(f"connection lost: {said.reason or 'what came was broken'}")
    return ConnectionEnd("connection lost")


def _heard(said: Data) -> ReceivedMessage:
    if isinstance(said, str):
        position, _, text = said.partition("\n")
        return ReceivedMessage(position, text)
    head, _, payload = said.partition(b"\n")
    return ReceivedMessage(head.decode("ascii", "replace"), payload)


def is_gap(data: Data) -> bool:
    """Tell whether the relay says, for itself, that its log lost messages."""
    try:
        return bool(json.loads(data)["type"] == "gap")
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _welcome(heard: ReceivedMessage) -> Welcome:
    try:
        said = json.loads(heard.data)
        return Welcome(bool(said["recovered"]), str(said["position"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise RejectedError("that is no relay: it does not welcome") from None
