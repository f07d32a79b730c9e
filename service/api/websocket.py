"""Let WebSocket clients in: decide, accept, hand over, and be gone."""

from http import HTTPStatus
from typing import cast

from fastapi import APIRouter, Request, Response, WebSocket
from fastapi.responses import PlainTextResponse

from service.admission import CHANNEL_NAME, DEFAULT_CHANNEL, Admission, retry_after_s
from service.errors import Refusal
from service.ledger import Ledger
from service.relay.broadcaster import Broadcaster
from service.wire.handshake import CLIENT_KEY
from service.wire.protocol import RelayProtocol


def websocket_router(
    admission: Admission, broadcaster: Broadcaster, ledger: Ledger, *, base_path: str
) -> APIRouter:
    """Return the routes of `/` and `/channels/{channel}`, and a 404 for every other upgrade.

    Args:
        admission: who may come in.
        broadcaster: where they go.
        ledger: where refusals are counted.
        base_path: what stands before both paths.
    """

    async def subscribe(websocket: WebSocket) -> None:
        channel = websocket.path_params.get("channel", DEFAULT_CHANNEL)
        refusal = admission.refusal(channel, websocket.headers.get("origin"))
        if refusal is not None:
            await refuse(websocket, refusal)
            return
        offered: list[str] = websocket.scope["subprotocols"]
        # The relay is transparent to what its clients speak: it takes the first offer, because
        # browsers drop a connection whose offer is not answered.
        await websocket.accept(subprotocol=offered[0] if offered else None)
        broadcaster.subscribe(channel, cast(RelayProtocol, websocket.scope[CLIENT_KEY]))

    async def no_such_path(websocket: WebSocket) -> None:
        await refuse(websocket, Refusal.PATH)

    async def refuse(websocket: WebSocket, why: Refusal) -> None:
        ledger.refusals[why] += 1
        await websocket.send_denial_response(_refused(why))

    async def upgrade_required(request: Request) -> Response:
        channel = request.path_params.get("channel", DEFAULT_CHANNEL)
        if not CHANNEL_NAME.fullmatch(channel):
            return _refused(Refusal.PATH)
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


def _refused(why: Refusal) -> Response:
    unavailable = why.status is HTTPStatus.SERVICE_UNAVAILABLE
    headers = {"Retry-After": str(retry_after_s())} if unavailable else None
    return PlainTextResponse(why.reason + "\n", why.status, headers)
