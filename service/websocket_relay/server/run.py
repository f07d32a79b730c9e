"""Run the relay: startup, both ports in one event loop, shutdown. Knows no message."""

import asyncio
import contextlib
import functools
import gc
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from websocket_relay import logs
from websocket_relay.app import Replica, build
from websocket_relay.cancellation import run_cancellable
from websocket_relay.channels.keepalive import keep_alive
from websocket_relay.config.loader import secret_files
from websocket_relay.config.model import ServerSettings, Settings, SettingsWarning
from websocket_relay.file_descriptors import AT_START, RESERVED, highest_limit, raise_limit
from websocket_relay.lifecycle import Phase
from websocket_relay.outcomes import Refusal
from websocket_relay.server.drain import close_all, wait_until_closed
from websocket_relay.server.greeting import greet
from websocket_relay.server.listener import Listener
from websocket_relay.server.reload import Reload
from websocket_relay.server.signals import Stop
from websocket_relay.server.sockets import inherited_socket, tcp_sockets, unix_socket
from websocket_relay.tls import Certificates
from websocket_relay.wire.http_protocol import HttpProtocol
from websocket_relay.wire.websocket import new_websocket

if TYPE_CHECKING:
    from websocket_relay.admission.jwks import Jwks
    from websocket_relay.admission.verifier import TokenVerifier
    from websocket_relay.tracing import Tracing

log = logging.getLogger(__name__)

CUT_OFF_RESERVE_S = 0.5
"""The part of shutdown.timeout_s reserved for closing the ports (FINISH_S) and exiting. The rest of
it is slack for a busy machine: at the deadline the process is killed as it is, with status 1."""

LAST_TRACES_S = 1.0
"""Maximum time to export the last spans, within shutdown.timeout_s."""

EXIT_S = 0.1 + logs.FLUSH_S
"""The part of shutdown.timeout_s reserved for the last log lines and the exit of the process."""

COLLECTOR_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

GC_THRESHOLDS = (50_000, 20, 50)
"""A client is about twenty long-lived objects without cycles. With Python's default thresholds, a
burst of connects makes the garbage collector traverse all of them repeatedly."""


def run(settings: Settings, stop: Stop, load: Callable[[], Settings]) -> None:
    """Run the relay until a signal stops it.

    The event loop is not closed: closing it would wait for pending name resolutions. The process
    has to exit without that (`signals.leave`).

    Args:
        settings: of the relay.
        stop: receives signals.
        load: reads the settings again, for a reload.

    Raises:
        SettingsError: the certificate can't be loaded.
        UnusableSettingError: the signing keys can't be used.
        StartError: a port can't be bound.
    """
    certificates = load_certificates(settings)
    tokens = load_tokens(settings)
    for warning in startup_warnings(settings):
        log.warning(warning.text, extra=warning.facts)
    raise_limit()
    gc.set_threshold(*GC_THRESHOLDS)
    tracing = load_tracing(os.environ)
    loop = uvloop.new_event_loop()
    until = loop.run_until_complete(_serve(settings, certificates, tokens, tracing, stop, load))
    if tracing is not None:
        tracing.close(max(0.0, min(LAST_TRACES_S, until - EXIT_S - time.monotonic())))
    log.info("stopped")


def startup_warnings(settings: Settings) -> Iterator[SettingsWarning]:
    """Yield warnings about the settings and the limits of this machine."""
    yield from settings.warnings()
    limit = highest_limit()
    needed = max(1, settings.limits.max_connections) + RESERVED + AT_START
    if limit < needed:
        yield SettingsWarning("too few file descriptors", {"limit": limit, "needed": needed})


def load_certificates(settings: Settings) -> Certificates | None:
    """Load the certificate and its key; return None if TLS is disabled.

    Raises:
        SettingsError: they can't be loaded.
    """
    tls = settings.server.tls
    return Certificates(Path(tls.cert_file), Path(tls.key_file)) if tls.enabled else None


def load_tokens(settings: Settings, jwks: "Jwks | None" = None) -> "TokenVerifier | None":
    """Return the token verifier, or None if no token is required.

    Args:
        settings: of the relay.
        jwks: keys that were fetched already, for a reload.

    Raises:
        UnusableSettingError: the keys can't be used.
    """
    if settings.auth.mode == "none":
        return None
    # Importing it takes 0.2 s, which most relays do not need.
    from websocket_relay.admission.verifier import TokenVerifier

    return TokenVerifier(settings.auth.jwt, jwks)


