"""The objects of the chart: pods, settings, ingress, scaling, network, and the notes of Helm."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from websocket_relay.config.loader import load

from tests.support.helm import (
    CHART,
    HELMS,
    RELEASE,
    KubernetesObject,
    find_helm,
    find_object,
    merge_values,
    nested_values,
    newest_helm,
    parse_objects,
)
from tests.support.kubernetes_api import cluster_with

FULL = CHART / "ci" / "full-values.yaml"
REDIS = nested_values("config.backplane.url", "redis://redis:6379/0")
THREE = merge_values(REDIS, {"replicaCount": 3})
TLS = {"config": {"server": {"tls": {"enabled": True}}}, "tls": {"secretName": "relay-tls"}}
INGRESS = {"ingress": {"enabled": True, "hosts": ["relay.example.com"]}}
ROUTE = {
    "httpRoute": {
        "enabled": True,
        "parentRefs": [{"name": "public"}],
        "hostnames": ["relay.example.com"],
    }
}


def rendered(*trees: Mapping[str, Any]) -> list[KubernetesObject]:
    """Return the objects of the chart with these values."""
    return newest_helm().objects(values=merge_values(*trees))


@cache
def default_objects() -> list[KubernetesObject]:
    return newest_helm().objects()


@cache
def full_objects() -> list[KubernetesObject]:
    return newest_helm().objects("--values", str(FULL))


def pod_of(objects: Sequence[KubernetesObject], name: str = RELEASE) -> Any:
    return find_object(objects, "Deployment", name)["spec"]["template"]


def container_of(objects: Sequence[KubernetesObject], name: str = RELEASE) -> Any:
    return pod_of(objects, name)["spec"]["containers"][0]


def settings_of(objects: Sequence[KubernetesObject], name: str = RELEASE) -> str:
    """Return the text of the relay's settings, which is a part of the pods' template."""
    text = pod_of(objects, name)["metadata"]["annotations"]["websocket-relay/config.yaml"]
    assert isinstance(text, str)
    return text


def kinds(objects: Sequence[KubernetesObject]) -> set[str]:
    return {document["kind"] for document in objects}


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return selector.items() <= labels.items()


# Pods


@pytest.mark.parametrize("render", [default_objects, full_objects], ids=["default", "full"])
def test_pods_have_no_permissions_beyond_what_they_need(
    render: Callable[[], list[KubernetesObject]],
) -> None:
    objects = render()
    deployment = next(each for each in objects if each["kind"] == "Deployment")
    test = next(each for each in objects if each["kind"] == "Pod")
    for spec in (deployment["spec"]["template"]["spec"], test["spec"]):
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        pod = spec["securityContext"]
        # No user and no group: they are those of the image, or those that OpenShift assigns.
        assert pod == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        container = spec["containers"][0]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        # No shell is needed.
        assert container.get("command", ["python"])[0] == "python"
    account = next(each for each in objects if each["kind"] == "ServiceAccount")
    assert account["automountServiceAccountToken"] is False


def test_a_rolling_update_adds_a_pod_before_it_removes_one() -> None:
    spec = find_object(default_objects(), "Deployment")["spec"]
    assert spec["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
    }


def test_an_update_replaces_all_pods_at_once_with_the_strategy_recreate() -> None:
    spec = find_object(rendered(nested_values("strategy.type", "Recreate")), "Deployment")["spec"]
    assert spec["strategy"] == {"type": "Recreate"}


@pytest.mark.parametrize(
    ("values", "ready_s", "minimum_ready_s"),
    [
        ({}, 0, 15),  # an only replica is missed, and its update adds another one first
        (THREE, 15, 0),
        (merge_values(REDIS, nested_values("autoscaling.enabled", True)), 15, 0),
        (merge_values(THREE, nested_values("config.shutdown.spread_s", "10.5")), 16, 0),
        (merge_values(THREE, nested_values("probes.readiness.initialDelaySeconds", 5)), 5, 10),
    ],
)
def test_the_replacement_of_an_evicted_pod_is_ready_when_that_pod_is_drained(
    values: Mapping[str, Any], ready_s: int, minimum_ready_s: int
) -> None:
    objects = rendered(values)
    # The budget allows the next eviction when the replacement is ready, and an update
    # goes on when it is available. Both are after shutdown.readiness_delay_s and spread_s.
    probe = container_of(objects)["readinessProbe"]
    assert probe["initialDelaySeconds"] == ready_s
    assert find_object(objects, "Deployment")["spec"]["minReadySeconds"] == minimum_ready_s


def test_the_first_probe_comes_when_the_relay_listens() -> None:
    # A refused connection would be a warning in the events of every pod that starts.
    assert container_of(default_objects())["startupProbe"]["initialDelaySeconds"] >= 5


def test_the_deadline_of_an_update_is_longer_than_the_time_a_pod_must_be_ready() -> None:
    long = {"spread_s": 1200, "timeout_s": 1600}
    spec = find_object(rendered(nested_values("config.shutdown", long)), "Deployment")["spec"]
    assert spec["minReadySeconds"] > 1200
    # Kubernetes rejects any other Deployment.
    assert spec["progressDeadlineSeconds"] > spec["minReadySeconds"]


def test_the_pod_of_helm_test_runs_on_the_nodes_of_the_relays() -> None:
    objects = full_objects()
    relay, test = (
        pod_of(objects, "relay")["spec"],
        find_object(objects, "Pod", "relay-test")["spec"],
    )
    assert test["nodeSelector"] == relay["nodeSelector"]
    assert test["tolerations"] == relay["tolerations"]
    assert test["affinity"] == {"nodeAffinity": relay["affinity"]["nodeAffinity"]}


def string_fields(tree: Any) -> Iterator[Any]:
    """Yield the values that must be strings: each name, label and annotation of an object."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if key in ("labels", "matchLabels", "annotations"):
            yield from value.values()
        elif isinstance(value, dict | list):
            yield from string_fields(value)
        elif key in ("name", "namespace", "serviceAccountName", "path", "ingressClassName"):
            yield value


