"""Publishing by HTTP under attack: bodies that lie, dawdle, or are too many."""

import asyncio
from contextlib import AsyncExitStack

import httpx2
import pytest

from tests.support.http_requests import BATCH, TEXT, get, post, posting
from tests.support.raw_client import PATIENCE_S, RawClient
from tests.support.relay_process import PLAIN, Relay, StartRelay, receive, receive_many

KIB = 1_024
MIB = 1_048_576


async def answered(raw: RawClient) -> tuple[int, bytes]:
    """Read one whole answer."""
    response = await raw.response()
    return response.status, await raw.exactly(int(response.headers.get("content-length", "0")))


async def test_bodies_that_stall_are_bounded_all_together(relay_with: StartRelay) -> None:
    relay = relay_with(limits={"total_backlog_bytes": 8 * MIB, "send_backlog_bytes": 64 * KIB})
    before = relay.rss_bytes()
    async with AsyncExitStack() as stack:
        stalled = []
        for _ in range(60):
            raw = await stack.enter_async_context(await relay.tcp())
            await raw.send(posting("a", bytes(900 * KIB), length=1_000 * KIB))
            stalled.append(raw)
        await relay.metric_reaches("websocket_refusals_total", 60 - 8 - 1, reason="unfinished")
        assert relay.rss_bytes() < before + 40 * MIB
        assert await relay.metric("websocket_partial_message_bytes") <= 8 * MIB
        assert (await post(relay, "a", b"small", TEXT)).status_code == 202
        refused = await answered(stalled[0])
        assert refused == (503, b"too many partial messages\n")
    await relay.metric_is("websocket_partial_message_bytes", 0)


async def test_a_body_in_the_smallest_chunks_is_read_a_part_at_a_time_and_whole(
    relay: Relay, channel: str
) -> None:
    head = f"POST /channels/{channel} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    request = head.encode() + b"\r\n" + b"1\r\na\r\n" * 60_000 + b"0\r\n\r\n"
    async with relay.client(channel) as listener, await relay.tcp() as raw:
        for _ in range(2):  # the connection is read again after the first
            await raw.send(request + get("/healthz"))
            assert (await answered(raw))[0] == 202
            assert (await answered(raw))[0] == 200
            assert await receive(listener) == b"a" * 60_000


