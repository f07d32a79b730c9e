"""Read what a client asks for, and answer where it is refused: for all that let clients in."""

import logging
import re
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs

from fastapi import Response
from fastapi.responses import PlainTextResponse
from starlette.requests import HTTPConnection

from websocket_relay.admission.door import CHANNEL_NAME, DEFAULT_CHANNEL, AdmissionRequest
from websocket_relay.admission.pressure import RefusalLog
from websocket_relay.backplane.base import Position
from websocket_relay.errors import Refusal, RefusedError, random_retry_after_s
from websocket_relay.ledger import Counters
from websocket_relay.relay.replay import ReplayRequest

log = logging.getLogger(__name__)

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
    "description": "a token, where they are asked for; better: `Authorization: Bearer TOKEN`",
    "schema": {"type": "string"},
}

TOLD: Mapping[int, Mapping[str, Any]] = {
    HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: {"Accept-Encoding": {"schema": {"type": "string"}}},
    HTTPStatus.SERVICE_UNAVAILABLE: {
        "Retry-After": {"description": "seconds", "schema": {"type": "integer"}}
    },
}
"""What refusals say besides, by their status."""


ELSEWHERE = (Refusal.HANDSHAKE, Refusal.METRICS_CONNECTIONS)
"""No request that is described is refused for these."""


def refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what the description of a route says of its refusals."""
    text = {"text/plain": {"schema": {"type": "string"}}}
    reasons: dict[int, list[str]] = {status: [] for status in statuses}
    for why in Refusal:
        if why.status in reasons and why not in ELSEWHERE:
            reasons[why.status].append(why.reason)
    return {
        status: {"description": "; ".join(said), "content": text, "headers": TOLD.get(status, {})}
        for status, said in reasons.items()
    }


class Refusals:
    """Count refusals, and answer them.

    Args:
        ledger: where they are counted.
        pressure: what tells the log of limits that are hit.
        trace: what else is told of each; None: nobody.
    """

    def __init__(
        self,
        ledger: Counters,
        pressure: RefusalLog,
        trace: Callable[[RefusedError], None] | None = None,
    ) -> None:
        self._ledger = ledger
        self._pressure = pressure
        self._trace = trace

    def count(self, why: Refusal) -> None:
        """Count a refusal that is answered elsewhere, or not at all."""
        self._ledger.refusals[why] += 1
        self._pressure.note(why)

    def answer(self, refused: RefusedError) -> Response:
        """Return the answer to a refusal, which is counted."""
        self.count(refused.why)
        if self._trace is not None:
            self._trace(refused)
        log.debug("refused", extra={"reason": refused.why.label, "detail": refused.detail})
        return answer_to(refused)


def answer_to(refused: RefusedError) -> Response:
    """Return what a client is told that is refused."""
    status = refused.why.status
    headers = {}
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = str(random_retry_after_s())
    elif status is HTTPStatus.UNAUTHORIZED:  # RFC 6750 section 3
        bad = refused.why is Refusal.BAD_TOKEN
        headers["WWW-Authenticate"] = 'Bearer error="invalid_token"' if bad else "Bearer"
    elif refused.why is Refusal.CODING:  # RFC 9110 section 15.5.16
        headers["Accept-Encoding"] = "identity"
    return PlainTextResponse(f"{refused}\n", status, headers)


def channel_of(connection: HTTPConnection) -> str:
    """Return the channel that the path names."""
    channel: str = connection.path_params.get("channel", DEFAULT_CHANNEL)
    return channel


def admission_request_of(connection: HTTPConnection) -> AdmissionRequest:
    """Return what admission wants to know."""
    scope = connection.scope
    client = scope["client"]
    return AdmissionRequest(
        channel_of(connection),
        connection.headers,
        scope["query_string"],
        scope.get("subprotocols", ()),
        client[0] if client is not None else None,
        connection.headers.getlist("authorization"),
    )


def replay_request_of(
    query: bytes, *, tells_positions: bool, last_event_id: str = ""
) -> ReplayRequest | None:
    """Return what a client wants to hear first; None: nothing.

    Args:
        last_event_id: a position; it is newer than the query of the same address.

    Raises:
        RefusedError: it asks for what there can't be.
    """
    since, last = None, 0
    if b"since=" in query or b"history=" in query:
        asked = _parameters(query)
        since = _position(asked["since"]) if "since" in asked else None
        counts = asked.get("history", ["0"])
        if len(counts) > 1 or not COUNT.fullmatch(counts[0]):
            raise RefusedError(Refusal.QUERY, "history is one number of messages")
        last = int(counts[0])
    if last_event_id:
        since = _position([last_event_id])
    if since is None and not last and not tells_positions:
        return None
    return ReplayRequest(since, last, tells_positions)


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
