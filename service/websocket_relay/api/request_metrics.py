"""Measure HTTP requests by method, route and status. Knows no route.

The metrics are those of prometheus-fastapi-instrumentator. Its middleware, which is not used,
matches the routes of each request once more, and takes a quarter of the time of a posted message.
"""

from typing import cast

from prometheus_client import CollectorRegistry
from prometheus_fastapi_instrumentator import metrics
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from websocket_relay.route_names import route_of

UNKNOWN = "none"
"""The route of all requests for other paths."""


class ResponseHead:
    """The part of a response that is measured."""

    __slots__ = ("headers",)

    def __init__(self, headers: list[tuple[bytes, bytes]]) -> None:
        self.headers = Headers(raw=headers)


class RequestMetrics:
    """The metrics of HTTP requests.

    Args:
        registry: exports them.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        observe = metrics.default(registry=registry)
        assert observe is not None  # it is for a registry that has the metrics already
        self._observe = observe

    def observe(
        self, scope: Scope, status: int, headers: list[tuple[bytes, bytes]], taken_s: float
    ) -> None:
        """Measure a request after its response: see `http_exchange.ObserveRequest`."""
        self._observe(
            metrics.Info(
                Request(scope),
                cast(Response, ResponseHead(headers)),
                scope["method"],
                route_of(scope) or UNKNOWN,
                f"{status // 100}xx",
                taken_s,
                taken_s,
            )
        )
