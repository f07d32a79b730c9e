"""Add routes that answer GET, and HEAD as GET without its body. Knows no path."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter


def add_get_route(
    router: APIRouter, path: str, endpoint: Callable[..., Any], **description: Any
) -> None:
    """Add a route for GET and HEAD, and the description of GET to the OpenAPI document.

    uvicorn leaves the body of a response to HEAD out. FastAPI describes one operation for each
    method of a route; the first route answers, and its methods are the `Allow` field of a 405.

    Args:
        router: the router to add the routes to.
        path: the path.
        endpoint: answers both methods.
        description: the OpenAPI description, as in FastAPI's `add_api_route`.
    """
    router.add_api_route(
        path, endpoint, methods=["GET", "HEAD"], response_model=None, include_in_schema=False
    )
    router.add_api_route(path, endpoint, methods=["GET"], **description)
