"""Define the intervals and time limits of a log on a broker. Knows no broker."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timings:
    """The intervals and time limits, in seconds.

    Attributes:
        append_timeout_s: an append that is not confirmed within this time is retried.
        first_pause_s, longest_pause_s: pauses after failures, which grow; each is randomly reduced
            by up to a half.
        heartbeat_interval_s: interval of heartbeats.
        replica_timeout_s: a replica without a heartbeat in this time is not alive any more.
        outage_after_s: an outage begins when the broker takes longer. As a rule a broker that
            restarts, or fails over, is available again within this time, and a client that waits
            for its own message has not timed out.
        monitor_interval_s: interval of the checks for an outage.
        confirmation_timeout_s: time from the start of an outage in which a message that was
            confirmed before it may still be read back. Then the waits for it end: as a rule clients
            time out after ten seconds.
        resolve_timeout_s: time limit to resolve a name. The C library waits for each answer for
            5 s, and tries twice.
        connect_timeout_s: time limit to connect and to authenticate, once the name is resolved.
        sentinels_timeout_s: time limit to ask all Sentinels; more than that to resolve a name.
        close_timeout_s: an aborted connection to NATS needs some iterations of the event loop to
            close.
    """

    append_timeout_s: float = 2.0
    first_pause_s: float = 0.05
    longest_pause_s: float = 1.0
    heartbeat_interval_s: float = 1.0
    replica_timeout_s: float = 5.0
    outage_after_s: float = 3.0
    monitor_interval_s: float = 0.1
    confirmation_timeout_s: float = 5.0
    resolve_timeout_s: float = 10.0
    connect_timeout_s: float = 2.0
    sentinels_timeout_s: float = 15.0
    close_timeout_s: float = 0.2


DEFAULT_TIMINGS = Timings()
