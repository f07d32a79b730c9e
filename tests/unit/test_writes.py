"""Writes that fail, or leave in parts: what is counted, and who is ended. In this process."""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import cast

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState
from websocket_relay.counters import Counters
from websocket_relay.outcomes import Close, Drop
from websocket_relay.wire.connection import Connection, Publisher
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.deflate import PLAIN
from websocket_relay.wire.flow_control import HighWaterMark
from websocket_relay.wire.frames import close, count_complete_messages
from websocket_relay.wire.partial_messages import PartialMessages
from websocket_relay.wire.send_backlog import WRITE_BYTES, SendBacklog, SendBacklogs
from websocket_relay.wire.websocket import WebSocketConnection

from tests.support.raw_client import TEXT, RawClient, relayed_frame
from tests.support.relay_process import HOST, eventually

MIB = 1_048_576
HELLO = relayed_frame(TEXT, b"hello")


class Room:
    """A sink that does nothing."""

    def publish(self, client: Publisher, opcode: int, payload: bytes) -> None: ...
    def pause_if_over_limit(self, client: Publisher) -> None: ...
    def detach_connection(self, client: Connection) -> None: ...
    def on_backlog_started(self, client: Connection) -> None: ...
    def on_backlog_drained(self, client: Connection) -> None: ...
    def call_when_written(self, act: Callable[[], None]) -> None: ...


@pytest.fixture
def shared() -> ConnectionContext:
    return ConnectionContext(
        max_message_bytes=MIB,
        compresses=False,
        deadline_s=5,
        counters=Counters(),
        backlogs=SendBacklogs(MIB, 8 * MIB),
        partial_messages=PartialMessages(MIB),
        unparsed=HighWaterMark(MIB),
        pending_appends=HighWaterMark(MIB),
        pending_fan_out=HighWaterMark(MIB),
    )


