"""Alerts: valid rules that fire when they should, a runbook section each, and the chart's copy."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.helm import CHART, RELEASE, Values, find_object, newest_helm
from tests.support.prometheus import JOB, missing_series, promtool
from tests.support.relay_process import HOST, ROOT, StartRelay

ALERTS = CHART / "files" / "alerts.yaml"
CASES = sorted(Path(__file__).with_name("alerts").glob("*.yaml"))
RUNBOOK = ROOT / "docs" / "how-to" / "alerts.md"

THRESHOLD = re.compile(r"([0-9.e]+) # (\w+)")

Rule = Mapping[str, Any]


def all_rules() -> Sequence[Rule]:
    return [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]


def alert_names() -> list[str]:
    return [rule["alert"] for rule in all_rules()]


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", ALERTS)


def test_each_alert_fires_in_its_cases_and_only_then() -> None:
    promtool("test", "rules", *CASES)


@pytest.mark.fast
def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    firing: set[str] = set()
    silent: set[str] = set()
    for cases in CASES:
        for case in yaml.safe_load(cases.read_text())["tests"]:
            for check in case["alert_rule_test"]:
                (firing if check["exp_alerts"] else silent).add(check["alertname"])
    assert firing == silent == set(alert_names())


@pytest.mark.fast
def test_each_alert_has_a_severity_a_delay_a_value_and_a_runbook_link() -> None:
    for rule in all_rules():
        name = rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical"), name
        assert "for" in rule, name
        annotations = rule["annotations"]
        assert annotations.keys() == {"summary", "description", "runbook_url"}, name
        assert "$value" in annotations["description"], name
        assert "$labels.job" in annotations["description"], name
        assert annotations["runbook_url"] == f"docs/how-to/alerts.md#{name.lower()}"


@pytest.mark.fast
def test_the_runbook_has_a_section_for_each_alert_in_the_order_of_the_rules() -> None:
    section = re.search(
        r"^## Alerts$(.*?)(?=^## |\Z)", RUNBOOK.read_text(), re.DOTALL | re.MULTILINE
    )
    assert section is not None
    headings = re.findall(r"^### (\w+)$(.*?)(?=^###|\Z)", section[1], re.DOTALL | re.MULTILINE)
    assert [heading for heading, _ in headings] == alert_names()
    for heading, text in headings:
        for topic in ("**Means**", "**Look**", "**Do**"):
            assert topic in text, f"{heading} lacks {topic}"


# The chart's PrometheusRule


def rules_of_the_chart(**values: Any) -> dict[str, Rule]:
    """Return the rules that the chart installs, by the names of their alerts."""
    settings: Values = {"prometheusRule": {"enabled": True} | values}
    rule = find_object(
        newest_helm().objects("--namespace", "chat", values=settings), "PrometheusRule"
    )
    return {rule["alert"]: rule for group in rule["spec"]["groups"] for rule in group["rules"]}


def test_the_chart_has_the_same_alerts_for_its_own_release(tmp_path: Path) -> None:
    installed = rules_of_the_chart()
    assert list(installed) == alert_names()
    for rule in all_rules():
        expected = THRESHOLD.sub(r"\1", rule["expr"])
        expected = expected.replace(f'job="{JOB}"', f'job="{RELEASE}", namespace="chat"')
        if rule["alert"] != "WebSocketRelayMemory":
            assert dict(installed[rule["alert"]]) == {**rule, "expr": expected}
    file = tmp_path / "rules.yaml"
    file.write_text(
        yaml.safe_dump({"groups": [{"name": "all", "rules": list(installed.values())}]})
    )
    promtool("check", "rules", file)


def test_the_alerts_of_the_chart_select_the_job_of_its_service_monitor() -> None:
    enabled = {"enabled": True}
    values = {"prometheusRule": enabled, "serviceMonitor": enabled, "nameOverride": "chat"}
    objects = newest_helm().objects(values=values)
    name = f"{RELEASE}-chat"
    label = find_object(objects, "ServiceMonitor", name)["spec"]["jobLabel"]
    job = find_object(objects, "Service", name)["metadata"]["labels"][label]
    for group in find_object(objects, "PrometheusRule", name)["spec"]["groups"]:
        assert all(f'job="{job}"' in rule["expr"] for rule in group["rules"])


@pytest.mark.fast
def test_the_thresholds_of_the_chart_are_those_of_the_rules() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())["prometheusRule"]["thresholds"]
    thresholds = {name: float(number) for number, name in THRESHOLD.findall(ALERTS.read_text())}
    # The default of memoryBytes depends on the memory limit of the container.
    assert values == thresholds | {"memoryBytes": None}


def test_each_threshold_is_a_value_of_the_chart() -> None:
    alerts = {
        name: rule["alert"] for rule in all_rules() for _, name in THRESHOLD.findall(rule["expr"])
    }
    installed = rules_of_the_chart(thresholds=dict.fromkeys(alerts, 0.123))
    for alert in alerts.values():
        expression = installed[alert]["expr"]
        assert re.search(r"[<>] 0\.123$", expression, re.MULTILINE), expression


@pytest.mark.parametrize(
    ("limit", "bytes_"), [("512Mi", "483183820"), ("1.5G", "1350000000"), (None, "1.2e9")]
)
def test_the_threshold_of_memory_is_a_share_of_the_limit_of_the_container(
    limit: str | None, bytes_: str
) -> None:
    values = {"prometheusRule": {"enabled": True}, "resources": {"limits": {"memory": limit}}}
    rule = find_object(newest_helm().objects(values=values), "PrometheusRule")
    assert f"> {bytes_}" in yaml.safe_dump(rule, width=1000)


def test_values_disable_alerts_and_set_labels_the_runbook_and_the_selector() -> None:
    address = "https://example.com/operations"
    installed = rules_of_the_chart(
        disabled=["WebSocketRelayBusy"],
        alertLabels={"team": "chat", "severity": "none"},
        runbookUrl=address,
        selector='job="chat/relay", cluster="one"',
    )
    assert set(alert_names()) - set(installed) == {"WebSocketRelayBusy"}
    for name, rule in installed.items():
        assert rule["labels"]["team"] == "chat"
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["runbook_url"] == f"{address}#{name.lower()}"
    down = installed["WebSocketRelayReplicaDown"]
    assert down["expr"] == 'up{job="chat/relay", cluster="one"} == 0'


# The metrics of a relay


async def test_the_alerts_use_metrics_that_a_relay_has(tls_relay_with: StartRelay) -> None:
    backend = {"url": f"http://{HOST}:9/"}
    relay = tls_relay_with(auth={"mode": "hook", "hook": backend}, hooks=backend)
    page = await relay.metrics()
    assert missing_series([rule["expr"] for rule in all_rules()], page) == set()
