"""Find the tools of the project, from the package index and from npm."""

import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import playwright
import pytest

from tests.support import programs
from tests.support.once import prepare_once
from tests.support.relay_process import ROOT

NPM = Path(__file__).with_name("npm")
NPM_INSTALL_S = 120


def python_tool(name: str) -> str:
    """Return the path of a tool from the package index: next to this Python, or on the PATH."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    found = shutil.which(name, path=path)
    if found is None:
        pytest.fail(f"{name} is not installed; it belongs to the group dev in pyproject.toml")
    return found


@cache
def node() -> str:
    """Return the path of Playwright's Node.js: that of the system may be too old, or missing.

    Raises:
        Skipped: the machine has not the library that it needs.
    """
    path = str(Path(playwright.__file__).with_name("driver") / "node")
    result = subprocess.run((path, "--version"), capture_output=True, text=True, check=False)
    if "libatomic" in result.stderr:
        programs.skip_test("needs the library of Node.js (Debian: libatomic1)")
    return path


def npm_command(name: str) -> list[str]:
    """Return the command of a tool in npm/."""
    return [node(), str((npm_modules() / ".bin" / name).resolve())]


def npm_modules() -> Path:
    """Return the folder of the packages in npm/, installed when the lock file has changed."""
    lock = (NPM / "package-lock.json").read_bytes()
    directory = ROOT / "build" / "npm" / hashlib.sha256(lock).hexdigest()[:16]
    prepare_once(directory, _install)
    return directory / "node_modules"


def _install(directory: Path) -> None:
    npm = programs.needed(programs.NPM)
    for file in ("package.json", "package-lock.json"):
        shutil.copy(NPM / file, directory)
    done = subprocess.run(
        [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=NPM_INSTALL_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
