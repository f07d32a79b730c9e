"""Own what is known of identified publishes in the log: which are repeats, and of which publish.

Every replica reads the same log and decides alike. A decision depends on entries and their
positions only, never on a clock or on what this replica has forgotten: each source carries the
position after which its replica knew all identified publishes, `complete_after`: when the session
was opened there, or the request arrived. What another replica remembers from before that position
does not count.

Pure. Knows no connection and no channel.
"""

import re
import secrets
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import Enum, auto
from hashlib import blake2b
from operator import attrgetter
from typing import NamedTuple

from websocket_relay.backplane.interface import (
    IDEMPOTENCY_KEY,
    ORIGIN,
    SESSION,
    SOURCE_BYTES,
    START,
    Identities,
    LogEntry,
    Position,
    Source,
)

MAX_RECORDS = 100_000
"""Records of sessions and keys at most, some 300 bytes each. A session has one for each of its
latest publishes whose positions do not follow each other."""

MAX_RUNS = 1_024
"""Records of one session. The latest publishes are those that a client may send again: at a
thousand a second, each in a packet of its own, those of a second."""

DIGEST_BYTES = SOURCE_BYTES - 1

SESSION_TEXT = re.compile(
    r"(?P<opened_at>[0-9]{1,20}-[0-9]{1,20}-[0-9]{1,10})\.(?P<secret>[\w-]{22})(?P<tag>[\w-]{6})",
    re.ASCII,
)


class SessionName(NamedTuple):
    """The name of a session, as its client knows it.

    Attributes:
        opened_at: the session has no publish up to this position.
        text: as sent to the client, and sent back by it. Who knows it may publish in the session.
    """

    opened_at: Position
    text: str

    @classmethod
    def create(cls, opened_at: Position, user: str) -> "SessionName":
        """Return the name of a new session of a user."""
        secret = secrets.token_urlsafe(16)
        return cls(opened_at, f"{opened_at}.{secret}{_tag(secret, user)}")

    @classmethod
    def parse(cls, text: str, user: str) -> "SessionName | None":
        """Return the name in a text; None: the session is another user's.

        Raises:
            ValueError: the text names no session.
        """
        found = SESSION_TEXT.fullmatch(text)
        if found is None:
            raise ValueError("not a session")
        is_users = found["tag"] == _tag(found["secret"], user)
        return cls(Position.parse(found["opened_at"]), text) if is_users else None

    def source_of(self, user: str) -> bytes:
        """Return the source of the session's publishes.

        The log has no name of a session: who reads it can't publish in one. The user is a part of
        the digest, so that no other user publishes in the session with a tag made up for it.
        """
        return bytes((SESSION,)) + _digest(self.text, user)


def key_source(key: str, channel: str, user: str) -> bytes:
    """Return the source of a request with an Idempotency-Key."""
    return bytes((IDEMPOTENCY_KEY,)) + _digest(key, channel, user)


def line_source(key: str, channel: str, number: int) -> bytes:
    """Return the source of a message in a request to the server API with an Idempotency-Key.

    Args:
        key: of the request.
        channel: of the message.
        number: of the message among those of the request in its channel.
    """
    # Four parts, where the source of a POST has three: no user's key is one of these.
    return bytes((IDEMPOTENCY_KEY,)) + _digest("api", key, channel, str(number))


def new_origin() -> bytes:
    """Return the source of a connection that is sent no message of its own."""
    return bytes((ORIGIN,)) + secrets.token_bytes(DIGEST_BYTES)


def _tag(secret: str, user: str) -> str:
    """Return what shows that a session is another user's, who would get an empty one otherwise."""
    return _digest(secret, user).hex()[:6]


def _digest(*parts: str) -> bytes:
    digest = blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        encoded = part.encode(errors="surrogatepass")  # a user's name in JSON may have surrogates
        digest.update(b"%d:%b" % (len(encoded), encoded))
    return digest.digest()


