"""Answer who is in a channel. Knows no connection."""

from typing import Any

from fastapi import APIRouter, Request, Response

from websocket_relay.admission.policy import AdmissionPolicy
from websocket_relay.api import media_types
from websocket_relay.api.refusals import refusal_responses
from websocket_relay.api.requests import (
    CHANNEL_PARAMETER,
    CHANNEL_PATH,
    TOKEN_PARAMETER,
    admission_request_of,
    cancelled_when_lost,
    channel_of,
)
from websocket_relay.api.routes import add_get_route
from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.presence.attendance import PresenceAttendance

EXAMPLE = {
    "count": 1,
    "clients": [
        {"client": "bsvVecN3UvZr", "user": "ada", "since": 1796122146.086, "info": {"name": "Ada"}}
    ],
}
PRESENCE: dict[str, Any] = {
    "description": "How many clients are in the channel, and who they are: `presence.max_clients`"
    " at most.",
    "content": {"application/json": {"example": EXAMPLE}},
}


def require_presence(presence: PresenceAttendance | None, channel: str) -> PresenceAttendance:
    """Return the presence of a channel.

    Args:
        presence: of clients in channels; None: no channel has it.
        channel: name of the channel.

    Raises:
        RefusedError: the channel has none.
    """
    if presence is None:
        raise RefusedError(Refusal.NO_PRESENCE)
    presence.check(channel)
    return presence


def presence_router(
    admission: AdmissionPolicy, presence: PresenceAttendance | None, *, base_path: str
) -> APIRouter:
    """Return the route of `/channels/{channel}/presence`.

    Args:
        admission: decides who may subscribe.
        presence: of clients in channels; None: there is none.
        base_path: the prefix of the path.
    """

    async def read_presence(request: Request) -> Response:
        channel = channel_of(request)
        with cancelled_when_lost(request):
            await admission.admit_reader(admission_request_of(request, (channel,)))
        encoded = require_presence(presence, channel).encoded(channel)
        return Response(f"{{{encoded}}}", media_type=media_types.JSON)

    router = APIRouter()
    add_get_route(
        router,
        f"{base_path}{CHANNEL_PATH}/presence",
        read_presence,
        summary="Who is in a channel",
        response_model=None,
        responses={200: PRESENCE, **refusal_responses(400, 401, 403, 404, 503)},
        openapi_extra={"parameters": [CHANNEL_PARAMETER, TOKEN_PARAMETER]},
    )
    return router
