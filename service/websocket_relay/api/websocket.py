"""Let WebSocket clients in: decide, accept, hand over, and be gone."""

from http import HTTPStatus
from typing import cast

from fastapi import APIRouter, Request, Response, WebSocket
from fastapi.responses import PlainTextResponse

from websocket_relay.admission.credentials import POSITIONS_SUBPROTOCOL, select_subprotocol
from websocket_relay.admission.policy import CHANNEL_NAME, AdmissionPolicy
from websocket_relay.api.refusals import Refusals, answer_to
from websocket_relay.api.requests import (
    CHANNEL_PATH,
    DEFAULT_PATH,
    admission_request_of,
    channel_of,
    replay_request_of,
)
from websocket_relay.channels.broadcaster import Broadcaster
from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.wire.handshake import CLIENT_KEY
from websocket_relay.wire.websocket import WebSocketConnection


def add_websocket_routes(
    router: APIRouter,
    admission: AdmissionPolicy,
    broadcaster: Broadcaster,
    refusals: Refusals,
    *,
    base_path: str,
) -> None:
    """Add the routes of `/` and `/channels/{channel}`, and a 404 for every other upgrade.

    Args:
        router: the application's own. FastAPI asks a router that is included in it one route after
            the other, twice: with some routers before this one, a tenth of the handshake's cost.
        admission: who may come in.
        broadcaster: where they go.
        refusals: what answers the others.
        base_path: what stands before both paths.
    """

    async def subscribe(websocket: WebSocket) -> None:
        scope = websocket.scope
        offered: list[str] = scope["subprotocols"]
        tells_positions = POSITIONS_SUBPROTOCOL in offered
        try:
            wish = replay_request_of(scope["query_string"], tells_positions=tells_positions)
            terms = await admission.admit(admission_request_of(websocket))
        except RefusedError as refused:
            await refuse(websocket, refused)
            return
        # Nothing waits from here on, accept() neither: who was let in is in before anybody else
        # is looked at.
        await websocket.accept(subprotocol=select_subprotocol(offered))
        client = cast(WebSocketConnection, scope[CLIENT_KEY])
        admission.bind(client, terms)
        broadcaster.subscribe(channel_of(websocket), client, wish)

    async def no_such_path(websocket: WebSocket) -> None:
        await refuse(websocket, RefusedError(Refusal.PATH))

    async def refuse(websocket: WebSocket, refused: RefusedError) -> None:
        await websocket.send_denial_response(refusals.answer(refused))

    # Starlette's plain routes: FastAPI's own solve dependencies, of which there are none here,
    # at a third of the handshake's cost.
    for path in (DEFAULT_PATH, CHANNEL_PATH):
        router.add_websocket_route(base_path + path, subscribe)
    router.add_websocket_route("/{path:path}", no_such_path)


def upgrade_router(*, base_path: str) -> APIRouter:
    """Return the routes that tell plain requests for the same paths to upgrade.

    Args:
        base_path: what stands before both paths.
    """

    async def upgrade_required(request: Request) -> Response:
        if not CHANNEL_NAME.fullmatch(channel_of(request)):
            return answer_to(RefusedError(Refusal.PATH))
        return PlainTextResponse(
            "This is a WebSocket; connect with ws:// or wss://.\n",
            HTTPStatus.UPGRADE_REQUIRED,
            {"Upgrade": "websocket", "Connection": "Upgrade"},
        )

    router = APIRouter()
    for path in (DEFAULT_PATH, CHANNEL_PATH):
        router.add_route(base_path + path, upgrade_required, methods=["GET"])
    return router
