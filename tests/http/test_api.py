"""The server API on one relay: who may use it, and what it does. For several see `backplane`."""

import asyncio
import base64
import json
import time
from contextlib import AsyncExitStack
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from tests.support.admission import jwt_settings, refusal_answer
from tests.support.events_client import request_events, subscribe_events
from tests.support.http_requests import TEXT_TYPE, publish_by_post
from tests.support.issuer import sign_token
from tests.support.raw_client import TEXT, frame, raw_websocket
from tests.support.relay_process import (
    HOST,
    RelayProcess,
    StartRelay,
    await_close,
    eventually,
    receive,
    receive_many,
)
from tests.support.relay_v1 import RELAY_V1, connect_relay_v1, open_relay_v1, parse_position
from tests.support.server_api import (
    KEY,
    WITH_KEY,
    WITH_USERS,
    ask_api,
    bearer_of,
    disconnect,
    request_api,
    token_of,
)

REQUESTS: list[tuple[str, str, object]] = [
    ("POST", "/publish", {"channel": "news", "text": "hello"}),
    ("POST", "/disconnect", {"user": "unknown"}),
    ("GET", "/channels", None),
    ("GET", "/clients", None),
    ("GET", "/replicas", None),
    ("PATCH", "/logging", {"level": "info"}),
]


@pytest.fixture
def api_relay(relay_with: StartRelay) -> RelayProcess:
    """A relay whose clients have users, and that has a key of the API."""
    return relay_with(**WITH_USERS)


def publish_lines(*lines: object) -> bytes:
    return "\n".join(map(json.dumps, lines)).encode()


# Who may use it


async def test_without_a_key_and_without_tokens_there_is_no_api(relay: RelayProcess) -> None:
    for method, path, body in REQUESTS:
        assert (await request_api(relay, method, path, body)).status_code == 404, path
    assert not any("/api/" in path for path in (await relay.get("/openapi.json")).json()["paths"])


async def test_each_request_needs_the_key_or_the_token_of_an_admin(
    api_relay: RelayProcess,
) -> None:
    secrets = {
        "": (401, "token required"),
        KEY[:-1]: (401, "invalid token"),
        f"{KEY}x": (401, "invalid token"),
        token_of("ada"): (403, "not authorized for the API"),
        sign_token(relay={"stats": True}): (403, "not authorized for the API"),
        sign_token(relay={"admin": 1}): (403, "not authorized for the API"),
    }
    for method, path, body in REQUESTS:
        for secret, (status, reason) in secrets.items():
            response = await request_api(api_relay, method, path, body, secret=secret)
            assert (response.status_code, response.text.partition(":")[0].strip()) == (
                status,
                reason,
            )
        for secret in (KEY, sign_token(relay={"admin": True})):
            response = await request_api(api_relay, method, path, body, secret=secret)
            assert response.status_code in (200, 202), (path, response.text)


async def test_the_api_is_there_with_tokens_and_without_a_key(relay_with: StartRelay) -> None:
    relay = relay_with(auth=jwt_settings())
    for secret, status in ((sign_token(relay={"admin": True}), 200), (KEY, 401), ("", 401)):
        response = await request_api(relay, "GET", "/replicas", secret=secret)
        assert response.status_code == status


async def test_the_key_works_without_tokens_and_not_in_the_query(relay_with: StartRelay) -> None:
    relay = relay_with(**WITH_KEY)
    assert (await request_api(relay, "GET", "/clients")).status_code == 200
    response = await request_api(relay, "GET", "/clients", secret="x")
    assert (response.status_code, response.text) == (401, "invalid token\n")
    response = await request_api(relay, "GET", f"/clients?access_token={KEY}", secret="")
    assert response.status_code == 401


async def test_the_key_comes_from_a_file_and_changes_at_run_time(
    relay_with: StartRelay, tmp_path: Any
) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    relay = relay_with({"RELAY__API__KEY_FILE": str(file)})
    assert (await request_api(relay, "GET", "/replicas")).status_code == 200
    changed = KEY[::-1]
    (tmp_path / "new").write_text(changed)
    (tmp_path / "new").rename(file)
    reloaded = await relay.await_log("settings reloaded")
    assert reloaded["changed"] == ["api.key"]
    assert (await request_api(relay, "GET", "/replicas")).status_code == 401
    assert (await request_api(relay, "GET", "/replicas", secret=changed)).status_code == 200
    assert KEY not in "".join(relay.log_lines)


