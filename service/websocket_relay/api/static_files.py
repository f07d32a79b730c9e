"""Serve files of the package: the browser client, and any file as an endpoint."""

from collections.abc import Awaitable, Callable, Mapping
from importlib import resources

from fastapi import APIRouter, Request, Response

BROWSER_CLIENT = (("relay.js", "text/javascript"), ("relay.d.ts", "text/plain"))


def browser_client_router(*, base_path: str) -> APIRouter:
    """Return the routes of the browser client, which pages of any origin may load."""
    headers = {
        "Access-Control-Allow-Origin": "*",
        "Cache-Control": "no-cache",
        "Cross-Origin-Resource-Policy": "cross-origin",
    }
    router = APIRouter()
    for name, media_type in BROWSER_CLIENT:
        serve = static_file("websocket_relay.browser", name, media_type, headers)
        router.add_route(f"{base_path}/{name}", serve, methods=["GET"])
    return router


def static_file(
    package: str, name: str, media_type: str, headers: Mapping[str, str]
) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint that serves a file of a package, read once."""
    content = (resources.files(package) / name).read_bytes()

    # Not a plain function: Starlette would run it in a thread.
    async def serve(request: Request) -> Response:
        return Response(content, headers=dict(headers), media_type=media_type)

    return serve
