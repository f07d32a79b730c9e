"""The proxies' files on the how-to pages: real proxies in front of two relays, under load."""

import asyncio
import contextlib
import os
import re
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websocket_relay.client import Connected, Disconnected
from websocket_relay.client import Relay as Client
from websocket_relay.client.events import Event
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.support.brokers import RedisBroker, free_port
from tests.support.certificates import make_pair
from tests.support.programs import ANY_REDIS, CURL, needed
from tests.support.proxies import (
    PROXIES,
    SITE,
    Proxy,
    blocks_of,
    diffs_of,
    relay_settings_of,
)
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import HOST, ROOT, RelayProcess, merged, receive

SUBSCRIBERS = 8
PUBLISHERS = "abc"
LAST_MESSAGE = "the last message"
CHANNEL = "news"

each_proxy = pytest.mark.parametrize("kind", PROXIES)


class Deployment:
    """Two relays on one Redis, and a proxy in front of them."""

    def __init__(self, stack: ExitStack, directory: Path, broker: RedisBroker) -> None:
        self.relays: list[RelayProcess] = []
        self._stack = stack
        self._directory = directory
        self._broker = broker
        self._ports = [free_port() for _ in range(2)]
        self._settings: dict[str, Any] = {}
        self._proxy: Proxy | None = None
        self._pair = make_pair()
        self.tls = self._pair.client_context()
        self.certificate = self._directory / "trusted.pem"
        self.certificate.write_bytes(self._pair.certificate_pem)

    async def start(
        self,
        kind: str,
        changes: Mapping[str, str] | None = None,
        path: str = "/readyz",
        **settings: Any,
    ) -> Proxy:
        """Start the relays and the proxy.

        Args:
            kind: which proxy.
            changes: replacements in the page's file.
            path: of the request that shows that the proxy works.
            settings: of the relays, besides those on the proxy's page.
        """
        self._settings = merged(relay_settings_of(kind), settings)
        self.relays = list(await asyncio.gather(*map(self._start_relay, range(2))))
        proxy = PROXIES[kind](self._directory / kind, self._pair, self._ports, changes or {})
        self._proxy = self._stack.enter_context(proxy)
        await proxy.wait_until_up(path)
        return proxy

    async def _start_relay(self, index: int) -> RelayProcess:
        directory = self._directory / f"relay-{index}"
        directory.mkdir(exist_ok=True)
        here = {
            "server": {"port": self._ports[index], "trusted_proxies": [HOST]},
            "backplane": {"url": self._broker.url},
        }
        relay = RelayProcess(directory, merged(self._settings, here))
        self._stack.callback(relay.end)
        await asyncio.to_thread(relay.__enter__)
        return relay

    async def restart(self, index: int) -> None:
        """Stop a relay, and start it again at the same address."""
        assert await self.relays[index].stop() == 0
        self.relays[index] = await self._start_relay(index)

    def resuming_client(self, channel: str, **options: Any) -> Client:
        """Return a client that resumes, through the proxy."""
        return Client(self._url(channel), ssl=self.tls, start_patience_s=PATIENCE_S, **options)

    def plain_client(self, channel: str, *, prefix: str = "", **options: Any) -> connect:
        """Connect a plain WebSocket client through the proxy."""
        url = self._url(channel, prefix)
        return connect(url, ssl=self.tls, proxy=None, open_timeout=PATIENCE_S, **options)

    def _url(self, channel: str, prefix: str = "") -> str:
        assert self._proxy is not None
        return self._proxy.url(f"{prefix}/channels/{channel}")


@pytest.fixture(autouse=True)
def _no_http_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    redis = needed(*ANY_REDIS)
    async with RedisBroker(redis, tmp_path / "broker") as broker:
        with ExitStack() as stack:
            made = Deployment(stack, tmp_path, broker)
            yield made
        assert not [line for relay in made.relays for line in relay.unexpected_lines]


# Load


class RecordingSubscriber:
    """A client that resumes, and records its messages, gaps and connections."""

    def __init__(self, deployment: Deployment) -> None:
        self.received: list[str] = []
        self.disconnections = 0
        self.connections = 0
        self.gaps = 0
        self._client = deployment.resuming_client(CHANNEL, on_event=self._record)

    def _record(self, event: Event) -> None:
        self.disconnections += isinstance(event, Disconnected)
        self.connections += isinstance(event, Connected)

    async def receive_all(self, is_connected: asyncio.Event) -> None:
        """Receive until the last message."""
        async with self._client as client, client.subscribe(CHANNEL) as subscription:
            is_connected.set()
            async for message in subscription:
                self.gaps += message.after_gap
                self.received.append(str(message.data))
                if message.data == LAST_MESSAGE:
                    return


async def publish_until(stop: asyncio.Event, client: Client, name: str) -> list[str]:
    """Publish one message after another; return them."""
    published: list[str] = []
    async with client:
        while not stop.is_set():
            published.append(f"{name} {len(published)}")
            await client.publish(CHANNEL, published[-1])
            await asyncio.sleep(0.01)
    return published