async def test_pages_of_other_origins_may_not_use_the_api(relay_with: StartRelay) -> None:
    relay = relay_with(**WITH_KEY, server={"allowed_origins": ["https://allowed.example"]})
    headers = {"Origin": "https://other.example"}
    assert (await request_api(relay, "GET", "/clients", headers=headers)).status_code == 403


# Publishing


async def test_each_line_is_published_to_its_channel_and_has_a_position(
    api_relay: RelayProcess,
) -> None:
    headers = bearer_of("ada")
    async with (
        connect_relay_v1(api_relay, "news", additional_headers=headers) as news,
        connect_relay_v1(api_relay, "chat", additional_headers=headers) as chat,
    ):
        body = publish_lines(
            {"channel": "news", "text": "grüße 🎉"},
            {"channel": "chat", "base64": base64.b64encode(b"\0\xff").decode()},
            {"text": "", "channel": "news"},
        )
        response = await request_api(api_relay, "POST", "/publish", body + b"\n\n")
        assert response.status_code == 202
        positions = response.json()["positions"]
        assert await news.next_message() == "grüße 🎉"
        assert news.position == positions[0]
        assert await chat.next_message() == b"\0\xff"
        assert chat.position == positions[1]
        assert await news.next_message() == ""
        assert news.position == positions[2]
    assert sorted(positions, key=parse_position) == positions
    empty = await request_api(api_relay, "POST", "/publish", b"")
    assert (empty.status_code, empty.json()) == (202, {"positions": []})


INVALID_LINES: dict[str, bytes] = {
    "not JSON": b"{",
    "not an object": b"[1]",
    "a key is repeated": b'{"channel":"a","channel":"b","text":"a"}',
    "channel must be the name of a channel": b'{"text":"a"}',
    "text or base64 is needed besides channel": b'{"channel":"a"}',
    "text must be text": b'{"channel":"a","text":1}',
    "base64 is invalid": b'{"channel":"a","base64":"A"}',
    "text has half of a surrogate pair": b'{"channel":"a","text":"\\ud800"}',
}
ALSO_INVALID = [
    b'{"channel":"no name","text":"a"}',
    b'{"channel":["a"],"text":"a"}',
    b'{"channel":"a","text":"a","base64":"AA=="}',
    b'{"channel":"a","text":"a","other":1}',
    b'{"channel":"a","base64":"A A="}',
    b'{"channel":"a","text":"\xff"}',
    b'{"channel":"a","text":NaN}',
    b"[" * 10_000,
]


async def test_one_invalid_line_refuses_all_and_is_named(api_relay: RelayProcess) -> None:
    headers = bearer_of("ada")
    good = b'{"channel":"a","text":"no"}'
    async with api_relay.client("a", additional_headers=headers) as subscriber:
        for reason, line in INVALID_LINES.items():
            body = b"\n".join([good, b"", line, good])
            response = await request_api(api_relay, "POST", "/publish", body)
            assert (response.status_code, response.text) == (
                400,
                f"invalid message: line 3: {reason}\n",
            )
        for line in ALSO_INVALID:
            response = await request_api(api_relay, "POST", "/publish", good + b"\n" + line)
            assert response.status_code == 400, line
            assert response.text.startswith("invalid message: line 2: "), line
        await request_api(api_relay, "POST", "/publish", {"channel": "a", "text": "after"})
        assert await receive(subscriber) == "after"


async def test_a_publish_has_the_bounds_of_a_post(relay_with: StartRelay) -> None:
    relay = relay_with(**WITH_KEY, limits={"max_message_bytes": 500_000})
    line = {"channel": "a", "text": ""}
    async with relay.client("a", max_queue=None) as subscriber:
        response = await request_api(relay, "POST", "/publish", publish_lines(*[line] * 10_001))
        assert response.status_code == 413
        response = await request_api(relay, "POST", "/publish", b" " * 500_001)
        assert response.status_code == 413
        response = await request_api(relay, "POST", "/publish", publish_lines(*[line] * 10_000))
        assert response.status_code == 202
        assert len({*response.json()["positions"]}) == 10_000
        assert await receive_many(subscriber, 10_000) == [""] * 10_000
    gzip = {"Content-Encoding": "gzip"}
    response = await request_api(relay, "POST", "/publish", b"", headers=gzip)
    assert response.status_code == 415


