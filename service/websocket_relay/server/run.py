"""Run the relay: load, open the ports, serve until the stop, drain. Knows no message.

Owns the lifecycle: no other module moves the phase on.
"""

import asyncio
import contextlib
import gc
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import uvloop

from websocket_relay import logs
from websocket_relay.app import Part, Replica
from websocket_relay.cancellation import run_cancellable
from websocket_relay.config.loader import secret_files
from websocket_relay.config.model import Settings, SettingsWarning
from websocket_relay.file_descriptors import AT_START, RESERVED, highest_limit, raise_limit
from websocket_relay.lifecycle import Phase
from websocket_relay.outcomes import Refusal
from websocket_relay.server.drain import close_all, wait_until_closed
from websocket_relay.server.greeting import greet
from websocket_relay.server.listener import Listener
from websocket_relay.server.ports import log_ports, open_ports
from websocket_relay.server.reload import Reload
from websocket_relay.server.signals import Stop

log = logging.getLogger(__name__)

CUT_OFF_RESERVE_S = 0.5
"""The part of shutdown.timeout_s reserved for closing the ports (FINISH_S) and exiting. The rest of
it is slack for a busy machine: at the deadline the process is killed as it is, with status 1."""

LAST_APPEND_S = 0.2
"""The part of shutdown.timeout_s reserved for writing into the log which webhooks were accepted."""

LAST_TRACES_S = 1.0
"""Maximum time to export the last spans, within shutdown.timeout_s."""

EXIT_S = 0.1 + logs.FLUSH_S
"""The part of shutdown.timeout_s reserved for the last log lines and the exit of the process."""

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
        UnusableSettingError: the signing keys or the backplane can't be used.
        StartError: a port can't be bound.
    """
    raise_limit()
    gc.set_threshold(*GC_THRESHOLDS)
    relay = Replica(settings, os.environ)
    for warning in startup_warnings(settings):
        log.warning(warning.text, extra=warning.facts)
    until = uvloop.new_event_loop().run_until_complete(_serve(settings, relay, stop, load))
    if relay.tracing is not None:
        relay.tracing.close(max(0.0, min(LAST_TRACES_S, until - EXIT_S - time.monotonic())))
    log.info("stopped")


def startup_warnings(settings: Settings) -> Iterator[SettingsWarning]:
    """Yield warnings about the settings and the limits of this machine."""
    yield from settings.warnings()
    limit = highest_limit()
    needed = max(1, settings.limits.max_connections) + RESERVED + settings.max_calls + AT_START
    if limit < needed:
        yield SettingsWarning("too few file descriptors", {"limit": limit, "needed": needed})


async def _serve(
    settings: Settings, relay: Replica, stop: Stop, load: Callable[[], Settings]
) -> float:
    """Serve until a signal, then drain; return the deadline, by `time.monotonic`."""
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as owned, asyncio.TaskGroup() as group:
        if relay.jwks is not None:
            await owned.enter_async_context(relay.jwks)  # the ports open before it has keys
        owned.push_async_callback(relay.close_calls)  # after all tasks, the delivery among them
        # Before the broker's name is resolved: uvloop resolves two names at a time, and treats
        # "127.0.0.1" as one, too.
        ports = await open_ports(settings, relay, owned)
        # Not before: a pending name resolution can't be interrupted, and nothing serves yet.
        reload, stopping = _attach(stop, settings, relay, load)
        log_ports(settings, ports)
        parts: list[Part] = [*ports, *relay.parts, reload]
        background = [group.create_task(run_cancellable(part.run)) for part in parts]
        gc.freeze()  # all objects so far are permanent: exempt them from garbage collection
        becoming_ready = group.create_task(_become_ready(settings, relay, ports))
        await stopping.wait()
        becoming_ready.cancel()
        assert stop.signalled_at is not None
        deadline = stop.signalled_at + settings.shutdown.timeout_s
        until = loop.time() + deadline - time.monotonic() - CUT_OFF_RESERVE_S
        # No load balancer sends clients to a relay that was never ready.
        delay_s = settings.shutdown.readiness_delay_s if relay.lifecycle.ready else 0
        relay.lifecycle.advance_to(Phase.DRAINING)
        log.info("draining", extra={"clients": len(relay.shared.clients)})
        await asyncio.sleep(min(delay_s, max(0.0, until - loop.time())))
        relay.lifecycle.advance_to(Phase.REFUSING)
        if relay.hook is not None:
            relay.hook.refuse_pending()
        # Clients need time for the closing handshake: the spread leaves a fifth for it.
        spread_s = min(settings.shutdown.spread_s, max(0.0, until - loop.time()) * 0.8)
        await close_all(relay.shared.clients, spread_s=spread_s, rng=random.Random())
        await _finish(relay, ports[0], until)
        await asyncio.gather(*(port.shutdown() for port in ports))
        for task in background:
            task.cancel()
    return deadline


def _attach(
    stop: Stop, settings: Settings, relay: Replica, load: Callable[[], Settings]
) -> tuple[Reload, asyncio.Event]:
    """Attach the relay to the signals; return the reload, and the event of a request to stop."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    reload = Reload(
        running=settings,
        load=load,
        secret_files=list(secret_files(os.environ)),
        warnings=startup_warnings,
        relay=relay,
    )
    stop.attach(
        partial(loop.call_soon_threadsafe, stopping.set),
        settings.shutdown.timeout_s,
        partial(_running_tasks, loop),
        partial(loop.call_soon_threadsafe, reload.request),
    )
    return reload, stopping


