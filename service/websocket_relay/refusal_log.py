"""Log that a limit refuses clients or that handshakes fail, at a bounded rate. Knows no client."""

import asyncio
import logging

from websocket_relay.outcomes import Refusal, TlsFailure

log = logging.getLogger(__name__)

INTERVAL_S = 60.0
"""Minimum time between two log lines about the same limit."""

SETTINGS = {
    Refusal.INVALID_PROXY_HEADER: "server.proxy_protocol",
    Refusal.HTTP_CONNECTIONS: "limits.max_http_connections",
    Refusal.METRICS_CONNECTIONS: "metrics.host",
    Refusal.DESCRIPTORS: "ulimit -n",
    Refusal.CONNECTIONS: "limits.max_connections",
    Refusal.CONNECTIONS_PER_IP: "limits.max_connections_per_ip",
    Refusal.CONNECTIONS_PER_USER: "limits.max_connections_per_user",
    Refusal.HANDSHAKES: "limits.max_handshakes_per_s",
    Refusal.CHANNELS: "channels.max_channels",
    Refusal.ORIGIN_NOT_ALLOWED: "server.allowed_origins",
    Refusal.SIGNING_KEYS: "auth.jwt.jwks_url",
    Refusal.HOOK_UNAVAILABLE: "auth.hook.url",
    Refusal.HOOK_ANSWER_INVALID: "auth.hook.url",
    Refusal.HOOK_REQUESTS: "auth.hook.max_in_flight",
    Refusal.PARTIAL_MESSAGES: "limits.total_backlog_bytes",
}
"""The refusals that may need an operator, and the setting to change. All others are errors of the
client."""


class RefusalLog:
    """The reasons of the last minute, with the number of refusals not yet logged."""

    def __init__(self) -> None:
        self._unlogged: dict[Refusal | TlsFailure, int] = {}

    def record_refusal(self, why: Refusal) -> None:
        """Record a refusal: log the first at once, and the following ones as one line a minute."""
        if why in SETTINGS:
            self._record(why)

    def record_tls_failure(self, why: TlsFailure) -> None:
        """Record a TLS handshake that failed, likewise."""
        self._record(why)

    def _record(self, why: Refusal | TlsFailure) -> None:
        if why in self._unlogged:
            self._unlogged[why] += 1
        else:
            self._log(why, 1)

    def _log(self, why: Refusal | TlsFailure, count: int) -> None:
        self._unlogged[why] = 0
        asyncio.get_running_loop().call_later(INTERVAL_S, self._log_rest, why)
        if isinstance(why, TlsFailure):
            log.info("failed TLS handshakes", extra={"reason": why.value, "count": count})
            return
        facts = {"reason": why.label, "count": count, "setting": SETTINGS[why]}
        # Any page may cause refusals of its origin: those are no reason for an alarm.
        level = logging.INFO if why is Refusal.ORIGIN_NOT_ALLOWED else logging.WARNING
        log.log(level, "clients refused", extra=facts)

    def _log_rest(self, why: Refusal | TlsFailure) -> None:
        if count := self._unlogged.pop(why):
            self._log(why, count)
