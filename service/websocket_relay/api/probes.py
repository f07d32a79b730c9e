"""Answer probes: `/healthz` while the event loop turns, `/readyz` while clients are welcome."""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from websocket_relay.lifecycle import Lifecycle


def health_router(health: Lifecycle) -> APIRouter:
    """Return the routes of the probes."""
    router = APIRouter()
    not_ready: dict[int | str, dict[str, Any]] = {
        HTTPStatus.SERVICE_UNAVAILABLE: {"description": "Not ready; the status says why."}
    }

    @router.get("/healthz", summary="Tell whether the event loop turns")
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @router.get("/readyz", summary="Tell whether clients are welcome", responses=not_ready)
    async def readyz() -> JSONResponse:
        status = HTTPStatus.OK if health.ready else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"status": health.status}, status)

    return router
