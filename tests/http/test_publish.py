"""Publishing by HTTP: one message in a request, or many; what is refused, and why."""

import asyncio

import httpx2
import pytest

from tests.support.http_requests import BATCH, TEXT, post
from tests.support.issuer import SECRET, token
from tests.support.relay_process import (
    HOST,
    PLAIN,
    Relay,
    StartRelay,
    receive,
    receive_many,
)
from tests.support.relay_v1 import as_numbers, resuming


@pytest.mark.parametrize("channel", [None, "news"])
async def test_what_is_posted_is_relayed_and_its_position_told(
    relay: Relay, channel: str | None
) -> None:
    async with resuming(relay, channel or "default") as listener:
        answer = await post(relay, channel, b"hello", TEXT)
        assert answer.status_code == 202
        assert await listener.message() == "hello"
        assert answer.json() == {"position": listener.position}


@pytest.mark.parametrize(
    ("kind", "is_text"),
    [
        ("text/plain", True),
        ("text/html; charset=utf-8", True),
        ("application/json", True),
        ("Application/JSON; charset=UTF-8", True),
        ("application/octet-stream", False),
        ("application/json-seq", False),
        ("application/x-www-form-urlencoded", False),
        ("", False),
    ],
)
async def test_text_stays_text_and_anything_else_is_binary(
    relay: Relay, channel: str, kind: str, is_text: bool
) -> None:
    async with relay.client(channel) as listener:
        assert (await post(relay, channel, b"[1]", kind)).status_code == 202
        assert await receive(listener) == ("[1]" if is_text else b"[1]")


async def test_text_that_is_not_utf_8_is_refused(relay: Relay, channel: str) -> None:
    before = await relay.metric("websocket_refusals_total", reason="body")
    answer = await post(relay, channel, b"\xff", TEXT)
    assert (answer.status_code, answer.text) == (400, "bad message: text is not UTF-8\n")
    await relay.metric_is("websocket_refusals_total", before + 1, reason="body")


async def test_a_batch_is_one_message_a_line_in_its_order(relay: Relay, channel: str) -> None:
    lines = [f'{{"number":{number}}}' for number in range(1_000)]
    async with resuming(relay, channel) as listener:
        answer = await post(relay, channel, "\n".join(lines).encode(), BATCH)
        assert answer.status_code == 202
        assert await listener.messages(1_000) == lines
        assert answer.json() == {"position": listener.position, "messages": 1_000}


@pytest.mark.parametrize("kind", [BATCH, "Application/X-NDJSON; charset=utf-8"])
async def test_the_answer_to_a_batch_says_how_many_there_were(
    relay: Relay, channel: str, kind: str
) -> None:
    assert (await post(relay, channel, b"1\n2", kind)).json()["messages"] == 2
    assert "messages" not in (await post(relay, channel, b"1\n2", f"{BATCH}-or-so")).json()


