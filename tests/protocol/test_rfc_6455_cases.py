"""RFC 6455, case by case: a client alone in its channel, which receives its own messages."""

from collections.abc import Iterator

import pytest

from tests.support.raw_client import BINARY, PING, PONG, TEXT, Frame, frame
from tests.support.reference import Reference
from tests.support.relay_process import RelayProcess
from tests.support.rfc_cases import (
    CASES,
    CLOSED_BY_CLIENT,
    MIB,
    Pieces,
    RfcCase,
    fragments,
    one_case_per_outcome,
    parse_pieces,
    play_case,
    read_frame_except_pings,
    read_until_close,
)

ALL = [
    pytest.param(case, id=f"{group}, {case}") for group, cases in CASES.items() for case in cases
]
CHOSEN = [
    pytest.param(case, id=f"{group}, {case}")
    for group, cases in CASES.items()
    for case in one_case_per_outcome(cases)
]
MAX_REFERENCE_OCTETS = 70_000  # the reference handles one octet at a time
COMPRESSED_STARTS = (b"\xc1", b"\xc2", b"\x41", b"\x42")  # text or binary, with the bit RSV1


def starts_no_compressed_message(case: RfcCase) -> bool:
    return not any(each[:1] in COMPRESSED_STARTS for each in case.sent)


@pytest.mark.parametrize("case", ALL)
@pytest.mark.fast
def test_the_parser_and_the_reference_meet_the_rfc_in_all_cuts(case: RfcCase) -> None:
    expected = (list(case.expected), case.code)
    for pieces in Pieces:
        assert parse_pieces(pieces.cut(case.sent), inflates=False) == expected, pieces
        if starts_no_compressed_message(case):
            assert parse_pieces(pieces.cut(case.sent), inflates=True) == expected, pieces
    octets = b"".join(case.sent)
    if len(octets) <= MAX_REFERENCE_OCTETS:
        assert_reference_agrees(case, octets)


def assert_reference_agrees(case: RfcCase, octets: bytes) -> None:
    """Assert that the reference meets the RFC, and that the parser rejects the same octet."""
    reference = Reference(MIB)
    end = reference.feed(octets)
    messages = [(each.opcode, each.payload) for each in case.expected if each.opcode != PONG]
    assert reference.messages == messages
    assert reference.pongs == [each.payload for each in case.expected if each.opcode == PONG]
    assert reference.close_code == case.code
    if case.is_violation:
        until_violation = parse_pieces([octets[:end]], inflates=False)
        assert until_violation == (list(case.expected), case.code), "not at its first wrong octet"


@pytest.mark.parametrize("case", CHOSEN)
async def test_a_client_receives_what_the_rfc_requires_and_nothing_else(
    relay: RelayProcess, channel: str, case: RfcCase
) -> None:
    for pieces in Pieces:
        async with relay.raw_client(f"{channel}-{pieces.name}") as raw:
            await play_case(raw, case, pieces)


# Large messages and many


@pytest.fixture(scope="module")
def large_message_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """A relay for messages of up to 16 MiB."""
    limits = {"max_message_bytes": 16 * MIB, "send_backlog_bytes": 64 * MIB}
    with RelayProcess(tmp_path_factory.mktemp("large"), {"limits": limits}) as relay:
        yield relay
    assert relay.unexpected_lines == []


@pytest.mark.parametrize("size", [65_536, MIB, 16 * MIB])
async def test_a_large_message_in_one_frame_is_echoed(
    large_message_relay: RelayProcess, channel: str, size: int
) -> None:
    payload = (b"BAsd7&jh23" * (size // 10 + 1))[:size]
    for opcode in (TEXT, BINARY):
        async with large_message_relay.raw_client(channel) as raw:
            await raw.send(frame(opcode, payload) + CLOSED_BY_CLIENT)
            assert await read_until_close(raw) == ([Frame(opcode, payload, fin=True)], 1000)


@pytest.mark.parametrize(("size", "part"), [(MIB, 64), (4 * MIB, 65_536), (4 * MIB, MIB)])
async def test_a_large_message_in_fragments_is_echoed_as_one_frame(
    large_message_relay: RelayProcess, channel: str, size: int, part: int
) -> None:
    payload = (b"BAsd7&jh23" * (size // 10 + 1))[:size]
    parts = [payload[start : start + part] for start in range(0, size, part)]
    for opcode in (TEXT, BINARY):
        async with large_message_relay.raw_client(channel) as raw:
            await raw.send(b"".join(fragments(opcode, *parts)) + CLOSED_BY_CLIENT)
            assert await read_until_close(raw) == ([Frame(opcode, payload, fin=True)], 1000)


@pytest.mark.parametrize("opcode", [TEXT, BINARY], ids=["text", "binary"])
async def test_a_large_message_in_small_pieces_is_echoed(
    relay: RelayProcess, channel: str, opcode: int
) -> None:
    payload = b"*" * MIB
    octets = frame(opcode, payload) + CLOSED_BY_CLIENT
    sizes = [64] * 1_000 + [2_048] * (len(octets) // 2_048)
    async with relay.raw_client(channel) as raw:
        start = 0
        for size in sizes:
            await raw.send(octets[start : start + size])
            start += size
        assert start >= len(octets)
        assert await read_until_close(raw) == ([Frame(opcode, payload, fin=True)], 1000)


@pytest.mark.parametrize("size", [0, 64, 4_096])
async def test_hundreds_of_messages_are_echoed_one_after_another(
    relay: RelayProcess, channel: str, size: int
) -> None:
    async with relay.raw_client(channel) as raw:
        for number in range(400):
            opcode = BINARY if number % 2 else TEXT
            payload = (b"%d " % number * size)[:size]
            await raw.send(frame(opcode, payload))
            assert await read_frame_except_pings(raw) == Frame(opcode, payload, fin=True)


# The end of TCP


async def test_the_relay_closes_tcp_first_after_a_closing_handshake(
    relay: RelayProcess, channel: str
) -> None:
    """RFC 6455 section 7.1.1: the server closes first, so that the client's port is free."""
    async with relay.raw_client(channel) as raw:
        await raw.send(CLOSED_BY_CLIENT)
        assert await read_until_close(raw) == ([], 1000)  # while the client's end is open


async def test_the_relay_closes_tcp_after_a_violation_without_an_answer_to_its_close(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.raw_client(channel) as raw:
        await raw.send(frame(TEXT, b"bare", mask=False))
        assert await read_until_close(raw) == ([], 1002)
        await raw.send(frame(PING, b"late"))  # is discarded and causes no reset
        await raw.send(CLOSED_BY_CLIENT)
