"""The dashboard: a layout that Grafana loads, complete panels, and variables that apply to all."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest

from tests.support.helm import CHART, find_object, newest_helm

pytestmark = pytest.mark.fast

FILE = CHART / "files" / "dashboard.json"
ALERTS = CHART / "files" / "alerts.yaml"
DASHBOARD: Mapping[str, Any] = json.loads(FILE.read_text())
PANELS: Sequence[Mapping[str, Any]] = DASHBOARD["panels"]
GRAPHS = [panel for panel in PANELS if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}

GRAFANA_VARIABLES = {"__rate_interval", "__range"}


def corners(panel: Mapping[str, Any]) -> tuple[int, int, int, int]:
    grid = panel["gridPos"]
    return grid["x"], grid["y"], grid["x"] + grid["w"], grid["y"] + grid["h"]


def test_the_file_can_be_provisioned_in_any_grafana_from_version_12() -> None:
    assert DASHBOARD["schemaVersion"] >= 42  # Grafana 12 and newer
    assert DASHBOARD["id"] is None
    assert re.fullmatch(r"[a-zA-Z0-9-]{1,40}", DASHBOARD["uid"])
    assert DASHBOARD["title"] == "websocket-relay"
    # Grafana asks for the value of an input at an import, and does not provision such a file.
    assert "__inputs" not in DASHBOARD


def test_each_panel_has_a_unique_id() -> None:
    numbers = [panel["id"] for panel in PANELS]
    assert len(set(numbers)) == len(numbers)


def test_panels_do_not_overlap_and_leave_no_hole() -> None:
    for first, second in combinations(PANELS, 2):
        (a, b, c, d), (e, f, g, h) = corners(first), corners(second)
        is_apart = c <= e or g <= a or d <= f or h <= b
        assert is_apart, f"{first['title']} and {second['title']} overlap"
    assert all(corners(panel)[0] >= 0 and corners(panel)[2] <= 24 for panel in PANELS)
    area = sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in PANELS)
    assert area == 24 * max(corners(panel)[3] for panel in PANELS)


def test_each_panel_has_a_description_a_unit_legends_and_the_data_source() -> None:
    for panel in GRAPHS:
        title = panel["title"]
        assert len(title) <= 40
        assert panel["description"].endswith("."), title
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"], title
        assert panel["type"] in ("stat", "timeseries"), title
        if panel["type"] == "stat":
            assert defaults["thresholds"]["steps"][0]["value"] is None, title
        else:
            assert defaults["min"] == 0, title
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, title
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"], title
            assert target["legendFormat"], title


def test_each_override_of_a_panel_names_one_of_its_legends() -> None:
    for panel in GRAPHS:
        legends = {target["legendFormat"] for target in panel["targets"]}
        named = {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]}
        has_labels = any("{{" in legend for legend in legends)
        assert has_labels or named <= legends, panel["title"]


def test_every_expression_uses_the_variables_of_the_dashboard() -> None:
    assert list(VARIABLES) == ["datasource", "namespace", "job", "pod", "instance"]
    queries = [target["expr"] for panel in GRAPHS for target in panel["targets"]]
    annotations = [each["expr"] for each in DASHBOARD["annotations"]["list"] if "expr" in each]
    for expression in (*queries, *annotations):
        used = set(re.findall(r"\$([a-zA-Z_]\w*)", expression))
        assert used - GRAFANA_VARIABLES <= VARIABLES.keys(), expression
        assert "$namespace" in expression
        assert "$job" in expression
        has_replica = "$pod" in expression and "$instance" in expression
        assert has_replica or "ALERTS" in expression


def test_a_relay_outside_of_kubernetes_is_selected() -> None:
    """It has no labels namespace and pod: .* matches an absent label, and `instance` is there."""
    for name in ("namespace", "pod"):
        assert VARIABLES[name]["allValue"] == ".*"
    queries = [target["expr"] for panel in GRAPHS for target in panel["targets"]]
    for grouping in re.findall(r"by \(([^)]*)\)", "".join(queries)):
        assert ("pod" in grouping) == ("instance" in grouping), grouping


def test_the_alerts_that_panels_name_exist() -> None:
    named = set(re.findall(r"WebSocketRelay[A-Z]\w+", FILE.read_text()))
    assert named
    assert named <= set(re.findall(r"alert: (\w+)", ALERTS.read_text()))


@pytest.mark.processes
def test_the_chart_installs_the_dashboard_for_the_sidecar_of_grafana() -> None:
    values = {"dashboard": {"enabled": True, "namespace": "watch", "annotations": {"a": "b"}}}
    objects = newest_helm().objects(values=values)
    installed = find_object(objects, "ConfigMap", "websocket-relay-dashboard")
    assert installed["metadata"]["namespace"] == "watch"
    assert installed["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert installed["metadata"]["annotations"] == {"a": "b"}
    assert installed["data"] == {"websocket-relay.json": FILE.read_text()}
