"""Alerts: Prometheus accepts them, each fires when it should, and there is a page for each."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.brokers import RedisBroker
from tests.support.helm import CHART, RELEASE, Values, newest_helm, one
from tests.support.programs import ANY_REDIS, needed
from tests.support.prometheus import JOB, NAMESPACE, Prometheus, hasty, missing, promtool
from tests.support.relay_process import ROOT, StartRelay, eventually

ALERTS = CHART / "files" / "alerts.yaml"
CASES = sorted(Path(__file__).with_name("alerts").glob("*.yaml"))
RUNBOOK = ROOT / "docs" / "how-to" / "alerts.md"

THRESHOLD = re.compile(r"([0-9.e]+) # (\w+)")

Rule = Mapping[str, Any]

OUTAGE = "WebSocketRelayBackplaneOutage"


def all_rules() -> Sequence[Rule]:
    return [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]


def names() -> list[str]:
    return [rule["alert"] for rule in all_rules()]


def test_prometheus_accepts_the_alerts() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", ALERTS)


@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_only_then(cases: Path) -> None:
    promtool("test", "rules", cases)


def test_each_alert_is_tried_both_ways() -> None:
    fires: set[str] = set()
    rests: set[str] = set()
    for cases in CASES:
        for case in yaml.safe_load(cases.read_text())["tests"]:
            for check in case["alert_rule_test"]:
                (fires if check["exp_alerts"] else rests).add(check["alertname"])
    assert fires == rests == set(names())


@pytest.mark.parametrize("rule", all_rules(), ids=names())
@pytest.mark.fast
def test_each_alert_says_how_bad_it_is_what_it_saw_and_where_to_read_on(rule: Rule) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert "for" in rule
    notes = rule["annotations"]
    assert notes.keys() == {"summary", "description", "runbook_url"}
    assert "$value" in notes["description"]
    assert "$labels.job" in notes["description"]
    assert notes["runbook_url"] == f"docs/how-to/alerts.md#{rule['alert'].lower()}"


@pytest.mark.fast
def test_the_runbook_has_a_part_for_each_alert_in_their_order() -> None:
    part = re.search(r"^## Alerts$(.*?)(?=^## |\Z)", RUNBOOK.read_text(), re.DOTALL | re.MULTILINE)
    assert part is not None
    headings = re.findall(r"^### (\w+)$(.*?)(?=^###|\Z)", part[1], re.DOTALL | re.MULTILINE)
    assert [heading for heading, _ in headings] == names()
    for heading, text in headings:
        for topic in ("**Means**", "**Look**", "**Do**"):
            assert topic in text, f"{heading} lacks {topic}"


def made_by_the_chart(**values: Any) -> dict[str, Rule]:
    """Return the alerts that the chart installs, by their names."""
    settings: Values = {"prometheusRule": {"enabled": True} | values}
    rule = one(newest_helm().objects("--namespace", "chat", values=settings), "PrometheusRule")
    return {rule["alert"]: rule for group in rule["spec"]["groups"] for rule in group["rules"]}


def test_the_chart_has_the_same_alerts_for_its_own_release(tmp_path: Path) -> None:
    made = made_by_the_chart()
    assert list(made) == names()
    for rule in all_rules():
        expected = THRESHOLD.sub(r"\1", rule["expr"])
        expected = expected.replace(f'job="{JOB}"', f'job="{RELEASE}", namespace="chat"')
        mine = made[rule["alert"]]
        if rule["alert"] != "WebSocketRelayMemory":
            assert dict(mine) == {**rule, "expr": expected}
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": list(made.values())}]}))
    promtool("check", "rules", file)


def test_the_chart_s_alerts_are_for_the_job_that_it_has_scraped() -> None:
    enabled = {"enabled": True}
    values = {"prometheusRule": enabled, "serviceMonitor": enabled, "nameOverride": "chat"}
    objects = newest_helm().objects(values=values)
    name = f"{RELEASE}-chat"
    label = one(objects, "ServiceMonitor", name)["spec"]["jobLabel"]
    job = one(objects, "Service", name)["metadata"]["labels"][label]
    for group in one(objects, "PrometheusRule", name)["spec"]["groups"]:
        assert all(f'job="{job}"' in rule["expr"] for rule in group["rules"])


@pytest.mark.fast
def test_the_chart_s_thresholds_are_those_of_the_file() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())["prometheusRule"]["thresholds"]
    file = {name: float(number) for number, name in THRESHOLD.findall(ALERTS.read_text())}
    assert values == file | {"memoryBytes": None}  # of which the container's limit decides


def test_each_threshold_can_be_set() -> None:
    named = {
        name: rule["alert"] for rule in all_rules() for _, name in THRESHOLD.findall(rule["expr"])
    }
    made = made_by_the_chart(thresholds=dict.fromkeys(named, 0.123))
    for alert in named.values():
        assert re.search(r"[<>] 0\.123$", made[alert]["expr"], re.MULTILINE), made[alert]["expr"]


@pytest.mark.parametrize(
    ("limit", "bytes_"),
    [("1Gi", "966367641"), ("512Mi", "483183820"), ("1.5G", "1350000000"), (None, "1.2e9")],
)
def test_the_bound_on_memory_follows_that_of_the_container(limit: str | None, bytes_: str) -> None:
    values = {"prometheusRule": {"enabled": True}, "resources": {"limits": {"memory": limit}}}
    rule = one(newest_helm().objects(values=values), "PrometheusRule")
    assert f"> {bytes_}" in yaml.safe_dump(rule, width=1000)


def test_an_operator_leaves_alerts_out_and_adds_labels_and_an_address() -> None:
    address = "https://example.com/operations"
    made = made_by_the_chart(
        disabled=["WebSocketRelayBusy"],
        alertLabels={"team": "chat", "severity": "none"},
        runbookUrl=address,
    )
    assert set(names()) - set(made) == {"WebSocketRelayBusy"}
    for name, rule in made.items():
        assert rule["labels"]["team"] == "chat"
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["runbook_url"] == f"{address}#{name.lower()}"


def test_an_operator_says_what_is_watched() -> None:
    made = made_by_the_chart(selector='job="chat/relay", cluster="one"')
    assert made["WebSocketRelayReplicaDown"]["expr"] == 'up{job="chat/relay", cluster="one"} == 0'


async def test_the_alerts_ask_for_metrics_that_a_relay_has(tls_relay_with: StartRelay) -> None:
    page = await tls_relay_with().metrics()
    assert missing([rule["expr"] for rule in all_rules()], page) == set()


@pytest.mark.timeout(180)
async def test_a_real_prometheus_sees_a_broker_go_and_come_back(
    relay_with: StartRelay, tmp_path: Path
) -> None:
    rules = hasty(ALERTS, tmp_path)
    redis = needed(*ANY_REDIS)
    async with RedisBroker(redis, tmp_path / "redis") as broker:
        relay = relay_with(backplane={"url": broker.url})
        async with Prometheus(tmp_path / "prometheus", {"relay-0": relay}, rules) as prometheus:

            async def critical() -> dict[str, Rule]:
                firing = {
                    alert["labels"]["alertname"]: alert for alert in await prometheus.firing()
                }
                return {n: a for n, a in firing.items() if a["labels"]["severity"] == "critical"}

            async def is_calm() -> tuple[bool, object]:
                seen = await prometheus.query("websocket_backplane_up == 1")
                alerts = await critical()
                return bool(seen) and not alerts, alerts

            async def is_told() -> tuple[bool, object]:
                alerts = await critical()
                return OUTAGE in alerts, alerts

            await eventually(is_calm, "a relay that there is nothing to say about")
            broker.kill()
            await eventually(is_told, "an alert")
            alert = (await critical())[OUTAGE]
            assert alert["labels"]["namespace"] == NAMESPACE
            assert alert["labels"]["job"] == JOB
            assert "1 replicas" in alert["annotations"]["description"]
            await broker.start()
            await eventually(is_calm, "an end of all alerts")
