"""Keep one order with a broker: append to its stream, and tail it. Knows no broker.

Every message of this replica goes to the stream and comes back from there like everybody's; there
is no second way. Messages gather while an append is under way and leave together in the next one.
One append is under way at a time, and it is tried again until it is answered: what arrived twice is
known by its number and left out by all readers alike (see `packet`). So a broker that is gone for a
moment costs nothing but the moment.

Whether the stream can be reached is told by a *canary*: a packet that every replica marks once a
second and waits for. While none comes back in time there is an *outage*.
"""

import asyncio
import logging
import random
import socket
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from typing import NamedTuple, Protocol

from websocket_relay.backplane.codec import (
    HOLE,
    MESSAGE_BYTES,
    FormatError,
    Packet,
    PartAssembler,
    pack,
    split_into_parts,
    unpack,
)
from websocket_relay.backplane.confirmations import Confirmation, Confirmations, OnPosition
from websocket_relay.backplane.interface import (
    START,
    BackplaneState,
    LogEntry,
    OnEntry,
    OnGap,
    Position,
    Rejectable,
)
from websocket_relay.cancellation import Deadline, run_cancellable
from websocket_relay.counters import BackplaneCounters
from websocket_relay.outcomes import RelayError
from websocket_relay.redaction import redact

log = logging.getLogger(__name__)

PACKET_BYTES = 131_072
"""A packet is sealed when its messages come to this: more at once is hardly cheaper, and whoever
reads it has to look up now and then."""

LARGEST_PACKET_BYTES = 4_194_304
"""What a packet comes to at most besides its last message: one that is sealed late, with empty
messages, each to a channel of its own."""

WAITING_BYTES = 64
"""What a message takes in memory besides, while it waits: an object, and places in two lists."""

APPEND_S = 2.0
"""An append that was not answered for so long is tried again."""

CANARY_S = 1.0

HEARD_OF_S = 5.0
"""A replica that was not heard of for so long is not there any more."""

OUTAGE_AFTER_S = 3.0
"""A broker that is restarted, or fails over, is back by then as a rule; a client that waits for its
own message has not given up."""

READ_BACK_S = 5.0
"""So long after the beginning of an outage may still come back what the broker had confirmed before
it. Then nobody waits for it any more: clients give up after ten seconds as a rule."""

LOOK_S = 0.1
"""How often is looked whether there is an outage."""

PAUSE_S = (0.05, 1.0)
"""After a failure, the first and the longest; each is cut by chance to between a half and all."""

TURNS = 8
"""Tasks that wake each other while a message goes to the broker, and while it comes back: those
here, and those of the broker's library. With fewer, fan-outs of full channels hold messages up, so
that fewer of them leave together: at 4, one in five with nats-py."""

MAX_ORIGINS = 10_000
"""Replicas whose numbers are remembered, the latest: more than have been in a stream."""

LIVES = 1 << 16
"""The lower bits of an origin count the lives of a replica: each outage begins a new one. What was
given up in an earlier one may still be on its way, and is left out behind the first of the new one:
so nobody is heard to say a thing after what came later."""

MAX_TEXTS = 8
"""Different failures that are logged of one streak."""

BEHIND_ALL = 1 << 32
"""No packet has so many messages."""

STAMP = struct.Struct("<d")
"""What a canary's note begins with: when it was sent, by the clock of its origin."""

RESET = struct.pack("ii", 1, 0)
"""Of SO_LINGER: what was not sent is thrown away."""

Id = tuple[int, int]

# NamedTuples are made a thousand at a time: `_make` and the classes themselves are calls of Python.
_new_position: Callable[[tuple[int, int, int]], Position] = partial(tuple.__new__, Position)
_new_entry: Callable[[tuple[Position, str, int, bytes]], LogEntry] = partial(
    tuple.__new__, LogEntry
)


class BrokerError(RelayError):
    """The broker can't be reached or did not do what it was asked. It may the next time."""


