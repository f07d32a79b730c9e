"""Publishing by HTTP under attack: bodies that are malformed, slow, or too many."""

import asyncio
from contextlib import AsyncExitStack

import httpx2

from tests.support.http_requests import (
    BATCH_TYPE,
    TEXT_TYPE,
    get_request,
    post_request,
    publish_by_post,
)
from tests.support.raw_client import PATIENCE_S, RawClient
from tests.support.relay_process import NO_CA, RelayProcess, StartRelay, receive, receive_many

KIB = 1_024
MIB = 1_048_576


async def read_response(raw: RawClient) -> tuple[int, bytes]:
    """Read one whole response; return its status and body."""
    response = await raw.read_response()
    return response.status, await raw.read_exactly(int(response.headers.get("content-length", "0")))


async def test_stalled_bodies_are_bounded_in_total(relay_with: StartRelay) -> None:
    relay = relay_with(limits={"total_backlog_bytes": 4 * MIB, "send_backlog_bytes": 64 * KIB})
    before = relay.rss_bytes()
    async with AsyncExitStack() as stack:
        stalled = []
        for _ in range(30):
            raw = await stack.enter_async_context(await relay.connect_tcp())
            await raw.send(post_request("a", bytes(900 * KIB), length=1_000 * KIB))
            stalled.append(raw)
        await relay.await_metric_at_least(
            "websocket_refusals_total", 30 - 4 - 1, reason="partial_messages"
        )
        assert relay.rss_bytes() < before + 20 * MIB
        assert await relay.metric("websocket_partial_message_bytes") <= 4 * MIB
        assert (await publish_by_post(relay, "a", b"small", TEXT_TYPE)).status_code == 202
        refusal = await read_response(stalled[0])
        assert refusal == (503, b"too many partial messages\n")
    await relay.await_metric("websocket_partial_message_bytes", 0)


async def test_a_body_in_chunks_of_one_byte_is_parsed_in_slices_and_relayed_whole(
    relay: RelayProcess, channel: str
) -> None:
    head = f"POST /channels/{channel} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    request = head.encode() + b"\r\n" + b"1\r\na\r\n" * 30_000 + b"0\r\n\r\n"
    async with relay.client(channel) as subscriber, await relay.connect_tcp() as raw:
        for _ in range(2):  # the relay resumes reading after the first request
            await raw.send(request + get_request("/healthz"))
            assert (await read_response(raw))[0] == 202
            assert (await read_response(raw))[0] == 200
            assert await receive(subscriber) == b"a" * 30_000


