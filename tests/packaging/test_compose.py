"""compose.yaml and examples/nginx.conf: the same settings and the same nginx, without Docker."""

import asyncio
import ipaddress
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any, Self

import pytest
import yaml
from websocket_relay.config.model import Settings
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.support.brokers import RedisBroker, free_port
from tests.support.example_nginx import NGINX_CONF, ExampleNginx
from tests.support.followers import LAST_MESSAGE, make_followers, publish_until
from tests.support.programs import ANY_REDIS, needed
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import (
    HOST,
    ROOT,
    RelayProcess,
    await_close,
    eventually,
    receive,
    run_command,
    run_python,
)

COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: Mapping[str, Mapping[str, Any]] = COMPOSE["services"]
RELAYS = sorted(name for name in SERVICES if name.startswith("relay"))
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


def environment_of(service: str, outside: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables of a service, with the values that they take from the environment."""
    values = outside or {}
    return {
        name: VARIABLE.sub(lambda found: values.get(found[1]) or found[2], value)
        for name, value in SERVICES[service]["environment"].items()
    }


def nginx_value(directive: str) -> str:
    """Return the value of a directive that the nginx.conf has once."""
    (value,) = re.findall(rf"^\s*{directive} +([^;]+);", NGINX_CONF.read_text(), re.MULTILINE)
    return str(value)


def seconds(duration: str) -> int:
    assert duration.endswith("s")
    return int(duration[:-1])


class LocalDeployment:
    """The services of compose.yaml as processes of this machine."""

    def __init__(self, stack: ExitStack, directory: Path, broker: RedisBroker) -> None:
        self.relays: dict[str, RelayProcess] = {}
        self._stack = stack
        self._directory = directory
        self._broker = broker
        self._ports = {name: free_port() for name in RELAYS}
        self._settings: Mapping[str, Any] = {}
        nginx_directory = directory / "nginx"
        nginx_directory.mkdir()
        self.nginx = ExampleNginx(nginx_directory, self._ports)

    async def up(self, **settings: Any) -> Self:
        """Start everything."""
        self._settings = settings
        self._stack.enter_context(self.nginx)
        await asyncio.gather(*map(self.start, RELAYS))
        await self.nginx.await_up()
        return self

    async def start(self, name: str) -> None:
        """Start a relay."""
        directory = self._directory / name
        directory.mkdir(exist_ok=True)
        variables = environment_of(name, {"RELAY__BACKPLANE__URL": self._broker.url})
        variables["RELAY__SERVER__TRUSTED_PROXIES"] = HOST  # the address of nginx
        variables["RELAY__SERVER__PORT"] = str(self._ports[name])
        relay = self.relays[name] = RelayProcess(directory, self._settings, variables)
        self._stack.callback(relay.end)
        await asyncio.to_thread(relay.__enter__)

    async def restart(self, name: str) -> None:
        """Stop a relay, and start it again at the same address."""
        assert await self.relays[name].stop() == 0
        await self.start(name)

    def has_outage(self) -> bool:
        """Return whether a relay has lost its broker since the start."""
        lines = [line for relay in self.relays.values() for line in relay.log_lines]
        return any("backplane outage" in line for line in lines)

    async def client_counts(self) -> Sequence[float]:
        """Return the number of clients of each relay."""
        return [await relay.metric("websocket_connected_clients") for relay in self.relays.values()]


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[LocalDeployment]:
    redis = needed(*ANY_REDIS)
    async with RedisBroker(redis, tmp_path / "broker", fsync="everysec") as broker:
        with ExitStack() as stack:
            started = LocalDeployment(stack, tmp_path, broker)
            yield started
        assert not [line for relay in started.relays.values() for line in relay.unexpected_lines]


# The files


def test_the_file_is_valid_by_the_schema_of_compose() -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    done = run_python("-m", "check_jsonschema", *schema, str(ROOT / "compose.yaml"))
    assert done.exit_code == 0, done.stdout


def test_the_variables_of_the_relays_are_valid_settings(tmp_path: Path) -> None:
    done = run_command("check", directory=tmp_path, env=environment_of(RELAYS[0]))
    assert (done.exit_code, done.stderr) == (0, "")
    assert 'url: "redis://redis:6379/0"' in done.stdout


@pytest.mark.fast
def test_the_relays_are_equal_and_only_nginx_has_a_public_port() -> None:
    assert len(RELAYS) == 2
    assert SERVICES[RELAYS[0]] == SERVICES[RELAYS[1]]
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["nginx"]
    assert SERVICES["nginx"]["ports"] == ["8443:8443"]
    assert COMPOSE["networks"]["broker"]["internal"] is True
    assert SERVICES["redis"]["networks"] == ["broker"]


@pytest.mark.fast
def test_no_service_has_capabilities_or_a_writable_file_system() -> None:
    for service in SERVICES.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.fast
def test_the_relays_trust_the_address_of_nginx_only() -> None:
    (pool,) = COMPOSE["networks"]["front"]["ipam"]["config"]
    address = ipaddress.ip_address(SERVICES["nginx"]["networks"]["front"]["ipv4_address"])
    assert address in ipaddress.ip_network(pool["subnet"])
    assert address not in ipaddress.ip_network(pool["ip_range"]), "no other container gets it"
    for name in RELAYS:
        assert environment_of(name)["RELAY__SERVER__TRUSTED_PROXIES"] == str(address)


@pytest.mark.fast
def test_timeouts_and_sizes_fit_the_settings() -> None:
    settings = Settings.model_construct()
    for name in (*RELAYS, "nginx"):
        assert seconds(SERVICES[name]["stop_grace_period"]) > settings.shutdown.timeout_s
    assert seconds(nginx_value("proxy_read_timeout")) > settings.keepalive.ping_interval_s
    assert nginx_value("client_max_body_size") == f"{settings.limits.max_message_bytes >> 20}m"


@pytest.mark.fast
def test_nginx_has_all_relays_as_upstreams() -> None:
    assert sorted(re.findall(r"server (\S+):8443 resolve", NGINX_CONF.read_text())) == RELAYS
    assert SERVICES["nginx"]["volumes"] == ["./examples/nginx.conf:/etc/nginx/nginx.conf:ro"]


def test_nginx_accepts_its_file(tmp_path: Path) -> None:
    nginx = ExampleNginx(tmp_path, {name: free_port() for name in RELAYS})
    done = subprocess.run(
        nginx.command("-t"), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr


# The processes


def assert_healthy(name: str, relay: RelayProcess, directory: Path) -> None:
    """Run the health check of a service, with the port that its relay has here."""
    words = SERVICES[name]["healthcheck"]["test"]
    assert words[:2] == ["CMD", "websocket-relay"]
    env = environment_of(name) | {"RELAY__METRICS__PORT": str(relay.metrics_port)}
    done = run_command(*words[2:], directory=directory, env=env)
    assert (done.exit_code, done.stderr) == (0, "")


async def test_both_relays_deliver_each_message_and_a_stop_closes_clients_with_1001(
    deployment: LocalDeployment, tmp_path: Path
) -> None:
    nginx = (await deployment.up(shutdown={"spread_s": 0.2})).nginx
    async with nginx.client("news") as one, nginx.client("news") as two:
        assert await deployment.client_counts() == [1, 1]
        for name, relay in deployment.relays.items():
            await asyncio.to_thread(assert_healthy, name, relay, tmp_path)
        for client in (one, two):
            await client.send("hello")
            assert await receive(one) == await receive(two) == "hello"
        assert (await nginx.get("/readyz")).json() == {"status": "ready"}
        assert (await nginx.get("/channels/news")).status_code == 426
        assert (await nginx.get("/metrics")).status_code == 404
        # As docker compose stop does: nginx and the relays at once.
        nginx.signal(signal.SIGQUIT)
        for relay in deployment.relays.values():
            relay.signal()
        for client in (one, two):
            code, reason = await await_close(client)
            assert code == 1001
            assert str(reason).startswith("draining; retry_ms=")
    assert await nginx.exit_code() == 0


def client_from(nginx: ExampleNginx, address: str) -> connect:
    """Connect a client from a local address."""
    return nginx.client("news", local_addr=(address, 0))


async def test_an_address_above_its_limit_is_refused_and_another_is_admitted(
    deployment: LocalDeployment,
) -> None:
    nginx = (await deployment.up(limits={"max_connections_per_ip": 1})).nginx
    async with AsyncExitStack() as stack:
        for _ in RELAYS:  # each relay counts its own clients
            await stack.enter_async_context(client_from(nginx, "127.0.0.2"))
        assert await deployment.client_counts() == [1, 1]
        for _ in range(20):
            with pytest.raises(InvalidStatus) as refused:
                await client_from(nginx, "127.0.0.2")
            assert refused.value.response.status_code == 503
        other = await stack.enter_async_context(client_from(nginx, "127.0.0.3"))
        await other.send("hello")
        assert await receive(other) == "hello"


async def test_the_logs_of_nginx_contain_no_token(deployment: LocalDeployment) -> None:
    nginx = (await deployment.up()).nginx
    path = "/channels/news?access_token=very-secret"

    async def statuses_are(*expected: str) -> None:
        async def now() -> tuple[bool, object]:
            found = re.findall(r" status=(\d+) ", "\n".join(nginx.access_log))
            return found == [*expected], nginx.access_log

        await eventually(now, f"{expected} in the log")

    async with nginx.client(path=path):
        pass
    await statuses_are("101")
    relays = list(deployment.relays.values())
    assert await relays[0].stop() == 0
    for _ in RELAYS:
        async with nginx.client(path=path):
            pass
    assert await relays[1].stop() == 0
    with pytest.raises(InvalidStatus) as refused:
        await nginx.client(path=path)
    assert refused.value.response.status_code == 502
    await statuses_are("101", "101", "101", "502")
    nginx.signal()
    assert await nginx.exit_code() == 0
    assert all("GET /channels/news" in line for line in nginx.access_log)
    assert "secret" not in "\n".join((*nginx.access_log, *nginx.log_lines))


async def connect_repeatedly(
    nginx: ExampleNginx, is_over: asyncio.Event, has_outage: Callable[[], bool]
) -> int:
    """Connect again and again; return the number of connections.

    All of them are admitted, unless a relay has lost its broker: Redis on a busy machine, for
    example, may be late.
    """
    count = 0
    while not is_over.is_set():
        try:
            async with nginx.client("elsewhere"):
                count += 1
        except InvalidStatus as refusal:
            if refusal.response.status_code != 503 or not has_outage():
                raise
        await asyncio.sleep(0.02)
    return count


async def test_a_rolling_restart_behind_nginx_loses_and_repeats_no_message(
    deployment: LocalDeployment,
) -> None:
    nginx = (await deployment.up(shutdown={"spread_s": 0.5})).nginx
    followers = await make_followers(nginx, 8)
    is_over = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        following = [group.create_task(follower.follow([nginx])) for follower in followers]
        publishing = [group.create_task(publish_until([nginx], name, is_over)) for name in "abc"]
        connecting = group.create_task(connect_repeatedly(nginx, is_over, deployment.has_outage))
        for name in RELAYS:
            await deployment.restart(name)
        is_over.set()
        published = [message for each in publishing for message in await each]
        async with nginx.client("news") as last:
            await last.send(LAST_MESSAGE)
        await asyncio.gather(*following)
    assert connecting.result(), "new clients connect meanwhile"
    assert sum(follower.reconnections for follower in followers) > len(followers)
    first = followers[0].received
    assert all(follower.received == first for follower in followers)
    assert sorted(map(str, first)) == sorted([*map(str, published), LAST_MESSAGE])
    for name in "abc":
        own = [message for message in published if str(message).startswith(name)]
        assert [message for message in first if str(message).startswith(name)] == own
