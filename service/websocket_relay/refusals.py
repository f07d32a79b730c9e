"""Count, log, trace and render every refusal. Knows no framework and no connection."""

import email.utils
import logging
from collections.abc import Callable

from websocket_relay.counters import Counters
from websocket_relay.outcomes import RefusedError, TlsFailure
from websocket_relay.refusal_log import RefusalLog
from websocket_relay.security_headers import SECURITY_HEADERS

log = logging.getLogger(__name__)

FIXED_HEADERS = "".join(
    f"{name}: {value}\r\n"
    for name, value in (
        *SECURITY_HEADERS,
        ("Content-Type", "text/plain; charset=utf-8"),
        ("Connection", "close"),
    )
)


class Refusals:
    """The one path of a refusal, whatever was refused.

    Args:
        counters: counts refusals by reason.
        trace: called with each refusal; None: not traced.
    """

    def __init__(
        self, counters: Counters, trace: Callable[[RefusedError], None] | None = None
    ) -> None:
        self._counters = counters
        self._log = RefusalLog()
        self._trace = trace

    def record(self, error: RefusedError) -> None:
        """Count, log and trace a refusal."""
        self._counters.refusals[error.why] += 1
        self._log.record_refusal(error.why)
        if self._trace is not None:
            self._trace(error)
        log.debug("refused", extra={"reason": error.why.label, "detail": error.detail})

    def record_tls_failure(self, why: TlsFailure) -> None:
        """Count and log a TLS handshake that failed."""
        self._counters.tls_failures[why] += 1
        self._log.record_tls_failure(why)

    def respond(self, error: RefusedError) -> bytes:
        """Record a refusal; return the last HTTP response on its connection."""
        self.record(error)
        text = f"{error}\n"
        headers = "".join(f"{name}: {value}\r\n" for name, value in error.headers.items())
        return (
            f"HTTP/1.1 {error.status} {error.status.phrase}\r\n{headers}{FIXED_HEADERS}"
            f"Date: {email.utils.formatdate(usegmt=True)}\r\n"
            f"Content-Length: {len(text)}\r\n\r\n{text}"
        ).encode("latin-1")
