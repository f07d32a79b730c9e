"""Compose the relay: build the parts and hand them to each other."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from prometheus_fastapi_instrumentator import Instrumentator
from starlette.types import ASGIApp

from websocket_relay import __version__
from websocket_relay.admission.policy import AdmissionPolicy
from websocket_relay.admission.refusal_log import RefusalLog
from websocket_relay.api.console import console_router, script_router
from websocket_relay.api.metrics import metrics_router
from websocket_relay.api.probes import health_router
from websocket_relay.api.publish import publish_router
from websocket_relay.api.refusals import Refusals
from websocket_relay.api.security_headers import SecurityHeaders
from websocket_relay.api.sse import events_router
from websocket_relay.api.websocket import add_websocket_routes, upgrade_router
from websocket_relay.backplane.factory import open_backplane
from websocket_relay.backplane.interface import Backplane, BackplaneState
from websocket_relay.channels.broadcaster import Broadcaster
from websocket_relay.channels.history import History
from websocket_relay.config.model import Settings
from websocket_relay.counters import Counters
from websocket_relay.file_descriptors import OF_METRICS, FileDescriptors
from websocket_relay.lifecycle import Lifecycle, Phase
from websocket_relay.metrics import Gauges, Metrics
from websocket_relay.outcomes import Refusal
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

PENDING_PART, UNHEARD_PART, APPENDS_PART = 2, 4, 16
"""What was said and is not written yet comes to limits.total_backlog_bytes at most: a half of it
waits for its fan-out, a quarter was read and is not heard yet, and a sixteenth waits to get into
the log, which is what a broker takes in a tenth of a second. The rest is for what is in work: with
each of them one message may pass its part."""


@dataclass(frozen=True, slots=True)
class Replica:
    """What `server` runs.

    Attributes:
        app: the relay's port.
        metrics_app: the metrics port.
        shared: what the connections of the relay's port are given.
        plain: those of them that are no clients.
        metrics_plain: the metrics port's connections.
        backplane: the log.
        history: what is kept for clients that come back.
        certificates: what is served there, or None for plain ws://.
        tokens: what checks tokens, or None where there are none.
    """

    app: ASGIApp
    metrics_app: ASGIApp
    shared: ConnectionContext
    plain: HttpConnections
    metrics_plain: HttpConnections
    backplane: Backplane
    history: History
    health: Lifecycle
    metrics: Metrics
    certificates: Certificates | None
    tokens: "TokenVerifier | None"


def build(
    settings: Settings,
    certificates: Certificates | None,
    tokens: "TokenVerifier | None",
    tracing: "Tracing | None" = None,
) -> Replica:
    """Build one replica."""
    limits = settings.limits
    ledger, metrics = Counters(), Metrics()

    def describe() -> bytes:
        clients = ledger.connections - ledger.disconnections
        said = {"name": REPLICA[:64], "clients": clients, "messages": ledger.messages}
        return json.dumps(said).encode()

    appends = HighWaterMark(limits.total_backlog_bytes // APPENDS_PART)
    relays_locally = settings.backplane.on_outage == "local"
    backplane = open_backplane(
        settings.backplane.url.get_secret_value(),
        settings.backplane.stream,
        relays_locally=relays_locally,
        max_message_bytes=limits.max_message_bytes,
        history_bytes=settings.history.max_bytes,
        history_age_s=settings.history.max_age_s,
        pending=appends,
        describe=describe,
        observe_append=metrics.observe_append,
        observe_lag=metrics.observe_backplane_lag,
    )
    can_do_without = (
        {BackplaneState.UP, BackplaneState.OUTAGE} if relays_locally else {BackplaneState.UP}
    )
    health = Lifecycle(is_cut_off=lambda: backplane.state not in can_do_without)
    backlogs = SendBacklogs(limits.send_backlog_bytes, limits.total_backlog_bytes)
    # One message alone must have room.
    unfinished = PartialMessages(
        max(limits.total_backlog_bytes, limits.max_message_bytes + INFLATER_BYTES)
    )
    shared = ConnectionContext(
        max_message_bytes=limits.max_message_bytes,
        compresses=settings.compression.enabled,
        deadline_s=limits.handshake_timeout_s,
        ledger=ledger,
        backlogs=backlogs,
        unfinished=unfinished,
        unheard=HighWaterMark(limits.total_backlog_bytes // UNHEARD_PART),
        appends=appends,
        pending=HighWaterMark(limits.total_backlog_bytes // PENDING_PART),
    )
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
    refusals = Refusals(ledger, RefusalLog(), tracing.note_refusal if tracing else None)
    metrics_plain = HttpConnections(OF_METRICS, Refusal.METRICS_CONNECTIONS, refusals.count)
    descriptors = FileDescriptors(
        connections=lambda: len(shared.clients) + plain.deciding + len(plain) + len(metrics_plain),
        of_requests=lambda: len(plain),
        of_metrics=lambda: len(metrics_plain),
    )
    plain = HttpConnections(
        limits.max_http_connections,
        Refusal.HTTP_CONNECTIONS,
        refusals.count,
        has_descriptors=descriptors.fit_request,
    )
    admission = AdmissionPolicy(
        allowed_origins=settings.server.allowed_origins,
        max_connections=limits.max_connections,
        max_connections_per_ip=limits.max_connections_per_ip,
        max_handshakes_per_s=limits.max_handshakes_per_s,
        max_messages_per_s=limits.max_messages_per_s,
        tokens=tokens,
        connections=lambda: len(shared.clients),
        has_descriptor=descriptors.fit_client,
        has_room=broadcaster.has_room,
        health=health,
    )
    metrics.watch(
        ledger,
        Gauges(
            max_connections=limits.max_connections,
            free_descriptors=lambda: descriptors.free,
            http_connections=lambda: {"relay": len(plain), "metrics": len(metrics_plain)},
            http_evictions=lambda: plain.evictions + metrics_plain.evictions,
            total_backlog_bytes=limits.total_backlog_bytes,
            ready=lambda: health.ready,
            channels=lambda: len(broadcaster),
            slow_clients=lambda: len(backlogs),
            backlog_bytes=lambda: backlogs.total_bytes,
            unfinished_bytes=lambda: unfinished.total_bytes,
            paused_publishers=lambda: shared.held,
            log_books=backplane.books,
            log_up=lambda: backplane.state is BackplaneState.UP,
            appends_bytes=lambda: appends.bytes,
            history_messages=lambda: len(history),
            history_bytes=lambda: history.bytes,
            draining=lambda: health.phase is Phase.DRAINING,
            certificate_expiry=lambda: certificates.expiry if certificates else None,
            certificate_reloads=lambda: certificates.reloads if certificates else {},
            key_fetches=lambda: tokens.jwks.fetches if tokens and tokens.jwks else {},
        ),
    )
    started_at = time.monotonic()

    def figures() -> dict[str, Any]:
        return {
            "version": __version__,
            "replica": REPLICA,
            "uptime_s": round(time.monotonic() - started_at),
            "status": health.status,
            "replicas": [_said(note) for note in backplane.replicas()],
            "backplane": settings.backplane.url.get_secret_value().partition("://")[0],
            "max_message_bytes": limits.max_message_bytes,
            **metrics.figures(),
        }

    base_path = settings.server.base_path
    app = _fastapi(openapi_url=f"{base_path}/openapi.json")
    add_websocket_routes(app.router, admission, broadcaster, refusals, base_path=base_path)
    app.include_router(health_router(health))
    for router in _routers(settings, admission, broadcaster, refusals, figures):
        app.include_router(router)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=[origin.lower() for origin in settings.server.allowed_origins],
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "Last-Event-ID"],
        expose_headers=["Retry-After"],
    )
    Instrumentator(registry=metrics.registry).instrument(app)
    metrics_app = _fastapi()
    metrics_app.include_router(health_router(health))
    metrics_app.include_router(metrics_router(metrics))
    safe_app = SecurityHeaders(app)
    return Replica(
        tracing.traced(safe_app) if tracing else safe_app,
        SecurityHeaders(metrics_app),
        shared,
        plain,
        metrics_plain,
        backplane,
        history,
        health,
        metrics,
        certificates,
        tokens,
    )


def _routers(
    settings: Settings,
    admission: AdmissionPolicy,
    broadcaster: Broadcaster,
    refusals: Refusals,
    figures: Callable[[], dict[str, Any]],
) -> Iterator[APIRouter]:
    """Yield the routes of the relay's port but for the probes."""
    base_path = settings.server.base_path
    yield script_router(base_path=base_path)
    if settings.console.enabled:
        yield console_router(admission, refusals, figures, base_path=base_path)
    yield publish_router(
        admission,
        broadcaster,
        refusals,
        base_path=base_path,
        max_bytes=settings.limits.max_message_bytes,
    )
    yield events_router(
        admission,
        broadcaster,
        refusals,
        base_path=base_path,
        silence_s=settings.keepalive.ping_interval_s + settings.keepalive.ping_timeout_s,
    )
    # The last: it answers what no other does.
    yield upgrade_router(base_path=base_path)


def _said(note: bytes) -> Any:
    try:
        return json.loads(note)
    except ValueError:
        return {}


def _fastapi(openapi_url: str | None = None) -> FastAPI:
    return FastAPI(
        title="websocket-relay",
        version=__version__,
        openapi_url=openapi_url,
        docs_url=None,  # a page of scripts from elsewhere
        redoc_url=None,
        # A redirect is nothing a WebSocket client follows.
        redirect_slashes=False,
        # FastAPI's own traces hold queries, and with them tokens. Ours are in `tracing`.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
