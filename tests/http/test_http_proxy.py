"""Publishing and listening by HTTP through an nginx that nobody told of it."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from tests.support.nginx import Nginx
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import HOST, PLAIN, Relay, StartRelay, receive

DIRECTIVES = {
    "as it comes": "",
    "compressing": "gzip on;",
    "compressing all": "gzip on; gzip_types *; gzip_proxied any; gzip_min_length 1;",
    "keeping connections": "proxy_http_version 1.1; proxy_set_header Connection '';",
}


class Simple(Nginx):
    """nginx with its defaults: it buffers what it passes on.

    Args:
        directory: for what it writes.
        relay: behind it.
        directives: what differs.
    """

    def __init__(self, directory: Path, relay: Relay, directives: str) -> None:
        super().__init__(directory, {"relay-1": relay.port, "relay-2": relay.port})
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = " ".join(f"{kind}_temp_path {directory}/{kind};" for kind in kinds)
        self._file.write_text(
            f"worker_processes 1; pid {directory}/nginx.pid; error_log stderr error; events {{}}"
            f" http {{ access_log off; {paths} {directives} server {{ listen {HOST}:{self.port};"
            f" location / {{ proxy_pass http://{HOST}:{relay.port}; }} }} }}"
        )


StartNginx = Callable[[Relay], Simple]


@pytest.fixture(params=DIRECTIVES)
def in_front_of(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StartNginx]:
    """Start an nginx in front of a relay."""
    started: list[Simple] = []

    def start(relay: Relay) -> Simple:
        nginx = Simple(tmp_path, relay, DIRECTIVES[request.param])
        nginx.launch()
        started.append(nginx)
        return nginx

    yield start
    for nginx in started:
        nginx.end()


@asynccontextmanager
async def events_through(
    nginx: Simple, http: httpx2.AsyncClient, channel: str
) -> AsyncIterator[AsyncIterator[str]]:
    """Listen to a channel; yield the lines that come."""
    async with http.stream("GET", nginx.http_url(f"/channels/{channel}/events")) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield answer.aiter_lines()


async def next_message(lines: AsyncIterator[str]) -> str:
    while not (line := await anext(lines)).startswith("data: ") or "welcome" in line:
        pass
    return line.removeprefix("data: ")


async def test_events_pass_at_once_and_messages_get_there(
    relay_with: StartRelay, in_front_of: StartNginx
) -> None:
    """Each is said when the one before was heard: what waits for more would wait for ever."""
    relay = relay_with()
    nginx = in_front_of(relay)
    await nginx.is_up()
    http = httpx2.AsyncClient(verify=PLAIN, trust_env=False, timeout=PATIENCE_S)
    async with http, relay.client("news") as client, events_through(nginx, http, "news") as lines:
        for number in range(20):
            await client.send(str(number))
            assert await receive(client) == await next_message(lines) == str(number)
        for number in range(5):
            url = nginx.http_url("/channels/news")
            text = f"posted {number}"
            answer = await http.post(url, content=text, headers={"Content-Type": "text/plain"})
            assert answer.status_code == 202
            assert answer.json()["position"]
            assert await receive(client) == await next_message(lines) == text
    await relay.metric_is("websocket_connected_clients", 0)


async def test_who_leaves_is_seen_to_leave_and_a_stop_to_end_the_stream(
    relay_with: StartRelay, in_front_of: StartNginx
) -> None:
    relay = relay_with(shutdown={"spread_s": 0.1})
    nginx = in_front_of(relay)
    await nginx.is_up()
    async with httpx2.AsyncClient(verify=PLAIN, trust_env=False, timeout=PATIENCE_S) as http:
        async with events_through(nginx, http, "news"):
            await relay.metric_is("websocket_connected_clients", 1)
        await relay.metric_is("websocket_connected_clients", 0)
        async with events_through(nginx, http, "news") as lines:
            await relay.metric_is("websocket_connected_clients", 1)
            relay.signal()
            heard = [line async for line in lines]
        assert "event: close" in heard
        assert heard[-1] == ""
    assert await relay.exit_code() == 0
