"""Receive signals, and exit by the deadline of a stop. Knows no event loop and no settings.

The signals are blocked in all threads, from before the slow imports until the process exits, and
one thread waits for them. So they neither interrupt nor kill the process, even while the
interpreter finalizes and has restored the default handlers. The kernel keeps a blocked signal
pending for process 1 of a container, but discards one that has no handler yet (pid_namespaces(7)).
"""

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

log = logging.getLogger(__name__)

IGNORED = {"SIGUSR1", "SIGUSR2"}

SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", *sorted(IGNORED))
    if hasattr(signal, name)  # Windows has the first two
]

LOG_S = 0.2
"""Standard error may be a full pipe without a reader: the last lines are abandoned after this
time."""

STACK_FRAMES = 3

CAN_BLOCK = hasattr(signal, "pthread_sigmask")
"""False on Windows, where only the client commands run."""


def unblock() -> None:
    """Unblock the signals: the parent process may have blocked them."""
    if CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def leave(status: int) -> NoReturn:
    """Exit without finalizing the interpreter.

    Finalization waits for threads, and a thread that resolves a name may take a minute. It would
    also deallocate the objects of all clients one by one.
    """
    flush_log()
    os._exit(status)


class Stop:
    """Start the shutdown at the first signal that ends the relay, and enforce its deadline.

    SIGTERM, SIGINT and SIGQUIT end the relay; before `attach` at once, with status 0. SIGHUP
    reloads the settings. The others that would kill the process are ignored.

    Attributes:
        signalled_at: time of the first signal that ends the relay, by `time.monotonic`; None: none
            was received.
    """

    def __init__(self) -> None:
        self.signalled_at: float | None = None
        self._signalled = threading.Event()
        self._terminal = next((each for each in (0, 1, 2) if os.isatty(each)), None)
        self._is_reload_requested = False
        self._reload: Callable[[], object] | None = None
        self._start_shutdown: Callable[[], object] | None = None
        self._timeout_s = 0.0
        self._list_tasks: Callable[[], str] = str
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        # Started now: at shutdown the limit of threads may be exhausted.
        for target in (self._receive, self._enforce):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def attach(
        self,
        start_shutdown: Callable[[], object],
        timeout_s: float,
        list_tasks: Callable[[], str],
        reload: Callable[[], object],
    ) -> None:
        """Make the first signal start a graceful shutdown, and SIGHUP a reload.

        Args:
            start_shutdown: called in another thread.
            timeout_s: the process exits this long after the signal at the latest.
            list_tasks: returns the running tasks, for the log; called in another thread.
            reload: called in another thread.
        """
        self._timeout_s, self._list_tasks = timeout_s, list_tasks
        self._start_shutdown = start_shutdown
        self._reload = reload
        if self._is_reload_requested:  # the settings may have been read before the signal
            reload()

    def _receive(self) -> None:
        while True:
            number = signal.sigwait(SIGNALS)
            name = signal.Signals(number).name
            if name in IGNORED:
                continue
            if name == "SIGHUP" and not self._has_lost_terminal():
                self._is_reload_requested = True
                if self._reload is not None:
                    with suppress(RuntimeError):  # the event loop is closed
                        self._reload()
                continue
            if self._start_shutdown is None:
                os._exit(0)
            if self.signalled_at is None:
                self.signalled_at = time.monotonic()
                self._signalled.set()
                with suppress(RuntimeError):  # the event loop is closed: the relay exits anyway
                    self._start_shutdown()
            elif number == signal.SIGINT:
                _exit_now(0, lambda: log.warning("stopped immediately"))

    def _has_lost_terminal(self) -> bool:
        """Return whether the terminal that the relay was started from was closed."""
        return self._terminal is not None and not os.isatty(self._terminal)

    def _enforce(self) -> None:
        self._signalled.wait()
        assert self.signalled_at is not None
        time.sleep(max(0.0, self.signalled_at + self._timeout_s - time.monotonic()))
        _exit_now(1, self._log_unfinished)

    def _log_unfinished(self) -> None:
        facts = {
            "timeout_s": self._timeout_s,
            "main_thread": _main_stack(),
            "tasks": self._list_tasks(),
        }
        log.error("shutdown timeout", extra=facts)


def _exit_now(status: int, write_log: Callable[[], object]) -> NoReturn:
    """Log a last line and exit, even if the line can't be written."""

    def write() -> None:
        write_log()
        flush_log()

    try:
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(LOG_S)
    finally:
        os._exit(status)


def flush_log() -> None:
    """Wait for a moment until the log is written."""
    # Not logging.shutdown: it holds the lock of a handler, which the thread that writes may need.
    for handler in logging.getLogger().handlers:
        handler.flush()


def _main_stack() -> str:
    """Return the stack of the main thread, the innermost call first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    calls = reversed(traceback.extract_stack(frame)[-STACK_FRAMES:])
    return ", ".join(f"{call.filename}:{call.lineno} {call.name}" for call in calls)
