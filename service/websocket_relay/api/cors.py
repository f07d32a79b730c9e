"""Answer CORS preflights, and mark responses for the allowed origins, which may change.

Knows no setting.
"""

from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.refusals import Refusals


class Cors:
    """Starlette's CORSMiddleware, whose origins can be replaced while it serves.

    Args:
        fixed: the options of CORSMiddleware that do not change.
        origins: the options that depend on the origins.
        refusals: records preflights of other origins.
    """

    def __init__(
        self, fixed: Mapping[str, Any], origins: Mapping[str, Any], refusals: Refusals
    ) -> None:
        self._fixed = fixed
        self._origins = origins
        self._refusals = refusals
        self._middleware: RecordingCorsMiddleware | None = None

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """Return the middleware around an application."""
        self._middleware = RecordingCorsMiddleware(app, **self._fixed, **self._origins)
        self._middleware.refusals = self._refusals
        return self._middleware

    def allow(self, origins: Mapping[str, Any]) -> None:
        """Replace the origins, from the next request on."""
        self._origins = origins
        if self._middleware is not None:  # FastAPI builds its middlewares at the first request
            CORSMiddleware.__init__(
                self._middleware, self._middleware.app, **self._fixed, **origins
            )


class RecordingCorsMiddleware(CORSMiddleware):
    """The middleware, which records preflights that are refused for their origin."""

    refusals: Refusals

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight."""
        if not self.is_allowed_origin(request_headers["origin"]):
            self.refusals.record(RefusedError(Refusal.ORIGIN_NOT_ALLOWED))
        return super().preflight_response(request_headers)
