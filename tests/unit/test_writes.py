"""Writes that fail or are sent in parts: counters and closes. Runs in the test's process."""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import cast

import pytest
from websocket_relay.counters import Counters
from websocket_relay.messages import Message
from websocket_relay.outcomes import Close, Drop
from websocket_relay.refusals import Refusals
from websocket_relay.wire.connection import Connection, WireProtocol
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.delivery_format import PLAIN_FORMAT
from websocket_relay.wire.flow_control import HighWaterMark
from websocket_relay.wire.frames import close, count_complete_messages
from websocket_relay.wire.partial_messages import PartialMessages
from websocket_relay.wire.send_backlog import WRITE_BYTES, SendBacklog, SendBacklogs
from websocket_relay.wire.websocket import WebSocket

from tests.support.raw_client import TEXT, RawClient, relayed_frame
from tests.support.relay_process import HOST, eventually

pytestmark = pytest.mark.fast

MIB = 1_048_576
HELLO = relayed_frame(TEXT, b"hello")


class NullSink:
    """A sink that does nothing."""

    channel_names = ()

    def publish(self, publisher: WireProtocol, messages: Sequence[Message]) -> None: ...
    def pause_if_over_limit(self, publisher: WireProtocol) -> None: ...
    def detach_connection(self, client: Connection) -> None: ...
    def on_backlog_started(self, client: Connection) -> None: ...
    def on_backlog_drained(self, client: Connection) -> None: ...
    def call_when_written(self, callback: Callable[[], None]) -> None: ...


@pytest.fixture
def context() -> ConnectionContext:
    counters = Counters()
    return ConnectionContext(
        max_message_bytes=MIB,
        max_channels_per_connection=1,
        compresses=False,
        deadline_s=5,
        ping_interval_s=20,
        counters=counters,
        refusals=Refusals(counters),
        backlogs=SendBacklogs(MIB, 8 * MIB),
        partial_messages=PartialMessages(MIB),
        unparsed=HighWaterMark(MIB),
        pending_appends=HighWaterMark(MIB),
        pending_fan_out=HighWaterMark(MIB),
    )


