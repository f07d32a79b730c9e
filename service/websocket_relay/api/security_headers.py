"""Put the headers on every answer that keep browsers from doing more than read it."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from websocket_relay.wire.security_headers import SECURITY_HEADERS

ENCODED = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS]


class SecurityHeaders:
    """An application whose answers have them, but for those that an answer says itself.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"]
                said = {name.lower() for name, _ in headers}
                message["headers"] = [
                    *headers,
                    *(header for header in ENCODED if header[0] not in said),
                ]
            await send(message)

        await self._app(scope, receive, send_safely)
