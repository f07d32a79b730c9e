"""The targets of the relay, and whether a run meets them. Knows only results."""

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Self

from bench.loads import LOADS, Load, Values

FAULTS = (
    ("lost", "lost"),
    ("duplicated", "duplicated"),
    ("out_of_order", "out of order"),
    ("damaged", "damaged"),
    ("unexpected", "unexpected frames"),
    ("closed", "connections closed"),
    ("differently_ordered", "clients with another order than the first"),
)
JSON_VALUES = "figures"
"""The key of a measurement's values in result files, which keep their format."""

RELAY, RELAY_TLS = "relay", "relay_tls"
RELAYS = (RELAY, "relay_checks", "relay_deflate", RELAY_TLS, "relay_tls_checks")
DISTURBED = 0.08  # of a core's time: above it a measurement is marked, and repeated


@dataclass(frozen=True, slots=True)
class Measurement:
    """One load against one server in one round; an error in place of values where it failed."""

    load: str
    server: str
    round: int
    values: Values
    error: str | None = None
    tries: int = 1

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """Return the measurement that `to_json` wrote."""
        return cls(**{"values" if key == JSON_VALUES else key: it for key, it in document.items()})

    def to_json(self) -> dict[str, Any]:
        """Return what is written to a result file."""
        fields = asdict(self)
        return {JSON_VALUES if name == "values" else name: it for name, it in fields.items()}

    @property
    def disturbed(self) -> float:
        """The share of either core's time that neither the server nor the clients used."""
        return max(
            float(self.values.get("server_core_foreign", 0.0)),
            float(self.values.get("client_core_foreign", 0.0)),
        )


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a load's main figure: of the relay alone, or as a multiple of another server's."""

    load: str
    bound: float
    at_least: bool
    rival: str | None = None
    relay: str = RELAY


TARGETS = (
    Target("fanout", 60.0, True, "textbook"),
    Target("fanout", 10.0, True, "uwebsockets"),
    Target("fanout", 0.8, True, "floor"),
    Target("single", 0.85, True, "uwebsockets"),
    Target("single", 0.8, True, "floor"),
    Target("steady", 1.25, False, "uwebsockets"),
    Target("idle", 2.0, False),
    Target("handshakes", 1 / 1.5, True, "gorilla"),
    Target("handshakes", 0.5, True, RELAY, "relay_checks"),
    Target("stall", 5.0, False),
    Target("checks", 0.95, True, RELAY, "relay_checks"),
    Target("checks_single", 0.95, True, RELAY, "relay_checks"),
    Target("compression", 20.0, True, "textbook", "relay_deflate"),
    Target("compression", 20.0, True, "websockets_deflate", "relay_deflate"),
    Target("compression", 20.0, True, "gorilla_deflate", "relay_deflate"),
    Target("tls_idle", 15.0, False, None, RELAY_TLS),
    Target("tls_single", 1.0, True, "gorilla_tls", RELAY_TLS),
    Target("tls_queue", 12.0, True, "gorilla_tls", RELAY_TLS),
    Target("tls_handshakes", 1 / 1.3, True, "gorilla_tls", RELAY_TLS),
)


@dataclass(frozen=True, slots=True)
class TargetVerdict:
    """A target and the measured value: the median of the rounds, and every round."""

    text: str
    measured: float
    rounds: tuple[float, ...]
    unit: str
    met: bool


def load_named(name: str) -> Load:
    """Return the load of a name."""
    return next(load for load in LOADS if load.name == name)


def calm(measurements: list[Measurement], load: Load, server: str) -> list[Measurement]:
    """Return a server's results of a load; disturbed ones only where there are no others."""
    found = [each for each in measurements if (each.load, each.server) == (load.name, server)]
    worked = [each for each in found if each.error is None]
    return [each for each in worked if each.disturbed <= DISTURBED] or worked


def by_round(measurements: list[Measurement], load: Load) -> dict[int, float]:
    """Return the load's main figure, by round."""
    found = {each.round: load.main.value(each.values) for each in measurements}
    return {number: value for number, value in found.items() if value is not None}


def _ratios(
    measurements: list[Measurement], load: Load, relay: str, rival: str
) -> dict[int, float]:
    """Divide within each round: what slowed the machine down in it slowed down both."""
    ours, theirs = (by_round(calm(measurements, load, name), load) for name in (relay, rival))
    common = [number for number in ours.keys() & theirs.keys() if theirs[number]]
    return {number: ours[number] / theirs[number] for number in common}


def _judge(target: Target, measurements: list[Measurement]) -> TargetVerdict | None:
    load = load_named(target.load)
    sign = ">=" if target.at_least else "<="
    if target.rival:
        ours = _ratios(measurements, load, target.relay, target.rival)
        unit, against = "x", f"{target.bound:.3g} x {target.rival}"
    else:
        ours = by_round(calm(measurements, load, target.relay), load)
        unit, against = load.main.unit, f"{target.bound:g} {load.main.unit}"
    if not ours:
        return None
    measured = median(ours.values())
    met = measured >= target.bound if target.at_least else measured <= target.bound
    rounds = tuple(ours[n] for n in sorted(ours))
    who = "" if target.relay == RELAY else f" of {target.relay}"
    text = f"{load.name}: {load.main.title}{who} {sign} {against}"
    return TargetVerdict(text, measured, rounds, unit, met)


def _faultless(measurements: list[Measurement]) -> TargetVerdict | None:
    """Judge the messages of all rounds: none may be lost, also in a disturbed round."""
    loads = {load.name for load in LOADS if load.messages}
    ours = [each for each in measurements if each.server in RELAYS and each.load in loads]
    if not ours:
        return None
    faults = float(sum(each.values.get(name, 0) for each in ours for name, _ in FAULTS))
    complete = all(each.error is None for each in ours)
    text = "all messages: none lost, duplicated, damaged, one order for all clients: faults = 0"
    return TargetVerdict(text, faults, (), "", complete and not faults)


def verdicts(measurements: list[Measurement]) -> list[TargetVerdict]:
    """Judge the run by every target for which it has values."""
    judged = [_judge(target, measurements) for target in TARGETS]
    return [each for each in (*judged, _faultless(measurements)) if each is not None]