async def test_lines_of_a_batch_come_as_they_stand(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as listener:
        body = ' {"a": [1,  2]}\r\n\n\n"grüße"\nnull\n'
        assert (await post(relay, channel, body.encode(), BATCH)).json()["messages"] == 3
        assert await receive_many(listener, 3) == ['{"a": [1,  2]}', '"grüße"', "null"]


@pytest.mark.parametrize(
    "bad",
    [
        b"{",
        b"nonsense",
        b'"\xff"',
        b"[" * 100_000,
        b"NaN",
        b"-Infinity",
        b"01",
        b"1 2",
        b"\x0b1",
        b"'1'",
        b"\xef\xbb\xbf1",
    ],
)
async def test_a_batch_with_one_bad_line_is_refused_as_a_whole(
    relay: Relay, channel: str, bad: bytes
) -> None:
    async with relay.client(channel) as listener:
        answer = await post(relay, channel, b"1\n2\n" + bad + b"\n4", BATCH)
        assert (answer.status_code, answer.text) == (400, "bad message: line 3 is not JSON\n")
        assert (await post(relay, channel, b"after", TEXT)).status_code == 202
        assert await receive(listener) == "after"


@pytest.mark.parametrize("body", [b"", b"\n" * 10_000, b" \t\r\n" * 200_000])
async def test_an_empty_batch_says_nothing(relay: Relay, channel: str, body: bytes) -> None:
    answer = await post(relay, channel, body, BATCH)
    assert (answer.status_code, answer.json()["messages"]) == (202, 0)


async def test_a_number_may_be_as_long_as_it_likes(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as listener:
        assert (await post(relay, channel, b"9" * 500_000, BATCH)).status_code == 202
        assert await receive(listener) == "9" * 500_000


async def test_a_batch_has_so_many_lines_at_most(relay: Relay, channel: str) -> None:
    async with relay.client(channel, max_queue=None) as listener:
        answer = await post(relay, channel, b"1\n" * 10_001, BATCH)
        assert answer.status_code == 413
        assert answer.text == "message too big: a batch has up to 10000 lines\n"
        assert (await post(relay, channel, b"2\n" * 10_000, BATCH)).status_code == 202
        assert await receive_many(listener, 10_000) == ["2"] * 10_000


async def test_many_messages_in_one_request_take_no_other_channels_history(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    for number in range(3):
        await post(relay, "quiet", str(number).encode(), TEXT)
    assert (await post(relay, "noisy", b"2\n" * 10_000, BATCH)).status_code == 202
    async with resuming(relay, "quiet", history=10) as listener:
        assert await listener.messages(3) == ["0", "1", "2"]


async def test_nothing_comes_between_the_lines_of_a_batch(relay: Relay, channel: str) -> None:
    batches = ["\n".join(f'"{who}-{nth}"' for nth in range(500)) for who in range(8)]
    async with relay.client(channel, max_queue=None) as listener:
        await asyncio.gather(
            *(post(relay, channel, batch.encode(), BATCH) for batch in batches),
            *(post(relay, channel, b"alone", TEXT) for _ in range(8)),
        )
        heard = [text for text in await receive_many(listener, 4_008) if text != "alone"]
        assert sorted("\n".join(map(str, heard[at : at + 500])) for at in range(0, 4_000, 500)) == (
            sorted(batches)
        )


async def test_a_body_that_is_compressed_is_refused(relay: Relay, channel: str) -> None:
    for coding, status in (("gzip", 415), ("identity, br", 415), ("identity", 202)):
        answer = await post(relay, channel, b"1", TEXT, {"Content-Encoding": coding})
        assert answer.status_code == status
        assert answer.headers.get("accept-encoding") == ("identity" if status == 415 else None)


async def test_a_body_that_is_too_big_is_refused_before_it_came(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"max_message_bytes": 1000})
    assert (await post(relay, "a", bytes(1000))).status_code == 202
    assert (await post(relay, "a", bytes(1001))).status_code == 413
    async with await relay.tcp() as raw:
        head = "POST /channels/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
        await raw.send(head.encode())
        assert (await raw.response()).status == 413
    async with await relay.tcp() as raw:
        head = "POST /channels/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        await raw.send(head.encode() + b"7d0\r\n" + bytes(2000) + b"\r\n")
        assert (await raw.response()).status == 413
    await relay.metric_is("websocket_refusals_total", 3, reason="too_large")


async def test_messages_of_many_who_post_at_once_are_in_one_order(
    relay: Relay, channel: str
) -> None:
    async with resuming(relay, channel) as listener:
        answers = await asyncio.gather(
            *(post(relay, channel, str(number).encode(), TEXT) for number in range(50))
        )
        told = {answer.json()["position"]: number for number, answer in enumerate(answers)}
        in_order = sorted(told, key=as_numbers)
        assert await listener.messages(50) == [str(told[position]) for position in in_order]


async def test_posted_messages_are_counted(relay: Relay, channel: str) -> None:
    before = await relay.metrics()
    await post(relay, channel, b"12345", TEXT)
    for name, more in (("messages", 1), ("received_bytes", 5)):
        was = before.value(f"websocket_{name}_total")
        await relay.metric_is(f"websocket_{name}_total", was + more)


async def test_requests_are_measured_under_few_names(relay: Relay) -> None:
    await post(relay, "measured-0", b"x")  # a series is there from the first on
    handler = {"handler": "/channels/{channel}", "method": "POST", "status": "2xx"}
    before = await relay.metrics()
    for number in range(1, 20):
        assert (await post(relay, f"measured-{number}", b"x")).status_code == 202
    after = await relay.metrics()
    requests = "http_requests_total"
    assert after.value(requests, **handler) == before.value(requests, **handler) + 19
    assert len(after.samples) == len(before.samples)
    labels = {value for sample in after.samples for value in sample.labels.values()}
    assert not [value for value in labels if "measured" in value]


async def test_a_right_to_publish_is_asked_for(relay_with: StartRelay) -> None:
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": SECRET}})
    assert (await post(relay, "news", b"x")).status_code == 401
    for rights, status in (({"publish": ["news"]}, 202), ({"subscribe": ["news"]}, 403)):
        headers = {"Authorization": f"Bearer {token(relay=rights)}"}
        assert (await post(relay, "news", b"x", headers=headers)).status_code == status


async def test_no_channel_of_another_name(relay: Relay) -> None:
    async with httpx2.AsyncClient(verify=PLAIN, trust_env=False) as http:
        url = f"http://{HOST}:{relay.port}/channels/a%20b"
        assert (await http.post(url, content=b"x")).status_code == 404
