"""Define what the checkers report: the kinds of violations, and the verdict of one run."""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum


class Kind(Enum):
    """The kinds of violations."""

    CONFLICT = "one position, two messages"
    REPEATED = "one message, two positions"
    ORDER = "positions do not grow within a connection"
    SOURCE_ORDER = "messages of one connection published out of order"
    BATCH = "messages of one batch apart"
    CHANNEL = "delivered to another channel"
    CONTENT = "payload changed"
    DUPLICATE = "delivered twice to a client that resumes"
    HOLE = "hole never reported"
    LATE_GAP = "gap reported after what follows the hole"
    FALSE_ALARM = "loss reported although the broker kept everything"
    WELCOME_BEFORE = "welcome position before the client's own"
    WELCOME_AHEAD = "recovered, and the welcome position is not the client's own"
    ANSWER = "202 with a position that is not the message's"
    REFUSED = "503 for a message that was delivered"
    ROSTER = "two rosters at one position"
    ROSTER_AT_REST = "the roster at rest is not who is connected"
    LEFT = "a client that was connected, or resumed in time, was seen to leave"
    ALTERNATION = "joins and leaves of a client do not alternate"
    TWICE = "one client twice in a roster"
    COUNTERS = "counters do not add up at rest"
    MEMORY = "memory not released"
    STOP = "no exit in time after SIGTERM"
    LOG = "traceback in a log"
    RUN = "the run itself"


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was not kept."""

    kind: Kind
    text: str
    at_s: float = 0.0


@dataclass(slots=True)
class PresenceCounts:
    """How much of presence was judged.

    Attributes:
        joined, left: notices that watchers were sent.
        resumed_in_time: returns of a session's client that others must not notice.
        returned_late: those that others may notice: too late, or after the client's own close.
        positions: at which the rosters of two replicas or more were compared.
        unsettled: rosters that were not compared: the replica knew that it may have missed entries.
        answers: to those who asked for a roster, over a subscription or by HTTP.
    """

    joined: int = 0
    left: int = 0
    resumed_in_time: int = 0
    returned_late: int = 0
    positions: int = 0
    unsettled: int = 0
    answers: int = 0


@dataclass(slots=True)
class RunVerdict:
    """The result of checking a record.

    Attributes:
        false_alarms: reports of a loss where nothing is known to be missing, in any run.
        covered_holes: messages that a subscriber did not receive, where a gap was reported in time.
        presence: how much of it was judged.
    """

    violations: list[Violation] = field(default_factory=list)
    false_alarms: int = 0
    covered_holes: int = 0
    presence: PresenceCounts = field(default_factory=PresenceCounts)

    def counts(self) -> dict[str, int]:
        """Count the violations by kind."""
        return dict(Counter(each.kind.name.lower() for each in self.violations))

    def report(self, kind: Kind, text: str, at_s: float = 0.0) -> None:
        """Add a violation."""
        self.violations.append(Violation(kind, text, at_s))
