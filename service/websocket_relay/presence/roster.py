"""Compute who is in which channel, from the entries of the log alone: no clock, no own memory.

So every replica has the same rosters at the same position. Knows no connection and no broker.

A client belongs to the incarnation of the replica that has claimed it last, by an entry, when it
came. If it resumes its session on another replica, the claim of that one moves it, of which no
client is notified: it did not leave. It leaves by an entry of the incarnation that it belongs to at
that position, or with all clients of an incarnation that has ended.

A replica states who belongs to it when another one has missed entries. Who is missing there has
left, whatever became of the entry for that; and of two claims the later one in the log holds,
also where only one of them was read.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from websocket_relay.backplane.interface import START, Position
from websocket_relay.cluster.incarnations import MAX_INCARNATIONS

LEFT_WITH_REPLICA = 1006
"""The close code of clients whose replica has ended: as of a connection that is lost."""


class Person(NamedTuple):
    """A client, as others see it. In order, those who came first are the least.

    Attributes:
        since: when it joined, in seconds since 1970.
        client: id of the client: of its session, or else of its connection.
        user: who it is; empty: not known.
        info: what its token, or the backend, has about it, any JSON value; None: nothing.
    """

    since: float
    client: str
    user: str
    info: Any

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Person":
        """Return the client of `fields`."""
        return cls(fields["since"], fields["client"], fields["user"], fields.get("info"))

    def fields(self) -> dict[str, Any]:
        """Return what JSON has of it."""
        since, client, user, info = self  # faster than the attributes: lists have 1,000 of these
        if info is None:
            return {"client": client, "user": user, "since": since}
        return {"client": client, "user": user, "since": since, "info": info}


class Stated(NamedTuple):
    """A client in a statement.

    Attributes:
        channel: that it is in.
        person: the client.
        claimed_at: position of the claim; START: it is not read yet by who states it.
    """

    channel: str
    person: Person
    claimed_at: Position


class Change(NamedTuple):
    """A change of a roster, as others are notified of it.

    Attributes:
        channel: of the roster.
        person: who joined or left.
        joined: whether it joined.
        code: the close code of one that left; 0: it left the channel and stayed connected.
        incarnation: that the client belonged to, or belongs to.
    """

    channel: str
    person: Person
    joined: bool
    code: int
    incarnation: str


class _Member:
    """A client in a roster."""

    __slots__ = ("claimed_at", "incarnation", "person", "statement")

    def __init__(
        self, person: Person, incarnation: str, claimed_at: Position, statement: str
    ) -> None:
        self.person = person
        self.incarnation = incarnation
        self.claimed_at = claimed_at
        self.statement = statement  # the latest one of its incarnation that names it


class Rosters:
    """The rosters of all channels."""

    def __init__(self) -> None:
        self._rosters: dict[str, dict[str, _Member]] = {}  # by channel and client
        self._of_incarnation: dict[str, dict[tuple[str, str], None]] = {}  # channels and clients
        self._statements: dict[str, str] = {}  # by incarnation: the statement that is being read
        self._ended: OrderedDict[str, None] = OrderedDict()  # incarnations

    def __len__(self) -> int:
        return sum(map(len, self._rosters.values()))

    def count(self, channel: str) -> int:
        """Return how many clients are in a channel."""
        return len(self._rosters.get(channel, ()))

    def people(self, channel: str) -> list[Person]:
        """Return who is in a channel, the longest present first."""
        return sorted([member.person for member in self._rosters.get(channel, {}).values()])

    def find(self, channel: str, client: str) -> Person | None:
        """Return a client that is in a channel; None: it is not."""
        member = self._rosters.get(channel, {}).get(client)
        return None if member is None else member.person

    def owners(self) -> dict[str, dict[str, str]]:
        """Return the incarnations that clients belong to, by channel and client."""
        return {
            channel: {client: member.incarnation for client, member in members.items()}
            for channel, members in self._rosters.items()
        }

    def incarnations(self) -> Sequence[str]:
        """Return the incarnations that clients belong to."""
        return list(self._of_incarnation)

    def of_incarnation(self, incarnation: str) -> Iterator[Stated]:
        """Yield the clients that belong to an incarnation."""
        for channel, client in self._of_incarnation.get(incarnation, ()):
            member = self._rosters[channel][client]
            yield Stated(channel, member.person, member.claimed_at)

    def has_ended(self, incarnation: str) -> bool:
        """Return whether the end of an incarnation was read."""
        return incarnation in self._ended

    def join(
        self, incarnation: str, channel: str, person: Person, position: Position
    ) -> Change | None:
        """Add a client, or move it from another incarnation.

        Args:
            incarnation: that claims it.
            channel: that it joins.
            person: the client.
            position: of the claim.

        Returns:
            The change, of which others are notified; None: it was there, or the incarnation has
                ended.
        """
        if incarnation in self._ended:
            return None
        return self._claim(incarnation, Stated(channel, person, position))

    def leave(self, incarnation: str, channel: str, client: str, code: int) -> Change | None:
        """Remove a client that belongs to an incarnation; return the change."""
        member = self._rosters.get(channel, {}).get(client)
        if member is None or member.incarnation != incarnation:
            return None
        return self._remove(channel, client, code)

    def state(
        self, incarnation: str, statement: str, people: Iterable[Stated], *, is_last: bool
    ) -> Iterator[Change]:
        """Apply a part of a statement: all clients that belong to an incarnation.

        Args:
            incarnation: of the replica.
            statement: the same in all its parts.
            people: the clients.
            is_last: whether clients that no part names have left.
        """
        if incarnation in self._ended:
            return
        self._statements[incarnation] = statement
        for stated in people:
            change = self._claim(incarnation, stated)
            if change is not None:
                yield change
        if not is_last:
            return
        for channel, client in list(self._of_incarnation.get(incarnation, ())):
            if self._rosters[channel][client].statement != statement:
                yield self._remove(channel, client, LEFT_WITH_REPLICA)
        del self._statements[incarnation]

    def end(self, incarnation: str) -> Iterator[Change]:
        """End an incarnation: all clients that belong to it leave."""
        self._ended[incarnation] = None
        if len(self._ended) > MAX_INCARNATIONS:
            self._ended.popitem(last=False)
        self._statements.pop(incarnation, None)
        for channel, client in list(self._of_incarnation.get(incarnation, ())):
            yield self._remove(channel, client, LEFT_WITH_REPLICA)

    def _claim(self, incarnation: str, stated: Stated) -> Change | None:
        channel, person, claimed_at = stated
        key = channel, person.client
        statement = self._statements.get(incarnation, "")
        member = self._rosters.get(channel, {}).get(person.client)
        if member is None:
            if claimed_at == START:  # the claim follows
                return None
            member = _Member(person, incarnation, claimed_at, statement)
            self._rosters.setdefault(channel, {})[person.client] = member
            self._of_incarnation.setdefault(incarnation, {})[key] = None
            return Change(channel, person, joined=True, code=0, incarnation=incarnation)
        if claimed_at > member.claimed_at:
            # A replica that has read this claim alone has its person, too.
            member.person = person
            if member.incarnation != incarnation:
                self._disown(member.incarnation, key)
                self._of_incarnation.setdefault(incarnation, {})[key] = None
                member.incarnation = incarnation
        if member.incarnation == incarnation:
            member.claimed_at, member.statement = max(member.claimed_at, claimed_at), statement
        return None

    def _remove(self, channel: str, client: str, code: int) -> Change:
        members = self._rosters[channel]
        member = members.pop(client)
        self._disown(member.incarnation, (channel, client))
        if not members:
            del self._rosters[channel]
        return Change(
            channel, member.person, joined=False, code=code, incarnation=member.incarnation
        )

    def _disown(self, incarnation: str, key: tuple[str, str]) -> None:
        owned = self._of_incarnation[incarnation]
        del owned[key]
        if not owned:
            del self._of_incarnation[incarnation]