@pytest.mark.parametrize("word", ["on", "null"])
def test_a_name_that_yaml_reads_as_another_type_stays_a_string(word: str) -> None:
    values = {
        "fullnameOverride": word,
        "nameOverride": "2024",
        "priorityClassName": word,
        "serviceAccount": {"create": False, "name": word},
        "ingress": {"className": word, "path": "/a: b #c"},
        "secrets": {"jwtSecret": {"name": word, "key": word}},
    }
    text = newest_helm().run("template", "12e3", str(CHART), "--values", str(FULL), values=values)
    objects = parse_objects(text)
    assert [each for each in string_fields(objects) if not isinstance(each, str)] == []
    assert (
        find_object(objects, "Service", word)["metadata"]["labels"]["app.kubernetes.io/name"]
        == "2024"
    )
    assert pod_of(objects, word)["spec"]["priorityClassName"] == word


STRINGS = [
    ("on", "null"),
    ("0x1F", "1:30"),
    ("2026-11-23", "~"),
    ("{{ .Release.Name }}", "$(HOME)"),
    ("'single' \"double\"", "# no comment"),
    ("a: b", "- item"),
    ("two\nlines\n", " spaces "),
    ("&anchor", "back\\slash"),
    ("%percent", "\u00e4\u2028\U0001f600"),
]
"""Strings that YAML, Helm or Kubernetes may read as something else."""


@pytest.mark.parametrize(("audience", "issuer"), STRINGS)
def test_a_string_reaches_the_settings_of_the_relay_unchanged(
    audience: str, issuer: str, tmp_path: Path
) -> None:
    jwt = {"audience": audience, "issuer": issuer}
    objects = rendered(nested_values("config.auth.jwt", jwt))
    file = tmp_path / "config.yaml"
    file.write_text(settings_of(objects))
    loaded = load(file, {}).auth.jwt
    assert (loaded.audience, loaded.issuer) == ((audience,), (issuer,))


def test_the_settings_are_in_the_pods_template_so_that_an_update_changes_no_pod_that_runs() -> None:
    changed = rendered(nested_values("config.limits.max_connections", 5))
    assert settings_of(changed) != settings_of(default_objects())
    (volume,) = pod_of(changed)["spec"]["volumes"]
    (item,) = volume["downwardAPI"]["items"]
    assert item["fieldRef"]["fieldPath"] == "metadata.annotations['websocket-relay/config.yaml']"
    # A restarting pod reads no object that the update has changed in place.
    assert not {"ConfigMap", "Secret"} & kinds(changed)


