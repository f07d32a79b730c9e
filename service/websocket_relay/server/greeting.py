"""Print the addresses of a running relay and example commands, for a person at a terminal.

Knows the settings and the bound ports, and nothing of the log, which has one event a line.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from websocket_relay.config.model import ServerSettings, Settings, listens_on_all_addresses
from websocket_relay.server.sockets import ListeningAddress

NAME = "websocket-relay"


def greet(
    settings: Settings, address: ListeningAddress, metrics: ListeningAddress | None = None
) -> None:
    """Print the greeting on standard output; the log goes to standard error."""
    metrics_port = metrics.port if metrics is not None else None
    if settings.logging.format == "text":
        with suppress(OSError, ValueError):  # stdout is closed, or the certificate was removed
            print(greeting(settings, address, metrics_port), end="", flush=True)


def greeting(
    settings: Settings,
    address: ListeningAddress,
    metrics_port: int | None,
    *,
    argv0: str = sys.argv[0],
) -> str:
    """Return the addresses of a ready relay, and example commands.

    Args:
        settings: the relay's settings.
        address: where the relay listens.
        metrics_port: the bound metrics port; None: metrics are disabled.
        argv0: the command by which the relay was started.
    """
    return "".join(f"{line}\n" for line in _lines(settings, address, metrics_port, argv0))


def _lines(
    settings: Settings, address: ListeningAddress, metrics_port: int | None, argv0: str
) -> Iterator[str]:
    server = settings.server
    s = "s" if server.tls.enabled else ""
    host = address.host if server.socket else server.host
    authority = "localhost" if address.port is None else f"{_host(host)}:{address.port}"
    websocket = f"ws{s}://{authority}{server.base_path}/"
    yield "The relay is ready; Ctrl-C stops it."
    if address.port is None:
        yield f"  socket     {address.host}, for a proxy on this machine"
    else:
        yield f"  clients    {websocket} and {websocket}channels/NAME"
        if settings.console.enabled:
            yield f"  console    http{s}://{authority}{server.base_path}/"
    if metrics_port is not None:
        yield f"  metrics    http://{_host(settings.metrics.host)}:{metrics_port}/metrics"
    if address.port is None:
        curl = "curl --haproxy-protocol" if server.proxy_protocol else "curl"
        k = " --insecure" if s else ""
        yield f"  check      {curl}{k} --unix-socket {address.host} http{s}://{authority}/readyz"
        return
    program = _program(argv0)
    options = f" --ca {server.tls.cert_file}" if _is_self_signed(server) else ""
    if settings.auth.mode != "none":
        options += " --token-file FILE"
    yield f"  receive    {program} listen{options} {websocket}"
    yield f"  send       {program} send{options} {websocket} hello"


def _host(hosts: str) -> str:
    """Return the first listening address as clients on this machine write it in a URL."""
    host = hosts.partition(",")[0]
    if listens_on_all_addresses(host):
        return "localhost"
    return f"[{host}]" if ":" in host else host


def _program(argv0: str) -> str:
    """Return the command that starts this program."""
    is_a_module = Path(argv0).name == "__main__.py"
    return NAME if is_a_module or shutil.which(NAME) else argv0


def _is_self_signed(server: ServerSettings) -> bool:
    """Return whether clients need the relay's own certificate as their CA."""
    if not server.tls.enabled:
        return False
    from cryptography import x509  # slow to import

    leaf = x509.load_pem_x509_certificate(Path(server.tls.cert_file).read_bytes())
    return leaf.issuer == leaf.subject