async def test_a_client_that_leaves_amid_the_smallest_chunks_is_no_error(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    for _ in range(20):
        raw = await relay.tcp()
        await raw.send(head + b"1\r\na\r\n" * 20_000)
        raw.vanish()
    await relay.metric_is("websocket_http_connections", 0, port="relay")
    assert await relay.stop() == 0
    assert [event for event in relay.log_events if event["level"] == "error"] == []


async def test_a_body_that_is_longer_than_it_says_says_nothing(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as listener, await relay.tcp() as raw:
        await raw.send(posting(channel, b"saidand more", length=4))
        assert (await answered(raw))[0] == 400
        await raw.ended()
        assert (await post(relay, channel, b"after", TEXT)).status_code == 202
        assert await receive(listener) == "after"


async def test_a_body_that_is_shorter_than_it_says_says_nothing(
    hasty_relay: Relay, channel: str
) -> None:
    async with hasty_relay.client(channel) as listener:
        async with await hasty_relay.tcp() as raw:
            await raw.send(posting(channel, b"half", length=8))
            assert (await answered(raw))[0] == 408
        async with await hasty_relay.tcp() as raw:
            await raw.send(posting(channel, b"half", length=8))
            raw.finish()
            await raw.ended()
        assert (await post(hasty_relay, channel, b"after", TEXT)).status_code == 202
        assert await receive(listener) == "after"


async def test_a_body_that_comes_byte_by_byte_for_too_long_says_nothing(
    hasty_relay: Relay, channel: str
) -> None:
    async with hasty_relay.client(channel) as listener, await hasty_relay.tcp() as raw:

        async def dribble() -> None:
            await raw.send(posting(channel, b"", length=1_000))
            while True:
                await raw.send(b"x")
                await asyncio.sleep(0.2)

        dribbling = asyncio.create_task(dribble())
        assert (await raw.response()).status == 408
        dribbling.cancel()
        await asyncio.gather(dribbling, return_exceptions=True)
        assert (await post(hasty_relay, channel, b"after", TEXT)).status_code == 202
        assert await receive(listener) == "after"


@pytest.mark.parametrize("length", ["-1", "1e3", "4294967296000000000000", "4, 5", "0x4", "²"])
async def test_a_length_that_is_none_is_refused(relay: Relay, channel: str, length: str) -> None:
    async with await relay.tcp() as raw:
        await raw.send(posting(channel, b"said").replace(b": 4", f": {length}".encode()))
        assert (await answered(raw))[0] == 400


async def test_pipelined_messages_are_relayed_in_their_order(relay: Relay, channel: str) -> None:
    said = [str(number) for number in range(20)]
    async with relay.client(channel) as listener, await relay.tcp() as raw:
        await raw.send(b"".join(posting(channel, text.encode()) for text in said))
        assert [(await answered(raw))[0] for _ in said] == [202] * 20
        assert await receive_many(listener, 20) == said


async def test_who_asks_first_is_told_to_go_on_or_not_to(relay: Relay, channel: str) -> None:
    expecting = "Expect: 100-continue"
    async with relay.client(channel) as listener, await relay.tcp() as raw:
        await raw.send(posting(channel, b"", expecting, length=5))
        assert (await raw.response()).status == 100
        await raw.send(b"hello")
        assert (await answered(raw))[0] == 202
        assert await receive(listener) == "hello"
    async with await relay.tcp() as raw:
        await raw.send(posting(channel, b"", expecting, length=2 * MIB))
        assert (await raw.response()).status == 413


async def test_other_methods_are_refused_and_say_nothing(relay: Relay, channel: str) -> None:
    url = relay.http_url(f"/channels/{channel}")
    async with (
        relay.client(channel) as listener,
        httpx2.AsyncClient(verify=PLAIN, trust_env=False, timeout=PATIENCE_S) as http,
    ):
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
            assert (await http.request(method, url, content=b"x")).status_code == 405
        assert (await http.head(url)).status_code == 426
        assert (await http.head(url + "/events")).status_code == 405
        assert (await http.post(url, content=b"said")).status_code == 202
        assert await receive(listener) == b"said"


async def test_batches_hold_up_nobody(relay_with: StartRelay) -> None:
    """Ten of them at once: those who talk meanwhile do not wait for all to be read."""
    relay = relay_with()
    batch = b"[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25]\n" * 10_000
    async with relay.client("calm") as calm:

        async def talk() -> int:
            count = 0
            while not all(answer.done() for answer in answers):
                await calm.send(str(count))
                assert await receive(calm) == str(count)
                count += 1
            return count

        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(post(relay, "loud", batch, BATCH)) for _ in range(10)]
            talking = group.create_task(talk())
        assert {answer.result().status_code for answer in answers} == {202}
        assert talking.result() > 20


async def test_messages_by_the_thousand_leave_nothing(relay_with: StartRelay) -> None:
    relay = relay_with(history={"max_messages": 0})
    refused = {"Content-Encoding": "gzip"}
    async with httpx2.AsyncClient(verify=PLAIN, trust_env=False, timeout=PATIENCE_S) as http:

        async def say(count: int) -> None:
            for number in range(count):
                url = relay.http_url(f"/channels/{number}")
                headers = refused if number % 3 == 0 else {}
                await http.post(url, content=b"x" * 10_000, headers=headers)

        await say(300)
        before, descriptors = relay.rss_bytes(), relay.descriptors()
        await say(1_000)
        assert relay.rss_bytes() < before + 2 * MIB
        assert relay.descriptors() <= descriptors
        assert await relay.metric("websocket_channels") == 0
