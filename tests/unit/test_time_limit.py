"""Time limits of tests: a test that hangs fails by itself, and the run goes on."""

import re
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.pytest_process import run_pytest
from tests.support.raw_client import PATIENCE_S

INI = "timeout_s = 20\ntimeout_grace_s = 0.5"

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


def test_hangs():
    subprocess.Popen(["sleep", "1000", "{mark}"])
    libc, mutex = ctypes.{library}(None), ctypes.create_string_buffer(64)
    while True:  # the second call waits for ever, and no signal ends it
        libc.pthread_mutex_lock(mutex)


@pytest.mark.timeout(20)
def test_comes_next():
    pass
"""
LIBRARIES = {"the interpreter's lock": "PyDLL", "no lock of the interpreter": "CDLL"}


def test_a_test_that_hangs_fails_alone_and_shows_where(tmp_path: Path) -> None:
    run = run_pytest(tmp_path, INTERRUPTIBLE, ini=INI)
    hanging = set(re.findall(r"def (test_hangs\w+)", INTERRUPTIBLE))
    assert run.passed == {"test_comes_next"}, run.output
    assert run.failures.keys() == hanging
    for name, failure in run.failures.items():
        assert f"::{name} (" in failure
        assert "exceeded its time limit of 0.4 s" in failure
    where = "await asyncio.get_running_loop().create_future()"
    assert where in run.failures["test_hangs_in_a_uvloop"]
    assert run.status == 1


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
def test_a_call_into_c_that_never_returns_ends_its_worker_only(
    tmp_path: Path, library: str
) -> None:
    mark = uuid.uuid4().hex
    source = IN_C.format(library=library, mark=mark)
    run = run_pytest(tmp_path, source, "-n1", "-otimeout_s=1", ini=INI)
    assert run.passed == {"test_comes_next"}, run.output
    assert "crashed while running 'test_it.py::test_hangs'" in run.failures["test_hangs"]
    assert "in test_hangs" in run.output
    assert_nobody_has(mark)


def test_without_workers_a_call_into_c_that_never_returns_ends_the_run(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    run = run_pytest(tmp_path, IN_C.format(library="CDLL", mark=mark), "-otimeout_s=1", ini=INI)
    assert run.status == 1
    assert "test_it.py::test_hangs (call) exceeded its time limit of 1 s" in run.output
    assert "test_it.py::test_hangs (call) can't be interrupted" in run.output
    assert_nobody_has(mark)


def assert_nobody_has(mark: str) -> None:
    """Wait until no process has a mark among its arguments."""
    deadline = time.monotonic() + PATIENCE_S
    while mark in everybodys_arguments():
        assert time.monotonic() < deadline, "a process that a test started is left over"
        time.sleep(0.02)


def everybodys_arguments() -> str:
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # ended meanwhile
            lines.append(file.read_text(errors="replace"))
    return "\n".join(lines)
