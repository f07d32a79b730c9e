"""The distribution, its dependencies, the lock files, and make."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.project import PROJECT
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import PACKAGE, PROGRAM_S, ROOT, CommandResult
from tests.support.shell import user_environment

LOCKS = sorted((ROOT / "requirements").glob("*.lock"))


def make(*arguments: str, directory: Path = ROOT) -> CommandResult:
    done = subprocess.run(
        ["make", *arguments],
        cwd=directory,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
    )
    return CommandResult(done.returncode, done.stdout, done.stderr)


def locked_versions(lock: Path) -> dict[str, str]:
    """Return the versions in a lock file by the names of their distributions."""
    pins = re.findall(r"^([a-zA-Z0-9._-]+)==(\S+)", lock.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


def imported_modules() -> set[str]:
    """Return the top-level modules that the service imports, without its own and Python's."""
    found: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"websocket_relay"}


def dependencies() -> dict[str, Requirement]:
    """Return the dependencies of the distribution by name."""
    return by_name(PROJECT["project"]["dependencies"])


def optional_dependencies() -> dict[str, Requirement]:
    """Return the dependencies of all extras by name."""
    return by_name(chain.from_iterable(PROJECT["project"]["optional-dependencies"].values()))


def by_name(texts: Iterable[str]) -> dict[str, Requirement]:
    requirements = map(Requirement, texts)
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


@pytest.mark.fast
def test_every_imported_module_belongs_to_a_declared_dependency() -> None:
    distributions = packages_distributions()
    declared = dependencies().keys() | optional_dependencies().keys()
    for module in imported_modules():  # several distributions may share one
        owners = {canonicalize_name(owner) for owner in distributions[module]}
        assert declared & owners, module


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
@pytest.mark.fast
def test_a_lock_has_a_hash_for_each_distribution_and_no_index(lock: Path) -> None:
    text = lock.read_text()
    entries = [entry for entry in re.split(r"\n(?=\S)", text) if "==" in entry]
    assert entries
    assert all(entry.count("--hash=sha256:") for entry in entries)
    assert "://" not in text
    assert "index-url" not in text


@pytest.mark.fast
def test_the_locks_satisfy_the_dependencies_of_the_project() -> None:
    run, otel, dev = (
        locked_versions(ROOT / f"requirements/{name}.lock") for name in ("run", "otel", "dev")
    )
    server = dependencies() | by_name(PROJECT["project"]["optional-dependencies"]["server"])
    assert all(needed.specifier.contains(run[name]) for name, needed in server.items())
    optional = optional_dependencies()
    assert all(needed.specifier.contains(otel[name]) for name, needed in optional.items())
    assert run.items() <= otel.items() <= dev.items()
    assert locked_versions(ROOT / "requirements/build.lock").items() <= dev.items()


def test_the_wheel_contains_the_service_and_its_license_only(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "service", tmp_path / "service")
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-build-isolation", "--no-deps",
         "--no-index", "--wheel-dir", str(tmp_path), str(tmp_path)],
        check=True,
        timeout=PATIENCE_S * 6,
        env=user_environment(),
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert b"websocket-relay = websocket_relay.__main__:main" in archive.read(entry_points)
    metadata = wheel.name.rpartition("-py3")[0] + ".dist-info"
    assert {name.partition("/")[0] for name in names} == {"websocket_relay", metadata}
    sources = {str(path.relative_to(PACKAGE.parent)) for path in PACKAGE.rglob("*.py")}
    assert sources | {"websocket_relay/py.typed"} <= names
    assert f"{metadata}/licenses/LICENSE" in names


@pytest.mark.fast
def test_the_browser_package_has_the_version_of_the_project_and_names_its_files() -> None:
    package = json.loads((PACKAGE / "browser" / "package.json").read_text())
    assert package["version"] == PROJECT["project"]["version"]
    for file in (package["main"], package["types"]):
        assert (PACKAGE / "browser" / file).is_file()


def test_make_without_a_target_lists_the_targets() -> None:
    done = make()
    assert done.exit_code == 0
    for target in (
        "run",
        "test",
        "audit",
        "bench",
        "replicas",
        "simulation",
        "format",
        "lock",
        "clean",
    ):
        assert re.search(rf"^  make {target} +\w", done.stdout, re.MULTILINE)


def test_the_audit_covers_all_locks_and_fails_if_a_package_is_not_found() -> None:
    done = make("audit", "--dry-run")
    (command,) = (line for line in done.stdout.split("\n") if "/pip-audit " in line)
    assert "--strict" in command  # otherwise a package that is not found passes
    named = re.findall(r"--requirement (\S+)", done.stdout.replace("\\\n", ""))
    assert set(named) == {str(path.relative_to(ROOT)) for path in ROOT.glob("*/*.lock")}


@pytest.fixture
def installed_project(tmp_path: Path) -> Path:
    """A project with an environment, as the stamp files of make record it."""
    directory = tmp_path / "project"
    environment = directory / ".venv"
    environment.mkdir(parents=True)
    for file in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / file, directory)
    shutil.copytree(ROOT / "requirements", directory / "requirements")
    (environment / ".python").write_text(f"{environment}\n")
    for stamp in (".run", ".dev"):
        (environment / stamp).touch()
    return directory


def is_up_to_date(directory: Path, stamp: str) -> bool:
    return make("--question", f".venv/{stamp}", directory=directory).exit_code == 0


def test_make_installs_again_if_a_lock_changes(installed_project: Path) -> None:
    assert is_up_to_date(installed_project, ".dev")
    later = (installed_project / ".venv/.dev").stat().st_mtime + 1
    os.utime(installed_project / "requirements/dev.lock", (later, later))
    assert is_up_to_date(installed_project, ".run")
    assert not is_up_to_date(installed_project, ".dev")
    os.utime(installed_project / "requirements/run.lock", (later, later))
    assert not is_up_to_date(installed_project, ".run")


def test_make_creates_a_moved_environment_again(installed_project: Path) -> None:
    moved = installed_project.rename(installed_project.with_name("elsewhere"))
    assert not is_up_to_date(moved, ".python")


def test_make_reports_an_old_python_in_one_line(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("run", f"PYTHON={old}", directory=tmp_path)
    complaint, from_make = done.error_lines
    assert complaint.startswith(f"no Python 3.11 or newer with venv found at {old};")
    assert from_make.startswith("make: ***")
    assert not (tmp_path / ".venv").exists()


@pytest.mark.fast
def test_no_except_star_block_raises() -> None:
    """Python 3.11.0 to 3.11.3, as in Debian 12, wraps such an exception in a group."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.TryStar):
                nodes = [each for handler in node.handlers for each in ast.walk(handler)]
                assert not any(isinstance(each, ast.Raise) for each in nodes), file
