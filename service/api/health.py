"""Answer probes: `/healthz` while the event loop turns, `/readyz` while clients are welcome."""

from http import HTTPStatus

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from service.health import Health


def health_router(health: Health) -> APIRouter:
    """Return the routes of the probes."""
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @router.get("/readyz")
    async def readyz() -> JSONResponse:
        status = HTTPStatus.OK if health.ready else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"status": health.status}, status)

    return router
