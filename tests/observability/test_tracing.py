"""Handshakes and requests as a collector sees them; and a relay that does not trace at all."""

import asyncio
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websocket_relay.client import Relay as Client
from websockets.exceptions import InvalidStatus

from tests.support.admission import guarding
from tests.support.collector import SOON, Collector, Span
from tests.support.issuer import token
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import HOST, PLAIN, ROOT, Relay, StartRelay, eventually, run_python

SERVER = 2
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

BUILD = """
import sys
from websocket_relay.server import run
from websocket_relay.config import model
from websocket_relay.app import build
made = build(model.Settings(), None, None, run.load_tracing({}))
loaded = ("opentelemetry.sdk", "opentelemetry.exporter", "google.protobuf", "requests")
print(type(made.app).__name__, [name for name in sys.modules if name.startswith(loaded)])
"""

WITHOUT_EXTRA = "import sys; sys.modules['opentelemetry.sdk'] = None"

TRACES_EVERYBODY = """
import os
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
trace.set_tracer_provider(TracerProvider())
exporter = OTLPSpanExporter(os.environ["FOR_ALL"])
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))
trace.get_tracer("all").start_span("it works").end()
"""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as started:
        yield started


@pytest.fixture
def traced_relay(relay_with: StartRelay, collector: Collector) -> Relay:
    """A relay that tells the collector of everything, at once."""
    return relay_with(
        collector.variables | SOON,
        server={"allowed_origins": ["https://good.example"]},
        logging={"level": "debug"},
    )


async def ask(relay: Relay, method: str, path: str, **options: Any) -> httpx2.Response:
    async with httpx2.AsyncClient(verify=PLAIN, trust_env=False, timeout=PATIENCE_S) as http:
        return await http.request(method, relay.http_url(path), **options)


def described(span: Span, **others: object) -> Mapping[str, object]:
    """Return the attributes without those that are everywhere, once those are as they should be."""
    assert span.kind == SERVER
    assert span.resource["service.name"] == "websocket-relay"
    left = dict(span.attributes)
    assert left.pop("url.scheme") in ("ws", "http")
    assert left.pop("network.protocol.version") == "1.1"
    assert left.pop("client.address") == HOST
    return left


async def test_a_handshake_is_a_span_with_its_channel_and_what_became_of_it(
    traced_relay: Relay, collector: Collector
) -> None:
    async with traced_relay.client("news"), traced_relay.client():
        one, two = await collector.told("handshake /channels/{channel}", "handshake /")
    assert not one.is_error
    assert described(one) == {
        "http.request.method": "GET",
        "http.route": "/channels/{channel}",
        "http.response.status_code": 101,
        "url.path": "/channels/news",
        "relay.channel": "news",
    }
    assert described(two)["http.route"] == "/"
    assert one.resource["service.instance.id"] == two.resource["service.instance.id"] != ""


@pytest.mark.parametrize(
    ("path", "headers", "status", "reason", "name"),
    [
        ("/", {"Origin": "https://bad.example"}, 403, "origin", "handshake /"),
        ("/?since=x", {}, 400, "query", "handshake /"),
        ("/channels/a%20b", {}, 404, "path", "handshake /channels/{channel}"),
        ("/elsewhere", {}, 404, "path", "handshake"),
    ],
)
async def test_a_refused_handshake_says_why(
    traced_relay: Relay,
    collector: Collector,
    path: str,
    headers: Mapping[str, str],
    status: int,
    reason: str,
    name: str,
) -> None:
    with pytest.raises(InvalidStatus):
        await traced_relay.client(path=path, additional_headers=headers)
    (span,) = await collector.told(name)
    assert not span.is_error, "it is the client's"
    assert span.attributes["http.response.status_code"] == status
    assert span.attributes["relay.refusal"] == reason


async def test_a_handshake_over_a_limit_is_an_error(
    relay_with: StartRelay, collector: Collector
) -> None:
    relay = relay_with(collector.variables | SOON, limits={"max_connections": 1})
    async with relay.client("news"):
        with pytest.raises(InvalidStatus):
            await relay.client("news")
    refused = await collector.told_of(lambda span: span.is_error)
    assert refused.attributes["error.type"] == "503"
    assert refused.attributes["relay.refusal"] == "connections"


