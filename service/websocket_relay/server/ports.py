"""Open the relay's port and the metrics port, as the settings name them. Knows no signal."""

import contextlib
import logging
import socket
from collections.abc import Sequence
from pathlib import Path

from websocket_relay.app import Replica
from websocket_relay.config.model import ServerSettings, Settings
from websocket_relay.server.listener import Listener
from websocket_relay.server.sockets import inherited_socket, tcp_sockets, unix_socket

log = logging.getLogger(__name__)


async def open_ports(
    settings: Settings, relay: Replica, owned: contextlib.AsyncExitStack
) -> list[Listener]:
    """Open the metrics port, if enabled, then the relay's port; return the relay's port first.

    Args:
        settings, relay: of the replica.
        owned: removes the file of a Unix socket at the end.

    Raises:
        ListenError: an address can't be bound.
    """
    server, metrics = settings.server, settings.metrics
    ports: list[Listener] = []
    if metrics.enabled:
        ports.append(
            Listener(
                relay.metrics_port,
                tcp_sockets("metrics", metrics.host, metrics.port),
                keepalive_timeout_s=server.keepalive_timeout_s,
            )
        )
        await ports[0].listen()
    relay_port = Listener(
        relay.port,
        _relay_sockets(server, owned),
        keepalive_timeout_s=server.keepalive_timeout_s,
        handshake_timeout_s=settings.limits.handshake_timeout_s,
        trusted_proxies=server.trusted_proxies,
        proxy_protocol=server.proxy_protocol,
    )
    await relay_port.listen()
    return [relay_port, *ports]


def _relay_sockets(
    server: ServerSettings, owned: contextlib.AsyncExitStack
) -> Sequence[socket.socket]:
    if server.inherited_descriptor is not None:
        return [inherited_socket(server.inherited_descriptor)]
    if server.socket:
        return [owned.enter_context(unix_socket(Path(server.socket)))]
    return tcp_sockets("server", server.host, server.port)


def log_ports(settings: Settings, ports: Sequence[Listener]) -> None:
    """Log the addresses of the ports.

    Args:
        settings: of the replica.
        ports: from `open_ports`.
    """
    relay, *metrics = [port.address for port in ports]
    for address in metrics:
        log.info("metrics listening", extra={"host": address.host, "port": address.port})
    tls = settings.server.tls.enabled
    if relay.port is None:
        log.info("relay listening", extra={"socket": relay.host, "tls": tls})
    else:
        facts = {"host": relay.host, "port": relay.port, "tls": tls}
        log.info("relay listening", extra=facts)
