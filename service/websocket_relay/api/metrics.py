"""Serve the metrics page to Prometheus. Knows no metric."""

from fastapi import APIRouter, Request, Response

from websocket_relay.api.routes import add_get_route
from websocket_relay.metrics import Metrics


def metrics_router(metrics: Metrics) -> APIRouter:
    """Return the route of `/metrics`."""
    router = APIRouter()

    async def page(request: Request) -> Response:
        body, content_type = await metrics.page(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    add_get_route(router, "/metrics", page)
    return router
