"""Validate one WebSocket upgrade, pass it to the ASGI application and send the response.

Exists from the request to the response, or to the end of a refused connection. Knows RFC 6455
section 4 and the ASGI WebSocket messages (spec 2.4). Knows no frame and no channel.
"""

import logging
import re
from functools import partial
from http import HTTPStatus
from typing import NamedTuple, cast

from websockets.exceptions import InvalidHeaderFormat
from websockets.headers import parse_subprotocol
from websockets.utils import accept_key

from websocket_relay.outcomes import Close, Refusal, RefusedError
from websocket_relay.wire.asgi import App, Event, Scope
from websocket_relay.wire.connection import Connection
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.deflate import PLAIN, negotiate
from websocket_relay.wire.delivery_format import DeliveryFormat, Layout
from websocket_relay.wire.http_connections import HttpConnections
from websocket_relay.wire.relay_v1 import SUBPROTOCOL
from websocket_relay.wire.request_head import RequestHead

log = logging.getLogger(__name__)

WEBSOCKET_CONNECTION_KEY, HANDSHAKE_KEY = "relay.client", "relay.handshake"
"""The keys of the Connection and of the Handshake in the ASGI scope."""

VERSION = b"13"

KEY = re.compile(rb"[A-Za-z0-9+/]{22}==")
"""16 bytes in base64."""

INVALID = Refusal.INVALID_HANDSHAKE

ACCEPTED = (
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Accept: "
)
MAX_OFFERS = 64
"""Maximum number of extensions and their parameters, or of subprotocols, in one request. Parsing
thousands takes many times longer than the rest of the handshake."""


class HandshakeResult(NamedTuple):
    """The result of validating a handshake request.

    Attributes:
        accept: the value of Sec-WebSocket-Accept.
        subprotocols: the offered subprotocols, in the order of the request.
        extensions: the negotiated extensions; empty if there are none.
        encoding: the encoding of messages to the client, as defined in `deflate`.
    """

    accept: str
    subprotocols: list[str]
    extensions: str
    encoding: int


def validate_handshake(head: RequestHead, *, compresses: bool) -> HandshakeResult:
    """Validate a WebSocket upgrade request (section 4.2.1).

    The caller has checked the Upgrade and Connection fields, and that there is no body.

    Args:
        head: the head of the request. A field with several lines is one list, which no field that
            must have one line accepts.
        compresses: whether to accept permessage-deflate.

    Raises:
        RefusedError: the request violates a rule, which the detail names.
    """
    if head.method != "GET":
        status = HTTPStatus.METHOD_NOT_ALLOWED
        raise RefusedError(INVALID, "method must be GET", status, {"Allow": "GET"})
    if head.version != "1.1":
        status = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
        raise RefusedError(INVALID, "HTTP version must be 1.1", status)
    fields = head.fields
    if fields.get(b"sec-websocket-version") != VERSION:
        status = HTTPStatus.UPGRADE_REQUIRED
        raise RefusedError(
            INVALID,
            "unsupported Sec-WebSocket-Version: must be 13",
            status,
            {"Sec-WebSocket-Version": VERSION.decode(), "Upgrade": "websocket"},
        )
    key = fields.get(b"sec-websocket-key")
    if key is None or b"," in key:
        raise RefusedError(INVALID, "exactly one Sec-WebSocket-Key required")
    if not KEY.fullmatch(key):
        raise RefusedError(INVALID, "Sec-WebSocket-Key is not 16 bytes in base64")
    protocols = _decode_offers(fields.get(b"sec-websocket-protocol", b""))
    offers = _decode_offers(fields.get(b"sec-websocket-extensions", b""))
    try:
        subprotocols = parse_subprotocol(protocols) if protocols else []
        negotiated = negotiate(offers) if offers else None
    except InvalidHeaderFormat as error:
        raise RefusedError(INVALID, f"{error.name} is malformed") from None
    if len(set(subprotocols)) < len(subprotocols):
        raise RefusedError(INVALID, "duplicate subprotocol")
    extensions, encoding = negotiated if negotiated and compresses else ("", PLAIN)
    accept = accept_key(key.decode("ascii"))
    return HandshakeResult(accept, cast(list[str], subprotocols), extensions, encoding)


def _decode_offers(value: bytes) -> str:
    if value.count(b",") + value.count(b";") >= MAX_OFFERS:
        raise RefusedError(INVALID, "too much is offered")
    return value.decode("latin-1")


class ClientDisconnectedError(OSError):
    """The client disconnected during the handshake. ASGI requires an OSError on a later send."""


class Handshake:
    """The handshake of one connection.

    Args:
        connection: the connection to upgrade.
        context: shared limits and counters.
        http_connections: counts the connection again after a refusal.
    """

    def __init__(
        self,
        connection: Connection,
        context: ConnectionContext,
        http_connections: HttpConnections,
    ) -> None:
        self._connection = connection
        self._context = context
        self._http_connections = http_connections
        self._result: HandshakeResult | None = None
        self._has_sent_connect = False

    async def run(self, app: App, scope: Scope, result: HandshakeResult) -> None:
        """Run the application, which accepts or refuses the handshake."""
        self._result = result
        scope[WEBSOCKET_CONNECTION_KEY], scope[HANDSHAKE_KEY] = self._connection, self
        self._http_connections.pending_handshakes += 1
        try:
            await app(scope, self._receive, self._send)
        except ClientDisconnectedError:
            pass
        except Exception:
            log.exception("endpoint failed")
        finally:
            self._http_connections.pending_handshakes -= 1
        if self._connection.in_handshake:
            self.refuse(RefusedError(Refusal.INTERNAL_ERROR))
        elif not self._connection.has_sink:
            # Accepted, but the application assigned no sink.
            self._connection.close(Close.INTERNAL_ERROR)

    async def _receive(self) -> Event:
        if not self._has_sent_connect:
            self._has_sent_connect = True
            return {"type": "websocket.connect"}
        # The client's messages go to the sink, not to ASGI.
        return {"type": "websocket.disconnect", "code": 1006}

    async def _send(self, event: Event) -> None:
        if not self._connection.in_handshake:
            raise ClientDisconnectedError
        if event["type"] != "websocket.accept":
            raise RuntimeError(f"unexpected ASGI message {event['type']!r} before the upgrade")
        result = self._result
        assert result is not None
        head = f"{ACCEPTED}{result.accept}\r\n"
        if event.get("subprotocol"):
            head += f"Sec-WebSocket-Protocol: {event['subprotocol']}\r\n"
        if result.extensions:
            head += f"Sec-WebSocket-Extensions: {result.extensions}\r\n"
        layout = Layout.HEADER if event.get("subprotocol") == SUBPROTOCOL else Layout.PAYLOAD
        delivery_format = DeliveryFormat.of(layout, result.encoding)
        self._connection.open(f"{head}\r\n".encode("latin-1"), delivery_format)

    def refuse(self, error: RefusedError) -> None:
        """Send a refusal, and count the connection until its client has read it and disconnects."""
        response = self._context.refusals.respond(error)
        if not self._connection.in_handshake:
            return
        self._connection.reject_upgrade(response)
        if (limit := self._http_connections.register(self)) is not None:
            self.evict(limit)
        else:
            self._connection.when_lost(partial(self._http_connections.unregister, self))

    def is_request_arriving(self) -> bool:
        """Return False: a refused connection closes after its response."""
        return False

    def evict(self, error: RefusedError) -> None:
        """Abort a refused connection. Its response is already written."""
        self._connection.abort(Close.CONNECTION_LOST)
