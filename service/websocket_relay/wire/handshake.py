"""Validate one WebSocket upgrade, pass it to the ASGI application and send the response.

Exists from the request to the response only. Knows RFC 6455 section 4 and the ASGI WebSocket
messages (spec 2.4, with the denial response extension). Knows no frame and no channel.
"""

import base64
import binascii
import email.utils
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, cast

from uvicorn._types import (
    ASGI3Application,
    ASGIReceiveEvent,
    ASGISendEvent,
    WebSocketScope,
)
from websockets.exceptions import InvalidHeaderFormat
from websockets.headers import parse_subprotocol
from websockets.utils import accept_key

from websocket_relay.outcomes import Close, Refusal
from websocket_relay.wire.connection import Connection
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.deflate import PLAIN, negotiate
from websocket_relay.wire.http_connections import HttpConnections
from websocket_relay.wire.security_headers import SECURITY_HEADERS

log = logging.getLogger(__name__)

WEBSOCKET_CONNECTION_KEY = "relay.client"
"""The key of the Connection in the ASGI scope."""

VERSION = b"13"
KEY_BYTES = 16
MAX_OFFERS = 64
"""Maximum number of extensions and their parameters, or of subprotocols, in one request. Parsing
thousands takes many times longer than the rest of the handshake."""

Headers = Sequence[tuple[bytes, bytes]]


