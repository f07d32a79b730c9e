"""Parse requests of all routes: channel, token, replay. Knows no response."""

import re
from urllib.parse import parse_qs

from starlette.requests import HTTPConnection

from websocket_relay.admission.policy import AdmissionRequest
from websocket_relay.backplane.interface import Position
from websocket_relay.channels.names import CHANNEL_NAME, DEFAULT_CHANNEL
from websocket_relay.channels.recovery import ReplayRequest
from websocket_relay.outcomes import Refusal, RefusedError

COUNT = re.compile(r"[0-9]{1,9}", re.ASCII)
MAX_PARAMETERS = 100


DEFAULT_PATH, CHANNEL_PATH = "/", "/channels/{channel}"

CHANNEL_PARAMETER = {
    "name": "channel",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": f"^{CHANNEL_NAME.pattern}$", "maxLength": 128},
}


TOKEN_PARAMETER = {
    "name": "access_token",
    "in": "query",
    "description": "a token, if auth.mode is jwt; prefer `Authorization: Bearer TOKEN`",
    "schema": {"type": "string"},
}


def channel_of(connection: HTTPConnection) -> str:
    """Return the channel in the path, or the default channel.

    Raises:
        RefusedError: the path names no channel.
    """
    channel: str = connection.path_params.get("channel", DEFAULT_CHANNEL)
    if not CHANNEL_NAME.fullmatch(channel):
        raise RefusedError(Refusal.NO_SUCH_CHANNEL)
    return channel


def admission_request_of(connection: HTTPConnection) -> AdmissionRequest:
    """Return the parts of a request that admission depends on.

    Raises:
        RefusedError: the path names no channel.
    """
    scope = connection.scope
    client = scope["client"]
    authorization = []
    origin, authority = None, ""
    for name, value in scope["headers"]:
        if name == b"origin":
            origin = value.decode("latin-1")
        elif name == b"host":
            authority = value.decode("latin-1")
        elif name == b"authorization":
            authorization.append(value.decode("latin-1"))
    return AdmissionRequest(
        channel_of(connection),
        origin,
        authority,
        scope["query_string"],
        scope.get("subprotocols", ()),
        client[0] if client is not None else None,
        scope["scheme"],
        authorization,
    )


def replay_request_of(
    query: bytes, *, sends_positions: bool, last_event_id: str = ""
) -> ReplayRequest | None:
    """Return the replay that a client requests; None: it subscribes without one.

    Args:
        query: the part of the URL after the question mark.
        sends_positions: whether the client receives the position of each message.
        last_event_id: a position. It overrides `since`: a browser that reconnects sends the same
            URL again, so the query is older.

    Raises:
        RefusedError: a parameter is invalid.
    """
    since, last = None, 0
    if b"since=" in query or b"history=" in query:
        parameters = _parameters(query)
        since = _position(parameters["since"]) if "since" in parameters else None
        counts = parameters.get("history", ["0"])
        if len(counts) > 1 or not COUNT.fullmatch(counts[0]):
            raise RefusedError(Refusal.INVALID_QUERY, "history must be one number of messages")
        last = int(counts[0])
    if last_event_id:
        since = _position([last_event_id])
    if since is None and not last and not sends_positions:
        return None
    return ReplayRequest(since, last)


def _parameters(query: bytes) -> dict[str, list[str]]:
    try:
        text = query.decode("latin-1")
        return parse_qs(text, keep_blank_values=True, max_num_fields=MAX_PARAMETERS)
    except ValueError:
        raise RefusedError(Refusal.INVALID_QUERY, "too many parameters") from None


def _position(texts: list[str]) -> Position:
    try:
        (text,) = texts
        return Position.parse(text)
    except ValueError:
        raise RefusedError(Refusal.INVALID_QUERY, "since must be one position") from None