def test_the_image_is_that_of_the_version_unless_values_name_another() -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    digest = "sha256:" + "0" * 64
    for image, expected in (
        ({}, f"websocket-relay:{version}"),
        (
            {"repository": "registry.example.com/relay", "tag": "edge"},
            "registry.example.com/relay:edge",
        ),
        ({"tag": "edge", "digest": digest}, f"websocket-relay@{digest}"),
        ({"registry": "registry.example.com"}, f"registry.example.com/websocket-relay:{version}"),
    ):
        assert container_of(rendered({"image": image}))["image"] == expected
    image = container_of(full_objects(), "relay")["image"]
    assert image.startswith("registry.example.com/websocket-relay@")  # global.imageRegistry


def test_secrets_are_references_and_not_values() -> None:
    objects = full_objects()
    variables = {entry["name"]: entry["value"] for entry in container_of(objects, "relay")["env"]}
    volumes = {each["name"]: each for each in pod_of(objects, "relay")["spec"]["volumes"]}
    sources = [each["secret"] for each in volumes["secrets"]["projected"]["sources"]]
    files = {
        item["path"]: (each["name"], item["key"]) for each in sources for item in each["items"]
    }
    # A file follows its Secret; a variable would keep its value until the pod ends.
    for name, secret, key in (
        ("RELAY__BACKPLANE__URL_FILE", "relay-broker", "address"),
        ("RELAY__BACKPLANE__CA_FILE", "relay-broker-ca", "ca.crt"),
        ("RELAY__BACKPLANE__CERT_FILE", "relay-broker-client", "tls.crt"),
        ("RELAY__BACKPLANE__KEY_FILE", "relay-broker-client", "tls.key"),
        ("RELAY__AUTH__JWT__SECRET_FILE", "relay-jwt", "secret"),
        ("RELAY__AUTH__JWT__SECRETS_FILE", "relay-jwt", "secrets.json"),
        ("RELAY__HOOKS__SECRET_FILE", "relay-hooks", "secret"),
        ("RELAY__AUTH__JWT__PUBLIC_KEY_FILE", "relay-jwt-key", "public.pem"),
        ("RELAY__API__KEY_FILE", "relay-api", "api-key"),
    ):
        directory, _, file = variables[name].rpartition("/")
        assert (directory, files[file]) == ("/run/websocket-relay/secrets", (secret, key))
    config = yaml.safe_load(settings_of(objects, "relay"))
    assert config["backplane"]["url"] == "memory://"
    assert config["auth"]["jwt"]["secret"] == ""
    assert "Secret" not in kinds(objects)


def test_every_object_and_pod_has_the_common_labels_and_none_twice() -> None:
    labels = {"example.com/team": "messaging", "release": "prometheus"}
    values = {"commonLabels": labels, "serviceMonitor": {"labels": {"release": "other"}}}
    objects = newest_helm().objects("--values", str(FULL), values=values)
    for each in (*objects, pod_of(objects, "relay")):
        found = each["metadata"].get("labels", {})
        release = "other" if each.get("kind") == "ServiceMonitor" else "prometheus"
        if not each["metadata"].get("name", "").endswith(("tracing", "text")):  # extraObjects
            assert (found["example.com/team"], found["release"]) == ("messaging", release)


def test_the_pod_of_helm_test_is_gone_after_it_and_has_a_name_of_its_own() -> None:
    metadata = find_object(default_objects(), "Pod", f"{RELEASE}-test")["metadata"]
    policies = metadata["annotations"]["helm.sh/hook-delete-policy"].split(",")
    # Helm does not delete the objects of hooks when it uninstalls a release.
    assert {"hook-succeeded", "hook-failed"} <= {*policies}
    # The runbooks select pods by this label.
    assert metadata["labels"]["app.kubernetes.io/name"] == f"{RELEASE}-test"


def test_the_pods_have_the_parts_that_the_values_add() -> None:
    objects = full_objects()
    spec = pod_of(objects, "relay")["spec"]
    assert [each["name"] for each in spec["containers"]] == ["relay", "agent"]
    assert [each["name"] for each in spec["initContainers"]] == ["wait"]
    assert spec["containers"][0]["envFrom"] == [{"configMapRef": {"name": "tracing"}}]
    assert "postStart" in spec["containers"][0]["lifecycle"]
    assert spec["hostAliases"][0]["ip"] == "10.20.0.7"
    assert spec["dnsConfig"]["options"] == [{"name": "ndots", "value": "1"}]
    metadata = find_object(objects, "Deployment", "relay")["metadata"]
    assert metadata["annotations"] == {"reloader.stakater.com/auto": "true"}
    # Extra objects are templates, as values and as text.
    assert find_object(objects, "ConfigMap", f"{RELEASE}-tracing")
    assert find_object(objects, "ConfigMap", "relay-text")


