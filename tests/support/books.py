"""What the metrics say of clients and messages has to add up."""

from tests.support.relay_process import Metrics


def assert_books_balance(metrics: Metrics) -> None:
    """Insist on what holds whenever nothing is under way."""
    value = metrics.value
    delivered = value("websocket_deliveries_total") + value("websocket_drops_total")
    assert value("websocket_expected_deliveries_total") == delivered
    assert value("websocket_closes_total") == value("websocket_disconnections_total")
    assert value("websocket_connected_clients") == (
        value("websocket_connections_total") - value("websocket_disconnections_total")
    )
