"""The proxies of the how-to pages before two relays, under load and in motion."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
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
from tests.support.programs import ANY_REDIS, needed
from tests.support.proxies import PROXIES, Proxy
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import HOST, Relay, receive

LISTENERS = 8
SPEAKERS = "abc"
THE_END = "the end"


class Site:
    """Two relays on a Redis, and a proxy before them."""

    def __init__(self, stack: ExitStack, directory: Path, broker: RedisBroker) -> None:
        self.relays: list[Relay] = []
        self._stack = stack
        self._directory = directory
        self._broker = broker
        self._ports = [free_port() for _ in range(2)]
        self._settings: dict[str, Any] = {}
        self._proxy: Proxy | None = None
        self._pair = make_pair()
        self.tls = self._pair.trusting_context()

    async def up(self, kind: str, changes: dict[str, str] | None = None, **settings: Any) -> Proxy:
        """Start everything."""
        self._settings = settings
        self.relays = list(await asyncio.gather(*map(self._start, range(2))))
        proxy = PROXIES[kind](self._directory / kind, self._pair, self._ports, changes or {})
        self._proxy = self._stack.enter_context(proxy)
        await proxy.is_up()
        return proxy

    async def _start(self, number: int) -> Relay:
        directory = self._directory / f"relay-{number}"
        directory.mkdir(exist_ok=True)
        ours = {
            "server": {"port": self._ports[number], "trusted_proxies": [HOST]},
            "backplane": {"url": self._broker.url},
        }
        relay = Relay(directory, ours | self._settings)
        self._stack.callback(relay.end)
        await asyncio.to_thread(relay.__enter__)
        return relay

    async def restart(self, number: int) -> None:
        """Stop a relay, and start it again at the same address."""
        assert await self.relays[number].stop() == 0
        self.relays[number] = await self._start(number)

    async def clients(self) -> list[float]:
        """Return how many clients each relay has."""
        return [await relay.metric("websocket_connected_clients") for relay in self.relays]

    def client(self, channel: str, **options: Any) -> Client:
        """Return a client that resumes."""
        assert self._proxy is not None
        url = self._proxy.url(f"/channels/{channel}")
        return Client(url, ssl=self.tls, start_patience_s=PATIENCE_S, **options)

    def visitor(self, channel: str, **options: Any) -> connect:
        """Connect a client that does not."""
        assert self._proxy is not None
        url = self._proxy.url(f"/channels/{channel}")
        return connect(url, ssl=self.tls, proxy=None, open_timeout=PATIENCE_S, **options)


@pytest.fixture(autouse=True)
def _no_proxy_of_the_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    redis = needed(*ANY_REDIS)
    async with RedisBroker(redis, tmp_path / "broker") as broker:
        with ExitStack() as stack:
            made = Site(stack, tmp_path, broker)
            yield made
        assert not [line for relay in made.relays for line in relay.complaints]


class Listener:
    """A client that resumes, and notes all that it hears and what happens to it."""

    def __init__(self, site: Site) -> None:
        self.heard: list[str] = []
        self.losses = 0
        self.returns = 0
        self.gaps = 0
        self._client = site.client("news", on_event=self._note)

    def _note(self, event: Event) -> None:
        self.losses += isinstance(event, Disconnected)
        if isinstance(event, Connected):
            self.returns += 1
            self.gaps += not event.is_recovered

    async def listen(self, is_there: asyncio.Event) -> None:
        """Hear all until the end."""
        async with self._client as client:
            is_there.set()
            async for message in client:
                self.heard.append(str(message.data))
                if message.data == THE_END:
                    return


async def speak(client: Client, name: str, is_over: asyncio.Event) -> list[str]:
    """Say one thing after another; return what is known to have been relayed."""
    said: list[str] = []
    async with client:
        while not is_over.is_set():
            said.append(f"{name} {len(said)}")
            await client.send(said[-1])
            await asyncio.sleep(0.01)
    return said


class Visits:
    """Clients that come and go, and how that went."""

    def __init__(self) -> None:
        self.count = 0
        self.refused = 0

    async def go_on(self, site: Site, is_over: asyncio.Event) -> None:
        """Connect again and again."""
        while not is_over.is_set():
            try:
                async with site.visitor("elsewhere"):
                    self.count += 1
                await asyncio.sleep(0.02)
            except (InvalidStatus, OSError, EOFError):
                self.refused += 1

    async def so_many_more(self, count: int) -> None:
        """Wait for visits that begin now."""
        until = self.count + count
        async with asyncio.timeout(PATIENCE_S):
            while self.count < until:  # noqa: ASYNC110 - the tasks of this loop
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def listening(site: Site) -> AsyncIterator[Sequence[Listener]]:
    """Have clients listen until somebody says the end."""
    listeners = [Listener(site) for _ in range(LISTENERS)]
    async with asyncio.TaskGroup() as group:
        for listener in listeners:
            is_there = asyncio.Event()
            group.create_task(listener.listen(is_there))
            async with asyncio.timeout(PATIENCE_S):
                await is_there.wait()
        yield listeners


def lost_and_doubled(said: Sequence[str], listeners: Sequence[Listener]) -> tuple[int, int]:
    """Count what was said and not heard, and what was heard twice, over all listeners."""
    lost = doubled = 0
    for listener in listeners:
        counts = Counter(listener.heard)
        lost += sum(message not in counts for message in said)
        doubled += sum(count - 1 for count in counts.values())
    return lost, doubled


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", PROXIES)
async def test_a_reload_and_a_rolling_restart_under_load_lose_and_double_nothing(
    site: Site, kind: str, record_property: Callable[[str, object], None]
) -> None:
    # nginx and HAProxy ask the other relay at once, Traefik once its check has failed.
    delay_s = 3 if kind == "traefik" else 0
    shutdown = {"spread_s": 0.5, "readiness_delay_s": delay_s}
    proxy = await site.up(kind, shutdown=shutdown)
    is_over, visits = asyncio.Event(), Visits()
    async with listening(site) as listeners, asyncio.TaskGroup() as group:
        speaking = [
            group.create_task(speak(site.client("news", listens=False), name, is_over))
            for name in SPEAKERS
        ]
        group.create_task(visits.go_on(site, is_over))
        await visits.so_many_more(5)
        await proxy.reload()
        await visits.so_many_more(5)
        assert not any(listener.losses for listener in listeners), "of a reload nobody notices"
        for number in range(2):
            await site.restart(number)
            await site.relays[number].metric_reaches("websocket_connections_total", 1)
        is_over.set()
        said = [message for each in speaking for message in await each]
        async with site.client("news") as last:
            await last.send(THE_END)
    lost, doubled = lost_and_doubled(said, listeners)
    counts = {
        "said": len(said),
        "owed": len(said) * LISTENERS,
        "lost": lost,
        "doubled": doubled,
        "returns": sum(listener.returns for listener in listeners) - LISTENERS,
        "visits": visits.count,
        "refused": visits.refused,
    }
    print(kind, counts)
    for name, count in counts.items():
        record_property(name, count)
    assert (lost, doubled) == (0, 0)
    assert all(listener.heard == listeners[0].heard for listener in listeners), "in one order"
    assert not any(listener.gaps for listener in listeners)
    assert counts["returns"] >= LISTENERS, "each relay had some of them"
    assert visits.refused == 0


@pytest.mark.parametrize(
    ("kind", "there", "here"),
    [
        ("nginx", "worker_shutdown_timeout 1h", "worker_shutdown_timeout 1s"),
        ("haproxy", "hard-stop-after 1h", "hard-stop-after 1s"),
    ],
)
async def test_who_is_cut_off_some_time_after_a_reload_comes_back_and_misses_nothing(
    site: Site, kind: str, there: str, here: str
) -> None:
    proxy = await site.up(kind, {there: here})
    is_over = asyncio.Event()
    async with listening(site) as listeners, asyncio.TaskGroup() as group:
        direct = Client(site.relays[0].ws_url("/channels/news"), listens=False)
        speaking = group.create_task(speak(direct, "a", is_over))
        await proxy.reload()
        async with asyncio.timeout(PATIENCE_S):
            while not all(one.returns > 1 for one in listeners):  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
        is_over.set()
        said = await speaking
        async with site.client("news") as last:
            await last.send(THE_END)
    assert lost_and_doubled(said, listeners) == (0, 0)
    assert not any(listener.gaps for listener in listeners)


@pytest.mark.parametrize("kind", PROXIES)
async def test_events_and_posts_go_through_at_once_and_addresses_are_told(
    site: Site, kind: str
) -> None:
    proxy = await site.up(kind, limits={"max_connections_per_ip": 3}, shutdown={"spread_s": 0})
    url = proxy.url("/channels/news?access_token=very-secret", "https")
    events_url = proxy.url("/channels/news/events?access_token=very-secret", "https")
    async with (
        httpx2.AsyncClient(verify=site.tls, trust_env=False, timeout=PATIENCE_S) as http,
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
        for _ in range(2 * 3):  # each relay counts for itself
            await stack.enter_async_context(site.visitor("news", local_addr=("127.0.0.2", 0)))
        with pytest.raises(InvalidStatus) as refused:
            await site.visitor("news", local_addr=("127.0.0.2", 0))
        assert refused.value.response.status_code == 503
        client = await stack.enter_async_context(site.visitor("news", local_addr=("127.0.0.3", 0)))
        await client.send("hello")
        assert await receive(client) == "hello"
    assert "secret" not in proxy.log