def test_selectors_match_the_relays_and_not_the_pod_of_helm_test() -> None:
    objects = full_objects()
    relay, test = pod_of(objects, "relay"), find_object(objects, "Pod", "relay-test")
    selectors = [
        find_object(objects, "Service", "relay")["spec"]["selector"],
        find_object(objects, "Deployment", "relay")["spec"]["selector"]["matchLabels"],
        find_object(objects, "PodDisruptionBudget", "relay")["spec"]["selector"]["matchLabels"],
        find_object(objects, "NetworkPolicy", "relay")["spec"]["podSelector"]["matchLabels"],
        *(
            each["labelSelector"]["matchLabels"]
            for each in relay["spec"]["topologySpreadConstraints"]
        ),
    ]
    assert len(selectors) == 5
    assert all(selects(selector, relay["metadata"]["labels"]) for selector in selectors)
    assert not any(selects(selector, test["metadata"]["labels"]) for selector in selectors)


# Ingress


def test_the_service_has_both_ports_of_the_relay() -> None:
    objects = rendered(nested_values("service.port", 80))
    targets = {port["name"]: port for port in find_object(objects, "Service")["spec"]["ports"]}
    assert {name: port["port"] for name, port in targets.items()} == {
        "websocket": 80,
        "metrics": 9090,
    }
    # All meshes and Gateways know it. Linkerd takes names that it does not know for raw TCP.
    assert targets["websocket"]["appProtocol"] == "http"
    tls = find_object(rendered(TLS), "Service")["spec"]["ports"][0]
    assert tls["appProtocol"] == "https"
    names = {port["name"]: port["containerPort"] for port in container_of(objects)["ports"]}
    assert {name: names[port["targetPort"]] for name, port in targets.items()} == {
        "websocket": 8443,
        "metrics": 9090,
    }


@pytest.mark.parametrize("kind", ["LoadBalancer", "NodePort"])
def test_an_external_service_does_not_expose_the_metrics(kind: str) -> None:
    objects = rendered({"service": {"type": kind}, "serviceMonitor": {"enabled": True}})
    outside, inside = (
        find_object(objects, "Service"),
        find_object(objects, "Service", f"{RELEASE}-metrics"),
    )
    assert [port["name"] for port in outside["spec"]["ports"]] == ["websocket"]
    assert [port["name"] for port in inside["spec"]["ports"]] == ["metrics"]
    assert inside["spec"]["type"] == "ClusterIP"
    selector = find_object(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    assert selects(selector, inside["metadata"]["labels"])


@pytest.mark.parametrize(
    ("host", "policy", "expected"),
    [
        ("::", "PreferDualStack", "PreferDualStack"),
        ("0.0.0.0", "PreferDualStack", None),
        ("::", "SingleStack", "SingleStack"),
        ("::", "", None),
    ],
)
def test_the_services_have_both_families_where_cluster_and_relay_have_both(
    host: str, policy: str, expected: str | None
) -> None:
    objects = rendered(
        nested_values("config.server.host", host),
        {"service": {"type": "LoadBalancer", "ipFamilyPolicy": policy}},
    )
    for name in (RELEASE, f"{RELEASE}-metrics"):
        spec = find_object(objects, "Service", name)["spec"]
        assert spec.get("ipFamilyPolicy") == expected


def test_the_metrics_are_scraped_by_service_or_by_pod() -> None:
    pod_monitor = {"serviceMonitor": {"enabled": True, "kind": "PodMonitor"}}
    spec = find_object(rendered(pod_monitor), "PodMonitor")["spec"]
    (endpoint,) = spec["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    labels = pod_of(rendered(pod_monitor))["metadata"]["labels"]
    assert selects(spec["selector"]["matchLabels"], labels)
    assert labels[spec["jobLabel"]] == RELEASE


def test_an_ingress_and_a_route_have_only_the_annotations_and_timeouts_of_the_values() -> None:
    objects = rendered(INGRESS, ROUTE)
    assert "annotations" not in find_object(objects, "Ingress")["metadata"]
    (rule,) = find_object(objects, "HTTPRoute")["spec"]["rules"]
    assert "timeouts" not in rule
    assert rule["backendRefs"] == [{"name": RELEASE, "port": 8443}]
    (rule,) = find_object(full_objects(), "HTTPRoute", "relay")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({}, "/"),
        (nested_values("config.server.base_path", "/relay"), "/relay"),
        ({"ingress": {"path": "/ws"}, "httpRoute": {"path": "/ws"}}, "/ws"),
    ],
)
def test_the_ingress_and_the_route_have_the_base_path_of_the_relay(
    values: Mapping[str, Any], path: str
) -> None:
    objects = rendered(INGRESS, ROUTE, values)
    (rule,) = find_object(objects, "Ingress")["spec"]["rules"]
    assert rule["http"]["paths"][0]["path"] == path
    (rule,) = find_object(objects, "HTTPRoute")["spec"]["rules"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": path}}]


# Scaling


def test_the_autoscaler_targets_cpu_and_clients_and_scales_down_slowly() -> None:
    objects = rendered(REDIS, nested_values("autoscaling.enabled", True))
    spec = find_object(objects, "HorizontalPodAutoscaler")["spec"]
    cpu, clients, *more = spec["metrics"]
    assert more == []
    assert cpu["resource"]["target"] == {"type": "Utilization", "averageUtilization": 70}
    assert clients["pods"]["metric"] == {"name": "websocket_connected_clients"}
    assert clients["pods"]["target"] == {"type": "AverageValue", "averageValue": "10000"}
    down = spec["behavior"]["scaleDown"]
    assert down["stabilizationWindowSeconds"] == 900
    assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 300}]
    assert "replicas" not in find_object(objects, "Deployment")["spec"]


