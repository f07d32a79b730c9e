"""Answer probes: `/healthz` (the event loop runs) and `/readyz` (clients are accepted)."""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from websocket_relay.lifecycle import Lifecycle


def probes_router(lifecycle: Lifecycle) -> APIRouter:
    """Return the routes of the probes."""
    router = APIRouter()
    not_ready: dict[int | str, dict[str, Any]] = {
        HTTPStatus.SERVICE_UNAVAILABLE: {"description": "Not ready; the status has the reason."}
    }

    @router.get("/healthz", summary="Check that the event loop runs")
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @router.get("/readyz", summary="Check that clients are accepted", responses=not_ready)
    async def readyz() -> JSONResponse:
        status = HTTPStatus.OK if lifecycle.ready else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"status": lifecycle.status}, status)

    return router
