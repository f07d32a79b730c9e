"""Publishing by HTTP: one message or a batch in a request; refusals and their reasons."""

import asyncio

import httpx2
import pytest

from tests.support.http_requests import BATCH_TYPE, TEXT_TYPE, publish_by_post
from tests.support.issuer import SECRET, sign_token
from tests.support.relay_process import (
    HOST,
    NO_CA,
    RelayProcess,
    StartRelay,
    receive,
    receive_many,
)
from tests.support.relay_v1 import connect_relay_v1, parse_position


@pytest.mark.parametrize("channel", [None, "news"])
async def test_a_posted_message_is_relayed_and_its_position_returned(
    relay: RelayProcess, channel: str | None
) -> None:
    async with connect_relay_v1(relay, channel or "default") as subscriber:
        response = await publish_by_post(relay, channel, b"hello", TEXT_TYPE)
        assert response.status_code == 202
        assert await subscriber.next_message() == "hello"
        assert response.json() == {"position": subscriber.position}


IS_TEXT_BY_MEDIA_TYPE = {
    "text/plain": True,
    "application/cloudevents+json": True,
    "application/xml": True,
    "image/svg+xml; a=b": True,
    "application/vnd.example; Charset=utf-8": True,
    "application/vnd.example": False,
    "application/vnd.example; charset=windows-1252": False,
    "text/plain; charset=windows-1252": True,
    "text/plain; charset=iso-8859-15": True,
    "text/plain; charset='utf-8'": True,
    "text/html; charset=utf-8": True,
    "application/json": True,
    "Application/JSON; charset=UTF-8": True,
    "application/octet-stream": False,
    "application/json-seq": False,
    "application/octet-stream; charset=ISO-8859-1": False,
    "application/x-www-form-urlencoded": True,
    "": False,
}


async def test_a_body_of_a_textual_media_type_is_a_text_message_and_any_other_binary(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as subscriber:
        for media_type, is_text in IS_TEXT_BY_MEDIA_TYPE.items():
            assert (await publish_by_post(relay, channel, b"[1]", media_type)).status_code == 202
            expected = "[1]" if is_text else b"[1]"
            assert await receive(subscriber) == expected, media_type


async def test_text_that_is_not_utf_8_is_refused(relay: RelayProcess, channel: str) -> None:
    before = await relay.metric("websocket_refusals_total", reason="invalid_message")
    response = await publish_by_post(relay, channel, b"\xff", TEXT_TYPE)
    assert (response.status_code, response.text) == (400, "invalid message: text is not UTF-8\n")
    await relay.await_metric("websocket_refusals_total", before + 1, reason="invalid_message")


async def test_text_in_latin_1_is_relayed_as_utf_8_and_other_charsets_are_refused(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"max_message_bytes": 10})
    latin_1 = f'{TEXT_TYPE}; charset="ISO-8859-1"'
    async with relay.client("a") as subscriber:
        assert (await publish_by_post(relay, "a", b"gr\xfc\xdfe", latin_1)).status_code == 202
        assert await receive(subscriber) == "grüße"
        response = await publish_by_post(relay, "a", b"\xfc" * 6, latin_1)
        assert (response.status_code, response.text) == (413, "message too big\n")
        expected = (400, "invalid message: charset not supported; send UTF-8\n")
        for charset, body in (("utf-16", b"a\0"), ("windows-1252", b"\x80")):
            response = await publish_by_post(relay, "a", body, f"{TEXT_TYPE};charset={charset}")
            assert (response.status_code, response.text) == expected, charset


async def test_each_line_of_a_batch_is_one_message_in_order(
    relay: RelayProcess, channel: str
) -> None:
    lines = [f'{{"number":{number}}}' for number in range(1_000)]
    async with connect_relay_v1(relay, channel) as subscriber:
        response = await publish_by_post(relay, channel, "\n".join(lines).encode(), BATCH_TYPE)
        assert response.status_code == 202
        assert await subscriber.next_messages(1_000) == lines
        assert response.json() == {"position": subscriber.position, "messages": 1_000}


