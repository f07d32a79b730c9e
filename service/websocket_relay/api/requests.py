"""Parse requests of all routes: channel, token, replay. Knows no response."""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple
from urllib.parse import parse_qs

from starlette.requests import HTTPConnection, Request
from starlette.types import Scope

from websocket_relay.admission.policy import AdmissionRequest
from websocket_relay.backplane.interface import Position
from websocket_relay.channels.names import CHANNEL_NAME, DEFAULT_CHANNEL
from websocket_relay.channels.publications import SessionName
from websocket_relay.channels.recovery import ReplayRequest
from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.wire.http_protocol import CONNECTION_KEY, PEER_KEY, HttpProtocol

COUNT = re.compile(r"[0-9]{1,9}", re.ASCII)
MAX_PARAMETERS = 1_000


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
    "description": "a token, if auth.mode is jwt or hook; prefer `Authorization: Bearer TOKEN`",
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


def admission_request_of(connection: HTTPConnection, channels: Sequence[str]) -> AdmissionRequest:
    """Return the parts of a request that admission depends on.

    Args:
        connection: the request.
        channels: what it subscribes to, or publishes to.
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
        channels,
        origin,
        authority,
        scope["query_string"],
        scope.get("subprotocols", ()),
        client[0] if client is not None else None,
        scope["scheme"],
        authorization,
        scope["headers"],
        _subject_of(scope),
    )


def _subject_of(scope: Scope) -> str:
    """Return the user that the client's certificate names; empty: it has none.

    A certificate of a trusted proxy, which has forwarded another address, names the proxy.
    """
    peer: tuple[str, int] | None
    peer, subject = scope[PEER_KEY]
    return subject if scope["client"] == peer else ""


def cancelled_when_lost(request: Request) -> AbstractContextManager[None]:
    """Cancel the task of a request if its client disconnects before its end.

    It is for admission, which may ask the backend. What follows must not be cancelled: a message
    may be appended already.
    """
    connection: HttpProtocol = request.scope[CONNECTION_KEY]
    return connection.cancelled_when_lost()


def replay_request_of(query: bytes, *, last_event_id: str = "") -> ReplayRequest:
    """Return the replay that a client requests.

    Args:
        query: the part of the URL after the question mark.
        last_event_id: a position. It overrides `since`: a browser that reconnects sends the same
            URL again, so the query is older.

    Raises:
        RefusedError: a parameter is invalid.
    """
    since, last = None, 0
    if b"since=" in query or b"history=" in query:
        parameters = parameters_of(query)
        since = _position("since", parameters["since"]) if "since" in parameters else None
        counts = parameters.get("history", ["0"])
        if len(counts) > 1 or not COUNT.fullmatch(counts[0]):
            raise RefusedError(Refusal.INVALID_QUERY, "history must be one number of messages")
        last = int(counts[0])
    if last_event_id:
        since = _position("Last-Event-ID", [last_event_id])
    return ReplayRequest(since, last)


def flag_of(query: bytes, name: str, *, default: bool) -> bool:
    """Return a parameter that is true or false.

    Raises:
        RefusedError: it is neither.
    """
    if f"{name}=".encode() not in query:
        return default
    values = parameters_of(query).get(name, [str(default).lower()])
    if values not in (["true"], ["false"]):
        raise RefusedError(Refusal.INVALID_QUERY, f"{name} must be true or false")
    return values == ["true"]


class SessionRequest(NamedTuple):
    """The session that a client of relay.v1 asks for: see `RelayV1Connection.open_session`.

    Attributes:
        text: names the session to resume; empty: a new one is opened.
        seen: a position that the client had received; None: it names none.
    """

    text: str
    seen: Position | None


def session_request_of(query: bytes) -> SessionRequest:
    """Return the session that a client asks for.

    Raises:
        RefusedError: a parameter is invalid.
    """
    if b"session=" not in query:
        return SessionRequest("", None)
    parameters = parameters_of(query)
    sessions = parameters.get("session", [""])
    if len(sessions) > 1:
        raise RefusedError(Refusal.INVALID_QUERY, "session must be one session")
    seen = _position("seen", parameters["seen"]) if "seen" in parameters else None
    return SessionRequest(sessions[0], seen)


def session_of(request: SessionRequest, user: str) -> SessionName | None:
    """Return the session to resume; None: a new one is opened.

    Raises:
        RefusedError: the text names no session.
    """
    if not request.text:
        return None
    try:
        return SessionName.parse(request.text, user)
    except ValueError:
        raise RefusedError(Refusal.INVALID_QUERY, "session must be one session") from None


def channels_of_query(query: bytes, max_channels: int) -> Sequence[str]:
    """Return the channels that a query names, sorted; the default channel if it names none.

    Raises:
        RefusedError: a name is not that of a channel, or there are too many.
    """
    if b"channel=" not in query:
        return (DEFAULT_CHANNEL,)
    names = sorted(set(parameters_of(query).get("channel", [DEFAULT_CHANNEL])))
    if len(names) > max_channels:
        raise RefusedError(Refusal.INVALID_QUERY, f"at most {max_channels} channels")
    if not all(map(CHANNEL_NAME.fullmatch, names)):
        raise RefusedError(Refusal.NO_SUCH_CHANNEL)
    return names


def parameters_of(query: bytes) -> dict[str, list[str]]:
    """Return the values of each parameter.

    Raises:
        RefusedError: there are too many parameters.
    """
    try:
        text = query.decode("latin-1")
        return parse_qs(text, keep_blank_values=True, max_num_fields=MAX_PARAMETERS)
    except ValueError:
        raise RefusedError(Refusal.INVALID_QUERY, "too many parameters") from None


def _position(name: str, texts: list[str]) -> Position:
    try:
        (text,) = texts
        return Position.parse(text)
    except ValueError:
        raise RefusedError(Refusal.INVALID_QUERY, f"{name} must be one position") from None
