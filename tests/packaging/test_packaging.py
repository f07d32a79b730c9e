"""What is installed, and how: the distribution, its dependencies, the lock files, make."""

import ast
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
from tests.support.relay_process import PACKAGE, ROOT, Finished
from tests.support.shell import persons_environment

LOCKS = sorted((ROOT / "requirements").glob("*.lock"))


def make(*arguments: str, directory: Path = ROOT) -> Finished:
    done = subprocess.run(
        ["make", *arguments],
        cwd=directory,
        env=persons_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def locked(lock: Path) -> dict[str, str]:
    """Return the versions that a lock file pins, by distribution."""
    pins = re.findall(r"^([a-zA-Z0-9._-]+)==(\S+)", lock.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in pins}


def imported() -> set[str]:
    """Return the top-level modules that the service imports, its own and Python's left out."""
    found: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"websocket_relay"}


def declared() -> dict[str, Requirement]:
    """Return the distribution's dependencies by name."""
    return by_name(PROJECT["project"]["dependencies"])


def of_extras() -> dict[str, Requirement]:
    """Return what the distribution's extras bring, by name."""
    return by_name(chain.from_iterable(PROJECT["project"]["optional-dependencies"].values()))


def by_name(texts: Iterable[str]) -> dict[str, Requirement]:
    requirements = map(Requirement, texts)
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


@pytest.mark.fast
def test_every_module_that_is_imported_belongs_to_a_declared_dependency() -> None:
    distributions = packages_distributions()
    wanted = declared().keys() | of_extras().keys()
    for module in imported():  # some are shared by several distributions
        assert wanted & {canonicalize_name(owner) for owner in distributions[module]}, module


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
@pytest.mark.fast
def test_a_lock_pins_everything_by_hash_and_names_no_index(lock: Path) -> None:
    text = lock.read_text()
    entries = [entry for entry in re.split(r"\n(?=\S)", text) if "==" in entry]
    assert entries
    assert all(entry.count("--hash=sha256:") for entry in entries)
    assert "://" not in text
    assert "index-url" not in text


@pytest.mark.fast
def test_the_locks_fit_the_project() -> None:
    run, otel, dev = (locked(ROOT / f"requirements/{name}.lock") for name in ("run", "otel", "dev"))
    served = declared() | by_name(PROJECT["project"]["optional-dependencies"]["server"])
    assert all(wanted.specifier.contains(run[name]) for name, wanted in served.items())
    assert all(wanted.specifier.contains(otel[name]) for name, wanted in of_extras().items())
    assert run.items() <= otel.items() <= dev.items()
    assert locked(ROOT / "requirements/build.lock").items() <= dev.items()


def test_the_wheel_holds_the_service_and_nothing_else(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "service", tmp_path / "service")
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-build-isolation", "--no-deps",
         "--no-index", "--wheel-dir", str(tmp_path), str(tmp_path)],
        check=True,
        timeout=PATIENCE_S * 6,
        env=persons_environment(),
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


def test_make_alone_says_what_there_is() -> None:
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


def test_the_audit_looks_at_all_that_is_locked_and_takes_no_silence_for_an_answer() -> None:
    done = make("audit", "--dry-run")
    (command,) = (line for line in done.stdout.split("\n") if "/pip-audit " in line)
    assert "--strict" in command  # otherwise what was not found counts as sound
    named = re.findall(r"--requirement (\S+)", done.stdout.replace("\\\n", ""))
    assert set(named) == {str(path.relative_to(ROOT)) for path in ROOT.glob("*/*.lock")}


@pytest.fixture
def set_up(tmp_path: Path) -> Path:
    """A project in which make has done its set-up, as the stamp files say."""
    directory = tmp_path / "project"
    environment_made = directory / ".venv"
    environment_made.mkdir(parents=True)
    for file in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / file, directory)
    shutil.copytree(ROOT / "requirements", directory / "requirements")
    (environment_made / ".python").write_text(f"{environment_made}\n")
    for stamp in (".run", ".dev"):
        (environment_made / stamp).touch()
    return directory


def is_up_to_date(directory: Path, stamp: str) -> bool:
    return make("--question", f".venv/{stamp}", directory=directory).exit_code == 0


def test_make_installs_again_only_what_changed(set_up: Path) -> None:
    assert is_up_to_date(set_up, ".dev")
    later = (set_up / ".venv/.dev").stat().st_mtime + 1
    os.utime(set_up / "requirements/dev.lock", (later, later))
    assert is_up_to_date(set_up, ".run")
    assert not is_up_to_date(set_up, ".dev")
    os.utime(set_up / "requirements/run.lock", (later, later))
    assert not is_up_to_date(set_up, ".run")


def test_make_makes_a_moved_environment_anew(set_up: Path) -> None:
    moved = set_up.rename(set_up.with_name("elsewhere"))
    assert not is_up_to_date(moved, ".python")


def test_make_says_in_one_line_that_a_python_is_too_old(tmp_path: Path) -> None:
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
def test_nothing_is_raised_in_a_block_that_catches_a_group() -> None:
    """Python 3.11.0 to 3.11.3, Debian 12's among them, wraps it in a group that nobody catches."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.TryStar):
                within = [each for handler in node.handlers for each in ast.walk(handler)]
                assert not any(isinstance(each, ast.Raise) for each in within), file
