"""Pytest plugin: the mark `fast` marks tests that start no process; `make check` runs these.

A whole file has the mark (`pytestmark = pytest.mark.fast`) or a single test. In a marked file,
`@pytest.mark.processes` excludes a test.
"""

import os
import sys

import pytest

STARTS = {"os.fork", "os.posix_spawn", "subprocess.Popen"}
"""Audit events of the start of a process."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fast: starts no process; a part of make check")
    config.addinivalue_line("markers", "processes: starts a process, in a file that is fast")
    if "fast" in config.option.markexpr.split():
        sys.addaudithook(_refuse_processes)


def _refuse_processes(event: str, _: object) -> None:
    if event in STARTS and "PYTEST_CURRENT_TEST" in os.environ:
        raise RuntimeError("a test that is marked as fast must not start a process")
