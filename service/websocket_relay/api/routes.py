"""Add routes that answer GET, and HEAD as GET without its body. Knows no route."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter


def add_get_route(
    router: APIRouter, path: str, endpoint: Callable[..., Any], **description: Any
) -> None:
    """Add a route for GET, and one for HEAD that the OpenAPI document does not list.

    uvicorn leaves the body of a response to HEAD out. FastAPI has one operation for each method.

    Args:
        router: the router to add the routes to.
        path: the path of both routes.
        endpoint: answers both methods.
        description: the OpenAPI description, as in FastAPI's `add_api_route`.
    """
    router.add_api_route(path, endpoint, methods=["GET"], **description)
    router.add_api_route(
        path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False
    )
