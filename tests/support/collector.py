"""Receive traces as an OpenTelemetry collector: OTLP over HTTP, in protobuf. Knows no relay."""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.support.relay_process import eventually

HOST = "127.0.0.1"
SHORT_EXPORT_DELAY = {"OTEL_BSP_SCHEDULE_DELAY": "20"}
"""Variables of an exporter that sends spans after 20 ms."""


@dataclass(frozen=True, slots=True)
class Span:
    """One exported span: what a trace contains of one request."""

    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    is_error: bool
    attributes: Mapping[str, Any]
    resource: Mapping[str, Any]


class Collector:
    """A collector, and all requests that it received.

    Args:
        is_stuck: it accepts connections and answers no request.

    Attributes:
        bodies, headers: of the answered requests, in order.
        request_count: how many requests arrived, answered or not.
    """

    def __init__(self, *, is_stuck: bool = False) -> None:
        collector = self
        self._released = threading.Event()
        if not is_stuck:
            self._released.set()

        class ExportRequestHandler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector._answer(self)

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer((HOST, 0), ExportRequestHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.bodies: list[bytes] = []
        self.headers: list[Mapping[str, str]] = []
        self.request_count = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of a relay that exports its traces here."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{HOST}:{self._server.server_port}"}

    @property
    def spans(self) -> list[Span]:
        """All received spans, in the order of their ends."""
        return [span for body in list(self.bodies) for span in _spans(body)]

    async def await_spans(self, *names: str) -> Sequence[Span]:
        """Wait until spans with these names are received; return all spans."""

        async def look() -> tuple[bool, object]:
            found = [span.name for span in self.spans]
            return set(names) <= set(found), found

        await eventually(look, f"spans {names}")
        return self.spans

    async def await_span(self, fits: Callable[[Span], bool]) -> Span:
        """Wait for a span that fits, and return it."""

        async def look() -> tuple[bool, object]:
            spans = self.spans
            return any(map(fits, spans)), spans

        await eventually(look, "such a span")
        return next(filter(fits, self.spans))

    async def await_request(self) -> None:
        """Wait until a request arrives."""
        while not self.request_count:  # noqa: ASYNC110 - a thread counts; the test has a time limit
            await asyncio.sleep(0.01)

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        self.request_count += 1
        self._released.wait()
        assert request.path == "/v1/traces"
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.bodies.append(body)
        answer = ExportTraceServiceResponse().SerializeToString()
        request.send_response(200)
        request.send_header("Content-Type", "application/x-protobuf")
        request.send_header("Content-Length", str(len(answer)))
        request.end_headers()
        request.wfile.write(answer)


def _spans(body: bytes) -> list[Span]:
    request = ExportTraceServiceRequest()
    request.ParseFromString(body)
    return [
        Span(
            span.name,
            span.kind,
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.status.code == span.status.STATUS_CODE_ERROR,
            _values(span.attributes),
            _values(group.resource.attributes),
        )
        for group in request.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


def _values(attributes: Any) -> dict[str, Any]:
    return {
        each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in attributes
    }
