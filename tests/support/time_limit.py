"""Pytest plugin: fail a test that exceeds its time limit, and continue with the next test.

The setup, the call and the teardown of a test may each take `timeout_s` seconds (pyproject.toml),
or the seconds of the test's mark: `@pytest.mark.timeout(120)`. A thread measures the time, because
an exception in a signal handler does not interrupt a blocked event loop of uvloop. After the limit,
the thread writes the stacks of all threads and tasks, and interrupts the test by one means after
another. Each has `timeout_grace_s` seconds to take effect:

1. All tasks of the running event loops are cancelled.
2. A signal handler raises in the main thread. This interrupts Python code and system calls.
3. The event loops are stopped, even if their tasks ignore the cancellation.
4. The process ends. pytest-xdist reports the test as failed and replaces the worker. Without
   pytest-xdist the run ends with status 1.

A call into C may keep the interpreter's lock, so that no other thread runs. The timer of
`faulthandler` does not need that lock, and ends the process.
"""

import asyncio
import faulthandler
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

import pytest

from tests.support import leftover_processes

EXIT_S = 30.0
"""The timeout of the end of the interpreter after the last test; it joins threads."""

Loop = asyncio.AbstractEventLoop


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("timeout_s", "seconds for a test's setup, call and teardown each; 0: no limit")
    parser.addini("timeout_grace_s", "seconds for each means of interrupting a test", default="5")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "timeout(seconds): another time limit for the test")
    limit_s = float(config.getini("timeout_s") or 0)
    if not limit_s or config.getoption("usepdb"):
        return
    stderr = os.dup(sys.stderr.fileno())  # the one that pytest does not capture
    watchdog = Watchdog(limit_s, float(config.getini("timeout_grace_s")), stderr)
    watchdog.start()
    config.pluginmanager.register(watchdog)
    leftover_processes.kill_when_this_process_ends(config)


@dataclass(eq=False, slots=True)
class TimedPhase:
    """One phase of a test.

    Args:
        name: of the test and the phase.
        limit_s: the time limit.
        deadline: the end of the limit, by `time.monotonic`.
        report: the stacks at the deadline; empty before.
    """

    name: str
    limit_s: float
    deadline: float = field(init=False)
    report: str = ""

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.limit_s

    def fail(self) -> NoReturn:
        """Fail the test."""
        raise pytest.fail.Exception(self.report, pytrace=False) from None


class Watchdog:
    """Interrupts a phase that exceeds its limit.

    Args:
        limit_s: of a test without a mark.
        grace_s: for each means of interruption.
        stderr: a file descriptor, to which stacks are written.
    """

    def __init__(self, limit_s: float, grace_s: float, stderr: int) -> None:
        self._limit_s = limit_s
        self._grace_s = grace_s
        self._stderr = stderr
        self._phase: TimedPhase | None = None
        self._changed = threading.Condition()

    def start(self) -> None:
        """Start the thread. Call it in the thread that runs the tests."""
        self._main_thread = threading.get_ident()
        signal.signal(signal.SIGUSR1, self._on_signal)
        threading.Thread(target=self._run, name="time limits", daemon=True).start()

    # In the thread that runs the tests

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        return (yield from self._limited(item, "setup"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        return (yield from self._limited(item, "call"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        return (yield from self._limited(item, "teardown"))

    def pytest_enter_pdb(self) -> None:
        """Remove the time limit of a test in the debugger."""
        self._watch(None)

    def pytest_unconfigure(self) -> None:
        self._exit_after(EXIT_S)

    def _limited(self, item: pytest.Item, when: str) -> Generator[None, object, object]:
        mark = item.get_closest_marker("timeout")
        limit_s = float(mark.args[0]) if mark else self._limit_s
        phase = TimedPhase(f"{item.nodeid} ({when})", limit_s)
        self._watch(phase)
        try:
            result = yield
        except BaseException:
            self._watch(None)
            if phase.report:
                phase.fail()
            raise
        self._watch(None)
        if phase.report:
            phase.fail()  # it suppressed the interruption
        return result

    def _watch(self, phase: TimedPhase | None) -> None:
        self._phase = phase  # before anything else: the handler of a pending signal reads it
        with self._changed:
            self._changed.notify()
        if phase is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            self._exit_after(phase.limit_s + 3 * self._grace_s)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        phase = self._phase
        if phase is not None and phase.report:
            phase.fail()

    # In the thread that measures the time

    def _run(self) -> None:
        while True:
            self._interrupt(self._next_expired())

    def _next_expired(self) -> TimedPhase:
        with self._changed:
            while True:
                phase = self._phase
                left_s = None if phase is None else phase.deadline - time.monotonic()
                if phase is not None and left_s is not None and left_s <= 0:
                    phase.report = self._report(phase)
                    return phase
                self._changed.wait(left_s)

    def _interrupt(self, phase: TimedPhase) -> None:
        self._write(f"\n{phase.report}")
        for interrupt in (self._cancel_tasks, self._raise_in_tests, self._stop_loops):
            with self._changed:
                if self._phase is phase:
                    self._exit_after(3 * self._grace_s)
                    interrupt(phase)
                if self._changed.wait_for(lambda: self._phase is not phase, self._grace_s):
                    return
        self._write(f"\n{phase.name} can't be interrupted: its process ends now.\n")
        os._exit(1)

    def _exit_after(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._stderr)

    def _cancel_tasks(self, phase: TimedPhase) -> None:
        def cancel(loop: Loop) -> None:
            if self._phase is phase:  # a blocked loop may call this after the phase has ended
                for task in asyncio.all_tasks(loop):
                    task.cancel()

        _call_in_loops(cancel)

    def _raise_in_tests(self, phase: TimedPhase) -> None:
        signal.pthread_kill(self._main_thread, signal.SIGUSR1)

    def _stop_loops(self, phase: TimedPhase) -> None:
        def stop(loop: Loop) -> None:
            if self._phase is phase:
                loop.stop()

        _call_in_loops(stop)

    def _report(self, phase: TimedPhase) -> str:
        lines = [f"{phase.name} exceeded its time limit of {phase.limit_s:g} s\n"]
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        own = threading.get_ident()
        for ident, frame in sys._current_frames().items():
            if ident != own:
                lines += [f"\nThread {names.get(ident, ident)}:\n", *traceback.format_stack(frame)]
        for loop in _running_loops():
            for task in asyncio.all_tasks(loop):
                lines += [f"\n{task!r}:\n", *_stack_of(task)]
        return "".join(lines)

    def _write(self, text: str) -> None:
        os.write(self._stderr, text.encode(errors="backslashreplace"))


def _running_loops() -> list[Loop]:
    """Return the running event loops of all threads, of which asyncio keeps no list."""
    loops = [each for each in gc.get_objects() if issubclass(type(each), Loop)]
    return [loop for loop in loops if loop.is_running()]


def _call_in_loops(function: Callable[[Loop], None]) -> None:
    for loop in _running_loops():
        with suppress(RuntimeError):  # closed in the meantime
            loop.call_soon_threadsafe(function, loop)


def _stack_of(task: asyncio.Task[Any]) -> Iterator[str]:
    """Yield the stack of a waiting task: `Task.get_stack` returns the outermost coroutine only."""
    awaited: Any = task.get_coro()
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is not None:
            yield from traceback.format_stack(frame, limit=1)
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
