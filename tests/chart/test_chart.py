"""The chart, rendered by the real Helm: what it makes is valid, what it refuses is told plainly."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from websocket_relay.config.loader import LEAVES
from websocket_relay.config.model import Settings

from helm.generate import files, rows
from tests.support.helm import (
    CHART,
    CHART_YAML,
    CI_VALUES,
    HELMS,
    KUBERNETES,
    HelmError,
    all_of,
    helm,
    nested,
    newest_helm,
    one,
    parsed,
    run,
    validate,
)
from tests.support.markdown import anchors
from tests.support.project import PROJECT
from tests.support.relay_process import ROOT

VALUES_TEXT = (CHART / "values.yaml").read_text()
VALUES = yaml.safe_load(VALUES_TEXT)
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
K8S = ROOT / "k8s"

REDIS = {"config": {"backplane": {"url": "redis://redis:6379/0"}}}
JWT = {"config": {"auth": {"mode": "jwt"}}, "secrets": {"jwtSecret": {"name": "relay-jwt"}}}

each_helm = pytest.mark.parametrize("name", HELMS)
each_ci_values = pytest.mark.parametrize("values", CI_VALUES, ids=lambda file: file.name)


# Every object that it makes


@each_helm
@each_ci_values
def test_helm_finds_nothing_to_complain_about(name: str, values: Path) -> None:
    assert "0 chart(s) failed" in helm(name).run(
        "lint", "--strict", str(CHART), "--values", str(values)
    )


@each_helm
@each_ci_values
def test_every_object_is_valid_in_the_oldest_and_the_newest_kubernetes(
    name: str, values: Path
) -> None:
    objects = helm(name).objects("--values", str(values))
    for version in KUBERNETES:
        for document in objects:
            validate(document, version)


def test_the_versions_of_kubernetes_are_those_that_the_chart_names() -> None:
    oldest, newest = KUBERNETES
    newest_helm().template("--kube-version", f"{oldest}.0")
    newest_helm().template("--kube-version", f"{newest}.3-eks-1")
    with pytest.raises(HelmError, match="incompatible with Kubernetes"):
        newest_helm().template("--kube-version", "1.26.9")


@pytest.mark.parametrize(
    ("kind", "break_it"),
    [
        ("ServiceMonitor", lambda spec: spec["endpoints"][0].update(intervall="15s")),
        ("ServiceMonitor", lambda spec: spec.update(jobLabels="job")),
        ("HTTPRoute", lambda spec: spec["rules"][0].update(timeout={"request": "0s"})),
        ("HTTPRoute", lambda spec: spec["rules"][0]["timeouts"].update(request="1 hour")),
        ("Deployment", lambda spec: spec.update(minReadySecond=1)),
        ("Ingress", lambda spec: spec.update(ingressClass="nginx")),
    ],
)
def test_an_unknown_field_would_be_found(kind: str, break_it: Any) -> None:
    document = one(
        newest_helm().objects("--values", str(CHART / "ci/full-values.yaml")), kind, "relay"
    )
    break_it(document["spec"])
    with pytest.raises(jsonschema.ValidationError):
        validate(document, KUBERNETES[-1])


def test_both_helms_make_the_same() -> None:
    made = [[helm(name).objects("--values", str(file)) for file in CI_VALUES] for name in HELMS]
    assert all(each == made[0] for each in made)


def test_a_long_name_of_a_release_makes_names_that_kubernetes_takes() -> None:
    long = {"fullnameOverride": "a-name-that-is-" + "very-" * 12 + "long"}
    values = all_of(long, {"service": {"type": "LoadBalancer"}})
    for document in newest_helm().objects(values=values):
        assert len(document["metadata"]["name"]) <= 63
        assert not document["metadata"]["name"].endswith("-")


# What is generated


def test_what_is_generated_is_up_to_date() -> None:
    made = files(newest_helm().manifests)
    stale = [file.relative_to(ROOT) for file, text in made.items() if file.read_text() != text]
    assert not stale, "run make chart"
    assert set((K8S / "base").iterdir()) <= set(made), "run make chart"


@pytest.mark.fast
def test_every_value_has_a_comment() -> None:
    told = {row.path for row in rows(VALUES_TEXT)}

    def untold(tree: Any, path: tuple[str, ...]) -> Iterator[str]:
        if any(path[:length] in told for length in range(1, len(path) + 1)):
            return
        if not isinstance(tree, dict) or not tree:
            yield ".".join(path)
            return
        for key, value in tree.items():
            yield from untold(value, (*path, key))

    assert list(untold(VALUES, ())) == []


@pytest.mark.fast
def test_config_is_the_settings_key_for_key() -> None:
    relay = Settings().model_dump(mode="json")
    differences = {
        ".".join(path)
        for path in LEAVES
        if reduce(lambda tree, key: tree[key], path, VALUES["config"])
        != reduce(lambda tree, key: tree[key], path, relay)
        and path != ("backplane", "url")  # masked, in what is dumped
    }
    assert differences == {
        "logging.format",
        "shutdown.readiness_delay_s",
        "shutdown.spread_s",
        "shutdown.timeout_s",
    }
    assert VALUES["config"]["backplane"]["url"] == "memory://"


@pytest.mark.fast
def test_the_schema_knows_every_value() -> None:
    def unknown(tree: Any, node: Any, path: str) -> Iterator[str]:
        if "$ref" in node or "allOf" in node or not isinstance(tree, dict):
            return
        if "properties" not in node:
            return
        assert node["additionalProperties"] is False
        for key, value in tree.items():
            if key not in node["properties"]:
                yield f"{path}{key}"
            else:
                yield from unknown(value, node["properties"][key], f"{path}{key}.")

    assert list(unknown(VALUES, SCHEMA, "")) == []


@pytest.mark.fast
def test_the_chart_and_the_relay_have_one_version() -> None:
    version = PROJECT["project"]["version"]
    assert (CHART_YAML["version"], CHART_YAML["appVersion"]) == (version, version)


def test_a_package_holds_what_is_needed_and_nothing_else(tmp_path: Path) -> None:
    newest_helm().run("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.iterdir()
    names = {
        name.removeprefix(f"{CHART.name}/")
        for name in run(["tar", "--list", "--file", str(package)]).splitlines()
    }
    assert {"values.schema.json", "README.md", "files/round_trip.py"} <= names
    assert not [name for name in names if name.startswith("ci/")]


# What it refuses


@each_helm
@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("replicas", 3, "replicas"),
        ("config.srver.port", 8443, "srver"),
        ("config.server.prt", 8443, "prt"),
        ("config.server.port", "https", "port"),
        ("config.server.port", 70000, "port"),
        ("config.limits.max_message_bytes", 0, "max_message_bytes"),
        ("config.keepalive.ping_interval_s", 0, "ping_interval_s"),
        ("config.auth.mode", "basic", "mode"),
        ("config.metrics.enabled", None, "enabled"),
        ("config.auth.jwt.algorithms", ["none"], "algorithms"),
        ("config.backplane.stream", "a stream", "stream"),
        ("config.server.base_path", "/relay/", "base_path"),
        ("image.digest", "sha256:short", "digest"),
        ("secrets.jwtSecret.value", "s3cret", "value"),
        ("service.type", "ExternalName", "type"),
        ("serviceMonitor.interval", "often", "interval"),
        ("httpRoute.timeouts.request", "1 hour", "request"),
        ("podDisruptionBudget.maxUnavailable", "one", "maxUnavailable"),
        ("config.server.allowed_origins", ["example.com"], "allowed_origins"),
        ("config.server.trusted_proxies", ["ingress-nginx"], "trusted_proxies"),
        ("extraEnv", [{"name": "WORKERS", "value": 2}], "value"),
        ("strategy.type", "Rolling", "type"),
        ("fullnameOverride", "2024", "fullnameOverride"),
    ],
)
def test_a_misspelt_key_or_a_value_that_none_may_have_is_refused_by_name(
    name: str, path: str, value: object, words: str
) -> None:
    with pytest.raises(HelmError, match=words):
        helm(name).template(values=nested(path, value))


@each_helm
@pytest.mark.parametrize(
    "path",
    [
        "config",
        "tls",
        "image.repository",
        "replicaCount",
        "service.port",
        "secrets.jwtSecret.key",
        "probes.startup",
        "strategy.type",
    ],
)
def test_a_null_takes_nothing_out_that_is_needed(name: str, path: str) -> None:
    with pytest.raises(HelmError, match=rf"{path.rpartition('.')[2]}\b.*") as refused:
        helm(name).template(values=nested(path, None))
    assert re.search("missing property|is required", str(refused.value))


@each_helm
@pytest.mark.parametrize(
    "path",
    ["resources", "securityContext", "ingress.annotations", "httpRoute.timeouts", "extraEnv"],
)
def test_a_null_takes_out_what_can_be_missing(name: str, path: str) -> None:
    assert one(helm(name).objects(values=nested(path, None)), "Deployment")


MISFITS: list[tuple[Mapping[str, Any], list[str]]] = [
    (nested("nameOverride", "Chat.Relay"), ["nameOverride", "fullnameOverride"]),
    (
        {"podLabels": {"app.kubernetes.io/name": "chat"}},
        ["podLabels", "app.kubernetes.io/name", "nameOverride"],
    ),
    *(
        (nested("config.backplane.url", url), ["config.backplane.url", "redis://"])
        for url in ("http://redis:6379", "redis:6379", "Memory://")
    ),
    *(
        (
            {
                "config": {
                    "auth": {"mode": "jwt", "jwt": {"jwks_url": url, "algorithms": ["RS256"]}}
                }
            },
            ["config.auth.jwt.jwks_url", "https://"],
        )
        for url in ("https://relay:pa55word@issuer.example.com/jwks.json", "issuer.example.com")
    ),
    (nested("config.auth.jwt.algorithms", []), ["config.auth.jwt.algorithms", "RS256"]),
    (
        nested("service.externalTrafficPolicy", "Local"),
        ["service.externalTrafficPolicy", "service.type"],
    ),
    (
        nested("service.loadBalancerSourceRanges", ["10.0.0.0/8"]),
        ["service.loadBalancerSourceRanges", "service.type"],
    ),
    ({"replicaCount": 2}, ["replicaCount", "config.backplane.url", "secrets.backplaneUrl.name"]),
    (
        {"autoscaling": {"enabled": True}},
        ["autoscaling.maxReplicas", "config.backplane.url", "secrets.backplaneUrl.name"],
    ),
    (
        all_of(REDIS, {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 4}}),
        ["autoscaling.minReplicas", "autoscaling.maxReplicas"],
    ),
    (
        all_of(
            REDIS,
            nested("autoscaling.enabled", True),
            nested("autoscaling.targetCPUUtilizationPercentage", 0),
            nested("autoscaling.targetConnectedClients", 0),
        ),
        ["autoscaling.targetCPUUtilizationPercentage", "autoscaling.targetConnectedClients"],
    ),
    (
        all_of(REDIS, nested("autoscaling.enabled", True), nested("resources.requests.cpu", None)),
        ["autoscaling.targetCPUUtilizationPercentage", "resources.requests.cpu"],
    ),
    (
        all_of(REDIS, nested("autoscaling.enabled", True), nested("config.metrics.enabled", False)),
        ["autoscaling.targetConnectedClients", "config.metrics.enabled"],
    ),
    (
        {"terminationGracePeriodSeconds": 20},
        ["terminationGracePeriodSeconds", "config.shutdown.timeout_s"],
    ),
    (
        nested("config.shutdown.spread_s", 15),
        ["config.shutdown.timeout_s", "config.shutdown.spread_s", "25 or more"],
    ),
    (
        nested("config.shutdown.readiness_delay_s", 15),
        ["config.shutdown.timeout_s", "config.shutdown.readiness_delay_s", "28 or more"],
    ),
    *(
        (nested("config.backplane.url", url), ["config.backplane.url", "secrets.backplaneUrl.name"])
        for url in (
            "redis://:pa55word@redis:6379/0",
            "nats://user:pa55word@one:4222,two:4222",
            "tls://t0ken@nats:4222",
            "redis://redis:6379/0?password=pa55word",
        )
    ),
    (
        all_of(REDIS, nested("secrets.backplaneUrl.name", "relay-broker")),
        ["config.backplane.url", "secrets.backplaneUrl.name"],
    ),
    (
        nested("config.auth.jwt.secret", "pa55word"),
        ["config.auth.jwt.secret", "secrets.jwtSecret.name"],
    ),
    (
        nested("config.server.tls.enabled", True),
        ["config.server.tls.enabled", "tls.secretName", "config.server.tls.cert_file"],
    ),
    (nested("tls.secretName", "relay-tls"), ["tls.secretName", "config.server.tls.enabled"]),
    (nested("tls.caSecretName", "ca"), ["tls.caSecretName", "config.backplane.url"]),
    (
        all_of(nested("config.backplane.url", "rediss://redis"), nested("tls.caSecretName", "ca")),
        ["tls.caSecretName", "config.backplane.url", "ssl_ca_certs"],
    ),
    (nested("secrets.jwtSecret.name", "s"), ["secrets.jwtSecret.name", "config.auth.mode"]),
    (nested("secrets.jwtPublicKey.name", "k"), ["secrets.jwtPublicKey.name", "config.auth.mode"]),
    (nested("config.auth.mode", "jwt"), ["config.auth.jwt.algorithms", "secrets.jwtSecret.name"]),
    (
        all_of(JWT, nested("config.auth.jwt.algorithms", ["HS256", "ES256"])),
        ["config.auth.jwt.algorithms has ES256", "secrets.jwtPublicKey.name", "jwks_url"],
    ),
    (
        all_of(JWT, nested("secrets.jwtPublicKey.name", "k")),
        ["secrets.jwtPublicKey.name", "config.auth.jwt.algorithms has HS256"],
    ),
    (
        all_of(
            nested("config.auth.mode", "jwt"),
            nested("config.auth.jwt.algorithms", ["RS256"]),
            nested("config.auth.jwt.jwks_url", "https://issuer.example.com/jwks.json"),
            nested("secrets.jwtPublicKey.name", "k"),
        ),
        ["secrets.jwtPublicKey.name", "config.auth.jwt.jwks_url"],
    ),
    (nested("ingress.enabled", True), ["ingress.enabled", "ingress.hosts"]),
    (
        all_of(
            {"ingress": {"enabled": True, "hosts": ["relay.example.com"]}},
            nested("config.keepalive.ping_interval_s", 3600),
        ),
        ["proxy-read-timeout", "config.keepalive.ping_interval_s"],
    ),
    (
        {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}},
        ["httpRoute.enabled", "httpRoute.hostnames"],
    ),
    (
        {"httpRoute": {"enabled": True, "hostnames": ["relay.example.com"]}},
        ["httpRoute.enabled", "httpRoute.parentRefs"],
    ),
    (
        all_of(nested("serviceMonitor.enabled", True), nested("config.metrics.enabled", False)),
        ["serviceMonitor.enabled", "config.metrics.enabled"],
    ),
    (
        all_of(nested("prometheusRule.enabled", True), nested("config.metrics.enabled", False)),
        ["prometheusRule.enabled", "config.metrics.enabled"],
    ),
    (nested("config.server.host", "127.0.0.1"), ["config.server.host", "service.port"]),
    (nested("config.metrics.host", "localhost"), ["config.metrics.host", "probes"]),
    (nested("config.server.port", 0), ["config.server.port", "service.port"]),
    (nested("config.metrics.port", 0), ["config.metrics.port", "service.metricsPort"]),
    (nested("config.metrics.port", 8443), ["config.metrics.port", "config.server.port"]),
    (nested("service.metricsPort", 8443), ["service.port", "service.metricsPort"]),
    (
        nested("podDisruptionBudget.minAvailable", 1),
        ["podDisruptionBudget.maxUnavailable", "podDisruptionBudget.minAvailable"],
    ),
    (
        nested("podDisruptionBudget.maxUnavailable", None),
        ["podDisruptionBudget.maxUnavailable", "podDisruptionBudget.minAvailable"],
    ),
    (
        {
            "networkPolicy": {"enabled": True},
            "secrets": {"backplaneUrl": {"name": "relay-broker"}},
        },
        ["networkPolicy.broker.ports", "secrets.backplaneUrl.name"],
    ),
    (
        {"extraEnv": [{"name": "RELAY__SHUTDOWN__TIMEOUT_S", "value": "60"}]},
        ["extraEnv", "config.shutdown.timeout_s"],
    ),
    (
        {"extraEnv": [{"name": "RELAY__BACKPLANE__URL", "value": "redis://:pa55word@redis"}]},
        ["extraEnv", "secrets.backplaneUrl"],
    ),
    (
        {"extraEnv": [{"name": "RELAY__AUTH__JWT__SECRET", "value": "pa55word"}]},
        ["extraEnv", "secrets.jwtSecret"],
    ),
]


@pytest.mark.parametrize(
    ("values", "words"), MISFITS, ids=lambda each: each[0] if isinstance(each, list) else ""
)
def test_values_that_do_not_fit_together_are_refused_with_both_keys_and_what_to_do(
    values: Mapping[str, Any], words: Sequence[str]
) -> None:
    with pytest.raises(HelmError) as refused:
        newest_helm().template(values=values)
    (line,) = re.findall(r"^- (.*)$", str(refused.value), re.MULTILINE)
    assert all(word in line for word in words), line
    assert re.search(r"\b(set|leave|put|add)\b", line), line
    assert "pa55word" not in str(refused.value)
    assert "t0ken" not in str(refused.value)


@each_helm
def test_all_that_is_wrong_is_told_at_once(name: str) -> None:
    values = {"replicaCount": 2, "terminationGracePeriodSeconds": 1, "ingress": {"enabled": True}}
    with pytest.raises(HelmError) as refused:
        helm(name).template(values=values)
    assert len(re.findall(r"^- ", str(refused.value), re.MULTILINE)) == 3


@each_helm
def test_it_can_be_a_part_of_another_chart(name: str, tmp_path: Path) -> None:
    whole = {"apiVersion": "v2", "name": "bank", "version": "1.0.0"}
    part = {
        "name": CHART.name,
        "version": CHART_YAML["version"],
        "condition": f"{CHART.name}.enabled",
    }
    (tmp_path / "Chart.yaml").write_text(yaml.safe_dump(whole | {"dependencies": [part]}))
    shutil.copytree(CHART, tmp_path / "charts" / CHART.name)
    budget = {"maxUnavailable": "", "minAvailable": "60%"}
    values = {CHART.name: {"enabled": True, "podDisruptionBudget": budget}}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    objects = parsed(helm(name).run("template", "bank", str(tmp_path)))
    made = one(objects, "PodDisruptionBudget", f"bank-{CHART.name}")["spec"]
    assert (made["minAvailable"], made.get("maxUnavailable")) == ("60%", None)
    off = ["--set", f"{CHART.name}.enabled=false"]
    assert not parsed(helm(name).run("template", "bank", str(tmp_path), *off))


# What the chart's README says

README = (CHART / "README.md").read_text()


def test_the_readme_s_examples_are_values_that_the_chart_takes() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    examples = [block for block in map(yaml.safe_load, blocks) if set(block) <= set(VALUES)]
    assert len(examples) == len(blocks) - 1, "all but the rule of prometheus-adapter"
    for example in examples:
        needs_broker = "autoscaling" in example
        newest_helm().template(values=all_of(REDIS if needs_broker else {}, example))


def test_the_readme_s_figures_of_an_update_are_those_of_the_defaults() -> None:
    spec = one(newest_helm().objects(), "Deployment")["spec"]
    stop = VALUES["config"]["shutdown"]
    for name, figure in {
        "config.shutdown.readiness_delay_s": stop["readiness_delay_s"],
        "spread_s": stop["spread_s"],
        "timeout_s": stop["timeout_s"],
        "terminationGracePeriodSeconds": spec["template"]["spec"]["terminationGracePeriodSeconds"],
        "minReadySeconds": spec["minReadySeconds"],
    }.items():
        assert re.search(rf"`{name}` \({figure}\b", README), name


@pytest.mark.fast
def test_the_readme_s_links_lead_on() -> None:
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", README)
    assert links
    for target, anchor in links:
        page = (CHART / target).resolve() if target else CHART / "README.md"
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page.read_text())