@asynccontextmanager
async def connected(
    shared: ConnectionContext, count: int
) -> AsyncIterator[list[tuple[Connection, RawClient]]]:
    """Give pairs: a connection as the relay has it, and what is at its other end."""
    made: asyncio.Queue[Connection] = asyncio.Queue()

    class Opened(WebSocketConnection):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.open(b"begun", PLAIN)
            self.attach_sink(Room())
            made.put_nowait(self)

    def connection() -> Opened:
        return Opened(cast(Config, None), cast(ServerState, None), {}, shared=shared)

    listening = socket.create_server((HOST, 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    server = await asyncio.get_running_loop().create_server(connection, sock=listening)
    port = listening.getsockname()[1]
    pairs = []
    try:
        for _ in range(count):
            raw = await RawClient.to(HOST, port, receive_buffer_bytes=4096)
            assert await raw.exactly(5) == b"begun"
            pairs.append((await made.get(), raw))
        yield pairs
    finally:
        for _, raw in pairs:
            raw.socket.close()
        server.close()


async def closes_are(shared: ConnectionContext, why: Close, count: int) -> None:
    async def look() -> tuple[bool, object]:
        return shared.counters.closes[why] == count, shared.counters.closes

    await eventually(look, f"{count} of {why}")


async def test_a_write_that_fails_ends_its_client_and_no_other(
    shared: ConnectionContext, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(shared, 3) as [(first, one), (failing, two), (last, three)]:
        failing._transport.write_eof()  # what is written from now on raises
        with caplog.at_level(logging.ERROR):
            shared.write([first, failing, last], HELLO, messages=2)
        assert await one.message() == await three.message() == "hello"
        assert await two.ended() == b""
        await closes_are(shared, Close.INTERNAL, 1)
        assert len(shared.clients) == 2
    assert shared.counters.deliveries == 4
    assert shared.counters.sent_bytes == 2 * len(HELLO)
    assert shared.counters.drops[Drop.DISCONNECTED] == 2
    assert {record.message for record in caplog.records} == {"write failed"}
    assert all(record.exc_info is not None for record in caplog.records)


async def test_a_client_that_can_still_be_told_is_told_that_a_write_failed(
    shared: ConnectionContext, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(shared, 1) as [(client, raw)]:
        shared.write([client], cast(bytes, "no bytes"), messages=1)
        assert await raw.answer_close() == (1011, "internal error")
        await closes_are(shared, Close.INTERNAL, 1)
    assert shared.counters.drops[Drop.DISCONNECTED] == 1
    assert [record.message for record in caplog.records] == ["write failed"]


async def test_where_a_write_fails_and_the_close_frame_fills_the_socket_it_alone_waits(
    shared: ConnectionContext,
) -> None:
    async with connected(shared, 1) as [(client, _)]:
        connection = client._transport.get_extra_info("socket")
        with suppress(BlockingIOError):
            while True:
                os.write(connection.fileno(), bytes(1))
        shared.write([client], cast(bytes, "no bytes"), messages=1)
        assert client.memory_bytes == len(close(1011, "internal error")) + WRITE_BYTES
    assert shared.counters.deliveries == 0
    assert shared.counters.drops[Drop.DISCONNECTED] == 1


async def test_a_write_to_a_transport_that_has_closed_is_a_drop_and_no_error(
    shared: ConnectionContext, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(shared, 1) as [(client, raw)]:
        write = client.write
        raw.vanish()
        await closes_are(shared, Close.CONNECTION_LOST, 1)
        with pytest.raises(RuntimeError, match="the handler is closed"):
            write(HELLO)
        client.write = write  # as if the write were under way
        shared.write([client], HELLO, messages=1)
    assert shared.counters.drops[Drop.DISCONNECTED] == 1
    assert shared.counters.deliveries == 0
    assert caplog.records == []


async def test_a_write_that_has_left_in_part_is_held_whole(shared: ConnectionContext) -> None:
    data = relayed_frame(TEXT, bytes(MIB - 100))
    async with connected(shared, 1) as [(client, raw)]:
        shared.write([client], data, messages=1)
        assert client.backlog_bytes < client.memory_bytes == len(data) + WRITE_BYTES
        assert shared.backlogs.total_bytes == client.memory_bytes
        await raw.exactly(MIB * 3 // 4)

        async def look() -> tuple[bool, object]:
            return client.backlog_bytes <= MIB // 4, client.backlog_bytes

        await eventually(look, "three quarters sent")
        assert client.memory_bytes == len(data) + WRITE_BYTES
        assert shared.counters.deliveries == 0
        await raw.exactly(len(data) - MIB * 3 // 4)

        async def is_free() -> tuple[bool, object]:
            return not client.memory_bytes, client.memory_bytes

        await eventually(is_free, "let go of")
        assert client.backlog_bytes == 0
        assert shared.counters.deliveries == 1


def test_small_writes_leave_together_and_large_ones_in_pieces() -> None:
    backlog = SendBacklog(count_complete_messages)
    held = backlog.add_blocked_write(bytes(10), 1)
    held += sum(backlog.add_write(data, 1) for data in (b"a" * 3, b"b" * 4, b"c" * 20, b"d"))
    assert backlog.memory_bytes == held == 38 + 5 * WRITE_BYTES
    assert backlog.unsent_bytes(10) == 38
    assert backlog.advance() == 1
    pieces, done = [], []
    while piece := backlog.next_chunk(8):
        pieces.append(bytes(piece))
        done.append(backlog.advance())
    assert pieces == [b"aaabbbb", b"c" * 8, b"c" * 8, b"ccccd"]
    assert done == [2, 0, 0, 2]
    assert (backlog.memory_bytes, backlog.unsent_bytes(0), backlog.drained(0)) == (0, 0, 38)


@pytest.mark.parametrize(("unsent", "done"), [(0, 3), (1, 2), (8, 1), (14, 1), (15, 0), (22, 0)])
def test_what_a_cut_connection_took_can_be_read_off_its_frames(unsent: int, done: int) -> None:
    """Two writes: one of two frames of seven bytes and one of one; counted are whole ones."""
    backlog = SendBacklog(count_complete_messages)
    backlog.add_blocked_write(HELLO * 2, 2)
    backlog.add_write(HELLO + b"", 1)
    assert backlog.count_sent_messages(unsent) == (done, 3 - done)
