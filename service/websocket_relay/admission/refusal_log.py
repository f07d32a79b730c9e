"""Tell the log that a limit keeps clients out, without letting them flood it. Knows no client."""

import asyncio
import logging

from websocket_relay.outcomes import Refusal

log = logging.getLogger(__name__)

INTERVAL_S = 60.0
"""How often the log hears of one limit at most."""

SETTINGS = {
    Refusal.HTTP_CONNECTIONS: "limits.max_http_connections",
    Refusal.METRICS_CONNECTIONS: "metrics.host",
    Refusal.DESCRIPTORS: "ulimit -n",
    Refusal.CONNECTIONS: "limits.max_connections",
    Refusal.CONNECTIONS_PER_IP: "limits.max_connections_per_ip",
    Refusal.HANDSHAKES: "limits.max_handshakes_per_s",
    Refusal.CHANNELS: "channels.max_channels",
    Refusal.KEYS: "auth.jwt.jwks_url",
    Refusal.UNFINISHED: "limits.total_backlog_bytes",
}
"""The refusals that an operator may have to do something about, and by which setting. What others
say is the client's own fault."""


class RefusalLog:
    """Which limits were hit in the last minute, and how often since the log heard of it."""

    def __init__(self) -> None:
        self._untold: dict[Refusal, int] = {}

    def note(self, why: Refusal) -> None:
        """Take note of a refusal: the first is told at once, the others after a minute, as one."""
        if why in self._untold:
            self._untold[why] += 1
        elif why in SETTINGS:
            self._tell(why, 1)

    def _tell(self, why: Refusal, count: int) -> None:
        facts = {"reason": why.label, "count": count, "setting": SETTINGS[why]}
        log.warning("clients refused", extra=facts)
        self._untold[why] = 0
        asyncio.get_running_loop().call_later(INTERVAL_S, self._look_again, why)

    def _look_again(self, why: Refusal) -> None:
        if count := self._untold.pop(why):
            self._tell(why, count)
