"""Carry one upgrade through ASGI: the application decides, the connection gets its answer.

Lives from the request to the answer; nothing of it is left afterwards. Knows RFC 6455 section 4
and the ASGI WebSocket messages (spec 2.4, with the denial response extension).
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
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.deflate import PLAIN, negotiate
from websocket_relay.wire.http_connections import HttpConnections
from websocket_relay.wire.security_headers import SECURITY_HEADERS
from websocket_relay.wire.websocket import WebSocketConnection

log = logging.getLogger(__name__)

CLIENT_KEY = "relay.client"
"""Where the endpoint finds its connection in the ASGI scope."""

VERSION = b"13"
KEY_BYTES = 16
MAX_OFFERS = 64
"""Extensions with their parameters, or subprotocols, of one request: to look at thousands takes
many times longer than all else that is asked of it."""

Headers = Sequence[tuple[bytes, bytes]]


class HandshakeError(Exception):
    """The request is no handshake by RFC 6455.

    Args:
        detail: what is wrong with it.
        status: what says so.
        headers: what must be said with it.
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
    """What a request asks for, once it is a handshake.

    Attributes:
        accept: what answers its key.
        subprotocols: what it offers, in its order.
        extensions: what of its extensions is agreed to; empty for none.
        encoding: of what it is to be sent, as `deflate` names them.
    """

    accept: str
    subprotocols: list[str]
    extensions: str
    encoding: int


def validate_handshake(
    method: str, http_version: str, headers: Headers, *, compresses: bool
) -> HandshakeResult:
    """Check a request that asks for a WebSocket (section 4.2.1).

    That it does ask, in Upgrade and Connection, was found by who calls.

    Args:
        headers: names in lower case.
        compresses: whether permessage-deflate may be agreed to.

    Raises:
        HandshakeError: it breaks a rule.
    """
    if method != "GET":
        status = HTTPStatus.METHOD_NOT_ALLOWED
        raise HandshakeError("a WebSocket begins with GET", status, {"Allow": "GET"})
    if http_version != "1.1":
        status = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
        raise HandshakeError("a WebSocket begins with HTTP/1.1", status)
    fields: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        fields.setdefault(name, []).append(value)
    if fields.get(b"sec-websocket-version") != [VERSION]:
        status = HTTPStatus.UPGRADE_REQUIRED
        raise HandshakeError(
            "the only version is 13 (Sec-WebSocket-Version)",
            status,
            {"Sec-WebSocket-Version": VERSION.decode(), "Upgrade": "websocket"},
        )
    if fields.get(b"content-length", [b"0"]) != [b"0"] or b"transfer-encoding" in fields:
        raise HandshakeError("a request for a WebSocket has no body")
    accept = _accept(fields.get(b"sec-websocket-key", []))
    protocols = _offers(fields.get(b"sec-websocket-protocol", []))
    offers = _offers(fields.get(b"sec-websocket-extensions", []))
    try:
        subprotocols = parse_subprotocol(protocols) if protocols else []
        agreed = negotiate(offers) if offers else None
    except InvalidHeaderFormat as error:
        raise HandshakeError(f"{error.name} is malformed") from None
    if len(set(subprotocols)) < len(subprotocols):
        raise HandshakeError("a subprotocol is offered twice")
    extensions, encoding = agreed if agreed and compresses else ("", PLAIN)
    return HandshakeResult(accept, cast(list[str], subprotocols), extensions, encoding)


def _offers(lines: list[bytes]) -> str:
    """Return what the lines of a list field say together (RFC 9110 section 5.3)."""
    offers = b", ".join(lines)
    if offers.count(b",") + offers.count(b";") >= MAX_OFFERS:
        raise HandshakeError("too much is offered")
    return _text(offers)


