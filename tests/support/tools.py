"""Find the tools that the tests are done with, or say plainly that one is not here."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import playwright
import pytest

from tests.support import programs
from tests.support.relay_process import ROOT

NPM = Path(__file__).with_name("npm")
NPM_INSTALL_S = 120


def python_tool(name: str) -> str:
    """Return a tool of the package index: one beside this Python, or else on the PATH."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    found = shutil.which(name, path=path)
    if found is None:
        pytest.fail(f"{name} is not here; it belongs to the group dev in pyproject.toml")
    return found


def npm_command(name: str) -> list[str]:
    """Return the command of a tool of npm/, which is installed when its lock file is new.

    It runs on the Node.js that comes with playwright: a system's own may be too old.
    """
    lock = (NPM / "package-lock.json").read_bytes()
    directory = ROOT / "build" / "npm" / hashlib.sha256(lock).hexdigest()[:16]
    if not directory.exists():
        _install(directory)
    node = Path(playwright.__file__).with_name("driver") / "node"
    return [str(node), str((directory / "node_modules" / ".bin" / name).resolve())]


def _install(directory: Path) -> None:
    npm = programs.needed(programs.NPM)
    directory.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=directory.parent))
    try:
        for file in ("package.json", "package-lock.json"):
            shutil.copy(NPM / file, made)
        done = subprocess.run(
            [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
            cwd=made,
            capture_output=True,
            text=True,
            timeout=NPM_INSTALL_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        with suppress(OSError):  # another process was faster
            made.rename(directory)
    finally:
        shutil.rmtree(made, ignore_errors=True)
