"""Pytest plugin: list the skipped tests at the end of a run, with the programs that they need.

With the variable RELAY_TESTS_SKIP_NOTHING, skipped tests fail. It is for machines that have all
programs.
"""

import os
import re
from collections import Counter
from collections.abc import Generator

import pytest

SKIP_NOTHING = "RELAY_TESTS_SKIP_NOTHING"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make a skipped test fail if no test may be skipped."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get(SKIP_NOTHING):
        report.outcome = "failed"
        report.longrepr = f"{_reason(report)}, and {SKIP_NOTHING} is set"
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> Generator[None, None, None]:
    """List the reasons of the skipped tests, and how to install the missing programs."""
    yield
    reasons = Counter(map(_reason, terminalreporter.stats.get("skipped", ())))
    if not reasons:
        return
    terminalreporter.section("not tested")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5} tests: {reason}")
    text = " ".join(reasons)
    packages = sorted(set(re.findall(r"\(Debian: ([a-z0-9-]+)\)", text)))
    if packages:
        terminalreporter.line(f"To test it on Debian: apt-get install {' '.join(packages)}")


def _reason(report: pytest.TestReport) -> str:
    """Return why a test was skipped."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
