"""A real Prometheus: it answers each query of the dashboard, and fires an alert in an outage."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.brokers import RedisBroker
from tests.support.certificates import CertificatePair, make_pair
from tests.support.helm import CHART
from tests.support.issuer import KeyServer, key_set, make_signer
from tests.support.programs import ANY_REDIS, needed
from tests.support.prometheus import (
    JOB,
    NAMESPACE,
    OUTSIDE_JOB,
    Prometheus,
    missing_series,
    shorten_waits,
)
from tests.support.relay_process import (
    HOST,
    MetricsPage,
    RelayProcess,
    StartRelay,
    eventually,
    receive,
)

ALERTS = CHART / "files" / "alerts.yaml"
DASHBOARD: Mapping[str, Any] = json.loads((CHART / "files" / "dashboard.json").read_text())
OUTAGE = "WebSocketRelayBackplaneOutage"

Alert = Mapping[str, Any]


def expressions() -> Iterator[str]:
    """Yield all expressions of the dashboard: those of its panels and of its annotations."""
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (each["expr"] for each in DASHBOARD["annotations"]["list"] if "expr" in each)


ALL = {"namespace": ".*", "pod": ".*", "instance": ".*", "__rate_interval": "5m", "__range": "5m"}
IN_KUBERNETES = ALL | {"namespace": NAMESPACE, "job": JOB}
OUTSIDE = ALL | {"job": OUTSIDE_JOB}


def substituted(expression: str, chosen: Mapping[str, str] = IN_KUBERNETES) -> str:
    """Return an expression as Grafana sends it, with the values of its variables."""
    for name, value in chosen.items():
        expression = expression.replace(f"${name}", value)
    return expression


@pytest.fixture
def pair() -> CertificatePair:
    """A certificate that expires soon, for which there is an alert."""
    return make_pair(valid_days=10)


@asynccontextmanager
async def scraped_relays(
    start: StartRelay, broker: RedisBroker, directory: Path
) -> AsyncIterator[tuple[Prometheus, Mapping[str, RelayProcess]]]:
    """Run relays with a broker, with tokens, with a hook, and a Prometheus that scrapes them."""
    with KeyServer(key_set(make_signer("ES256", "key"))) as keys:
        jwt = {"algorithms": ["ES256"], "jwks_url": keys.url}
        relays = {
            "relay-0": start(
                backplane={"url": broker.url},
                hooks={"url": keys.url},
                presence={"channels": ["*"]},
            ),
            "relay-1": start(auth={"mode": "jwt", "jwt": jwt}),
            "relay-2": start(auth={"mode": "hook", "hook": {"url": f"http://{HOST}:9/"}}),
        }
        rules = shorten_waits(ALERTS, directory)
        async with Prometheus(directory / "prometheus", relays, rules) as prometheus:
            yield prometheus, relays


async def cause_events(relay: RelayProcess, guarded: RelayProcess) -> None:
    """Have relays count a message, a probe and a refusal."""
    async with relay.client("news") as client:
        await client.send("hello")
        assert await receive(client) == "hello"
    await relay.get("/readyz")
    assert (await guarded.get("/channels/news/events")).status_code == 401


async def assert_all_queries_have_answers(
    prometheus: Prometheus, relays: Mapping[str, RelayProcess]
) -> None:
    # A rate needs a sample from before the events.
    await prometheus.await_result("count(websocket_ready) == 6")  # each is scraped by two jobs
    await cause_events(relays["relay-0"], relays["relay-1"])
    pages = [await relay.metrics() for relay in relays.values()]
    page = MetricsPage(
        frozenset().union(*(each.names for each in pages)),
        tuple(sample for each in pages for sample in each.samples),
    )
    assert missing_series(list(expressions()), page) == set()
    for query in dict.fromkeys(map(substituted, expressions())):
        await prometheus.await_result(query)
    clients = 'sum by (pod) (websocket_connected_clients{job=~"$job", pod=~"$pod"})'
    chosen = IN_KUBERNETES | {"pod": "relay-1"}
    (selected,) = await prometheus.await_result(substituted(clients, chosen))
    assert selected["metric"] == {"pod": "relay-1"}
    for query in dict.fromkeys(each for each in expressions() if "by (pod" in each):
        rows = await prometheus.await_result(substituted(query, OUTSIDE))
        instances = [row["metric"]["instance"] for row in rows]
        assert len(instances) == len(set(instances)), query
    rows = await prometheus.await_result(substituted(clients.replace("pod)", "instance)"), OUTSIDE))
    assert len(rows) == len(relays)


async def assert_an_outage_fires_an_alert(prometheus: Prometheus, broker: RedisBroker) -> None:
    async def critical_alerts() -> dict[str, Alert]:
        firing = {alert["labels"]["alertname"]: alert for alert in await prometheus.firing_alerts()}
        return {
            name: alert
            for name, alert in firing.items()
            if alert["labels"]["severity"] == "critical" and alert["labels"]["job"] == JOB
        }

    async def is_calm() -> tuple[bool, object]:
        alerts = await critical_alerts()
        return not alerts, alerts

    async def is_outage_reported() -> tuple[bool, object]:
        alerts = await critical_alerts()
        return OUTAGE in alerts, alerts

    await eventually(is_calm, "no critical alert")
    broker.kill()
    await eventually(is_outage_reported, "an alert")
    alert = (await critical_alerts())[OUTAGE]
    assert alert["labels"]["namespace"] == NAMESPACE
    assert alert["labels"]["job"] == JOB
    assert "1 replicas" in alert["annotations"]["description"]
    await broker.start()
    await eventually(is_calm, "the end of all critical alerts")


@pytest.mark.timeout(180)
async def test_prometheus_answers_each_query_of_the_dashboard_and_fires_an_alert_in_an_outage(
    tls_relay_with: StartRelay, tmp_path: Path
) -> None:
    redis = needed(*ANY_REDIS)
    async with (
        RedisBroker(redis, tmp_path / "redis") as broker,
        scraped_relays(tls_relay_with, broker, tmp_path) as (prometheus, relays),
    ):
        await assert_all_queries_have_answers(prometheus, relays)
        await assert_an_outage_fires_an_alert(prometheus, broker)
