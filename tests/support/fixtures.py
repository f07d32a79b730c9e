"""Pytest plugin: relays for the tests, shared ones and ones of a single test."""

import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.brokers import Broker, NatsBroker, RedisBroker
from tests.support.certificates import CertificatePair, make_pair
from tests.support.issuer import SECRET
from tests.support.programs import ANY_REDIS, NATS, needed
from tests.support.relay_process import RelayProcess, StartRelay, StartReplicas, merged

BROKERS = {
    "redis": (RedisBroker, ANY_REDIS),
    "nats": (NatsBroker, (NATS,)),
}


@pytest.fixture(scope="session")
def shared_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path_factory.mktemp("shared")) as relay:
        yield relay


@pytest.fixture
async def relay(shared_relay: RelayProcess) -> AsyncIterator[RelayProcess]:
    """A relay with default settings. No other test uses it at the same time."""
    await shared_relay.await_metric("websocket_connected_clients", 0)
    yield shared_relay
    assert shared_relay.unexpected_lines == []


@pytest.fixture(scope="session")
def shared_short_deadline_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    settings = {"limits": {"handshake_timeout_s": 2}}
    with RelayProcess(tmp_path_factory.mktemp("short-deadline"), settings) as relay:
        yield relay


@pytest.fixture
async def short_deadline_relay(
    shared_short_deadline_relay: RelayProcess,
) -> AsyncIterator[RelayProcess]:
    """A relay with a deadline of two seconds for handshakes and for closing handshakes."""
    await shared_short_deadline_relay.await_metric("websocket_connected_clients", 0)
    yield shared_short_deadline_relay
    assert shared_short_deadline_relay.unexpected_lines == []


@pytest.fixture
def channel() -> str:
    """A channel that no other test uses."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def relay_with(tmp_path: Path) -> Iterator[StartRelay]:
    """Start a relay with settings: `relay_with(limits={"max_connections": 2})`."""
    started: list[RelayProcess] = []
    with ExitStack() as stack:

        def start(env: dict[str, str] | None = None, **settings: Any) -> RelayProcess:
            directory = tmp_path / f"relay-{len(started)}"
            directory.mkdir()
            relay = RelayProcess(directory, settings, env)
            started.append(relay)
            return stack.enter_context(relay)

        yield start
    assert [line for relay in started for line in relay.unexpected_lines] == []


@pytest.fixture
def pair() -> CertificatePair:
    """The certificate and key with which a TLS relay starts."""
    return make_pair()


@pytest.fixture
def certificate_directory(tmp_path: Path, pair: CertificatePair) -> Path:
    """The directory of the certificate and key of a TLS relay."""
    directory = tmp_path / "certificates"
    directory.mkdir()
    pair.write_to(directory)
    return directory


@pytest.fixture
def tls_relay_with(
    relay_with: StartRelay, pair: CertificatePair, certificate_directory: Path
) -> StartRelay:
    """Start a relay that serves wss:// and https://."""
    tls = {
        "enabled": True,
        "cert_file": str(certificate_directory / "cert.pem"),
        "key_file": str(certificate_directory / "key.pem"),
    }

    def start(**settings: Any) -> RelayProcess:
        relay = relay_with(**merged({"server": {"tls": tls}}, settings))
        relay.tls_context = pair.client_context()
        return relay

    return start


@pytest.fixture
def secret() -> str:
    """The secret that signs tokens."""
    return SECRET


@pytest.fixture
def jwt_relay(relay_with: StartRelay, secret: str) -> RelayProcess:
    """A relay that requires tokens."""
    return relay_with(auth={"mode": "jwt", "jwt": {"secret": secret}})


@pytest.fixture
async def redis_replicas(
    relay_with: StartRelay, tmp_path: Path
) -> AsyncIterator[tuple[RelayProcess, RelayProcess]]:
    """Two relays on one Redis, which stop without a spread."""
    async with RedisBroker(needed(*ANY_REDIS), tmp_path / "broker") as broker:
        settings = {"backplane": {"url": broker.url}, "shutdown": {"spread_s": 0, "timeout_s": 1}}
        yield relay_with(**settings), relay_with(**settings)


@pytest.fixture(params=BROKERS)
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Broker]:
    kind, programs = BROKERS[request.param]
    async with kind(needed(*programs), tmp_path / "broker") as started:
        yield started


@pytest.fixture
def replicas_with(broker: Broker, tmp_path: Path) -> Iterator[StartReplicas]:
    """Start relays on the broker: `replicas_with(3, history={"max_messages": 10})`."""
    with ExitStack() as stack:
        started: list[RelayProcess] = []

        def start(count: int = 2, **settings: Any) -> Sequence[RelayProcess]:
            new = []
            for _ in range(count):
                directory = tmp_path / f"relay-{len(started)}"
                directory.mkdir()
                relay = RelayProcess(
                    directory, merged({"backplane": {"url": broker.url}}, settings)
                )
                started.append(stack.enter_context(relay))
                new.append(relay)
            return new

        yield start
        lines = [line for relay in started for line in relay.unexpected_lines]
        unexpected = [line for line in lines if "backplane" not in line]
        assert not unexpected, "\n".join(unexpected)
