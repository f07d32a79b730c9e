"""Check that a relay on this machine answers /healthz or /readyz, as the image's HEALTHCHECK does.

Knows the settings that make a relay listen; no server code.
"""

import contextlib
import http.client
import ipaddress
import json
import socket
import ssl
from collections.abc import Sequence

from websocket_relay.config.model import Settings, listens_on_all_addresses
from websocket_relay.outcomes import UnhealthyError

TIMEOUT_S = 4.0
"""For each step of the exchange. The image's HEALTHCHECK allows 10 s for all of them and for the
start of this process."""

MAX_BYTES = 1024
"""Read of an answer; those of the probes are shorter."""

LOOPBACK = ("127.0.0.1", "::1")


def check_health(settings: Settings, *, path: str = "/healthz") -> None:
    """Request a probe from the metrics port, or from the relay's port if metrics are off.

    Args:
        settings: of the relay.
        path: of the probe.

    Raises:
        UnhealthyError: there is no answer, or its status is not 200.
    """
    is_on_metrics_port = settings.metrics.enabled
    section = settings.metrics if is_on_metrics_port else settings.server
    unix = "" if is_on_metrics_port else settings.server.socket
    address = unix or f"{_hosts(section.host)[0]}:{section.port}"
    connection = http.client.HTTPConnection("localhost", timeout=TIMEOUT_S)
    try:
        connection.sock = _connect_unix(unix) if unix else _connect(section.host, section.port)
        if not is_on_metrics_port and _expects_proxy_header(settings, connection.sock):
            connection.sock.sendall(b"PROXY UNKNOWN\r\n")
        if not is_on_metrics_port and settings.server.tls.enabled:
            connection.sock = _tls_context().wrap_socket(connection.sock)
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read(MAX_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise UnhealthyError(f"no answer from {address}: {error}") from error
    finally:
        connection.close()
    if answer.status != http.client.OK:
        raise UnhealthyError(f"{address}{path} answers {answer.status}{_status_in(body)}")


def _status_in(body: bytes) -> str:
    """Return the reason in the answer to a probe; nothing for another answer."""
    try:
        return f": {json.loads(body)['status']}"
    except (ValueError, TypeError, KeyError):
        return ""


def _hosts(hosts: str) -> Sequence[str]:
    """Return the addresses by which this machine reaches a listening one."""
    host = hosts.partition(",")[0]
    if not listens_on_all_addresses(host):
        return [host]
    return LOOPBACK if host != "0.0.0.0" else LOOPBACK[:1]


def _connect(hosts: str, port: int) -> socket.socket:
    *others, last = _hosts(hosts)
    for host in others:
        with contextlib.suppress(OSError):  # the machine may have one family only
            return socket.create_connection((host, port), TIMEOUT_S)
    return socket.create_connection((last, port), TIMEOUT_S)


def _connect_unix(path: str) -> socket.socket:
    if path.startswith("fd:"):
        raise UnhealthyError(
            f"server.socket is {path}, which only the relay itself has; the check needs"
            " metrics.enabled: true"
        )
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.settimeout(TIMEOUT_S)
    try:
        connected.connect(path)
    except BaseException:
        connected.close()
        raise
    return connected


def _expects_proxy_header(settings: Settings, connected: socket.socket) -> bool:
    """Return whether the relay takes this process for a proxy, which begins with a header."""
    if not settings.server.proxy_protocol:
        return False
    if connected.family == socket.AF_UNIX:
        return True
    address = ipaddress.ip_address(connected.getsockname()[0])
    return any(address in ipaddress.ip_network(each) for each in settings.server.trusted_proxies)


def _tls_context() -> ssl.SSLContext:
    # The certificate is for the public host name, not for this address. The request has no secret,
    # so the certificate is not verified.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
