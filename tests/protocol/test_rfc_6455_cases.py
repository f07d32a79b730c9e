"""RFC 6455, case by case: a client alone in its channel, which the relay echoes to."""

from collections.abc import Iterator

import pytest

from tests.support.raw_client import BINARY, PING, PONG, TEXT, Frame, frame
from tests.support.reference import Reference
from tests.support.relay_process import Relay
from tests.support.rfc_cases import (
    CASES,
    CLOSED_BY_CLIENT,
    MIB,
    Case,
    Pieces,
    chosen,
    fragments,
    heard_until_close,
    next_frame,
    parsed,
    play,
)

ALL = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{group}, {case}") for group, cases in CASES.items() for case in cases],
)
CHOSEN = [
    pytest.param(case, id=f"{group}, {case}")
    for group, cases in CASES.items()
    for case in chosen(cases)
]


def means_the_same_where_compression_was_agreed_on(case: Case) -> bool:
    return not any(one[:1] in (b"\xc1", b"\xc2", b"\x41", b"\x42") for one in case.sent)


@ALL
@pytest.mark.fast
def test_a_client_is_heard_as_the_rfc_says_however_its_octets_are_cut(case: Case) -> None:
    expected = (list(case.heard), case.code)
    for pieces in Pieces:
        assert parsed(pieces.cut(case.sent), inflates=False) == expected
        if means_the_same_where_compression_was_agreed_on(case):
            assert parsed(pieces.cut(case.sent), inflates=True) == expected


@ALL
@pytest.mark.fast
def test_the_reference_agrees_and_a_breach_is_found_with_its_first_wrong_octet(case: Case) -> None:
    reference, octets = Reference(MIB), b"".join(case.sent)
    until = reference.hear(octets)
    messages = [(one.opcode, one.payload) for one in case.heard if one.opcode != PONG]
    assert reference.messages == messages
    assert reference.pongs == [one.payload for one in case.heard if one.opcode == PONG]
    assert reference.close_code == case.code
    if case.is_breach:
        assert parsed([octets[:until]], inflates=False) == (list(case.heard), case.code)


@pytest.mark.parametrize("pieces", Pieces, ids=lambda pieces: pieces.value)
@pytest.mark.parametrize("case", CHOSEN)
async def test_a_client_hears_what_the_rfc_says_and_nothing_else(
    relay: Relay, channel: str, case: Case, pieces: Pieces
) -> None:
    async with relay.raw_client(channel) as raw:
        await play(raw, case, pieces)


# Big messages and many

KINDS = pytest.mark.parametrize("opcode", [TEXT, BINARY], ids=["text", "binary"])


@pytest.fixture(scope="module")
def wide_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay for messages of up to 16 MiB."""
    limits = {"max_message_bytes": 16 * MIB, "send_backlog_bytes": 64 * MIB}
    with Relay(tmp_path_factory.mktemp("wide"), {"limits": limits}) as relay:
        yield relay
    assert relay.complaints == []


@KINDS
@pytest.mark.parametrize("size", [65_536, 262_144, MIB, 4 * MIB, 8 * MIB, 16 * MIB])
async def test_a_big_message_in_one_frame_is_echoed(
    wide_relay: Relay, channel: str, opcode: int, size: int
) -> None:
    payload = (b"BAsd7&jh23" * (size // 10 + 1))[:size]
    async with wide_relay.raw_client(channel) as raw:
        await raw.send(frame(opcode, payload) + CLOSED_BY_CLIENT)
        assert await heard_until_close(raw) == ([Frame(opcode, payload, fin=True)], 1000)


@KINDS
@pytest.mark.parametrize("part", [64, 256, 1_024, 65_536, MIB, 4 * MIB])
async def test_a_big_message_in_fragments_is_echoed_as_one(
    wide_relay: Relay, channel: str, opcode: int, part: int
) -> None:
    payload = (b"BAsd7&jh23" * 419_431)[: 4 * MIB]
    parts = [payload[start : start + part] for start in range(0, len(payload), part)]
    async with wide_relay.raw_client(channel) as raw:
        await raw.send(b"".join(fragments(opcode, *parts)) + CLOSED_BY_CLIENT)
        assert await heard_until_close(raw) == ([Frame(opcode, payload, fin=True)], 1000)


@KINDS
@pytest.mark.parametrize("piece", [64, 256, 2_048])
async def test_a_big_message_may_come_in_small_pieces(
    relay: Relay, channel: str, opcode: int, piece: int
) -> None:
    payload = b"*" * MIB
    octets = frame(opcode, payload) + CLOSED_BY_CLIENT
    async with relay.raw_client(channel) as raw:
        for start in range(0, len(octets), piece):
            await raw.send(octets[start : start + piece])
        assert await heard_until_close(raw) == ([Frame(opcode, payload, fin=True)], 1000)


@KINDS
@pytest.mark.parametrize("size", [0, 16, 64, 256, 1_024, 4_096])
async def test_a_thousand_messages_are_echoed_one_after_another(
    relay: Relay, channel: str, opcode: int, size: int
) -> None:
    async with relay.raw_client(channel) as raw:
        for number in range(1_000):
            payload = (b"%d " % number * size)[:size]
            await raw.send(frame(opcode, payload))
            assert await next_frame(raw) == Frame(opcode, payload, fin=True)


# Who ends what


async def test_the_relay_ends_tcp_when_the_client_has_closed(relay: Relay, channel: str) -> None:
    """RFC 6455 section 7.1.1: the server first, so that the client's port is free at once."""
    async with relay.raw_client(channel) as raw:
        await raw.send(CLOSED_BY_CLIENT)
        assert await heard_until_close(raw) == ([], 1000)  # and TCP's end, with ours still open


async def test_a_breach_ends_tcp_without_an_answer_to_the_close(relay: Relay, channel: str) -> None:
    async with relay.raw_client(channel) as raw:
        await raw.send(frame(TEXT, b"bare", mask=False))
        assert await heard_until_close(raw) == ([], 1002)
        await raw.send(frame(PING, b"late"))  # is thrown away, and resets nothing
        await raw.send(CLOSED_BY_CLIENT)