class StreamEntry(NamedTuple):
    """An entry of a stream.

    Attributes:
        identity: its id.
        data: its bytes.
        follows: whether the stream never held another one between this and the one read before.
    """

    identity: Id
    data: bytes
    follows: bool


class StreamRead(NamedTuple):
    """What a stream gives.

    Attributes:
        entries: in their order.
        is_last: whether there was nothing more to read.
    """

    entries: Sequence[StreamEntry]
    is_last: bool = True


class Stream(Protocol):
    """A broker's stream. Its entries have ids that only grow."""

    @property
    def max_entry_bytes(self) -> int:
        """What an entry may come to, as far as is known."""

    async def append(self, data: bytes) -> None:
        """Add an entry at the end.

        Raises:
            BrokerError: it may be there and it may not.
        """

    async def read(self, after: Id) -> StreamRead:
        """Return the next entries after an id; wait a second or so for them.

        Raises:
            BrokerError: the stream can't be read now.
        """

    def distrust_reader(self) -> None:
        """Read by another connection from now on: what is appended does not come back by this."""

    async def close(self) -> None:
        """Let go of the broker."""


class PendingBytes(Protocol):
    """The bound on what waits to be appended: publishers are held while it is passed."""

    bytes: int

    def drained(self, size: int) -> None:
        """Take note that so much does not wait any more."""


class OutgoingPacket:
    """Messages that will be appended together."""

    __slots__ = (
        "channels",
        "is_canary",
        "is_given_up",
        "number",
        "opcodes",
        "payloads",
        "publishers",
        "size",
    )

    def __init__(self) -> None:
        self.channels: list[str] = []
        self.opcodes = bytearray()
        self.payloads: list[bytes] = []
        self.publishers: dict[Rejectable, None] = {}
        self.size = 0
        self.number = 0  # of the first, once it is under way
        self.is_canary = False
        self.is_given_up = False

    @property
    def kept_bytes(self) -> int:
        """What they take in memory."""
        return self.size + WAITING_BYTES * len(self.payloads)


class ProducerStates:
    """What has been read of each replica's latest life."""

    def __init__(self) -> None:
        self._next: OrderedDict[int, tuple[int, int]] = OrderedDict()  # by replica: life, number
        self.is_current = False  # whether a life that is not known has only begun

    def next_of(self, origin: int, first: int) -> int:
        """Return the number of the next message to read of a life that begins with `first`."""
        replica, life = divmod(origin, LIVES)
        latest, following = self._next.get(replica, (life, first))
        return following if life == latest else first

    def awaits(self, origin: int, number: int) -> bool:
        """Tell whether a packet that begins with this message is not read yet, and may be."""
        replica, life = divmod(origin, LIVES)
        latest, following = self._next.get(replica, (life, number))
        return life > latest or (life == latest and number >= following)

    def note(self, origin: int, number: int, count: int) -> int:
        """Take note of a packet; return how many messages before it are missing.

        Returns:
            Less than nothing where it was read before, or a later life has begun.
        """
        replica, life = divmod(origin, LIVES)
        expected = 0 if self.is_current and not life else number
        latest, following = self._next.get(replica, (life, expected))
        if life < latest:
            return -1
        # A life goes on after what was confirmed in the one before. What was given up then may have
        # been read all the same, and its numbers are used again.
        expected = following if life == latest else min(following, number)
        self._next[replica] = life, max(number + count, expected)
        self._next.move_to_end(replica)
        if len(self._next) > MAX_ORIGINS:
            self._next.popitem(last=False)
        return number - expected


