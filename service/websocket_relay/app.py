"""Build the components of a replica and connect them. The only composition root.

Knows no port and no signal.
"""

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from prometheus_fastapi_instrumentator import Instrumentator
from starlette.types import ASGIApp

from websocket_relay import __version__, logs
from websocket_relay.admission.policy import AdmissionLimits, AdmissionPolicy
from websocket_relay.api.console import console_router
from websocket_relay.api.cors import Cors
from websocket_relay.api.metrics import metrics_router
from websocket_relay.api.probes import probes_router
from websocket_relay.api.publish import publish_router
from websocket_relay.api.refusals import answer_refusals
from websocket_relay.api.sse import events_router
from websocket_relay.api.static_files import browser_client_router
from websocket_relay.api.websocket import add_websocket_routes, upgrade_router
from websocket_relay.backplane.access import BrokerAccess
from websocket_relay.backplane.factory import open_backplane
from websocket_relay.backplane.interface import Backplane, BackplaneState
from websocket_relay.channels.broadcaster import Broadcaster
from websocket_relay.channels.history import History
from websocket_relay.config.model import BackplaneSettings, Settings
from websocket_relay.counters import Counters
from websocket_relay.file_descriptors import OF_METRICS, FileDescriptors
from websocket_relay.lifecycle import Lifecycle, Phase
from websocket_relay.metrics import Gauges, Metrics, disable_created_series
from websocket_relay.origins import AllowedOrigins
from websocket_relay.outcomes import Refusal
from websocket_relay.refusals import Refusals
from websocket_relay.tls import Certificates
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.deflate import INFLATER_BYTES
from websocket_relay.wire.flow_control import HighWaterMark
from websocket_relay.wire.http_connections import HttpConnections
from websocket_relay.wire.partial_messages import PartialMessages
from websocket_relay.wire.send_backlog import SendBacklogs

if TYPE_CHECKING:
    from websocket_relay.admission.verifier import TokenVerifier
    from websocket_relay.tracing import Tracing


REPLICA = socket.gethostname()

PENDING_PART, UNPROCESSED_PART, APPENDS_PART = 2, 4, 16
"""Messages that are not written yet take at most limits.total_backlog_bytes: a half is pending
fan-out, a quarter is received but unprocessed, and a sixteenth is pending append to the log, which
is what a broker accepts in 0.1 s. The rest is headroom: each of the three may be exceeded by one
message."""


@dataclass(frozen=True, slots=True)
class Replica:
    """The components that `server` runs.

    Attributes:
        app: the application of the relay's port.
        metrics_app: the application of the metrics port.
        shared: the context of all connections on the relay's port.
        http_connections: the plain HTTP connections on the relay's port.
        metrics_http_connections: the connections on the metrics port.
        backplane: the log.
        history: messages retained for replay.
        lifecycle: the phase of the relay.
        metrics: the metrics of the replica.
        refusals: records refusals.
        certificates: the served certificate; None: no TLS.
        tokens: verifies tokens; None: no token is required.
        configure: applies the settings of `config.changes.RELOADABLE`, with a new verifier.
    """

    app: ASGIApp
    metrics_app: ASGIApp
    shared: ConnectionContext
    http_connections: HttpConnections
    metrics_http_connections: HttpConnections
    backplane: Backplane
    history: History
    lifecycle: Lifecycle
    metrics: Metrics
    refusals: Refusals
    certificates: Certificates | None
    tokens: "TokenVerifier | None"
    configure: Callable[[Settings, "TokenVerifier | None"], None]