async def test_the_response_to_a_batch_contains_the_count_of_messages(
    relay: RelayProcess, channel: str
) -> None:
    for media_type in (
        BATCH_TYPE,
        "Application/X-NDJSON; charset=utf-8",
        "application/ndjson",
        "application/jsonl",
    ):
        assert (await publish_by_post(relay, channel, b"1\n2", media_type)).json()["messages"] == 2
    assert (
        "messages"
        not in (await publish_by_post(relay, channel, b"1\n2", f"{BATCH_TYPE}-or-so")).json()
    )


async def test_lines_of_a_batch_are_relayed_unchanged_without_empty_lines(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as subscriber:
        body = ' {"a": [1,  2]}\r\n\n\n"grüße"\nnull\n'
        assert (await publish_by_post(relay, channel, body.encode(), BATCH_TYPE)).json()[
            "messages"
        ] == 3
        assert await receive_many(subscriber, 3) == ['{"a": [1,  2]}', '"grüße"', "null"]


INVALID_LINES = [
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
]


async def test_a_batch_with_one_invalid_line_is_refused_as_a_whole(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as subscriber:
        for line in INVALID_LINES:
            response = await publish_by_post(relay, channel, b"1\n2\n" + line + b"\n4", BATCH_TYPE)
            expected = (400, "invalid message: line 3 is not JSON\n")
            assert (response.status_code, response.text) == expected, line[:20]
        assert (await publish_by_post(relay, channel, b"after", TEXT_TYPE)).status_code == 202
        assert await receive(subscriber) == "after"


async def test_an_empty_batch_publishes_nothing(relay: RelayProcess, channel: str) -> None:
    for body in (b"", b"\n" * 10_000, b" \t\r\n" * 200_000):
        response = await publish_by_post(relay, channel, body, BATCH_TYPE)
        assert (response.status_code, response.json()["messages"]) == (202, 0)


async def test_a_batch_may_contain_numbers_of_any_length(relay: RelayProcess, channel: str) -> None:
    async with relay.client(channel) as subscriber:
        assert (
            await publish_by_post(relay, channel, b"9" * 500_000, BATCH_TYPE)
        ).status_code == 202
        assert await receive(subscriber) == "9" * 500_000


async def test_a_batch_of_too_many_lines_is_refused(relay: RelayProcess, channel: str) -> None:
    async with relay.client(channel, max_queue=None) as subscriber:
        response = await publish_by_post(relay, channel, b"1\n" * 10_001, BATCH_TYPE)
        assert response.status_code == 413
        assert response.text == "message too big: a batch has up to 10000 lines\n"
        assert (
            await publish_by_post(relay, channel, b"2\n" * 10_000, BATCH_TYPE)
        ).status_code == 202
        assert await receive_many(subscriber, 10_000) == ["2"] * 10_000


async def test_a_large_batch_does_not_displace_the_history_of_other_channels(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    for number in range(3):
        await publish_by_post(relay, "quiet", str(number).encode(), TEXT_TYPE)
    assert (await publish_by_post(relay, "busy", b"2\n" * 10_000, BATCH_TYPE)).status_code == 202
    async with connect_relay_v1(relay, "quiet", history=10) as subscriber:
        assert await subscriber.next_messages(3) == ["0", "1", "2"]


async def test_no_other_message_is_relayed_between_the_lines_of_a_batch(
    relay: RelayProcess, channel: str
) -> None:
    batches = ["\n".join(f'"{batch}-{line}"' for line in range(250)) for batch in range(8)]
    async with relay.client(channel, max_queue=None) as subscriber:
        await asyncio.gather(
            *(publish_by_post(relay, channel, batch.encode(), BATCH_TYPE) for batch in batches),
            *(publish_by_post(relay, channel, b"single", TEXT_TYPE) for _ in range(8)),
        )
        received = await receive_many(subscriber, 8 * 250 + 8)
    lines = [str(text) for text in received if text != "single"]
    blocks = ["\n".join(lines[start : start + 250]) for start in range(0, len(lines), 250)]
    assert sorted(blocks) == sorted(batches)


async def test_a_compressed_body_is_refused(relay: RelayProcess, channel: str) -> None:
    for coding, status in (("gzip", 415), ("identity, br", 415), ("identity", 202)):
        response = await publish_by_post(
            relay, channel, b"1", TEXT_TYPE, {"Content-Encoding": coding}
        )
        assert response.status_code == status
        assert response.headers.get("accept-encoding") == ("identity" if status == 415 else None)


async def test_a_body_above_the_limit_is_refused_before_it_is_received(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"max_message_bytes": 1000})
    assert (await publish_by_post(relay, "a", bytes(1000))).status_code == 202
    assert (await publish_by_post(relay, "a", bytes(1001))).status_code == 413
    async with await relay.connect_tcp() as raw:
        head = "POST /channels/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
        await raw.send(head.encode())
        assert (await raw.read_response()).status == 413
    async with await relay.connect_tcp() as raw:
        head = "POST /channels/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        await raw.send(head.encode() + b"7d0\r\n" + bytes(2000) + b"\r\n")
        assert (await raw.read_response()).status == 413
    await relay.await_metric("websocket_refusals_total", 3, reason="message_too_big")


async def test_concurrent_posts_are_relayed_in_the_order_of_their_positions(
    relay: RelayProcess, channel: str
) -> None:
    async with connect_relay_v1(relay, channel) as subscriber:
        responses = await asyncio.gather(
            *(
                publish_by_post(relay, channel, str(number).encode(), TEXT_TYPE)
                for number in range(30)
            )
        )
        texts = {each.json()["position"]: str(number) for number, each in enumerate(responses)}
        expected = [texts[position] for position in sorted(texts, key=parse_position)]
        assert await subscriber.next_messages(30) == expected


async def test_posted_messages_are_counted(relay: RelayProcess, channel: str) -> None:
    before = await relay.metrics()
    await publish_by_post(relay, channel, b"12345", TEXT_TYPE)
    for name, added in (("messages", 1), ("received_bytes", 5)):
        value_before = before.value(f"websocket_{name}_total")
        await relay.await_metric(f"websocket_{name}_total", value_before + added)


async def test_request_metrics_are_labelled_with_the_route_and_not_the_channel(
    relay: RelayProcess,
) -> None:
    await publish_by_post(relay, "measured-0", b"x")  # creates the series
    labels = {"handler": "/channels/{channel}", "method": "POST", "status": "2xx"}
    before = await relay.metrics()
    for number in range(1, 10):
        assert (await publish_by_post(relay, f"measured-{number}", b"x")).status_code == 202
    after = await relay.metrics()
    requests = "http_requests_total"
    assert after.value(requests, **labels) == before.value(requests, **labels) + 9
    assert len(after.samples) == len(before.samples)
    values = {value for sample in after.samples for value in sample.labels.values()}
    assert not [value for value in values if "measured" in value]


async def test_a_post_needs_the_permission_to_publish_in_mode_jwt(relay_with: StartRelay) -> None:
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": SECRET}})
    assert (await publish_by_post(relay, "news", b"x")).status_code == 401
    for permissions, status in (({"publish": ["news"]}, 202), ({"subscribe": ["news"]}, 403)):
        headers = {"Authorization": f"Bearer {sign_token(relay=permissions)}"}
        assert (await publish_by_post(relay, "news", b"x", headers=headers)).status_code == status


async def test_a_post_to_an_invalid_channel_name_is_not_found(relay: RelayProcess) -> None:
    async with httpx2.AsyncClient(verify=NO_CA, trust_env=False) as http:
        url = f"http://{HOST}:{relay.port}/channels/a%20b"
        assert (await http.post(url, content=b"x")).status_code == 404
