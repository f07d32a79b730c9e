"""Frames of several clients: how they may be cut and mixed, and what a breach means to others.

What one client may say and has to hear is in test_rfc_6455_cases.
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
from tests.support.relay_process import Relay, path_of, receive
from tests.support.rfc_cases import next_frame

MIB = 1_048_576
E_ACUTE = "é".encode()


def claim(size: int) -> bytes:
    """The head of a binary frame that says it is this long."""
    return struct.pack("!BBQ", 0x80 | BINARY, 0x80 | 127, size) + bytes(4)


# What may be cut and mixed


async def test_a_fragmented_message_is_relayed_as_one(relay: Relay, channel: str) -> None:
    async with relay.raw_client(channel) as sender, relay.client(channel) as other:
        await sender.send(frame(TEXT, b"one ", fin=False))
        await sender.send(frame(CONTINUATION, b"", fin=False))
        await sender.send(frame(CONTINUATION, b"two ", fin=False))
        await sender.send(frame(CONTINUATION, b"three"))
        assert await receive(other) == "one two three"
        assert await next_frame(sender) == Frame(TEXT, b"one two three", fin=True)


async def test_a_message_between_another_senders_fragments_does_not_mix_with_them(
    relay: Relay, channel: str
) -> None:
    async with relay.raw_client(channel) as slow, relay.client(channel) as other:
        await slow.send(frame(TEXT, b"begun ", fin=False))
        await other.send("in between")
        assert await receive(other) == "in between"
        assert await slow.message() == "in between"
        await slow.send(frame(CONTINUATION, b"and ended"))
        assert await receive(other) == "begun and ended"


async def test_frames_delivered_one_byte_at_a_time_make_the_same_messages(
    relay: Relay, channel: str
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
        opcodes = [(await next_frame(sender)).opcode for _ in range(5)]
        assert sorted(opcodes) == [TEXT, TEXT, TEXT, BINARY, PONG]


async def test_a_frame_cut_at_any_byte_is_the_same_message(relay: Relay, channel: str) -> None:
    wire = frame(BINARY, bytes(range(126)))
    async with relay.raw_client(channel) as raw:
        for cut in range(1, len(wire)):
            await raw.send(wire[:cut])
            await raw.send(wire[cut:] + frame(TEXT, b"next"))
            assert await raw.message() == bytes(range(126))
            assert await raw.message() == "next"


async def test_many_frames_in_one_packet_are_as_many_messages(relay: Relay, channel: str) -> None:
    numbers = [str(number) for number in range(2_000)]
    async with relay.raw_client(channel) as raw:
        await raw.send(b"".join(frame(TEXT, number.encode()) for number in numbers))
        assert [await raw.message() for _ in numbers] == numbers


async def test_frames_right_behind_the_upgrade_request_are_not_lost(
    relay: Relay, channel: str
) -> None:
    behind = frame(TEXT, b"first") + frame(BINARY, b"second")
    async with relay.client(channel) as other:
        async with relay.raw_client(channel, behind=behind) as eager:
            assert await eager.message() == "first"
            assert await eager.message() == b"second"
        assert await receive(other) == "first"
        assert await receive(other) == b"second"


async def test_many_frames_right_behind_the_upgrade_request_are_not_lost(
    relay: Relay, channel: str
) -> None:
    texts = [f"{number} ".ljust(1_000, "x") for number in range(1_000)]
    behind = b"".join(frame(TEXT, text.encode()) for text in texts)
    async with relay.raw_client(channel, behind=behind) as eager:
        assert [await eager.message() for _ in texts] == texts


async def test_a_ping_is_for_the_relay_and_not_for_the_channel(relay: Relay, channel: str) -> None:
    async with relay.raw_client(channel) as raw, relay.raw_client(channel) as other:
        await raw.send(frame(PING, b"private") + frame(PONG, b"private") + frame(TEXT, b"public"))
        received = await other.frame()
        while received.opcode != TEXT:
            assert received.payload != b"private"  # the relay has pings of its own
            received = await other.frame()
        assert received == Frame(TEXT, b"public", fin=True)


# What breaks a connection

UNMASKED = frame(TEXT, b"bare", mask=False)
BREACHES = [  # one of each kind: test_rfc_6455_cases has them all
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
        id="one byte too many by fragments",
    ),
    pytest.param(claim(2**62), 1009, id="a claim of 2^62 bytes"),
]


@pytest.mark.parametrize(("wire", "code"), BREACHES)
async def test_a_breach_is_answered_with_its_close_code_and_hurts_nobody_else(
    relay: Relay, channel: str, wire: bytes, code: int
) -> None:
    before = await relay.metric("websocket_closes_total", code=str(code))
    async with relay.client(channel) as bystander:
        async with relay.raw_client(channel) as culprit:
            await culprit.send(wire)
            assert (await culprit.close_frame())[0] == code
            await culprit.send(frame(CLOSE, close_payload(code)))
            await culprit.ended()
        await relay.metric_is("websocket_connected_clients", 1)
        await bystander.send("still here")
        assert await receive(bystander) == "still here"
    await relay.metric_is("websocket_closes_total", before + 1, code=str(code))


async def test_a_claim_of_2_to_the_63_bytes_is_a_breach_and_takes_no_memory(
    relay: Relay, channel: str
) -> None:
    before_bytes = relay.rss_bytes()
    async with relay.raw_client(channel) as culprit:
        await culprit.send(claim(2**63))
        assert (await culprit.close_frame())[0] == 1002
    assert relay.rss_bytes() < before_bytes + 32 * MIB


async def test_nothing_behind_a_breach_is_relayed(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as bystander:
        async with relay.raw_client(channel) as culprit:
            await culprit.send(UNMASKED + frame(TEXT, b"behind"))
            assert (await culprit.close_frame())[0] == 1002
        await relay.metric_is("websocket_connected_clients", 1)
        await bystander.send("still here")
        assert await receive(bystander) == "still here"


async def test_what_came_before_a_breach_is_relayed(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as bystander, relay.raw_client(channel) as culprit:
        await culprit.send(frame(TEXT, b"before") + UNMASKED)
        assert await receive(bystander) == "before"
        assert (await culprit.close_frame())[0] == 1002


async def test_a_message_of_one_mebibyte_in_fragments_is_allowed(
    relay: Relay, channel: str
) -> None:
    async with relay.raw_client(channel) as raw:
        await raw.send(frame(BINARY, bytes(MIB - 1), fin=False) + frame(CONTINUATION, b"x"))
        assert await raw.message() == bytes(MIB - 1) + b"x"


async def test_a_usual_client_learns_that_its_message_was_too_big(
    relay: Relay, channel: str
) -> None:
    def send_too_much() -> int | None:
        with connect(relay.ws_url(path_of(channel)), proxy=None) as client:
            with suppress(ConnectionClosed):
                client.send(bytes(4 * MIB))
                client.recv(PATIENCE_S)
            return client.close_code

    assert await asyncio.to_thread(send_too_much) == 1009


async def test_bytes_that_are_no_http_at_all_hurt_nobody(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as bystander, await relay.tcp() as stranger:
        await stranger.send(b"\x16\x03\x01\x02\x00 this is not HTTP\r\n\r\n\xff\xfe")
        await stranger.ended()
        await bystander.send("still here")
        assert await receive(bystander) == "still here"
