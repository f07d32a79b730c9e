"""File descriptors: when few are free, new clients are refused and everything else continues."""

import asyncio
import resource
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from websocket_relay import file_descriptors
from websocket_relay.file_descriptors import (
    AT_START,
    RESERVED,
    FileDescriptors,
    count_open,
    highest_limit,
)
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus
from websockets.http11 import Response

from tests.support.brokers import RedisBroker
from tests.support.certificates import CertificatePair
from tests.support.half_open import PARTIAL_CLIENT_HELLO, open_connections
from tests.support.hook_backend import HookBackend, hook_settings
from tests.support.programs import ANY_REDIS, needed
from tests.support.relay_process import (
    RelayProcess,
    StartRelay,
    eventually,
    merged,
    receive,
    run_command,
)

LIMIT = 256
MORE_THAN_LIMIT = 400
AT_A_TIME = 50
"""Handshakes in progress: each has a descriptor, also one that is refused at its end."""

TOO_MANY = 2_000_000_000
SETTINGS = {"limits": {"handshake_timeout_s": 60}, "shutdown": {"spread_s": 0, "timeout_s": 3}}


@pytest.fixture
def tls_settings(certificate_directory: Path) -> Mapping[str, Any]:
    files = {f"{name}_file": str(certificate_directory / f"{name}.pem") for name in ("cert", "key")}
    return merged(SETTINGS, {"server": {"tls": {"enabled": True} | files}})


@asynccontextmanager
async def connected_clients(
    relay: RelayProcess, count: int, *, at_a_time: int = AT_A_TIME
) -> AsyncIterator[tuple[Sequence[ClientConnection], Sequence[Response]]]:
    """Connect `count` clients; yield those that are admitted, and the refusals of the others."""
    admitted: list[ClientConnection] = []
    refusals: list[Response] = []
    async with AsyncExitStack() as stack:

        async def connect() -> None:
            try:
                admitted.append(await stack.enter_async_context(relay.client("news")))
            except InvalidStatus as refusal:
                refusals.append(refusal.response)

        for _ in range(0, count, at_a_time):
            await asyncio.gather(*(connect() for _ in range(at_a_time)))
        yield admitted, refusals


async def assert_probes_are_answered(relay: RelayProcess) -> None:
    for path in ("/healthz", "/readyz"):
        assert (await relay.get(path)).status_code == 200
        assert (await relay.get_metrics(path)).status_code == 200
    assert (await relay.get_metrics()).status_code == 200


async def admits_a_client(relay: RelayProcess) -> tuple[bool, object]:
    """Return whether the relay admits one more client, and what was seen."""
    try:
        async with relay.client("news") as client:
            await client.send("admitted")
            return await receive(client) == "admitted", "admitted"
    except (InvalidStatus, OSError) as refusal:
        return False, repr(refusal)


async def test_clients_are_refused_while_few_descriptors_are_free_and_the_relay_works_on(
    tmp_path: Path,
) -> None:
    with RelayProcess(tmp_path, SETTINGS, max_descriptors=LIMIT) as relay:
        async with connected_clients(relay, MORE_THAN_LIMIT) as (admitted, refusals):
            assert len(admitted) + len(refusals) == MORE_THAN_LIMIT
            assert len(admitted) >= LIMIT - RESERVED - AT_START - AT_A_TIME
            assert len(admitted) <= LIMIT - RESERVED
            for refusal in refusals:
                assert refusal.status_code == 503
                assert bytes(refusal.body or b"") == b"too few file descriptors\n"
                assert 1 <= int(refusal.headers["Retry-After"]) <= 5
            await assert_probes_are_answered(relay)
            metrics = await relay.metrics()
            refused = metrics.value("websocket_refusals_total", reason="descriptors")
            assert refused == len(refusals)
            assert metrics.value("websocket_connected_clients") == len(admitted)
            assert 0 < metrics.value("websocket_free_descriptors") <= RESERVED + AT_A_TIME
            await admitted[0].send("to all clients")
            for client in admitted:
                assert await receive(client) == "to all clients"
            for client in admitted[:10]:
                await client.close()
            await eventually(lambda: admits_a_client(relay), "a free descriptor")
        assert await relay.stop() == 0
        warnings = [event for event in relay.log_events if event["level"] == "warning"]
        logged = [(event["event"], event["reason"], event["setting"]) for event in warnings]
        assert logged == [("clients refused", "descriptors", "ulimit -n")]
        assert relay.unexpected_lines == []


async def test_clients_leave_as_many_descriptors_as_the_hook_may_have_connections(
    tmp_path: Path,
) -> None:
    questions = 40
    async with HookBackend() as backend:
        settings = merged(SETTINGS, hook_settings(backend, max_in_flight=questions))
        with RelayProcess(tmp_path, settings, max_descriptors=LIMIT) as relay:
            # One after the other: a single connection to the backend is open.
            async with connected_clients(relay, LIMIT, at_a_time=1) as (admitted, refusals):
                assert 0 < len(admitted) <= LIMIT - RESERVED - questions
                reasons = {bytes(refusal.body or b"") for refusal in refusals}
                assert reasons == {b"too few file descriptors\n"}
                await assert_probes_are_answered(relay)


async def test_connections_without_a_complete_request_take_no_descriptor_from_clients(
    tmp_path: Path,
) -> None:
    with RelayProcess(tmp_path, SETTINGS, max_descriptors=LIMIT) as relay:
        async with open_connections(relay, MORE_THAN_LIMIT, b"", b"GET / HTTP/1.1\r\nX: "):
            await assert_probes_are_answered(relay)
            async with connected_clients(relay, 50) as (admitted, _):
                assert len(admitted) == 50
                await assert_probes_are_answered(relay)
            assert relay.descriptors() < LIMIT - 32
        assert relay.unexpected_lines == []


