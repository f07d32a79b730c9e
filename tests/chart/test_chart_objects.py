"""What the chart's objects say to Kubernetes, to proxies and to whoever installs it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from websocket_relay.config.loader import load

from tests.support.helm import (
    CHART,
    RELEASE,
    Object,
    all_of,
    nested,
    newest_helm,
    one,
    parsed,
)

FULL = CHART / "ci" / "full-values.yaml"
NGINX = "nginx.ingress.kubernetes.io"
REDIS = nested("config.backplane.url", "redis://redis:6379/0")
TLS = {"config": {"server": {"tls": {"enabled": True}}}, "tls": {"secretName": "relay-tls"}}
INGRESS = {"ingress": {"enabled": True, "hosts": ["relay.example.com"]}}
ROUTE = {
    "httpRoute": {
        "enabled": True,
        "parentRefs": [{"name": "public"}],
        "hostnames": ["relay.example.com"],
    }
}


def rendered(*trees: Mapping[str, Any]) -> list[Object]:
    """Return what the newest Helm makes of values."""
    return newest_helm().objects(values=all_of(*trees))


def full() -> list[Object]:
    return newest_helm().objects("--values", str(FULL))


def pod_of(objects: Sequence[Object], name: str = RELEASE) -> Any:
    return one(objects, "Deployment", name)["spec"]["template"]


def container_of(objects: Sequence[Object], name: str = RELEASE) -> Any:
    (container,) = pod_of(objects, name)["spec"]["containers"]
    return container


def kinds(objects: Sequence[Object]) -> set[str]:
    return {document["kind"] for document in objects}


def has(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    return selector.items() <= labels.items()


# Pods


@pytest.mark.parametrize("objects", [rendered, full], ids=["default", "full"])
def test_pods_may_do_nothing_that_they_need_not(objects: Any) -> None:
    made = objects()
    deployment = next(each for each in made if each["kind"] == "Deployment")
    test = next(each for each in made if each["kind"] == "Pod")
    for spec in (deployment["spec"]["template"]["spec"], test["spec"]):
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        pod = spec["securityContext"]
        assert (pod["runAsNonRoot"], pod["runAsUser"]) == (True, 10001)
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        # A shell is not asked for.
        assert container.get("command", ["python"])[0] == "python"
        assert "lifecycle" not in container
    account = next(each for each in made if each["kind"] == "ServiceAccount")
    assert account["automountServiceAccountToken"] is False


def test_no_pod_is_missing_in_a_rolling_update() -> None:
    spec = one(rendered(), "Deployment")["spec"]
    assert spec["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
    }


def test_pods_can_be_replaced_all_at_once_instead() -> None:
    spec = one(rendered(nested("strategy.type", "Recreate")), "Deployment")["spec"]
    assert spec["strategy"] == {"type": "Recreate"}


def test_an_update_has_more_time_than_a_pod_must_be_ready_for() -> None:
    long = {"spread_s": 1200, "timeout_s": 1600}
    spec = one(rendered(nested("config.shutdown", long)), "Deployment")["spec"]
    assert spec["minReadySeconds"] > 1200
    # Or Kubernetes would refuse the Deployment.
    assert spec["progressDeadlineSeconds"] > spec["minReadySeconds"]


def test_the_pod_of_helm_test_may_run_where_relays_may() -> None:
    objects = full()
    relay, test = pod_of(objects, "relay")["spec"], one(objects, "Pod", "relay-test")["spec"]
    assert test["nodeSelector"] == relay["nodeSelector"]
    assert test["tolerations"] == relay["tolerations"]
    assert test["affinity"] == {"nodeAffinity": relay["affinity"]["nodeAffinity"]}


def texts(tree: Any) -> Iterator[Any]:
    """Yield what has to be a text: each name, label and annotation of an object."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if key in ("labels", "matchLabels", "annotations"):
            yield from value.values()
        elif isinstance(value, dict | list):
            yield from texts(value)
        elif key in ("name", "namespace", "serviceAccountName", "path", "ingressClassName"):
            yield value