@asynccontextmanager
async def connected(
    context: ConnectionContext, count: int
) -> AsyncIterator[list[tuple[Connection, RawClient]]]:
    """Yield pairs: a connection of the relay, and the client at its other end."""
    accepted: asyncio.Queue[Connection] = asyncio.Queue()

    class OpenConnection(Connection):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.open(b"start", PLAIN_FORMAT)
            self.attach_sink(NullSink())
            accepted.put_nowait(self)

    def new_connection() -> OpenConnection:
        return OpenConnection(context, WebSocket)

    listening = socket.create_server((HOST, 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    server = await asyncio.get_running_loop().create_server(new_connection, sock=listening)
    port = listening.getsockname()[1]
    pairs = []
    try:
        for _ in range(count):
            raw = await RawClient.connect(HOST, port, receive_buffer_bytes=4096)
            assert await raw.read_exactly(5) == b"start"
            pairs.append((await accepted.get(), raw))
        yield pairs
    finally:
        for _, raw in pairs:
            raw.socket.close()
        server.close()


async def wait_for_closes(context: ConnectionContext, reason: Close, count: int) -> None:
    async def look() -> tuple[bool, object]:
        return context.counters.closes[reason] == count, context.counters.closes

    await eventually(look, f"{count} of {reason}")


async def test_a_failed_write_closes_its_client_and_no_other(
    context: ConnectionContext, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(context, 3) as [(first, one), (failing, two), (last, three)]:
        failing.transport.write_eof()  # each further write raises
        assert await two.read_to_end() == b""
        with caplog.at_level(logging.ERROR):
            context.write([first, failing, last], HELLO, messages=2)
        assert await one.read_message() == await three.read_message() == "hello"
        await wait_for_closes(context, Close.INTERNAL_ERROR, 1)
        assert len(context.clients) == 2
    assert context.counters.deliveries == 4
    assert context.counters.sent_bytes == 2 * len(HELLO)
    assert context.counters.drops[Drop.DISCONNECTED] == 2
    assert {record.message for record in caplog.records} == {"write failed"}
    assert all(record.exc_info is not None for record in caplog.records)


async def test_a_client_receives_a_close_frame_after_a_failed_write(
    context: ConnectionContext, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(context, 1) as [(client, raw)]:
        context.write([client], cast(bytes, "no bytes"), messages=1)
        assert await raw.complete_close() == (1011, "internal error")
        await wait_for_closes(context, Close.INTERNAL_ERROR, 1)
    assert context.counters.drops[Drop.DISCONNECTED] == 1
    assert [record.message for record in caplog.records] == ["write failed"]


async def test_after_a_failed_write_only_the_close_frame_stays_in_a_full_send_buffer(
    context: ConnectionContext,
) -> None:
    async with connected(context, 1) as [(client, _)]:
        connection = client.transport.get_extra_info("socket")
        with suppress(BlockingIOError):
            while True:
                os.write(connection.fileno(), bytes(1))
        context.write([client], cast(bytes, "no bytes"), messages=1)
        assert client.backlog_bytes == len(close(1011, "internal error"))
        assert client.memory_bytes == 0
    assert context.counters.deliveries == 0
    assert context.counters.drops[Drop.DISCONNECTED] == 1


async def test_a_write_to_a_closed_transport_is_counted_as_a_drop_without_an_error(
    context: ConnectionContext, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(context, 1) as [(client, raw)]:
        write = client.write
        assert write is not None
        raw.reset()
        await wait_for_closes(context, Close.CONNECTION_LOST, 1)
        with pytest.raises(OSError, match="Bad file descriptor"):
            write(HELLO)
        client.write = write  # as if the transport closed during the write
        context.write([client], HELLO, messages=1)
    assert context.counters.drops[Drop.DISCONNECTED] == 1
    assert context.counters.deliveries == 0
    assert caplog.records == []


async def test_a_socket_that_is_full_between_two_batches_takes_nothing_of_the_next(
    context: ConnectionContext,
) -> None:
    """TLS and control frames write of themselves. Their bytes are no batch of a channel."""
    async with connected(context, 2) as [(full, raw), (other, reading)]:
        full.transport.write(bytes(MIB))
        assert context.backlogs.total_bytes == 0, "no batch waits"
        assert len(context.backlogs) == 1
        context.write([other], HELLO, messages=1)
        assert await reading.read_message() == "hello"
        full.write_control(close(1000, "later"))
        context.write([full, other], HELLO, messages=1)
        assert context.counters.deliveries == 2
        assert await reading.read_message() == "hello"
        assert await raw.read_exactly(MIB) == bytes(MIB)
        assert await raw.read_exactly(len(close(1000, "later"))) == close(1000, "later")
        assert await raw.read_message() == "hello"

        async def is_free() -> tuple[bool, object]:
            return not len(context.backlogs), context.counters.deliveries

        await eventually(is_free, "no backlog")
        assert context.counters.deliveries == 3
        context.write([full], HELLO, messages=1)
        assert await raw.read_message() == "hello"


async def test_a_connection_that_is_lost_between_two_batches_disturbs_no_other(
    context: ConnectionContext,
) -> None:
    async with connected(context, 2) as [(lost, raw), (other, reading)]:
        lost.transport.write(bytes(MIB))
        raw.reset()
        await wait_for_closes(context, Close.CONNECTION_LOST, 1)
        assert len(context.backlogs) == 0
        context.write([other], HELLO, messages=1)
        assert await reading.read_message() == "hello"


async def test_a_partly_sent_write_counts_with_all_of_its_memory(
    context: ConnectionContext,
) -> None:
    message = relayed_frame(TEXT, bytes(MIB - 100))
    async with connected(context, 1) as [(client, raw)]:
        context.write([client], message, messages=1)
        assert client.backlog_bytes < client.memory_bytes == len(message) + WRITE_BYTES
        assert context.backlogs.total_bytes == client.memory_bytes
        await raw.read_exactly(MIB * 3 // 4)

        async def look() -> tuple[bool, object]:
            return client.backlog_bytes <= MIB // 4, client.backlog_bytes

        await eventually(look, "three quarters sent")
        assert client.memory_bytes == len(message) + WRITE_BYTES
        assert context.counters.deliveries == 0
        await raw.read_exactly(len(message) - MIB * 3 // 4)

        async def is_free() -> tuple[bool, object]:
            return not client.memory_bytes, client.memory_bytes

        await eventually(is_free, "memory freed")
        assert client.backlog_bytes == 0
        assert context.counters.deliveries == 1


def test_small_writes_are_joined_and_large_ones_are_split() -> None:
    backlog = SendBacklog(count_complete_messages)
    memory_bytes = backlog.add_blocked_write(bytes(10), 1)
    memory_bytes += sum(
        backlog.add_write(each, 1) for each in (b"a" * 3, b"b" * 4, b"c" * 20, b"d")
    )
    assert backlog.memory_bytes == memory_bytes == 38 + 5 * WRITE_BYTES
    assert backlog.unsent_bytes(10) == 38
    assert backlog.advance() == 1
    pieces, completed = [], []
    while piece := backlog.next_chunk(8):
        pieces.append(bytes(piece))
        completed.append(backlog.advance())
    assert pieces == [b"aaabbbb", b"c" * 8, b"c" * 8, b"ccccd"]
    assert completed == [2, 0, 0, 2]
    assert (backlog.memory_bytes, backlog.unsent_bytes(0), backlog.drained(0)) == (0, 0, 38)


def test_the_complete_messages_in_a_partly_sent_backlog_are_counted() -> None:
    """Two writes, of two frames and of one, of seven bytes each. Only whole frames count."""
    for unsent_bytes, sent in {0: 3, 1: 2, 8: 1, 14: 1, 15: 0, 22: 0}.items():
        backlog = SendBacklog(count_complete_messages)
        backlog.add_blocked_write(HELLO * 2, 2)
        backlog.add_write(HELLO + b"", 1)
        assert backlog.count_sent_messages(unsent_bytes) == (sent, 3 - sent), unsent_bytes
