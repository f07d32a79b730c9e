"""The chart, rendered by Helm: valid objects, up-to-date generated files, and rejected values."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from websocket_relay.cli.main import main
from websocket_relay.config.loader import LEAVES
from websocket_relay.config.model import Settings

from helm.generate import files, rows
from tests.support import refused_settings
from tests.support.helm import (
    CHART,
    CHART_YAML,
    CI_VALUES,
    HELMS,
    KUBERNETES,
    HelmError,
    find_helm,
    find_object,
    find_problems,
    merge_values,
    nested_values,
    newest_helm,
    parse_objects,
    run_tool,
    validate_object,
)
from tests.support.markdown import anchors
from tests.support.project import PROJECT
from tests.support.relay_process import ROOT

VALUES_TEXT = (CHART / "values.yaml").read_text()
VALUES = yaml.safe_load(VALUES_TEXT)
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
K8S = ROOT / "k8s"

REDIS_3 = {"replicaCount": 3, "config": {"backplane": {"url": "redis://redis:6379/0"}}}
REDIS = {"config": {"backplane": {"url": "redis://redis:6379/0"}}}
JWT = {"config": {"auth": {"mode": "jwt"}}, "secrets": {"jwtSecret": {"name": "relay-jwt"}}}

each_helm = pytest.mark.parametrize("name", HELMS)
each_ci_values = pytest.mark.parametrize("values", CI_VALUES, ids=lambda file: file.stem)


# Objects


@each_ci_values
def test_helm_lint_accepts_the_chart(values: Path) -> None:
    output = newest_helm().run("lint", "--strict", str(CHART), "--values", str(values))
    assert "0 chart(s) failed" in output


def sorted_documents(text: str) -> tuple[str, ...]:
    """Return the documents of a stream of YAML, whose order depends on the version of Helm."""
    documents = (each.strip() for each in re.split(r"^---$", text, flags=re.MULTILINE))
    return tuple(sorted(filter(None, documents)))


@each_ci_values
def test_every_helm_renders_the_same_objects_valid_in_the_oldest_and_the_newest_kubernetes(
    values: Path,
) -> None:
    rendered = [find_helm(name).template("--values", str(values)) for name in HELMS]
    assert len({sorted_documents(text) for text in rendered}) == 1
    for document in parse_objects(rendered[0]):
        for version in KUBERNETES:
            validate_object(document, version)


def test_the_chart_is_for_the_versions_of_kubernetes_that_are_tested() -> None:
    oldest, newest = KUBERNETES
    newest_helm().template("--kube-version", f"{oldest}.0")
    newest_helm().template("--kube-version", f"{newest}.3-eks-1")
    with pytest.raises(HelmError, match="incompatible with Kubernetes"):
        newest_helm().template("--kube-version", "1.26.9")


def test_the_validation_detects_an_unknown_field() -> None:
    objects = newest_helm().objects("--values", str(CHART / "ci/full-values.yaml"))
    changes: list[tuple[str, Callable[[Any], None]]] = [
        ("ServiceMonitor", lambda spec: spec["endpoints"][0].update(intervall="15s")),
        ("ServiceMonitor", lambda spec: spec.update(jobLabels="job")),
        ("HTTPRoute", lambda spec: spec["rules"][0].update(timeout={"request": "0s"})),
        ("HTTPRoute", lambda spec: spec["rules"][0]["timeouts"].update(request="1 hour")),
        ("Deployment", lambda spec: spec.update(minReadySecond=1)),
        ("Ingress", lambda spec: spec.update(ingressClass="nginx")),
    ]
    for kind, change in changes:
        document = deepcopy(find_object(objects, kind, "relay"))
        change(document["spec"])
        with pytest.raises(jsonschema.ValidationError):
            validate_object(document, KUBERNETES[-1])


def test_names_are_valid_in_kubernetes_though_the_name_of_the_release_is_long() -> None:
    long = {"fullnameOverride": "a-name-that-is-" + "very-" * 12 + "long"}
    values = merge_values(long, {"service": {"type": "LoadBalancer"}})
    for document in newest_helm().objects(values=values):
        assert len(document["metadata"]["name"]) <= 63
        assert not document["metadata"]["name"].endswith("-")


# Generated files


def test_generated_files_are_up_to_date() -> None:
    generated = files(newest_helm().manifests)
    stale = [file.relative_to(ROOT) for file, text in generated.items() if file.read_text() != text]
    assert not stale, "run make chart"
    assert set((K8S / "base").iterdir()) <= set(generated), "run make chart"


@pytest.mark.fast
def test_every_value_has_a_comment() -> None:
    commented = {row.path for row in rows(VALUES_TEXT)}

    def without_comment(tree: Any, path: tuple[str, ...]) -> Iterator[str]:
        if any(path[:length] in commented for length in range(1, len(path) + 1)):
            return
        if not isinstance(tree, dict) or not tree:
            yield ".".join(path)
            return
        for key, value in tree.items():
            yield from without_comment(value, (*path, key))

    assert list(without_comment(VALUES, ())) == []


@pytest.mark.fast
def test_config_has_the_defaults_of_the_settings_except_for_logs_and_the_stop() -> None:
    settings = Settings().model_dump(mode="json")
    differences = {
        ".".join(path)
        for path in LEAVES
        if reduce(lambda tree, key: tree[key], path, VALUES["config"])
        != reduce(lambda tree, key: tree[key], path, settings)
        and path != ("backplane", "url")  # masked in the dump
    }
    assert differences == {
        "logging.format",
        "shutdown.readiness_delay_s",
        "shutdown.spread_s",
        "shutdown.timeout_s",
    }
    assert VALUES["config"]["backplane"]["url"] == "memory://"


@pytest.mark.fast
def test_the_schema_has_every_value_and_allows_no_other() -> None:
    def missing(tree: Any, node: Any, path: str) -> Iterator[str]:
        if "$ref" in node or "allOf" in node or not isinstance(tree, dict):
            return
        if "properties" not in node:
            return
        assert node["additionalProperties"] is False
        for key, value in tree.items():
            if key not in node["properties"]:
                yield f"{path}{key}"
            else:
                yield from missing(value, node["properties"][key], f"{path}{key}.")

    assert list(missing(VALUES, SCHEMA, "")) == []


@pytest.mark.fast
def test_the_version_of_the_chart_is_that_of_the_relay() -> None:
    version = PROJECT["project"]["version"]
    assert (CHART_YAML["version"], CHART_YAML["appVersion"]) == (version, version)


@pytest.mark.fast
def test_the_chart_has_what_collections_of_charts_show() -> None:
    assert {"home", "icon", "sources", "maintainers", "keywords", "description"} <= {*CHART_YAML}
    assert CHART_YAML["annotations"]["artifacthub.io/license"] == PROJECT["project"]["license"]
    assert yaml.safe_load(CHART_YAML["annotations"]["artifacthub.io/links"])
    path = CHART_YAML["icon"].partition("/main/")[2]
    assert (ROOT / path).is_file()


def test_a_package_of_the_chart_has_its_schema_readme_and_files_and_no_ci_values(
    tmp_path: Path,
) -> None:
    newest_helm().run("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.iterdir()
    names = {
        name.removeprefix(f"{CHART.name}/")
        for name in run_tool(["tar", "--list", "--file", str(package)]).splitlines()
    }
    assert {"values.schema.json", "README.md", "files/round_trip.py"} <= names
    assert not [name for name in names if name.startswith("ci/")]


# Values that the schema rejects


def schema_errors(values: Mapping[str, Any]) -> str:
    """Return what the schema rejects of the defaults with other values."""
    errors = jsonschema.Draft7Validator(SCHEMA).iter_errors(values)
    return "\n".join(f"{error.json_path}: {error.message}" for error in errors)


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
        ("config.backplane.stream", "a stream ", "stream"),
        ("config.server.base_path", "/relay/", "base_path"),
        ("image.digest", "sha256:short", "digest"),
        ("secrets.jwtSecret.value", "s3cret", "value"),
        ("service.type", "ExternalName", "type"),
        ("serviceMonitor.interval", "often", "interval"),
        ("httpRoute.timeouts.request", "1 hour", "request"),
        ("podDisruptionBudget.maxUnavailable", "one", "maxUnavailable"),
        ("config.shutdown.timeout_s", "0.5", "timeout_s"),
        ("config.keepalive.ping_interval_s", "0.0", "ping_interval_s"),
        ("config.history.max_age_s", "99999.5", "max_age_s"),
        ("config.server.allowed_origins", ["example.com"], "allowed_origins"),
        ("config.server.trusted_proxies", ["ingress-nginx"], "trusted_proxies"),
        ("extraEnv", [{"name": "WORKERS", "value": 2}], "value"),
        ("strategy.type", "Rolling", "type"),
        ("fullnameOverride", "2024", "fullnameOverride"),
    ],
)
@pytest.mark.fast
def test_the_schema_rejects_an_unknown_key_and_an_invalid_value_by_name(
    path: str, value: object, words: str
) -> None:
    assert words in schema_errors(merge_values(VALUES, nested_values(path, value)))


REQUIRED = (
    "config",
    "tls",
    "image.repository",
    "replicaCount",
    "service.port",
    "secrets.jwtSecret.key",
    "probes.startup",
    "strategy.type",
)


@pytest.mark.fast
def test_the_schema_requires_the_values_that_the_templates_use() -> None:
    for path in REQUIRED:
        values = deepcopy(VALUES)
        *sections, key = path.split(".")
        del reduce(lambda tree, name: tree[name], sections, values)[key]
        assert f"'{key}' is a required property" in schema_errors(values), path


@each_helm
@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("config.server.prt", 8443, "prt"),
        ("config.limits.max_message_bytes", 0, "max_message_bytes"),
        ("config.auth.jwt.algorithms", ["none"], "algorithms"),
        ("image.repository", None, r"repository\b.*"),
    ],
    ids=["unknown", "too small", "no choice", "null"],
)
def test_helm_rejects_values_by_the_schema_and_names_them(
    name: str, path: str, value: object, words: str
) -> None:
    with pytest.raises(HelmError, match=words) as refused:
        find_helm(name).template(values=nested_values(path, value))
    if value is None:  # removes the default
        assert re.search("missing property|is required", str(refused.value))


@each_helm
def test_a_null_removes_a_value_that_is_optional(name: str) -> None:
    paths = (
        "resources",
        "securityContext",
        "ingress.annotations",
        "commonLabels",
        "httpRoute.timeouts",
        "extraEnv",
    )
    values = merge_values(*(nested_values(path, None) for path in paths))
    assert find_object(find_helm(name).objects(values=values), "Deployment")


# Values that contradict each other

Misfit = tuple[Mapping[str, Any], list[str]]

MISFITS: list[list[Misfit]] = [
    [
        (nested_values("nameOverride", "Chat.Relay"), ["nameOverride", "fullnameOverride"]),
        (
            {"podLabels": {"app.kubernetes.io/name": "chat"}},
            ["podLabels", "app.kubernetes.io/name", "nameOverride"],
        ),
        (
            nested_values("config.backplane.url", "http://redis:6379"),
            ["config.backplane.url", "redis://"],
        ),
        (
            nested_values("commonLabels", {"app.kubernetes.io/instance": "chat"}),
            ["commonLabels", "app.kubernetes.io/instance"],
        ),
        (
            nested_values("resources.limits.memory", "200Mi"),
            ["resources.limits.memory", "config.limits.total_backlog_bytes"],
        ),
        (
            nested_values("service.ipFamilyPolicy", "RequireDualStack"),
            ["service.ipFamilyPolicy", "config.server.host"],
        ),
        (
            {
                "config": {
                    "auth": {
                        "mode": "jwt",
                        "jwt": {
                            "jwks_url": "https://relay:pa55word@issuer.example.com/jwks.json",
                            "algorithms": ["RS256"],
                        },
                    }
                }
            },
            ["config.auth.jwt.jwks_url", "https://"],
        ),
        (
            nested_values("service.externalTrafficPolicy", "Local"),
            ["service.externalTrafficPolicy", "service.type"],
        ),
        (
            nested_values("service.loadBalancerSourceRanges", ["10.0.0.0/8"]),
            ["service.loadBalancerSourceRanges", "service.type"],
        ),
        (
            {"terminationGracePeriodSeconds": 20},
            ["terminationGracePeriodSeconds", "config.shutdown.timeout_s"],
        ),
        (
            nested_values("config.shutdown.spread_s", 15),
            ["config.shutdown.timeout_s", "config.shutdown.spread_s", "25 or more"],
        ),
        (
            nested_values("config.hooks.url", "https://relay:pa55word@app.example.com"),
            ["config.hooks.url", "https://"],
        ),
        (
            nested_values("config.auth.jwt.secret", "pa55word"),
            ["config.auth.jwt.secret", "secrets.jwtSecret.name"],
        ),
        (
            nested_values("config.hooks.secret", "pa55word"),
            ["config.hooks.secret", "secrets.hooksSecret.name"],
        ),
        (
            nested_values("config.auth.jwt.secrets", ["pa55word"]),
            ["config.auth.jwt.secrets", "secrets.jwtSecrets.name"],
        ),
        (
            nested_values("config.api.key", "pa55word"),
            ["config.api.key", "secrets.apiKey.name"],
        ),
        (
            nested_values("config.server.tls.enabled", True),
            ["config.server.tls.enabled", "tls.secretName", "config.server.tls.cert_file"],
        ),
        (nested_values("ingress.enabled", True), ["ingress.enabled", "ingress.hosts"]),
        (
            {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}},
            ["httpRoute.enabled", "httpRoute.hostnames"],
        ),
        (
            merge_values(
                nested_values("serviceMonitor.enabled", True),
                nested_values("config.metrics.enabled", False),
            ),
            ["serviceMonitor.enabled", "config.metrics.enabled"],
        ),
        (
            merge_values(
                nested_values("prometheusRule.enabled", True),
                nested_values("config.metrics.enabled", False),
            ),
            ["prometheusRule.enabled", "config.metrics.enabled"],
        ),
        (nested_values("config.server.host", "127.0.0.1"), ["config.server.host", "service.port"]),
        (nested_values("config.metrics.host", "localhost"), ["config.metrics.host", "probes"]),
        (nested_values("config.server.port", 0), ["config.server.port", "service.port"]),
        (
            nested_values("config.server.socket", "/run/relay.sock"),
            ["config.server.socket", "Service", "config.server.port"],
        ),
        (
            nested_values("config.server.trusted_proxies", ["1.2.3", "10.0.0.7"]),
            ['config.server.trusted_proxies has "1.2.3"', "10.0.0.0/8"],
        ),
        (
            nested_values("config.server.allowed_origins", ["wss://a.example", "null"]),
            ['config.server.allowed_origins has "wss://a.example"', "https://example.com"],
        ),
        (
            nested_values("podDisruptionBudget.minAvailable", 1),
            ["podDisruptionBudget.maxUnavailable", "podDisruptionBudget.minAvailable"],
        ),
        (
            {"extraEnv": [{"name": "RELAY__SHUTDOWN__TIMEOUT_S", "value": "60"}]},
            ["extraEnv", "config.shutdown.timeout_s"],
        ),
    ],
    [
        (nested_values("config.backplane.url", "redis:6379"), ["config.backplane.url", "redis://"]),
        (
            {
                "config": {
                    "auth": {
                        "mode": "jwt",
                        "jwt": {"jwks_url": "issuer.example.com", "algorithms": ["RS256"]},
                    }
                }
            },
            ["config.auth.jwt.jwks_url", "https://"],
        ),
        (
            nested_values("config.shutdown.readiness_delay_s", 15),
            ["config.shutdown.timeout_s", "config.shutdown.readiness_delay_s", "28 or more"],
        ),
        (
            nested_values("tls.secretName", "relay-tls"),
            ["tls.secretName", "config.server.tls.enabled"],
        ),
        (
            nested_values(
                "serviceMonitor", {"enabled": True, "interval": "1m", "scrapeTimeout": "90s"}
            ),
            ["serviceMonitor.scrapeTimeout", "serviceMonitor.interval"],
        ),
        (
            nested_values("resources.limits.memory", 200_000_000),
            ["resources.limits.memory", "config.limits.total_backlog_bytes"],
        ),
        (
            {"httpRoute": {"enabled": True, "hostnames": ["relay.example.com"]}},
            ["httpRoute.enabled", "httpRoute.parentRefs"],
        ),
        (
            nested_values("config.server.proxy_protocol", True),
            ["config.server.proxy_protocol", "config.server.trusted_proxies"],
        ),
        (nested_values("config.metrics.port", 0), ["config.metrics.port", "service.metricsPort"]),
        (nested_values("service.metricsPort", 8443), ["service.port", "service.metricsPort"]),
        (
            nested_values("podDisruptionBudget.maxUnavailable", None),
            ["podDisruptionBudget.maxUnavailable", "podDisruptionBudget.minAvailable"],
        ),
        (
            {"extraEnv": [{"name": "RELAY__BACKPLANE__URL", "value": "redis://:pa55word@redis"}]},
            ["extraEnv", "secrets.backplaneUrl"],
        ),
    ],
    [
        (nested_values("config.backplane.url", "Memory://"), ["config.backplane.url", "redis://"]),
        (nested_values("config.auth.jwt.algorithms", []), ["config.auth.jwt.algorithms", "RS256"]),
        (
            nested_values("secrets.jwtSecret.name", "s"),
            ["secrets.jwtSecret.name", "config.auth.mode"],
        ),
        (nested_values("config.metrics.port", 8443), ["config.metrics.port", "config.server.port"]),
        (
            {"extraEnv": [{"name": "RELAY__AUTH__JWT__SECRET", "value": "pa55word"}]},
            ["extraEnv", "secrets.jwtSecret"],
        ),
        (
            nested_values("podDisruptionBudget.maxUnavailable", "0%"),
            ["podDisruptionBudget.maxUnavailable is 0%", "set it to 1"],
        ),
    ],
    [
        (
            {"replicaCount": 2},
            ["replicaCount", "config.backplane.url", "secrets.backplaneUrl.name"],
        ),
        (nested_values("tls.caSecretName", "ca"), ["tls.caSecretName", "config.backplane.url"]),
        (
            nested_values("config.backplane.domain", "hub"),
            ["config.backplane.domain", "config.backplane.url is memory://"],
        ),
        (
            nested_values("secrets.backplanePassword.name", "relay-redis"),
            ["secrets.backplanePassword.name", "config.backplane.url"],
        ),
        (
            nested_values("secrets.jwtPublicKey.name", "k"),
            ["secrets.jwtPublicKey.name", "config.auth.mode"],
        ),
    ],
    [
        (
            {"autoscaling": {"enabled": True}},
            ["autoscaling.maxReplicas", "config.backplane.url", "secrets.backplaneUrl.name"],
        ),
        (
            nested_values("config.auth.mode", "jwt"),
            ["config.auth.jwt.algorithms", "secrets.jwtSecret.name"],
        ),
        (
            {"podDisruptionBudget": {"maxUnavailable": "", "minAvailable": "70%"}},
            ["podDisruptionBudget.minAvailable is 70%", "podDisruptionBudget.maxUnavailable to 1"],
        ),
    ],
    [
        (
            merge_values(
                REDIS, {"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 4}}
            ),
            ["autoscaling.minReplicas", "autoscaling.maxReplicas"],
        ),
        (
            merge_values(
                REDIS,
                nested_values("autoscaling.enabled", True),
                nested_values("autoscaling.targetCPUUtilizationPercentage", 0),
                nested_values("autoscaling.targetConnectedClients", 0),
            ),
            ["autoscaling.targetConnectedClients", "autoscaling.metrics"],
        ),
        (
            merge_values(REDIS, nested_values("secrets.backplaneUrl.name", "relay-broker")),
            ["config.backplane.url", "secrets.backplaneUrl.name"],
        ),
        (
            merge_values(JWT, nested_values("config.auth.jwt.algorithms", ["HS256", "ES256"])),
            ["config.auth.jwt.algorithms has ES256", "secrets.jwtPublicKey.name", "jwks_url"],
        ),
        (
            {
                "networkPolicy": {"enabled": True},
                "secrets": {"backplaneUrl": {"name": "relay-broker"}},
            },
            ["networkPolicy.broker.ports", "secrets.backplaneUrl.name"],
        ),
    ],
    [
        (
            merge_values(
                REDIS,
                nested_values("autoscaling.enabled", True),
                nested_values("resources.requests.cpu", None),
            ),
            ["autoscaling.targetCPUUtilizationPercentage", "resources.requests.cpu"],
        ),
        (
            merge_values(
                REDIS,
                nested_values("autoscaling.enabled", True),
                nested_values("config.metrics.enabled", False),
            ),
            ["autoscaling.targetConnectedClients", "config.metrics.enabled"],
        ),
        (
            merge_values(JWT, nested_values("secrets.jwtPublicKey.name", "k")),
            ["secrets.jwtPublicKey.name", "config.auth.jwt.algorithms has HS256"],
        ),
        (
            merge_values(REDIS, nested_values("tls.clientSecretName", "relay-redis-client")),
            ["tls.clientSecretName", "needs TLS", "config.backplane.url", "rediss://"],
        ),
        (
            merge_values(REDIS, nested_values("config.backplane.username", "relay")),
            ["config.backplane.username is relay", "secrets.backplanePassword.name"],
        ),
        (
            merge_values(REDIS, nested_values("config.backplane.inbox_prefix", "_INBOX_relay")),
            ["config.backplane.inbox_prefix", "only NATS", "config.backplane.url"],
        ),
    ],
    [
        (
            nested_values("config.backplane.url", "redis://:pa55word@redis:6379/0"),
            ["config.backplane.url", "secrets.backplaneUrl.name"],
        ),
        (
            merge_values(
                nested_values("config.auth.mode", "jwt"),
                nested_values("config.auth.jwt.algorithms", ["RS256"]),
                nested_values("config.auth.jwt.jwks_url", "https://issuer.example.com/jwks.json"),
                nested_values("secrets.jwtPublicKey.name", "k"),
            ),
            ["secrets.jwtPublicKey.name", "config.auth.jwt.jwks_url"],
        ),
    ],
    [
        (
            nested_values("config.backplane.url", "tls://t0ken@nats:4222"),
            ["config.backplane.url", "secrets.backplaneUrl.name"],
        ),
    ],
    [
        (
            nested_values("config.backplane.url", "redis://redis:6379/0?password=pa55word"),
            ["config.backplane.url", "secrets.backplaneUrl.name"],
        ),
        (
            nested_values("secrets.jwtSecrets.name", "s"),
            ["secrets.jwtSecrets.name", "config.auth.mode"],
        ),
    ],
    [
        (
            {
                "config": {"backplane": {"url": "nats://nats:4222"}},
                "secrets": {"backplanePassword": {"name": "p"}, "backplaneCreds": {"name": "c"}},
            },
            ["secrets.backplaneCreds.name and secrets.backplanePassword.name", "one of them"],
        ),
        (
            nested_values("config.backplane.stream", "team1.relay"),
            ["config.backplane.stream is team1.relay", "NATS"],
        ),
        (
            nested_values("tls.caSecretName", "relay-nats-ca"),
            ["tls.caSecretName", "needs TLS", "config.backplane.url", "tls://"],
        ),
    ],
    [
        (
            nested_values("config.auth.mode", "hook"),
            ["config.auth.mode is hook", "config.auth.hook.url"],
        ),
        (
            nested_values("config.hooks.url", "app.example.com"),
            ["config.hooks.url", "https://"],
        ),
    ],
    [
        (
            {
                "config": {"backplane": {"url": "rediss://redis?username=u&ssl_ca_certs=ca"}},
                "secrets": {"backplanePassword": {"name": "p"}},
            },
            ["config.backplane.url has a user", "secrets.backplanePassword.name"],
        ),
        (
            nested_values("tls.caSecretName", "relay-redis-ca"),
            ["tls.caSecretName", "ssl_ca_certs"],
        ),
    ],
    [
        (
            merge_values(REDIS, nested_values("secrets.backplaneCreds.name", "relay-nats")),
            ["secrets.backplaneCreds.name", "config.backplane.url"],
        ),
        (
            {"extraEnv": [{"name": "RELAY__BACKPLANE__PASSWORD_FILE", "value": "/run/password"}]},
            ["extraEnv", "secrets.backplanePassword instead"],
        ),
    ],
]
"""Values that do not fit together, and words of the error. Those of one list are independent of
each other, so that one run of Helm reports them all."""


@pytest.mark.parametrize("misfits", MISFITS, ids=lambda misfits: misfits[0][1][0])
def test_values_that_contradict_each_other_are_rejected_with_their_keys_and_a_remedy(
    misfits: list[Misfit],
) -> None:
    with pytest.raises(HelmError) as refused:
        newest_helm().template(values=merge_values(*(values for values, _ in misfits)))
    lines = re.findall(r"^- (.*)$", str(refused.value), re.MULTILINE)
    for _, words in misfits:
        assert any(all(word in line for word in words) for line in lines), words
    assert len(lines) == len(misfits), lines
    assert all(re.search(r"\b(set|leave|put|add)\b", line) for line in lines), lines
    assert "pa55word" not in str(refused.value)
    assert "t0ken" not in str(refused.value)


@each_helm
def test_the_chart_can_be_a_dependency_of_another_chart(name: str, tmp_path: Path) -> None:
    parent = {"apiVersion": "v2", "name": "bank", "version": "1.0.0"}
    dependency = {
        "name": CHART.name,
        "version": CHART_YAML["version"],
        "condition": f"{CHART.name}.enabled",
    }
    (tmp_path / "Chart.yaml").write_text(yaml.safe_dump(parent | {"dependencies": [dependency]}))
    shutil.copytree(CHART, tmp_path / "charts" / CHART.name)
    budget = {"maxUnavailable": "", "minAvailable": "60%"}
    values = {CHART.name: {"enabled": True, "podDisruptionBudget": budget} | REDIS_3}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    objects = parse_objects(find_helm(name).run("template", "bank", str(tmp_path)))
    spec = find_object(objects, "PodDisruptionBudget", f"bank-{CHART.name}")["spec"]
    assert (spec["minAvailable"], spec.get("maxUnavailable")) == ("60%", None)
    disabled = ["--set", f"{CHART.name}.enabled=false"]
    assert not parse_objects(find_helm(name).run("template", "bank", str(tmp_path), *disabled))


BROKER_URLS = (
    "redis://redis",
    "rediss://redis:6380/1?ssl_cert_reqs=none",
    "redis://[fd00::7]:6379/0?client_name=relay",
    "unix:///run/redis.sock",
    "nats://one,two:4223?replicas=3",
    "tls://nats:4222?handshake_first=true",
    "valkeys://valkey:6380/1",
    "redis+cluster://one:6379,two",
    "rediss+sentinel://one,two:26380/mymaster/0",
)
REFUSED_URLS = (
    "redis://redis:6379/cache",
    "redis://redis:99999/0",
    "redis://redis:port/0",
    "redis://one,two",
    "redis://redis/0?ssl_cert_reqs=none",
    "rediss://redis/0?nonsense=1",
    "rediss://redis/0?ssl_cert_reqs=never",
    "redis://redis/0?sentinel_username=relay",
    "redis+cluster://one?db=1",
    "redis://[1]",
    "redis+sentinel://one,two",
    "nats://one,",
    "nats://one?replicas=2",
    "nats://",
)


@pytest.mark.parametrize("url", BROKER_URLS)
def test_the_relay_accepts_the_addresses_of_brokers_that_the_chart_accepts(
    url: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(rendered_settings(values=nested_values("config.backplane.url", url)))
    assert main(["check", "--config-file", str(file)]) == 0


def test_the_chart_refuses_an_address_that_is_not_a_brokers() -> None:
    found = find_problems([with_config({"backplane": {"url": url}}) for url in REFUSED_URLS])
    for url, problems in zip(REFUSED_URLS, found, strict=True):
        assert "config.backplane.url is not the address" in "\n".join(problems), url


def with_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return merge_values(VALUES, {"config": config})


def test_the_chart_refuses_the_settings_that_the_relay_refuses() -> None:
    """Each alone, by the schema or by the checks, which all run in one Helm."""
    configs: list[dict[str, Any]] = [
        *({"server": {"allowed_origins": [origin]}} for origin, _ in refused_settings.ORIGINS),
        *({"server": {"trusted_proxies": [proxy]}} for proxy in refused_settings.PROXIES),
        *({"server": server} for server, _ in refused_settings.SERVERS),
        *({"auth": {"mode": "jwt", "jwt": of_jwt}} for of_jwt, _ in refused_settings.TOKENS),
        *(
            {"auth": {"mode": "jwt", "jwt": {"algorithms": ["RS256"], "jwks_url": url}}}
            for url in refused_settings.JWKS_URLS
        ),
        *(
            {"backplane": {"url": url, "stream": name}}
            for url, name, is_accepted in refused_settings.STREAMS
            if not is_accepted
        ),
        *({"backplane": {"url": url} | rest} for url, rest, *_ in refused_settings.ACCESS),
        {"auth": {"jwt": {"audience": "relay,"}}},
        {"metrics": {"port": 8443}},
    ]
    trees = [with_config(config) for config in configs]
    checked = [tree for tree in trees if not schema_errors(tree)]
    found = zip(checked, find_problems(checked), strict=True)
    assert [tree["config"] for tree, problems in found if not problems] == []


ACCEPTED_CONFIGS: list[dict[str, Any]] = [
    {
        "server": {
            "host": "10.0.0.7, [::1]",
            "proxy_protocol": True,
            "allowed_origins": [
                "*",
                "null",
                "file://",
                "https://App.Example:*",
                "https://*",
                "https://*.b\u00fccher.example:443",
                "http://[0:0::1]:3000",
                "http://10.0.0.7",
                "http://a_b.example.",
                "moz-extension://*",
                "capacitor://localhost",
            ],
            "trusted_proxies": [
                "10.0.0.7",
                "10.0.0.0/8",
                "10.240.0.0/12",
                "0.0.0.0/0",
                "10.0.0.7/32",
                "fd00::/8",
                "fd12:3450::/28",
                "::/0",
                "::1",
                "fd00::7/128",
                "::ffff:127.0.0.1",
            ],
        }
    },
    {"backplane": {"url": "redis://r?username=u", "stream": "team1.relay"}},
    {"backplane": {"url": "nats://n", "domain": "hub", "inbox_prefix": "_INBOX.relay"}},
    {"auth": {"jwt": {"audience": "relay, other", "issuer": ["https://a.example"]}}},
]


def test_the_relay_accepts_the_settings_that_the_chart_accepts(tmp_path: Path) -> None:
    trees = [with_config(config) for config in ACCEPTED_CONFIGS]
    assert list(map(schema_errors, trees)) == [""] * len(trees)
    assert find_problems(trees) == [[]] * len(trees)
    file = tmp_path / "config.yaml"
    for tree in trees:
        file.write_text(yaml.safe_dump(tree["config"]))
        assert main(["check", "--config-file", str(file)]) == 0


def rendered_settings(*options: str, values: Mapping[str, Any] | None = None) -> str:
    deployment = find_object(newest_helm().objects(*options, values=values), "Deployment")
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    return str(annotations["websocket-relay/config.yaml"])


def test_a_number_with_decimals_on_the_command_line_is_a_number() -> None:
    options = ("--set", "config.shutdown.timeout_s=40.5", "--set", "config.shutdown.spread_s=20.5")
    settings = yaml.safe_load(rendered_settings(*options))
    assert Settings(**settings).shutdown.timeout_s == 40.5


# The README of the chart

README = (CHART / "README.md").read_text()


def test_the_examples_of_the_readme_are_valid_values() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    examples = [block for block in map(yaml.safe_load, blocks) if set(block) <= set(VALUES)]
    assert len(examples) == len(blocks) - 1, "all but the rule of prometheus-adapter"
    for example in examples:
        needs_broker = "autoscaling" in example
        newest_helm().template(values=merge_values(REDIS if needs_broker else {}, example))


def test_the_numbers_of_an_update_in_the_readme_are_the_defaults() -> None:
    spec = find_object(newest_helm().objects(), "Deployment")["spec"]
    stop = VALUES["config"]["shutdown"]
    for name, number in {
        "config.shutdown.readiness_delay_s": stop["readiness_delay_s"],
        "spread_s": stop["spread_s"],
        "timeout_s": stop["timeout_s"],
        "terminationGracePeriodSeconds": spec["template"]["spec"]["terminationGracePeriodSeconds"],
        "minReadySeconds": spec["minReadySeconds"],
    }.items():
        assert re.search(rf"`{name}` \({number}\b", README), name


@pytest.mark.fast
def test_the_links_of_the_readme_have_targets() -> None:
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", README)
    assert links
    for target, anchor in links:
        page = (CHART / target).resolve() if target else CHART / "README.md"
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page.read_text())