@pytest.mark.parametrize("word", ["on", "null", "true", "no"])
def test_names_that_yaml_takes_for_something_else_stay_names(word: str) -> None:
    values = {
        "fullnameOverride": word,
        "nameOverride": "2024",
        "priorityClassName": word,
        "serviceAccount": {"create": False, "name": word},
        "ingress": {"className": word, "path": "/a: b #c"},
        "secrets": {"jwtSecret": {"name": word, "key": word}},
    }
    text = newest_helm().run("template", "12e3", str(CHART), "--values", str(FULL), values=values)
    objects = parsed(text)
    assert [each for each in texts(objects) if not isinstance(each, str)] == []
    assert one(objects, "Service", word)["metadata"]["labels"]["app.kubernetes.io/name"] == "2024"
    assert pod_of(objects, word)["spec"]["priorityClassName"] == word


NASTY = [
    "on",
    "null",
    "0x1F",
    "1:30",
    "2026-11-23",
    "~",
    "{{ .Release.Name }}",
    "$(HOME)",
    "'single' \"double\"",
    "# no comment",
    "a: b",
    "- item",
    "two\nlines\n",
    " spaces ",
    "\ttab",
    "%percent",
    "&anchor",
    "*alias",
    "!tag",
    "back\\slash",
    "\u00e4\u2028\U0001f600",
]


@pytest.mark.parametrize("text", NASTY)
def test_a_setting_reaches_the_relay_as_it_was_said(text: str, tmp_path: Path) -> None:
    objects = rendered(nested("config.auth.jwt.audience", text))
    file = tmp_path / "config.yaml"
    file.write_text(one(objects, "ConfigMap")["data"]["config.yaml"])
    assert load(file, {}).auth.jwt.audience == text


def test_other_settings_are_other_pods() -> None:
    checksums = {
        pod_of(rendered(values))["metadata"]["annotations"]["checksum/config"]
        for values in ({}, {}, nested("config.limits.max_connections", 5))
    }
    assert len(checksums) == 2


def test_the_image_is_the_release_s_own_unless_another_is_named() -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    digest = "sha256:" + "0" * 64
    for image, expected in (
        ({}, f"websocket-relay:{version}"),
        (
            {"repository": "registry.example.com/relay", "tag": "edge"},
            "registry.example.com/relay:edge",
        ),
        ({"tag": "edge", "digest": digest}, f"websocket-relay@{digest}"),
    ):
        assert container_of(rendered({"image": image}))["image"] == expected


def test_secrets_are_referred_to_and_stand_nowhere() -> None:
    objects = full()
    variables = {entry["name"]: entry for entry in container_of(objects, "relay")["env"]}
    for name, secret, key in (
        ("RELAY__BACKPLANE__URL", "relay-broker", "address"),
        ("RELAY__AUTH__JWT__SECRET", "relay-jwt", "secret"),
    ):
        assert variables[name]["valueFrom"] == {"secretKeyRef": {"name": secret, "key": key}}
    config = yaml.safe_load(one(objects, "ConfigMap", "relay")["data"]["config.yaml"])
    assert config["backplane"]["url"] == "memory://"
    assert config["auth"]["jwt"]["secret"] == ""
    assert "Secret" not in kinds(objects)


def test_selectors_find_the_relays_and_not_the_pod_of_helm_test() -> None:
    objects = full()
    relay, test = pod_of(objects, "relay"), one(objects, "Pod", "relay-test")
    selectors = [
        one(objects, "Service", "relay")["spec"]["selector"],
        one(objects, "Deployment", "relay")["spec"]["selector"]["matchLabels"],
        one(objects, "PodDisruptionBudget", "relay")["spec"]["selector"]["matchLabels"],
        one(objects, "NetworkPolicy", "relay")["spec"]["podSelector"]["matchLabels"],
        *(
            each["labelSelector"]["matchLabels"]
            for each in relay["spec"]["topologySpreadConstraints"]
        ),
    ]
    assert len(selectors) == 5
    assert all(has(relay["metadata"]["labels"], selector) for selector in selectors)
    assert not any(has(test["metadata"]["labels"], selector) for selector in selectors)


# Ways in


def test_a_service_leads_to_both_ports() -> None:
    objects = rendered(nested("service.port", 80))
    targets = {port["name"]: port for port in one(objects, "Service")["spec"]["ports"]}
    assert {name: port["port"] for name, port in targets.items()} == {
        "websocket": 80,
        "metrics": 9090,
    }
    assert targets["websocket"]["appProtocol"] == "kubernetes.io/ws"
    names = {port["name"]: port["containerPort"] for port in container_of(objects)["ports"]}
    assert {name: names[port["targetPort"]] for name, port in targets.items()} == {
        "websocket": 8443,
        "metrics": 9090,
    }