# Disconnecting


async def test_the_clients_of_a_user_are_disconnected_with_the_code_and_reason_of_the_order(
    api_relay: RelayProcess,
) -> None:
    async with (
        api_relay.client("news", additional_headers=bearer_of("ada")) as plain,
        open_relay_v1(api_relay, additional_headers=bearer_of("ada")) as multiplexed,
        subscribe_events(api_relay, "news", headers=bearer_of("ada")) as events,
        api_relay.client("news", additional_headers=bearer_of("eve")) as other,
    ):
        order = {"user": "ada", "code": 4321, "reason": "signed out ✓"}
        assert await disconnect(api_relay, **order) == {"disconnected": 3}
        assert await await_close(plain) == (4321, "signed out ✓")
        assert await await_close(multiplexed.connection) == (4321, "signed out ✓")
        closed = await events.next_event()
        assert (closed.name, closed.json) == ("close", {"code": 4321, "reason": "signed out ✓"})
        with pytest.raises((EOFError, asyncio.IncompleteReadError)):
            await events.next_event()
        await other.send("still here")
        assert await receive(other) == "still here"
        await api_relay.await_metric("websocket_closes_total", 3, reason="disconnected")
        assert await disconnect(api_relay, user="ada") == {"disconnected": 0}


async def test_one_client_is_disconnected_by_its_id(api_relay: RelayProcess) -> None:
    headers = bearer_of("ada")
    async with (
        open_relay_v1(api_relay, additional_headers=headers) as one,
        open_relay_v1(api_relay, additional_headers=headers) as two,
    ):
        order = {"client": one.welcome["client"]}
        assert await disconnect(api_relay, **order) == {"disconnected": 1}
        assert await await_close(one.connection) == (4000, "disconnected")
        await two.subscribe("news")


async def test_the_clients_of_a_channel_are_disconnected_whatever_they_speak(
    api_relay: RelayProcess,
) -> None:
    headers = bearer_of("ada")
    async with (
        api_relay.client("news", additional_headers=headers) as plain,
        open_relay_v1(api_relay, additional_headers=headers) as multiplexed,
        open_relay_v1(api_relay, additional_headers=headers) as elsewhere,
        subscribe_events(api_relay, None, "?channel=news&channel=chat", headers=headers) as events,
    ):
        for channel in ("chat", "news"):
            assert (await multiplexed.subscribe(channel))["type"] == "subscribed"
        assert (await elsewhere.subscribe("chat"))["type"] == "subscribed"
        assert await disconnect(api_relay, channel="news") == {"disconnected": 3}
        for connection in (plain, multiplexed.connection):
            assert await await_close(connection) == (4000, "disconnected")
        assert (await events.next_event()).name == "close"
        await elsewhere.publish("still here", channel="chat")
        assert await elsewhere.next_message() == "still here"


async def test_messages_before_an_order_are_delivered_and_later_ones_of_the_client_are_not_relayed(
    api_relay: RelayProcess,
) -> None:
    async with (
        api_relay.client("news", additional_headers=bearer_of("ada"), max_queue=None) as ada,
        api_relay.client("news", additional_headers=bearer_of("eve"), max_queue=None) as eve,
    ):
        lines = publish_lines(*({"channel": "news", "text": str(n)} for n in range(1_000)))
        await request_api(api_relay, "POST", "/publish", lines)
        await disconnect(api_relay, user="ada")
        assert await receive_many(ada, 1_000) == [str(number) for number in range(1_000)]
        assert await await_close(ada) == (4000, "disconnected")
        assert await receive_many(eve, 1_000) == [str(number) for number in range(1_000)]
        token = token_of("bob")
        path = f"/channels/news?access_token={token}"
        async with raw_websocket(HOST, api_relay.port, path) as bob:
            await disconnect(api_relay, user="bob")
            assert await bob.read_close_frame() == (4000, "disconnected")
            await bob.send(frame(TEXT, b"too late"))
            await eve.send("next")
            assert await receive(eve) == "next"