class HandshakeError(Exception):
    """The request is not a valid RFC 6455 handshake.

    Args:
        detail: the rule that is violated.
        status: the status of the response.
        headers: required headers of the response.
    """

    def __init__(
        self,
        detail: str,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = headers or {}


@dataclass(frozen=True, slots=True)
class HandshakeResult:
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


def validate_handshake(
    method: str, http_version: str, headers: Headers, *, compresses: bool
) -> HandshakeResult:
    """Validate a WebSocket upgrade request (section 4.2.1).

    The caller has checked the Upgrade and Connection headers.

    Args:
        headers: names in lower case.
        compresses: whether to accept permessage-deflate.

    Raises:
        HandshakeError: the request violates a rule.
    """
    if method != "GET":
        status = HTTPStatus.METHOD_NOT_ALLOWED
        raise HandshakeError("method must be GET", status, {"Allow": "GET"})
    if http_version != "1.1":
        status = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
        raise HandshakeError("HTTP version must be 1.1", status)
    fields: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        fields.setdefault(name, []).append(value)
    if fields.get(b"sec-websocket-version") != [VERSION]:
        status = HTTPStatus.UPGRADE_REQUIRED
        raise HandshakeError(
            "unsupported Sec-WebSocket-Version: must be 13",
            status,
            {"Sec-WebSocket-Version": VERSION.decode(), "Upgrade": "websocket"},
        )
    if fields.get(b"content-length", [b"0"]) != [b"0"] or b"transfer-encoding" in fields:
        raise HandshakeError("request body not allowed")
    accept = _accept_value(fields.get(b"sec-websocket-key", []))
    protocols = _join_offers(fields.get(b"sec-websocket-protocol", []))
    offers = _join_offers(fields.get(b"sec-websocket-extensions", []))
    try:
        subprotocols = parse_subprotocol(protocols) if protocols else []
        negotiated = negotiate(offers) if offers else None
    except InvalidHeaderFormat as error:
        raise HandshakeError(f"{error.name} is malformed") from None
    if len(set(subprotocols)) < len(subprotocols):
        raise HandshakeError("duplicate subprotocol")
    extensions, encoding = negotiated if negotiated and compresses else ("", PLAIN)
    return HandshakeResult(accept, cast(list[str], subprotocols), extensions, encoding)


def _join_offers(lines: list[bytes]) -> str:
    """Combine the lines of a list field into one value (RFC 9110 section 5.3)."""
    offers = b", ".join(lines)
    if offers.count(b",") + offers.count(b";") >= MAX_OFFERS:
        raise HandshakeError("too much is offered")
    return _decode(offers)


def _accept_value(keys: list[bytes]) -> str:
    if len(keys) != 1:
        raise HandshakeError("exactly one Sec-WebSocket-Key required")
    try:
        key = base64.b64decode(keys[0], validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise HandshakeError("Sec-WebSocket-Key is not 16 bytes in base64")
    return accept_key(_decode(keys[0]))


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
        self._denial: tuple[int, list[tuple[str, str]]] | None = None
        self._denial_body = b""
        self._has_sent_connect = False

    def validate(self, method: str, http_version: str, headers: Headers) -> HandshakeResult | None:
        """Validate the request. Return None after sending the refusal of an invalid one."""
        try:
            self._result = validate_handshake(
                method, http_version, headers, compresses=self._context.compresses
            )
        except HandshakeError as error:
            self._context.counters.refusals[Refusal.INVALID_HANDSHAKE] += 1
            text = f"{Refusal.INVALID_HANDSHAKE.reason}: {error}\n"
            self._deny(error.status, [*error.headers.items(), TEXT_CONTENT_TYPE], text.encode())
        return self._result

    async def run(self, app: ASGI3Application, scope: WebSocketScope) -> None:
        """Run the application, which accepts or denies the handshake."""
        cast(dict[str, Any], scope)[WEBSOCKET_CONNECTION_KEY] = self._connection
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
            self._deny(HTTPStatus.INTERNAL_SERVER_ERROR, [TEXT_CONTENT_TYPE], b"internal error\n")
        elif not self._connection.has_sink:
            # Accepted, but the application assigned no sink.
            self._connection.close(Close.INTERNAL_ERROR)

    async def _receive(self) -> ASGIReceiveEvent:
        if not self._has_sent_connect:
            self._has_sent_connect = True
            return {"type": "websocket.connect"}
        # The client's messages go to the sink, not to ASGI.
        return {"type": "websocket.disconnect", "code": 1006}

    async def _send(self, message: ASGISendEvent) -> None:
        event = cast(dict[str, Any], message)
        if not self._connection.in_handshake:
            raise ClientDisconnectedError
        match event["type"]:
            case "websocket.accept":
                self._accept(event)
            case "websocket.close":
                self._deny(HTTPStatus.FORBIDDEN, [], b"")
            case "websocket.http.response.start":
                self._denial = (event["status"], _decode_headers(event.get("headers", ())))
            case "websocket.http.response.body" if self._denial is not None:
                self._denial_body += event.get("body", b"")
                if not event.get("more_body", False):
                    self._deny(*self._denial, self._denial_body)
            case other:
                raise RuntimeError(f"unexpected ASGI message {other!r} before the upgrade")

    def _accept(self, event: dict[str, Any]) -> None:
        result = self._result
        assert result is not None
        headers = [
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Accept", result.accept),
        ]
        if event.get("subprotocol"):
            headers.append(("Sec-WebSocket-Protocol", event["subprotocol"]))
        if result.extensions:
            headers.append(("Sec-WebSocket-Extensions", result.extensions))
        headers += _decode_headers(event.get("headers", ()))
        self._connection.open(
            _encode_head(HTTPStatus.SWITCHING_PROTOCOLS, headers), result.encoding
        )

    def _deny(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        headers = [
            *((name, value) for name, value in headers if name.lower() not in OWN_HEADERS),
            *SECURITY_HEADERS,
            ("Date", email.utils.formatdate(usegmt=True)),
            ("Connection", "close"),
            ("Content-Length", str(len(body))),
        ]
        if self._connection.in_handshake:
            self._connection.reject_upgrade(_encode_head(HTTPStatus(status), headers) + body)
            RefusedConnection(self._connection, self._http_connections)


class RefusedConnection:
    """A refused connection, until its client has read the response and disconnects.

    Args:
        connection: the refused connection.
        http_connections: counts it until then.
    """

    def __init__(self, connection: Connection, http_connections: HttpConnections) -> None:
        self._connection = connection
        refusal = http_connections.register(self)
        if refusal is None:
            connection.when_lost(partial(http_connections.unregister, self))
        else:
            self.evict(refusal)

    def is_request_arriving(self) -> bool:
        """Return False: the connection closes after its response."""
        return False

    def evict(self, refusal: Refusal) -> None:
        """Abort the connection. Its response is already written."""
        self._connection.abort(Close.CONNECTION_LOST)


TEXT_CONTENT_TYPE = ("Content-Type", "text/plain; charset=utf-8")
OWN_HEADERS = ("date", "connection", "content-length")


def _encode_head(status: HTTPStatus, headers: Iterable[tuple[str, str]]) -> bytes:
    lines = [f"{name}: {value}\r\n" for name, value in headers]
    return f"HTTP/1.1 {status} {status.phrase}\r\n{''.join(lines)}\r\n".encode("latin-1")


def _decode_headers(headers: Any) -> list[tuple[str, str]]:
    return [(_decode(name), _decode(value)) for name, value in headers]


def _decode(value: bytes) -> str:
    return value.decode("latin-1")