async def test_unfinished_tls_handshakes_take_no_descriptor_from_clients(
    tmp_path: Path, pair: CertificatePair, tls_settings: Mapping[str, Any]
) -> None:
    with RelayProcess(tmp_path, tls_settings, max_descriptors=LIMIT) as relay:
        relay.tls_context = pair.client_context()
        async with (
            relay.client("news") as client,
            open_connections(relay, MORE_THAN_LIMIT, b"", PARTIAL_CLIENT_HELLO),
        ):
            await assert_probes_are_answered(relay)
            async with connected_clients(relay, 50) as (admitted, _):
                assert len(admitted) == 50
                await assert_probes_are_answered(relay)
            assert relay.descriptors() < LIMIT - 32
            await client.send("still connected")
            assert await receive(client) == "still connected"
            assert await relay.metric("websocket_refusals_total", reason="descriptors") > 0
        assert await relay.stop() == 0
        assert relay.unexpected_lines == []


async def test_the_relay_reconnects_to_its_broker_while_clients_have_all_descriptors(
    tmp_path: Path,
) -> None:
    async with RedisBroker(needed(*ANY_REDIS), tmp_path / "broker") as broker:
        settings = merged(SETTINGS, {"backplane": {"url": broker.url}})
        with RelayProcess(tmp_path, settings, max_descriptors=LIMIT) as relay:
            async with connected_clients(relay, LIMIT) as (admitted, refusals):
                assert refusals
                broker.stop()
                await relay.await_metric("websocket_backplane_up", 0)
                await broker.start()
                await relay.await_metric("websocket_backplane_up", 1)
                await admitted[0].send("after the outage")
                assert await receive(admitted[-1]) == "after the outage"


# Warnings to the operator


def test_check_warns_of_a_connection_limit_above_the_descriptor_limit(tmp_path: Path) -> None:
    file = tmp_path / "relay.yaml"
    file.write_text(yaml.safe_dump({"limits": {"max_connections": TOO_MANY}}))
    done = run_command("check", "--config-file", str(file), directory=tmp_path)
    assert done.exit_code == 0
    (warning,) = done.error_lines
    assert warning.startswith("websocket-relay: warning: too few file descriptors (limit: ")
    assert warning.endswith(f"needed: {TOO_MANY + RESERVED + AT_START})")


def test_the_relay_warns_at_its_start_if_the_connection_limit_exceeds_the_descriptor_limit(
    relay_with: StartRelay,
) -> None:
    warning = relay_with(limits={"max_connections": TOO_MANY}).block_until_logged(
        "too few file descriptors"
    )
    assert (warning["level"], warning["limit"]) == ("warning", highest_limit())
    assert warning["needed"] == TOO_MANY + RESERVED + AT_START
    sufficient = relay_with(limits={"max_connections": 1_000})
    assert [event["event"] for event in sufficient.log_events if event["level"] == "warning"] == []


async def test_the_connections_to_the_backend_are_part_of_what_is_needed(
    relay_with: StartRelay,
) -> None:
    async with HookBackend() as backend:
        settings = merged(hook_settings(backend, max_in_flight=50), {"hooks": {"url": backend.url}})
        settings = merged(settings, {"limits": {"max_connections": TOO_MANY}})
        warning = await relay_with(**settings).await_log("too few file descriptors")
    assert warning["needed"] == TOO_MANY + RESERVED + AT_START + 51


@pytest.mark.parametrize(("max_calls", "reserved"), [(0, 0), (50, 50), (10_000, 250)])
def test_a_quarter_of_the_limit_at_most_is_reserved_for_calls(
    monkeypatch: pytest.MonkeyPatch, max_calls: int, reserved: int
) -> None:
    monkeypatch.setattr(file_descriptors, "count_open", lambda: 0)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1_000, 1_000))
    connected = 1_000 - RESERVED - reserved
    descriptors = FileDescriptors(lambda: connected, lambda: 0, lambda: 0, max_calls)
    monkeypatch.setattr(descriptors, "_others", 0)
    monkeypatch.setattr(descriptors, "_look_at", float("inf"))
    assert descriptors.can_accept_client()
    connected += 1
    assert not descriptors.can_accept_client()


# Counting


def test_count_open_counts_open_descriptors(tmp_path: Path) -> None:
    before = count_open()
    with (tmp_path / "a").open("w"), (tmp_path / "b").open("w"):
        assert count_open() == before + 2
    assert count_open() == before


def test_descriptors_are_scanned_only_when_the_estimate_is_close_to_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scans: list[int] = []
    connected = 20

    def count_a_hundred() -> int:
        scans.append(100)
        return scans[-1]

    monkeypatch.setattr(file_descriptors, "count_open", count_a_hundred)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1_000, 1_000))
    descriptors = FileDescriptors(lambda: connected, lambda: 0, lambda: 0)
    assert descriptors.free == 900
    scans_before = len(scans)
    connected = 500
    assert descriptors.can_accept_client()
    assert len(scans) == scans_before, "no scan while enough descriptors are free"
    monkeypatch.setattr(descriptors, "_look_at", float("inf"))
    connected = 1_000 - 80 - RESERVED
    assert descriptors.can_accept_client()
    connected += 1
    assert not descriptors.can_accept_client()
    monkeypatch.setattr(descriptors, "_look_at", 0.0)
    assert descriptors.can_accept_client(), "the scan found that other descriptors were closed"
