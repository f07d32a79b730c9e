"""Answer CORS preflights, and mark responses for the allowed origins, which may change.

Knows no setting.
"""

from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.refusals import Refusals


class Cors:
    """Starlette's CORSMiddleware, whose origins can be replaced while it serves.

    Args:
        fixed: the options of CORSMiddleware that do not change.
        origins: the options that depend on the origins.
        refusals: records preflights of other origins.
    """

    def __init__(self, fixed: dict[str, Any], origins: dict[str, Any], refusals: Refusals) -> None:
        self._fixed = fixed
        self._origins = origins
        self._refusals = refusals
        self._app: ASGIApp | None = None
        self._middleware: CORSMiddleware

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """Return the middleware around an application."""
        self._app = app
        self.allow(self._origins)
        return self

    def allow(self, origins: dict[str, Any]) -> None:
        """Replace the origins, from the next request on."""
        self._origins = origins
        if self._app is not None:  # FastAPI builds its middlewares at the first request
            self._middleware = CORSMiddleware(self._app, **self._fixed, **origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; record a preflight that is refused for its origin."""
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            headers = Headers(scope=scope)
            if (
                "access-control-request-method" in headers
                and (origin := headers.get("origin")) is not None
                and not self._middleware.is_allowed_origin(origin)
            ):
                self._refusals.record(RefusedError(Refusal.ORIGIN_NOT_ALLOWED))
        await self._middleware(scope, receive, send)
