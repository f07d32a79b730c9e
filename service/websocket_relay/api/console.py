"""Serve the console and the stats. Knows no connection and no channel."""

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from websocket_relay.admission.policy import AdmissionPolicy
from websocket_relay.api.refusals import refusal_responses
from websocket_relay.api.requests import (
    TOKEN_PARAMETER,
    admission_request_of,
    cancelled_when_lost,
)
from websocket_relay.api.routes import add_get_route
from websocket_relay.api.static_files import static_file
from websocket_relay.page_cache import PageCache

FILES = "websocket_relay.console"
PAGE = "index.html"
SCRIPTS = ("console", "dom", "members", "messages", "operations", "payloads", "stats", "tabs")
PARTS = {
    **{f"{name}.js": "text/javascript" for name in SCRIPTS},
    "console.css": "text/css",
    "icon.svg": "image/svg+xml",
}

STATS_RESPONSE: dict[str, Any] = {
    "description": "The stats that the console shows.",
    "content": {"application/json": {"schema": {"type": "object"}}},
}

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self' ws: wss:",  # in some browsers 'self' does not include WebSockets
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


def console_router(
    admission: AdmissionPolicy,
    stats: Callable[[], Mapping[str, Any]],
    *,
    base_path: str,
) -> APIRouter:
    """Return the routes of the console: `/`, its parts, and `/stats`.

    Args:
        admission: decides who may read stats.
        stats: returns the current stats.
        base_path: the prefix of all paths.
    """

    pages = PageCache()

    def render() -> bytes:
        return bytes(JSONResponse(stats()).body)

    async def serve_stats(request: Request) -> Response:
        with cancelled_when_lost(request):
            await admission.admit_viewer(admission_request_of(request, ()))
        return Response(await pages.get("stats", render), media_type="application/json")

    router = APIRouter()
    page = static_file(FILES, PAGE, "text/html", {"Content-Security-Policy": POLICY})
    router.add_route(f"{base_path}/", page, methods=["GET"])
    for name, media_type in PARTS.items():
        router.add_route(
            f"{base_path}/{name}", static_file(FILES, name, media_type, {}), methods=["GET"]
        )
    add_get_route(
        router,
        f"{base_path}/stats",
        serve_stats,
        name="stats",
        summary="Read the relay's stats",
        response_model=None,
        responses={200: STATS_RESPONSE, **refusal_responses(401, 403, 503)},
        openapi_extra={"parameters": [TOKEN_PARAMETER]},
    )
    return router
