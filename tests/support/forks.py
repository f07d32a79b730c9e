"""Run the relay and its commands as forks of a process that has imported the relay already.

An interpreter that starts and imports the relay takes half a second of processor time; a fork takes
a hundredth of a second. A fork is a process like any other: it has its own event loop, working
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
MAX_REQUEST_BYTES = 262_144  # an environment, mostly
MAX_DESCRIPTORS = 65_536


class ForkedProcess:
    """A process, with what the tests need of `subprocess.Popen`.

    Args:
        pid: of the process.
        stderr: the end of its standard error that is read.
        status: a pipe with its exit status, once it has ended.
    """

    def __init__(self, pid: int, stderr: IO[str], status: int) -> None:
        self.pid = pid
        self.stderr = stderr
        self.returncode: int | None = None
        self._status = status
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs; negative: the signal that ended it."""
        with self._lock:
            if self.returncode is None and select.select([self._status], [], [], 0)[0]:
                (self.returncode,) = STATUS.unpack(os.read(self._status, STATUS.size))
                os.close(self._status)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("relay", timeout or 0)
            with suppress(OSError, ValueError):  # another thread has seen the end
                select.select([self._status], [], [], 0.05)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Starts processes; the one that forks is started when it is first needed."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._lock = threading.Lock()

    def run(
        self, arguments: Sequence[str], directory: Path, env: Mapping[str, str], timeout_s: float
    ) -> tuple[int, str, str]:
        """Run a command to its end, which is at the time-out; see `start`.

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
            directory: where it works.
            env: all of its environment.
            stdout: its standard output, which the caller closes.
            max_descriptors: its hard limit of open files (RLIMIT_NOFILE); None: that of the tests.
        """
        status, write_status = os.pipe()
        stderr, write_stderr = os.pipe()
        theirs = [write_stderr, write_status]
        request = {
            "arguments": arguments,
            "directory": str(directory),
            "env": dict(env),
            "max_descriptors": max_descriptors,
        }
        with self._lock:
            if self._control is None:
                self._control = self._launch()
            socket.send_fds(self._control, [json.dumps(request).encode()], [stdout, *theirs])
            (pid,) = STATUS.unpack(self._control.recv(STATUS.size))
        for descriptor in theirs:
            os.close(descriptor)
        return ForkedProcess(pid, open(stderr, encoding="utf-8"), status)

    def _launch(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_REQUEST_BYTES)
        with theirs:
            # It ends when this process, and with it the other end of the socket, has ended.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.forks", str(theirs.fileno())],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        return ours


FORK_SERVER = ForkServer()


# In the process that forks


def serve(control: socket.socket) -> bool:
    """Fork for each request; return whether this is a fork."""
    awake, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([control.fileno(), awake], [], [])
        if awake in ready:
            os.read(awake, 1024)
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
            with suppress(OSError):  # nobody asks any more
                os.write(pipe, STATUS.pack(os.waitstatus_to_exitcode(status)))
            os.close(pipe)


def _prepare_fork(request: Mapping[str, object], stdout: int, stderr: int) -> None:
    """Be like a new interpreter that was started for the request."""
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
    """Serve; in a fork, run the command."""
    import websocket_relay
    from websocket_relay.__main__ import main as run

    # Also the modules that the relay imports only where settings ask for them. Of tracing, a relay
    # without a collector must not have anything.
    for module in pkgutil.walk_packages(websocket_relay.__path__, "websocket_relay."):
        if module.name.rpartition(".")[2] not in ("__main__", "tracing"):
            importlib.import_module(module.name)
    gc.freeze()  # a collection in a fork would otherwise copy every page that it looks at
    return run() if serve(socket.socket(fileno=int(sys.argv[1]))) else 0


if __name__ == "__main__":
    sys.exit(main())
