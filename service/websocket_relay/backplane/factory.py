"""Find the log that a URL names. A broker's library is loaded where its URL asks for it."""

import importlib
from collections.abc import Callable
from typing import Any

from websocket_relay.backplane.interface import Backplane
from websocket_relay.backplane.memory import MemoryBackplane
from websocket_relay.backplane.replicated import PendingBytes, RemoteBackplane
from websocket_relay.redaction import is_ambiguous, redacted, unusable_url

KEPT_BYTES = 67_108_864
KEPT_AGE_S = 60.0
"""What a broker keeps at least, so that replicas that lost it for a while go on without a gap."""

STREAMS = {
    "redis": ("redis", "RedisStream"),
    "rediss": ("redis", "RedisStream"),
    "unix": ("redis", "RedisStream"),
    "nats": ("nats", "NatsStream"),
    "tls": ("nats", "NatsStream"),
}


def open_backplane(
    url: str,
    stream: str,
    *,
    relays_locally: bool,
    max_message_bytes: int,
    history_bytes: int,
    history_age_s: float,
    pending: PendingBytes,
    describe: Callable[[], bytes],
    observe_append: Callable[[float], None],
    observe_lag: Callable[[float], None],
) -> Backplane:
    """Return the log, which connects when it is run.

    Args:
        url: memory://, or a broker's.
        stream: the log's name on the broker.
        relays_locally: whether messages are relayed on this replica alone during an outage.
        max_message_bytes: of any replica's clients.
        history_bytes, history_age_s: what replicas that start want to find.
        pending: the bound on what waits to be appended.
        describe, observe_append, observe_lag: see `RemoteBackplane`.

    Raises:
        UnfitError: no broker can be found by this URL.
    """
    if is_ambiguous(url):
        raise unusable_url(url, "in a password write %40 for @, %2F for /, %3F for ?, %23 for #")
    scheme = url.partition("://")[0].lower()
    if scheme == "memory":
        return MemoryBackplane(describe)
    if scheme not in STREAMS:
        raise unusable_url(url, "allowed: memory://, redis://, rediss://, unix://, nats://, tls://")
    library, name = STREAMS[scheme]
    try:
        make: Any = getattr(importlib.import_module(f"websocket_relay.backplane.{library}"), name)
    except ModuleNotFoundError as error:
        raise unusable_url(url, f"needs the Python package {error.name}") from None
    return RemoteBackplane(
        make(
            url,
            stream,
            max_bytes=max(history_bytes, KEPT_BYTES),
            max_age_s=max(history_age_s, KEPT_AGE_S),
        ),
        address=redacted(url),
        pending=pending,
        relays_locally=relays_locally,
        max_message_bytes=max_message_bytes,
        describe=describe,
        observe_append=observe_append,
        observe_lag=observe_lag,
    )
