"""Define the security headers of all HTTP responses. Knows no connection and no route."""

from collections.abc import Awaitable, Callable
from typing import Any

App = Callable[[Any, Any, Any], Awaitable[None]]
"""An ASGI application."""

SECURITY_HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("X-Frame-Options", "DENY"),  # for browsers and scanners that do not support frame-ancestors
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
"""Sent with every HTTP response, refusals included. Follows OWASP's REST Security Cheat Sheet.

Browsers may read a response and do nothing else with it. Strict-Transport-Security is left out: it
binds a whole host name for months, and only the proxy that terminates TLS knows whether everything
served under that name uses TLS.
"""

ENCODED = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS]


def with_security_headers(app: App) -> App:
    """Return an HTTP application that adds the headers which a response does not set itself."""

    async def run(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"]
                present = {name.lower() for name, _ in headers}
                message["headers"] = [
                    *headers,
                    *(header for header in ENCODED if header[0] not in present),
                ]
            await send(message)

        await app(scope, receive, send_with_headers)

    return run
