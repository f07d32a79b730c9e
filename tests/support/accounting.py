"""Assert the accounting invariants: the counters of clients and messages add up."""

from tests.support.relay_process import MetricsPage, RelayProcess


def assert_counters_add_up(metrics: MetricsPage) -> None:
    """Assert the invariants that hold while no message and no connection is in flight."""
    value = metrics.value
    delivered = value("websocket_deliveries_total") + value("websocket_drops_total")
    assert value("websocket_expected_deliveries_total") == delivered
    assert value("websocket_closes_total") == value("websocket_disconnections_total")
    assert value("websocket_connected_clients") == (
        value("websocket_connections_total") - value("websocket_disconnections_total")
    )


async def assert_counters_add_up_at_rest(relay: RelayProcess) -> None:
    """Wait until no client is connected; assert the invariants, and that no backlog remains."""

    await relay.await_metric("websocket_connected_clients", 0)
    metrics = await relay.metrics()
    assert_counters_add_up(metrics)
    assert metrics.value("websocket_backlog_bytes") == 0
