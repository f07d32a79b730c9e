"""The server API on several replicas: orders act on all of them, questions are answered by all."""

import asyncio
import socket
from collections.abc import Sequence
from operator import itemgetter
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Any

import pytest
from websocket_relay.cluster.incarnations import SILENCE_S

from tests.support.admission import refusal_answer
from tests.support.broker_logs import ONLY_NATS, ONLY_REDIS, BrokerLog, RedisLog
from tests.support.brokers import Broker
from tests.support.relay_process import (
    RelayProcess,
    StartReplicas,
    await_close,
    eventually,
    receive,
    receive_many,
)
from tests.support.relay_v1 import open_relay_v1, parse_position
from tests.support.server_api import (
    WITH_USERS,
    ask_api,
    bearer_of,
    disconnect,
    request_api,
)

NAME = socket.gethostname()
"""The name of every replica: they run on one machine."""


async def await_replicas(relay: RelayProcess, count: int) -> None:
    """Wait until a replica knows so many that are alive, itself included."""

    async def check() -> tuple[bool, object]:
        replicas = (await ask_api(relay, "/replicas"))["replicas"]
        return len(replicas) == count, replicas

    await eventually(check, f"{count} replicas")


async def start_two(replicas_with: StartReplicas) -> Sequence[RelayProcess]:
    """Start two replicas; return them once they know each other."""
    replicas = replicas_with(2, **WITH_USERS)
    for relay in replicas:
        await await_replicas(relay, 2)
    return replicas


async def refusal_of(relay: RelayProcess, user: str) -> int:
    """Return the status with which a user is refused."""
    answer = await refusal_answer(relay.client("news", additional_headers=bearer_of(user)))
    return answer.status_code


async def test_an_order_acts_on_all_replicas_and_counts_the_clients_of_all(
    replicas_with: StartReplicas,
) -> None:
    one, two = await start_two(replicas_with)
    async with (
        one.client("news", additional_headers=bearer_of("ada")) as here,
        two.client("chat", additional_headers=bearer_of("ada")) as there,
        open_relay_v1(two, additional_headers=bearer_of("eve")) as other,
    ):
        assert (await other.subscribe("news"))["type"] == "subscribed"
        order = {"user": "ada", "code": 4711, "reason": "signed out", "block_s": 600}
        assert await disconnect(one, **order) == {"disconnected": 2}
        for client in (here, there):
            assert await await_close(client) == (4711, "signed out")
        for relay in (one, two):
            assert await refusal_of(relay, "ada") == 403
        assert await disconnect(one, client=other.welcome["client"]) == {"disconnected": 1}
        assert await await_close(other.connection) == (4000, "disconnected")
        assert await disconnect(two, user="ada", block_s=0) == {"disconnected": 0}
    async with (
        one.client("news", additional_headers=bearer_of("ada")) as here,
        two.client("news", additional_headers=bearer_of("eve")) as there,
    ):
        assert await disconnect(two, channel="news") == {"disconnected": 2}
        for client in (here, there):
            assert await await_close(client) == (4000, "disconnected")


async def test_posted_lines_have_their_positions_on_all_replicas(
    replicas_with: StartReplicas,
) -> None:
    one, two = replicas_with(2, **WITH_USERS)
    texts = [f"{number} {'x' * 200}" for number in range(3_000)]
    lines = "\n".join(
        f'{{"channel":"{"news" if number % 2 else "chat"}","text":"{text}"}}'
        for number, text in enumerate(texts)
    )
    async with open_relay_v1(two, additional_headers=bearer_of("ada")) as client:
        for channel in ("news", "chat"):
            await client.subscribe(channel)
        response = await request_api(one, "POST", "/publish", lines)
        assert response.status_code == 202
        received: list[tuple[tuple[int, ...], str | bytes]] = []
        while len(received) < len(texts):
            header, text = await client.receive()
            if "position" in header and "type" not in header:
                received.append((parse_position(header["position"]), text))
    positions = map(parse_position, response.json()["positions"])
    assert sorted(received) == list(zip(positions, texts, strict=True))


async def test_a_question_is_answered_with_what_all_replicas_know(
    replicas_with: StartReplicas,
) -> None:
    one, two = await start_two(replicas_with)
    async with (
        one.client("news", additional_headers=bearer_of("ada")) as first,
        two.client("news", additional_headers=bearer_of("eve")) as second,
        two.client("chat", additional_headers=bearer_of("ada")),
    ):
        for text in ("a", "b"):
            await first.send(text)
        for client in (first, second):
            assert await receive_many(client, 2) == ["a", "b"]
        for relay in (one, two):
            assert await ask_api(relay, "/channels") == {
                "channels": [
                    {"channel": "news", "clients": 2, "messages": 2},
                    {"channel": "chat", "clients": 1, "messages": 0},
                ]
            }
            answer = await ask_api(relay, "/clients")
            clients = answer["clients"]
            assert clients == sorted(clients, key=itemgetter("since"))
            assert sorted((each["user"], each["channels"]) for each in clients) == [
                ("ada", ["chat"]),
                ("ada", ["news"]),
                ("eve", ["news"]),
            ]
            assert "missing" not in answer
        of_ada = await ask_api(one, "/clients?user=ada&limit=1")
        assert (len(of_ada["clients"]), of_ada["truncated"]) == (1, True)