def build(
    settings: Settings,
    certificates: Certificates | None,
    tokens: "TokenVerifier | None",
    tracing: "Tracing | None" = None,
) -> Replica:
    """Build one replica.

    Args:
        settings: of the relay.
        certificates: the served certificate; None: no TLS.
        tokens: verifies tokens; None: no token is required.
        tracing: traces requests; None: no tracing.
    """
    limits = settings.limits
    disable_created_series()
    counters, metrics = Counters(), Metrics()

    def describe() -> bytes:
        clients = counters.connections - counters.disconnections
        facts = {"name": REPLICA[:64], "clients": clients, "messages": counters.messages}
        return json.dumps(facts).encode()

    appends = HighWaterMark(0)  # the limits are in `_set_limits`
    relays_locally = settings.backplane.on_outage == "local"
    backplane = open_backplane(
        settings.backplane.url.get_secret_value(),
        settings.backplane.stream,
        _broker_access(settings.backplane),
        relays_locally=relays_locally,
        max_message_bytes=limits.max_message_bytes,
        history_bytes=settings.history.max_bytes,
        history_age_s=settings.history.max_age_s,
        pending=appends,
        describe=describe,
        observe_append=metrics.observe_append,
        observe_lag=metrics.observe_backplane_lag,
    )
    serving_states = (
        {BackplaneState.UP, BackplaneState.OUTAGE} if relays_locally else {BackplaneState.UP}
    )
    lifecycle = Lifecycle(is_backplane_down=lambda: backplane.state not in serving_states)
    backlogs = SendBacklogs(0, 0)
    partial_messages = PartialMessages(0)
    refusals = Refusals(counters, tracing.annotate_refusal if tracing else None)
    shared = ConnectionContext(
        max_message_bytes=limits.max_message_bytes,
        compresses=settings.compression.enabled,
        deadline_s=limits.handshake_timeout_s,
        ping_interval_s=settings.keepalive.ping_interval_s,
        counters=counters,
        refusals=refusals,
        backlogs=backlogs,
        partial_messages=partial_messages,
        unparsed=HighWaterMark(0),
        pending_appends=appends,
        pending_fan_out=HighWaterMark(0),
    )
    _set_limits(settings, shared)
    history = History(
        max_messages=settings.history.max_messages,
        max_bytes=settings.history.max_bytes,
        max_age_s=settings.history.max_age_s,
        max_channels=settings.channels.max_channels,
        clock=time.monotonic,
    )
    broadcaster = Broadcaster(
        backplane=backplane,
        shared=shared,
        max_channels=settings.channels.max_channels,
        pending_limit_bytes=limits.send_backlog_bytes,
        deflate_from_bytes=settings.compression.min_message_bytes,
        history=history,
        written=metrics.observe_delivery,
    )
    metrics_http_connections = HttpConnections(
        OF_METRICS, Refusal.METRICS_CONNECTIONS, refusals.record
    )
    descriptors = FileDescriptors(
        connections=lambda: (
            len(shared.clients)
            + http_connections.pending_handshakes
            + len(http_connections)
            + len(metrics_http_connections)
        ),
        of_requests=lambda: len(http_connections),
        of_metrics=lambda: len(metrics_http_connections),
    )
    http_connections = HttpConnections(
        limits.max_http_connections,
        Refusal.HTTP_CONNECTIONS,
        refusals.record,
        has_descriptors=descriptors.can_accept_request,
    )
    admission = AdmissionPolicy(
        _admission_limits(settings),
        tokens,
        connections=lambda: len(shared.clients),
        has_descriptor=descriptors.can_accept_client,
        has_capacity=broadcaster.has_channel_capacity,
        health=lifecycle,
    )
    metrics.register(
        counters,
        Gauges(
            max_connections=lambda: admission.limits.max_connections,
            free_descriptors=lambda: descriptors.free,
            http_connections=lambda: {
                "relay": len(http_connections),
                "metrics": len(metrics_http_connections),
            },
            http_evictions=lambda: http_connections.evictions + metrics_http_connections.evictions,
            total_backlog_bytes=lambda: backlogs.total_limit_bytes,
            ready=lambda: lifecycle.ready,
            channels=lambda: len(broadcaster),
            slow_clients=lambda: len(backlogs),
            backlog_bytes=lambda: backlogs.total_bytes,
            partial_message_bytes=lambda: partial_messages.total_bytes,
            paused_publishers=lambda: shared.paused_connections,
            backplane_counters=backplane.counters,
            backplane_up=lambda: backplane.state is BackplaneState.UP,
            appends_bytes=lambda: appends.bytes,
            history_messages=lambda: len(history),
            history_bytes=lambda: history.bytes,
            draining=lambda: lifecycle.phase is Phase.DRAINING,
            certificate_expiry=lambda: certificates.expiry if certificates else None,
            certificate_reloads=lambda: certificates.reloads if certificates else {},
            key_fetches=lambda: tokens.jwks.fetches if tokens and tokens.jwks else {},
            dropped_log_lines=logs.dropped_lines,
        ),
    )
    started_at = time.monotonic()

    def stats() -> dict[str, Any]:
        return {
            "version": __version__,
            "replica": REPLICA,
            "uptime_s": round(time.monotonic() - started_at),
            "status": lifecycle.status,
            "replicas": [_parse_description(text) for text in backplane.replicas()],
            "backplane": settings.backplane.url.get_secret_value().partition("://")[0],
            "max_message_bytes": limits.max_message_bytes,
            **metrics.to_stats(),
        }

    base_path = settings.server.base_path
    app = _fastapi(openapi_url=f"{base_path}/openapi.json")
    answer_refusals(app, refusals, base_path=base_path)
    add_websocket_routes(app.router, admission, broadcaster, base_path=base_path)
    app.include_router(probes_router(lifecycle))
    for router in _routers(settings, admission, broadcaster, stats):
        app.include_router(router)
    cors = Cors(
        {
            "allow_methods": ["GET", "HEAD", "POST"],
            # Tracing and HTTP libraries add headers of their own. The relay reads none of them.
            "allow_headers": ["*"],
            "expose_headers": ["Retry-After"],
        },
        _cors_origins(settings),
        refusals,
    )
    app.add_middleware(cors.wrap)
    Instrumentator(registry=metrics.registry).instrument(app)
    metrics_app = _fastapi()
    metrics_app.include_router(probes_router(lifecycle))
    metrics_app.include_router(metrics_router(metrics))

    def configure(new: Settings, verifier: "TokenVerifier | None") -> None:
        admission.configure(_admission_limits(new), verifier)
        cors.allow(_cors_origins(new))
        http_connections.max_connections = new.limits.max_http_connections
        broadcaster.pending_limit_bytes = new.limits.send_backlog_bytes  # of further channels
        _set_limits(new, shared)

    return Replica(
        tracing.traced(app) if tracing else app,
        metrics_app,
        shared,
        http_connections,
        metrics_http_connections,
        backplane,
        history,
        lifecycle,
        metrics,
        refusals,
        certificates,
        tokens,
        configure,
    )


