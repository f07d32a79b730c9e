"""The head of a response: the date, and with HEAD the same as with GET."""

import time
from email.utils import parsedate_to_datetime

from tests.support.http_requests import get_request
from tests.support.raw_client import RawClient, Response
from tests.support.relay_process import HOST, RelayProcess

PATHS = ("/", "/relay.js", "/openapi.json", "/stats", "/healthz", "/readyz", "/nowhere")
METRICS_PATHS = ("/metrics", "/healthz", "/readyz")
EVENT_STREAMS = ("/events", "/channels/news/events", "/channels/no%20name/events")
VARIABLE = {"date": "", "content-length": ""}


async def head_of(port: int, request: bytes) -> Response:
    async with await RawClient.connect(HOST, port) as raw:
        await raw.send(request)
        return await raw.read_response()


async def test_a_response_has_the_current_date(relay: RelayProcess) -> None:
    for port in (relay.port, relay.metrics_port):
        response = await head_of(port, get_request("/healthz"))
        age_s = time.time() - parsedate_to_datetime(response.headers["date"]).timestamp()
        assert -1 < age_s < 60
        assert "server" not in response.headers


async def test_the_response_to_head_is_the_head_of_the_response_to_get(
    relay: RelayProcess,
) -> None:
    listeners = await relay.metric("websocket_connections_total")
    urls = [(relay.port, path) for path in (*PATHS, *EVENT_STREAMS)]
    for port, path in (*urls, *((relay.metrics_port, path) for path in METRICS_PATHS)):
        get = get_request(path)
        async with await RawClient.connect(HOST, port) as raw:
            await raw.send(get.replace(b"GET", b"HEAD"))
            response = await raw.read_response()
            if response.headers.get("connection") == "close":
                assert await raw.read_to_end() == b"", path
            else:
                await raw.send(get_request("/nowhere"))
                assert (await raw.read_response()).status == 404, f"a body of {path}"
        expected = await head_of(port, get)
        assert response.status == expected.status, path
        assert response.headers | VARIABLE == expected.headers | VARIABLE, path
    admitted = await relay.metric("websocket_connections_total") - listeners
    assert admitted == 2, "only each GET of an event stream is a client"


async def test_a_405_names_head_beside_get(relay: RelayProcess) -> None:
    urls = [(relay.port, path) for path in ("/healthz", "/readyz", "/stats", "/channels/a/events")]
    for port, path in (*urls, (relay.metrics_port, "/metrics")):
        response = await head_of(port, get_request(path).replace(b"GET", b"PUT"))
        assert response.status == 405, path
        assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD"}, path
