"""Admit clients of server-sent events, send the response head, and hand the connection over.

Knows no message: after the handover the event stream belongs to wire.sse.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from websocket_relay.admission.policy import AdmissionPolicy, Grant
from websocket_relay.api.identities import identity_of
from websocket_relay.api.refusals import refusal_responses
from websocket_relay.api.requests import (
    CHANNEL_PARAMETER,
    CHANNEL_PATH,
    TOKEN_PARAMETER,
    admission_request_of,
    cancelled_when_lost,
    channel_of,
    channels_of_query,
    flag_of,
    replay_request_of,
)
from websocket_relay.api.routes import add_get_route
from websocket_relay.channels.broadcaster import Broadcaster
from websocket_relay.channels.channel import Channel
from websocket_relay.channels.recovery import ReplayRequest
from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.presence.attendance import PresenceAttendance
from websocket_relay.wire.connection import Connection
from websocket_relay.wire.delivery_format import DeliveryFormat, Layout
from websocket_relay.wire.event_stream import StreamNotices, open_event_stream
from websocket_relay.wire.http_protocol import CONNECTION_KEY, HttpProtocol
from websocket_relay.wire.sse import encode_event

HEAD = {
    "Cache-Control": "no-store, no-transform",  # a proxy that compresses would buffer events
    "X-Accel-Buffering": "no",  # for nginx and its derivatives
    "Connection": "close",
}

EVENTS, NAMED_EVENTS = DeliveryFormat.of(Layout.EVENT), DeliveryFormat.of(Layout.NAMED_EVENT)

STREAM: dict[str, Any] = {
    "description": "An endless event stream: `id` is the position of a message; binary messages are"
    " base64 in events named `binary`; the relay itself sends `welcome`, `gap` and `close`.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}
CHANNELS_PARAMETER = {
    "name": "channel",
    "in": "query",
    "description": "a channel; several make one stream, whose events are named"
    " `message:CHANNEL` and `binary:CHANNEL`. Default: the channel `default`",
    "schema": {"type": "array", "items": CHANNEL_PARAMETER["schema"]},
}
PARAMETERS = [
    {
        "name": "since",
        "in": "query",
        "description": "a position; all messages after it are replayed first",
        "schema": {"type": "string"},
    },
    {
        "name": "history",
        "in": "query",
        "description": "number of most recent messages to replay first",
        "schema": {"type": "integer", "minimum": 0},
    },
    {
        "name": "Last-Event-ID",
        "in": "header",
        "description": "like `since`, and overrides it",
        "schema": {"type": "string"},
    },
    {
        "name": "presence",
        "in": "query",
        "description": "`true`: who is in the channel, then events `joined` and `left`",
        "schema": {"type": "boolean"},
    },
    TOKEN_PARAMETER,
]


class Subscription(NamedTuple):
    """The channels of an event stream, and what its client may do and gets.

    Attributes:
        channels: names.
        grant: what the client may do.
        replay: what is replayed to it first.
        watched: the channels of which it is notified of joins and leaves.
        address: of its client; None: it is not known.
    """

    channels: Sequence[str]
    grant: Grant
    replay: ReplayRequest
    watched: Sequence[str]
    address: str | None


class EventsResponse(Response):
    """A response that consists of a head and an event stream, and ends with the connection.

    The response to HEAD is the head alone.

    Args:
        subscription: what is subscribed to.
        admission: enforces the grant.
        broadcaster: owns the channels.
        silence_s: see `open_event_stream`.
        presence: of clients in channels; None: there is none.
        identifies: whether the connection gets an identity.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        subscription: Subscription,
        admission: AdmissionPolicy,
        broadcaster: Broadcaster,
        silence_s: float,
        presence: PresenceAttendance | None,
        *,
        identifies: bool,
    ) -> None:
        super().__init__(headers=HEAD)
        del self.headers["content-length"]
        self._subscription = subscription
        self._admission = admission
        self._broadcaster = broadcaster
        self._silence_s = silence_s
        self._presence = presence
        self._identifies = identifies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head and hand the connection over."""
        connection: HttpProtocol = scope[CONNECTION_KEY]
        connection.delimit_body_by_close()
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body"})
        elif (transport := connection.detach_transport()) is not None:
            broadcaster = self._broadcaster
            names, grant, replay, watched, address = self._subscription
            delivery_format = NAMED_EVENTS if len(names) > 1 else EVENTS
            client = open_event_stream(
                transport, broadcaster.shared, delivery_format, self._silence_s
            )
            self._admission.enforce_grant(client, grant, may_publish=False)
            channel = broadcaster.combined_channel(names)
            who_is_here = None
            if self._identifies:
                access = self._admission.access_of(grant)
                client.identity = identity_of(access, address)
            if watched:
                who_is_here = partial(self._watch, channel, client, watched)
            notices = StreamNotices(client, who_is_here)
            broadcaster.subscribe(channel, client, delivery_format, replay, notices)
            client.attach_sink(channel)

    def _watch(self, channel: Channel, client: Connection, names: Sequence[str]) -> None:
        """Send who is in some channels, and from then on who joins and leaves."""

        def send() -> None:
            assert self._presence is not None
            for name in names:
                fields = {"type": "presence", "channel": name}
                client.write_control(encode_event("presence", fields, self._presence.encoded(name)))

        channel.add_watcher(client, client.delivery_format, send)


def events_router(
    admission: AdmissionPolicy,
    broadcaster: Broadcaster,
    *,
    base_path: str,
    silence_s: float,
    presence: PresenceAttendance | None,
    identifies: bool,
) -> APIRouter:
    """Return the routes of `/events` and `/channels/{channel}/events`.

    Args:
        admission: decides who may subscribe.
        broadcaster: owns the channels.
        base_path: the prefix of both paths.
        silence_s: see `open_event_stream`.
        presence: of clients in channels; None: there is none.
        identifies: whether connections get an identity.
    """

    def watched_of(channels: Sequence[str]) -> Sequence[str]:
        """Return the channels of which a client is notified of joins and leaves."""
        watched = presence.covered(channels) if presence is not None else ()
        if not watched:
            raise RefusedError(Refusal.NO_PRESENCE)
        return watched

    async def listen(request: Request) -> Response:
        last_event_id = request.headers.get("last-event-id", "")
        query = request.scope["query_string"]
        connection: HttpProtocol = request.scope[CONNECTION_KEY]
        replay = replay_request_of(query, last_event_id=last_event_id)
        if "channel" in request.path_params:
            channels: Sequence[str] = (channel_of(request),)
        else:
            channels = channels_of_query(query, broadcaster.shared.max_channels_per_connection)
        is_watcher = flag_of(query, "presence", default=False)
        # Before admission: from its check of the limits on, nothing may suspend.
        await connection.drain()
        asked = admission_request_of(request, channels)
        with cancelled_when_lost(request):
            grant = await admission.admit(asked)
        # Only who may subscribe learns which channels have presence.
        watched = watched_of(channels) if is_watcher else ()
        subscription = Subscription(channels, grant, replay, watched, asked.host)
        return EventsResponse(
            subscription, admission, broadcaster, silence_s, presence, identifies=identifies
        )

    router = APIRouter()
    for path, parameters in (("", [CHANNELS_PARAMETER]), (CHANNEL_PATH, [CHANNEL_PARAMETER])):
        add_get_route(
            router,
            f"{base_path}{path}/events",
            listen,
            summary="Subscribe to a channel by server-sent events",
            response_model=None,
            responses={200: STREAM, **refusal_responses(400, 401, 403, 404, 503)},
            openapi_extra={"parameters": [*parameters, *PARAMETERS]},
        )
    return router
