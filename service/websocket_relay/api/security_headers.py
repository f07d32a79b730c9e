"""Add security headers to every HTTP response. Knows no route."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from websocket_relay.wire.security_headers import SECURITY_HEADERS

ENCODED = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS]


class SecurityHeaders:
    """Middleware that adds the security headers that a response does not set itself.

    Args:
        app: the wrapped application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"]
                present = {name.lower() for name, _ in headers}
                message["headers"] = [
                    *headers,
                    *(header for header in ENCODED if header[0] not in present),
                ]
            await send(message)

        await self._app(scope, receive, send_with_headers)
