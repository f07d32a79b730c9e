"""The stats for the console, and the files of the console."""

import httpx2

from tests.support.issuer import SECRET, sign_token
from tests.support.relay_process import NO_CA, RelayProcess, StartRelay, receive


async def test_the_stats_are_the_values_of_the_metrics(relay: RelayProcess, channel: str) -> None:
    async with relay.client(channel) as client:
        await client.send("counted")
        assert await receive(client) == "counted"
        metrics = await relay.metrics()
        stats = (await relay.get("/stats")).json()
    for name in ("messages", "deliveries", "connections"):
        assert stats[name] == metrics.value(f"websocket_{name}_total")
    assert stats["connected_clients"] == 1
    assert stats["status"] == "ready"
    assert stats["backplane"] == "memory"
    assert stats["max_message_bytes"] == 1_048_576
    (replica,) = stats["replicas"]
    assert replica["clients"] == 1


async def test_the_stats_need_a_permission_in_mode_jwt(relay_with: StartRelay) -> None:
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": SECRET}})
    assert (await relay.get("/stats")).status_code == 401
    async with httpx2.AsyncClient(verify=NO_CA, trust_env=False) as http:
        for permissions, status in (({"stats": True}, 200), ({"subscribe": ["*"]}, 403)):
            headers = {"Authorization": f"Bearer {sign_token(relay=permissions)}"}
            response = await http.get(relay.http_url("/stats"), headers=headers)
            assert response.status_code == status
    assert (await relay.get("/")).status_code == 200, "the page itself contains no stats"


async def test_the_console_can_be_disabled(relay_with: StartRelay) -> None:
    relay = relay_with(console={"enabled": False})
    assert (await relay.get("/")).status_code == 426
    for path in ("/stats", "/console.js"):
        assert (await relay.get(path)).status_code == 404
    assert (await relay.get("/relay.js")).status_code == 200


async def test_files_of_the_console_have_a_strict_content_security_policy(
    relay: RelayProcess,
) -> None:
    for path in ("/", "/console.js", "/console.css", "/icon.svg", "/relay.js"):
        response = await relay.get(path)
        assert response.status_code == 200
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


async def test_a_page_of_any_origin_may_load_the_client(relay: RelayProcess) -> None:
    response = await relay.get("/relay.js")
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.headers["cross-origin-resource-policy"] == "cross-origin"
    assert response.headers["content-type"].startswith("text/javascript")
