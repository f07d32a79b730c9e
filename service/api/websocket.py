"""Let WebSocket clients in: decide, accept, hand over, and be gone."""

import logging
import re
from http import HTTPStatus
from typing import cast
from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response, WebSocket
from fastapi.responses import PlainTextResponse

from service.admission.bearer import POSITIONS_SUBPROTOCOL, selected
from service.admission.door import (
    CHANNEL_NAME,
    DEFAULT_CHANNEL,
    Admission,
    Upgrade,
    retry_after_s,
)
from service.admission.pressure import Pressure
from service.backplane.base import Position
from service.errors import Refusal, RefusedError
from service.ledger import Ledger
from service.relay.broadcaster import Broadcaster
from service.relay.replay import Wish
from service.wire.handshake import CLIENT_KEY
from service.wire.protocol import RelayProtocol

log = logging.getLogger(__name__)

COUNT = re.compile(r"[0-9]{1,9}", re.ASCII)
MAX_PARAMETERS = 100


def websocket_router(
    admission: Admission,
    broadcaster: Broadcaster,
    ledger: Ledger,
    pressure: Pressure,
    *,
    base_path: str,
) -> APIRouter:
    """Return the routes of `/` and `/channels/{channel}`, and a 404 for every other upgrade.

    Args:
        admission: who may come in.
        broadcaster: where they go.
        ledger: where refusals are counted.
        pressure: what tells the log of limits that are hit.
        base_path: what stands before both paths.
    """

    async def subscribe(websocket: WebSocket) -> None:
        scope = websocket.scope
        channel = websocket.path_params.get("channel", DEFAULT_CHANNEL)
        offered: list[str] = scope["subprotocols"]
        tells_positions = POSITIONS_SUBPROTOCOL in offered
        upgrade = Upgrade(
            channel,
            websocket.headers,
            scope["query_string"],
            offered,
            _host(scope["client"]),
            websocket.headers.getlist("authorization"),
        )
        try:
            wish = _wish(scope["query_string"], tells_positions=tells_positions)
            terms = await admission.admit(upgrade)
        except RefusedError as refused:
            await refuse(websocket, refused)
            return
        # Nothing waits from here on, accept() neither: who was let in is in before anybody else
        # is looked at.
        await websocket.accept(subprotocol=selected(offered))
        client = cast(RelayProtocol, scope[CLIENT_KEY])
        admission.bind(client, terms)
        broadcaster.subscribe(channel, client, wish)

    async def no_such_path(websocket: WebSocket) -> None:
        await refuse(websocket, RefusedError(Refusal.PATH))

    async def refuse(websocket: WebSocket, refused: RefusedError) -> None:
        ledger.refusals[refused.why] += 1
        pressure.note(refused.why)
        log.debug("refused", extra={"reason": refused.why.label, "detail": refused.detail})
        await websocket.send_denial_response(_answer(refused))

    async def upgrade_required(request: Request) -> Response:
        channel = request.path_params.get("channel", DEFAULT_CHANNEL)
        if not CHANNEL_NAME.fullmatch(channel):
            return _answer(RefusedError(Refusal.PATH))
        return PlainTextResponse(
            "This is a WebSocket; connect with ws:// or wss://.\n",
            HTTPStatus.UPGRADE_REQUIRED,
            {"Upgrade": "websocket", "Connection": "Upgrade"},
        )

    router = APIRouter()
    # Starlette's plain routes: FastAPI's own solve dependencies, of which there are none here,
    # at a third of the handshake's cost.
    for path in ("/", "/channels/{channel}"):
        router.add_websocket_route(base_path + path, subscribe)
        router.add_route(base_path + path, upgrade_required, methods=["GET"])
    router.add_websocket_route("/{path:path}", no_such_path)
    return router


def _wish(query: bytes, *, tells_positions: bool) -> Wish | None:
    """Return what a client wants to hear first; None: nothing."""
    since, last = None, 0
    if b"since=" in query or b"history=" in query:
        asked = _parameters(query)
        since = _position(asked["since"]) if "since" in asked else None
        counts = asked.get("history", ["0"])
        if len(counts) > 1 or not COUNT.fullmatch(counts[0]):
            raise RefusedError(Refusal.QUERY, "history is one number of messages")
        last = int(counts[0])
    if since is None and not last and not tells_positions:
        return None
    return Wish(since, last, tells_positions)


def _parameters(query: bytes) -> dict[str, list[str]]:
    try:
        text = query.decode("latin-1")
        return parse_qs(text, keep_blank_values=True, max_num_fields=MAX_PARAMETERS)
    except ValueError:
        raise RefusedError(Refusal.QUERY, "too many parameters") from None


def _position(texts: list[str]) -> Position:
    try:
        (text,) = texts
        return Position.parse(text)
    except ValueError:
        raise RefusedError(Refusal.QUERY, "since is one position, as the relay told it") from None


def _host(address: tuple[str, int] | None) -> str | None:
    return address[0] if address is not None else None


def _answer(refused: RefusedError) -> Response:
    status = refused.why.status
    headers = {}
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = str(retry_after_s())
    elif status is HTTPStatus.UNAUTHORIZED:  # RFC 6750 section 3
        bad = refused.why is Refusal.BAD_TOKEN
        headers["WWW-Authenticate"] = 'Bearer error="invalid_token"' if bad else "Bearer"
    return PlainTextResponse(f"{refused}\n", status, headers)
