"""The figures for the console, and the files that it is made of."""

import httpx2
import pytest

from tests.support.issuer import SECRET, token
from tests.support.relay_process import Relay, StartRelay, receive


async def test_the_figures_are_those_of_the_metrics_page(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as client:
        await client.send("counted")
        assert await receive(client) == "counted"
        metrics = await relay.metrics()
        figures = (await relay.get("/stats")).json()
    for name in ("messages", "deliveries", "connections"):
        assert figures[name] == metrics.value(f"websocket_{name}_total")
    assert figures["connected_clients"] == 1
    assert figures["status"] == "ready"
    assert figures["backplane"] == "memory"
    assert figures["max_message_bytes"] == 1_048_576
    (replica,) = figures["replicas"]
    assert replica["clients"] == 1


async def test_the_figures_need_a_right_where_tokens_are_asked_for(relay_with: StartRelay) -> None:
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": SECRET}})
    assert (await relay.get("/stats")).status_code == 401
    async with httpx2.AsyncClient(trust_env=False) as http:
        for rights, status in (({"stats": True}, 200), ({"subscribe": ["*"]}, 403)):
            headers = {"Authorization": f"Bearer {token(relay=rights)}"}
            assert (await http.get(relay.http_url("/stats"), headers=headers)).status_code == status
    assert (await relay.get("/")).status_code == 200, "the page itself holds nothing"


async def test_the_console_can_be_turned_off(relay_with: StartRelay) -> None:
    relay = relay_with(console={"enabled": False})
    assert (await relay.get("/")).status_code == 426
    for path in ("/stats", "/console.js"):
        assert (await relay.get(path)).status_code == 404
    assert (await relay.get("/relay.js")).status_code == 200


@pytest.mark.parametrize("path", ["/", "/console.js", "/console.css", "/icon.svg", "/relay.js"])
async def test_files_are_what_browsers_may_run_and_embed(relay: Relay, path: str) -> None:
    answer = await relay.get(path)
    assert answer.status_code == 200
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


async def test_a_page_of_any_origin_may_load_the_client(relay: Relay) -> None:
    answer = await relay.get("/relay.js")
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    assert answer.headers["content-type"].startswith("text/javascript")