async def test_requests_are_spans_and_probes_are_none(
    traced_relay: Relay, collector: Collector
) -> None:
    assert (await traced_relay.get("/healthz")).status_code == 200
    assert (await traced_relay.get("/readyz")).status_code == 200
    assert (await traced_relay.get("/favicon.ico")).status_code == 404
    assert (
        await ask(traced_relay, "POST", "/channels/events", content=b"hello")
    ).status_code == 202
    async with await traced_relay.tcp() as listener:
        await listener.send(b"GET /channels/events/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await listener.response()
        last = "GET /channels/{channel}/events"
        spans = await collector.told("GET", "POST /channels/{channel}", last)
    assert [span.name for span in spans] == ["GET", "POST /channels/{channel}", last]
    unknown, posted, listened = map(described, spans)
    assert unknown == {
        "http.request.method": "GET",
        "http.response.status_code": 404,
        "url.path": "/favicon.ico",
    }
    assert posted["http.response.status_code"] == 202
    assert posted["relay.channel"] == listened["relay.channel"] == "events"
    assert listened["http.response.status_code"] == 200


async def test_the_caller_s_trace_goes_on(traced_relay: Relay, collector: Collector) -> None:
    caller = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    async with traced_relay.client("news", additional_headers=caller):
        (span,) = await collector.told("handshake /channels/{channel}")
    assert (span.trace_id, span.parent_id) == (TRACE, PARENT)
    await ask(traced_relay, "POST", "/", content=b"hello", headers=caller)
    posted = (await collector.told("POST /"))[-1]
    assert (posted.trace_id, posted.parent_id) == (TRACE, PARENT)
    assert posted.span_id != span.span_id


async def test_what_the_caller_does_not_sample_is_not_told(
    traced_relay: Relay, collector: Collector
) -> None:
    unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    async with traced_relay.client("unsampled", additional_headers=unsampled):
        pass
    async with traced_relay.client():
        assert len(await collector.told("handshake /")) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": "nonsense"},
        {"traceparent": "00-" + "0" * 32 + f"-{PARENT}-01"},
        {"traceparent": f"00-{TRACE}-{PARENT}-01".ljust(5_000, "0")},
        {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "=,=" * 1_000},
        {"tracestate": "alone=1"},
    ],
)
async def test_a_broken_trace_does_no_harm_and_fills_no_log(
    traced_relay: Relay, collector: Collector, headers: Mapping[str, str]
) -> None:
    before = len(traced_relay.log_lines)
    async with traced_relay.client("news", additional_headers=headers):
        (span,) = await collector.told("handshake /channels/{channel}")
    assert span.attributes["http.response.status_code"] == 101
    assert len(span.trace_id) == 32
    await traced_relay.wait_for_log("client gone")
    assert len(traced_relay.log_lines) == before + 1


async def test_the_lines_of_a_request_bear_its_trace_and_others_none(
    traced_relay: Relay, collector: Collector
) -> None:
    caller = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    async with traced_relay.client("news", additional_headers=caller):
        (accepted,) = await collector.told("handshake /channels/{channel}")
    gone = await traced_relay.wait_for_log("client gone")
    with pytest.raises(InvalidStatus):
        await traced_relay.client(path="/elsewhere", additional_headers=caller)
    refused = await traced_relay.wait_for_log("refused")
    span = (await collector.told("handshake"))[-1]
    assert (refused["trace_id"], refused["span_id"]) == (TRACE, span.span_id)
    assert span.span_id != accepted.span_id
    assert "trace_id" not in gone


async def test_no_token_is_told(relay_with: StartRelay, collector: Collector) -> None:
    relay = relay_with(collector.variables | SOON, auth=guarding(), logging={"level": "debug"})
    brought = [token(sub="very-secret"), token(exp=1, sub="very-secret")]
    for one in brought:
        for options in (
            {"path": f"/channels/query?access_token={one}"},
            {"path": "/channels/offer", "subprotocols": ["bearer", one]},
            {"path": "/channels/header", "additional_headers": {"Authorization": f"Bearer {one}"}},
        ):
            try:
                await (await relay.client(**options)).close()
            except InvalidStatus:
                continue
        await ask(relay, "POST", f"/channels/posted?access_token={one}", content=b"payload")
    await ask(relay, "GET", "/the-last")
    await collector.told("GET")
    assert len(collector.spans) == 2 * 4 + 1
    told = b"".join(collector.bodies).decode("latin-1") + "\n".join(relay.log_lines)
    for part in (*(part for one in brought for part in one.split(".")), "payload", "access_token"):
        assert part not in told


async def test_what_traces_every_program_of_a_machine_is_told_nothing(
    tmp_path: Path, relay_with: StartRelay, collector: Collector
) -> None:
    (tmp_path / "sitecustomize.py").write_text(TRACES_EVERYBODY)
    endpoint = collector.variables["OTEL_EXPORTER_OTLP_ENDPOINT"]
    relay = relay_with({"FOR_ALL": f"{endpoint}/v1/traces", "PYTHONPATH": f"{tmp_path}:{ROOT}"})
    await ask(relay, "POST", "/?access_token=very-secret", content=b"hello")
    assert await relay.stop() == 0
    assert [span.name for span in collector.spans] == ["it works"]


