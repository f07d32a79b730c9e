"""Admit WebSocket clients, accept the upgrade, and hand the connection over. Knows no message."""

from http import HTTPStatus

from fastapi import APIRouter, Request, Response, WebSocket
from fastapi.responses import PlainTextResponse

from websocket_relay.admission.credentials import select_subprotocol
from websocket_relay.admission.policy import AdmissionPolicy
from websocket_relay.api.identities import identity_of
from websocket_relay.api.presence import require_presence
from websocket_relay.api.refusals import no_such_path, response_to
from websocket_relay.api.requests import (
    CHANNEL_PATH,
    DEFAULT_PATH,
    admission_request_of,
    channel_of,
    flag_of,
    replay_request_of,
    session_of,
    session_request_of,
)
from websocket_relay.channels.broadcaster import Broadcaster
from websocket_relay.channels.echoless import EcholessClient
from websocket_relay.channels.recovery import ReplayRequest
from websocket_relay.channels.relay_v1 import RelayV1Connection
from websocket_relay.outcomes import RefusedError
from websocket_relay.presence.attendance import PresenceAttendance
from websocket_relay.wire.connection import Connection
from websocket_relay.wire.delivery_format import DeliveryFormat
from websocket_relay.wire.handshake import HANDSHAKE_KEY, WEBSOCKET_CONNECTION_KEY
from websocket_relay.wire.relay_v1 import SUBPROTOCOL

PATH_COMMAND_ID = 0
"""The id of the answer to a subscription by the path. Commands have greater ones."""


def websocket_router(
    admission: AdmissionPolicy,
    broadcaster: Broadcaster,
    *,
    base_path: str,
    presence: PresenceAttendance | None,
    identifies: bool,
) -> APIRouter:
    """Return the routes of `/` and `/channels/{channel}`, and a 404 for every other upgrade.

    The router is an ASGI application, and is used as one: no middleware belongs to a handshake.
    Until the client is admitted, nothing may suspend but `AdmissionPolicy.admit`, see
    `asgi.start_now`.

    Args:
        admission: decides who may subscribe.
        broadcaster: owns the channels.
        base_path: the prefix of both paths.
        presence: of clients in channels; None: there is none.
        identifies: whether connections get an identity.
    """

    async def subscribe(websocket: WebSocket) -> None:
        scope = websocket.scope
        offered: list[str] = scope["subprotocols"]
        is_relay_v1 = SUBPROTOCOL in offered
        query = scope["query_string"]
        try:
            channel = channel_of(websocket)
            subscribes = not is_relay_v1 or "channel" in websocket.path_params
            replay, echoes = replay_request_of(query), flag_of(query, "echo", default=True)
            session = session_request_of(query if is_relay_v1 else b"")
            watches = is_relay_v1 and flag_of(query, "presence", default=False)
            channels = (channel,) if subscribes else ()
            request = admission_request_of(websocket, channels)
            grant = await admission.admit(request)
            if watches and subscribes:  # only who may subscribe learns which channels have presence
                require_presence(presence, channel)
            access = admission.access_of(grant)
            name = session_of(session, access.user)
        except RefusedError as error:
            scope[HANDSHAKE_KEY].refuse(error)
            return
        # Nothing suspends from here on, nor does accept(): an admitted client is counted before
        # the limits are checked for the next one.
        await websocket.accept(subprotocol=select_subprotocol(offered))
        client: Connection = scope[WEBSOCKET_CONNECTION_KEY]
        if not is_relay_v1:
            admission.enforce_grant(client, grant, may_publish=grant.may_publish(channel))
            client.identity = identity_of(access, request.host) if identifies else None
            _subscribe_plain(client, channel, replay, echoes=echoes)
            return
        admission.enforce_grant(client, grant, may_publish=True)
        sink = RelayV1Connection(client, broadcaster, access, presence)
        sink.open_session(name, session.seen)
        identity = identity_of(access, request.host, sink.client_id) if identifies else None
        client.identity = identity
        for each in channels:
            sink.subscribe(each, PATH_COMMAND_ID, replay, echoes=echoes, watches=watches)
        client.attach_sink(sink)

    def _subscribe_plain(
        client: Connection, name: str, replay: ReplayRequest, *, echoes: bool
    ) -> None:
        channel = broadcaster.channel(name)
        if not echoes:
            layout, encoding, _ = client.delivery_format
            client.delivery_format = DeliveryFormat.of(layout, encoding, echoes=False)
        requested = replay if replay.is_requested else None
        broadcaster.subscribe(channel, client, client.delivery_format, requested)
        client.attach_sink(channel if echoes else EcholessClient(client, channel, broadcaster))

    async def refuse_path(websocket: WebSocket) -> None:
        websocket.scope[HANDSHAKE_KEY].refuse(no_such_path(base_path))

    # Starlette's plain routes: FastAPI's resolve dependencies, which these routes do not have, at
    # a third of the handshake's cost.
    router = APIRouter()
    for path in (CHANNEL_PATH, DEFAULT_PATH):  # the one that most clients use is matched first
        router.add_websocket_route(base_path + path, subscribe)
    router.add_websocket_route("/{path:path}", refuse_path)
    return router


def upgrade_router(*, base_path: str) -> APIRouter:
    """Return the routes that answer plain requests for the same paths with 426.

    Args:
        base_path: the prefix of both paths.
    """

    async def upgrade_required(request: Request) -> Response:
        try:
            channel_of(request)
        except RefusedError as error:
            return response_to(error)
        return PlainTextResponse(
            "This is a WebSocket; connect with ws:// or wss://.\n",
            HTTPStatus.UPGRADE_REQUIRED,
            {"Upgrade": "websocket", "Connection": "Upgrade"},
        )

    router = APIRouter()
    for path in (DEFAULT_PATH, CHANNEL_PATH):
        router.add_route(base_path + path, upgrade_required, methods=["GET"])
    return router