class ShortConnections:
    """Clients that connect and disconnect one after another, and the errors of those that fail."""

    def __init__(self) -> None:
        self.count = 0
        self.errors: list[str] = []

    async def connect_until(self, stop: asyncio.Event, deployment: Deployment) -> None:
        """Connect again and again."""
        while not stop.is_set():
            try:
                async with deployment.plain_client("elsewhere"):
                    self.count += 1
                await asyncio.sleep(0.02)
            except (InvalidStatus, OSError, EOFError) as error:
                self.errors.append(repr(error))

    async def wait_for(self, more: int) -> None:
        """Wait for a number of connections from now on."""
        until = self.count + more
        async with asyncio.timeout(PATIENCE_S):
            while self.count < until:  # noqa: ASYNC110 - the tasks of this loop
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def subscribed(deployment: Deployment) -> AsyncIterator[Sequence[RecordingSubscriber]]:
    """Connect subscribers, and wait at the end until they have the last message."""
    subscribers = [RecordingSubscriber(deployment) for _ in range(SUBSCRIBERS)]
    async with asyncio.TaskGroup() as group:
        for subscriber in subscribers:
            is_connected = asyncio.Event()
            group.create_task(subscriber.receive_all(is_connected))
            async with asyncio.timeout(PATIENCE_S):
                await is_connected.wait()
        yield subscribers


async def publish_last_message(deployment: Deployment) -> None:
    async with deployment.resuming_client(CHANNEL) as client:
        await client.publish(CHANNEL, LAST_MESSAGE)


def lost_and_duplicates(
    published: Sequence[str], subscribers: Sequence[RecordingSubscriber]
) -> tuple[int, int]:
    """Count missing and repeated messages over all subscribers."""
    lost = duplicates = 0
    for subscriber in subscribers:
        counts = Counter(subscriber.received)
        lost += sum(message not in counts for message in published)
        duplicates += sum(count - 1 for count in counts.values())
    return lost, duplicates


@pytest.mark.timeout(120)
@each_proxy
async def test_a_reload_and_a_rolling_restart_under_load_lose_and_duplicate_nothing(
    deployment: Deployment, kind: str, record_property: Callable[[str, object], None]
) -> None:
    proxy = await deployment.start(kind, shutdown={"spread_s": 0.5})
    stop, short = asyncio.Event(), ShortConnections()
    async with subscribed(deployment) as subscribers, asyncio.TaskGroup() as group:
        publishing = [
            group.create_task(publish_until(stop, deployment.resuming_client(CHANNEL), name))
            for name in PUBLISHERS
        ]
        group.create_task(short.connect_until(stop, deployment))
        await short.wait_for(5)
        await proxy.reload()
        await short.wait_for(5)
        assert not any(each.disconnections for each in subscribers), "by the reload"
        for index in range(2):
            await deployment.restart(index)
            await deployment.relays[index].await_metric_at_least("websocket_connections_total", 1)
        stop.set()
        published = [message for each in publishing for message in await each]
        await publish_last_message(deployment)
    lost, duplicates = lost_and_duplicates(published, subscribers)
    counts = {
        "published": len(published),
        "expected deliveries": len(published) * SUBSCRIBERS,
        "lost": lost,
        "duplicates": duplicates,
        "reconnections": sum(each.connections for each in subscribers) - SUBSCRIBERS,
        "new connections": short.count,
        "refused": len(short.errors),
    }
    print(kind, counts)
    for name, count in counts.items():
        record_property(name, count)
    assert (lost, duplicates) == (0, 0)
    assert all(each.received == subscribers[0].received for each in subscribers), "in one order"
    assert not any(each.gaps for each in subscribers)
    assert counts["reconnections"] >= SUBSCRIBERS, "each relay had some of them"
    assert short.errors == []


@pytest.mark.parametrize(
    ("kind", "on_the_page", "here"),
    [
        ("nginx", "worker_shutdown_timeout 1h", "worker_shutdown_timeout 1s"),
        ("haproxy", "hard-stop-after 1h", "hard-stop-after 1s"),
    ],
)
async def test_a_client_that_is_cut_off_some_time_after_a_reload_resumes_and_misses_nothing(
    deployment: Deployment, kind: str, on_the_page: str, here: str
) -> None:
    proxy = await deployment.start(kind, {on_the_page: here})
    stop = asyncio.Event()
    async with subscribed(deployment) as subscribers, asyncio.TaskGroup() as group:
        direct = Client(deployment.relays[0].ws_url())
        publishing = group.create_task(publish_until(stop, direct, "a"))
        await proxy.reload()
        async with asyncio.timeout(PATIENCE_S):
            while not all(one.connections > 1 for one in subscribers):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
        stop.set()
        published = await publishing
        await publish_last_message(deployment)
    assert lost_and_duplicates(published, subscribers) == (0, 0)
    assert not any(each.gaps for each in subscribers)


