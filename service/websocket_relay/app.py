"""Build the parts of a replica and connect them. The only composition root.

Knows no port and no signal.
"""

import asyncio
import json
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from websocket_relay import __version__, logs
from websocket_relay.admission.policy import AdmissionLimits, AdmissionPolicy
from websocket_relay.api.console import console_router
from websocket_relay.api.cors import Cors
from websocket_relay.api.metrics import metrics_router
from websocket_relay.api.presence import presence_router
from websocket_relay.api.probes import probes_router
from websocket_relay.api.publish import publish_router
from websocket_relay.api.refusals import answer_refusals
from websocket_relay.api.request_metrics import RequestMetrics
from websocket_relay.api.server_api import ServerApi, server_api_router
from websocket_relay.api.sse import events_router
from websocket_relay.api.static_files import browser_client_router
from websocket_relay.api.websocket import upgrade_router, websocket_router
from websocket_relay.backplane.access import BrokerAccess
from websocket_relay.backplane.factory import MIN_RETENTION, open_backplane
from websocket_relay.backplane.interface import Backplane, BackplaneState, Position
from websocket_relay.channels.broadcaster import Broadcaster
from websocket_relay.channels.history import History
from websocket_relay.channels.keepalive import Keepalive
from websocket_relay.channels.operations import Operations
from websocket_relay.channels.publications import Publications
from websocket_relay.cluster.blocks import Blocks, BlockStatements
from websocket_relay.cluster.control_log import ControlLog
from websocket_relay.cluster.incarnations import FORGET_S, SILENCE_S, Incarnations
from websocket_relay.cluster.questions import Questions
from websocket_relay.config.model import BackplaneSettings, Settings
from websocket_relay.counters import Counters, Values
from websocket_relay.file_descriptors import OF_METRICS, FileDescriptors
from websocket_relay.lifecycle import Lifecycle
from websocket_relay.metrics import Metrics
from websocket_relay.origins import AllowedOrigins
from websocket_relay.outcomes import Refusal, TlsFailure
from websocket_relay.presence.attendance import PresenceAttendance
from websocket_relay.presence.presence import Presence
from websocket_relay.refusals import Refusals
from websocket_relay.tls import Certificates
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.deflate import INFLATER_BYTES
from websocket_relay.wire.flow_control import HighWaterMark
from websocket_relay.wire.http_connections import HttpConnections
from websocket_relay.wire.http_protocol import HttpProtocol
from websocket_relay.wire.partial_messages import PartialMessages
from websocket_relay.wire.relay_v1 import encode_notice
from websocket_relay.wire.send_backlog import SendBacklogs

if TYPE_CHECKING:
    from websocket_relay.admission.hook import AdmissionHook
    from websocket_relay.admission.jwks import Jwks
    from websocket_relay.admission.verifier import TokenVerifier
    from websocket_relay.hooks.delivery import HookDelivery
    from websocket_relay.outgoing_http import SignedCalls
    from websocket_relay.presence.roster import Change
    from websocket_relay.tracing import Tracing

log = logging.getLogger(__name__)

PENDING_PART, UNPROCESSED_PART, APPENDS_PART = 2, 4, 16
"""Messages that are not written yet take at most limits.total_backlog_bytes: a half is pending
fan-out, a quarter is received but unprocessed, and a sixteenth is pending append to the log, which
is what a broker accepts in 0.1 s. The rest is headroom: each of the three may be exceeded by one
message."""

MAX_HOOK_BYTES = 67_108_864
"""Payloads of the messages that the receiver of webhooks has not accepted: hooks.max_pending of
them may be too many."""

COLLECTOR_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

CORS_OPTIONS = {
    "allow_methods": ["GET", "HEAD", "POST"],
    # Tracing and HTTP libraries add headers of their own. The relay reads none of them.
    "allow_headers": ["*"],
    "expose_headers": ["Retry-After"],
}


class Part(Protocol):
    """A part that has a task of its own for as long as the relay runs."""

    async def run(self) -> None:
        """Run until cancelled."""


@dataclass(frozen=True, slots=True)
class Port:
    """What a port serves.

    Attributes:
        app: the application.
        http_connections: the plain HTTP connections of the port.
        http: uvicorn's setting of this name, which makes the connections.
        certificates: for TLS; None: no TLS.
        record_tls_failure: counts and logs a TLS handshake that failed.
    """

    app: ASGIApp
    http_connections: HttpConnections
    http: Callable[..., HttpProtocol]
    certificates: Certificates | None = None
    record_tls_failure: Callable[[TlsFailure], None] = lambda _: None


