"""Define what one run observed: the values that the checker judges. Knows no socket.

A message is identified by its name, `CHANNEL/SOURCE.CONNECTION:NUMBER`. A source publishes each
name once; within one connection the numbers grow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from websocket_relay.backplane.interface import Position

FILLER = "."


def named(channel: str, source: str, connection: int, number: int) -> str:
    """Return the name of a message."""
    return f"{channel}/{source}.{connection}:{number}"


def payload_of(name: str, size: int) -> str:
    """Return a payload of about `size` characters that holds its name and its own length."""
    text = f"{name} {size} "
    return text + FILLER * max(0, size - len(text))


def name_of(payload: str) -> str | None:
    """Return the name in a payload; None where the payload is not as it was sent."""
    name, _, rest = payload.partition(" ")
    size = rest.partition(" ")[0]
    is_whole = size.isdecimal() and payload == payload_of(name, int(size))
    return name if is_whole else None


@dataclass(frozen=True, slots=True)
class ConnectStep:
    """A subscription began.

    Attributes:
        relay: the process that it is connected to.
        since: the position that it resumed from; None: it did not resume.
        is_recovered, position: of the welcome; a plain subscriber receives none.
    """

    relay: str
    since: Position | None = None
    is_recovered: bool = True
    position: Position | None = None
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Delivered:
    """A message was delivered; a plain subscriber receives no position."""

    message: str
    position: Position | None = None
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GapReported:
    """The relay reported that messages up to this position may be missing."""

    position: Position
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DisconnectStep:
    """A connection ended, or was refused."""

    reason: str
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RosterShown:
    """The relay sent who is in the channel.

    Attributes:
        clients: as they were listed.
        count: as the answer has it.
        is_answer: the client had asked; otherwise its subscription began.
    """

    clients: tuple[str, ...]
    count: int
    is_answer: bool = False
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RosterChanged:
    """The relay notified that a client joined, or left."""

    client: str
    is_joined: bool
    at_s: float = 0.0


Step = ConnectStep | Delivered | GapReported | RosterShown | RosterChanged | DisconnectStep


@dataclass(slots=True)
class Trace:
    """What one subscriber observed, in order, over all its connections.

    Attributes:
        resumes: it receives positions, and resumes from them.
    """

    subscriber: str
    channel: str
    resumes: bool
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a POST.

    Attributes:
        messages: the names that it published, in order.
        status: of the response; 0: the connection broke first.
        position: of the last message, as the response has it.
    """

    messages: tuple[str, ...]
    status: int
    position: str = ""
    relay: str = ""
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Proof:
    """A message that a session's client published and the relay acknowledged.

    So the relay had the client's connection at a time after `sent_at_s`, and the log had both the
    client's claim and the message before `answered_at_s`.

    Attributes:
        position: of the message.
    """

    sent_at_s: float
    answered_at_s: float
    position: Position


@dataclass(slots=True)
class Stay:
    """One connection of a session's client, in a channel with presence.

    Attributes:
        client: its id, which it keeps as long as it resumes.
        proofs: in their order; none of a message that was sent again.
        is_closed_by_client: the client sent a close frame on its own account, so it left at once.
    """

    client: str
    channel: str
    proofs: list[Proof] = field(default_factory=list)
    is_closed_by_client: bool = False


@dataclass(frozen=True, slots=True)
class RosterAnswer:
    """The answer to a GET of a channel's presence."""

    relay: str
    channel: str
    clients: tuple[str, ...]
    count: int
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RosterAtRest:
    """What a relay answers once all is healed and no client moves, and what is true.

    Attributes:
        answer: of the relay.
        connected: ids of the clients that are connected, and know theirs.
        unnamed: the number of the others: plain clients and event streams are sent no id.
    """

    answer: RosterAnswer
    connected: frozenset[str]
    unnamed: int

    @property
    def is_true(self) -> bool:
        """Whether exactly those who are connected are listed."""
        clients = self.answer.clients
        return self.connected <= set(clients) and (
            len(clients) == len(self.connected) + self.unnamed
        )


@dataclass(frozen=True, slots=True)
class Unsettled:
    """A time in which a relay knew that its rosters may be incomplete.

    Attributes:
        from_s, until_s: since the run's start, of the log: an entry counts by the time at which any
            client received it first.
        has_all: its rosters lack no client, but may have some that have left.
    """

    relay: str
    from_s: float
    until_s: float
    has_all: bool = False


@dataclass(frozen=True, slots=True)
class StopRecord:
    """A relay was sent SIGTERM.

    Attributes:
        exit_status: None: it did not end within `limit_s`.
    """

    relay: str
    exit_status: int | None
    seconds: float
    limit_s: float
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Rest:
    """A relay's counters and memory once all clients have left."""

    relay: str
    counters: Mapping[str, float]
    ready_rss_bytes: int
    end_rss_bytes: int


@dataclass(slots=True)
class Record:
    """All that one run observed.

    Attributes:
        keeps_all: the broker lost nothing and no operator deleted anything, so no loss may be
            reported.
        grace_s: `presence.grace_s` of the relays.
        relays_with_losses: processes whose log reports lost messages.
        complaints: tracebacks, and other lines of relays' logs that are not events.
        failures: problems of the run itself, such as a relay that does not become ready again.
    """

    keeps_all: bool
    traces: list[Trace] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    grace_s: float = 0.0
    stays: list[Stay] = field(default_factory=list)
    roster_answers: list[RosterAnswer] = field(default_factory=list)
    rosters_at_rest: list[RosterAtRest] = field(default_factory=list)
    unsettled: list[Unsettled] = field(default_factory=list)
    stops: list[StopRecord] = field(default_factory=list)
    rests: list[Rest] = field(default_factory=list)
    relays_with_losses: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
