"""The probes: on both ports, as JSON."""

from tests.support.relay_process import RelayProcess, StartRelay, receive


async def test_a_serving_relay_is_healthy_and_ready_on_both_ports(relay: RelayProcess) -> None:
    for path in ("/healthz", "/readyz"):
        for response in (await relay.get(path), await relay.get_metrics(path)):
            assert response.status_code == 200
            assert response.headers["Content-Type"].startswith("application/json")
            assert isinstance(response.json(), dict)


async def test_the_metrics_port_serves_nothing_but_metrics_and_probes(relay: RelayProcess) -> None:
    for path in ("/", "/channels/news", "/nowhere", "/docs", "/openapi.json"):
        assert (await relay.get_metrics(path)).status_code == 404


async def test_the_log_names_all_listening_ports(relay: RelayProcess) -> None:
    assert relay.listening_ports() == {relay.port, relay.metrics_port}
    names = [event["event"] for event in relay.log_events]
    assert names[:3] == ["metrics listening", "relay listening", "ready"]


async def test_a_relay_without_metrics_has_one_port_relays_and_stops(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(metrics={"enabled": False}, shutdown={"spread_s": 0.1, "timeout_s": 5})
    assert relay.listening_ports() == {relay.port}
    assert (await relay.get("/healthz")).status_code == 200
    assert (await relay.get("/readyz")).status_code == 200
    assert (await relay.get("/metrics")).status_code == 404
    assert "metrics listening" not in [event["event"] for event in relay.log_events]
    async with relay.client("news") as client:
        await client.send("hello")
        assert await receive(client) == "hello"
        assert await relay.stop() == 0