def _running_tasks(loop: asyncio.AbstractEventLoop) -> str:
    """Return the names of the running tasks, for the log."""
    names = {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks(loop)}
    return ", ".join(sorted(names))


async def _become_ready(settings: Settings, relay: Replica, ports: Sequence[Listener]) -> None:
    """Wait for the backplane with its history, then for the signing keys, and become ready.

    After that, an unreachable issuer does not make the replica unready: all replicas have the same
    issuer, and most keys are cached.
    """
    lifecycle, backplane = relay.lifecycle, relay.backplane
    if lifecycle.is_backplane_down:
        lifecycle.advance_to(Phase.WAITING_FOR_BACKPLANE)
        await backplane.started.wait()
    if lifecycle.is_backplane_down:  # in an outage, and backplane.on_outage is reject
        await backplane.up.wait()
    if relay.presence is not None and not relay.presence.complete.is_set():
        lifecycle.advance_to(Phase.WAITING_FOR_REPLICAS)
        await relay.presence.complete.wait()
    if relay.hooks is not None and backplane.up.is_set():
        await relay.hooks.started.wait()
    if relay.jwks is not None:
        lifecycle.advance_to(Phase.WAITING_FOR_KEYS)
        await relay.jwks.fetch_until_available()
    if lifecycle.is_draining:  # a library has lost the cancellation
        return
    lifecycle.advance_to(Phase.READY)
    log.info("ready")
    addresses = [port.address for port in ports]
    # In a thread: standard output may be a full pipe.
    threading.Thread(target=greet, args=(settings, *addresses), daemon=True).start()


async def _finish(relay: Replica, port: Listener, until: float) -> None:
    """Wait for closing handshakes, appends and responses, until a time of the loop's clock."""
    if cut_off := await wait_until_closed(relay.shared.clients, until=until):
        log.warning("clients aborted", extra={"clients": cut_off})
    await asyncio.gather(_flush(relay, until), _finish_requests(relay, port, until))


async def _flush(relay: Replica, until: float) -> None:
    """Wait until all that was appended is in the log, and deliver what webhooks are pending."""
    if relay.hooks is not None:
        await relay.hooks.drain(until - LAST_APPEND_S)
    try:
        async with asyncio.timeout_at(until):
            await relay.backplane.flush()
    except TimeoutError:
        log.error("messages unconfirmed", extra={"messages": relay.backplane.unconfirmed_messages})


async def _finish_requests(relay: Replica, port: Listener, until: float) -> None:
    relay.port.http_connections.evict_idle(Refusal.DRAINING)  # the next request may never arrive
    if unanswered := await port.wait_for_responses(until=until):
        log.warning("requests aborted", extra={"requests": unanswered})
