"""The probes: on both ports, as JSON."""

import pytest

from tests.support.relay_process import Relay, StartRelay, receive


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_a_serving_relay_is_alive_and_ready_on_both_ports(relay: Relay, path: str) -> None:
    for answer in (await relay.get(path), await relay.get_metrics(path)):
        assert answer.status_code == 200
        assert answer.headers["Content-Type"].startswith("application/json")
        assert isinstance(answer.json(), dict)


async def test_the_metrics_port_serves_nothing_but_metrics_and_probes(relay: Relay) -> None:
    for path in ("/", "/channels/news", "/nowhere", "/docs", "/openapi.json"):
        assert (await relay.get_metrics(path)).status_code == 404


async def test_the_ports_are_those_in_the_log(relay: Relay) -> None:
    assert relay.listening_ports() == {relay.port, relay.metrics_port}
    names = [event["event"] for event in relay.log_events]
    assert names[:3] == ["metrics listening", "relay listening", "ready"]


async def test_nothing_listens_for_metrics_where_they_are_off(relay_with: StartRelay) -> None:
    relay = relay_with(metrics={"enabled": False})
    assert relay.listening_ports() == {relay.port}
    assert (await relay.get("/healthz")).status_code == 200
    assert (await relay.get("/readyz")).status_code == 200
    assert (await relay.get("/metrics")).status_code == 404
    assert "metrics listening" not in [event["event"] for event in relay.log_events]


async def test_a_relay_without_metrics_relays_and_stops(relay_with: StartRelay) -> None:
    relay = relay_with(metrics={"enabled": False}, shutdown={"spread_s": 0.1, "timeout_s": 5})
    async with relay.client("news") as client:
        await client.send("hello")
        assert await receive(client) == "hello"
        assert await relay.stop() == 0
