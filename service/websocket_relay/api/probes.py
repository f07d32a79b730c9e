"""Answer probes: `/healthz` (the event loop runs) and `/readyz` (clients are accepted)."""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from websocket_relay.api.routes import add_get_route
from websocket_relay.lifecycle import Lifecycle


def probes_router(lifecycle: Lifecycle) -> APIRouter:
    """Return the routes of the probes."""
    router = APIRouter()
    not_ready: dict[int | str, dict[str, Any]] = {
        HTTPStatus.SERVICE_UNAVAILABLE: {"description": "Not ready; the status has the reason."}
    }

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(_: Request) -> Response:
        status = HTTPStatus.OK if lifecycle.ready else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"status": lifecycle.status}, status)

    add_get_route(
        router,
        "/healthz",
        healthz,
        summary="Check that the event loop runs",
        response_model=None,
    )
    add_get_route(
        router,
        "/readyz",
        readyz,
        summary="Check that clients are accepted",
        response_model=None,
        responses=not_ready,
    )
    return router