def content_digest(messages: Sequence[tuple[int, bytes]]) -> bytes:
    """Return a digest of the kinds and payloads of messages."""
    digest = blake2b(digest_size=8)
    for kind, payload in messages:
        digest.update(b"%d:%d:" % (kind, len(payload)))
        digest.update(payload)
    return digest.digest()


class Verdict(Enum):
    """What a publish is, if it is not the repeat of one whose position is known."""

    NEW = auto()  # the log does not hold it
    UNKNOWN = auto()  # the log holds later ones, and it is not known whether it held this one


Decision = Position | Verdict
"""What is decided about an entry: a verdict, or the position of the publish that it repeats."""


class Run(NamedTuple):
    """Publishes of a session with consecutive numbers, next to each other in one packet.

    Attributes:
        first: number of the first one.
        size: number of publishes.
        position: of the first one.
    """

    first: int
    size: int
    position: Position


class SessionRecord:
    """What is known of a session.

    Attributes:
        last: the greatest number.
        position: of the latest publish.
    """

    __slots__ = ("_runs", "last", "position")

    def __init__(self, number: int, position: Position) -> None:
        self.last = number
        self.position = position
        self._runs = [Run(number, 1, position)]

    @property
    def size(self) -> int:
        """The number of records that it takes."""
        return len(self._runs)

    def record(self, number: int, position: Position) -> int:
        """Record a publish with a greater number; return how many records that adds."""
        self.last, self.position = number, position
        first, size, (epoch, offset, index) = self._runs[-1]
        if number == first + size and position == (epoch, offset, index + size):
            self._runs[-1] = Run(first, size + 1, Position(epoch, offset, index))
            return 0
        self._runs.append(Run(number, 1, position))
        if len(self._runs) <= MAX_RUNS:
            return 1
        del self._runs[0]
        return 0

    def find(self, number: int) -> Decision:
        """Return the position of a publish, whose number is not greater than the last."""
        found = bisect_right(self._runs, number, key=_first_of)
        if found:
            first, size, (epoch, offset, index) = self._runs[found - 1]
            if number < first + size:
                return Position(epoch, offset, index + number - first)
        return Verdict.UNKNOWN

    def holds(self, position: Position) -> bool:
        """Return whether a publish is known to have this position; positions grow with numbers."""
        found = bisect_right(self._runs, position, key=_position_of)
        if not found:
            return False
        _, size, (epoch, offset, index) = self._runs[found - 1]
        return position[:2] == (epoch, offset) and position.index < index + size

    def trim(self) -> int:
        """Forget all records but the latest; return how many that were."""
        trimmed = len(self._runs) - 1
        del self._runs[:-1]
        return trimmed


class KeyRecord(NamedTuple):
    """What is known of a request with an Idempotency-Key.

    Attributes:
        position: of its last message.
        digest: of its messages.
    """

    position: Position
    digest: bytes

    @property
    def size(self) -> int:
        """The number of records that it takes."""
        return 1


