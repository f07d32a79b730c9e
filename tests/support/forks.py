"""Run the relay and its commands as forks of a process that has already imported the relay.

An interpreter that starts and imports the relay takes half a second of CPU time; a fork takes a
hundredth of a second. A fork is a process like any other: it has its own event loop, working
directory, environment, files and memory, and ends as an interpreter does. Linux only.
"""

import gc
import importlib
import json
import os
import pkgutil
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

STATUS = struct.Struct("i")
MAX_REQUEST_BYTES = 262_144  # most of it is the environment
MAX_DESCRIPTORS = 65_536


class ForkedProcess:
    """A fork, with the part of the interface of `subprocess.Popen` that tests use.

    Args:
        pid: of the process.
        stderr: the reading end of its standard error.
        status: the reading end of a pipe that contains the exit status after the process ends.
    """

    def __init__(self, pid: int, stderr: IO[str], status: int) -> None:
        self.pid = pid
        self.stderr = stderr
        self.returncode: int | None = None
        self._status = status
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Return the exit status; None while it runs; below 0: the signal that ended it."""
        with self._lock:
            if self.returncode is None and select.select([self._status], [], [], 0)[0]:
                (self.returncode,) = STATUS.unpack(os.read(self._status, STATUS.size))
                os.close(self._status)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process; return its exit status.

        Raises:
            subprocess.TimeoutExpired: it is still running.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("relay", timeout or 0)
            with suppress(OSError, ValueError):  # another thread has read the status
                select.select([self._status], [], [], 0.05)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, if the process is running."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended, and its status is on the way
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, if the process is running."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Starts forks. The process that forks starts at the first use."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._lock = threading.Lock()

    def run(
        self, arguments: Sequence[str], directory: Path, env: Mapping[str, str], timeout_s: float
    ) -> tuple[int, str, str]:
        """Run a command to its end; kill it after the timeout. See `start`.

        Returns:
            Its exit status, standard output and standard error.
        """
        with tempfile.TemporaryFile("w+", encoding="utf-8") as stdout:
            process = self.start(arguments, directory, env, stdout.fileno())
            clock = threading.Timer(timeout_s, process.kill)
            clock.start()
            with process.stderr:
                errors = process.stderr.read()
            code = process.wait()
            clock.cancel()
            stdout.seek(0)
            return code, stdout.read(), errors

    def start(
        self,
        arguments: Sequence[str],
        directory: Path,
        env: Mapping[str, str],
        stdout: int,
        *,
        max_descriptors: int | None = None,
    ) -> ForkedProcess:
        """Start a command.

        Args:
            arguments: of the command line.
            directory: its working directory.
            env: its whole environment.
            stdout: its standard output, which the caller closes.
            max_descriptors: its limit of open files (RLIMIT_NOFILE, soft and hard); None: the limit
                of the tests.
        """
        status, write_status = os.pipe()
        stderr, write_stderr = os.pipe()
        write_ends = [write_stderr, write_status]
        request = {
            "arguments": arguments,
            "directory": str(directory),
            "env": dict(env),
            "max_descriptors": max_descriptors,
        }
        with self._lock:
            if self._control is None:
                self._control = self._launch()
            socket.send_fds(self._control, [json.dumps(request).encode()], [stdout, *write_ends])
            (pid,) = STATUS.unpack(self._control.recv(STATUS.size))
        for descriptor in write_ends:
            os.close(descriptor)
        return ForkedProcess(pid, open(stderr, encoding="utf-8"), status)

    def _launch(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_REQUEST_BYTES)
        with theirs:
            # It ends when the other end of the socket is closed, at the latest when this process
            # ends.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.forks", str(theirs.fileno())],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        return ours


FORK_SERVER = ForkServer()


# In the process that forks, and in the forks


def serve(control: socket.socket) -> bool:
    """Fork for each request, until the tests end; return whether this process is a fork."""
    wakeup, write_wakeup = os.pipe()
    os.set_blocking(write_wakeup, False)
    signal.set_wakeup_fd(write_wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([control.fileno(), wakeup], [], [])
        if wakeup in ready:
            os.read(wakeup, 1024)
            _report_exits(running)
        if control.fileno() in ready:
            content, descriptors, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, 3)
            if not content:  # the tests have ended
                return False
            stdout, stderr, status = descriptors
            pid = os.fork()
            if pid == 0:
                _prepare_fork(json.loads(content), stdout, stderr)
                return True
            os.close(stdout)
            os.close(stderr)
            running[pid] = status
            control.send(STATUS.pack(pid))


def _report_exits(running: dict[int, int]) -> None:
    """Write the status of each fork that has ended into its pipe."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            pipe = running.pop(pid)
            with suppress(OSError):  # the reading end is closed
                os.write(pipe, STATUS.pack(os.waitstatus_to_exitcode(status)))
            os.close(pipe)


def _prepare_fork(request: Mapping[str, object], stdout: int, stderr: int) -> None:
    """Give a fork the state of a new interpreter with the arguments of the request."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.closerange(3, MAX_DESCRIPTORS)
    env, directory, arguments = request["env"], request["directory"], request["arguments"]
    assert isinstance(env, dict)
    assert isinstance(directory, str)
    assert isinstance(arguments, list)
    if (limit := request["max_descriptors"]) is not None:
        assert isinstance(limit, int)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[1:] = arguments


def main() -> int:
    """Serve requests; in a fork, run its command."""

    import websocket_relay
    from websocket_relay.__main__ import main as run

    # Import also the modules that the relay imports only with some settings, except `tracing`: a
    # relay that exports no traces must not have imported it.
    for module in pkgutil.walk_packages(websocket_relay.__path__, "websocket_relay."):
        if module.name.rpartition(".")[2] not in ("__main__", "tracing"):
            importlib.import_module(module.name)
    gc.freeze()  # otherwise a collection in a fork copies every page of memory that it visits
    return run() if serve(socket.socket(fileno=int(sys.argv[1]))) else 0


if __name__ == "__main__":
    sys.exit(main())
