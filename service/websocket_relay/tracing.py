"""Trace handshakes and requests. The only module that uses OpenTelemetry's SDK.

It is imported only if a collector is configured: without one, the library is not loaded and the
application is not wrapped. Knows no channel and no framework. It reads no secret of a request:
never the query, and no header but `traceparent` and `tracestate`.
"""

import threading
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from websocket_relay import __version__
from websocket_relay.outcomes import RefusedError
from websocket_relay.route_names import route_of

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

NAME = "websocket-relay"

PROBES = {"/healthz", "/readyz"}
"""Paths that are not traced: they are requested every few seconds, and metrics cover them."""

METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"}

MAX_PATH_CHARACTERS = 256

PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """Create spans and export them to the collector in the environment.

    The library reads the endpoint, headers, sampler, batching and resource attributes:
    https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/.

    Args:
        replica: the name of the replica.

    Raises:
        ValueError: a variable is invalid.
        OSError: a certificate named by a variable can't be read.
    """

    def __init__(self, replica: str) -> None:
        defaults = {
            "service.name": NAME,
            "service.version": __version__,
            "service.instance.id": replica,
        }
        resource = Resource.create({**defaults, **OTELResourceDetector().detect().attributes})
        # The library's exit handler would wait 30 s for an unreachable collector. See close().
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer(NAME, __version__)
        self._request: ContextVar[_TracedRequest | None] = ContextVar("request", default=None)

    def traced(self, app: App) -> App:
        """Wrap an application so that each of its requests has a span."""

        async def trace(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
            if scope["path"] in PROBES:
                await app(scope, receive, send)
                return
            request = _TracedRequest(self._start_span(scope))
            # Timers and tasks that this task creates inherit the context variable. Some of them
            # live as long as the client, so the object is small and drops its span at the end.
            self._request.set(request)

            async def send_and_record(message: Event) -> None:
                request.record_response(message)
                await send(message)

            try:
                await app(scope, receive, send_and_record)
            except BaseException as error:
                request.fault = type(error).__name__
                raise
            finally:
                request.end(scope)

        return trace

    def _start_span(self, scope: Mapping[str, Any]) -> Span:
        return self._tracer.start_span(_name(scope), _parent(scope["headers"]), SpanKind.SERVER)

    def annotate_refusal(self, error: RefusedError) -> None:
        """Record why, and with which status, the current request is refused."""
        if (request := self._request.get()) is not None:
            request.refusal, request.status = error.why.label, error.status

    def facts(self) -> Mapping[str, str]:
        """Return the trace and span id of the current request, for log lines."""
        request = self._request.get()
        if request is None or request.span is None:
            return {}
        context = request.span.get_span_context()
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    def close(self, timeout_s: float) -> None:
        """Export the pending spans, for at most `timeout_s` seconds."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(timeout_s)


class _TracedRequest:
    """The span of one request or handshake, until its response."""

    __slots__ = ("fault", "refusal", "span", "status")

    def __init__(self, span: Span) -> None:
        self.span: Span | None = span
        self.status = 0
        self.refusal = ""
        self.fault = ""

    def record_response(self, message: Event) -> None:
        """Record the status of a response."""
        match message["type"]:
            case "http.response.start":
                self.status = message["status"]
            case "websocket.accept":
                self.status = HTTPStatus.SWITCHING_PROTOCOLS.value

    def end(self, scope: Mapping[str, Any]) -> None:
        span, self.span = self.span, None
        if span is None:
            return
        if span.is_recording():
            self._describe(span, scope)
        span.end()

    def _describe(self, span: Span, scope: Mapping[str, Any]) -> None:
        method = scope.get("method", "GET")
        facts: dict[str, str | int] = {
            "http.request.method": method if method in METHODS else "_OTHER",
            "url.path": scope["path"][:MAX_PATH_CHARACTERS],
            "url.scheme": scope["scheme"],
            "network.protocol.version": scope["http_version"],
        }
        if scope["client"] is not None:
            facts["client.address"] = scope["client"][0]
        if self.status:
            facts["http.response.status_code"] = self.status
        if self.refusal:
            facts["relay.refusal"] = self.refusal
        parameters = scope.get("path_params", {})
        if route := route_of(scope):
            facts["http.route"] = route
            span.update_name(f"{_name(scope)} {route}")
        if "channel" in parameters:
            facts["relay.channel"] = parameters["channel"]
        if self.fault or self.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            facts["error.type"] = self.fault or str(self.status)
            span.set_status(Status(StatusCode.ERROR))
        span.set_attributes(facts)


def _name(scope: Mapping[str, Any]) -> str:
    """Return the prefix of a span's name, from a small fixed set."""
    if scope["type"] == "websocket":
        return "handshake"
    method: str = scope["method"]
    return method if method in METHODS else "HTTP"


def _parent(headers: list[tuple[bytes, bytes]]) -> Any:
    """Return the caller's span, or None (https://www.w3.org/TR/trace-context/)."""
    carrier: dict[str, str] = {}
    for name, value in headers:
        if name in (b"traceparent", b"tracestate"):
            key, text = name.decode(), value.decode("latin-1")
            carrier[key] = f"{carrier[key]},{text}" if key in carrier else text
    return PROPAGATOR.extract(carrier) if "traceparent" in carrier else None
