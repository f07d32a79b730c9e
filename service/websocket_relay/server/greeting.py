"""Tell who has started the relay what to open and what to type next.

Knows the settings and the ports that were bound. The log is apart, with one event a line.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from websocket_relay.config.model import ServerSettings, Settings

NAME = "websocket-relay"

ANY_ADDRESS = ("0.0.0.0", "::")


def greet(settings: Settings, port: int, metrics_port: int | None) -> None:
    """Print the greeting for a person, on standard output, for the log has one event a line."""
    if settings.logging.format == "text":
        with suppress(OSError, ValueError):  # no reader, or no certificate any more
            print(greeting(settings, port, metrics_port), end="", flush=True)


def greeting(
    settings: Settings, port: int, metrics_port: int | None, *, argv0: str = sys.argv[0]
) -> str:
    """Return the addresses of a relay that is ready, and commands to try it with.

    Args:
        settings: of the relay.
        port: on which it listens.
        metrics_port: on which its metrics are, or None where there are none.
        argv0: the name by which the relay was started.
    """
    return "".join(f"{line}\n" for line in _lines(settings, port, metrics_port, argv0))


def _lines(settings: Settings, port: int, metrics_port: int | None, argv0: str) -> Iterator[str]:
    server = settings.server
    s = "s" if server.tls.enabled else ""
    address = f"{_host(server.host)}:{port}{server.base_path}"
    websocket = f"ws{s}://{address}/"
    yield "The relay is ready; Ctrl-C stops it."
    yield f"  clients    {websocket} and {websocket}channels/NAME"
    if settings.console.enabled:
        yield f"  console    http{s}://{address}/"
    if metrics_port is not None:
        yield f"  metrics    http://{_host(settings.metrics.host)}:{metrics_port}/metrics"
    program = _program(argv0)
    options = f" --ca {server.tls.cert_file}" if _is_self_signed(server) else ""
    if settings.auth.mode != "none":
        options += " --token-file FILE"
    yield f"  receive    {program} listen{options} {websocket}"
    yield f"  send       {program} send{options} {websocket} hello"


def _host(host: str) -> str:
    """Return the name of a host on which something listens, as clients on this machine write it."""
    if host in ANY_ADDRESS:
        return "localhost"
    return f"[{host}]" if ":" in host else host


def _program(argv0: str) -> str:
    """Return the command by which this program can be started again."""
    is_a_module = Path(argv0).name == "__main__.py"
    return NAME if is_a_module or shutil.which(NAME) else argv0


def _is_self_signed(server: ServerSettings) -> bool:
    """Return whether clients need the relay's own certificate in order to trust it."""
    if not server.tls.enabled:
        return False
    from cryptography import x509  # takes a while to import

    leaf = x509.load_pem_x509_certificate(Path(server.tls.cert_file).read_bytes())
    return leaf.issuer == leaf.subject
