"""Channel names: a channel is a name in the path; other paths are refused before the upgrade."""

from collections.abc import Iterator

import pytest

from tests.support.admission import refusal_answer
from tests.support.raw_client import upgrade_request
from tests.support.relay_process import RelayProcess, path_of, receive

LONGEST = "x" * 128


@pytest.fixture(scope="module")
def two_channel_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """A relay with at most two channels at a time."""
    with RelayProcess(tmp_path_factory.mktemp("two"), {"channels": {"max_channels": 2}}) as relay:
        yield relay


async def assert_same_channel(relay: RelayProcess, path: str, other_path: str) -> None:
    async with relay.client(path=path) as first, relay.client(path=other_path) as second:
        await first.send(path)
        assert await receive(second) == path
        assert await receive(first) == path
        await second.send(other_path)
        assert await receive(first) == other_path


async def test_channels_with_different_names_share_no_messages(
    relay: RelayProcess, channel: str
) -> None:
    """Names that differ in case are different."""
    async with relay.client(f"{channel}A") as first, relay.client(f"{channel}a") as second:
        await first.send("first")
        await second.send("second")
        assert await receive(first) == "first"
        assert await receive(second) == "second"


async def test_the_root_is_the_channel_default(relay: RelayProcess) -> None:
    await assert_same_channel(relay, "/", "/channels/default")


async def test_a_query_is_no_part_of_the_name(relay: RelayProcess, channel: str) -> None:
    await assert_same_channel(relay, f"{path_of(channel)}?", path_of(channel))


async def test_a_channel_ends_with_its_last_client(relay: RelayProcess, channel: str) -> None:
    await relay.await_metric("websocket_channels", 0)
    async with relay.client(channel), relay.client(channel), relay.client(f"{channel}-2"):
        await relay.await_metric("websocket_channels", 2)
    await relay.await_metric("websocket_channels", 0)


async def test_every_name_of_1_to_128_allowed_characters_is_a_channel(relay: RelayProcess) -> None:
    names = ["a", "0", "default", "area-1_2.3:4", "ABCXYZabcxyz0189", "...", "-", LONGEST]
    paths_of_the_relay = ["channels", "healthz"]
    for name in names + paths_of_the_relay:
        await assert_same_channel(relay, path_of(name), path_of(name))


async def test_an_escaped_character_in_a_name_is_the_character(relay: RelayProcess) -> None:
    for escaped, plain in (("%6E%65%77%73", "news"), ("chat%3Aarea%2D1", "chat:area-1")):
        await assert_same_channel(relay, path_of(escaped), path_of(plain))


INVALID_PATHS = {
    "too long": path_of(f"{LONGEST}x"),
    "too long once unescaped": path_of(f"{LONGEST}%78"),
    "empty": "/channels/",
    "no name": "/channels",
    "slash": "/channels/a/b",
    "slash at the end": "/channels/a/",
    "escaped slash": "/channels/a%2Fb",
    "two slashes": "/channels//a",
    "space": "/channels/a%20b",
    "plus": "/channels/a+b",
    "at sign": "/channels/a@b",
    "NUL": "/channels/a%00b",
    "line feed": "/channels/a%0Ab",
    "line feed at the end": "/channels/a%0A",
    "letter that is not ASCII": "/channels/caf%C3%A9",
    "digit that is not ASCII": "/channels/%D9%A3",
    "not UTF-8": "/channels/%FF",
    "escaped twice": "/channels/%256eews",
    "incomplete escape": "/channels/a%",
    "star": "/channels/*",
    "unknown path": "/nowhere",
    "other case": "/Channels/a",
    "name without its prefix": "/default",
}


async def test_any_other_path_is_refused_with_404_before_the_upgrade(relay: RelayProcess) -> None:
    before = await relay.metric("websocket_refusals_total", reason="no_such_channel")
    for case, path in INVALID_PATHS.items():
        async with await relay.connect_tcp() as raw:
            await raw.send(upgrade_request(path))
            assert (await raw.read_response()).status == 404, case
    expected = before + len(INVALID_PATHS)
    await relay.await_metric("websocket_refusals_total", expected, reason="no_such_channel")


async def test_at_max_channels_a_new_channel_is_refused_and_existing_ones_accept_clients(
    two_channel_relay: RelayProcess, channel: str
) -> None:
    relay = two_channel_relay
    await relay.await_metric("websocket_channels", 0)
    before = await relay.metric("websocket_refusals_total", reason="channels")
    async with relay.client(f"{channel}-1") as first, relay.client(f"{channel}-2"):
        answer = await refusal_answer(relay.client(f"{channel}-3"))
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) >= 1
        await relay.await_metric("websocket_refusals_total", before + 1, reason="channels")
        async with relay.client(f"{channel}-1") as second:
            await first.send("hello")
            assert await receive(second) == "hello"


async def test_a_new_channel_is_admitted_after_the_last_client_of_another_has_disconnected(
    two_channel_relay: RelayProcess, channel: str
) -> None:
    relay = two_channel_relay
    await relay.await_metric("websocket_channels", 0)
    async with relay.client(f"{channel}-1"):
        async with relay.client(f"{channel}-2"):
            pass
        await relay.await_metric("websocket_channels", 1)
        async with relay.client(f"{channel}-3") as client:
            await client.send("hello")
            assert await receive(client) == "hello"