class Replica:
    """The parts of one replica, connected.

    Args:
        settings: of the relay.
        environ: the environment, which may name a collector of traces; None: it names none.

    Raises:
        SettingsError: the certificate can't be loaded.
        UnusableSettingError: the signing keys or the backplane can't be used.

    Attributes:
        port, metrics_port: what the relay's port and the metrics port serve.
        parts: the parts that `server` runs.
        lifecycle: the phase of the relay, which `server` moves on.
        shared: the context of all connections on the relay's port.
        backplane: the log.
        presence: who is in which channel, on all replicas; None: no channel has presence.
        hooks: the delivery of webhooks; None: there is no `hooks.url`.
        jwks: the signing keys that are fetched; None: none are.
        hook: the backend that decides about clients; None: none does.
        tracing: the spans of requests; None: no tracing.
    """

    def __init__(self, settings: Settings, environ: Mapping[str, str] | None = None) -> None:
        self._settings = settings
        self._started_at, self._since = time.monotonic(), round(time.time())
        self._log_level = logs.LogLevel(settings.logging.level)
        self._name = socket.gethostname()
        self._counters, self._metrics = Counters(), Metrics()
        tls = settings.server.tls
        self._certificates = (
            Certificates(
                Path(tls.cert_file),
                Path(tls.key_file),
                Path(tls.client_ca_file) if tls.client_ca_file else None,
            )
            if tls.enabled
            else None
        )
        self.jwks: Jwks | None = None
        self.hook = self._make_hook() if settings.auth.mode == "hook" else None
        tokens = self.load_tokens(settings)
        self.jwks = tokens.jwks if tokens is not None else None
        self.tracing = _load_tracing(self._name, environ or {})
        self._refusals = Refusals(
            self._counters, self.tracing.annotate_refusal if self.tracing is not None else None
        )
        self.shared = self._make_context()
        self.backplane = self._open_backplane()
        self.lifecycle = Lifecycle(is_backplane_down=self._is_backplane_down)
        self._history = self._make_history()
        self._broadcaster = self._make_broadcaster()
        self._control = ControlLog(self.backplane)
        # Presence declares the end of a replica, after its grace, and forgets it then.
        self._incarnations = Incarnations(forget_s=None if settings.presence.channels else FORGET_S)
        self._broadcaster.on_control = self._control.on_entry
        self.presence = self._make_presence() if settings.presence.channels else None
        self._attendance: PresenceAttendance | None = None
        if self.presence is not None:
            self._attendance = PresenceAttendance(
                self.presence,
                settings.presence.max_clients,
                self._broadcaster.notify_watchers,
            )
            self._broadcaster.attendance = self._attendance
            self._broadcaster.gap_listeners.append(self.presence.on_gap)
        self._blocks = Blocks()
        self._questions: Questions | None = None
        self._block_statements: BlockStatements | None = None
        if settings.has_api:
            self._questions, self._block_statements = self._make_operations()
        if self.presence is not None or settings.has_api or settings.hooks.url:
            self.backplane.on_heartbeat = self._on_heartbeat
        self._hook_facts: Callable[[], Mapping[str, str]] = dict
        self._receiver: SignedCalls | None = None
        self.hooks = self._make_hooks() if settings.hooks.url else None
        self._descriptors = self._make_descriptors()
        self._admission = self._make_admission(tokens)
        self._cors = Cors(CORS_OPTIONS, _cors_origins(settings), self._refusals)
        self.port, self.metrics_port = self._make_port(), self._make_metrics_port()
        self.parts = list(self._parts())
        self._metrics.register(*self._metric_sources())

    def _parts(self) -> Iterator[Part]:
        keepalive = self._settings.keepalive
        yield Keepalive(
            self.shared.clients,
            keepalive.ping_interval_s,
            keepalive.ping_timeout_s,
            self._encode_heartbeat,
        )
        yield self._metrics
        yield self._history
        yield self.backplane
        if self.presence is not None and self._attendance is not None:
            yield self.presence
            yield self._attendance
        if self.hooks is not None:
            yield self.hooks
        if self._block_statements is not None:
            yield self._block_statements
        if self._certificates is not None:
            yield self._certificates

    def _encode_heartbeat(self) -> bytes:
        fields = {"type": "heartbeat", "position": str(self.backplane.position)}
        return encode_notice(fields)

    def load_tokens(self, settings: Settings) -> "TokenVerifier | None":
        """Read the keys of tokens, and keep those that were fetched; return their verifier.

        It may block. None: no token is required.

        Raises:
            UnusableSettingError: the keys can't be used.
        """
        if settings.auth.mode != "jwt":
            return None
        # Importing it takes 0.2 s, which most relays do not need.
        from websocket_relay.admission.verifier import TokenVerifier

        return TokenVerifier(settings.auth.jwt, self.jwks)

    def configure(self, settings: Settings, tokens: "TokenVerifier | None") -> None:
        """Give each part its new settings, of those in `config.changes.RELOADABLE`.

        Args:
            settings: the new ones.
            tokens: a new verifier; None: keep the present one.
        """
        api_key = settings.api.key.get_secret_value()
        self._admission.configure(_admission_limits(settings), tokens, api_key)
        self._log_level.configure(settings.logging.level)
        secret = settings.hooks.secret.get_secret_value()
        if self.hook is not None:
            hook = settings.auth.hook
            self.hook.configure(secret, hook.headers, hook.timeout_s)
        if self._receiver is not None:
            self._receiver.configure(secret, settings.hooks.timeout_s)
        self._cors.allow(_cors_origins(settings))
        self.port.http_connections.max_connections = settings.limits.max_http_connections
        # Of the channels that are created from now on.
        self._broadcaster.pending_limit_bytes = settings.limits.send_backlog_bytes
        _set_limits(settings, self.shared)

    async def close_calls(self) -> None:
        """Close the connections to the backend, when neither hook nor webhooks use them."""
        calls = [each for each in (self.hook, self._receiver) if each is not None]
        await asyncio.gather(*(each.close() for each in calls))

    # The path of a message

    def _make_context(self) -> ConnectionContext:
        settings = self._settings
        shared = ConnectionContext(  # the limits are in `_set_limits`
            max_message_bytes=settings.limits.max_message_bytes,
            max_channels_per_connection=settings.limits.max_channels_per_connection,
            compresses=settings.compression.enabled,
            deadline_s=settings.limits.handshake_timeout_s,
            ping_interval_s=settings.keepalive.ping_interval_s,
            counters=self._counters,
            refusals=self._refusals,
            backlogs=SendBacklogs(0, 0),
            partial_messages=PartialMessages(0),
            unparsed=HighWaterMark(0),
            pending_appends=HighWaterMark(0),
            pending_fan_out=HighWaterMark(0),
        )
        _set_limits(settings, shared)
        return shared

    def _open_backplane(self) -> Backplane:
        settings = self._settings
        backplane = settings.backplane
        return open_backplane(
            backplane.url.get_secret_value(),
            backplane.stream,
            _broker_access(backplane),
            relays_locally=backplane.on_outage == "local",
            max_message_bytes=settings.limits.max_message_bytes,
            history_bytes=settings.history.max_bytes,
            history_age_s=settings.history.max_age_s,
            pending=self.shared.pending_appends,
            describe=self._describe,
            observe_append=self._metrics.observe_append,
            observe_lag=self._metrics.observe_backplane_lag,
        )

    def _make_history(self) -> History:
        history = self._settings.history
        return History(
            max_messages=history.max_messages,
            max_bytes=history.max_bytes,
            max_age_s=history.max_age_s,
            max_channels=self._settings.channels.max_channels,
            clock=time.monotonic,
        )

    def _make_broadcaster(self) -> Broadcaster:
        settings = self._settings
        return Broadcaster(
            backplane=self.backplane,
            shared=self.shared,
            max_channels=settings.channels.max_channels,
            pending_limit_bytes=settings.limits.send_backlog_bytes,
            deflate_from_bytes=settings.compression.min_message_bytes,
            history=self._history,
            publications=Publications(
                max(settings.history.max_age_s, MIN_RETENTION.max_age_s), time.monotonic
            ),
            written=self._metrics.observe_delivery,
        )

    def _make_presence(self) -> Presence:
        settings = self._settings.presence
        return Presence(
            settings.channels,
            grace_s=settings.grace_s,
            control=self._control,
            incarnations=self._incarnations,
            is_alone=self.backplane.is_local,
            is_up=self._is_backplane_up,
        )

    def _make_hooks(self) -> "HookDelivery":
        # Importing httpx2 takes 0.2 s, which most relays do not need.
        from websocket_relay.hooks.delivery import HookDelivery
        from websocket_relay.hooks.duty import Duty
        from websocket_relay.hooks.pending import PendingEvents
        from websocket_relay.hooks.queue import EventQueue
        from websocket_relay.outgoing_http import SignedCalls

        settings, backplane, presence = self._settings.hooks, self.backplane, self.presence
        is_alone = backplane.is_local

        def is_presence_complete() -> bool:
            return presence is None or presence.complete.is_set()

        pending = PendingEvents(
            self._control,
            EventQueue(settings.max_pending, MAX_HOOK_BYTES),
            settings.messages,
            is_alone=is_alone,
            is_presence_complete=is_presence_complete,
            is_relayed_alone=lambda: backplane.is_relaying_alone,
        )
        duty = Duty(
            self._control,
            self._incarnations,
            is_alone=is_alone,
            is_up=self._is_backplane_up,
            is_complete=is_presence_complete,
            is_started=lambda: pending.is_started,
            position=lambda: backplane.position,
        )
        if presence is not None:
            presence.listeners.append(partial(_pass_to_hooks, presence, pending.on_change))
        if settings.messages:
            self._broadcaster.on_message = pending.on_message
        self._broadcaster.gap_listeners.append(duty.on_gap)
        self._hook_facts = duty.facts
        self._receiver = SignedCalls(
            settings.url,
            settings.secret.get_secret_value(),
            timeout_s=settings.timeout_s,
            max_connections=1,
            setting="hooks.url",
        )
        return HookDelivery(
            pending,
            duty,
            self._control,
            self._receiver,
            is_alone=is_alone,
            when_settled=backplane.when_settled,
        )

    def _make_operations(self) -> tuple[Questions, BlockStatements]:
        """Return the questions of the server API, with all that answers them."""
        backplane = self.backplane
        operations = Operations(self._broadcaster, self._blocks, self._name)
        questions = Questions(
            self._control,
            self._incarnations,
            name=self._name,
            is_alone=backplane.is_local,
            is_up=self._is_backplane_up,
            has_started=backplane.started.is_set,
            schedule=self._broadcaster.schedule,
        )
        questions.respond("disconnect", operations.disconnect)
        questions.respond("channels", operations.busiest_channels)
        questions.respond("clients", operations.list_clients)
        statements = BlockStatements(
            self._blocks,
            self._control,
            is_alone=backplane.is_local,
            up=backplane.up,
            learned=operations.disconnect_user,
        )
        self._broadcaster.gap_listeners.append(statements.on_gap)
        return questions, statements

    def _replica_facts(self) -> list[Mapping[str, Any]]:
        """Return the facts of the replicas that are alive: of the others by their heartbeats."""
        own = {self._incarnations.own: _parse_description(self._describe())}
        return list({**self._incarnations.alive(SILENCE_S), **own}.values())

    def _on_heartbeat(self, position: Position, description: bytes) -> None:
        facts = _parse_description(description)
        if isinstance(at := facts.get("at"), float):
            self._control.time = at
        if isinstance(incarnation := facts.get("incarnation"), str):
            self._incarnations.record_sign(incarnation, position, facts)

    # Decisions

    def _is_backplane_up(self) -> bool:
        """Return whether entries can be appended to the log, and read from it."""
        return self.backplane.state is BackplaneState.UP

    def _is_backplane_down(self) -> bool:
        """Return whether an outage of the backplane prevents publishing here."""
        state = self.backplane.state
        is_local = state is BackplaneState.OUTAGE and self.backplane.relays_locally
        return state is not BackplaneState.UP and not is_local

    def _make_descriptors(self) -> FileDescriptors:
        return FileDescriptors(
            of_clients=lambda: (
                len(self.shared.clients) + self.port.http_connections.pending_handshakes
            ),
            of_requests=lambda: len(self.port.http_connections),
            of_metrics=lambda: len(self.metrics_port.http_connections),
            max_calls=self._settings.max_calls,
        )

    def _make_admission(self, tokens: "TokenVerifier | None") -> AdmissionPolicy:
        return AdmissionPolicy(
            _admission_limits(self._settings),
            tokens or self.hook,
            connections=lambda: len(self.shared.clients),
            has_descriptor=self._descriptors.can_accept_client,
            has_capacity=self._broadcaster.has_channel_capacity,
            health=self.lifecycle,
            blocks=self._blocks,
            api_key=self._settings.api.key.get_secret_value(),
        )

    def _make_hook(self) -> "AdmissionHook":
        from websocket_relay.admission.hook import AdmissionHook  # importing httpx2 takes 0.1 s

        hook = self._settings.auth.hook
        return AdmissionHook(
            hook.url,
            self._settings.hooks.secret.get_secret_value(),
            hook.headers,
            timeout_s=hook.timeout_s,
            max_in_flight=hook.max_in_flight,
            observe=self._metrics.add_auth_hook(),
        )

    # HTTP

    def _make_port(self) -> Port:
        http_connections = HttpConnections(
            self._settings.limits.max_http_connections,
            Refusal.HTTP_CONNECTIONS,
            self._refusals.record,
            has_descriptors=self._descriptors.can_accept_request,
        )
        return Port(
            self._make_app(),
            http_connections,
            http=partial(
                HttpProtocol,
                shared=self.shared,
                plain=http_connections,
                accepts_upgrades=True,
                observe=RequestMetrics(self._metrics.registry).observe,
            ),
            certificates=self._certificates,
            record_tls_failure=self._refusals.record_tls_failure,
        )

    def _make_metrics_port(self) -> Port:
        app = _fastapi()
        app.include_router(probes_router(self.lifecycle))
        app.include_router(metrics_router(self._metrics))
        http_connections = HttpConnections(
            OF_METRICS, Refusal.METRICS_CONNECTIONS, self._refusals.record
        )
        return Port(
            app,
            http_connections,
            http=partial(HttpProtocol, shared=self.shared, plain=http_connections),
        )

    def _make_app(self) -> ASGIApp:
        base_path = self._settings.server.base_path
        app = _fastapi(openapi_url=f"{base_path}/openapi.json")
        answer_refusals(app, self._refusals, base_path=base_path)
        for router in self._routers(base_path):
            # Not include_router: FastAPI matches the routes of an included router twice.
            app.router.routes += router.routes
        app.add_middleware(self._cors.wrap)
        websockets = websocket_router(
            self._admission,
            self._broadcaster,
            base_path=base_path,
            presence=self._attendance,
            identifies=self._identifies,
        )

        def by_kind(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
            """Pass handshakes to their routes without the middlewares, which are HTTP's."""
            return (websockets if scope["type"] == "websocket" else app)(scope, receive, send)

        return self.tracing.traced(by_kind) if self.tracing else by_kind

    @property
    def _identifies(self) -> bool:
        """Whether connections get an identity, which takes memory."""
        return self.presence is not None or self._questions is not None

    def _routers(self, base_path: str) -> Iterator[APIRouter]:
        """Yield the routers of the relay's port, in the order in which they are asked."""
        settings = self._settings
        parts = self._admission, self._broadcaster
        max_bytes = settings.limits.max_message_bytes
        yield publish_router(*parts, base_path=base_path, max_bytes=max_bytes)
        silence_s = settings.keepalive.ping_interval_s + settings.keepalive.ping_timeout_s
        yield events_router(
            *parts,
            base_path=base_path,
            silence_s=silence_s,
            presence=self._attendance,
            identifies=self._identifies,
        )
        if self._questions is not None:
            api = ServerApi(
                *parts,
                self._questions,
                self._blocks,
                self._log_level,
                self._replica_facts,
                max_bytes=max_bytes,
            )
            yield server_api_router(api, base_path=base_path)
        yield presence_router(self._admission, self._attendance, base_path=base_path)
        yield probes_router(self.lifecycle)
        yield browser_client_router(base_path=base_path)
        if settings.console.enabled:
            yield console_router(self._admission, self._stats, base_path=base_path)
        # Last, because the console's page has the same path.
        yield upgrade_router(base_path=base_path)

    # Metrics and stats

    def _metric_sources(self) -> Iterator[Callable[[], Values]]:
        yield self._counters.metrics
        yield self.shared.metrics
        yield self.backplane.counters.metrics
        yield self._history.metrics
        yield self._broadcaster.metrics
        yield self._descriptors.metrics
        yield self._admission.metrics
        yield self.lifecycle.metrics
        yield logs.metrics
        yield self._metrics_of_several_parts
        if self._questions is not None:
            yield self._questions.metrics
            yield self._blocks.metrics
        if self._attendance is not None:
            yield self._attendance.metrics
        if self._certificates is not None:
            yield self._certificates.metrics
            yield self._counters.tls_metrics
        if self.jwks is not None:
            yield self.jwks.metrics
        if self.hook is not None:
            yield self.hook.metrics
        if self.hooks is not None:
            yield self.hooks.metrics

    def _metrics_of_several_parts(self) -> Values:
        relay, metrics = self.port.http_connections, self.metrics_port.http_connections
        return {
            "http_connections": {"relay": len(relay), "metrics": len(metrics)},
            "http_evictions": relay.evictions + metrics.evictions,
            "backplane_up": int(self._is_backplane_up()),
            "draining_clients": len(self.shared.clients) if self.lifecycle.is_draining else 0,
        }

    def _stats(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "version": __version__,
            "replica": self._name,
            "uptime_s": round(time.monotonic() - self._started_at),
            "status": self.lifecycle.status,
            "replicas": [_shown_of(text) for text in self.backplane.replicas()],
            "backplane": settings.backplane.url.get_secret_value().partition("://")[0],
            "max_message_bytes": settings.limits.max_message_bytes,
            **self._metrics.to_stats(),
        }

    def _describe(self) -> bytes:
        """Return the description of this replica, for the stats of the others."""
        clients, messages = len(self.shared.clients), self._counters.messages
        facts: dict[str, Any] = {
            "name": self._name[:64],
            "clients": clients,
            "messages": messages,
            "incarnation": self._incarnations.own,
            "at": round(time.time(), 3),
            **self._hook_facts(),
            "version": __version__,
            "since": self._since,
        }
        return json.dumps(facts).encode()


def _pass_to_hooks(presence: Presence, on_change: Callable[..., None], change: "Change") -> None:
    count = presence.rosters.count(change.channel)
    code = None if change.joined else change.code
    on_change(change.channel, change.person.client, change.person.user, code, count)


def _load_tracing(replica: str, environ: Mapping[str, str]) -> "Tracing | None":
    """Return the tracing, or None if no collector is configured.

    The variables are OpenTelemetry's own; an empty one counts as unset. They may be set for all
    programs on a machine or in a cluster, so an unsupported value is logged and not fatal.

    Args:
        replica: the name of the replica.
        environ: the environment.
    """
    if not any(environ.get(name) for name in COLLECTOR_VARIABLES):
        return None
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if (environ.get("OTEL_TRACES_EXPORTER") or "otlp") != "otlp":
        return None
    protocol = environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or protocol
    try:
        if protocol != "http/protobuf":
            raise ValueError(f"{protocol} is not spoken, http/protobuf is")
        from websocket_relay.tracing import Tracing  # its library is an optional dependency

        tracing = Tracing(replica)
    except (ImportError, OSError, ValueError) as error:
        is_missing = isinstance(error, ImportError)
        reason = "websocket-relay[otel] is not installed" if is_missing else str(error)
        log.warning("tracing disabled", extra={"reason": reason})
        return None
    logs.add_facts(tracing.facts)
    return tracing


def _admission_limits(settings: Settings) -> AdmissionLimits:
    limits = settings.limits
    return AdmissionLimits(
        AllowedOrigins(settings.server.allowed_origins),
        max_connections=limits.max_connections,
        max_connections_per_ip=limits.max_connections_per_ip,
        max_connections_per_user=limits.max_connections_per_user,
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


def _broker_access(settings: BackplaneSettings) -> BrokerAccess:
    values = settings.model_dump(include={each.name for each in fields(BrokerAccess)})
    return BrokerAccess(**values | {"password": settings.password.get_secret_value()})


def _shown_of(description: bytes) -> dict[str, Any]:
    """Return what the stats show of a replica."""
    facts = _parse_description(description)
    return {name: facts[name] for name in ("name", "clients", "messages") if name in facts}


def _parse_description(text: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


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
