"""k8s/, put together by the real kubectl: what those without Helm install."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.support.helm import (
    KUBERNETES,
    RELEASE,
    Object,
    kubectl,
    newest_helm,
    one,
    parsed,
    run,
    validate,
)
from tests.support.relay_process import ROOT

K8S = ROOT / "k8s"
OVERLAYS = [K8S / "base", K8S / "overlays" / "redis"]


def built(directory: Path) -> list[Object]:
    return parsed(run([str(kubectl()), "kustomize", str(directory)]))


def relay_of(objects: Sequence[Object]) -> Object:
    (container,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


@pytest.mark.parametrize("directory", OVERLAYS, ids=lambda path: path.name)
@pytest.mark.parametrize("version", KUBERNETES)
def test_every_object_is_valid_in_the_oldest_and_the_newest_kubernetes(
    directory: Path, version: str
) -> None:
    for document in built(directory):
        validate(document, version)


def test_the_base_is_what_the_chart_makes() -> None:
    charted, made = newest_helm().objects("--no-hooks"), built(K8S / "base")
    assert {each["kind"] for each in made} == {each["kind"] for each in charted}
    assert relay_of(made) == relay_of(charted)
    assert one(made, "Service")["spec"] == one(charted, "Service")["spec"]


@pytest.mark.parametrize("directory", OVERLAYS, ids=lambda path: path.name)
def test_nothing_says_that_helm_was_here(directory: Path) -> None:
    assert "helm" not in yaml.safe_dump_all(built(directory)).lower().replace(
        "helm/websocket-relay by make chart", ""
    )


@pytest.mark.parametrize("directory", OVERLAYS, ids=lambda path: path.name)
def test_other_settings_are_other_pods(directory: Path) -> None:
    objects = built(directory)
    (config,) = (each for each in objects if each["kind"] == "ConfigMap")
    assert re.fullmatch(rf"{RELEASE}-[0-9a-z]+", config["metadata"]["name"])
    (volume,) = one(objects, "Deployment")["spec"]["template"]["spec"]["volumes"]
    assert volume["configMap"]["name"] == config["metadata"]["name"]


def test_the_overlay_is_three_relays_on_one_redis_that_nobody_else_reaches() -> None:
    objects = built(K8S / "overlays" / "redis")
    assert one(objects, "Deployment")["spec"]["replicas"] == 3
    (variable,) = relay_of(objects)["env"]
    assert variable["name"] == "RELAY__BACKPLANE__URL"
    redis = one(objects, "Service", "websocket-relay-redis")
    (port,) = redis["spec"]["ports"]
    assert variable["value"] == f"redis://{redis['metadata']['name']}:{port['port']}/0"

    store = one(objects, "StatefulSet", "websocket-relay-redis")["spec"]["template"]
    assert redis["spec"]["selector"].items() <= store["metadata"]["labels"].items()
    policy = one(objects, "NetworkPolicy", "websocket-relay-redis")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= store["metadata"]["labels"].items()
    (rule,) = policy["ingress"]
    (peer,) = rule["from"]
    relays = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"] == relays


def test_the_readme_s_overlay_has_another_image_and_other_settings(tmp_path: Path) -> None:
    readme = (K8S / "README.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    shutil.copytree(K8S / "base", tmp_path / "base")
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(block)
    (overlay / "config.yaml").write_text("limits: {max_connections: 5}\n")
    objects = built(overlay)
    image = yaml.safe_load(block)["images"][0]
    assert relay_of(objects)["image"] == f"{image['newName']}:{image['newTag']}"
    (config,) = (each for each in objects if each["kind"] == "ConfigMap")
    assert config["data"] == {"config.yaml": "limits: {max_connections: 5}\n"}
    assert {each["metadata"]["namespace"] for each in objects} == {"chat"}
