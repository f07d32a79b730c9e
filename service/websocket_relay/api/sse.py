"""Let clients of server-sent events in: decide, answer with a head, hand over, and be gone."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from websocket_relay.admission.policy import AdmissionPolicy
from websocket_relay.api.refusals import Refusals, refused
from websocket_relay.api.requests import (
    CHANNEL_PARAMETER,
    CHANNEL_PATH,
    TOKEN_PARAMETER,
    admission_request_of,
    channel_of,
    replay_request_of,
)
from websocket_relay.channels.broadcaster import Broadcaster
from websocket_relay.outcomes import RefusedError
from websocket_relay.wire.http_protocol import CONNECTION_KEY, HttpProtocol
from websocket_relay.wire.sse import SseConnection

HEAD = {
    "Cache-Control": "no-store, no-transform",  # what compresses would wait for more
    "X-Accel-Buffering": "no",  # nginx and what is built on it
    "Connection": "close",
}


STREAM: dict[str, Any] = {
    "description": "Events without end: `id` is a message's position, binary is base64 in events"
    " named `binary`; `welcome`, `gap` and `close` are the relay's own.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}
PARAMETERS = [
    {
        "name": "since",
        "in": "query",
        "description": "a position: all that came behind it goes first",
        "schema": {"type": "string"},
    },
    {
        "name": "history",
        "in": "query",
        "description": "so many messages, the last ones, go first",
        "schema": {"type": "integer", "minimum": 0},
    },
    {
        "name": "Last-Event-ID",
        "in": "header",
        "description": "as `since`, and before it",
        "schema": {"type": "string"},
    },
    TOKEN_PARAMETER,
]


class EventsResponse(Response):
    """An answer whose end is the connection's: a head, and then whatever is said.

    Args:
        begin: takes the connection over behind the head.
    """

    media_type = "text/event-stream"

    def __init__(self, begin: Callable[[HttpProtocol], None]) -> None:
        super().__init__(headers=HEAD)
        del self.headers["content-length"]
        self._begin = begin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head, and hand the connection over."""
        connection: HttpProtocol = scope[CONNECTION_KEY]
        connection.leave_open()
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        self._begin(connection)


def events_router(
    admission: AdmissionPolicy,
    broadcaster: Broadcaster,
    refusals: Refusals,
    *,
    base_path: str,
    silence_s: float,
) -> APIRouter:
    """Return the routes of `/events` and `/channels/{channel}/events`.

    Args:
        admission: who may come in.
        broadcaster: where they go.
        refusals: what answers the others.
        base_path: what stands before both paths.
        silence_s: see `SseConnection`.
    """

    async def listen(request: Request) -> Response:
        last_event_id = request.headers.get("last-event-id", "")
        query = request.scope["query_string"]
        connection: HttpProtocol = request.scope[CONNECTION_KEY]
        try:
            wish = replay_request_of(query, tells_positions=True, last_event_id=last_event_id)
            await connection.answers_are_out()  # nothing waits from the look at the limits on
            terms = await admission.admit(admission_request_of(request))
        except RefusedError as error:
            return refusals.answer(error)

        def begin(connection: HttpProtocol) -> None:
            transport = connection.take_over()
            if transport is None:
                return
            client = SseConnection(broadcaster.shared, silence_s)
            transport.set_protocol(client)
            client.begin(transport)
            admission.bind(client, terms)
            broadcaster.subscribe(channel_of(request), client, wish)

        return EventsResponse(begin)

    router = APIRouter()
    for path, parameters in (("", []), (CHANNEL_PATH, [CHANNEL_PARAMETER])):
        router.add_api_route(
            f"{base_path}{path}/events",
            listen,
            methods=["GET"],
            summary="Listen to a channel by server-sent events",
            response_model=None,
            responses={200: STREAM, **refused(400, 401, 403, 404, 503)},
            openapi_extra={"parameters": [*parameters, *PARAMETERS]},
        )
    return router
