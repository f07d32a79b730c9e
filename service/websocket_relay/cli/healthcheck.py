"""Check that a relay on this machine answers /healthz or /readyz, as the image's HEALTHCHECK does.

Knows the settings that make a relay listen; no server code.
"""

import http.client
import json
import ssl

from websocket_relay.config.model import Settings
from websocket_relay.outcomes import UnhealthyError

TIMEOUT_S = 4.0
"""For each step of the exchange. The image's HEALTHCHECK allows 10 s for all of them and for the
start of this process."""

MAX_BYTES = 1024
"""Read of an answer; those of the probes are shorter."""

LOOPBACK_FOR = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def check_health(settings: Settings, *, path: str = "/healthz") -> None:
    """Request a probe from the metrics port, or from the relay's port if metrics are off.

    Args:
        settings: of the relay.
        path: of the probe.

    Raises:
        UnhealthyError: there is no answer, or its status is not 200.
    """
    connection = _connection(settings)
    address = f"{connection.host}:{connection.port}"
    try:
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


def _connection(settings: Settings) -> http.client.HTTPConnection:
    section = settings.metrics if settings.metrics.enabled else settings.server
    host = LOOPBACK_FOR.get(section.host, section.host)
    if settings.metrics.enabled or not settings.server.tls.enabled:
        return http.client.HTTPConnection(host, section.port, timeout=TIMEOUT_S)
    # The certificate is for the public host name, not for this address. The request has no secret,
    # so the certificate is not verified.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, section.port, timeout=TIMEOUT_S, context=context)
