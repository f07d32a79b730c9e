"""Trace handshakes and requests with OpenTelemetry. Nobody else knows its SDK.

Nothing imports this room until a collector is named: a relay that does not trace has not loaded the
library, and its application is the same as ever. Knows no channel and no framework; of a request it
takes what is no secret: never the query, never a header but `traceparent` and `tracestate`.
"""

import platform
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

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

NAME = "websocket-relay"

PROBES = {"/healthz", "/readyz"}
"""They are asked for every few seconds, and say nothing that the metrics don't."""

METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"}

MAX_PATH_CHARACTERS = 256

PARENT = TraceContextTextMapPropagator()


class Tracing:
    """What makes spans, and sends them to the collector that the environment names.

    Endpoint, headers, sampler, batches and the resource's attributes are read by the library:
    https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/.

    Raises:
        ValueError: the library can't use what the environment says.
        OSError: a certificate that it names can't be read.
    """

    def __init__(self) -> None:
        ours = {
            "service.name": NAME,
            "service.version": __version__,
            "service.instance.id": platform.node(),
        }
        resource = Resource.create({**ours, **OTELResourceDetector().detect().attributes})
        # Not at exit: it would wait for a collector for half a minute. See close().
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer(NAME, __version__)
        self._request: ContextVar[_Request | None] = ContextVar("request", default=None)

    def traced(self, app: App) -> App:
        """Return an application that is the same, and whose requests have a span each."""

        async def trace(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
            if scope["path"] in PROBES:
                await app(scope, receive, send)
                return
            request = _Request(self._begin(scope))
            # Read by timers and tasks that begin in this one, too; some of them stay for as long as
            # the client does. So it is a small thing, that lets go of the span.
            self._request.set(request)

            async def watch(message: Event) -> None:
                request.note(message)
                await send(message)

            try:
                await app(scope, receive, watch)
            except BaseException as error:
                request.fault = type(error).__name__
                raise
            finally:
                request.end(scope)

        return trace

    def _begin(self, scope: Mapping[str, Any]) -> Span:
        return self._tracer.start_span(_name(scope), _parent(scope["headers"]), SpanKind.SERVER)

    def note_refusal(self, refused: RefusedError) -> None:
        """Note why the request that is being answered is refused."""
        if (request := self._request.get()) is not None:
            request.refusal = refused.why.label

    def facts(self) -> Mapping[str, str]:
        """Return what a line of the log has that is written for a request."""
        request = self._request.get()
        if request is None or request.span is None:
            return {}
        context = request.span.get_span_context()
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    def close(self, timeout_s: float) -> None:
        """Send what is left, and wait for that no longer than `timeout_s`."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(timeout_s)


class _Request:
    """One request, or handshake, on its way to an answer."""

    __slots__ = ("fault", "refusal", "span", "status")

    def __init__(self, span: Span) -> None:
        self.span: Span | None = span
        self.status = 0
        self.refusal = ""
        self.fault = ""

    def note(self, message: Event) -> None:
        """Take note of what is answered."""
        match message["type"]:
            case "http.response.start" | "websocket.http.response.start":
                self.status = message["status"]
            case "websocket.accept":
                self.status = HTTPStatus.SWITCHING_PROTOCOLS.value
            case "websocket.close" if not self.status:
                self.status = HTTPStatus.FORBIDDEN.value

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
        if route := _route(scope, parameters):
            facts["http.route"] = route
            span.update_name(f"{_name(scope)} {route}")
        if "channel" in parameters:
            facts["relay.channel"] = parameters["channel"]
        if self.fault or self.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            facts["error.type"] = self.fault or str(self.status)
            span.set_status(Status(StatusCode.ERROR))
        span.set_attributes(facts)


def _name(scope: Mapping[str, Any]) -> str:
    """Return what a span's name begins with: one of few."""
    if scope["type"] == "websocket":
        return "handshake"
    method: str = scope["method"]
    return method if method in METHODS else "HTTP"


def _route(scope: Mapping[str, Any], parameters: Mapping[str, str]) -> str:
    """Return the path with the channel's name taken out; empty for one that is not there."""
    path: str = scope["path"]
    if "endpoint" not in scope or "path" in parameters:
        return ""
    if "channel" not in parameters:
        return path
    before, _, behind = path.partition(f"/channels/{parameters['channel']}")
    return f"{before}/channels/{{channel}}{behind}"


def _parent(headers: list[tuple[bytes, bytes]]) -> Any:
    """Return the caller's span, where it says which (https://www.w3.org/TR/trace-context/)."""
    told: dict[str, str] = {}
    for name, value in headers:
        if name in (b"traceparent", b"tracestate"):
            key, text = name.decode(), value.decode("latin-1")
            told[key] = f"{told[key]},{text}" if key in told else text
    return PARENT.extract(told) if "traceparent" in told else None