@pytest.mark.parametrize("kind", ["LoadBalancer", "NodePort"])
def test_a_service_that_is_open_to_the_outside_has_no_metrics_in_it(kind: str) -> None:
    objects = rendered({"service": {"type": kind}, "serviceMonitor": {"enabled": True}})
    outside, inside = one(objects, "Service"), one(objects, "Service", f"{RELEASE}-metrics")
    assert [port["name"] for port in outside["spec"]["ports"]] == ["websocket"]
    assert [port["name"] for port in inside["spec"]["ports"]] == ["metrics"]
    assert inside["spec"]["type"] == "ClusterIP"
    selector = one(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    assert has(inside["metadata"]["labels"], selector)


def test_an_ingress_holds_websockets_open_and_knows_how_large_a_message_may_be() -> None:
    values = (INGRESS, TLS, nested("config.limits.max_message_bytes", 8 << 20))
    annotations = one(rendered(*values), "Ingress")["metadata"]["annotations"]
    assert annotations == {
        f"{NGINX}/proxy-read-timeout": "60",
        f"{NGINX}/proxy-send-timeout": "60",
        f"{NGINX}/proxy-connect-timeout": "2",
        f"{NGINX}/proxy-next-upstream": "error timeout http_503",
        f"{NGINX}/proxy-body-size": "8388608",
        f"{NGINX}/backend-protocol": "HTTPS",
    }


def test_annotations_of_an_ingress_can_be_changed_and_taken_out() -> None:
    changes = {
        f"{NGINX}/proxy-body-size": "1g",
        f"{NGINX}/proxy-send-timeout": None,
        "example.com/team": "messaging",
    }
    values = (INGRESS, {"ingress": {"annotations": changes}})
    annotations = one(rendered(*values), "Ingress")["metadata"]["annotations"]
    assert annotations[f"{NGINX}/proxy-body-size"] == "1g"
    assert annotations["example.com/team"] == "messaging"
    assert f"{NGINX}/proxy-send-timeout" not in annotations
    assert f"{NGINX}/backend-protocol" not in annotations


def test_a_route_of_a_gateway_has_no_time_limit_unless_it_is_given_one() -> None:
    (rule,) = one(rendered(ROUTE), "HTTPRoute")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    assert rule["backendRefs"] == [{"name": RELEASE, "port": 8443}]
    none = {"httpRoute": {"timeouts": {"request": None, "backendRequest": None}}}
    (rule,) = one(rendered(ROUTE, none), "HTTPRoute")["spec"]["rules"]
    assert "timeouts" not in rule


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({}, "/"),
        (nested("config.server.base_path", "/relay"), "/relay"),
        ({"ingress": {"path": "/ws"}, "httpRoute": {"path": "/ws"}}, "/ws"),
    ],
)
def test_both_ways_in_begin_where_the_relay_does(values: Mapping[str, Any], path: str) -> None:
    objects = rendered(INGRESS, ROUTE, values)
    (rule,) = one(objects, "Ingress")["spec"]["rules"]
    assert rule["http"]["paths"][0]["path"] == path
    (rule,) = one(objects, "HTTPRoute")["spec"]["rules"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": path}}]


# Scaling


def test_the_autoscaler_looks_at_cpu_and_clients_and_is_slow_to_take_replicas_away() -> None:
    objects = rendered(REDIS, nested("autoscaling.enabled", True))
    spec = one(objects, "HorizontalPodAutoscaler")["spec"]
    cpu, clients = spec["metrics"]
    assert cpu["resource"]["target"] == {"type": "Utilization", "averageUtilization": 70}
    assert clients["pods"]["metric"] == {"name": "websocket_connected_clients"}
    assert clients["pods"]["target"] == {"type": "AverageValue", "averageValue": "10000"}
    down = spec["behavior"]["scaleDown"]
    assert down["stabilizationWindowSeconds"] == 900
    assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 300}]
    assert "replicas" not in one(objects, "Deployment")["spec"]


