"""Send a client what it missed or wants to see first, then let it into its channel.

What is replayed is what the log said, out of the replica's own history: the broker is not asked.
The client is no member until it has heard all of it, so there is no gap between what is replayed
and what comes live, nothing twice, and no second queue: it reads on in the history at its own pace.
"""

from collections.abc import Callable, Mapping, Sequence
from time import monotonic, perf_counter
from typing import NamedTuple

from websocket_relay.backplane.interface import BackplaneState, LogEntry, Position
from websocket_relay.channels.batch import encode_entries, encode_notice, format_of
from websocket_relay.channels.channel import Channel, ChannelHost
from websocket_relay.channels.history import History
from websocket_relay.outcomes import Close
from websocket_relay.wire.connection import Connection, Publisher

PIECE_BYTES = 65_536  # of messages that are written in one go
PIECE_MESSAGES = 256

AHEAD_LOOK_S = 0.02
"""A client may come from a replica that has read more of the log than this one: how often is looked
whether this one got there."""


class ReplayRequest(NamedTuple):
    """What a client wants to hear before what comes next.

    Attributes:
        since: all that came after this; None: nothing of that kind.
        last: the last messages of the channel, so many, where `since` is None.
        tells_positions: it speaks relay.v1, and is welcomed.
    """

    since: Position | None
    last: int
    tells_positions: bool


class Recovery:
    """What one client is sent first. It is the sink of its connection meanwhile.

    Args:
        client: who.
        channel: where it goes then.
        wish: what it wants to hear.
        office: the broadcaster.
        history: what is replayed.
        deflate_from_bytes: shorter messages are not compressed.
    """

    def __init__(
        self,
        client: Connection,
        channel: Channel,
        wish: ReplayRequest,
        office: ChannelHost,
        history: History,
        deflate_from_bytes: int,
    ) -> None:
        self._client = client
        self._channel = channel
        self._wish = wish
        self._office = office
        self._history = history
        self._deflate_from_bytes = deflate_from_bytes
        self._cursor: Position | None = None  # all up to there was sent; None: undecided
        self._is_recovered = True
        self._owes_welcome = wish.tells_positions
        self._began_at = monotonic()
        self._is_behind = False
        self._is_over = False
        self._in_turns = False
        channel.expect(client)
        if not self._is_ahead():
            # Now: what the client says itself comes after what it missed.
            self._cursor = self._decided()

    def begin(self) -> None:
        """Get turns to write."""
        self._go_on_soon()

    # What the client says: this is its sink

    def publish(self, client: Publisher, opcode: int, payload: bytes) -> None:
        """Relay a message, though its sender does not hear it yet."""
        self._channel.publish(client, opcode, payload)

    def hold_back(self, client: Publisher) -> None:
        """Read a publisher no more while too much waits to be written."""
        self._channel.hold_back(client)

    def when_written(self, act: Callable[[], None]) -> None:
        """Call `act` once all that was published so far has been written to the members."""
        self._channel.when_written(act)

    def leave(self, client: Connection) -> None:
        """Let a client go."""
        self._is_over = True
        self._channel.leave(client)

    def fell_behind(self, client: Connection) -> None:
        """Wait: the client's socket is full."""
        self._is_behind = True

    def caught_up(self, client: Connection) -> None:
        """Go on."""
        self._is_behind = False
        self._go_on_soon()

    # What it hears

    def go_on(self, until: float) -> bool:
        """Write some more of what was missed, for a slice of time.

        Args:
            until: when to stop, by `time.perf_counter`; one piece is always written.

        Returns:
            Whether there is nothing left to do for now.
        """
        is_done = self._go_on(until)
        self._in_turns = not is_done
        return is_done

    def _go_on_soon(self) -> None:
        if not self._in_turns:
            self._in_turns = True
            self._office.schedule(self.go_on)

    def _go_on(self, until: float) -> bool:
        while not self._is_over and not self._is_behind:
            if self._cursor is None:
                if self._is_ahead():
                    self._wait_to_get_there()
                    return True
                self._cursor = self._decided()
            if self._owes_welcome:
                self._owes_welcome = False
                self._welcome(self._cursor)
            else:
                self._cursor = self._go_past(self._cursor)
            if perf_counter() > until:
                return self._is_over or self._is_behind
        return True

    def _is_ahead(self) -> bool:
        """Tell whether the log may hold what the client heard last, and it was not read here yet.

        Once all has been read that the log held when the client came, it holds nothing further.
        """
        since, backplane = self._wish.since, self._office.backplane
        if since is None or since <= backplane.position:
            return False
        if backplane.relays_locally and backplane.state is BackplaneState.OUTAGE:
            return False  # this replica goes on without the log
        return backplane.complete_until < self._began_at

    def _wait_to_get_there(self) -> None:
        if self._office.backplane.state is BackplaneState.OUTAGE:
            # Whatever it were told now could be wrong. It is like a newcomer's: another replica's.
            self._client.close(Close.UNAVAILABLE)
        else:
            self._office.call_later(AHEAD_LOOK_S, self._go_on_soon)

    def _decided(self) -> Position:
        """Decide from where on the client is sent messages."""
        history, name, since = self._history, self._channel.name, self._wish.since
        if since is not None:
            is_in_log = since <= self._office.backplane.position
            self._is_recovered = is_in_log and history.has_all_after(name, since)
            ledger = self._office.shared.ledger
            ledger.recovered += self._is_recovered
            ledger.not_recovered += not self._is_recovered
            return max(since, history.known_after(name)) if is_in_log else history.newest
        last = history.last(name, self._wish.last) if self._wish.last else ()
        if not last:
            return history.newest
        return max(last[0].position.before(), history.known_after(name))  # not across a gap

    def _welcome(self, position: Position) -> None:
        said = {"type": "welcome", "recovered": self._is_recovered, "position": str(position)}
        self._tell(said)

    def _tell(self, said: Mapping[str, object]) -> None:
        data = encode_notice(said, format_of(self._client))
        self._office.shared.write([self._client], data, messages=0)

    def _go_past(self, cursor: Position) -> Position:
        """Write some of what is behind a position; let the client in where there is nothing.

        Returns:
            What it has heard then.
        """
        name, floor = self._channel.name, self._history.floor
        if self._wish.tells_positions and floor > cursor:
            # The log lost something meanwhile, here or further on: nothing up to there is whole.
            # Others are sent what there is, as all members are.
            cursor = floor
            self._tell({"type": "gap", "position": str(floor)})
        if cursor < self._history.kept_after(name):
            # It was forgotten faster than the client took it.
            self._client.close(Close.SLOW_CONSUMER)
            return cursor
        piece = _piece(self._history.after(name, cursor, PIECE_MESSAGES))
        if not piece:
            self._join()
            return cursor
        self._write(piece)
        return piece[-1].position

    def _write(self, piece: Sequence[LogEntry]) -> None:
        shared = self._office.shared
        data = b"".join(encode_entries(piece, format_of(self._client), self._deflate_from_bytes))
        shared.ledger.owed += len(piece)
        shared.write([self._client], data, messages=len(piece))

    def _join(self) -> None:
        self._is_over = True
        self._client.pass_on(self._channel)
        self._channel.join(self._client)


def _piece(entries: Sequence[LogEntry]) -> Sequence[LogEntry]:
    """Return the first of the entries, as many as fit into a piece; one at least."""
    size = 0
    for count, entry in enumerate(entries):
        size += len(entry.payload)
        if size > PIECE_BYTES:
            return entries[: max(1, count)]
    return entries