def _accept(keys: list[bytes]) -> str:
    if len(keys) != 1:
        raise HandshakeError("there must be one Sec-WebSocket-Key")
    try:
        key = base64.b64decode(keys[0], validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise HandshakeError("Sec-WebSocket-Key is not 16 bytes in base64")
    return accept_key(_text(keys[0]))


class ClientDisconnectedError(OSError):
    """The client left while the application decided; what ASGI wants raised on a late send."""


class Handshake:
    """One upgrade.

    Args:
        client: the connection that asks.
        shared: bounds and books.
        plain: where the connection counts again once it was refused.
    """

    def __init__(
        self, client: WebSocketConnection, shared: ConnectionContext, plain: HttpConnections
    ) -> None:
        self._client = client
        self._shared = shared
        self._plain = plain
        self._agreement: HandshakeResult | None = None
        self._denial: tuple[int, list[tuple[str, str]]] | None = None
        self._denial_body = b""
        self._connected = False

    def validate(self, method: str, http_version: str, headers: Headers) -> HandshakeResult | None:
        """Return what the request asks for, or answer it where it is no handshake."""
        try:
            self._agreement = validate_handshake(
                method, http_version, headers, compresses=self._shared.compresses
            )
        except HandshakeError as error:
            self._shared.ledger.refusals[Refusal.HANDSHAKE] += 1
            text = f"{Refusal.HANDSHAKE.reason}: {error}\n"
            self._deny(error.status, [*error.headers.items(), PLAIN_TEXT], text.encode())
        return self._agreement

    async def run(self, app: ASGI3Application, scope: WebSocketScope) -> None:
        """Ask the application."""
        cast(dict[str, Any], scope)[CLIENT_KEY] = self._client
        self._plain.deciding += 1
        try:
            await app(scope, self._receive, self._send)
        except ClientDisconnectedError:
            pass
        except Exception:
            log.exception("endpoint failed")
        finally:
            self._plain.deciding -= 1
        if self._client.in_handshake:
            self._deny(HTTPStatus.INTERNAL_SERVER_ERROR, [PLAIN_TEXT], b"internal error\n")
        elif not self._client.has_sink:
            self._client.close(Close.INTERNAL)  # accepted, but nobody took it over

    async def _receive(self) -> ASGIReceiveEvent:
        if not self._connected:
            self._connected = True
            return {"type": "websocket.connect"}
        # What the client says goes to the sink; ASGI hears no more of it.
        return {"type": "websocket.disconnect", "code": 1006}

    async def _send(self, message: ASGISendEvent) -> None:
        event = cast(dict[str, Any], message)
        if not self._client.in_handshake:
            raise ClientDisconnectedError
        match event["type"]:
            case "websocket.accept":
                self._accept(event)
            case "websocket.close":
                self._deny(HTTPStatus.FORBIDDEN, [], b"")
            case "websocket.http.response.start":
                self._denial = (event["status"], _decoded(event.get("headers", ())))
            case "websocket.http.response.body" if self._denial is not None:
                self._denial_body += event.get("body", b"")
                if not event.get("more_body", False):
                    self._deny(*self._denial, self._denial_body)
            case other:
                raise RuntimeError(f"unexpected ASGI message {other!r} before the upgrade")

    def _accept(self, event: dict[str, Any]) -> None:
        agreement = self._agreement
        assert agreement is not None
        headers = [
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Accept", agreement.accept),
        ]
        if event.get("subprotocol"):
            headers.append(("Sec-WebSocket-Protocol", event["subprotocol"]))
        if agreement.extensions:
            headers.append(("Sec-WebSocket-Extensions", agreement.extensions))
        headers += _decoded(event.get("headers", ()))
        self._client.open(_head(HTTPStatus.SWITCHING_PROTOCOLS, headers), agreement.encoding)

    def _deny(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        headers = [
            *((name, value) for name, value in headers if name.lower() not in OURS),
            *SECURITY_HEADERS,
            ("Date", email.utils.formatdate(usegmt=True)),
            ("Connection", "close"),
            ("Content-Length", str(len(body))),
        ]
        if self._client.in_handshake:
            self._client.refuse(_head(HTTPStatus(status), headers) + body)
            RefusedConnection(self._client, self._plain)


class RefusedConnection:
    """A connection whose handshake was refused, until its client has taken the answer and is gone.

    Args:
        client: the connection.
        plain: where it counts.
    """

    def __init__(self, client: WebSocketConnection, plain: HttpConnections) -> None:
        self._client = client
        why = plain.enter(self)
        if why is None:
            client.when_lost(partial(plain.leave, self))
        else:
            self.make_room(why)

    def make_room(self, why: Refusal) -> None:
        """Cut the client off: it has had its answer."""
        self._client.abort(Close.VANISHED)


PLAIN_TEXT = ("Content-Type", "text/plain; charset=utf-8")
OURS = ("date", "connection", "content-length")


def _head(status: HTTPStatus, headers: Iterable[tuple[str, str]]) -> bytes:
    lines = [f"{name}: {value}\r\n" for name, value in headers]
    return f"HTTP/1.1 {status} {status.phrase}\r\n{''.join(lines)}\r\n".encode("latin-1")


def _decoded(headers: Any) -> list[tuple[str, str]]:
    return [(_text(name), _text(value)) for name, value in headers]


def _text(value: bytes) -> str:
    return value.decode("latin-1")