async def test_the_environment_names_the_service_and_what_the_collector_asks_for(
    relay_with: StartRelay, collector: Collector
) -> None:
    relay = relay_with(
        collector.variables
        | SOON
        | {
            "OTEL_SERVICE_NAME": "chat",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test,service.instance.id=one",
            "OTEL_EXPORTER_OTLP_HEADERS": "api-key=very-secret,and=nonsense=; =",
        },
        logging={"level": "debug"},
    )
    async with relay.client("news"):
        (span,) = await collector.told("handshake /channels/{channel}")
    assert span.resource["service.name"] == "chat"
    assert span.resource["service.instance.id"] == "one"
    assert span.resource["deployment.environment.name"] == "test"
    assert "service.version" in span.resource
    assert collector.headers[0]["api-key"] == "very-secret"
    assert "secret" not in "\n".join(relay.log_lines)


async def test_a_variable_that_is_empty_is_none(
    relay_with: StartRelay, collector: Collector
) -> None:
    empty = dict.fromkeys(
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER",
         "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"), ""
    )  # fmt: skip
    relay = relay_with(empty | collector.variables | SOON)
    async with relay.client("news"):
        await collector.told("handshake /channels/{channel}")


async def test_the_last_spans_are_told_when_the_relay_stops(
    relay_with: StartRelay, collector: Collector
) -> None:
    later = {"OTEL_BSP_SCHEDULE_DELAY": "600000"}
    relay = relay_with(collector.variables | later, shutdown={"spread_s": 0})
    async with relay.client("news"):
        pass
    assert not collector.spans
    assert await relay.stop() == 0
    assert [span.name for span in collector.spans] == ["handshake /channels/{channel}"]


async def test_a_collector_that_is_stuck_holds_up_neither_clients_nor_the_stop(
    relay_with: StartRelay,
) -> None:
    with Collector(is_stuck=True) as collector:
        relay = relay_with(collector.variables | SOON, shutdown={"timeout_s": 5, "spread_s": 0})
        async with relay.client("news"):
            await collector.was_asked()
            async with relay.client("news"):
                pass
        begun = time.monotonic()
        assert await relay.stop() == 0
        assert time.monotonic() - begun < 5


async def test_without_its_collector_the_relay_relays_and_says_so(relay_with: StartRelay) -> None:
    with Collector() as gone:
        address = gone.variables["OTEL_EXPORTER_OTLP_ENDPOINT"].replace("//", "//me:very-secret@")
    variables = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{address}/v1/traces?key=very-secret"}
    relay = relay_with(variables | SOON | {"OTEL_EXPORTER_OTLP_TIMEOUT": "3"})
    async with Client(relay.ws_url("/channels/news")) as client:
        await client.send("hello")
        async with asyncio.timeout(PATIENCE_S):
            assert (await anext(aiter(client))).data == "hello"

    async def complains() -> tuple[bool, object]:
        told = [event for event in relay.log_events if "logger" in event]
        return any("/v1/traces" in event["event"] for event in told), told

    await eventually(complains, "a line of the library's")
    assert await relay.stop() == 0
    assert "very-secret" not in "\n".join(relay.log_lines)


# Off


def test_a_relay_that_does_not_trace_has_not_loaded_the_library_and_goes_the_same_way() -> None:
    done = run_python("-c", BUILD, directory=ROOT)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.split(maxsplit=1) == ["SecurityHeaders", "[]\n"]


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_SDK_DISABLED": "true"},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
    ],
)
async def test_the_environment_may_say_that_there_are_no_traces(
    relay_with: StartRelay, collector: Collector, variables: Mapping[str, str]
) -> None:
    relay = relay_with(collector.variables | SOON | dict(variables), shutdown={"spread_s": 0})
    async with relay.client("news"):
        pass
    assert await relay.stop() == 0
    assert not collector.asked
    warned = [event["reason"] for event in relay.log_events if event["event"] == "no traces"]
    is_grpc = "grpc" in variables.values()
    assert warned == (["grpc is not spoken, http/protobuf is"] if is_grpc else [])


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "websocket-relay[otel] is not installed"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "0"}, "max_queue_size must be a positive integer"),
    ],
)
async def test_what_can_t_be_traced_is_relayed(
    tmp_path: Path,
    relay_with: StartRelay,
    collector: Collector,
    variables: Mapping[str, str],
    reason: str,
) -> None:
    paths = str(ROOT)
    if not variables:
        (tmp_path / "sitecustomize.py").write_text(WITHOUT_EXTRA)
        paths = f"{tmp_path}:{paths}"
    relay = relay_with(collector.variables | SOON | dict(variables) | {"PYTHONPATH": paths})
    assert reason in (await relay.wait_for_log("no traces"))["reason"]
    async with relay.client("news") as client:
        await client.send("hello")
        assert await client.recv() == "hello"
    assert not collector.asked