class RemoteBackplane:
    """One replica's hold on a stream.

    Args:
        stream: of the broker.
        address: the broker's, as it may be logged.
        pending: the bound on what waits to be appended.
        relays_locally: whether messages are relayed on this replica alone during an outage;
            otherwise their publishers are told.
        max_message_bytes: of any replica's clients.
        describe: says what the others are told of this replica, in a few bytes.
        observe_append: told the seconds that each append took.
        observe_lag: told the seconds from a canary's append to its return.
    """

    turns = TURNS

    def __init__(
        self,
        stream: Stream,
        *,
        address: str,
        pending: PendingBytes,
        relays_locally: bool,
        max_message_bytes: int,
        describe: Callable[[], bytes],
        observe_append: Callable[[float], None],
        observe_lag: Callable[[float], None],
    ) -> None:
        self.books = BackplaneCounters()
        self.state = BackplaneState.STARTING
        self.begun, self.up = asyncio.Event(), asyncio.Event()
        self._stream = stream
        self._address = address
        self._pending = pending
        self.relays_locally = relays_locally
        self._describe = describe
        self._observe_append = observe_append
        self._observe_lag = observe_lag
        self._deliver: OnEntry
        self._lost: OnGap
        # Writing
        self._is_out = False  # state is OUTAGE: asked for every message
        self._outbox: deque[OutgoingPacket] = deque()
        self._in_flight: OutgoingPacket | None = None
        self._in_flight_since = 0.0
        self._filled = asyncio.Event()
        self._settled = asyncio.Event()  # something does not wait any more
        self._replicas: OrderedDict[int, tuple[float, bytes]] = OrderedDict()  # when heard of, what
        self._origin = _first_life()
        self._number = self._first = 0  # of the next message; of the first one in this life
        # Reading
        self._after: Id = (0, 0)
        self._position = START
        self._publishers = Confirmations()  # who want positions of their own messages
        self._settling = (
            Confirmations()
        )  # who want nothing of this replica to be under way any more
        self._read_back_until = 0.0  # for those who wait for messages of earlier lives
        self._is_whole = False  # nothing is missing before what is read next; nor was said before
        self._origins = ProducerStates()
        self._left_out: OrderedDict[int, int] = OrderedDict()  # origin: from which number
        self._joiner = PartAssembler(max_message_bytes + LARGEST_PACKET_BYTES)
        self._has_room = asyncio.Event()
        self._has_room.set()
        # The canary: when it was sent and when that was answered; 0: none is out.
        self._sent_at = 0.0
        self._answered_at = 0.0
        self._complete_until = 0.0
        self._behind_at = 0.0  # when there was more to read, the last time
        self._failures: dict[str, set[str]] = {}

    # What the relay asks

    def tail(self, deliver: OnEntry, lost: OnGap) -> None:
        """Give every entry from now on to `deliver`, and tell `lost` where some are missing."""
        self._deliver = deliver
        self._lost = lost

    def append(self, channel: str, opcode: int, payload: bytes, publisher: Rejectable) -> None:
        """Add a message at the end."""
        if self._is_out:
            self._turn_away(channel, opcode, payload, publisher)
            return
        outbox = self._outbox
        outgoing = outbox[-1] if outbox else self._begin_packet()
        outgoing.channels.append(channel)
        outgoing.opcodes.append(opcode)
        outgoing.payloads.append(payload)
        outgoing.publishers[publisher] = None
        size = len(payload) + MESSAGE_BYTES
        outgoing.size += size
        self._pending.bytes += size + WAITING_BYTES
        if outgoing.size >= PACKET_BYTES:
            self._begin_packet()

    def append_all(
        self, channel: str, said: Sequence[tuple[int, bytes]], publisher: Rejectable
    ) -> None:
        """Add messages at the end, in one packet: nothing comes between them or takes a part."""
        if self._is_out:
            for opcode, payload in said:
                self._turn_away(channel, opcode, payload, publisher)
            return
        count = len(said)
        size = sum(len(payload) for _, payload in said) + MESSAGE_BYTES * count
        outgoing = self._outbox[-1] if self._outbox else self._begin_packet()
        if outgoing.payloads and outgoing.size + size > PACKET_BYTES:
            outgoing = self._begin_packet()
        outgoing.channels.extend(repeat(channel, count))
        outgoing.opcodes.extend(opcode for opcode, _ in said)
        outgoing.payloads.extend(payload for _, payload in said)
        outgoing.publishers[publisher] = None
        outgoing.size += size
        self._pending.bytes += size + WAITING_BYTES * count
        if outgoing.size >= PACKET_BYTES:
            self._begin_packet()

    def when_delivered(self, answer: OnPosition) -> None:
        """Call `answer` once the message that was appended last has come back, or won't."""
        if self._is_out:  # it was delivered here alone, or turned away
            answer(self._position if self.relays_locally else None)
        else:
            self._publishers.add(self._origin, self._following, answer)

    def when_settled(self, act: Callable[[], None]) -> None:
        """Call `act` once all that was appended so far has come back, or was given up."""
        following = self._following
        if self._next_read < following:
            self._settling.add(self._origin, following, lambda _: act())
        elif self._settling:  # for messages of an earlier life
            self._settling.add_to_last(lambda _: act())
        else:
            act()

    @property
    def _next_read(self) -> int:
        """The number of the first message of this life that was not read yet."""
        return self._origins.next_of(self._origin, self._first)

    @property
    def _following(self) -> int:
        """The number that the message gets which is appended next."""
        return self._number + sum(len(each.payloads) for each in self._outbox)

    @property
    def position(self) -> Position:
        """Up to where everything has been delivered here."""
        return self._position

    @property
    def complete_until(self) -> float:
        """When the latest canary was sent that came back: what stood before it has been read."""
        return self._complete_until

    def pause_reading(self) -> None:
        """Read no more of the stream until `resume_reading`: too much waits to be written."""
        self._has_room.clear()

    def resume_reading(self) -> None:
        """Read on."""
        if not self._has_room.is_set():
            self._behind_at = time.monotonic()
            self._has_room.set()

    def replicas(self) -> Sequence[bytes]:
        """Return what those say of themselves that were heard of lately, this one included."""
        since = time.monotonic() - HEARD_OF_S
        return [note for heard_at, note in self._replicas.values() if heard_at > since]

    @property
    def waiting(self) -> int:
        """How many messages wait to be appended, or for the answer."""
        return sum(len(each.payloads) for each in self._waiting)

    async def run(self) -> None:
        """Write, read and send canaries, until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for begin in (self._write, self._read, self._watch):
                    group.create_task(run_cancellable(begin))
        finally:
            await self._stream.close()

    async def flush(self) -> None:
        """Return when all that was appended has been answered, or given up."""
        while self.waiting:
            self._settled.clear()
            await self._settled.wait()

    # Writing

    @property
    def _waiting(self) -> list[OutgoingPacket]:
        in_flight = self._in_flight
        if in_flight is None or in_flight.is_given_up:
            return [*self._outbox]
        return [in_flight, *self._outbox]

    def _begin_packet(self) -> OutgoingPacket:
        outgoing = OutgoingPacket()
        self._outbox.append(outgoing)
        self._filled.set()
        return outgoing

    async def _write(self) -> None:
        while True:
            await self._filled.wait()
            outgoing = self._outbox.popleft()
            if not self._outbox:
                self._filled.clear()
            if outgoing.payloads or outgoing.is_canary:
                await self._append(outgoing)

    async def _append(self, outgoing: OutgoingPacket) -> None:
        self._in_flight, self._in_flight_since = outgoing, time.monotonic()
        origin, number = self._origin, self._number
        outgoing.number = number
        self._number += len(outgoing.payloads)
        note = STAMP.pack(self._sent_at) + self._describe() if outgoing.is_canary else None
        opcodes = bytes(outgoing.opcodes)
        data = pack(Packet(origin, number, outgoing.channels, opcodes, outgoing.payloads, note))
        pause_s = PAUSE_S[0]
        while not outgoing.is_given_up:
            started = time.perf_counter()
            try:
                # The broker may take less now than before it was restarted.
                for part in split_into_parts(data, origin, number, self._stream.max_entry_bytes):
                    async with Deadline(APPEND_S):
                        await self._stream.append(part)
            except (BrokerError, TimeoutError) as error:
                self._note_failure("append", error)
                pause_s = await _pause(pause_s)
            else:
                self._note_success("append")
                self._observe_append(time.perf_counter() - started)
                break
        self._in_flight = None
        self._settled.set()
        if not outgoing.is_given_up:
            self._pending.drained(outgoing.kept_bytes)
            if outgoing.is_canary:
                self._answered_at = time.monotonic()

    # Reading

    async def _read(self) -> None:
        pause_s = PAUSE_S[0]
        while True:
            try:
                read = await self._stream.read(self._after)
            except (BrokerError, TimeoutError) as error:
                self._note_failure("read", error)
                pause_s = await _pause(pause_s)
                continue
            self._note_success("read")
            pause_s = PAUSE_S[0]
            for found in read.entries:
                if not self._has_room.is_set():
                    await self._has_room.wait()
                self.on_entry(found)
                if not read.is_last:
                    self._behind_at = time.monotonic()
                # A packet takes a millisecond or two. And what it brought is written to clients
                # before more is asked for.
                await asyncio.sleep(0)
            if not self._has_room.is_set():
                await self._has_room.wait()

    def on_entry(self, found: StreamEntry) -> None:
        """Deliver what the next entry holds, and tell first what is missing before it."""
        (major, minor), data, follows = found
        before, self._after = self._after, found.identity
        self._position = Position(major, minor, -1)  # and nothing of it yet
        self._is_whole = self._is_whole and follows and data != HOLE
        if data == HOLE:  # as a rule it is one of many
            return
        if not self._is_whole:
            self._is_whole = True
            if self._origins.is_current:
                self._note_gap(before)
            self._lost(Position(major, minor, 0).before())
        try:
            whole = self._joiner.join(data)
            packet = unpack(whole) if whole is not None else None
        except FormatError as error:
            self.books.unreadable += 1
            log.debug("entry not readable", extra={"error": str(error)})
            self._lose(found.identity)  # it may be messages of a newer version
            return
        if self._joiner.dropped:
            self.books.unreadable += self._joiner.dropped
            self._joiner.dropped = 0
        if packet is not None:
            self._take_packet(major, minor, packet)
        elif self._joiner.stray is not None and self._origins.awaits(*self._joiner.stray):
            # Its first parts are gone. Its messages would have stood where its last part stands.
            self._lose(found.identity)

    def _note_gap(self, after: Id) -> None:
        self.books.gaps += 1
        log.error("backplane lost messages", extra={"after": f"{after[0]}-{after[1]}"})

    def _lose(self, identity: Id) -> None:
        """Take note that an entry may have held messages, which nobody hears."""
        # What is said from now on, in an outage on this replica alone, comes after that.
        self._position = Position(*identity, BEHIND_ALL)
        self._lost(self._position)

    def _take_packet(self, major: int, minor: int, packet: Packet) -> None:
        origin, number, channels, opcodes, payloads, note = packet
        count = len(payloads)
        missing = self._origins.note(origin, number, count)
        if missing < 0:
            self.books.duplicates += 1
            return
        if missing:
            self.books.lost += missing
            log.error("backplane lost messages", extra={"count": missing})
            self._lost(Position(major, minor, 0).before())
        self._position = Position(major, minor, count - 1)
        # What was delivered here in an outage, and got into the log after all.
        if not self._left_out or number < self._left_out.get(origin, number + 1):
            places = zip(repeat(major), repeat(minor), range(count), strict=False)
            positions = map(_new_position, places)
            deliver = self._deliver
            columns = zip(positions, channels, opcodes, payloads, strict=True)
            for entry in map(_new_entry, columns):
                deliver(entry)
        if note is not None:
            self._hear_of(origin, note[STAMP.size :])
        if origin // LIVES == self._origin // LIVES:
            self._publishers.on_packet(origin, number, self._position)
            self._settling.on_packet(origin, number, self._position)
        if origin == self._origin and note is not None:
            self._came_back(note)

    def _hear_of(self, origin: int, note: bytes) -> None:
        replicas = self._replicas
        replica = origin // LIVES
        replicas[replica] = time.monotonic(), note
        replicas.move_to_end(replica)
        if len(replicas) > MAX_ORIGINS:
            replicas.popitem(last=False)

    # How things stand

    async def _watch(self) -> None:
        self._send_canary(time.monotonic())
        looked_at = time.monotonic()
        due = looked_at + CANARY_S
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            if now - looked_at > 2 * LOOK_S:  # the relay itself stood still, or was out of time
                self._excuse(now - looked_at)
            looked_at = now
            if now > self._read_back_until:
                self._expire_earlier()
            if not self._sent_at:
                if now >= due:
                    self._send_canary(now)
                    due = now + CANARY_S
            elif self._is_late(now):
                if self._answered_at:  # after a failover it may hang on to what was the primary
                    self._stream.distrust_reader()
                if self._is_out:  # the last one was lost
                    self._send_canary(now)
                else:
                    self._begin_outage(now)

    def _send_canary(self, now: float) -> None:
        self._sent_at, self._answered_at = now, 0.0
        outgoing = self._outbox[-1] if self._outbox else self._begin_packet()
        outgoing.is_canary = True

    def _is_late(self, now: float) -> bool:
        """Tell whether it takes the broker too long to answer, or to give back what it has.

        What it holds besides has to be read first, and is not while the relay has no room.
        """
        if self._in_flight is not None:
            return not self._is_out and now - self._in_flight_since > OUTAGE_AFTER_S
        if not self._answered_at or not self._has_room.is_set():
            return False
        return now - max(self._answered_at, self._behind_at) > OUTAGE_AFTER_S

    def _excuse(self, late_s: float) -> None:
        """Take note of time in which an answer could not be read."""
        self._in_flight_since += late_s
        self._behind_at += late_s
        if self._answered_at:
            self._answered_at += late_s

    def _came_back(self, note: bytes) -> None:
        if len(note) >= STAMP.size:
            self._complete_until = max(self._complete_until, *STAMP.unpack_from(note))
        if self._sent_at:
            self._observe_lag(time.monotonic() - self._sent_at)
            self._sent_at = 0.0
        # What is under way may be the canary itself: read before the answer came.
        self._in_flight_since = time.monotonic()
        if self.state is not BackplaneState.UP:
            log.info("backplane up")
            self.state = BackplaneState.UP
            self._is_out = False
            self._origins.is_current = True
            self.begun.set()
            self.up.set()

    def _begin_outage(self, now: float) -> None:
        """Give up what waits: who said it is told, or those who are here hear it alone.

        What the broker confirmed and did not give back yet is awaited for a while.
        """
        log.error("backplane outage", extra={"broker": self._address, "on_outage": self._on_outage})
        self._expire_earlier()
        self.books.outages += 1
        self.state = BackplaneState.OUTAGE
        self._is_out = True
        self.begun.set()
        self.up.clear()
        given_up = self._waiting
        self._outbox.clear()
        self._filled.clear()
        origin, number = self._origin, self._number
        if self._in_flight is not None and not self._in_flight.is_given_up:
            self._in_flight.is_given_up = True
            number = self._in_flight.number
            if self._next_read > number:  # it did get there
                self._pending.drained(given_up.pop(0).kept_bytes)
                number = self._number
        if self.relays_locally:
            self._left_out[origin] = number
            if len(self._left_out) > MAX_ORIGINS:
                self._left_out.popitem(last=False)
        is_read = self._next_read >= number
        # What was given up leaves a hole in the numbers that nobody should take for a loss.
        self._origin, self._first = _next_life(origin, number)
        self._number = self._first
        self._give_up_from(origin, number, given_up, is_read=is_read)
        self._settled.set()
        self._read_back_until = now + READ_BACK_S
        self._send_canary(now)

    def _give_up_from(
        self, origin: int, number: int, given_up: Sequence[OutgoingPacket], *, is_read: bool
    ) -> None:
        """Give up packets, and let nobody wait for them any more.

        Args:
            origin, number: of their first message.
            given_up: the packets.
            is_read: whether all messages before them were read.
        """
        publishers = deque(self._publishers.take_given_up(origin, number))
        settling = self._settling.take_given_up(origin, number)
        if not is_read:
            # Whoever comes from now on waits for the messages of this life, too: also a client
            # that leaves because it is told below that its message is given up.
            for waiter in (*settling, Confirmation(origin, number, lambda _: None)):
                self._settling.add(origin, number, waiter.answer)
        following = number
        for outgoing in given_up:
            self._give_up(outgoing, following, publishers)
            following += len(outgoing.payloads)
        for waiter in publishers:
            waiter.answer(None)
        if is_read:
            for waiter in settling:
                waiter.answer(None)

    def _expire_earlier(self) -> None:
        """Let nobody wait any more for messages of earlier lives."""
        self._publishers.expire(self._origin)
        self._settling.expire(self._origin)

    @property
    def _on_outage(self) -> str:
        return "local" if self.relays_locally else "reject"

    def _give_up(
        self, outgoing: OutgoingPacket, number: int, publishers: deque[Confirmation]
    ) -> None:
        self._pending.drained(outgoing.kept_bytes)
        if self.relays_locally:
            columns = zip(outgoing.channels, outgoing.opcodes, outgoing.payloads, strict=True)
            for following, message in enumerate(columns, number + 1):
                self._deliver_here(*message)
                while publishers and publishers[0].following <= following:
                    publishers.popleft().answer(self._position)
        else:
            self.books.unavailable += len(outgoing.payloads)
            in_doubt = outgoing is self._in_flight
            for publisher in outgoing.publishers:
                publisher.tell_unavailable(in_doubt=in_doubt)

    def _turn_away(self, channel: str, opcode: int, payload: bytes, publisher: Rejectable) -> None:
        if self.relays_locally:
            self._deliver_here(channel, opcode, payload)
        else:
            self.books.unavailable += 1
            publisher.tell_unavailable(in_doubt=False)

    def _deliver_here(self, channel: str, opcode: int, payload: bytes) -> None:
        major, minor, nth = self._position
        self._position = Position(major, minor, nth + 1)
        self.books.local += 1
        self._deliver(LogEntry(self._position, channel, opcode, payload))

    def _note_failure(self, action: str, error: Exception) -> None:
        texts = self._failures.setdefault(action, set())
        text = str(error) or "not answered in time"
        if text not in texts and len(texts) < MAX_TEXTS:
            texts.add(text)
            facts = {"broker": self._address, "action": action, "error": text}
            log.warning("backplane failed", extra=facts)

    def _note_success(self, action: str) -> None:
        if action in self._failures:
            del self._failures[action]
            log.info("backplane works again", extra={"action": action})


def broker_error(error: Exception, secrets: Sequence[str], *, is_usual: bool) -> BrokerError:
    """Return what is said of an error of a broker's library: in one line, without secrets.

    Args:
        is_usual: whether it is one that the library means to raise. What comes of an answer that
            makes no sense may be any.
    """
    text = str(error) or "not answered in time"
    if isinstance(error, RuntimeError):  # what uvloop says of a transport that is closed
        text = "connection lost"
    elif not is_usual:
        text = f"not understood: {type(error).__name__}: {text}"
    return BrokerError(redact(secrets, text))


def reset_on_close(writer: asyncio.StreamWriter) -> None:
    """Let a connection end at once when it is aborted, and nobody have what is left in it.

    Otherwise it lives on until the broker has taken that, which a frozen one never does. Asked for
    at the beginning: a transport that is closed does not say which socket it had.

    Raises:
        BrokerError: it is closed already.
    """
    connected = writer.get_extra_info("socket")
    if connected is None:
        raise BrokerError("connection lost")
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def _first_life() -> int:
    return random.getrandbits(48) * LIVES


def _next_life(origin: int, number: int) -> tuple[int, int]:
    """Return what follows on a life whose messages before a number are confirmed; and its first."""
    following = origin + 1
    return (following, number) if following % LIVES else (_first_life(), 0)


async def _pause(pause_s: float) -> float:
    """Wait after a failure; return how long to wait after the next."""
    await asyncio.sleep(pause_s * random.uniform(0.5, 1))
    return min(2 * pause_s, PAUSE_S[1])
