"""Measure HTTP requests by method, route and status. Knows no route.

The metrics are those of prometheus-fastapi-instrumentator. Its own middleware matches the routes of
each request once more, which takes a tenth of the time of a posted message.
"""

from time import perf_counter
from typing import cast

from prometheus_client import CollectorRegistry
from prometheus_fastapi_instrumentator import metrics
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from websocket_relay.route_names import route_of

UNKNOWN = "none"
"""The route of all requests for other paths."""


class ResponseHead:
    """The part of a response that is measured."""

    __slots__ = ("headers",)

    def __init__(self, headers: list[tuple[bytes, bytes]]) -> None:
        self.headers = Headers(raw=headers)


class RequestMetrics:
    """An ASGI middleware.

    Args:
        app: the application.
        registry: exports the metrics.
    """

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        observe = metrics.default(registry=registry)
        assert observe is not None  # it is for a registry that has the metrics already
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and measure it."""
        started_at = perf_counter()
        status, headers = 500, []

        async def send_and_note(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], message["headers"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            taken_s = perf_counter() - started_at
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
