"""Traces: spans of handshakes and requests, the caller's trace, no secrets, and no collector."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websocket_relay.client import Relay as Client
from websockets.exceptions import InvalidStatus

from tests.support.admission import jwt_settings
from tests.support.collector import SHORT_EXPORT_DELAY, Collector, Span
from tests.support.issuer import sign_token
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import (
    HOST,
    NO_CA,
    ROOT,
    RelayProcess,
    StartRelay,
    eventually,
    run_python,
)

SERVER = 2
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
MAX_CONNECTIONS = 3

BUILD = """
import sys
from websocket_relay.server import run
from websocket_relay.config import model
from websocket_relay.app import Replica
made = Replica(model.Settings(), {})
loaded = ("opentelemetry.sdk", "opentelemetry.exporter", "google.protobuf", "requests")
print(made.port.app.__name__, [name for name in sys.modules if name.startswith(loaded)])
"""

WITHOUT_EXTRA = "import sys; sys.modules['opentelemetry.sdk'] = None"

GLOBAL_TRACING = """
import os
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
trace.set_tracer_provider(TracerProvider())
exporter = OTLPSpanExporter(os.environ["GLOBAL_ENDPOINT"])
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))
trace.get_tracer("global").start_span("it works").end()
"""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as started:
        yield started


async def request(relay: RelayProcess, method: str, path: str, **options: Any) -> httpx2.Response:
    async with httpx2.AsyncClient(verify=NO_CA, trust_env=False, timeout=PATIENCE_S) as http:
        return await http.request(method, relay.http_url(path), **options)


def specific_attributes(span: Span) -> Mapping[str, object]:
    """Check the attributes that all spans have; return the others."""
    assert span.kind == SERVER
    assert span.resource["service.name"] == "websocket-relay"
    others = dict(span.attributes)
    assert others.pop("url.scheme") in ("ws", "http")
    assert others.pop("network.protocol.version") == "1.1"
    assert others.pop("client.address") == HOST
    return others


# Spans: with one relay, because it takes a second of processor time to load the library


@pytest.fixture(scope="module")
def shared_collector() -> Iterator[Collector]:
    with Collector() as started:
        yield started


@pytest.fixture(scope="module")
def shared_traced_relay(
    tmp_path_factory: pytest.TempPathFactory, shared_collector: Collector
) -> Iterator[RelayProcess]:
    settings = {
        "server": {"allowed_origins": ["https://good.example"]},
        "limits": {"max_connections": MAX_CONNECTIONS},
        "logging": {"level": "debug"},
    }
    variables = shared_collector.variables | SHORT_EXPORT_DELAY
    with RelayProcess(tmp_path_factory.mktemp("traced"), settings, variables) as relay:
        yield relay


@pytest.fixture
async def traced_relay(shared_traced_relay: RelayProcess) -> RelayProcess:
    """A relay that exports its spans at once, without clients and without pending log lines."""
    await shared_traced_relay.await_metric("websocket_connected_clients", 0)
    metrics = await shared_traced_relay.metrics()
    for event, metric in (
        ("client disconnected", "websocket_disconnections_total"),
        ("refused", "websocket_refusals_total"),
    ):
        if count := metrics.value(metric):
            await shared_traced_relay.await_log(event, count=int(count))
    return shared_traced_relay


@pytest.fixture
def spans(shared_collector: Collector) -> Collector:
    """The collector of that relay, without the spans of earlier tests.

    Spans are exported in their order, and each test waits for its last one.
    """
    shared_collector.bodies.clear()
    return shared_collector


one_worker = pytest.mark.xdist_group("traced relay")


@one_worker
async def test_a_handshake_is_a_span_with_channel_and_status(
    traced_relay: RelayProcess, spans: Collector
) -> None:
    async with traced_relay.client("news"), traced_relay.client():
        first, second = await spans.await_spans("handshake /channels/{channel}", "handshake /")
    assert not first.is_error
    assert specific_attributes(first) == {
        "http.request.method": "GET",
        "http.route": "/channels/{channel}",
        "http.response.status_code": 101,
        "url.path": "/channels/news",
        "relay.channel": "news",
    }
    assert specific_attributes(second)["http.route"] == "/"
    instances = [span.resource["service.instance.id"] for span in (first, second)]
    assert instances[0] == instances[1] != ""


REFUSED: list[tuple[str, dict[str, str], int, str, str]] = [
    ("/", {"Origin": "https://bad.example"}, 403, "origin_not_allowed", "handshake /"),
    ("/?since=x", {}, 400, "invalid_query", "handshake /"),
    ("/channels/a%20b", {}, 404, "no_such_channel", "handshake /channels/{channel}"),
    ("/elsewhere", {}, 404, "no_such_channel", "handshake"),
]


@one_worker
async def test_the_span_of_a_refused_handshake_has_the_reason_and_is_no_error(
    traced_relay: RelayProcess, spans: Collector
) -> None:
    for path, headers, *_ in REFUSED:
        with pytest.raises(InvalidStatus):
            await traced_relay.client(path=path, additional_headers=headers)
    found = await spans.await_spans("handshake")  # the last one
    assert [
        (
            span.is_error,
            span.attributes["http.response.status_code"],
            span.attributes["relay.refusal"],
            span.name,
        )
        for span in found
    ] == [(False, status, reason, name) for _, _, status, reason, name in REFUSED]


@one_worker
async def test_the_span_of_a_handshake_above_a_limit_is_an_error(
    traced_relay: RelayProcess, spans: Collector
) -> None:
    async with traced_relay.client(), traced_relay.client(), traced_relay.client():
        with pytest.raises(InvalidStatus):
            await traced_relay.client()
    refused = await spans.await_span(lambda span: span.is_error)
    assert refused.attributes["error.type"] == "503"
    assert refused.attributes["relay.refusal"] == "connections"


@one_worker
async def test_requests_are_spans_and_probes_are_not(
    traced_relay: RelayProcess, spans: Collector
) -> None:
    assert (await traced_relay.get("/healthz")).status_code == 200
    assert (await traced_relay.get("/readyz")).status_code == 200
    assert (await traced_relay.get("/favicon.ico")).status_code == 404
    answer = await request(traced_relay, "POST", "/channels/events", content=b"hello")
    assert answer.status_code == 202
    async with await traced_relay.connect_tcp() as subscriber:
        await subscriber.send(b"GET /channels/events/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await subscriber.read_response()
        names = ["GET", "POST /channels/{channel}", "GET /channels/{channel}/events"]
        found = await spans.await_spans(*names)
    assert [span.name for span in found] == names
    unknown, posted, streamed = map(specific_attributes, found)
    assert unknown == {
        "http.request.method": "GET",
        "http.response.status_code": 404,
        "url.path": "/favicon.ico",
    }
    assert posted["http.response.status_code"] == 202
    assert posted["relay.channel"] == streamed["relay.channel"] == "events"
    assert streamed["http.response.status_code"] == 200


@one_worker
async def test_a_span_continues_the_trace_of_the_caller_and_so_do_its_log_lines(
    traced_relay: RelayProcess, spans: Collector
) -> None:
    caller = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    start = len(traced_relay.log_events)
    async with traced_relay.client("news", additional_headers=caller):
        (accepted,) = await spans.await_spans("handshake /channels/{channel}")
    (disconnected,) = await log_events_from(traced_relay, start, "client disconnected")
    assert "trace_id" not in disconnected
    await request(traced_relay, "POST", "/", content=b"hello", headers=caller)
    posted = (await spans.await_spans("POST /"))[-1]
    with pytest.raises(InvalidStatus):
        await traced_relay.client(path="/elsewhere", additional_headers=caller)
    refused = (await spans.await_spans("handshake"))[-1]
    found = (accepted, posted, refused)
    assert {(span.trace_id, span.parent_id) for span in found} == {(TRACE, PARENT)}
    assert len({span.span_id for span in found}) == 3
    _, line = await log_events_from(traced_relay, start, "client disconnected", "refused")
    assert (line["trace_id"], line["span_id"]) == (TRACE, refused.span_id)


async def log_events_from(
    relay: RelayProcess, start: int, *names: str
) -> Sequence[Mapping[str, Any]]:
    """Wait until the events from a place in the log have these names; return them."""

    async def look() -> tuple[bool, object]:
        found = [event["event"] for event in relay.log_events[start:]]
        return found == [*names], found

    await eventually(look, f"{names} in the log")
    return relay.log_events[start:]


@one_worker
async def test_a_trace_that_the_caller_does_not_sample_is_not_exported(
    traced_relay: RelayProcess, spans: Collector
) -> None:
    unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    async with traced_relay.client("unsampled", additional_headers=unsampled):
        pass
    async with traced_relay.client():
        assert len(await spans.await_spans("handshake /")) == 1


@one_worker
async def test_an_invalid_trace_of_the_caller_is_ignored_and_not_logged(
    traced_relay: RelayProcess, spans: Collector
) -> None:
    valid = f"00-{TRACE}-{PARENT}-01"
    invalid: list[dict[str, str]] = [
        {"traceparent": "nonsense"},
        {"traceparent": "00-" + "0" * 32 + f"-{PARENT}-01"},
        {"traceparent": valid.ljust(5_000, "0")},
        {"traceparent": valid, "tracestate": "=,=" * 1_000},
        {"tracestate": "alone=1"},
    ]
    start = len(traced_relay.log_events)
    for number, headers in enumerate(invalid, 1):
        async with traced_relay.client("news", additional_headers=headers):
            pass
        await log_events_from(traced_relay, start, *["client disconnected"] * number)
    async with traced_relay.client():
        found = (await spans.await_spans("handshake /"))[:-1]
    assert [span.attributes["http.response.status_code"] for span in found] == [101] * len(invalid)
    assert all(len(span.trace_id) == 32 for span in found)


# Secrets


async def test_no_token_and_no_payload_is_exported(
    relay_with: StartRelay, collector: Collector
) -> None:
    relay = relay_with(
        collector.variables | SHORT_EXPORT_DELAY, auth=jwt_settings(), logging={"level": "debug"}
    )
    tokens = [sign_token(sub="very-secret"), sign_token(exp=1, sub="very-secret")]
    for each in tokens:
        for options in (
            {"path": f"/channels/query?access_token={each}"},
            {"path": "/channels/offer", "subprotocols": ["bearer", each]},
            {"path": "/channels/header", "additional_headers": {"Authorization": f"Bearer {each}"}},
        ):
            try:
                await (await relay.client(**options)).close()
            except InvalidStatus:
                continue
        await request(relay, "POST", f"/channels/posted?access_token={each}", content=b"payload")
    await request(relay, "GET", "/the-last")
    await collector.await_spans("GET")
    assert len(collector.spans) == 2 * 4 + 1
    exported = b"".join(collector.bodies).decode("latin-1") + "\n".join(relay.log_lines)
    parts = [part for each in tokens for part in each.split(".")]
    for secret in (*parts, "payload", "access_token"):
        assert secret not in exported


async def test_global_tracing_of_a_machine_gets_no_spans_of_the_relay(
    tmp_path: Path, relay_with: StartRelay, collector: Collector
) -> None:
    (tmp_path / "sitecustomize.py").write_text(GLOBAL_TRACING)
    endpoint = f"{collector.variables['OTEL_EXPORTER_OTLP_ENDPOINT']}/v1/traces"
    relay = relay_with({"GLOBAL_ENDPOINT": endpoint, "PYTHONPATH": f"{tmp_path}:{ROOT}"})
    await request(relay, "POST", "/?access_token=very-secret", content=b"hello")
    assert await relay.stop() == 0
    assert [span.name for span in collector.spans] == ["it works"]


# The environment


async def test_the_environment_sets_the_resource_and_the_headers_and_empty_variables_are_ignored(
    relay_with: StartRelay, collector: Collector
) -> None:
    empty = dict.fromkeys(
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER",
         "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"), ""
    )  # fmt: skip
    relay = relay_with(
        collector.variables
        | SHORT_EXPORT_DELAY
        | empty
        | {
            "OTEL_SERVICE_NAME": "chat",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test,service.instance.id=one",
            "OTEL_EXPORTER_OTLP_HEADERS": "api-key=very-secret,and=nonsense=; =",
        },
        logging={"level": "debug"},
    )
    async with relay.client("news"):
        (span,) = await collector.await_spans("handshake /channels/{channel}")
    assert span.resource["service.name"] == "chat"
    assert span.resource["service.instance.id"] == "one"
    assert span.resource["deployment.environment.name"] == "test"
    assert "service.version" in span.resource
    assert collector.headers[0]["api-key"] == "very-secret"
    assert "secret" not in "\n".join(relay.log_lines)


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_SDK_DISABLED": "true"},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
    ],
    ids=lambda variables: next(iter(variables)),
)
async def test_the_environment_can_disable_traces(
    relay_with: StartRelay, collector: Collector, variables: Mapping[str, str]
) -> None:
    relay = relay_with(
        collector.variables | SHORT_EXPORT_DELAY | dict(variables), shutdown={"spread_s": 0}
    )
    async with relay.client("news"):
        pass
    assert await relay.stop() == 0
    assert not collector.request_count
    reasons = [
        event["reason"] for event in relay.log_events if event["event"] == "tracing disabled"
    ]
    is_grpc = "grpc" in variables.values()
    assert reasons == (["grpc is not spoken, http/protobuf is"] if is_grpc else [])


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "websocket-relay[otel] is not installed"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "0"}, "max_queue_size must be a positive integer"),
    ],
    ids=["not installed", "invalid variable"],
)
async def test_a_relay_that_cannot_trace_serves_and_logs_the_reason(
    tmp_path: Path,
    relay_with: StartRelay,
    collector: Collector,
    variables: Mapping[str, str],
    reason: str,
) -> None:
    given = collector.variables | SHORT_EXPORT_DELAY | dict(variables)
    if not variables:
        (tmp_path / "sitecustomize.py").write_text(WITHOUT_EXTRA)
        given["PYTHONPATH"] = f"{tmp_path}:{ROOT}"
    relay = relay_with(given)
    assert reason in (await relay.await_log("tracing disabled"))["reason"]
    async with relay.client("news") as client:
        await client.send("hello")
        assert await client.recv() == "hello"
    assert not collector.request_count


def test_a_relay_without_a_collector_does_not_load_the_library_and_wraps_nothing() -> None:
    done = run_python("-c", BUILD, directory=ROOT)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.split(maxsplit=1) == ["by_kind", "[]\n"]


# The collector and the stop


async def test_pending_spans_are_exported_when_the_relay_stops(
    relay_with: StartRelay, collector: Collector
) -> None:
    later = {"OTEL_BSP_SCHEDULE_DELAY": "600000"}
    relay = relay_with(collector.variables | later, shutdown={"spread_s": 0})
    async with relay.client("news"):
        pass
    assert not collector.spans
    assert await relay.stop() == 0
    assert [span.name for span in collector.spans] == ["handshake /channels/{channel}"]


async def test_a_collector_that_does_not_answer_delays_neither_clients_nor_the_stop(
    relay_with: StartRelay,
) -> None:
    with Collector(is_stuck=True) as collector:
        relay = relay_with(
            collector.variables | SHORT_EXPORT_DELAY, shutdown={"timeout_s": 3, "spread_s": 0}
        )
        async with relay.client("news"):
            await collector.await_request()
            async with relay.client("news"):
                pass
        assert await relay.stop() == 0, "at shutdown.timeout_s it ends with 1"


async def test_a_relay_serves_without_its_collector_and_logs_the_failure_without_secrets(
    relay_with: StartRelay,
) -> None:
    with Collector() as ended:
        address = ended.variables["OTEL_EXPORTER_OTLP_ENDPOINT"].replace("//", "//me:very-secret@")
    variables = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{address}/v1/traces?key=very-secret"}
    relay = relay_with(variables | SHORT_EXPORT_DELAY | {"OTEL_EXPORTER_OTLP_TIMEOUT": "3"})
    async with asyncio.timeout(PATIENCE_S), Client(relay.ws_url()) as client:
        await client.publish("news", "hello")

    async def is_failure_logged() -> tuple[bool, object]:
        events = [event for event in relay.log_events if "logger" in event]
        return any("/v1/traces" in event["event"] for event in events), events

    await eventually(is_failure_logged, "a line of the library")
    assert await relay.stop() == 0
    assert "very-secret" not in "\n".join(relay.log_lines)
