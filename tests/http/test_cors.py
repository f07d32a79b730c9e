"""What pages of other origins may do by HTTP: publish, listen, and read why they may not."""

from collections.abc import Mapping

import httpx2
import pytest

from tests.support.events_client import asking
from tests.support.http_requests import TEXT, post
from tests.support.issuer import SECRET
from tests.support.relay_process import PLAIN, Relay, StartRelay

OURS, THEIRS = "https://ours.example", "https://theirs.example"
MAY_READ = "access-control-allow-origin"


@pytest.fixture(params=[OURS, "https://OURS.example"])
def choosy_relay(request: pytest.FixtureRequest, relay_with: StartRelay) -> Relay:
    """A relay for pages of one origin, however it was written in the settings."""
    return relay_with(server={"allowed_origins": ["https://other.example", request.param]})


async def preflight(relay: Relay, origin: str, method: str, *headers: str) -> httpx2.Response:
    """Ask as a browser does before a request that a form could not make."""
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        **({"Access-Control-Request-Headers": ", ".join(headers)} if headers else {}),
    }
    async with httpx2.AsyncClient(verify=PLAIN, trust_env=False) as http:
        return await http.options(relay.http_url("/channels/a"), headers=asked)


def listed(headers: Mapping[str, str], name: str) -> set[str]:
    return {each.strip().lower() for each in headers[name].split(",")}


async def test_a_page_that_is_let_in_may_post_json_with_a_token(choosy_relay: Relay) -> None:
    answer = await preflight(choosy_relay, OURS, "POST", "authorization", "content-type")
    assert answer.status_code == 200
    assert answer.headers[MAY_READ] == OURS
    assert "post" in listed(answer.headers, "access-control-allow-methods")
    allowed = listed(answer.headers, "access-control-allow-headers")
    assert {"authorization", "content-type"} <= allowed
    answer = await post(choosy_relay, "a", b"{}", "application/json", {"Origin": OURS})
    assert answer.status_code == 202
    assert answer.headers[MAY_READ] == OURS


@pytest.mark.parametrize("origin", [THEIRS, "null", "https://ours.example.theirs.example"])
async def test_another_page_may_not(choosy_relay: Relay, origin: str) -> None:
    answer = await preflight(choosy_relay, origin, "POST", "authorization", "content-type")
    assert answer.status_code == 400
    assert MAY_READ not in answer.headers
    answer = await post(choosy_relay, "a", b"{}", TEXT, {"Origin": origin})
    assert (answer.status_code, answer.text) == (403, "origin not allowed\n")
    assert MAY_READ not in answer.headers
    await choosy_relay.metric_is("websocket_messages_total", 0)


async def test_a_page_may_listen_and_come_back_where_it_is_let_in(choosy_relay: Relay) -> None:
    async with asking(choosy_relay, "a", headers={"Origin": OURS}) as events:
        assert events.status == 200
        assert events.headers[MAY_READ] == OURS
    async with asking(choosy_relay, "a", headers={"Origin": THEIRS}) as events:
        assert events.status == 403
        assert MAY_READ not in events.headers
    answer = await preflight(choosy_relay, OURS, "GET", "last-event-id", "authorization")
    assert answer.status_code == 200


async def test_answers_tell_caches_that_they_depend_on_the_origin(choosy_relay: Relay) -> None:
    for origin in (OURS, THEIRS):
        answer = await post(choosy_relay, "a", b"x", TEXT, {"Origin": origin})
        assert "origin" in listed(answer.headers, "vary")


async def test_where_all_are_let_in_all_may_read(relay: Relay, channel: str) -> None:
    answer = await preflight(relay, THEIRS, "POST", "authorization", "content-type")
    assert (answer.status_code, answer.headers[MAY_READ]) == (200, "*")
    for origin in (THEIRS, "null"):
        answer = await post(relay, channel, b"x", TEXT, {"Origin": origin})
        assert (answer.status_code, answer.headers[MAY_READ]) == (202, "*")
        assert "access-control-allow-credentials" not in answer.headers
        async with asking(relay, channel, headers={"Origin": origin}) as events:
            assert events.headers[MAY_READ] == "*"


async def test_a_page_can_read_why_it_is_refused_and_when_to_come_back(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": SECRET}})
    answer = await post(relay, "a", b"x", TEXT, {"Origin": THEIRS})
    assert (answer.status_code, answer.headers[MAY_READ]) == (401, "*")
    assert "retry-after" in listed(answer.headers, "access-control-expose-headers")
