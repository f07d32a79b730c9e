"""Let WebSocket clients in: decide, accept, hand over, and be gone."""

import logging
from http import HTTPStatus
from typing import cast

from fastapi import APIRouter, Request, Response, WebSocket
from fastapi.responses import PlainTextResponse

from service.admission.bearer import selected
from service.admission.door import (
    CHANNEL_NAME,
    DEFAULT_CHANNEL,
    Admission,
    Upgrade,
    retry_after_s,
)
from service.admission.pressure import Pressure
from service.errors import Refusal, RefusedError
from service.ledger import Ledger
from service.relay.broadcaster import Broadcaster
from service.wire.handshake import CLIENT_KEY
from service.wire.protocol import RelayProtocol

log = logging.getLogger(__name__)


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
        upgrade = Upgrade(
            channel,
            websocket.headers,
            scope["query_string"],
            offered,
            _host(scope["client"]),
            websocket.headers.getlist("authorization"),
        )
        try:
            terms = await admission.admit(upgrade)
        except RefusedError as refused:
            await refuse(websocket, refused)
            return
        # Nothing waits from here on, accept() neither: who was let in is in before anybody else
        # is looked at.
        await websocket.accept(subprotocol=selected(offered))
        client = cast(RelayProtocol, scope[CLIENT_KEY])
        admission.bind(client, terms)
        broadcaster.subscribe(channel, client)

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