def test_the_autoscaler_has_more_metrics_or_is_another_object() -> None:
    spec = find_object(full_objects(), "HorizontalPodAutoscaler", "relay")["spec"]
    assert spec["metrics"][-1]["external"]["metric"] == {"name": "handshakes_per_second"}
    objects = rendered(REDIS, {"autoscaling": {"enabled": True, "create": False}})
    assert "HorizontalPodAutoscaler" not in kinds(objects)
    assert "replicas" not in find_object(objects, "Deployment")["spec"]


@pytest.mark.parametrize("name", HELMS)
def test_the_number_of_replicas_stays_when_autoscaling_is_enabled_for_a_running_release(
    name: str,
) -> None:
    values = merge_values(REDIS, nested_values("autoscaling.enabled", True))
    objects = rendered(values)
    running = find_object(objects, "Deployment")
    owner = {"meta.helm.sh/release-name": RELEASE, "meta.helm.sh/release-namespace": "chat"}
    running["metadata"] |= {"namespace": "chat", "annotations": owner}
    running["spec"]["replicas"] = 7  # the number that `kubectl scale` or the autoscaler has set
    with cluster_with([running], known=objects) as server:
        text = find_helm(name).run(
            *("template", RELEASE, str(CHART), "--namespace", "chat"),
            *("--dry-run=server", "--disable-openapi-validation", "--kube-apiserver", server),
            values=values,
        )
    assert find_object(parse_objects(text), "Deployment")["spec"]["replicas"] == 7


def test_the_disruption_budget_allows_one_pod_at_a_time_by_default() -> None:
    spec = find_object(default_objects(), "PodDisruptionBudget")["spec"]
    assert spec["maxUnavailable"] == 1
    least = {"podDisruptionBudget": {"maxUnavailable": "", "minAvailable": "50%"}}
    spec = find_object(rendered(THREE, least), "PodDisruptionBudget")["spec"]
    assert spec["minAvailable"] == "50%"
    assert "maxUnavailable" not in spec


# The network


def egress_ports(objects: Sequence[KubernetesObject]) -> set[int]:
    rules = find_object(objects, "NetworkPolicy")["spec"]["egress"]
    return {port["port"] for rule in rules for port in rule["ports"]} - {53}


