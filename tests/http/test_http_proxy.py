"""Publishing and server-sent events through an nginx whose configuration does not consider them."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from tests.support.example_nginx import ExampleNginx
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import HOST, NO_CA, RelayProcess, StartRelay, receive

DIRECTIVES = {
    "defaults": "",
    "compression": "gzip on; gzip_types *; gzip_proxied any; gzip_min_length 1;",
    "keep-alive": "proxy_http_version 1.1; proxy_set_header Connection '';",
}


class BufferingNginx(ExampleNginx):
    """nginx with its defaults: it buffers responses.

    Args:
        directory: for the files that it writes.
        relay: its upstream.
        directives: directives that differ from the defaults.
    """

    def __init__(self, directory: Path, relay: RelayProcess, directives: str) -> None:
        super().__init__(directory, {"relay-1": relay.port, "relay-2": relay.port})
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = " ".join(f"{kind}_temp_path {directory}/{kind};" for kind in kinds)
        self._file.write_text(
            f"worker_processes 1; pid {directory}/nginx.pid; error_log stderr error; events {{}}"
            f" http {{ access_log off; {paths} {directives} server {{ listen {HOST}:{self.port};"
            f" location / {{ proxy_pass http://{HOST}:{relay.port}; }} }} }}"
        )


@pytest.fixture
def proxied_relay(relay_with: StartRelay) -> RelayProcess:
    return relay_with(shutdown={"spread_s": 0.1})


@pytest.fixture(params=DIRECTIVES)
def nginx(
    request: pytest.FixtureRequest, proxied_relay: RelayProcess, tmp_path: Path
) -> Iterator[BufferingNginx]:
    """An nginx in front of the relay."""
    started = BufferingNginx(tmp_path, proxied_relay, DIRECTIVES[request.param])
    started.launch()
    yield started
    started.end()


@asynccontextmanager
async def event_lines(
    nginx: BufferingNginx, http: httpx2.AsyncClient
) -> AsyncIterator[AsyncIterator[str]]:
    """Open an event stream through nginx; yield its lines."""
    async with http.stream("GET", nginx.http_url("/channels/news/events")) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield response.aiter_lines()


async def next_message(lines: AsyncIterator[str]) -> str:
    while not (line := await anext(lines)).startswith("data: ") or "welcome" in line:
        pass
    return line.removeprefix("data: ")


async def test_a_buffering_proxy_passes_events_at_once_and_posts_and_ends_of_connections(
    proxied_relay: RelayProcess, nginx: BufferingNginx
) -> None:
    """Each message is published after the previous one was delivered: buffering would block."""
    relay = proxied_relay
    await nginx.await_up()
    async with httpx2.AsyncClient(verify=NO_CA, trust_env=False, timeout=PATIENCE_S) as http:
        async with relay.client("news") as client, event_lines(nginx, http) as lines:
            for number in range(20):
                await client.send(str(number))
                assert await receive(client) == await next_message(lines) == str(number)
            url = nginx.http_url("/channels/news")
            for number in range(5):
                text = f"posted {number}"
                response = await http.post(
                    url, content=text, headers={"Content-Type": "text/plain"}
                )
                assert response.status_code == 202
                assert response.json()["position"]
                assert await receive(client) == await next_message(lines) == text
        await relay.await_metric("websocket_connected_clients", 0)
        async with event_lines(nginx, http) as lines:
            await relay.await_metric("websocket_connected_clients", 1)
            relay.signal()
            received = [line async for line in lines]
    assert "event: close" in received
    assert received[-1] == ""
    assert await relay.exit_code() == 0
