"""Answer refused requests of routes, and describe the answers. Knows no admission rule."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.requests import ClientDisconnect

from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.refusals import Refusals

RESPONSE_HEADERS: Mapping[int, Mapping[str, Any]] = {
    HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: {"Accept-Encoding": {"schema": {"type": "string"}}},
    HTTPStatus.SERVICE_UNAVAILABLE: {
        "Retry-After": {"description": "seconds", "schema": {"type": "integer"}}
    },
}
"""The OpenAPI description of the headers of a refusal, by its status."""

UNDOCUMENTED = (
    Refusal.INVALID_HANDSHAKE,
    Refusal.INVALID_PROXY_HEADER,
    Refusal.METRICS_CONNECTIONS,
)
"""Reasons that no request in the OpenAPI document is refused for."""


def refusal_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of a route's refusals."""
    text = {"text/plain": {"schema": {"type": "string"}}}
    reasons_by_status: dict[int, list[str]] = {status: [] for status in statuses}
    for why in Refusal:
        if why.status in reasons_by_status and why not in UNDOCUMENTED:
            reasons_by_status[why.status].append(why.reason)
    return {
        status: {
            "description": "; ".join(reasons),
            "content": text,
            "headers": RESPONSE_HEADERS.get(status, {}),
        }
        for status, reasons in reasons_by_status.items()
    }


def answer_refusals(app: FastAPI, refusals: Refusals, *, base_path: str) -> None:
    """Answer each `RefusedError` that a route raises, and requests for other paths.

    A `ClientDisconnect` ends a request; its response is not sent.

    Args:
        app: the application.
        refusals: records the refusals.
        base_path: the prefix of all channels.
    """

    async def refuse(request: Request, error: RefusedError) -> Response:
        refusals.record(error)
        return response_to(error)

    async def refuse_path(request: Request, error: Exception) -> Response:
        return response_to(no_such_path(base_path))

    async def end_request(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=HTTPStatus.BAD_REQUEST)

    app.exception_handlers |= {
        RefusedError: refuse,
        HTTPStatus.NOT_FOUND: refuse_path,
        ClientDisconnect: end_request,
    }


def no_such_path(base_path: str) -> RefusedError:
    """Return the refusal of a path that is no channel's. It names the right ones."""
    paths = f"{base_path}/channels/NAME, without a slash at the end, and {base_path}/"
    return RefusedError(Refusal.NO_SUCH_CHANNEL, f"the paths are {paths}")


def response_to(error: RefusedError) -> Response:
    """Return the response to a refused request, which is not recorded here."""
    return PlainTextResponse(f"{error}\n", error.status, error.headers)
