"""Pytest plugin: the mark `fast` is for tests that start no process; `make check` runs these.

A file has the mark as a whole (`pytestmark = pytest.mark.fast`) or a test by itself. In a file that
has it, `@pytest.mark.processes` takes a test out.
"""

import os
import sys

import pytest

STARTS = {"os.fork", "os.posix_spawn", "subprocess.Popen"}
"""Audit events of a process that is started."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fast: starts no process; a part of make check")
    config.addinivalue_line("markers", "processes: starts some, in a file that is fast otherwise")
    if "fast" in config.option.markexpr.split():
        sys.addaudithook(_refuse_processes)


def _refuse_processes(event: str, _: object) -> None:
    if event in STARTS and "PYTEST_CURRENT_TEST" in os.environ:
        raise RuntimeError("a test that is marked as fast starts no process")
