"""Receive webhooks, with an HTTP server in a thread that may misbehave. Knows no relay."""

import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any, Self

from tests.support.http_server import HttpServer, send_answer
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


class HookReceiver(HttpServer):
    """A receiver of webhooks. When it is stopped, it refuses with 503 on the connections it keeps.

    Attributes:
        status: of the answers; the events of requests that are answered with 2xx are accepted.
        misbehave: answers instead, if it is not None; nothing is accepted.
        loses_answers: whether it accepts events, and closes the connection without an answer.
        accepted: the events, also repeated ones, in their order.
        requests: how many there were.
        connections: how many are open.
    """

    def __init__(self) -> None:
        super().__init__(version="HTTP/1.1")
        self.status = 200
        self.misbehave: Misbehave | None = None
        self.loses_answers = False
        self.accepted: list[HookEvent] = []
        self.requests = 0
        self.connections = 0
        self.problems: list[str] = []
        self._changed = threading.Condition()

    @property
    def url(self) -> str:
        return f"{self.address}/hooks"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a relay that delivers to this receiver."""
        return {"url": self.url, "secret": SECRET}

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

    def on_connection(self, change: int) -> None:
        """Count the connections."""
        with self._changed:
            self.connections += change
            self._changed.notify_all()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Receive the events of a request."""
        status = self._receive(request)
        if self.misbehave is not None:
            self.misbehave(request)
        elif status:
            send_answer(request, status, Location=f"{self.url}/elsewhere")
        else:
            request.close_connection = True

    def _receive(self, request: BaseHTTPRequestHandler) -> int:
        """Receive a request; return the status of the answer, 0 for none."""
        body = request.rfile.read(int(request.headers["Content-Length"]))
        with self._changed:
            self.requests += 1
            try:
                events = verified_events(body, request.headers["Relay-Signature"])
            except (AssertionError, ValueError, KeyError) as error:
                self.problems.append(repr(error))
                events = []
            is_accepting = self.misbehave is None and (200 <= self.status < 300)
            status = self.status
            if not self.is_running:
                is_accepting, status = False, 503
            if is_accepting:
                self.accepted += events
            self._changed.notify_all()
        return 0 if self.loses_answers else status


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