@pytest.mark.parametrize(
    ("broker", "issuer", "ports"),
    [
        ("memory://", "", set()),
        ("memory://", "https://issuer.example.com/jwks.json", {443}),
        ("redis://redis:6379/0", "http://issuer/jwks.json", {6379, 80}),
        ("rediss://redis.example.com/0", "", {6379}),
        ("redis+sentinel://one,two:26380/log", "", {6379, 26379, 26380}),
        ("rediss://redis.example.com:6380/0?ssl_ca_certs=/run/ca.crt", "", {6380}),
        ("redis://[fd00::7]:6390", "https://issuer.example.com:8444/jwks.json", {6390, 8444}),
        ("nats://one,two:4223,three:4224?replicas=3", "", {4222, 4223, 4224}),
        ("redis+cluster://one,two:6380", "", {6379, 6380}),
        ("rediss+sentinel://one:26380,two/mymaster", "", {26380, 26379, 6379}),
        ("tls://nats", "", {4222}),
    ],
)
def test_a_network_policy_allows_egress_to_the_broker_and_to_the_signing_keys(
    broker: str, issuer: str, ports: set[int]
) -> None:
    tokens = {"mode": "jwt", "jwt": {"jwks_url": issuer, "algorithms": ["RS256"]}}
    objects = rendered(
        nested_values("config.backplane.url", broker),
        nested_values("config.auth", tokens) if issuer else {},
        nested_values("networkPolicy.enabled", True),
    )
    assert egress_ports(objects) == ports


def test_a_network_policy_allows_egress_to_the_backend_that_is_asked_and_gets_events() -> None:
    peers = [{"namespaceSelector": {"matchLabels": {"name": "app"}}}]
    objects = rendered(
        nested_values("config.auth", {"mode": "hook", "hook": {"url": "http://app:8000/relay"}}),
        nested_values("config.hooks.url", "https://app.example.com/events"),
        nested_values("networkPolicy", {"enabled": True, "hooksTo": peers}),
    )
    assert egress_ports(objects) == {8000, 443}
    rules = find_object(objects, "NetworkPolicy")["spec"]["egress"][1:]
    assert [rule["to"] for rule in rules] == [peers, peers]


def test_a_network_policy_allows_clients_prometheus_and_helm_test() -> None:
    objects = full_objects()
    clients, prometheus = find_object(objects, "NetworkPolicy", "relay")["spec"]["ingress"]
    assert clients["ports"] == [{"protocol": "TCP", "port": "websocket"}]
    test = find_object(objects, "Pod", "relay-test")["metadata"]["labels"]
    assert selects(clients["from"][-1]["podSelector"]["matchLabels"], test)
    assert prometheus["ports"] == [{"protocol": "TCP", "port": "metrics"}]


# The notes after an installation


def notes(*trees: Mapping[str, Any]) -> str:
    output = newest_helm().run(
        "install",
        RELEASE,
        str(CHART),
        "--dry-run=client",
        "--namespace",
        "chat",
        values=merge_values(*trees),
    )
    return output.partition("NOTES:\n")[2]


def test_the_notes_have_the_urls_of_clients_and_the_command_of_helm_test() -> None:
    text = notes(INGRESS, {"ingress": {"tls": [{"hosts": ["relay.example.com"]}]}}, TLS)
    assert re.findall(r"\bwss?://\S+", text) == [
        "wss://relay.example.com/",
        "wss://websocket-relay.chat:8443/",
    ]
    assert "helm test websocket-relay --namespace chat\n" in text
    assert "https://localhost:8443/" in text


@pytest.mark.parametrize(
    ("values", "warnings"),
    [
        ({}, ["memory://"]),
        (REDIS, []),
        (merge_values(REDIS, INGRESS), ["config.auth.mode"]),
        (merge_values(REDIS, nested_values("service.type", "LoadBalancer")), ["config.auth.mode"]),
        (
            merge_values(REDIS, ROUTE, nested_values("config.limits.max_connections_per_ip", 5)),
            ["config.auth.mode", "config.server.trusted_proxies"],
        ),
        (merge_values(REDIS, ROUTE, TLS), ["config.auth.mode", "BackendTLSPolicy"]),
        (
            merge_values(REDIS, nested_values("autoscaling.enabled", True)),
            ["custom.metrics.k8s.io"],
        ),
    ],
)
def test_the_notes_warn_of_valid_values_that_are_hardly_intended(
    values: Mapping[str, Any], warnings: Sequence[str]
) -> None:
    found = notes(values).split("NOTE: ")[1:]
    assert len(found) == len(warnings)
    assert all(word in note for word, note in zip(warnings, found, strict=True))
