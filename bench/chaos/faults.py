"""Plan a run's faults from a seed. Pure: the same seed is the same plan."""

import random
from dataclasses import dataclass
from enum import StrEnum

FIRST_AT_S = 3.0
QUIET_S = 2.0
MEAN_PAUSE_S = 1.4


class FaultKind(StrEnum):
    """The kinds of faults: target and action."""

    RELAY_KILL = "relay_kill"  # SIGKILL, and a new process after a pause
    RELAY_FREEZE = "relay_freeze"  # SIGSTOP and SIGCONT
    RELAY_STOP = "relay_stop"  # SIGTERM, and a new process
    BROKER_KILL = "broker_kill"
    BROKER_FREEZE = "broker_freeze"
    BROKER_STOP = "broker_stop"
    BROKER_RESET = "broker_reset"  # a relay's connections to the broker: RST
    BROKER_HOLD_READS = "broker_hold_reads"  # entries that a relay reads are delayed
    BROKER_HOLD_APPENDS = "broker_hold_appends"  # confirmations are delayed
    BROKER_STALL = "broker_stall"  # both directions of all of them are delayed
    BROKER_MUTE = "broker_mute"  # requests are lost, then RST
    BROKER_DEAFEN = "broker_deafen"  # replies are lost, then RST
    BROKER_PARTITION = "broker_partition"  # everything is lost, new connections too
    BROKER_TEAR = "broker_tear"  # closed in the middle of a reply
    CLIENT_RESET = "client_reset"  # the same to all clients of a relay
    CLIENT_HOLD = "client_hold"
    CLIENT_PARTITION = "client_partition"
    CLIENT_TEAR = "client_tear"
    SLOW_CLIENT = "slow_client"  # one reads nothing while its channel gets megabytes
    DELETE_NEWEST = "delete_newest"  # an operator deletes the entry that was appended last
    DELETE_UNREAD = "delete_unread"  # the same while one relay reads nothing
    DELETE_OLD = "delete_old"  # an entry that all relays read over half a second ago


WEIGHTS = {
    FaultKind.RELAY_KILL: 2,
    FaultKind.RELAY_FREEZE: 2,
    FaultKind.RELAY_STOP: 2,
    FaultKind.BROKER_KILL: 1.5,
    FaultKind.BROKER_FREEZE: 2,
    FaultKind.BROKER_STOP: 1,
    FaultKind.BROKER_RESET: 2,
    FaultKind.BROKER_HOLD_READS: 4,
    FaultKind.BROKER_HOLD_APPENDS: 2,
    FaultKind.BROKER_STALL: 1,
    FaultKind.BROKER_MUTE: 1,
    FaultKind.BROKER_DEAFEN: 1,
    FaultKind.BROKER_PARTITION: 1.5,
    FaultKind.BROKER_TEAR: 1.5,
    FaultKind.CLIENT_RESET: 1,
    FaultKind.CLIENT_HOLD: 1,
    FaultKind.CLIENT_PARTITION: 1,
    FaultKind.CLIENT_TEAR: 1,
    FaultKind.SLOW_CLIENT: 1,
}
DELETIONS = {
    FaultKind.DELETE_NEWEST: 4,
    FaultKind.DELETE_UNREAD: 6,
    FaultKind.DELETE_OLD: 2,
}

PERSISTENCE = {"redis": ("always", "always", "everysec", "none"), "nats": ("file",)}
LOSSLESS = {"always", "file"}

GRACES_S = (4.0, 8.0)
"""Of presence: below and above the longest fault."""

MAX_PAYLOADS = (1_048_576, 65_536)
"""Largest entry of NATS: with the second, large messages are split into parts."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        at_s: since the run's start.
        relay: the index of the relay concerned.
        duration_s: time until it is healed.
        choice: from 0 to 1: selects a connection, a client or an entry.
    """

    at_s: float
    kind: FaultKind
    relay: int
    duration_s: float
    choice: float

    def __str__(self) -> str:
        return f"{self.kind} relay={self.relay} duration_s={self.duration_s:.2f}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of one run.

    Attributes:
        persistence: of the broker: `always`, `everysec`, `none` (Redis); `file` (NATS).
        max_payload: of NATS.
        deletes: an operator deletes entries.
        grace_s: of presence.
    """

    seed: int
    broker: str
    seconds: float
    relays: int
    persistence: str
    max_payload: int
    deletes: bool
    faults: tuple[Fault, ...]
    grace_s: float

    @property
    def keeps_all(self) -> bool:
        """Whether no accepted message can be lost."""
        return self.persistence in LOSSLESS and not self.deletes


def plan_of(seed: int, broker: str, seconds: float) -> Plan:
    """Return the plan of a seed.

    Args:
        broker: `redis` or `nats`.
        seconds: the time with faults.
    """
    chance = random.Random(f"{seed} {broker}")
    relays = chance.choice((2, 3))
    persistence = chance.choice(PERSISTENCE[broker])
    max_payload = chance.choice(MAX_PAYLOADS)
    deletes = chance.random() < 0.5
    weights: dict[FaultKind, float] = {**WEIGHTS, **(DELETIONS if deletes else {})}
    faults = []
    at_s = FIRST_AT_S
    while at_s < seconds - QUIET_S:
        (kind,) = chance.choices(list(weights), list(weights.values()))
        relay, choice = chance.randrange(relays), chance.random()
        faults.append(Fault(at_s, kind, relay, chance.choice(_durations(chance)), choice))
        at_s += chance.expovariate(1 / MEAN_PAUSE_S)
    kept = persistence, max_payload, deletes
    return Plan(seed, broker, seconds, relays, *kept, tuple(faults), chance.choice(GRACES_S))


def _durations(chance: random.Random) -> tuple[float, ...]:
    """Return a short, a medium and a long one: below and above the outage limit (3 s)."""
    return chance.uniform(0.05, 0.5), chance.uniform(0.5, 2.5), chance.uniform(2.5, 6)