async def test_a_connection_that_is_closing_publishes_nothing_after_an_order(
    api_relay: RelayProcess,
) -> None:
    path = f"/?access_token={token_of('ada')}"
    async with (
        api_relay.client("news", additional_headers=bearer_of("eve")) as eve,
        raw_websocket(HOST, api_relay.port, path, Sec_WebSocket_Protocol="relay.v1") as closing,
    ):
        welcome = json.loads(await closing.read_message())
        async with open_relay_v1(
            api_relay, f"/?session={welcome['session']}", additional_headers=bearer_of("ada")
        ):
            await closing.read_close_frame()  # which it does not answer
            assert len((await ask_api(api_relay, "/clients?user=ada"))["clients"]) == 1
            await closing.send(frame(TEXT, b'{"type":"publish","channel":"news","id":1}\nin time'))
            assert await receive(eve) == "in time"
            assert await disconnect(api_relay, user="ada") == {"disconnected": 1}
            await closing.send(frame(TEXT, b'{"type":"publish","channel":"news","id":2}\ntoo late'))
            await closing.read_to_end()
            await eve.send("next")
            assert await receive(eve) == "next"


async def test_a_client_that_is_disconnected_has_left_presence_at_once(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(**WITH_KEY, presence={"channels": ["*"], "grace_s": 600})
    async with (
        open_relay_v1(relay, "/channels/lobby") as one,
        open_relay_v1(relay, "/channels/lobby") as two,
    ):
        present = (await relay.get("/channels/lobby/presence")).json()["clients"]
        assert {each["client"] for each in present} == {
            client.welcome["client"] for client in (one, two)
        }
        await disconnect(relay, client=one.welcome["client"], code=4001.0)  # an integer in JSON
        assert await await_close(one.connection) == (4001, "disconnected")
        present = (await relay.get("/channels/lobby/presence")).json()["clients"]
        assert [each["client"] for each in present] == [two.welcome["client"]]


async def test_permission_to_use_the_api_can_be_a_scope(relay_with: StartRelay) -> None:
    relay = relay_with(auth=jwt_settings(claim="scope"))
    for scope, status in (("relay:admin", 200), ("relay:stats", 403)):
        response = await request_api(relay, "GET", "/replicas", secret=sign_token(scope=scope))
        assert response.status_code == status


INVALID_ORDERS: list[Any] = [
    {},
    [],
    "{",
    {"user": ""},
    {"user": 1},
    {"user": "a" * 1025},
    {"user": "a", "client": "b"},
    {"channel": "no name"},
    {"user": "a", "code": 3999},
    {"user": "a", "code": 5000},
    {"user": "a", "code": True},
    {"user": "a", "code": 4000.5},
    {"user": "a", "reason": "ü" * 62},
    {"user": "a", "reason": None},
    {"user": "a", "reason": "\ud800"},
    {"user": "a", "block_s": -1},
    {"user": "a", "block_s": 86_401},
    {"user": "a", "block_s": "1"},
    {"channel": "a", "block_s": 1},
    {"user": "a", "resaon": "typo"},
    '{"client":"x","client":"y"}',
    '{"user":"a","reason":"b","reason":"c"}',
]


async def test_an_invalid_order_is_refused_with_the_problem(api_relay: RelayProcess) -> None:
    for order in INVALID_ORDERS:
        response = await request_api(api_relay, "POST", "/disconnect", order)
        assert response.status_code == 400, order
        assert response.text.startswith("invalid command: "), order
    response = await request_api(api_relay, "POST", "/disconnect", b" " * 65_537)
    assert response.status_code == 413


# Blocks


async def attempts_of(relay: RelayProcess, user: str) -> dict[str, int]:
    """Return the status with which each kind of request of a user is answered."""
    headers = bearer_of(user)
    answers = {}
    for kind, protocols in {"plain": None, "relay.v1": [RELAY_V1]}.items():
        try:
            async with relay.client("news", additional_headers=headers, subprotocols=protocols):
                answers[kind] = 101
        except InvalidStatus as error:
            answers[kind] = error.response.status_code
    posted = await publish_by_post(relay, "news", b"hello", TEXT_TYPE, headers)
    answers["POST"] = posted.status_code
    async with request_events(relay, "news", headers=headers) as events:
        answers["events"] = events.status
    return answers


async def test_a_blocked_user_is_refused_by_each_way_until_the_block_ends(
    api_relay: RelayProcess,
) -> None:
    async with api_relay.client("news", additional_headers=bearer_of("ada")) as client:
        order = {"user": "ada", "block_s": 600, "reason": "spam"}
        assert await disconnect(api_relay, **order) == {"disconnected": 1}
        assert await await_close(client) == (4000, "spam")
    refused = dict.fromkeys(["plain", "relay.v1", "POST", "events"], 403)
    assert await attempts_of(api_relay, "ada") == refused
    attempt = api_relay.client("news", additional_headers=bearer_of("ada"))
    answer = await refusal_answer(attempt)
    assert bytes(answer.body or b"").decode() == "user is blocked\n"
    viewer = sign_token(sub="ada", relay={"stats": True})
    assert (await api_relay.get("/stats", viewer)).text == "user is blocked\n"
    admitted = {"plain": 101, "relay.v1": 101, "POST": 202, "events": 200}
    assert await attempts_of(api_relay, "eve") == admitted
    await api_relay.await_metric("websocket_refusals_total", 6, reason="blocked")
    await api_relay.await_metric("websocket_blocked_users", 1)
    await disconnect(api_relay, user="ada", block_s=0)
    assert await attempts_of(api_relay, "ada") == admitted
    await disconnect(api_relay, user="ada", block_s=0.5)
    assert (await attempts_of(api_relay, "ada"))["plain"] == 403
    await api_relay.await_metric("websocket_blocked_users", 0)
    assert await attempts_of(api_relay, "ada") == admitted


async def test_a_client_does_not_become_a_blocked_user_by_another_token(
    api_relay: RelayProcess,
) -> None:
    await disconnect(api_relay, user="ada", block_s=600)
    async with open_relay_v1(api_relay, additional_headers=bearer_of("eve")) as client:
        number = await client.send("token", token=token_of("ada"))
        answer = await client.next_notice("error")
        assert (answer["id"], answer["status"]) == (number, 403)
        assert answer["reason"] == "user is blocked"


# Questions


async def test_the_busiest_channels_are_listed_with_their_clients_and_messages(
    api_relay: RelayProcess,
) -> None:
    headers = bearer_of("ada")
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(api_relay.client(name, additional_headers=headers))
            for name in ("news.a", "news.a", "news.b", "chat")
        ]
        query = "?channel=chat&channel=news.c"
        await stack.enter_async_context(subscribe_events(api_relay, None, query, headers=headers))
        await clients[2].send("one")
        await clients[2].send("two")
        assert await receive_many(clients[2], 2) == ["one", "two"]
        await clients[3].send("three")
        assert await receive(clients[3]) == "three"
        assert await ask_api(api_relay, "/channels") == {
            "channels": [
                {"channel": "chat", "clients": 2, "messages": 1},
                {"channel": "news.a", "clients": 2, "messages": 0},
                {"channel": "news.b", "clients": 1, "messages": 2},
                {"channel": "news.c", "clients": 1, "messages": 0},
            ]
        }
        by_messages = await ask_api(api_relay, "/channels?order=messages&limit=2")
        assert [each["channel"] for each in by_messages["channels"]] == ["news.b", "chat"]
        by_prefix = await ask_api(api_relay, "/channels?prefix=news.&limit=1")
        assert by_prefix["channels"] == [{"channel": "news.a", "clients": 2, "messages": 0}]


