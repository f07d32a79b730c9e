"""Add routes that answer GET, and HEAD as GET without its body. Knows no path.

FastAPI's routes resolve dependencies and examine results, which these endpoints have none of, at a
third of the cost of a request. So Starlette's routes answer, and FastAPI's describe.
"""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter


def add_get_route(
    router: APIRouter, path: str, endpoint: Callable[..., Any], **description: Any
) -> None:
    """Add a route for GET and HEAD, and the description of GET to the OpenAPI document.

    The connection leaves the body of a response to HEAD out.

    Args:
        router: the router to add the routes to.
        path: the path.
        endpoint: answers both methods.
        description: the OpenAPI description, as in FastAPI's `add_api_route`.
    """
    router.add_route(path, endpoint, methods=["GET"])  # and HEAD
    router.add_api_route(path, endpoint, methods=["GET"], **description)
