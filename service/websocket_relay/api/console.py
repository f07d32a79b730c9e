"""Serve the console and the browser's client, which are files, and the figures that it shows."""

from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from websocket_relay.admission.policy import AdmissionPolicy
from websocket_relay.api.refusals import Refusals, refused
from websocket_relay.api.requests import TOKEN_PARAMETER, admission_request_of
from websocket_relay.outcomes import RefusedError
from websocket_relay.page_cache import PageCache

FILES = resources.files("websocket_relay.console")

SCRIPT, TYPES = "relay.js", "relay.d.ts"
PAGE = "index.html"
PARTS = {
    "console.js": "text/javascript",
    "figures.js": "text/javascript",
    "console.css": "text/css",
    "icon.svg": "image/svg+xml",
}

FIGURES: dict[str, Any] = {
    "description": "What the console shows.",
    "content": {"application/json": {"schema": {"type": "object"}}},
}

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self' ws: wss:",  # 'self' is no WebSocket's address in every browser
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


def script_router(*, base_path: str) -> APIRouter:
    """Return the routes of the client for browsers, which pages of any origin may load."""
    anybody = {"Cross-Origin-Resource-Policy": "cross-origin", "Cache-Control": "no-cache"}
    router = APIRouter()
    for name, kind in ((SCRIPT, "text/javascript"), (TYPES, "text/plain")):
        serve = _file(name, kind, anybody | {"Access-Control-Allow-Origin": "*"})
        router.add_route(f"{base_path}/{name}", serve, methods=["GET"])
    return router


def console_router(
    admission: AdmissionPolicy,
    refusals: Refusals,
    figures: Callable[[], Mapping[str, Any]],
    *,
    base_path: str,
) -> APIRouter:
    """Return the routes of the console: `/`, its parts, and `/stats`.

    Args:
        admission: who may see figures.
        refusals: what answers the others.
        figures: what there is to see.
        base_path: what stands before the paths.
    """

    pages = PageCache()

    def rendered() -> bytes:
        return bytes(JSONResponse(figures()).body)

    async def stats(request: Request) -> Response:
        try:
            await admission.admit_viewer(admission_request_of(request))
        except RefusedError as error:
            return refusals.answer(error)
        return Response(await pages.get("stats", rendered), media_type="application/json")

    router = APIRouter()
    page = _file(PAGE, "text/html", {"Content-Security-Policy": POLICY})
    router.add_route(f"{base_path}/", page, methods=["GET"])
    for name, kind in PARTS.items():
        router.add_route(f"{base_path}/{name}", _file(name, kind, {}), methods=["GET"])
    router.add_api_route(
        f"{base_path}/stats",
        stats,
        methods=["GET"],
        summary="See the relay's figures",
        response_model=None,
        responses={200: FIGURES, **refused(401, 403, 503)},
        openapi_extra={"parameters": [TOKEN_PARAMETER]},
    )
    return router


def _file(
    name: str, kind: str, headers: Mapping[str, str]
) -> Callable[[Request], Awaitable[Response]]:
    content = (FILES / name).read_bytes()

    # Not a plain function: each request would go through a thread.
    async def serve(request: Request) -> Response:
        return Response(content, headers=dict(headers), media_type=kind)

    return serve
