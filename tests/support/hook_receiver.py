"""Receive webhooks, with an HTTP server in a thread that may misbehave. Knows no relay."""

import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from tests.support.brokers import free_port
from tests.support.raw_client import PATIENCE_S

SECRET = "a secret of webhooks"
MAX_AGE_S = 60
HookEvent = dict[str, Any]
Misbehave = Callable[[BaseHTTPRequestHandler], None]


def verified_events(body: bytes, signature: str, secret: str = SECRET) -> list[HookEvent]:
    """Return the events of a request, whose signature is valid."""
    at, _, digest = signature.partition(",")
    assert abs(time.time() - int(at.removeprefix("t="))) < MAX_AGE_S
    signed = at.removeprefix("t=").encode() + b"." + body
    expected = hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()
    assert hmac.compare_digest(digest, f"v1={expected}")
    events: list[HookEvent] = json.loads(body)["events"]
    return events


class HookReceiver:
    """A receiver of webhooks.

    Attributes:
        status: of the answers; the events of requests that are answered with 2xx are accepted.
        misbehave: answers instead, if it is not None; nothing is accepted.
        loses_answers: whether it accepts events, and closes the connection without an answer.
        accepted: the events, also repeated ones, in their order.
        requests: how many there were.
        connections: how many are open.
    """

    def __init__(self) -> None:
        self.status = 200
        self.misbehave: Misbehave | None = None
        self.loses_answers = False
        self.accepted: list[HookEvent] = []
        self.requests = 0
        self.connections = 0
        self.problems: list[str] = []
        self._changed = threading.Condition()
        self._port = free_port()  # stays reserved while the server is stopped
        self._server: ThreadingHTTPServer | None = None

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

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/hooks"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a relay that delivers to this receiver."""
        return {"url": self.url, "secret": SECRET}

    def start(self) -> None:
        """Listen; after a stop, on the same port as before."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening. Connections that are kept are refused with 503."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def first_deliveries(self) -> list[HookEvent]:
        """Return the events without those that were delivered before."""
        with self._changed:
            return list({event["id"]: event for event in reversed(self.accepted)}.values())[::-1]

    def block_until(self, fits: Callable[[Self], bool]) -> None:
        """Block until a condition holds."""
        with self._changed:
            held = self._changed.wait_for(lambda: fits(self), PATIENCE_S)
            latest = [(event["id"], event["type"]) for event in self.accepted[-50:]]
            assert held, (self.requests, len(self.accepted), latest, self.problems)
        assert self.problems == []

    def block_until_accepted(self, count: int) -> Sequence[HookEvent]:
        """Block until so many different events are accepted; return the first deliveries."""
        self.block_until(lambda each: len({event["id"] for event in each.accepted}) >= count)
        return self.first_deliveries()

    def block_until_requested(self, count: int) -> None:
        """Block until so many requests have arrived."""
        self.block_until(lambda each: each.requests >= count)

    def count_connection(self, change: int) -> None:
        """Count a connection that was opened, or closed."""
        with self._changed:
            self.connections += change
            self._changed.notify_all()

    def receive(self, handler: BaseHTTPRequestHandler) -> int:
        """Receive a request; return the status of the answer, 0 for none."""
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        with self._changed:
            self.requests += 1
            try:
                events = verified_events(body, handler.headers["Relay-Signature"])
            except (AssertionError, ValueError, KeyError) as error:
                self.problems.append(repr(error))
                events = []
            is_accepting = self.misbehave is None and (200 <= self.status < 300)
            status = self.status
            if self._server is None:
                is_accepting, status = False, 503
            if is_accepting:
                self.accepted += events
            self._changed.notify_all()
        return 0 if self.loses_answers else status

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class HookRequestHandler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self) -> None:
                receiver.count_connection(1)
                try:
                    super().handle()
                finally:
                    receiver.count_connection(-1)

            def do_POST(self) -> None:
                status = receiver.receive(self)
                try:
                    if receiver.misbehave is not None:
                        receiver.misbehave(self)
                    elif status:
                        self.send_response(status)
                        self.send_header("Content-Length", "0")
                        self.send_header("Location", receiver.url + "/elsewhere")
                        self.end_headers()
                    else:
                        self.close_connection = True
                except OSError:  # the relay has closed the connection
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        return HookRequestHandler


def send_no_http(handler: BaseHTTPRequestHandler) -> None:
    """Answer with something that is not HTTP."""
    handler.wfile.write(b"\x00\xff what? \r\n\r\n" * 10)
    handler.close_connection = True


def send_without_end(handler: BaseHTTPRequestHandler) -> None:
    """Answer with 200 and a body that does not end."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while True:
        handler.wfile.write(b"1000\r\n" + bytes(4096) + b"\r\n")


def send_less_than_announced(handler: BaseHTTPRequestHandler) -> None:
    """Answer with 200, a length, and not as many bytes."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"short")
    handler.close_connection = True


def send_many_headers(handler: BaseHTTPRequestHandler) -> None:
    """Answer with headers that do not end."""
    handler.send_response(200)
    for number in range(100_000):
        handler.send_header(f"X-{number}", "x" * 50)
    handler.end_headers()


def close_at_once(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without an answer."""
    handler.close_connection = True


LIES: Sequence[Misbehave] = (
    send_no_http,
    send_without_end,
    send_less_than_announced,
    send_many_headers,
    close_at_once,
)
