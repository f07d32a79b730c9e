"""File descriptors: where they run out, clients are refused, and all else goes on."""

import asyncio
import resource
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from websocket_relay import file_descriptors
from websocket_relay.file_descriptors import AT_START, RESERVED, FileDescriptors, count_open
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus
from websockets.http11 import Response

from tests.support.brokers import Broker
from tests.support.certificates import Pair
from tests.support.half_open import HALF_A_HELLO, connections
from tests.support.relay_process import Relay, StartRelay, eventually, merged, receive, run_command

LIMIT = 256
MANY = 600
PATIENT = {"limits": {"handshake_timeout_s": 60}, "shutdown": {"spread_s": 0, "timeout_s": 3}}


@pytest.fixture
def tls_settings(certificate_directory: Path) -> Mapping[str, Any]:
    files = {f"{name}_file": str(certificate_directory / f"{name}.pem") for name in ("cert", "key")}
    return merged(PATIENT, {"server": {"tls": {"enabled": True} | files}})


@asynccontextmanager
async def crowd(
    relay: Relay, count: int
) -> AsyncIterator[tuple[Sequence[ClientConnection], Sequence[Response]]]:
    """Connect so many clients; those that are let in stay."""
    let_in: list[ClientConnection] = []
    refusals: list[Response] = []
    async with AsyncExitStack() as stack:

        async def come_in() -> None:
            try:
                let_in.append(await stack.enter_async_context(relay.client("crowd")))
            except InvalidStatus as refusal:
                refusals.append(refusal.response)

        for _ in range(0, count, 50):
            await asyncio.gather(*(come_in() for _ in range(50)))
        yield let_in, refusals


async def assert_probes_are_answered(relay: Relay) -> None:
    for path in ("/healthz", "/readyz"):
        assert (await relay.get(path)).status_code == 200
        assert (await relay.get_metrics(path)).status_code == 200
    assert (await relay.get_metrics()).status_code == 200


async def gets_in(relay: Relay) -> tuple[bool, object]:
    try:
        async with relay.client("crowd") as client:
            await client.send("in")
            return await receive(client) == "in", "in"
    except (InvalidStatus, OSError) as refusal:
        return False, repr(refusal)


async def test_clients_that_do_not_fit_are_refused_and_all_else_goes_on(tmp_path: Path) -> None:
    with Relay(tmp_path, PATIENT, max_descriptors=LIMIT) as relay:
        async with crowd(relay, MANY) as (let_in, refusals):
            assert len(let_in) + len(refusals) == MANY
            assert LIMIT - RESERVED - AT_START <= len(let_in) <= LIMIT - RESERVED
            for refusal in refusals:
                assert refusal.status_code == 503
                assert bytes(refusal.body or b"") == b"too few file descriptors\n"
                assert 1 <= int(refusal.headers["Retry-After"]) <= 5
            for _ in range(3):
                await assert_probes_are_answered(relay)
            metrics = await relay.metrics()
            refused = metrics.value("websocket_refusals_total", reason="descriptors")
            assert refused == len(refusals)
            assert metrics.value("websocket_connected_clients") == len(let_in)
            assert 0 < metrics.value("websocket_free_descriptors") <= RESERVED
            await let_in[0].send("to all who are in")
            for client in let_in:
                assert await receive(client) == "to all who are in"
            for client in let_in[:10]:
                await client.close()
            await eventually(lambda: gets_in(relay), "room for another client")
        assert await relay.stop() == 0
        warnings = [event for event in relay.log_events if event["level"] == "warning"]
        told = [(event["event"], event["reason"], event["setting"]) for event in warnings]
        assert told == [("clients refused", "descriptors", "ulimit -n")]
        assert relay.complaints == []


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nX: "])
async def test_connections_that_say_nothing_take_no_descriptor_that_a_client_needs(
    tmp_path: Path, first: bytes
) -> None:
    with Relay(tmp_path, PATIENT, max_descriptors=LIMIT) as relay:
        async with connections(relay, MANY, first):
            await assert_probes_are_answered(relay)
            async with crowd(relay, 50) as (let_in, _):
                assert len(let_in) == 50
                await assert_probes_are_answered(relay)
            assert relay.descriptors() < LIMIT - 32
        assert relay.complaints == []