async def test_the_clients_are_listed_with_what_is_known_of_them(api_relay: RelayProcess) -> None:
    before = time.time()
    async with (
        open_relay_v1(api_relay, additional_headers=bearer_of("ada")) as multiplexed,
        api_relay.client("news", additional_headers=bearer_of("eve")),
        subscribe_events(api_relay, "news", headers=bearer_of("ada")),
    ):
        await multiplexed.subscribe("news")
        await multiplexed.subscribe("chat")
        clients = (await ask_api(api_relay, "/clients"))["clients"]
        first = clients[0]
        assert first["client"] == multiplexed.welcome["client"]
        assert first | {"since": 0, "replica": ""} == {
            "client": multiplexed.welcome["client"],
            "user": "ada",
            "address": "127.0.0.1",
            "since": 0,
            "channels": ["news", "chat"],
            "backlog": 0,
            "replica": "",
        }
        assert before - 1 <= first["since"] <= time.time() + 1
        (replica,) = (await ask_api(api_relay, "/replicas"))["replicas"]
        assert {each["replica"] for each in clients} == {replica["name"]}
        assert [each["user"] for each in clients] == ["ada", "eve", "ada"]
        assert len({each["client"] for each in clients}) == 3
        for query, count in {"user=ada": 2, "channel=chat": 1, "channel=news&user=eve": 1}.items():
            found = await ask_api(api_relay, f"/clients?{query}")
            assert (len(found["clients"]), "truncated" in found) == (count, False), query
        some = await ask_api(api_relay, "/clients?limit=2")
        assert (len(some["clients"]), some["truncated"]) == (2, True)


