"""Helm and kubectl commands of the how-to pages: the real programs render what they install."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.helm import (
    HELMS,
    KUBERNETES,
    Helm,
    KubernetesObject,
    find_helm,
    find_kubectl,
    parse_objects,
    run_tool,
    validate_object,
)
from tests.support.pages import Block, fenced_blocks
from tests.support.relay_process import ROOT

HOW_TO = ROOT / "docs" / "how-to"
INSTALLS = re.compile(r"^\$ helm (install|upgrade) .*helm/websocket-relay", re.MULTILINE)
PAGES = [path for path in sorted(HOW_TO.glob("*.md")) if INSTALLS.search(path.read_text())]

CHART_PATH = "helm/websocket-relay"
"""The chart, as the pages name it."""

KINDS = {
    "deployment": "Deployment",
    "service": "Service",
    "httproute": "HTTPRoute",
    "ingress": "Ingress",
}
REFERENCE = re.compile(rf"\b({'|'.join(KINDS)})[/ ]([a-z0-9-]+)\b")
"""An object of the chart that a command names."""


def commands(block: Block) -> list[list[str]]:
    """Return the Helm and kubectl commands of a block as words."""
    text = block.text.replace("\\\n", " ")
    lines = [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words[0] in ("helm", "kubectl")]


class KubernetesReader:
    """Types a page's commands in a folder that looks like the project, without a cluster.

    Args:
        directory: the folder.
        program: Helm.
    """

    def __init__(self, directory: Path, program: Helm) -> None:
        self.objects: list[KubernetesObject] = []
        """What the last Helm command installs."""

        self._directory = directory
        self._helm = program
        for name in ("helm", "k8s"):
            (directory / name).symlink_to(ROOT / name)

    def follow(self, page: str) -> int:
        """Follow a page; return how many commands were rendered."""
        rendered = 0
        for block in fenced_blocks(page):
            if block.title and not block.title.startswith("/"):
                (self._directory / block.title).write_text(block.text)
            elif block.language == "console":
                rendered += sum(self._type(words) for words in commands(block))
        return rendered

    def _type(self, words: Sequence[str]) -> bool:
        match self._without_namespace(words):
            case ["helm", "install" | "upgrade", *arguments] if CHART_PATH in arguments:
                text = self._rendered_by_helm(arguments)
            case ["kubectl", "apply", "-k", directory]:
                text = run_tool([str(find_kubectl()), "kustomize", str(ROOT / directory)])
            case ["kubectl", "create", *arguments]:
                text = self._rendered_by_kubectl(arguments)
            case _:  # it does nothing without a cluster
                self._check_references(" ".join(words))
                return False
        objects = parse_objects(text)
        assert objects, words
        for each in objects:
            for version in KUBERNETES:
                validate_object(each, version)
        if words[0] == "helm":
            self.objects = objects
        return True

    @staticmethod
    def _without_namespace(words: Sequence[str]) -> list[str]:
        """Remove the option from before the command, as in `kubectl --namespace chat get`."""
        return [words[0], *words[3:]] if words[1] == "--namespace" else list(words)

    def _rendered_by_helm(self, arguments: Sequence[str]) -> str:
        kept = [each for each in arguments if each != "--install"]
        places = [str(self._directory / each) if self._is_here(each) else each for each in kept]
        return self._helm.run("template", *places)

    def _is_here(self, argument: str) -> bool:
        return (self._directory / argument).exists()

    def _rendered_by_kubectl(self, arguments: Sequence[str]) -> str:
        dry = ("--dry-run=client", "--output", "yaml")
        return run_tool([str(find_kubectl()), "create", *map(self._with_file, arguments), *dry])

    def _with_file(self, argument: str) -> str:
        """Write the file of `--from-file=key=file`, and return the argument with its path."""
        if not argument.startswith("--from-file="):
            return argument
        key, name = argument.removeprefix("--from-file=").split("=")
        file = self._directory / name
        file.write_text("a secret")
        return f"--from-file={key}={file}"

    def _check_references(self, command: str) -> None:
        """Check that the objects that a command names are those that the page installs."""
        for kind, name in REFERENCE.findall(command):
            installed = {(each["kind"], each["metadata"]["name"]) for each in self.objects}
            assert (KINDS[kind], name) in installed, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.parametrize("name", HELMS)
def test_the_commands_of_a_page_install_valid_objects(
    page: Path, name: str, tmp_path: Path
) -> None:
    assert KubernetesReader(tmp_path, find_helm(name)).follow(page.read_text()) > 0


def test_the_pages_about_kubernetes_are_among_them() -> None:
    stems = {page.stem for page in PAGES}
    assert {"kubernetes", "gateway", "aws-alb", "monitor", "rolling-updates"} <= stems
