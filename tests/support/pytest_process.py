"""Run pytest as a process, to test this project's plugins."""

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
    """The result of a run of pytest.

    Args:
        status: the exit status.
        output: standard output and standard error.
        failures: the reports of failed tests, by their names.
        passed: the names of the other tests.
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
        directory: for the files.
        source: of the tests.
        arguments: of the command line.
        ini: lines of pytest.ini.
        env: further environment variables.
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