def test_a_single_replica_can_be_moved_and_two_never_go_together() -> None:
    spec = one(rendered(), "PodDisruptionBudget")["spec"]
    assert spec["maxUnavailable"] == 1
    least = {"podDisruptionBudget": {"maxUnavailable": None, "minAvailable": "50%"}}
    spec = one(rendered(least), "PodDisruptionBudget")["spec"]
    assert spec["minAvailable"] == "50%"
    assert "maxUnavailable" not in spec


# The network


def egress_ports(objects: Sequence[Object]) -> set[int]:
    rules = one(objects, "NetworkPolicy")["spec"]["egress"]
    return {port["port"] for rule in rules for port in rule["ports"]} - {53}


@pytest.mark.parametrize(
    ("url", "ports"),
    [
        ("memory://", set()),
        ("redis://redis:6379/0", {6379}),
        ("rediss://redis.example.com/0", {6379}),
        ("rediss://redis.example.com:6380/0?ssl_ca_certs=/run/ca.crt", {6380}),
        ("redis://[fd00::7]:6390", {6390}),
        ("nats://one,two:4223,three:4224?replicas=3", {4222, 4223, 4224}),
        ("tls://nats", {4222}),
    ],
)
def test_a_network_policy_lets_the_relay_reach_its_broker(url: str, ports: set[int]) -> None:
    objects = rendered(nested("config.backplane.url", url), nested("networkPolicy.enabled", True))
    assert egress_ports(objects) == ports


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("https://issuer.example.com/jwks.json", 443),
        ("http://issuer/jwks.json", 80),
        ("https://issuer.example.com:8444/jwks.json", 8444),
    ],
)
def test_a_network_policy_lets_the_relay_fetch_its_keys(url: str, port: int) -> None:
    tokens = {"mode": "jwt", "jwt": {"jwks_url": url, "algorithms": ["RS256"]}}
    objects = rendered({"config": {"auth": tokens}}, nested("networkPolicy.enabled", True))
    assert egress_ports(objects) == {port}


def test_a_network_policy_lets_in_clients_prometheus_and_helm_test() -> None:
    objects = full()
    clients, prometheus = one(objects, "NetworkPolicy", "relay")["spec"]["ingress"]
    assert clients["ports"] == [{"protocol": "TCP", "port": "websocket"}]
    test = one(objects, "Pod", "relay-test")["metadata"]["labels"]
    assert has(test, clients["from"][-1]["podSelector"]["matchLabels"])
    assert prometheus["ports"] == [{"protocol": "TCP", "port": "metrics"}]


# What is said after an installation


def notes(*trees: Mapping[str, Any]) -> str:
    said = newest_helm().run(
        "install",
        RELEASE,
        str(CHART),
        "--dry-run=client",
        "--namespace",
        "chat",
        values=all_of(*trees),
    )
    return said.partition("NOTES:\n")[2]


def test_the_notes_say_where_clients_connect() -> None:
    said = notes(INGRESS, {"ingress": {"tls": [{"hosts": ["relay.example.com"]}]}}, TLS)
    assert re.findall(r"\bwss?://\S+", said) == [
        "wss://relay.example.com/",
        "wss://websocket-relay.chat:8443/",
    ]
    assert "helm test websocket-relay --namespace chat --logs" in said
    assert "https://localhost:8443/" in said


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ({}, ["memory://"]),
        (REDIS, []),
        (all_of(REDIS, INGRESS), ["config.auth.mode"]),
        (all_of(REDIS, nested("service.type", "LoadBalancer")), ["config.auth.mode"]),
        (
            all_of(REDIS, ROUTE, nested("config.limits.max_connections_per_ip", 5)),
            ["config.auth.mode", "config.server.trusted_proxies"],
        ),
        (all_of(REDIS, ROUTE, TLS), ["config.auth.mode", "BackendTLSPolicy"]),
        (all_of(REDIS, nested("autoscaling.enabled", True)), ["custom.metrics.k8s.io"]),
    ],
)
def test_the_notes_warn_of_what_is_allowed_and_hardly_meant(
    values: Mapping[str, Any], warned: Sequence[str]
) -> None:
    told = notes(values).split("NOTE: ")[1:]
    assert len(told) == len(warned)
    assert all(word in note for word, note in zip(warned, told, strict=True))
