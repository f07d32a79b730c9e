"""Carry one upgrade through ASGI: the application decides, the connection gets its answer.

Lives from the request to the answer; nothing of it is left afterwards. Knows RFC 6455 section 4
and the ASGI WebSocket messages (spec 2.4, with the denial response extension).
"""

import email.utils
import logging
from http import HTTPStatus
from typing import Any, cast

from uvicorn._types import (
    ASGI3Application,
    ASGIReceiveEvent,
    ASGISendEvent,
    WebSocketScope,
)
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.protocol import OPEN
from websockets.server import ServerProtocol

from service.errors import Close, Refusal
from service.wire.protocol import RelayProtocol, dismiss
from service.wire.shared import Shared

log = logging.getLogger(__name__)
wire_log = logging.getLogger("websockets.server")

CLIENT_KEY = "relay.client"
"""Where the endpoint finds its connection in the ASGI scope."""


class ClientGoneError(OSError):
    """The client left while the application decided; what ASGI wants raised on a late send."""


class Handshake:
    """One upgrade.

    Args:
        client: the connection that asks.
        request: its request.
        shared: bounds and books.
    """

    def __init__(self, client: RelayProtocol, request: Request, shared: Shared) -> None:
        self._client = client
        self._shared = shared
        # One object for both its halves: it checks the request, and being OPEN from the start
        # it parses frames once the 101 is out.
        self._parser = ServerProtocol(
            state=OPEN,
            max_size=shared.max_message_bytes,
            logger=wire_log,
        )
        self._answer = self._parser.accept(request)
        self._denial: tuple[int, Headers] | None = None
        self._denial_body = b""
        self._connected = False

    def refuse_malformed(self) -> bool:
        """Answer a request that is no handshake by RFC 6455; tell whether it was one such."""
        if self._answer.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
            return False
        self._shared.ledger.refusals[Refusal.HANDSHAKE] += 1
        dismiss(self._parser)
        self._client.refuse(self._answer.serialize())
        return True

    async def run(self, app: ASGI3Application, scope: WebSocketScope) -> None:
        """Ask the application."""
        cast(dict[str, Any], scope)[CLIENT_KEY] = self._client
        try:
            await app(scope, self._receive, self._send)
        except ClientGoneError:
            pass
        except Exception:
            log.exception("endpoint failed")
        if self._client.in_handshake:
            self._deny(HTTPStatus.INTERNAL_SERVER_ERROR, Headers(), b"Internal Server Error")
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
            raise ClientGoneError
        match event["type"]:
            case "websocket.accept":
                self._accept(event)
            case "websocket.close":
                self._deny(HTTPStatus.FORBIDDEN, Headers(), b"")
            case "websocket.http.response.start":
                self._denial = (event["status"], _decoded(event.get("headers", ())))
            case "websocket.http.response.body" if self._denial is not None:
                self._denial_body += event.get("body", b"")
                if not event.get("more_body", False):
                    self._deny(*self._denial, self._denial_body)
            case other:
                raise RuntimeError(f"unexpected ASGI message {other!r} before the upgrade")

    def _accept(self, event: dict[str, Any]) -> None:
        headers = self._answer.headers
        del headers["Date"]  # says nothing a WebSocket client needs
        if event.get("subprotocol"):
            headers["Sec-WebSocket-Protocol"] = event["subprotocol"]
        headers.update(_decoded(event.get("headers", ())))
        self._client.open(self._answer.serialize(), self._parser)

    def _deny(self, status: int, headers: Headers, body: bytes) -> None:
        for name in ("Date", "Connection", "Content-Length"):
            if name in headers:
                del headers[name]
        headers["Date"] = email.utils.formatdate(usegmt=True)
        headers["Connection"] = "close"
        headers["Content-Length"] = str(len(body))
        dismiss(self._parser)
        response = Response(status, HTTPStatus(status).phrase, headers, body)
        self._client.refuse(response.serialize())


def _decoded(headers: Any) -> Headers:
    return Headers([(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers])
