"""The manifests in k8s/, built by kubectl: an installation without Helm."""

import asyncio
import re
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.support.brokers import RedisBroker
from tests.support.helm import (
    KUBERNETES,
    RELEASE,
    KubernetesObject,
    find_kubectl,
    find_object,
    newest_helm,
    parse_objects,
    run_tool,
    validate_object,
)
from tests.support.programs import ANY_REDIS, needed, skip_test
from tests.support.relay_process import ROOT

K8S = ROOT / "k8s"
OVERLAYS = [K8S / "base", K8S / "overlays" / "redis"]


def built(directory: Path) -> list[KubernetesObject]:
    return parse_objects(run_tool([str(find_kubectl()), "kustomize", str(directory)]))


def relay_container(objects: Sequence[KubernetesObject]) -> KubernetesObject:
    (container,) = find_object(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


@pytest.mark.parametrize("directory", OVERLAYS, ids=lambda path: path.name)
def test_the_objects_are_valid_in_kubernetes_name_their_config_and_have_no_trace_of_helm(
    directory: Path,
) -> None:
    objects = built(directory)
    for document in objects:
        for version in KUBERNETES:
            validate_object(document, version)
    text = yaml.safe_dump_all(objects).lower()
    assert "helm" not in text.replace("helm/websocket-relay by make chart", "")
    # The name has a hash of the content: other settings are another pod template.
    (config,) = (each for each in objects if each["kind"] == "ConfigMap")
    assert re.fullmatch(rf"{RELEASE}-[0-9a-z]+", config["metadata"]["name"])
    (volume,) = find_object(objects, "Deployment")["spec"]["template"]["spec"]["volumes"]
    assert volume["configMap"]["name"] == config["metadata"]["name"]


def test_the_base_has_the_objects_that_the_chart_renders() -> None:
    charted, base = newest_helm().objects("--no-hooks"), built(K8S / "base")
    # kustomize names a ConfigMap by its content; `kubectl apply` keeps that of pods that run.
    kinds = {each["kind"] for each in base}
    assert kinds == {each["kind"] for each in charted} | {"ConfigMap"}
    assert relay_container(base) == relay_container(charted)
    assert find_object(base, "Service")["spec"] == find_object(charted, "Service")["spec"]


def test_the_overlay_has_three_relays_and_a_redis_that_only_they_reach() -> None:
    objects = built(K8S / "overlays" / "redis")
    assert find_object(objects, "Deployment")["spec"]["replicas"] == 3
    (variable,) = relay_container(objects)["env"]
    assert variable["name"] == "RELAY__BACKPLANE__URL"
    values = {"replicaCount": 3, "config": {"backplane": {"url": variable["value"]}}}
    charted = newest_helm().objects("--no-hooks", values=values)
    assert relay_container(objects)["readinessProbe"] == relay_container(charted)["readinessProbe"]
    for key in ("minReadySeconds", "progressDeadlineSeconds"):
        spec = find_object(objects, "Deployment")["spec"]
        assert spec[key] == find_object(charted, "Deployment")["spec"][key]

    redis = find_object(objects, "Service", "websocket-relay-redis")
    (port,) = redis["spec"]["ports"]
    assert variable["value"] == f"redis://{redis['metadata']['name']}:{port['port']}/0"

    store = find_object(objects, "StatefulSet", "websocket-relay-redis")["spec"]["template"]
    assert redis["spec"]["selector"].items() <= store["metadata"]["labels"].items()
    policy = find_object(objects, "NetworkPolicy", "websocket-relay-redis")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= store["metadata"]["labels"].items()
    (rule,) = policy["ingress"]
    (peer,) = rule["from"]
    relays = find_object(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"] == relays


class OverlayRedis(RedisBroker):
    """The Redis of the overlay, as Debian and others package it, on a free port."""

    def _arguments(self) -> list[str]:
        objects = built(K8S / "overlays" / "redis")
        store = find_object(objects, "StatefulSet", "websocket-relay-redis")
        (container,) = store["spec"]["template"]["spec"]["containers"]
        program, *arguments = container["args"]
        assert program == "redis-server"
        return [*arguments, "--port", str(self.port)]


async def test_the_redis_of_the_overlay_answers_other_hosts(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        address = probe.getsockname()[0]
    if address.startswith("127."):
        skip_test("needs an address besides loopback")
    async with OverlayRedis(needed(*ANY_REDIS), tmp_path) as redis:
        reader, writer = await asyncio.open_connection(address, redis.port)
        writer.write(b"PING\r\n")
        assert await reader.readline() == b"+PONG\r\n"
        writer.close()


def test_the_overlay_of_the_readme_replaces_the_image_the_settings_and_the_namespace(
    tmp_path: Path,
) -> None:
    readme = (K8S / "README.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    shutil.copytree(K8S / "base", tmp_path / "base")
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(block)
    (overlay / "config.yaml").write_text("limits: {max_connections: 5}\n")
    objects = built(overlay)
    image = yaml.safe_load(block)["images"][0]
    assert relay_container(objects)["image"] == f"{image['newName']}:{image['newTag']}"
    (config,) = (each for each in objects if each["kind"] == "ConfigMap")
    assert config["data"] == {"config.yaml": "limits: {max_connections: 5}\n"}
    assert {each["metadata"]["namespace"] for each in objects} == {"chat"}