def _admission_limits(settings: Settings) -> AdmissionLimits:
    limits = settings.limits
    return AdmissionLimits(
        AllowedOrigins(settings.server.allowed_origins),
        max_connections=limits.max_connections,
        max_connections_per_ip=limits.max_connections_per_ip,
        max_handshakes_per_s=limits.max_handshakes_per_s,
        max_messages_per_s=limits.max_messages_per_s,
    )


def _cors_origins(settings: Settings) -> dict[str, Any]:
    expression = AllowedOrigins(settings.server.allowed_origins).expression
    return {"allow_origins": ["*"] if expression is None else [], "allow_origin_regex": expression}


def _set_limits(settings: Settings, shared: ConnectionContext) -> None:
    """Set the bounds on bytes that all connections share, at the start and at a reload."""
    limits = settings.limits
    total_bytes = limits.total_backlog_bytes
    shared.backlogs.set_limits(limits.send_backlog_bytes, total_bytes)
    shared.pending_appends.limit_bytes = total_bytes // APPENDS_PART
    shared.unparsed.limit_bytes = total_bytes // UNPROCESSED_PART
    shared.pending_fan_out.limit_bytes = total_bytes // PENDING_PART
    # A single message of the maximum size must fit.
    largest_bytes = limits.max_message_bytes + INFLATER_BYTES
    shared.partial_messages.limit_bytes = max(total_bytes, largest_bytes)


def _routers(
    settings: Settings,
    admission: AdmissionPolicy,
    broadcaster: Broadcaster,
    stats: Callable[[], dict[str, Any]],
) -> Iterator[APIRouter]:
    """Yield the routers of the relay's port, except the probes."""
    base_path = settings.server.base_path
    yield browser_client_router(base_path=base_path)
    if settings.console.enabled:
        yield console_router(admission, stats, base_path=base_path)
    yield publish_router(
        admission,
        broadcaster,
        base_path=base_path,
        max_bytes=settings.limits.max_message_bytes,
    )
    yield events_router(
        admission,
        broadcaster,
        base_path=base_path,
        silence_s=settings.keepalive.ping_interval_s + settings.keepalive.ping_timeout_s,
    )
    # Last, because the console's page has the same path.
    yield upgrade_router(base_path=base_path)


def _broker_access(settings: BackplaneSettings) -> BrokerAccess:
    values = settings.model_dump(include={each.name for each in fields(BrokerAccess)})
    return BrokerAccess(**values | {"password": settings.password.get_secret_value()})


def _parse_description(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _fastapi(openapi_url: str | None = None) -> FastAPI:
    return FastAPI(
        title="websocket-relay",
        version=__version__,
        openapi_url=openapi_url,
        docs_url=None,  # it loads scripts from a third party
        redoc_url=None,
        # WebSocket clients do not follow redirects.
        redirect_slashes=False,
        # FastAPI's own traces contain queries, and so tokens. The relay's are in `tracing`.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
