"""Compose the relay: build the parts and hand them to each other."""

from dataclasses import dataclass

from fastapi import FastAPI
from prometheus_fastapi_instrumentator import Instrumentator

from service import __version__
from service.admission import Admission
from service.api.health import health_router
from service.api.metrics import metrics_router
from service.api.websocket import websocket_router
from service.backplane.memory import MemoryBackplane
from service.health import Health, Phase
from service.ledger import Ledger
from service.metrics import Gauges, Metrics
from service.relay.broadcaster import Broadcaster
from service.settings import Settings
from service.tls import Certificates
from service.wire.backlog import Backlogs
from service.wire.shared import Shared


@dataclass(frozen=True, slots=True)
class Relay:
    """What `server` runs.

    Attributes:
        app: the relay's port.
        metrics_app: the metrics port.
        shared: what the connections of the relay's port are given.
        certificates: what is served there, or None for plain ws://.
    """

    app: FastAPI
    metrics_app: FastAPI
    shared: Shared
    health: Health
    metrics: Metrics
    certificates: Certificates | None


def build(settings: Settings, certificates: Certificates | None) -> Relay:
    """Build one replica."""
    limits = settings.limits
    ledger, health, metrics = Ledger(), Health(), Metrics()
    backlogs = Backlogs(limits.send_backlog_bytes, limits.total_backlog_bytes)
    shared = Shared(
        max_message_bytes=limits.max_message_bytes,
        compresses=settings.compression.enabled,
        deadline_s=limits.handshake_timeout_s,
        ledger=ledger,
        backlogs=backlogs,
    )
    broadcaster = Broadcaster(
        backplane=MemoryBackplane(),
        shared=shared,
        max_channels=settings.channels.max_channels,
        pending_limit_bytes=limits.send_backlog_bytes,
        total_pending_limit_bytes=limits.total_backlog_bytes,
        deflate_from_bytes=settings.compression.min_message_bytes,
        written=metrics.observe_delivery,
    )
    admission = Admission(
        allowed_origins=settings.server.allowed_origins,
        max_connections=limits.max_connections,
        connections=lambda: len(shared.clients),
        has_room=broadcaster.has_room,
        health=health,
    )
    metrics.watch(
        ledger,
        Gauges(
            channels=lambda: len(broadcaster),
            slow_clients=lambda: len(backlogs),
            backlog_bytes=lambda: backlogs.total_bytes,
            paused_publishers=lambda: shared.held,
            draining=lambda: health.phase is Phase.DRAINING,
            certificate_expiry=lambda: certificates.expiry if certificates else None,
            certificate_reloads=lambda: certificates.reloads if certificates else {},
        ),
    )
    app = _fastapi()
    app.include_router(health_router(health))
    app.include_router(
        websocket_router(admission, broadcaster, ledger, base_path=settings.server.base_path)
    )
    Instrumentator(registry=metrics.registry).instrument(app)
    metrics_app = _fastapi()
    metrics_app.include_router(health_router(health))
    metrics_app.include_router(metrics_router(metrics))
    return Relay(app, metrics_app, shared, health, metrics, certificates)


def _fastapi() -> FastAPI:
    return FastAPI(
        title="websocket-relay",
        version=__version__,
        openapi_url=None,
        # A redirect is nothing a WebSocket client follows.
        redirect_slashes=False,
    )