@each_proxy
async def test_events_and_posts_pass_at_once_and_the_client_s_address_is_forwarded(
    deployment: Deployment, kind: str
) -> None:
    proxy = await deployment.start(
        kind,
        limits={"max_connections_per_ip": 3},
        shutdown={"spread_s": 0, "readiness_delay_s": 0},
    )
    url = proxy.url(f"/channels/{CHANNEL}?access_token=very-secret", "https")
    events_url = proxy.url(f"/channels/{CHANNEL}/events?access_token=very-secret", "https")
    async with (
        httpx2.AsyncClient(verify=deployment.tls, trust_env=False, timeout=PATIENCE_S) as http,
        http.stream("GET", events_url) as events,
    ):
        lines = events.aiter_lines()
        for number in range(3):
            posted = await http.post(
                url, content=str(number), headers={"Content-Type": "text/plain"}
            )
            assert posted.status_code == 202
            async for line in lines:
                if line == f"data: {number}":
                    break
    async with AsyncExitStack() as stack:

        def client_from(address: str) -> connect:
            return deployment.plain_client(CHANNEL, local_addr=(address, 0))

        for _ in range(2 * 3):  # each relay counts separately
            await stack.enter_async_context(client_from("127.0.0.2"))
        with pytest.raises(InvalidStatus) as refused:
            await client_from("127.0.0.2")
        assert refused.value.response.status_code == 503
        client = await stack.enter_async_context(client_from("127.0.0.3"))
        await client.send("hello")
        assert await receive(client) == "hello"
    assert "secret" not in proxy.log


# What the pages show besides the files


@pytest.mark.parametrize("kind", ["nginx", "haproxy"])
async def test_the_proxy_s_own_check_accepts_the_file(deployment: Deployment, kind: str) -> None:
    proxy = await deployment.start(kind, shutdown={"spread_s": 0})
    proxy.check_files()


def commands_with_output(page: str) -> list[tuple[str, str]]:
    """Return the `console` commands of a page that have output, with that output."""
    text = "".join(block.text for block in blocks_of(page, "console"))
    parts = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)
    # A command that runs until Ctrl-C is the last one, without output.
    return parts[:-1]


@each_proxy
async def test_the_check_of_the_whole_path_prints_what_the_page_shows(
    deployment: Deployment, kind: str
) -> None:
    needed(CURL)
    proxy = await deployment.start(kind, shutdown={"spread_s": 0, "readiness_delay_s": 0})
    trusted = str(deployment.certificate)
    here = {"CURL_CA_BUNDLE": trusted, "SSL_CERT_FILE": trusted, "no_proxy": "*"}
    path = os.pathsep.join((str(ROOT / ".venv" / "bin"), os.environ["PATH"]))
    commands = commands_with_output("proxies")
    assert len(commands) == 3
    for command, output in commands:
        done = await asyncio.to_thread(
            subprocess.run,
            ["sh", "-c", command.replace(SITE, proxy.address)],
            env=os.environ | here | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert (done.returncode, done.stdout.strip()) == (0, output.strip()), done.stderr


async def assert_served_below(prefix: str, deployment: Deployment, proxy: Proxy) -> None:
    async with (
        deployment.plain_client(CHANNEL, prefix=prefix) as one,
        deployment.plain_client(CHANNEL, prefix=prefix) as other,
    ):
        await one.send("hello")
        assert await receive(one) == await receive(other) == "hello"
    async with httpx2.AsyncClient(verify=deployment.tls, trust_env=False) as http:

        async def get(path: str) -> httpx2.Response:
            return await http.get(proxy.url(path, "https"))

        page = await get(f"{prefix}/")
        for name in re.findall(r'(?:src|href)="([^"]+)"', page.text):
            assert (await get(f"{prefix}/{name}")).status_code == 200, name
        assert (await get("/other")).status_code in (404, 503)


@each_proxy
async def test_a_sub_path_reaches_relays_with_this_base_path(
    deployment: Deployment, kind: str
) -> None:
    settings = relay_settings_of("sub-path")
    prefix = settings["server"]["base_path"]
    change = diffs_of("sub-path", PROXIES[kind].page_file)[0]
    settings["shutdown"] = {"spread_s": 0, "readiness_delay_s": 0}
    proxy = await deployment.start(kind, change, f"{prefix}/openapi.json", **settings)
    await assert_served_below(prefix, deployment, proxy)


async def test_a_sub_path_that_the_proxy_removes_needs_no_base_path(
    deployment: Deployment,
) -> None:
    _, change = diffs_of("sub-path", PROXIES["nginx"].page_file)
    proxy = await deployment.start("nginx", change, "/live/readyz", shutdown={"spread_s": 0})
    await assert_served_below("/live", deployment, proxy)
