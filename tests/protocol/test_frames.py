"""Frames of several clients: fragments, cuts, and the effect of a protocol violation on others.

test_rfc_6455_cases has all cases of one client alone in its channel.
"""

import asyncio
import struct
from contextlib import suppress

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.support.raw_client import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PATIENCE_S,
    PING,
    PONG,
    TEXT,
    Frame,
    close_payload,
    frame,
)
from tests.support.relay_process import RelayProcess, path_of, receive
from tests.support.rfc_cases import read_frame_except_pings

MIB = 1_048_576
E_ACUTE = "é".encode()


def declared(size: int) -> bytes:
    """Encode the header of a binary frame that declares this payload size."""
    return struct.pack("!BBQ", 0x80 | BINARY, 0x80 | 127, size) + bytes(4)


# Fragments and cuts


async def test_a_fragmented_message_is_relayed_as_one_frame(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.raw_client(channel) as sender, relay.client(channel) as other:
        await sender.send(frame(TEXT, b"one ", fin=False))
        await sender.send(frame(CONTINUATION, b"", fin=False))
        await sender.send(frame(CONTINUATION, b"two ", fin=False))
        await sender.send(frame(CONTINUATION, b"three"))
        assert await receive(other) == "one two three"
        assert await read_frame_except_pings(sender) == Frame(TEXT, b"one two three", fin=True)


async def test_a_message_between_the_fragments_of_another_client_is_not_mixed_with_them(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.raw_client(channel) as slow, relay.client(channel) as other:
        await slow.send(frame(TEXT, b"started ", fin=False))
        await other.send("in between")
        assert await receive(other) == "in between"
        assert await slow.read_message() == "in between"
        await slow.send(frame(CONTINUATION, b"and finished"))
        assert await receive(other) == "started and finished"


async def test_frames_that_arrive_byte_by_byte_make_the_same_messages(
    relay: RelayProcess, channel: str
) -> None:
    wire = (
        frame(TEXT, "héllo".encode())
        + frame(BINARY, bytes(200))
        + frame(TEXT, b"cut in " + E_ACUTE[:1], fin=False)
        + frame(PING, b"alive")
        + frame(CONTINUATION, E_ACUTE[1:] + b" two")
        + frame(TEXT)
    )
    async with relay.raw_client(channel) as sender, relay.client(channel) as other:
        await sender.send_one_byte_at_a_time(wire)
        for expected in ("héllo", bytes(200), "cut in é two", ""):
            assert await receive(other) == expected
        opcodes = [(await read_frame_except_pings(sender)).opcode for _ in range(5)]
        assert sorted(opcodes) == [TEXT, TEXT, TEXT, BINARY, PONG]


async def test_a_frame_cut_at_any_byte_makes_the_same_message(
    relay: RelayProcess, channel: str
) -> None:
    wire = frame(BINARY, bytes(range(126)))
    async with relay.raw_client(channel) as raw:
        for cut in range(1, len(wire)):
            await raw.send(wire[:cut])
            await raw.send(wire[cut:] + frame(TEXT, b"next"))
            assert await raw.read_message() == bytes(range(126)), cut
            assert await raw.read_message() == "next", cut


async def test_many_frames_in_one_write_make_as_many_messages(
    relay: RelayProcess, channel: str
) -> None:
    numbers = [str(number) for number in range(2_000)]
    async with relay.raw_client(channel) as raw:
        await raw.send(b"".join(frame(TEXT, number.encode()) for number in numbers))
        assert [await raw.read_message() for _ in numbers] == numbers


async def test_frames_sent_with_the_upgrade_request_are_relayed(
    relay: RelayProcess, channel: str
) -> None:
    frames = frame(TEXT, b"first") + frame(BINARY, b"second")
    async with relay.client(channel) as other:
        async with relay.raw_client(channel, trailing=frames) as eager:
            assert await eager.read_message() == "first"
            assert await eager.read_message() == b"second"
        assert await receive(other) == "first"
        assert await receive(other) == b"second"


async def test_a_mebibyte_of_frames_sent_with_the_upgrade_request_is_relayed(
    relay: RelayProcess, channel: str
) -> None:
    texts = [f"{number} ".ljust(1_000, "x") for number in range(1_000)]
    frames = b"".join(frame(TEXT, text.encode()) for text in texts)
    async with relay.raw_client(channel, trailing=frames) as eager:
        assert [await eager.read_message() for _ in texts] == texts


async def test_pings_and_pongs_are_not_relayed(relay: RelayProcess, channel: str) -> None:
    async with relay.raw_client(channel) as raw, relay.raw_client(channel) as other:
        await raw.send(frame(PING, b"private") + frame(PONG, b"private") + frame(TEXT, b"public"))
        received = await other.read_frame()
        while received.opcode != TEXT:
            assert received.payload != b"private"  # the relay has pings of its own
            received = await other.read_frame()
        assert received == Frame(TEXT, b"public", fin=True)


async def test_a_message_of_one_mebibyte_in_fragments_is_accepted(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.raw_client(channel) as raw:
        await raw.send(frame(BINARY, bytes(MIB - 1), fin=False) + frame(CONTINUATION, b"x"))
        assert await raw.read_message() == bytes(MIB - 1) + b"x"


# Protocol violations

UNMASKED = frame(TEXT, b"bare", mask=False)
VIOLATIONS = [  # one of each kind: test_rfc_6455_cases has all of them
    pytest.param(UNMASKED, 1002, id="unmasked frame"),
    pytest.param(
        frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), 1002, id="text inside a message"
    ),
    pytest.param(frame(CLOSE, b"\x03"), 1002, id="close of one byte"),
    pytest.param(frame(TEXT, b"\xff"), 1007, id="text that is not UTF-8"),
    pytest.param(frame(BINARY, bytes(MIB + 1)), 1009, id="one byte too many"),
    pytest.param(
        frame(BINARY, bytes(MIB), fin=False) + frame(CONTINUATION, b"x"),
        1009,
        id="one byte too many in fragments",
    ),
    pytest.param(declared(2**62), 1009, id="declared size of 2^62 bytes"),
]


@pytest.mark.parametrize(("wire", "code"), VIOLATIONS)
async def test_a_violation_is_answered_with_its_close_code_and_affects_no_other_client(
    relay: RelayProcess, channel: str, wire: bytes, code: int
) -> None:
    before = await relay.metric("websocket_closes_total", code=str(code))
    async with relay.client(channel) as other:
        async with relay.raw_client(channel) as violating:
            await violating.send(wire)
            assert (await violating.read_close_frame())[0] == code
            await violating.send(frame(CLOSE, close_payload(code)))
            await violating.read_to_end()
        await relay.await_metric("websocket_connected_clients", 1)
        await other.send("still here")
        assert await receive(other) == "still here"
    await relay.await_metric("websocket_closes_total", before + 1, code=str(code))


async def test_messages_before_a_violation_are_relayed_and_none_after_it(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as other:
        async with relay.raw_client(channel) as violating:
            await violating.send(frame(TEXT, b"before") + UNMASKED + frame(TEXT, b"after"))
            assert await receive(other) == "before"
            assert (await violating.read_close_frame())[0] == 1002
        await relay.await_metric("websocket_connected_clients", 1)
        await other.send("still here")
        assert await receive(other) == "still here"


async def test_a_library_client_receives_1009_for_a_message_over_the_limit(
    relay: RelayProcess, channel: str
) -> None:
    def close_code_of_an_oversized_message() -> int | None:
        with connect(relay.ws_url(path_of(channel)), proxy=None) as client:
            with suppress(ConnectionClosed):
                client.send(bytes(4 * MIB))
                client.recv(PATIENCE_S)
            return client.close_code

    assert await asyncio.to_thread(close_code_of_an_oversized_message) == 1009


async def test_bytes_that_are_not_http_affect_no_other_client(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as other, await relay.connect_tcp() as raw:
        await raw.send(b"\x16\x03\x01\x02\x00 this is not HTTP\r\n\r\n\xff\xfe")
        await raw.read_to_end()
        await other.send("still here")
        assert await receive(other) == "still here"
