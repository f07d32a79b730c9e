"""auth.mode hook: the application's backend decides about each client, and delays no other one."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from signal import SIGHUP
from typing import Any

import httpx2
import pytest
from websocket_relay.outcomes import Refusal
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus
from websockets.http11 import Response

from tests.support.admission import assert_admitted, refusal_answer
from tests.support.events_client import request_events
from tests.support.hook_backend import ANN, HOOK_SECRET, HookBackend, hook_settings
from tests.support.http_requests import TEXT_TYPE, get_request, post_request, publish_by_post
from tests.support.raw_client import upgrade_request
from tests.support.relay_process import (
    NO_CA,
    RelayProcess,
    StartRelay,
    await_close,
    merged,
    path_of,
    receive,
)
from tests.support.relay_v1 import RelayV1Client, connect_relay_v1, open_relay_v1

COOKIE = {"Cookie": "session=abc"}
REQUESTS = "websocket_auth_hook_requests_total"
IN_FLIGHT = "websocket_auth_hook_in_flight"
NOT_AUTHORIZED = {"status": 403, "reason": "not authorized for this channel"}


@pytest.fixture
async def backend() -> AsyncIterator[HookBackend]:
    async with HookBackend() as started:
        yield started


@pytest.fixture
def hook_relay(relay_with: StartRelay, backend: HookBackend) -> RelayProcess:
    """A relay that asks the backend."""
    return relay_with(**hook_settings(backend))


def with_cookie(relay: RelayProcess, channel: str | None = None, **options: Any) -> connect:
    return relay.client(channel, additional_headers=COOKIE, **options)


def text_of(answer: Response) -> tuple[int, str]:
    return answer.status_code, bytes(answer.body or b"").decode().strip()


async def assert_unavailable(relay: RelayProcess, channel: str, why: Refusal) -> None:
    """Assert that a client is refused for now, and that the refusal is counted."""
    before = await relay.metric("websocket_refusals_total", reason=why.label)
    answer = await refusal_answer(with_cookie(relay, channel))
    assert text_of(answer) == (503, why.reason)
    assert 1 <= int(answer.headers["Retry-After"]) <= 5
    await relay.await_metric("websocket_refusals_total", before + 1, reason=why.label)


# What the backend is asked, and what its answer permits


async def test_the_backend_is_asked_about_each_upgrade_and_its_answer_is_not_kept(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    headers = {**COOKIE, "Origin": "https://app.example", "X-Other": "not passed on"}
    for count in (1, 2):
        path = f"{path_of(channel)}?echo=true"
        async with hook_relay.client(path=path, additional_headers=headers) as client:
            await client.send("hello")
            assert await receive(client) == "hello"
        assert len(backend.questions) == count
    assert backend.last == {
        "channel": channel,
        "action": "subscribe",
        "address": "127.0.0.1",
        "origin": "https://app.example",
        "headers": {"cookie": "session=abc"},
        "query": "echo=true",
    }
    question = backend.questions[0]
    assert question.target == "POST /may?key=value HTTP/1.1"
    assert question.headers["content-type"] == "application/json"
    assert question.is_signed_with(HOOK_SECRET)
    assert not question.is_signed_with("another secret")
    assert backend.connections == 1, "connections are kept"
    await hook_relay.await_metric(REQUESTS, 2, result="ok")
    assert await hook_relay.metric("websocket_auth_hook_seconds_count") == 2
    backend.refuse(401)
    assert (await refusal_answer(with_cookie(hook_relay, channel))).status_code == 401


async def test_the_answer_permits_channels_as_a_token_does(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    backend.permit(subscribe=[f"{channel}.*"], publish=[f"{channel}.out"], more="is ignored")
    async with (
        with_cookie(hook_relay, f"{channel}.out") as may_publish,
        with_cookie(hook_relay, f"{channel}.in") as may_not,
    ):
        await may_publish.send("hello")
        assert await receive(may_publish) == "hello"
        await may_not.send("hello")
        assert await await_close(may_not) == (1008, "not allowed to publish")
    answer = await refusal_answer(with_cookie(hook_relay, channel))
    assert text_of(answer) == (403, "not authorized for this channel")
    backend.permit()
    assert (await refusal_answer(with_cookie(hook_relay, channel))).status_code == 403


async def test_each_kind_of_request_asks_the_backend(
    relay_with: StartRelay, backend: HookBackend, channel: str
) -> None:
    relay = relay_with(**hook_settings(backend), presence={"channels": ["*"]})

    def asked() -> tuple[str | None, str]:
        return backend.last["channel"], backend.last["action"]

    answer = await publish_by_post(relay, channel, b"hello", TEXT_TYPE, COOKIE)
    assert (answer.status_code, asked()) == (202, (channel, "publish"))
    assert backend.last["headers"] == {"cookie": "session=abc"}
    backend.permit(subscribe=["*"])
    answer = await publish_by_post(relay, channel, b"hello", TEXT_TYPE)
    assert (answer.status_code, answer.text) == (403, "not authorized for this channel\n")
    async with request_events(relay, channel) as events:
        assert (events.status, asked()) == (200, (channel, "subscribe"))
    async with request_events(relay, None, f"?channel={channel}&channel=other") as events:
        assert (events.status, asked()) == (200, (None, "subscribe"))
    assert backend.last["query"] == f"channel={channel}&channel=other"
    answer = await relay.get(f"{path_of(channel)}/presence")
    assert (answer.status_code, asked()) == (200, (channel, "subscribe"))
    assert (await relay.get("/stats")).status_code == 403
    for permission in ("stats", "admin"):
        backend.permit(**{permission: True})
        assert ((await relay.get("/stats")).status_code, asked()) == (200, (None, "subscribe"))
    asked_before = len(backend.questions)
    for path in ("/healthz", "/readyz", "/relay.js", "/"):
        assert (await relay.get(path)).status_code == 200
    assert len(backend.questions) == asked_before


async def test_a_token_of_the_client_is_passed_on_as_authorization_wherever_it_is(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    for options in (
        {"additional_headers": {"Authorization": "Bearer T"}},
        {"path": f"{path_of(channel)}?access_token=T"},
        {"subprotocols": ["bearer", "T"]},
    ):
        async with hook_relay.client(**({"channel": channel} | options)):
            assert backend.last["headers"] == {"authorization": "Bearer T"}
    async with hook_relay.client(channel, additional_headers={"Authorization": "Basic eDp5"}):
        assert backend.last["headers"] == {"authorization": "Basic eDp5"}


async def test_only_the_headers_of_the_setting_are_passed_on(
    relay_with: StartRelay, backend: HookBackend, channel: str
) -> None:
    relay = relay_with(**hook_settings(backend, headers=["X-Session", "cookie"]))
    lines = [("X-Session", "one"), ("x-session", "two"), ("Cookie", "a=1"), ("Cookie", "b=2")]
    lines.append(("Authorization", "Bearer T"))
    async with relay.client(channel, additional_headers=lines):
        assert backend.last["headers"] == {"x-session": "one, two", "cookie": "a=1; b=2"}


async def test_who_the_client_is_appears_in_presence(
    relay_with: StartRelay, backend: HookBackend, channel: str
) -> None:
    relay = relay_with(**hook_settings(backend), presence={"channels": ["*"]})
    backend.permit(**ANN, info={"name": "Ann"})
    async with with_cookie(relay, channel):
        present = (await relay.get(f"{path_of(channel)}/presence")).json()
    (client,) = present["clients"]
    assert (client["user"], client["info"]) == ("ann", {"name": "Ann"})


# Refusals


async def test_the_backend_refuses_with_401_and_403(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    for why in (Refusal.NOT_AUTHENTICATED, Refusal.FORBIDDEN):
        backend.refuse(why.status)
        answer = await refusal_answer(with_cookie(hook_relay, channel))
        assert text_of(answer) == (why.status, why.reason)
        for path in ("/stats", f"{path_of(channel)}/events"):
            got = await hook_relay.get(path)
            assert (got.status_code, got.text) == (why.status, f"{why.reason}\n")
        posted = await publish_by_post(hook_relay, channel, b"hello", TEXT_TYPE)
        assert posted.status_code == why.status
        await hook_relay.await_metric("websocket_refusals_total", 4, reason=why.label)
    await hook_relay.await_metric(REQUESTS, 8, result="refused")


@pytest.mark.parametrize("status", [201, 204, 302, 307, 404, 429, 500, 503])
async def test_any_other_status_is_503_and_no_redirect_is_followed(
    hook_relay: RelayProcess, backend: HookBackend, channel: str, status: int
) -> None:
    async with HookBackend() as other:
        backend.status = status
        backend.headers = {"Location": other.url}
        if status == 204:
            backend.body = b""
        await assert_unavailable(hook_relay, channel, Refusal.HOOK_UNAVAILABLE)
        assert other.questions == []
    event = await hook_relay.await_log("hook request failed")
    assert (event["level"], event["error"]) == ("error", f"status {status}")
    assert event["url"] == backend.url.partition("?")[0]
    await hook_relay.await_metric(REQUESTS, 1, result="error")


INVALID: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"<html>",
    "no object": b"[]",
    "no UTF-8": b'{"user":"\xff"}',
    "too large": b'{"user":"ann","more":"' + b"x" * 70_000 + b'"}',
    "user": b'{"user":5}',
    "subscribe": b'{"subscribe":"*"}',
    "expiry": b'{"expires_in_s":-1}',
    "info": json.dumps({"info": "x" * 1100}).encode(),
}


async def test_an_invalid_answer_is_503_and_is_logged_at_a_bounded_rate(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    for body in INVALID.values():
        backend.body = body
        await assert_unavailable(hook_relay, channel, Refusal.HOOK_ANSWER_INVALID)
    await hook_relay.await_metric(REQUESTS, len(INVALID), result="error")
    backend.permit(**ANN)
    await assert_admitted(with_cookie(hook_relay, channel))
    await hook_relay.await_log("hook recovered")
    failures = [event for event in hook_relay.log_events if event["event"] == "hook request failed"]
    assert len(failures) == 3
    assert [event["count"] for event in failures] == [1, 1, 1]


async def test_a_backend_that_is_down_or_closes_its_connections_is_503_until_it_is_back(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    await assert_admitted(with_cookie(hook_relay, channel))
    await backend.stop()
    await assert_unavailable(hook_relay, channel, Refusal.HOOK_UNAVAILABLE)
    await backend.start()
    await assert_admitted(with_cookie(hook_relay, channel))
    backend.closes_without_answer = True
    await assert_unavailable(hook_relay, channel, Refusal.HOOK_UNAVAILABLE)
    backend.closes_without_answer = False
    await assert_admitted(with_cookie(hook_relay, channel))
    assert backend.connections < len(backend.questions)


async def test_a_backend_that_restarts_between_two_questions_refuses_no_client(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    for _ in range(5):
        await assert_admitted(with_cookie(hook_relay, channel))
        await backend.stop()
        await backend.start()
    assert await hook_relay.metric(REQUESTS, result="error") == 0


async def test_a_question_is_repeated_once_if_its_connection_ends_before_the_answer(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    """A backend closes a kept connection when it is idle, which may be just when it is used."""
    await assert_admitted(with_cookie(hook_relay, channel))
    backend.unanswered = 1
    await assert_admitted(with_cookie(hook_relay, channel))
    assert len(backend.questions) == 3
    assert backend.questions[1].body == backend.questions[2].body
    backend.unanswered = 2
    await assert_unavailable(hook_relay, channel, Refusal.HOOK_UNAVAILABLE)
    assert len(backend.questions) == 5


async def test_a_cookie_of_the_backend_is_not_sent_with_the_next_question(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    """It would be the session of another client."""
    backend.headers = {"Set-Cookie": "session=anns; Path=/"}
    for _ in range(2):
        async with with_cookie(hook_relay, channel):
            pass
    assert [question.headers.get("cookie") for question in backend.questions] == [None, None]


# A slow backend


async def test_a_backend_that_hangs_delays_no_client_that_is_connected(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    """All that the connected client does is done before the backend answers."""
    async with (
        with_cookie(hook_relay, channel) as connected,
        AsyncExitStack() as stack,
        asyncio.TaskGroup() as group,
    ):
        backend.may_answer.clear()
        attempts = [with_cookie(hook_relay, channel) for _ in range(50)]
        waiting = [group.create_task(stack.enter_async_context(each)) for each in attempts]
        await backend.wait_for_questions(51)
        await hook_relay.await_metric(IN_FLIGHT, 50)
        for number in range(100):
            await connected.send(f"message {number}")
            assert await receive(connected) == f"message {number}"
        assert (await hook_relay.get("/readyz")).status_code == 200
        assert not any(task.done() for task in waiting)
        backend.may_answer.set()
        clients: list[ClientConnection] = [await task for task in waiting]
        await connected.send("to all")
        for client in (connected, *clients):
            assert await receive(client) == "to all"
        await hook_relay.await_metric(IN_FLIGHT, 0)


async def test_without_an_answer_in_time_a_client_is_refused_and_the_request_ends(
    relay_with: StartRelay, backend: HookBackend, channel: str
) -> None:
    relay = relay_with(**hook_settings(backend, timeout_s=2))
    backend.may_answer.clear()
    await assert_unavailable(relay, channel, Refusal.HOOK_UNAVAILABLE)
    await backend.wait_for_abandoned(1)
    assert (await relay.await_log("hook request failed"))["error"] == "timeout after 2 seconds"
    await relay.await_metric(IN_FLIGHT, 0)
    backend.may_answer.set()
    await assert_admitted(with_cookie(relay, channel))


async def test_above_max_in_flight_clients_are_refused_at_once(
    relay_with: StartRelay, backend: HookBackend, channel: str
) -> None:
    relay = relay_with(**hook_settings(backend, max_in_flight=2))
    backend.may_answer.clear()
    async with asyncio.TaskGroup() as group:
        waiting = [
            group.create_task(assert_admitted(with_cookie(relay, f"{channel}-{number}")))
            for number in range(2)
        ]
        await backend.wait_for_questions(2)
        for _ in range(3):
            await assert_unavailable(relay, channel, Refusal.HOOK_REQUESTS)
        posted = await publish_by_post(relay, channel, b"hello", TEXT_TYPE)
        assert (posted.status_code, posted.text) == (503, "too many hook requests\n")
        assert not any(task.done() for task in waiting)
        backend.may_answer.set()
    await assert_admitted(with_cookie(relay, channel))
    assert len(backend.questions) == 3
    refused = await relay.await_log("clients refused")
    assert (refused["reason"], refused["setting"]) == ("hook_requests", "auth.hook.max_in_flight")


async def test_a_client_that_disconnects_ends_its_question(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    requests = (
        upgrade_request(path_of(channel)),
        upgrade_request("/", lines=["Sec-WebSocket-Protocol: relay.v1"]),
        get_request(f"{path_of(channel)}/events"),
        get_request("/stats"),
        get_request("/api/clients", "Authorization: Bearer T"),
        post_request(channel, b"hello"),
    )
    backend.may_answer.clear()
    for number, request in enumerate(requests, 1):
        for end in ("reset", "end_stream"):
            raw = await hook_relay.connect_tcp()
            await raw.send(request)
            await backend.wait_for_questions(len(backend.questions) + 1)
            await hook_relay.await_metric(IN_FLIGHT, 1)
            getattr(raw, end)()
            await hook_relay.await_metric(IN_FLIGHT, 0)
            raw.socket.close()
        await hook_relay.await_metric(REQUESTS, 2 * number, result="cancelled")
    await backend.wait_for_abandoned(2 * len(requests))
    backend.may_answer.set()
    await assert_admitted(with_cookie(hook_relay, channel))
    page = await hook_relay.metrics()
    assert page.value("websocket_messages_total") == 1, "nothing of the POST is published"
    assert page.value("websocket_connections_total") == 1
    await hook_relay.await_metric("websocket_http_connections", 0, port="relay")
    assert [event for event in hook_relay.log_events if event["level"] == "error"] == []


async def test_clients_that_wait_for_the_backend_do_not_exceed_the_limits(
    relay_with: StartRelay, backend: HookBackend, channel: str
) -> None:
    for limits, max_channels, why in (
        ({"max_connections": 4}, 99, Refusal.CONNECTIONS),
        ({"max_connections_per_ip": 4}, 99, Refusal.CONNECTIONS_PER_IP),
        ({"max_connections_per_user": 4}, 99, Refusal.CONNECTIONS_PER_USER),
        ({}, 4, Refusal.CHANNELS),
    ):
        settings = {"limits": limits, "channels": {"max_channels": max_channels}}
        relay = relay_with(**merged(hook_settings(backend), settings))
        backend.may_answer.clear()
        asked = len(backend.questions)
        async with AsyncExitStack() as stack:
            attempts = [with_cookie(relay, f"{channel}-{number}") for number in range(12)]

            async def status_of(attempt: connect, stack: AsyncExitStack = stack) -> int:
                try:
                    await stack.enter_async_context(attempt)
                except InvalidStatus as refusal:
                    return refusal.response.status_code
                return 101

            statuses = asyncio.gather(*map(status_of, attempts))
            await backend.wait_for_questions(asked + 12)
            backend.may_answer.set()
            assert sorted(await statuses) == [101] * 4 + [503] * 8
            await relay.await_metric("websocket_refusals_total", 8, reason=why.label)


# Expiry and renewal


async def test_a_client_is_closed_when_its_permissions_expire(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    backend.permit(**ANN, expires_in_s=1.5)
    started_at = time.monotonic()
    async with with_cookie(hook_relay, channel) as client:
        assert await await_close(client) == (3000, "token expired")
        assert time.monotonic() - started_at >= 1.5
    backend.permit(**ANN, expires_in_s=None)
    await assert_admitted(with_cookie(hook_relay, channel))


async def renew(client: RelayV1Client, token: str) -> dict[str, Any]:
    number = await client.send("token", token=token)
    notice = await client.next_notice()
    while notice["type"] not in ("token", "error"):
        client.notices.append(notice)
        notice = await client.next_notice()
    assert notice["id"] == number
    return notice


async def test_permissions_of_relay_v1_decide_about_every_channel_of_the_connection(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    backend.permit(subscribe=[f"{channel}.in"], publish=[f"{channel}.out"])
    async with open_relay_v1(hook_relay, additional_headers=COOKIE) as client:
        assert (backend.last["channel"], backend.last["action"]) == (None, "subscribe")
        assert (await client.subscribe(f"{channel}.in"))["type"] == "subscribed"
        refused = await client.subscribe(f"{channel}.out")
        assert refused == {"type": "error", "id": client.last_id, **NOT_AUTHORIZED}
        await client.publish("hello", channel=f"{channel}.out")
        await client.next_notice("published")
        await client.publish("hello", channel=f"{channel}.in")
        assert (await client.next_notice("error"))["status"] == 403
    assert len(backend.questions) == 1, "commands ask nothing"
    answer = await refusal_answer(
        hook_relay.client(channel, subprotocols=["relay.v1"], additional_headers=COOKIE)
    )
    assert (answer.status_code, backend.last["channel"]) == (403, channel)


async def test_a_token_command_asks_the_backend_again_and_moves_the_expiry(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    backend.permit(**ANN, expires_in_s=50)
    headers = {**COOKIE, "Origin": "https://app.example"}
    async with connect_relay_v1(hook_relay, channel, additional_headers=headers) as client:
        await client.next_notice("live")
        backend.permit(user="ann", subscribe=[f"{channel}.other"], publish=["*"], expires_in_s=60)
        assert (await renew(client, "T"))["type"] == "token"
        assert backend.last == {
            "channel": None,
            "action": "subscribe",
            "address": "127.0.0.1",
            "origin": "https://app.example",
            "headers": {"authorization": "Bearer T"},
            "query": "",
        }
        assert client.notices == [{"type": "unsubscribed", "channel": channel, **NOT_AUTHORIZED}]
        backend.permit(**ANN, expires_in_s=0.5)
        assert (await renew(client, "T"))["type"] == "token"
        assert await await_close(client.connection) == (3000, "token expired")


async def test_a_renewal_that_is_refused_or_fails_leaves_the_permissions_as_they_are(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    async with connect_relay_v1(hook_relay, channel, additional_headers=COOKIE) as client:
        await client.next_notice("live")
        for status, why in (
            (401, Refusal.NOT_AUTHENTICATED),
            (403, Refusal.FORBIDDEN),
            (500, Refusal.HOOK_UNAVAILABLE),
        ):
            backend.refuse(status)
            answer = await renew(client, "T")
            assert (answer["status"], answer["reason"]) == (why.status, why.reason)
        assert (await renew(client, "x" * 20_000))["reason"] == "invalid token: malformed"
        backend.permit(user="bob", subscribe=["*"], publish=["*"])
        assert (await renew(client, "T"))["reason"] == "invalid token: other user"
        await client.publish("still permitted")
        assert await client.next_message() == "still permitted"


async def test_a_client_that_disconnects_during_its_renewal_ends_the_question(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    async with connect_relay_v1(hook_relay, channel, additional_headers=COOKIE) as client:
        await client.next_notice("live")
        backend.may_answer.clear()
        await client.send("token", token="T")
        await backend.wait_for_questions(2)
        number = await client.send("token", token="T")
        refused = await client.next_notice("error")
        assert (refused["id"], refused["status"]) == (number, 400)
        await client.publish("meanwhile")
        assert await client.next_message() == "meanwhile"
        client.connection.transport.abort()
    await backend.wait_for_abandoned(1)
    await hook_relay.await_metric(REQUESTS, 1, result="cancelled")


async def test_a_backend_that_gets_no_authorization_gets_no_token_either(
    relay_with: StartRelay, backend: HookBackend, channel: str
) -> None:
    relay = relay_with(**hook_settings(backend, headers=["cookie"]))
    async with connect_relay_v1(relay, channel, additional_headers=COOKIE) as client:
        await client.next_notice("live")
        answer = await renew(client, "T")
        expected = (400, "invalid command: the hook gets no tokens")
        assert (answer["status"], answer["reason"]) == expected
    assert len(backend.questions) == 1


# The relay's own life


async def test_headers_timeout_and_secret_change_at_run_time_and_clients_stay(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    settings = merged(
        hook_settings(backend, headers=["x-session"], timeout_s=3),
        {"hooks": {"secret": "a new secret"}},
    )
    async with with_cookie(hook_relay, channel) as client:
        hook_relay.change_settings(settings)
        hook_relay.signal(SIGHUP)
        event = await hook_relay.await_log("settings reloaded")
        changed = ["auth.hook.headers", "auth.hook.timeout_s", "hooks.secret"]
        assert (event["changed"], event["needs_restart"]) == (changed, [])
        async with hook_relay.client(channel, additional_headers={**COOKIE, "X-Session": "5"}):
            assert backend.last["headers"] == {"x-session": "5"}
            assert backend.questions[-1].is_signed_with("a new secret")
        backend.may_answer.clear()
        await assert_unavailable(hook_relay, channel, Refusal.HOOK_UNAVAILABLE)
        hook_relay.change_settings(merged(settings, {"auth": {"hook": {"max_in_flight": 7}}}))
        hook_relay.signal(SIGHUP)
        event = await hook_relay.await_log("settings reloaded", count=2)
        assert event["needs_restart"] == ["auth.hook.max_in_flight"]
        await client.send("still connected")
        assert await receive(client) == "still connected"


async def test_a_relay_that_stops_refuses_the_clients_that_wait_for_the_backend(
    hook_relay: RelayProcess, backend: HookBackend, channel: str
) -> None:
    backend.may_answer.clear()
    async with with_http() as http, asyncio.TaskGroup() as group:
        upgrade = group.create_task(refusal_answer(with_cookie(hook_relay, channel)))
        url = hook_relay.http_url(path_of(channel))
        post = group.create_task(http.post(url, content=b"hello"))
        await backend.wait_for_questions(2)
        hook_relay.signal()
    assert text_of(upgrade.result()) == (503, "draining")
    assert (post.result().status_code, post.result().text) == (503, "draining\n")
    assert await hook_relay.exit_code() == 0
    await backend.wait_for_abandoned(2)
    events = [event["event"] for event in hook_relay.log_events]
    assert "requests aborted" not in events
    assert "hook request failed" not in events


def with_http() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(verify=NO_CA, trust_env=False, timeout=60)
