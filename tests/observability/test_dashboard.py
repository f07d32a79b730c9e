"""The dashboard: Grafana can load it, a person can read it, each query finds what it asks for."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.support.brokers import RedisBroker
from tests.support.certificates import Pair, make_pair
from tests.support.helm import CHART, newest_helm, one
from tests.support.issuer import KeyServer, key_set, signer
from tests.support.programs import ANY_REDIS, needed
from tests.support.prometheus import JOB, NAMESPACE, Prometheus, hasty, missing
from tests.support.relay_process import Metrics, Relay, StartRelay, receive

pytestmark = pytest.mark.fast

FILE = CHART / "files" / "dashboard.json"
ALERTS = CHART / "files" / "alerts.yaml"
DASHBOARD: Mapping[str, Any] = json.loads(FILE.read_text())
PANELS: Sequence[Mapping[str, Any]] = DASHBOARD["panels"]
SHOWN = [panel for panel in PANELS if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}

GRAFANA_S_OWN = {"__rate_interval", "__range"}

each_panel = pytest.mark.parametrize("panel", SHOWN, ids=lambda panel: panel["title"])


def expressions() -> Iterator[str]:
    """Yield all that the dashboard asks Prometheus for."""
    for panel in SHOWN:
        yield from (target["expr"] for target in panel["targets"])
    yield from (note["expr"] for note in DASHBOARD["annotations"]["list"] if "expr" in note)


def as_asked(expression: str, pod: str = ".*") -> str:
    """Return an expression as Grafana sends it."""
    chosen = {"namespace": NAMESPACE, "job": JOB, "pod": pod, "__rate_interval": "5m"}
    for name, value in (chosen | {"__range": "5m"}).items():
        expression = expression.replace(f"${name}", value)
    return expression


def corners(panel: Mapping[str, Any]) -> tuple[int, int, int, int]:
    place = panel["gridPos"]
    return place["x"], place["y"], place["x"] + place["w"], place["y"] + place["h"]


def test_it_is_a_dashboard_of_today_that_belongs_to_nobody_s_grafana_yet() -> None:
    assert DASHBOARD["schemaVersion"] >= 42  # Grafana 12 and newer
    assert DASHBOARD["id"] is None
    assert re.fullmatch(r"[a-zA-Z0-9-]{1,40}", DASHBOARD["uid"])
    assert DASHBOARD["title"] == "websocket-relay"
    assert (
        "__inputs" not in DASHBOARD
    )  # such a one is asked about at its import, and never provisioned


def test_each_panel_has_a_number_of_its_own() -> None:
    numbers = [panel["id"] for panel in PANELS]
    assert len(set(numbers)) == len(numbers)


def test_panels_stand_side_by_side_and_leave_no_hole() -> None:
    for first, second in combinations(PANELS, 2):
        (a, b, c, d), (e, f, g, h) = corners(first), corners(second)
        apart = c <= e or g <= a or d <= f or h <= b
        assert apart, f"{first['title']} and {second['title']} overlap"
    assert all(corners(panel)[0] >= 0 and corners(panel)[2] <= 24 for panel in PANELS)
    area = sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in PANELS)
    assert area == 24 * max(corners(panel)[3] for panel in PANELS)


@each_panel
def test_each_panel_says_what_it_shows_and_in_what_unit(panel: Mapping[str, Any]) -> None:
    assert len(panel["title"]) <= 40
    assert panel["description"].endswith(".")
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    assert panel["type"] in ("stat", "timeseries")
    if panel["type"] == "stat":
        assert defaults["thresholds"]["steps"][0]["value"] is None
    else:
        assert defaults["min"] == 0
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
        assert target["legendFormat"]


@each_panel
def test_what_is_overridden_is_there(panel: Mapping[str, Any]) -> None:
    legends = {target["legendFormat"] for target in panel["targets"]}
    named = {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]}
    by_label = any("{{" in legend for legend in legends)
    assert by_label or named <= legends


def test_all_that_is_chosen_at_the_top_counts_everywhere() -> None:
    assert list(VARIABLES) == ["datasource", "namespace", "job", "pod"]
    for expression in expressions():
        assert set(re.findall(r"\$([a-zA-Z_]\w*)", expression)) - GRAFANA_S_OWN <= VARIABLES.keys()
        assert "$namespace" in expression
        assert "$job" in expression
        assert "$pod" in expression or "ALERTS" in expression


def test_a_relay_outside_of_kubernetes_is_shown_too() -> None:
    """It has no namespace and no pod; .* also selects what has no such label."""
    for name in ("namespace", "pod"):
        assert VARIABLES[name]["allValue"] == ".*"


def test_alerts_that_panels_speak_of_exist() -> None:
    told = set(re.findall(r"WebSocketRelay[A-Z]\w+", FILE.read_text()))
    assert told
    assert told <= set(re.findall(r"alert: (\w+)", ALERTS.read_text()))


@pytest.mark.processes
def test_the_chart_brings_it_to_grafana_s_sidecar() -> None:
    values = {"dashboard": {"enabled": True, "namespace": "watch", "annotations": {"a": "b"}}}
    made = one(newest_helm().objects(values=values), "ConfigMap", "websocket-relay-dashboard")
    assert made["metadata"]["namespace"] == "watch"
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert made["metadata"]["annotations"] == {"a": "b"}
    assert made["data"] == {"websocket-relay.json": FILE.read_text()}


async def drawn_through(relay: Relay, guarded: Relay) -> None:
    """Let something of everything happen."""
    async with relay.client("news") as client:
        await client.send("hello")
        assert await receive(client) == "hello"
    await relay.get("/readyz")
    assert (await guarded.get("/channels/news/events")).status_code == 401


@pytest.fixture
def pair() -> Pair:
    """A certificate that there is an alert about."""
    return make_pair(valid_days=10)


@pytest.mark.timeout(180)
@pytest.mark.processes
async def test_a_real_prometheus_answers_each_query(
    tls_relay_with: StartRelay, tmp_path: Path
) -> None:
    redis = needed(*ANY_REDIS)
    async with RedisBroker(redis, tmp_path / "redis") as broker:
        with KeyServer(key_set(signer("ES256", "key"))) as keys:
            jwt = {"algorithms": ["ES256"], "jwks_url": keys.url}
            relays = {
                "relay-0": tls_relay_with(backplane={"url": broker.url}),
                "relay-1": tls_relay_with(auth={"mode": "jwt", "jwt": jwt}),
            }
            rules = hasty(ALERTS, tmp_path)
            async with Prometheus(tmp_path / "prometheus", relays, rules) as prometheus:
                await look_at_everything(prometheus, relays)


async def look_at_everything(prometheus: Prometheus, relays: Mapping[str, Relay]) -> None:
    """Ask all that the dashboard asks, until there is an answer to everything."""

    await prometheus.answer("count(websocket_ready) == 2")  # so that what follows is seen to rise
    await drawn_through(relays["relay-0"], relays["relay-1"])
    pages = [await relay.metrics() for relay in relays.values()]
    page = Metrics(
        frozenset().union(*(each.names for each in pages)),
        tuple(sample for each in pages for sample in each.samples),
    )
    assert missing(list(expressions()), page) == set()

    for question in dict.fromkeys(map(as_asked, expressions())):
        await prometheus.answer(question)
    clients = 'sum by (pod) (websocket_connected_clients{pod=~"$pod"})'
    (alone,) = await prometheus.answer(as_asked(clients, "relay-1"))
    assert alone["metric"] == {"pod": "relay-1"}