async def test_tls_handshakes_that_never_end_take_none_either(
    tmp_path: Path, pair: Pair, tls_settings: Mapping[str, Any]
) -> None:
    with Relay(tmp_path, tls_settings, max_descriptors=LIMIT) as relay:
        relay.tls_context = pair.trusting_context()
        async with relay.client("news") as client, connections(relay, MANY, b"", HALF_A_HELLO):
            await assert_probes_are_answered(relay)
            async with crowd(relay, 50) as (let_in, _):
                assert len(let_in) == 50
                await assert_probes_are_answered(relay)
            assert relay.descriptors() < LIMIT - 32
            await client.send("still here")
            assert await receive(client) == "still here"
            assert await relay.metric("websocket_refusals_total", reason="descriptors") > 0
        assert await relay.stop() == 0
        assert relay.complaints == []


async def test_where_clients_have_all_descriptors_the_broker_is_reached_again(
    broker: Broker, tmp_path: Path
) -> None:
    settings = merged(PATIENT, {"backplane": {"url": broker.url}})
    with Relay(tmp_path, settings, max_descriptors=LIMIT) as relay:
        async with crowd(relay, LIMIT) as (let_in, refusals):
            assert refusals
            broker.stop()
            await relay.metric_is("websocket_backplane_up", 0)
            await broker.start()
            await relay.metric_is("websocket_backplane_up", 1)
            await let_in[0].send("again")
            assert await receive(let_in[-1]) == "again"


# What the operator is told


def test_a_limit_of_connections_that_the_descriptors_do_not_allow_is_a_warning(
    tmp_path: Path,
) -> None:
    file = tmp_path / "relay.yaml"
    file.write_text(yaml.safe_dump({"limits": {"max_connections": 2_000_000_000}}))
    done = run_command("check", "--config-file", str(file), directory=tmp_path)
    assert done.exit_code == 0
    (warning,) = done.error_lines
    assert warning.startswith("websocket-relay: warning: too few file descriptors (limit: ")
    assert warning.endswith(f"needed: {2_000_000_000 + RESERVED + AT_START})")


async def test_the_start_warns_of_it_too(tmp_path: Path) -> None:
    settings = merged(PATIENT, {"limits": {"max_connections": LIMIT}})
    with Relay(tmp_path, settings, max_descriptors=LIMIT) as relay:
        warning = relay.await_log("too few file descriptors")
        assert (warning["level"], warning["limit"]) == ("warning", LIMIT)
        assert warning["needed"] == LIMIT + RESERVED + AT_START


async def test_a_limit_that_fits_is_no_warning(relay_with: StartRelay) -> None:
    relay = relay_with(limits={"max_connections": 1_000})
    assert [event["event"] for event in relay.log_events if event["level"] == "warning"] == []


# Counting


def test_descriptors_are_counted(tmp_path: Path) -> None:
    before = count_open()
    with (tmp_path / "a").open("w"), (tmp_path / "b").open("w"):
        assert count_open() == before + 2
    assert count_open() == before


def test_connections_count_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    connected = 20

    def look() -> int:
        looks.append(100)
        return looks[-1]

    monkeypatch.setattr(file_descriptors, "count_open", look)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1_000, 1_000))
    held = FileDescriptors(lambda: connected, lambda: 0, lambda: 0)
    assert held.free == 900
    taken = len(looks)
    connected = 500
    assert held.can_accept_client()
    assert len(looks) == taken, "no look is taken where there are enough anyway"
    monkeypatch.setattr(held, "_look_at", float("inf"))
    connected = 1_000 - 80 - RESERVED
    assert held.can_accept_client()
    connected += 1
    assert not held.can_accept_client()
    monkeypatch.setattr(held, "_look_at", 0.0)
    assert held.can_accept_client(), "a look found that others were closed"
