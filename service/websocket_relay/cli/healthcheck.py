"""Ask a relay on this machine whether its event loop turns, as the image's HEALTHCHECK does.

Knows where settings make a relay listen; nothing of what runs there.
"""

import http.client
import ssl

from websocket_relay.config.model import Settings
from websocket_relay.outcomes import UnhealthyError

TIMEOUT_S = 4.0
"""For a step of the answer. The image's HEALTHCHECK allows ten seconds for all of it, the start of
this process included."""

ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def ask(settings: Settings) -> None:
    """Ask for /healthz on the metrics port, or on the relay's where metrics are off.

    Raises:
        UnhealthyError: it does not answer, or not with 200.
    """
    connection = _connection(settings)
    where = f"{connection.host}:{connection.port}"
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise UnhealthyError(f"no answer from {where}: {error}") from error
    finally:
        connection.close()
    if status != http.client.OK:
        raise UnhealthyError(f"{where} answers {status}")


def _connection(settings: Settings) -> http.client.HTTPConnection:
    section = settings.metrics if settings.metrics.enabled else settings.server
    host = ANY_ADDRESS.get(section.host, section.host)
    if settings.metrics.enabled or not settings.server.tls.enabled:
        return http.client.HTTPConnection(host, section.port, timeout=TIMEOUT_S)
    # The certificate names what clients call the relay, not this address; nothing secret is said.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, section.port, timeout=TIMEOUT_S, context=context)