async def test_a_client_that_resets_within_chunks_of_one_byte_causes_no_error(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    for _ in range(8):
        raw = await relay.connect_tcp()
        await raw.send(head + b"1\r\na\r\n" * 20_000)
        raw.reset()
    await relay.await_metric("websocket_http_connections", 0, port="relay")
    assert await relay.stop() == 0
    assert [event for event in relay.log_events if event["level"] == "error"] == []


async def test_a_body_longer_than_its_content_length_publishes_nothing(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as subscriber, await relay.connect_tcp() as raw:
        await raw.send(post_request(channel, b"longer than four", length=4))
        assert (await read_response(raw))[0] == 400
        await raw.read_to_end()
        assert (await publish_by_post(relay, channel, b"after", TEXT_TYPE)).status_code == 202
        assert await receive(subscriber) == "after"


async def test_a_body_shorter_than_its_content_length_publishes_nothing(
    short_deadline_relay: RelayProcess, channel: str
) -> None:
    async with short_deadline_relay.client(channel) as subscriber:
        async with await short_deadline_relay.connect_tcp() as raw:
            await raw.send(post_request(channel, b"half", length=8))
            assert (await read_response(raw))[0] == 408
        async with await short_deadline_relay.connect_tcp() as raw:
            await raw.send(post_request(channel, b"half", length=8))
            raw.end_stream()
            await raw.read_to_end()
        assert (
            await publish_by_post(short_deadline_relay, channel, b"after", TEXT_TYPE)
        ).status_code == 202
        assert await receive(subscriber) == "after"


async def test_a_body_that_arrives_too_slowly_publishes_nothing(
    short_deadline_relay: RelayProcess, channel: str
) -> None:
    async with (
        short_deadline_relay.client(channel) as subscriber,
        await short_deadline_relay.connect_tcp() as raw,
    ):

        async def send_slowly() -> None:
            await raw.send(post_request(channel, b"", length=1_000))
            while True:
                await raw.send(b"x")
                await asyncio.sleep(0.2)

        sending = asyncio.create_task(send_slowly())
        assert (await raw.read_response()).status == 408
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        assert (
            await publish_by_post(short_deadline_relay, channel, b"after", TEXT_TYPE)
        ).status_code == 202
        assert await receive(subscriber) == "after"


async def test_an_invalid_content_length_is_refused(relay: RelayProcess, channel: str) -> None:
    for length in ("-1", "1e3", "4294967296000000000000", "4, 5", "0x4", "²"):
        async with await relay.connect_tcp() as raw:
            await raw.send(post_request(channel, b"text").replace(b": 4", f": {length}".encode()))
            assert (await read_response(raw))[0] == 400, length


async def test_pipelined_messages_are_relayed_in_order(relay: RelayProcess, channel: str) -> None:
    texts = [str(number) for number in range(20)]
    async with relay.client(channel) as subscriber, await relay.connect_tcp() as raw:
        await raw.send(b"".join(post_request(channel, text.encode()) for text in texts))
        assert [(await read_response(raw))[0] for _ in texts] == [202] * 20
        assert await receive_many(subscriber, 20) == texts


async def test_expect_100_continue_is_answered_before_the_body(
    relay: RelayProcess, channel: str
) -> None:
    expectation = "Expect: 100-continue"
    async with relay.client(channel) as subscriber, await relay.connect_tcp() as raw:
        await raw.send(post_request(channel, b"", expectation, length=5))
        assert (await raw.read_response()).status == 100
        await raw.send(b"hello")
        assert (await read_response(raw))[0] == 202
        assert await receive(subscriber) == "hello"
    async with await relay.connect_tcp() as raw:
        await raw.send(post_request(channel, b"", expectation, length=2 * MIB))
        assert (await raw.read_response()).status == 413


async def test_other_methods_are_refused_and_publish_nothing(
    relay: RelayProcess, channel: str
) -> None:
    url = relay.http_url(f"/channels/{channel}")
    async with (
        relay.client(channel) as subscriber,
        httpx2.AsyncClient(verify=NO_CA, trust_env=False, timeout=PATIENCE_S) as http,
    ):
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
            assert (await http.request(method, url, content=b"x")).status_code == 405
        assert (await http.head(url)).status_code == 426
        assert (await http.head(url + "/events")).status_code == 200
        assert (await http.post(url, content=b"posted")).status_code == 202
        assert await receive(subscriber) == b"posted"


async def test_large_batches_do_not_delay_other_clients(relay_with: StartRelay) -> None:
    """A client exchanges messages while five batches are parsed: it does not wait for all lines."""
    relay = relay_with()
    batch = b"[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25]\n" * 10_000
    async with relay.client("other") as client:

        async def exchange_messages() -> int:
            count = 0
            while not all(posting_batch.done() for posting_batch in batches):
                await client.send(str(count))
                assert await receive(client) == str(count)
                count += 1
            return count

        async with asyncio.TaskGroup() as group:
            batches = [
                group.create_task(publish_by_post(relay, "busy", batch, BATCH_TYPE))
                for _ in range(5)
            ]
            exchanging = group.create_task(exchange_messages())
        assert {task.result().status_code for task in batches} == {202}
        assert exchanging.result() > 10


async def test_many_posts_to_many_channels_leave_no_memory_descriptors_or_channels(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(history={"max_messages": 0})
    compressed = {"Content-Encoding": "gzip"}  # refused
    async with httpx2.AsyncClient(verify=NO_CA, trust_env=False, timeout=PATIENCE_S) as http:

        async def post_to_channels(count: int) -> None:
            for number in range(count):
                url = relay.http_url(f"/channels/{number}")
                headers = compressed if number % 3 == 0 else {}
                await http.post(url, content=b"x" * 20_000, headers=headers)

        await post_to_channels(150)
        before, descriptors = relay.rss_bytes(), relay.descriptors()
        await post_to_channels(300)
        assert relay.rss_bytes() < before + 2 * MIB
        assert relay.descriptors() <= descriptors
        assert await relay.metric("websocket_channels") == 0
