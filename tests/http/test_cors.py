"""CORS: which requests pages of other origins may send, and which responses they may read."""

from collections.abc import Mapping

import httpx2
import pytest

from tests.support.browser import SHARED, open_page
from tests.support.events_client import request_events
from tests.support.http_requests import TEXT_TYPE, publish_by_post
from tests.support.issuer import SECRET
from tests.support.relay_js_page import serve_relay_js_page
from tests.support.relay_process import NO_CA, RelayProcess, StartRelay, path_of, receive

ALLOWED, OTHER = "https://allowed.example", "https://other.example"
ALLOW_ORIGIN = "access-control-allow-origin"


@pytest.fixture
def restricted_relay(relay_with: StartRelay) -> RelayProcess:
    """A relay that admits two origins. The settings contain one of them in upper case."""
    origins = ["https://second.example", "https://ALLOWED.example"]
    return relay_with(server={"allowed_origins": origins})


async def preflight(
    relay: RelayProcess, origin: str, method: str, *headers: str
) -> httpx2.Response:
    """Send the preflight request of a browser for a request that a form can't send."""
    fields = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        **({"Access-Control-Request-Headers": ", ".join(headers)} if headers else {}),
    }
    async with httpx2.AsyncClient(verify=NO_CA, trust_env=False) as http:
        return await http.options(relay.http_url("/channels/a"), headers=fields)


def list_members(headers: Mapping[str, str], name: str) -> set[str]:
    """Return the members of a list field in lower case."""
    return {member.strip().lower() for member in headers[name].split(",")}


async def test_an_allowed_page_may_post_json_with_a_token(restricted_relay: RelayProcess) -> None:
    for origin in (ALLOWED, "https://second.example"):
        response = await preflight(restricted_relay, origin, "POST", "authorization")
        assert response.status_code == 200
        assert response.headers[ALLOW_ORIGIN] == origin
    response = await preflight(restricted_relay, ALLOWED, "POST", "authorization", "content-type")
    assert "post" in list_members(response.headers, "access-control-allow-methods")
    allowed_headers = list_members(response.headers, "access-control-allow-headers")
    assert {"authorization", "content-type"} <= allowed_headers
    response = await publish_by_post(
        restricted_relay, "a", b"{}", "application/json", {"Origin": ALLOWED}
    )
    assert response.status_code == 202
    assert response.headers[ALLOW_ORIGIN] == ALLOWED


async def test_a_page_of_another_origin_may_not_post(restricted_relay: RelayProcess) -> None:
    refused, reason = "websocket_refusals_total", "origin_not_allowed"
    for origin in (OTHER, "null", "https://allowed.example.other.example"):
        before = await restricted_relay.metric(refused, reason=reason)
        response = await preflight(restricted_relay, origin, "POST", "authorization")
        assert await restricted_relay.metric(refused, reason=reason) == before + 1
        assert response.status_code == 400
        assert ALLOW_ORIGIN not in response.headers
        response = await publish_by_post(
            restricted_relay, "a", b"{}", TEXT_TYPE, {"Origin": origin}
        )
        assert (response.status_code, response.text) == (403, "origin not allowed\n")
        assert ALLOW_ORIGIN not in response.headers
    await restricted_relay.await_metric("websocket_messages_total", 0)


async def test_an_allowed_page_may_read_events_and_resume(restricted_relay: RelayProcess) -> None:
    async with request_events(restricted_relay, "a", headers={"Origin": ALLOWED}) as events:
        assert events.status == 200
        assert events.headers[ALLOW_ORIGIN] == ALLOWED
    async with request_events(restricted_relay, "a", headers={"Origin": OTHER}) as events:
        assert events.status == 403
        assert ALLOW_ORIGIN not in events.headers
    response = await preflight(restricted_relay, ALLOWED, "GET", "last-event-id", "authorization")
    assert response.status_code == 200


HEADERS_OF_LIBRARIES = (
    "traceparent",
    "sentry-trace",
    "baggage",
    "x-requested-with",
    "cache-control",
    "idempotency-key",
)


@SHARED
async def test_a_page_may_send_the_headers_that_tracing_and_http_libraries_add(
    relay: RelayProcess, channel: str
) -> None:
    headers = dict.fromkeys(HEADERS_OF_LIBRARIES, "a")
    fetch = "([url, request]) => fetch(url, request).then(({status}) => status)"
    async with serve_relay_js_page() as site, open_page() as page, relay.client(channel) as client:
        await page.goto(site.origin)
        post = {"method": "POST", "headers": headers, "body": "hello"}
        assert await page.evaluate(fetch, [relay.http_url(path_of(channel)), post]) == 202
        assert await receive(client) == "hello"
        head = {"method": "HEAD", "headers": headers}
        assert await page.evaluate(fetch, [relay.http_url("/readyz"), head]) == 200


async def test_responses_declare_that_they_vary_with_the_origin(
    restricted_relay: RelayProcess,
) -> None:
    for origin in (ALLOWED, OTHER):
        response = await publish_by_post(restricted_relay, "a", b"x", TEXT_TYPE, {"Origin": origin})
        assert "origin" in list_members(response.headers, "vary")


async def test_by_default_pages_of_all_origins_may_post_and_read(
    relay: RelayProcess, channel: str
) -> None:
    response = await preflight(relay, OTHER, "POST", "authorization", "content-type")
    assert (response.status_code, response.headers[ALLOW_ORIGIN]) == (200, "*")
    for origin in (OTHER, "null"):
        response = await publish_by_post(relay, channel, b"x", TEXT_TYPE, {"Origin": origin})
        assert (response.status_code, response.headers[ALLOW_ORIGIN]) == (202, "*")
        assert "access-control-allow-credentials" not in response.headers
        async with request_events(relay, channel, headers={"Origin": origin}) as events:
            assert events.headers[ALLOW_ORIGIN] == "*"


async def test_a_page_can_read_its_refusal_and_when_to_retry(relay_with: StartRelay) -> None:
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": SECRET}})
    response = await publish_by_post(relay, "a", b"x", TEXT_TYPE, {"Origin": OTHER})
    assert (response.status_code, response.headers[ALLOW_ORIGIN]) == (401, "*")
    assert "retry-after" in list_members(response.headers, "access-control-expose-headers")
