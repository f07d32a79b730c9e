"""Time limits of tests: a test that hangs fails alone, and the run continues."""

import re
import time
import uuid
from contextlib import suppress
from pathlib import Path

from tests.support.pytest_process import run_pytest
from tests.support.raw_client import PATIENCE_S

INI = "timeout_s = 20\ntimeout_grace_s = 0.5"
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
PLUGINS = ("-p", "pytest_asyncio.plugin", "-p", "xdist.plugin")
"""A run loads these only: it takes a third of the processor time of a run with all plugins."""

INTERRUPTIBLE = """\
import asyncio, contextlib, threading, time
import pytest, uvloop

pytestmark = pytest.mark.timeout(0.4)


def test_hangs_in_a_system_call():
    time.sleep(1000)


def test_hangs_in_python_code():
    while True:
        pass


def test_hangs_in_a_lock():
    threading.Event().wait()


async def test_hangs_in_an_event_loop():
    await asyncio.get_running_loop().create_future()


def test_hangs_in_a_uvloop():
    async def wait():
        await asyncio.get_running_loop().create_future()

    uvloop.run(wait())


def test_hangs_in_a_uvloop_that_a_task_blocks():
    async def wait():
        time.sleep(1000)

    uvloop.run(wait())


def test_hangs_in_a_uvloop_without_tasks():
    uvloop.new_event_loop().run_forever()


async def test_hangs_in_a_coroutine_that_ignores_cancellation():
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1000)


@pytest.fixture
async def hangs_in_setup():
    await asyncio.sleep(1000)
    yield


@pytest.fixture
async def hangs_in_teardown():
    yield
    await asyncio.sleep(1000)


async def test_hangs_in_a_setup(hangs_in_setup):
    pass


async def test_hangs_in_a_teardown(hangs_in_teardown):
    pass


@pytest.mark.timeout(20)
async def test_comes_next():
    await asyncio.sleep(0)
"""

IN_C = """\
import ctypes, subprocess
import pytest


def wait_forever(library):
    subprocess.Popen(["sleep", "1000", "{mark}"])
    libc, mutex = library(None), ctypes.create_string_buffer(64)
    while True:  # the second call blocks, and no signal interrupts it
        libc.pthread_mutex_lock(mutex)


def test_hangs_without_the_interpreters_lock():
    wait_forever(ctypes.CDLL)


{with_lock}
@pytest.mark.timeout(20)
def test_comes_next():
    pass
"""
WITH_LOCK = """\
def test_hangs_with_the_interpreters_lock():
    wait_forever(ctypes.PyDLL)
"""


def test_a_test_that_hangs_fails_alone_and_shows_where(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, INTERRUPTIBLE, *PLUGINS, ini=INI, env=NO_PLUGINS)
    hanging = set(re.findall(r"def (test_hangs\w+)", INTERRUPTIBLE))
    assert run.passed == {"test_comes_next"}, run.output
    assert run.failures.keys() == hanging
    for name, failure in run.failures.items():
        assert f"::{name} (" in failure
        assert "exceeded its time limit of 0.4 s" in failure
    where = "await asyncio.get_running_loop().create_future()"
    assert where in run.failures["test_hangs_in_a_uvloop"]
    assert run.status == 1


def test_a_call_into_c_that_never_returns_ends_only_its_worker(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    source = IN_C.format(mark=mark, with_lock=WITH_LOCK)
    arguments = (*PLUGINS, "-n1", "-otimeout_s=1")
    run = run_pytest(tmp_path, source, *arguments, ini=INI, env=NO_PLUGINS)
    assert run.passed == {"test_comes_next"}, run.output
    for end in ("with", "without"):
        name = f"test_hangs_{end}_the_interpreters_lock"
        assert f"crashed while running 'test_it.py::{name}'" in run.failures[name]
        assert f"in {name}" in run.output
    assert_no_process_has(mark)


def test_a_call_into_c_that_never_returns_ends_a_run_without_workers(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    source = IN_C.format(mark=mark, with_lock="")
    run = run_pytest(tmp_path, source, *PLUGINS, "-otimeout_s=1", ini=INI, env=NO_PLUGINS)
    name = "test_it.py::test_hangs_without_the_interpreters_lock (call)"
    assert run.status == 1
    assert f"{name} exceeded its time limit of 1 s" in run.output
    assert f"{name} can't be interrupted" in run.output
    assert_no_process_has(mark)


def assert_no_process_has(mark: str) -> None:
    """Wait until no process has a mark among its arguments."""
    deadline = time.monotonic() + PATIENCE_S
    while mark in arguments_of_all_processes():
        assert time.monotonic() < deadline, "a process that a test started still runs"
        time.sleep(0.02)


def arguments_of_all_processes() -> str:
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # the process has ended
            lines.append(file.read_text(errors="replace"))
    return "\n".join(lines)