async def test_a_frozen_replica_is_named_and_carries_an_order_out_when_it_goes_on(
    replicas_with: StartReplicas,
) -> None:
    one, two = await start_two(replicas_with)
    async with (
        one.client("news", additional_headers=bearer_of("ada")) as here,
        two.client("news", additional_headers=bearer_of("ada")) as there,
    ):
        two.signal(SIGSTOP)
        try:
            started_at = asyncio.get_running_loop().time()
            answer = await disconnect(one, user="ada", block_s=600)
            took_s = asyncio.get_running_loop().time() - started_at
        finally:
            two.signal(SIGCONT)
        assert answer == {"disconnected": 1, "missing": [NAME]}
        assert took_s < 3.0  # an answer that is not awaited any longer than a second
        for client in (here, there):
            assert await await_close(client) == (4000, "disconnected")
    assert await refusal_of(two, "ada") == 403
    await one.await_metric("websocket_questions_total", 1, result="incomplete")


@ONLY_REDIS
async def test_a_killed_replica_is_missing_until_it_is_known_to_be_dead(
    replicas_with: StartReplicas,
) -> None:
    one, two = await start_two(replicas_with)
    two.signal(SIGKILL)
    assert await ask_api(one, "/clients") == {"clients": [], "missing": [NAME]}
    await await_replicas(one, 1)
    assert await ask_api(one, "/clients") == {"clients": []}


@ONLY_NATS
async def test_questions_in_flight_are_bounded(replicas_with: StartReplicas) -> None:
    one, two = await start_two(replicas_with)
    two.signal(SIGSTOP)
    try:
        responses = await asyncio.gather(*(request_api(one, "GET", "/channels") for _ in range(18)))
    finally:
        two.signal(SIGCONT)
    statuses = sorted(response.status_code for response in responses)
    # Some may have been answered before others arrived on a busy machine.
    assert set(statuses) <= {200, 503}
    refused = [response for response in responses if response.status_code == 503]
    assert all(response.text == "too many API requests\n" for response in refused)
    assert all("retry-after" in response.headers for response in refused)
    assert refused


async def test_a_replica_that_starts_learns_which_users_are_blocked(
    broker_log: BrokerLog, replicas_with: StartReplicas
) -> None:
    (one,) = replicas_with(1, **WITH_USERS)
    await disconnect(one, user="ada", block_s=600)
    await disconnect(one, user="eve", block_s=600)
    await disconnect(one, user="eve", block_s=0)
    await broker_log.delete_stream()  # the order is not in the log any more
    (two,) = await asyncio.to_thread(replicas_with, 1, **WITH_USERS)
    await two.await_metric("websocket_blocked_users", 1)
    assert await refusal_of(two, "ada") == 403
    async with two.client("news", additional_headers=bearer_of("eve")) as client:
        await client.send("not blocked")
        assert await receive(client) == "not blocked"


@ONLY_REDIS
async def test_in_an_outage_orders_and_questions_are_refused(
    broker: Broker, replicas_with: StartReplicas
) -> None:
    (one,) = replicas_with(1, **WITH_USERS)
    broker.kill()
    await one.await_metric("websocket_backplane_up", 0)
    requests: list[tuple[str, str, Any]] = [
        ("GET", "/clients", None),
        ("GET", "/replicas", None),
        ("POST", "/disconnect", {"user": "ada"}),
        ("POST", "/publish", {"channel": "news", "text": "no"}),
    ]
    for method, path, body in requests:
        response = await request_api(one, method, path, body)
        assert (response.status_code, response.text) == (503, "backplane unavailable\n")
    response = await request_api(one, "PATCH", "/logging", {"level": "info"})
    assert response.status_code == 200
    await asyncio.sleep(SILENCE_S)  # so that each heartbeat from before is too old
    await broker.restart()
    while (response := await request_api(one, "GET", "/replicas")).status_code == 503:
        pass
    assert [each["name"] for each in response.json()["replicas"]] == [NAME]


@ONLY_REDIS
@pytest.mark.parametrize("settings", [{}, WITH_USERS])
async def test_a_relay_writes_nothing_about_the_api_into_the_log_unless_it_has_one(
    broker_log: RedisLog, replicas_with: StartReplicas, settings: dict[str, Any]
) -> None:
    one, two = replicas_with(2, **settings)
    headers = bearer_of("ada")
    async with (
        one.client("news", additional_headers=headers) as client,
        two.client("news", additional_headers=headers) as other,
    ):
        await client.send("last")
        assert await receive(client) == await receive(other) == "last"

    async def check() -> tuple[bool, object]:
        log = str(await broker_log.execute("XRANGE", "relay", "-", "+"))
        assert "last" in log
        return ("blocks.ask" in log) is bool(settings), log

    await eventually(check, "the question of a replica that starts")
