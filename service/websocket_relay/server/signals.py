"""Receive SIGTERM and SIGINT, and end the process in time. Knows no event loop and no setting.

Both signals are blocked in all threads, from before the imports that take time until the process
ends, and one thread waits for them. So they neither interrupt nor kill the process, also while the
interpreter ends and has taken back its handlers. And the kernel keeps a blocked signal for process
1 of a container, whereas it discards one that has no handler yet (pid_namespaces(7)).
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

SIGNALS = (signal.SIGTERM, signal.SIGINT)

LOG_S = 0.2
"""Standard error may be a pipe that nobody reads: a last line is given up after this time."""

STACK_FRAMES = 3

CAN_BLOCK = hasattr(signal, "pthread_sigmask")
"""Not on Windows, where the clients' commands run, too."""


def unblock() -> None:
    """Let signals do what they do by default, where the process was started with them blocked."""
    if CAN_BLOCK:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def leave(status: int) -> NoReturn:
    """End the process without the interpreter's own end.

    That one waits for threads, and a thread that looks up a name may take a minute. It would also
    take apart all objects of all clients, one by one.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


class Stop:
    """The request to stop, and the deadline of the stop.

    Until `attach` there is nothing to stop: a signal ends the process at once, with status 0.

    Attributes:
        asked_at: when the first signal came, by `time.monotonic`; None: none did.
    """

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self._asked = threading.Event()
        self._begin: Callable[[], object] | None = None
        self._timeout_s = 0.0
        self._tasks: Callable[[], str] = str
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        # Started now: when a stop begins there may be no room for another thread.
        for target in (self._receive, self._enforce):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def attach(
        self,
        begin: Callable[[], object],
        timeout_s: float,
        tasks: Callable[[], str],
    ) -> None:
        """Have the first signal begin a stop.

        Args:
            begin: begins it; called in another thread.
            timeout_s: the process is ended so long after the signal.
            tasks: lists what runs still, for the log; called in another thread.
        """
        self._timeout_s, self._tasks = timeout_s, tasks
        self._begin = begin

    def _receive(self) -> None:
        while True:
            number = signal.sigwait(SIGNALS)
            if self._begin is None:
                os._exit(0)
            if self.asked_at is None:
                self.asked_at = time.monotonic()
                self._asked.set()
                with suppress(RuntimeError):  # the event loop is closed: the relay ends anyway
                    self._begin()
            elif number == signal.SIGINT:
                _end(0, lambda: log.warning("stopped at once"))

    def _enforce(self) -> None:
        self._asked.wait()
        assert self.asked_at is not None
        time.sleep(max(0.0, self.asked_at + self._timeout_s - time.monotonic()))
        _end(1, self._log_unfinished)

    def _log_unfinished(self) -> None:
        facts = {
            "timeout_s": self._timeout_s,
            "main_thread": _main_stack(),
            "tasks": self._tasks(),
        }
        log.error("stop not finished in time", extra=facts)


def _end(status: int, tell: Callable[[], object]) -> NoReturn:
    """Log a last line, and end the process, whether that line could be written or not."""
    try:
        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        telling.join(LOG_S)
    finally:
        os._exit(status)


def _main_stack() -> str:
    """Return where the main thread is, the innermost call first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    calls = reversed(traceback.extract_stack(frame)[-STACK_FRAMES:])
    return ", ".join(f"{call.filename}:{call.lineno} {call.name}" for call in calls)
