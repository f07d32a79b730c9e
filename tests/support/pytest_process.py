"""Run pytest as a process of its own, to test this project's plugins of it."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.relay_process import environment

PLUGINS = ["tests.support.not_tested", "tests.support.time_limit"]


@dataclass(frozen=True, slots=True)
class PytestRun:
    """How a run of pytest ended.

    Args:
        failures: why tests failed, by their names.
        passed: the names of the others.
    """

    status: int
    output: str
    failures: Mapping[str, str]
    passed: frozenset[str]


def run_pytest(
    directory: Path,
    source: str,
    *arguments: str,
    ini: str = "",
    env: Mapping[str, str] | None = None,
) -> PytestRun:
    """Run pytest with the plugins of this project on a file of tests.

    Args:
        ini: lines of pytest's settings.
        env: further variables.
    """
    (directory / "conftest.py").write_text(f"pytest_plugins = {PLUGINS}")
    (directory / "pytest.ini").write_text(f"[pytest]\nasyncio_mode = auto\n{ini}")
    (directory / "test_it.py").write_text(source)
    result = directory / "result.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"--junitxml={result}", *arguments],
        cwd=directory,
        env=environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=50,
        check=False,
    )
    cases = list(ET.parse(result).iter("testcase")) if result.exists() else []
    failures = {
        case.get("name", ""): "".join(case.itertext()) + str([each.attrib for each in case])
        for case in cases
        if len(case)
    }
    names = {case.get("name", "") for case in cases}
    return PytestRun(done.returncode, done.stdout, failures, frozenset(names - set(failures)))
