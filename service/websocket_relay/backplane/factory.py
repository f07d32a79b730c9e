"""Build the log that a URL names. Imports a broker's library only if the URL asks for it.

Knows no client and no protocol of a broker.
"""

import importlib
from collections.abc import Callable
from typing import Any

from websocket_relay.backplane.access import ANONYMOUS, BrokerAccess, check_access
from websocket_relay.backplane.interface import Backplane
from websocket_relay.backplane.memory import MemoryBackplane
from websocket_relay.backplane.producer import PendingBytes
from websocket_relay.backplane.redis_url import SCHEMES
from websocket_relay.backplane.replicated import ReplicatedBackplane
from websocket_relay.backplane.stream import Retention
from websocket_relay.backplane.timings import DEFAULT_TIMINGS, Timings
from websocket_relay.redaction import is_ambiguous, redacted, unusable_url

MIN_RETENTION = Retention(max_bytes=67_108_864, max_age_s=60.0)
"""What a broker retains at least: replicas that lose it for a while resume without a gap."""

STREAMS = {
    **dict.fromkeys(SCHEMES, ("redis", "RedisStream")),
    "nats": ("nats", "NatsStream"),
    "tls": ("nats", "NatsStream"),
}
"""By URL scheme: module and class."""


def open_backplane(
    url: str,
    stream: str,
    access: BrokerAccess = ANONYMOUS,
    *,
    relays_locally: bool,
    max_message_bytes: int,
    history_bytes: int,
    history_age_s: float,
    pending: PendingBytes,
    describe: Callable[[], bytes],
    observe_append: Callable[[float], None],
    observe_lag: Callable[[float], None],
    timings: Timings = DEFAULT_TIMINGS,
    min_retention: Retention = MIN_RETENTION,
) -> Backplane:
    """Return the log; it connects when it is run.

    Args:
        url: memory://, or the URL of a broker.
        stream: name of the log on the broker.
        access: the settings for the access to the broker.
        relays_locally: whether messages are relayed on this replica alone during an outage.
        max_message_bytes: message limit of the clients of any replica.
        history_bytes, history_age_s: what replicas that start need to read.
        pending: bound on the bytes of pending appends.
        describe, observe_append, observe_lag, timings: see `ReplicatedBackplane`.
        min_retention: what the broker retains at least.

    Raises:
        UnusableSettingError: the URL names no usable broker, or the access does not fit it.
    """
    if is_ambiguous(url):
        raise unusable_url(url, "in the password, write %40 for @, %2F for /, %3F for ?, %23 for #")
    scheme = url.partition("://")[0].lower()
    if scheme not in {"memory", *STREAMS}:
        allowed = ", ".join(f"{each}://" for each in ("memory", *STREAMS))
        raise unusable_url(url, f"unsupported scheme; allowed: {allowed}")
    check_access(url, access)
    if scheme == "memory":
        return MemoryBackplane(describe)
    module, class_name = STREAMS[scheme]
    try:
        stream_class: Any = getattr(
            importlib.import_module(f"websocket_relay.backplane.{module}"), class_name
        )
    except ModuleNotFoundError as error:
        raise unusable_url(url, f"missing Python package {error.name}") from None
    min_bytes, min_age_s = min_retention
    retention = Retention(max(history_bytes, min_bytes), max(history_age_s, min_age_s))
    return ReplicatedBackplane(
        stream_class(url, stream, access, timings, retention),
        address=redacted(url),
        pending=pending,
        relays_locally=relays_locally,
        max_message_bytes=max_message_bytes,
        describe=describe,
        observe_append=observe_append,
        observe_lag=observe_lag,
        timings=timings,
    )