def load_tracing(environ: Mapping[str, str]) -> "Tracing | None":
    """Return the tracing, or None if no collector is configured.

    The variables are OpenTelemetry's own; an empty one counts as unset. They may be set for all
    programs on a machine or in a cluster, so an unsupported value is logged and not fatal.
    """
    if not any(environ.get(name) for name in COLLECTOR_VARIABLES):
        return None
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if (environ.get("OTEL_TRACES_EXPORTER") or "otlp") != "otlp":
        return None
    protocol = environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or protocol
    if protocol != "http/protobuf":
        log.warning(
            "tracing disabled", extra={"reason": f"{protocol} is not spoken, http/protobuf is"}
        )
        return None
    try:
        from websocket_relay.tracing import Tracing  # its library is an optional dependency

        tracing = Tracing()
    except ImportError:
        log.warning("tracing disabled", extra={"reason": "websocket-relay[otel] is not installed"})
        return None
    except (OSError, ValueError) as error:
        log.warning("tracing disabled", extra={"reason": str(error)})
        return None
    logs.add_facts(tracing.facts)
    return tracing


async def _serve(
    settings: Settings,
    certificates: Certificates | None,
    tokens: "TokenVerifier | None",
    tracing: "Tracing | None",
    stop: Stop,
    load: Callable[[], Settings],
) -> float:
    """Serve until a signal, then shut down; return the deadline, by `time.monotonic`."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    timeout_s = settings.shutdown.timeout_s
    relay = build(settings, certificates, tokens, tracing)
    async with contextlib.AsyncExitStack() as owned, asyncio.TaskGroup() as group:
        if tokens is not None and tokens.jwks is not None:
            await owned.enter_async_context(tokens.jwks)  # the ports open before it has keys
        # Before the broker's name is resolved: uvloop resolves two names at a time, and treats
        # "127.0.0.1" as one, too.
        relay_port, metrics_port = await _open_ports(settings, relay, owned)
        ports = [port for port in (metrics_port, relay_port) if port is not None]
        # Not before: a pending name resolution can't be interrupted, and nothing serves yet.
        request_stop = functools.partial(loop.call_soon_threadsafe, stopping.set)
        reload = Reload(
            running=settings,
            tokens=tokens,
            load=load,
            load_tokens=functools.partial(load_tokens, jwks=tokens.jwks if tokens else None),
            secret_files=list(secret_files(os.environ)),
            warnings=startup_warnings,
            relay=relay,
        )
        request_reload = functools.partial(loop.call_soon_threadsafe, reload.request)
        stop.attach(
            request_stop, timeout_s, functools.partial(_running_tasks, loop), request_reload
        )
        _log_ports(settings, relay_port, metrics_port)
        coroutines: list[Callable[[], Coroutine[Any, Any, None]]] = [
            *(port.serve for port in ports),
            *_background(settings, relay),
            reload.run,
            reload.watch_files,
        ]
        background = [group.create_task(run_cancellable(coroutine)) for coroutine in coroutines]
        gc.freeze()  # all objects so far are permanent: exempt them from garbage collection
        on_ready = functools.partial(_greet, settings, relay_port, metrics_port)
        becoming_ready = group.create_task(_become_ready(relay, on_ready))
        await stopping.wait()
        becoming_ready.cancel()  # before the phase changes
        signalled_at = stop.signalled_at
        assert signalled_at is not None
        until = signalled_at + timeout_s
        await _drain(settings, relay, relay_port, until)
        await asyncio.gather(*(port.shutdown() for port in ports))
        for task in background:
            task.cancel()
    return until


def _background(
    settings: Settings, relay: Replica
) -> Iterator[Callable[[], Coroutine[Any, Any, None]]]:
    """Yield the coroutine functions of the tasks that run as long as the relay does."""
    keepalive = settings.keepalive
    yield lambda: keep_alive(
        relay.shared.clients,
        ping_interval_s=keepalive.ping_interval_s,
        ping_timeout_s=keepalive.ping_timeout_s,
    )
    yield relay.metrics.measure_loop_lag
    yield relay.history.run_expiry
    yield relay.backplane.run
    if relay.certificates is not None:
        yield relay.certificates.watch


async def _open_ports(
    settings: Settings, relay: Replica, owned: contextlib.AsyncExitStack
) -> tuple[Listener, Listener | None]:
    """Open the metrics port, if enabled, then the relay's port; return the relay's port first.

    Args:
        settings, relay: of the replica.
        owned: removes the file of a Unix socket at the end.

    Raises:
        StartError: an address can't be bound.
    """
    metrics_port = _metrics_listener(settings, relay)
    if metrics_port is not None:
        await metrics_port.listen()
    relay_port = _relay_listener(settings, relay, owned)
    await relay_port.listen()
    return relay_port, metrics_port


def _log_ports(settings: Settings, relay_port: Listener, metrics_port: Listener | None) -> None:
    if metrics_port is not None:
        address = metrics_port.address
        log.info("metrics listening", extra={"host": address.host, "port": address.port})
    address, tls = relay_port.address, settings.server.tls.enabled
    if address.port is None:
        log.info("relay listening", extra={"socket": address.host, "tls": tls})
    else:
        facts = {"host": address.host, "port": address.port, "tls": tls}
        log.info("relay listening", extra=facts)


def _greet(settings: Settings, relay_port: Listener, metrics_port: Listener | None) -> None:
    metrics_number = metrics_port.address.port if metrics_port is not None else None
    arguments = (settings, relay_port.address, metrics_number)
    # In a thread: standard output may be a full pipe.
    threading.Thread(target=greet, args=arguments, daemon=True).start()


def _running_tasks(loop: asyncio.AbstractEventLoop) -> str:
    """Return the names of the running tasks, for the log."""
    names = {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks(loop)}
    return ", ".join(sorted(names))


async def _become_ready(relay: Replica, on_ready: Callable[[], None]) -> None:
    """Wait for the backplane with its history, then for the signing keys, and set the phase READY.

    After that, an unreachable issuer does not make the replica unready: all replicas have the same
    issuer, and most keys are cached.
    """
    if relay.lifecycle.is_backplane_down:
        relay.lifecycle.phase = Phase.WAITING_FOR_BACKPLANE
        await relay.backplane.started.wait()
    if relay.lifecycle.is_backplane_down:  # in an outage, and backplane.on_outage is reject
        await relay.backplane.up.wait()
    if relay.tokens is not None and relay.tokens.jwks is not None:
        relay.lifecycle.phase = Phase.WAITING_FOR_KEYS
        await relay.tokens.jwks.fetch_until_available()
    relay.lifecycle.phase = Phase.READY
    log.info("ready")
    on_ready()


def _relay_sockets(
    server: ServerSettings, owned: contextlib.AsyncExitStack
) -> Sequence[socket.socket]:
    if server.inherited_descriptor is not None:
        return [inherited_socket(server.inherited_descriptor)]
    if server.socket:
        return [owned.enter_context(unix_socket(Path(server.socket)))]
    return tcp_sockets("server", server.host, server.port)


def _relay_listener(
    settings: Settings, relay: Replica, owned: contextlib.AsyncExitStack
) -> Listener:
    server = settings.server
    certificates = relay.certificates
    return Listener(
        relay.app,
        _relay_sockets(server, owned),
        http_connections=relay.http_connections,
        context=certificates.context if certificates is not None else None,
        handshake_timeout_s=settings.limits.handshake_timeout_s,
        record_tls_failure=relay.refusals.record_tls_failure,
        trusted_proxies=server.trusted_proxies,
        timeout_keep_alive=server.keepalive_timeout_s,
        proxy_protocol=server.proxy_protocol,
        http=functools.partial(HttpProtocol, shared=relay.shared, plain=relay.http_connections),
        ws=functools.partial(new_websocket, shared=relay.shared),
    )


def _metrics_listener(settings: Settings, relay: Replica) -> Listener | None:
    metrics = settings.metrics
    if not metrics.enabled:
        return None
    http = functools.partial(
        HttpProtocol, shared=relay.shared, plain=relay.metrics_http_connections
    )
    return Listener(
        relay.metrics_app,
        tcp_sockets("metrics", metrics.host, metrics.port),
        http_connections=relay.metrics_http_connections,
        timeout_keep_alive=settings.server.keepalive_timeout_s,
        http=http,
        ws="none",
    )


async def _drain(settings: Settings, relay: Replica, port: Listener, deadline: float) -> None:
    """Close all clients and answer all requests before the deadline, by `time.monotonic`."""
    loop = asyncio.get_running_loop()
    shutdown, clients = settings.shutdown, relay.shared.clients
    until = loop.time() + deadline - time.monotonic() - CUT_OFF_RESERVE_S
    # No load balancer sends clients to a relay that was never ready.
    readiness_delay_s = shutdown.readiness_delay_s if relay.lifecycle.ready else 0
    relay.lifecycle.phase = Phase.DRAINING
    log.info("draining", extra={"clients": len(clients)})
    await asyncio.sleep(min(readiness_delay_s, max(0.0, until - loop.time())))
    relay.lifecycle.refuses_upgrades = True
    # Clients need time for the closing handshake: the spread is cut to leave a fifth for it.
    spread_s = min(shutdown.spread_s, max(0.0, until - loop.time()) * 0.8)
    await close_all(clients, spread_s=spread_s, rng=random.Random())
    cut_off = await wait_until_closed(clients, until=until)
    if cut_off:
        log.warning("clients aborted", extra={"clients": cut_off})
    try:
        async with asyncio.timeout_at(until):
            await relay.backplane.flush()
    except TimeoutError:
        log.error("messages unconfirmed", extra={"messages": relay.backplane.unconfirmed_messages})
    relay.http_connections.evict_idle(Refusal.DRAINING)  # their next request may never arrive
    if unanswered := await port.wait_for_responses(until=until):
        log.warning("requests aborted", extra={"requests": unanswered})
