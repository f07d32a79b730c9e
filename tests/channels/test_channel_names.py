"""A channel is a name in the path; what is not a name is refused before the upgrade."""

from collections.abc import Iterator

import pytest
from websockets.exceptions import InvalidStatus

from tests.support.raw_client import upgrade_request
from tests.support.relay_process import Relay, receive

LONGEST = "x" * 128


@pytest.fixture(scope="module")
def few_channels_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay that has room for two channels."""
    with Relay(tmp_path_factory.mktemp("few"), {"channels": {"max_channels": 2}}) as relay:
        yield relay


async def test_two_channels_hear_nothing_of_each_other(relay: Relay, channel: str) -> None:
    one, two = f"{channel}-1", f"{channel}-2"
    async with relay.client(one) as first, relay.client(two) as second:
        await first.send("for one")
        await second.send("for two")
        assert await receive(first) == "for one"
        assert await receive(second) == "for two"


async def test_names_that_differ_in_case_are_different_channels(relay: Relay, channel: str) -> None:
    async with relay.client(f"{channel}A") as upper, relay.client(f"{channel}a") as lower:
        await upper.send("upper")
        await lower.send("lower")
        assert await receive(upper) == "upper"
        assert await receive(lower) == "lower"


async def test_the_root_is_the_channel_default(relay: Relay) -> None:
    async with relay.client() as root, relay.client("default") as named:
        await root.send("from the root")
        assert await receive(named) == "from the root"
        assert await receive(root) == "from the root"
        await named.send("from the name")
        assert await receive(named) == "from the name"
        assert await receive(root) == "from the name"


async def test_a_channel_goes_with_its_last_client(relay: Relay, channel: str) -> None:
    await relay.metric_is("websocket_channels", 0)
    async with relay.client(channel), relay.client(channel), relay.client(f"{channel}-2"):
        await relay.metric_is("websocket_channels", 2)
    await relay.metric_is("websocket_channels", 0)


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "0",
        "default",
        "room-1_2.3:4",
        "ABCXYZabcxyz0189",
        "...",
        "-",
        "channels",
        "healthz",
        LONGEST,
    ],
)
async def test_a_name_of_the_allowed_letters_is_a_channel(relay: Relay, name: str) -> None:
    async with relay.client(name) as first, relay.client(name) as second:
        await first.send("hello")
        assert await receive(second) == "hello"


@pytest.mark.parametrize(
    ("escaped", "plain"),
    [("%6eews", "news"), ("%6E%65%77%73", "news"), ("chat%3Aroom%2D1", "chat:room-1")],
)
async def test_an_escaped_letter_is_the_letter(relay: Relay, escaped: str, plain: str) -> None:
    async with relay.client(escaped) as first, relay.client(plain) as second:
        await first.send("hello")
        assert await receive(second) == "hello"


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(f"/channels/{LONGEST}x", id="too long"),
        pytest.param(f"/channels/{LONGEST}%78", id="too long once unescaped"),
        pytest.param("/channels/", id="empty"),
        pytest.param("/channels", id="no name"),
        pytest.param("/channels/a/b", id="slash"),
        pytest.param("/channels/a/", id="slash at the end"),
        pytest.param("/channels/a%2Fb", id="escaped slash"),
        pytest.param("/channels//a", id="two slashes"),
        pytest.param("/channels/a%20b", id="space"),
        pytest.param("/channels/a+b", id="plus"),
        pytest.param("/channels/a@b", id="at sign"),
        pytest.param("/channels/a%00b", id="NUL"),
        pytest.param("/channels/a%0Ab", id="line end"),
        pytest.param("/channels/a%0A", id="line end at the end"),
        pytest.param("/channels/caf%C3%A9", id="unicode"),
        pytest.param("/channels/%D9%A3", id="a digit that is not ASCII"),
        pytest.param("/channels/%FF", id="not UTF-8"),
        pytest.param("/channels/%256eews", id="escaped twice"),
        pytest.param("/channels/a%", id="broken escape"),
        pytest.param("/channels/*", id="star"),
        pytest.param("/nowhere", id="unknown path"),
        pytest.param("/Channels/a", id="other case"),
        pytest.param("/default", id="name without its prefix"),
    ],
)
async def test_anything_else_is_refused_with_404_before_the_upgrade(
    relay: Relay, path: str
) -> None:
    before = await relay.metric("websocket_refusals_total", reason="path")
    async with await relay.tcp() as raw:
        await raw.send(upgrade_request(path))
        assert (await raw.response()).status == 404
    await relay.metric_is("websocket_refusals_total", before + 1, reason="path")


async def test_a_usual_client_is_told_404_too(relay: Relay) -> None:
    with pytest.raises(InvalidStatus) as refusal:
        async with relay.client("not a name".replace(" ", "%20")):
            pass
    assert refusal.value.response.status_code == 404


async def test_a_query_does_not_belong_to_the_name(relay: Relay, channel: str) -> None:
    async with (
        relay.client(path=f"/channels/{channel}?") as first,
        relay.client(channel) as second,
    ):
        await first.send("hello")
        assert await receive(second) == "hello"


async def test_no_more_channels_than_the_limit_exist_at_a_time(
    few_channels_relay: Relay, channel: str
) -> None:
    relay = few_channels_relay
    await relay.metric_is("websocket_channels", 0)
    before = await relay.metric("websocket_refusals_total", reason="channels")
    async with relay.client(f"{channel}-1"), relay.client(f"{channel}-2"):
        with pytest.raises(InvalidStatus) as refusal:
            async with relay.client(f"{channel}-3"):
                pass
        assert refusal.value.response.status_code == 503
        assert int(refusal.value.response.headers["Retry-After"]) >= 1
        await relay.metric_is("websocket_refusals_total", before + 1, reason="channels")


async def test_a_channel_that_exists_takes_clients_at_the_limit_of_channels(
    few_channels_relay: Relay, channel: str
) -> None:
    relay = few_channels_relay
    await relay.metric_is("websocket_channels", 0)
    async with (
        relay.client(f"{channel}-1") as first,
        relay.client(f"{channel}-2"),
        relay.client(f"{channel}-1") as second,
    ):
        await first.send("hello")
        assert await receive(second) == "hello"


async def test_a_channel_is_free_again_after_its_last_client_left(
    few_channels_relay: Relay, channel: str
) -> None:
    relay = few_channels_relay
    await relay.metric_is("websocket_channels", 0)
    async with relay.client(f"{channel}-1"):
        async with relay.client(f"{channel}-2"):
            pass
        await relay.metric_is("websocket_channels", 1)
        async with relay.client(f"{channel}-3") as newcomer:
            await newcomer.send("hello")
            assert await receive(newcomer) == "hello"