async def test_the_address_of_a_client_is_the_one_that_a_trusted_proxy_forwards(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(**WITH_KEY, server={"trusted_proxies": ["127.0.0.1"]})
    headers = {"X-Forwarded-For": "192.0.2.7"}
    async with relay.client("news", additional_headers=headers):
        (client,) = (await ask_api(relay, "/clients"))["clients"]
        assert (client["address"], client["user"]) == ("192.0.2.7", "")


async def test_an_invalid_question_is_refused(api_relay: RelayProcess) -> None:
    for path in (
        "/channels?order=size",
        "/channels?limit=0",
        "/channels?limit=1001",
        "/channels?limit=x",
        "/channels?prefix=a&prefix=b",
        "/clients?limit=-1",
        "/clients?channel=no%20name",
        "/clients?channel=",
        "/clients?limit=%C2%B2",
    ):
        response = await request_api(api_relay, "GET", path)
        assert (response.status_code, response.text.partition(":")[0]) == (400, "invalid query")


async def test_the_replicas_are_listed_with_their_version_and_start(
    api_relay: RelayProcess,
) -> None:
    async with api_relay.client("news", additional_headers=bearer_of("ada")) as client:
        await client.send("hello")
        assert await receive(client) == "hello"
        (replica,) = (await ask_api(api_relay, "/replicas"))["replicas"]
    version = (await api_relay.get("/openapi.json")).json()["info"]["version"]
    assert replica["version"] == version
    assert (replica["clients"], replica["messages"]) == (1, 1)
    assert abs(time.time() - replica["since"]) < 120


# The log level


async def test_the_log_level_changes_for_a_time(api_relay: RelayProcess) -> None:
    async def refuse() -> None:
        assert (await request_api(api_relay, "GET", "/clients", secret="")).status_code == 401

    await refuse()
    assert "refused" not in [event["event"] for event in api_relay.log_events]
    change = {"level": "debug", "for_s": 1}
    response = await request_api(api_relay, "PATCH", "/logging", change)
    assert response.status_code == 200
    answer = response.json()
    assert answer["level"] == "debug"
    assert abs(answer["until"] - time.time()) < 30
    await api_relay.await_log("log level changed")
    await refuse()
    await api_relay.await_log("refused")

    async def is_reverted() -> tuple[bool, object]:
        before = len(api_relay.log_events)
        await refuse()
        await disconnect(api_relay, user="unknown")
        return len(api_relay.log_events) == before, before

    await eventually(is_reverted, "no line at debug any more")


async def test_an_invalid_log_level_is_refused(api_relay: RelayProcess) -> None:
    for change in (
        {"level": "trace"},
        {"level": ["debug"]},
        {"for_s": 1},
        {"level": "debug", "for_s": 0},
        {"level": "debug", "for_s": 86_401},
        {"level": "debug", "for_m": 1},
    ):
        response = await request_api(api_relay, "PATCH", "/logging", change)
        assert (response.status_code, response.text.partition(":")[0]) == (400, "invalid command")
