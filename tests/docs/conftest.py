"""A reader of the docs, for the tests that do what a page describes."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.brokers import free_port
from tests.support.pages import PORTS, PageReader
from tests.support.relay_process import ROOT
from tests.support.shell import user_environment

COPIED = frozenset({"examples", "helm", "k8s"})
"""Directories that a reader may write to. The others are links."""

SECRETS = frozenset({"secret.txt", "token.txt"})


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory that looks like the project and may be written to."""
    # Otherwise `make run` in there would renew the environment, and install what lies there.
    fresh = subprocess.run(
        ["make", "--question", ".venv/.dev"], cwd=ROOT, env=user_environment(), check=False
    )
    assert fresh.returncode == 0, "the environment is out of date: make venv"
    for entry in ROOT.iterdir():
        here = tmp_path / entry.name
        if entry.name in COPIED:
            shutil.copytree(entry, here)
        elif entry.is_dir():
            here.symlink_to(entry)
        elif entry.suffix != ".pem" and entry.name not in SECRETS:
            shutil.copy2(entry, here)  # with its times, which make compares
    return tmp_path


@pytest.fixture
def reader(project: Path) -> PageReader:
    """A reader who works there: `async with reader: await reader.follow(page)`."""
    return PageReader(project, {port: str(free_port()) for port in PORTS})
