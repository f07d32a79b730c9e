"""Serve HTTP in a thread, on a port that stays reserved while the server is stopped.

Knows no relay.
"""

import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from tests.support.brokers import free_port

HOST = "127.0.0.1"


class HttpServer:
    """A server whose requests its subclass answers, each connection in a thread of its own.

    Args:
        context: for https; None: http.
        version: HTTP/1.1 keeps connections open.

    Attributes:
        address: its URL, without a path.
    """

    def __init__(self, context: ssl.SSLContext | None = None, version: str = "HTTP/1.0") -> None:
        server = self

        class RequestHandler(BaseHTTPRequestHandler):
            protocol_version = version

            def handle(self) -> None:
                server.on_connection(1)
                try:
                    super().handle()
                finally:
                    server.on_connection(-1)

            def do_GET(self) -> None:
                try:
                    server.answer(self)
                except OSError:  # the client has closed the connection
                    self.close_connection = True

            def do_POST(self) -> None:
                self.do_GET()

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        self._handler = RequestHandler
        self._context = context
        self._port = free_port()
        self._server: ThreadingHTTPServer | None = None
        self.address = f"http{'s' if context else ''}://{HOST}:{self._port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer a GET or a POST."""
        raise NotImplementedError

    def on_connection(self, change: int) -> None:
        """Record that a connection was opened (1) or closed (-1)."""

    @property
    def is_running(self) -> bool:
        """Whether it listens. Connections that are kept outlive a stop."""
        return self._server is not None

    def start(self) -> None:
        """Listen; after a stop, on the same port as before."""
        self._server = ThreadingHTTPServer((HOST, self._port), self._handler)
        self._server.daemon_threads = True
        if self._context is not None:
            self._server.socket = self._context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def send_answer(
    request: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str
) -> None:
    """Answer a request.

    Args:
        headers: further header fields.
    """
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)