class Publications:
    """The identified publishes in the log, as far as they are known.

    Args:
        max_age_s: records are forgotten after this time without a publish.
        clock: monotonic time in seconds.

    Attributes:
        complete_after: all identified publishes after this position are known.
    """

    def __init__(
        self, max_age_s: float, clock: Callable[[], float], max_records: int = MAX_RECORDS
    ) -> None:
        self.complete_after = START
        self._max_age_s = max_age_s
        self._clock = clock
        self._max_records = max_records
        # By source, in the order of their latest positions; with the time when each was read.
        self._records: OrderedDict[bytes, tuple[SessionRecord | KeyRecord, float]] = OrderedDict()
        # Those of sessions with more than one record, in the same order.
        self._trimmable: OrderedDict[bytes, SessionRecord] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def session(self, source: bytes) -> SessionRecord | None:
        """Return what is known of a session; None: nothing."""
        record = self._find(source)
        return record if isinstance(record, SessionRecord) else None

    def key(self, source: bytes) -> KeyRecord | None:
        """Return what is known of a request with an Idempotency-Key; None: nothing."""
        record = self._find(source)
        return record if isinstance(record, KeyRecord) else None

    def is_known(self, name: SessionName, source: bytes, seen: Position | None) -> bool:
        """Return whether all that a session may have published is known.

        Args:
            name: of the session.
            source: of the session.
            seen: a position that its client had received before it sent what it may send again.
        """
        record = self.session(source)
        known_at = max(name.opened_at, seen or START, record.position if record else START)
        return known_at >= self.complete_after

    def record_gap(self, position: Position) -> None:
        """Record that entries up to a position may be missing."""
        self.complete_after = max(self.complete_after, position)

    def decide(self, entries: Sequence[LogEntry], identities: Identities) -> list[Decision]:
        """Record entries that are next to each other in the log, and decide about each."""
        sources, indices, numbers, _ = identities
        decisions: list[Decision] = []
        at, count = 0, len(entries)
        while at < count:
            index = indices[at]
            source, complete_after = sources[index - 1] if index else NO_SOURCE
            kind = source[:1]
            if kind == SESSION_MARK:
                position = entries[at][0]
                decisions.append(self._decide(source, numbers[at], position, complete_after))
                at += 1
            elif kind == KEY_MARK:
                start = at
                while at < count and indices[at] == index:
                    at += 1
                first = self._decide_batch(source, entries[start:at], complete_after)
                decisions += [first] * (at - start)
            else:
                decisions.append(Verdict.NEW)
                at += 1
        self._forget()
        return decisions

    def _decide(
        self, source: bytes, number: int, position: Position, complete_after: Position
    ) -> Decision:
        record = self.session(source)
        if record is None or record.position <= complete_after:
            self._put(source, SessionRecord(number, position))
        elif number <= record.last:
            return record.find(number)
        else:
            self._size += record.record(number, position)
            if record.size > 1:
                self._trimmable[source] = record
                self._trimmable.move_to_end(source)
            self._records[source] = record, self._clock()
            self._records.move_to_end(source)
        return Verdict.NEW

    def _decide_batch(
        self, source: bytes, entries: Sequence[LogEntry], complete_after: Position
    ) -> Decision:
        record = self.key(source)
        if record is not None and record.position > complete_after:
            return record.position
        digest = content_digest([entry[2:] for entry in entries])
        self._put(source, KeyRecord(entries[-1].position, digest))
        return Verdict.NEW

    def _find(self, source: bytes) -> SessionRecord | KeyRecord | None:
        found = self._records.get(source)
        return found[0] if found is not None else None

    def _put(self, source: bytes, record: SessionRecord | KeyRecord) -> None:
        previous = self._records.pop(source, None)
        if previous is not None:
            self._size -= previous[0].size
            self._trimmable.pop(source, None)
        self._records[source] = record, self._clock()
        self._size += record.size

    def _forget(self) -> None:
        """Forget the oldest records, above the bound on their number or their age.

        Positions of earlier publishes go before sessions: a client that has been idle for some time
        sends none of them again.
        """
        while self._size > self._max_records and self._trimmable:
            _, longest_idle = self._trimmable.popitem(last=False)
            self._size -= longest_idle.trim()
        oldest_s = self._clock() - self._max_age_s
        while self._records:
            source, (record, read_at) = next(iter(self._records.items()))
            if self._size <= self._max_records and read_at >= oldest_s:
                break
            del self._records[source]
            self._trimmable.pop(source, None)
            self._size -= record.size
            self.complete_after = max(self.complete_after, record.position)


_first_of, _position_of = attrgetter("first"), attrgetter("position")
NO_SOURCE = Source(b"", START)
SESSION_MARK, KEY_MARK = bytes((SESSION,)), bytes((IDEMPOTENCY_KEY,))
