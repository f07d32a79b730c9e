"""Tests that share a browser run in one event loop, which is that of the browser."""

from pathlib import Path

from tests.support.pytest_process import run_pytest

NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
PLUGINS = ("-p", "pytest_asyncio.plugin", "-p", "tests.support.browser", "-p", "loops")
INI = "asyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"

LOOPS = """\
import asyncio


def pytest_asyncio_loop_factories():
    return {"loop": asyncio.new_event_loop}
"""

SOURCE = """\
import asyncio

import pytest
from tests.support.browser import SHARED

loops = []


class TestShare:
    pytestmark = SHARED

    @pytest.mark.parametrize("number", range(2))
    async def test_in_a_marked_collector(self, number):
        loops.append(asyncio.get_running_loop())

    def test_that_is_not_async(self):
        pass


@SHARED
async def test_with_a_mark():
    loops.append(asyncio.get_running_loop())


def test_they_ran_in_one_loop():
    assert len(loops) == 3
    assert len(set(loops)) == 1
"""


def test_tests_that_share_a_browser_run_in_one_event_loop(tmp_path: Path) -> None:
    (tmp_path / "loops.py").write_text(LOOPS)
    run = run_pytest(tmp_path, SOURCE, *PLUGINS, ini=INI, env=NO_PLUGINS)
    assert run.status == 0, run.output
    assert len(run.passed) == 5
