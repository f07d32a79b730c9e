"""Skipped tests: the last lines of a run list them with the missing programs, or they fail."""

from pathlib import Path

from tests.support.not_tested import SKIP_NOTHING
from tests.support.pytest_process import run_pytest

NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
PLUGINS = ("-p", "pytest_asyncio.plugin", "-p", "xdist.plugin")
"""A run loads these only: it takes a third of the processor time of a run with all plugins."""

SOURCE = """\
import pytest
from tests.support.programs import Program, needed

ABSENT = Program("Absent", ("no-such-command",), "absent-package")


@pytest.mark.parametrize("number", range(3))
def test_needs_a_program(number):
    needed(ABSENT)


def test_is_skipped_for_another_reason():
    pytest.skip("not here")


def test_passes():
    pass
"""


def test_the_last_lines_list_skipped_tests_and_how_to_install_missing_programs(
    tmp_path: Path,
) -> None:
    for workers in ((), ("-n1",)):
        run = run_pytest(tmp_path, SOURCE, *PLUGINS, *workers, env=NO_PLUGINS)
        assert run.status == 0, run.output
        assert run.output.splitlines()[-5:-1] == [
            " not tested ".center(80, "="),
            "    3 tests: needs Absent (Debian: absent-package)",
            "    1 tests: not here",
            "To test it on Debian: apt-get install absent-package",
        ]


def test_a_skipped_test_fails_where_none_may_be_skipped(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, SOURCE, *PLUGINS, env={SKIP_NOTHING: "1"} | NO_PLUGINS)
    assert run.status == 1
    assert run.passed == {"test_passes"}
    assert "needs Absent (Debian: absent-package)" in run.failures["test_needs_a_program[0]"]
    assert "not here" in run.failures["test_is_skipped_for_another_reason"]
