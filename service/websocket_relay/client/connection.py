"""One connection to a relay, which speaks relay.v1 (docs/reference/relay-v1.md).

Knows no earlier and no later connection, no subscription and no unanswered message.
"""

import asyncio
import json
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.proxy import get_proxy
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from websocket_relay.cancellation import cancel_until_done
from websocket_relay.client.errors import Failure, RejectedError, UnavailableError, error_for
from websocket_relay.client.events import Data, Header, encoded
from websocket_relay.client.tokens import authorization

SUBPROTOCOL = Subprotocol("relay.v1")
OPEN_TIMEOUT_S = 10.0
MAX_HEADER_BYTES = 32_768
MAX_MESSAGE_BYTES = 67_108_864

MAX_SILENT_HEARTBEATS = 2
"""A connection on which nothing arrives for so many times the time between heartbeats is dead."""


class RelayConnection:
    """An open connection.

    Args:
        connection: the connection of websockets.
        welcome: the relay's first message.

    Attributes:
        session: continues on the next connection.
        is_resumed: whether it is the session that was asked for.
        position: the position of the log at the start.

    Raises:
        RejectedError: the first message is no welcome.
    """

    def __init__(self, connection: ClientConnection, welcome: Header) -> None:
        try:
            self.session = str(welcome["session"])
            self.is_resumed = bool(welcome["resumed"])
            self.position = str(welcome["position"])
            self._max_silence_s = MAX_SILENT_HEARTBEATS * float(welcome["heartbeat_ms"]) / 1000
        except (KeyError, TypeError, ValueError):
            raise RejectedError("not a relay: invalid welcome message") from None
        self._connection = connection
        self._commands: asyncio.Queue[tuple[str, Data]] = asyncio.Queue()

    def enqueue(self, header: Header, payload: Data = "") -> None:
        """Queue a command. Commands are sent in the order of these calls."""
        self._commands.put_nowait((json.dumps(header, separators=(",", ":")) + "\n", payload))

    async def run(self, on_received: Callable[[Header, Data], None]) -> Failure:
        """Send what is queued, and receive, until the connection ends; return the cause.

        A connection that has not ended by itself is aborted.

        Args:
            on_received: called with the header and the payload of each message.

        Raises:
            RejectedError: a message is not of the protocol.
        """
        clock = asyncio.get_running_loop().time
        sending = asyncio.create_task(self._send_commands())
        try:
            async with asyncio.timeout(None) as silence:
                while True:
                    silence.reschedule(clock() + self._max_silence_s)
                    on_received(*_split(await self._connection.recv()))
        except TimeoutError:
            return UnavailableError("connection lost")
        except ConnectionClosed as closed:
            return error_for(closed)
        finally:
            self._connection.transport.abort()
            await cancel_until_done(sending)

    async def close(self) -> None:
        """Do the closing handshake."""
        await self._connection.close()

    async def _send_commands(self) -> None:
        with suppress(ConnectionClosed):
            while True:
                line, payload = await self._commands.get()
                message = line.encode() + encoded(payload)
                await self._connection.send(message, text=isinstance(payload, str))


async def connect_to_relay(
    url: str, token: str, *, context: ssl.SSLContext | None, uses_proxy: bool
) -> RelayConnection:
    """Connect, and receive the welcome.

    Args:
        url: with the session to resume.
        token: empty: none.
        context: verifies the certificate of a wss:// relay.
        uses_proxy: whether a proxy of the environment is used.

    Raises:
        InvalidUrlError: the token is invalid.
        RejectedError: a retry would not help.
        UnavailableError: a retry may help.
    """
    uri, headers = parse_uri(url), authorization(token)
    proxy = get_proxy(uri) if uses_proxy else None
    options: dict[str, Any] = {"ssl": context} if uri.secure else {}
    connection: ClientConnection | None = None
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            connection = await connect(
                url,
                subprotocols=[SUBPROTOCOL],
                additional_headers=headers,
                proxy=proxy,
                open_timeout=None,
                ping_interval=None,  # the relay sends heartbeats
                max_size=MAX_MESSAGE_BYTES + MAX_HEADER_BYTES,
                **options,
            )
            if connection.subprotocol != SUBPROTOCOL:
                raise RejectedError(f"not a relay: subprotocol {SUBPROTOCOL} not accepted")
            welcome, _ = _split(await connection.recv())
            return RelayConnection(connection, welcome)
    except BaseException as error:
        if connection is not None:
            connection.transport.abort()  # nothing else owns it
        if isinstance(error, OSError | WebSocketException | ValueError | ImportError):
            raise error_for(error, is_secure=uri.secure, proxy=proxy) from None
        raise


def _split(message: Data) -> tuple[Header, Data]:
    """Split a message into header and payload.

    Raises:
        RejectedError: it has no header.
    """
    head: Data
    payload: Data
    if isinstance(message, str):
        head, _, payload = message.partition("\n")
    else:
        head, _, payload = message.partition(b"\n")
    try:
        header = json.loads(head)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise RejectedError("not a relay: invalid message")
    return header, payload
