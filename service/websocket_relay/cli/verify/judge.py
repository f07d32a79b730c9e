"""Judge whether messages were lost, doubled or reordered. Pure: knows no connection and no clock.

Memory grows with the messages that are not delivered to all subscribers, not with all messages.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

MAX_EXAMPLES = 10


class MessageId(NamedTuple):
    """A message of a run.

    Attributes:
        channel: the name of the channel.
        publisher: number of the publisher, which publishes to this channel only.
        number: of the message; those of a publisher count from 1.
    """

    channel: str
    publisher: int
    number: int


class Outcome(Enum):
    """The result of a publish."""

    ACKNOWLEDGED = auto()
    UNCONFIRMED = auto()  # published once, or not at all
    REFUSED = auto()  # not published


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a run.

    Attributes:
        acknowledged, unconfirmed, refused: number of messages with this outcome.
        lost: missing deliveries: of messages that were acknowledged, or delivered to others.
        doubled: deliveries of a message that was delivered to this subscriber before, or refused.
        reordered: deliveries not in the order of their publisher, or of the positions.
        examples: the first faults, as text.
    """

    acknowledged: int
    unconfirmed: int
    refused: int
    lost: int
    doubled: int
    reordered: int
    examples: tuple[str, ...]

    @property
    def published(self) -> int:
        """The number of messages with an outcome."""
        return self.acknowledged + self.unconfirmed + self.refused

    @property
    def is_clean(self) -> bool:
        """Whether messages were published, and none was lost, doubled or reordered."""
        return self.acknowledged > 0 and not (self.lost or self.doubled or self.reordered)


@dataclass(slots=True)
class _Stream:
    """The messages of one publisher at one subscriber: the highest number, and those left out."""

    last: int = 0
    missing: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Place:
    """The position of a message, and how many reports of it are still expected."""

    position: str
    expected: int
    deliveries: int = 0


class DeliveryJudge:
    """Compares what was published with what each subscriber received.

    Args:
        subscribers: their number; each subscribes to all channels before the first message.
    """

    def __init__(self, subscribers: int) -> None:
        self._subscribers = subscribers
        self._settled: dict[tuple[str, int], int] = defaultdict(int)
        self._outcomes: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self._not_acknowledged: dict[MessageId, Outcome] = {}
        self._streams: dict[tuple[int, str, int], _Stream] = defaultdict(_Stream)
        self._last_positions: dict[tuple[int, str], tuple[int, ...]] = {}
        self._places: dict[MessageId, _Place] = {}
        self._late: list[tuple[int, MessageId]] = []
        self._out_of_position: list[str] = []
        self._doubled: list[str] = []

    def on_settled(self, message: MessageId, outcome: Outcome, position: str = "") -> None:
        """Record the outcome of a publish, once for each message.

        Args:
            position: of an acknowledged message.
        """
        source = (message.channel, message.publisher)
        self._settled[source] = max(self._settled[source], message.number)
        self._outcomes[outcome] += 1
        if outcome is not Outcome.ACKNOWLEDGED:
            self._not_acknowledged[message] = outcome
        place = self._report(message, position)
        if outcome is Outcome.REFUSED and place.deliveries:
            self._doubled.append(f"{_text(message)}: refused, and delivered")

    def on_delivered(self, subscriber: int, message: MessageId, position: str) -> None:
        """Record that a subscriber received a message."""
        stream = self._streams[subscriber, message.channel, message.publisher]
        number = message.number
        if number > stream.last:
            stream.missing.update(range(stream.last + 1, number))
            stream.last = number
        elif number in stream.missing:
            stream.missing.remove(number)
            self._late.append((subscriber, message))
        else:
            self._doubled.append(f"{_text(message)}: twice at subscriber {subscriber}")
            return
        if self._not_acknowledged.get(message) is Outcome.REFUSED:
            self._doubled.append(f"{_text(message)}: refused, and delivered")
        place = self._report(message, position)
        place.deliveries += 1
        self._check_position(subscriber, message, position)

    def _report(self, message: MessageId, position: str) -> _Place:
        """Compare the position of a message with that of other reports."""
        place = self._places.setdefault(message, _Place(position, self._subscribers + 1))
        place.position = place.position or position
        if position and position != place.position:
            self._out_of_position.append(
                f"{_text(message)}: at two positions, {place.position} and {position}"
            )
        place.expected -= 1
        if not place.expected:
            del self._places[message]
        return place

    def _check_position(self, subscriber: int, message: MessageId, position: str) -> None:
        numbers = tuple(map(int, position.split("-")))
        if numbers <= self._last_positions.get((subscriber, message.channel), ()):
            self._out_of_position.append(
                f"{_text(message)}: after a higher position at subscriber {subscriber}"
            )
        else:
            self._last_positions[subscriber, message.channel] = numbers

    def verdict(self) -> Verdict:
        """Return the result of what was recorded."""
        lost = self._lost()
        late = [
            f"{_text(message)}: after a later one of its publisher at subscriber {subscriber}"
            for subscriber, message in self._late
            # The connection that it was sent on may have delivered it to the relay at any time.
            if self._not_acknowledged.get(message) is not Outcome.UNCONFIRMED
        ]
        faults = [*lost, *self._doubled, *self._out_of_position, *late]
        return Verdict(
            acknowledged=self._outcomes[Outcome.ACKNOWLEDGED],
            unconfirmed=self._outcomes[Outcome.UNCONFIRMED],
            refused=self._outcomes[Outcome.REFUSED],
            lost=len(lost),
            doubled=len(self._doubled),
            reordered=len(self._out_of_position) + len(late),
            examples=tuple(faults[:MAX_EXAMPLES]),
        )

    def _lost(self) -> list[str]:
        found = []
        for (channel, publisher), settled in self._settled.items():
            for subscriber in range(self._subscribers):
                stream = self._streams[subscriber, channel, publisher]
                absent = sorted(stream.missing) + list(range(stream.last + 1, settled + 1))
                for number in absent:
                    message = MessageId(channel, publisher, number)
                    if self._must_be_delivered(message):
                        found.append(f"{_text(message)}: lost at subscriber {subscriber}")
        return found

    def _must_be_delivered(self, message: MessageId) -> bool:
        outcome = self._not_acknowledged.get(message, Outcome.ACKNOWLEDGED)
        if outcome is Outcome.UNCONFIRMED:
            place = self._places.get(message)
            return place is not None and place.deliveries > 0
        return outcome is Outcome.ACKNOWLEDGED


def _text(message: MessageId) -> str:
    return f"{message.channel}, message {message.number} of publisher {message.publisher}"
