"""Run the relay and its commands as forks of a process that has already imported the relay.

An interpreter that starts and imports the relay takes half a second of CPU time; a fork takes a
hundredth of a second. A fork is a process like any other: it has its own event loop, working
directory, environment, files and memory, and ends as an interpreter does. Linux only.

A shell runs a fork by the program that `ForkServer.program` returns. It hands its arguments,
directory, environment, limits and standard streams to the fork, passes on the signals that it
receives, and ends as the fork ends.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

STATUS = struct.Struct("i")
MAX_REQUEST_BYTES = 262_144  # most of it is the environment
MAX_DESCRIPTORS = 65_536
EXIT_S = 5.0

# A path with spaces can't be an interpreter; for Python the line of the shell is a string.
PROGRAM = """\
#!/bin/sh
'''exec' "{python}" -IS "$0" "$@"
' '''
import json, os, resource, signal, socket, sys

SIGNALS = {{signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1,
           signal.SIGUSR2}}

signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
umask = os.umask(0)
os.umask(umask)
request = {{
    "arguments": sys.argv[1:],
    "directory": os.getcwd(),
    "env": dict(os.environ),
    "umask": umask,
    "descriptors": resource.getrlimit(resource.RLIMIT_NOFILE),
}}
control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, {max_request_bytes})
control.connect({address!r})
socket.send_fds(control, [json.dumps(request).encode()], [0, 1, 2])
_, (fork,), _, _ = socket.recv_fds(control, 1, 1)


def pass_on(number, frame):
    try:
        signal.pidfd_send_signal(fork, number)
    except ProcessLookupError:  # it has ended, and its status is on the way
        pass


for number in SIGNALS:
    signal.signal(number, pass_on)
signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
status = int.from_bytes(control.recv(4), sys.byteorder, signed=True)
if status < 0:
    if -status in SIGNALS:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


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
        self._address = f"\0relay-tests-{uuid.uuid4().hex}"
        self._program: Path | None = None

    def program(self) -> Path:
        """Return the path of a program `websocket-relay` that runs a command as a fork.

        See `PROGRAM`. It is alone in its directory.
        """
        with self._lock:
            self._launch_once()
            if self._program is None:
                directory = Path(tempfile.mkdtemp())
                atexit.register(shutil.rmtree, directory)
                self._program = directory / "websocket-relay"
                self._program.write_text(
                    PROGRAM.format(
                        python=sys.executable,
                        address=self._address,
                        max_request_bytes=MAX_REQUEST_BYTES,
                    )
                )
                self._program.chmod(0o755)
            return self._program

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
            "descriptors": None if max_descriptors is None else (max_descriptors, max_descriptors),
        }
        with self._lock:
            control = self._launch_once()
            socket.send_fds(control, [json.dumps(request).encode()], [stdout, *write_ends])
            (pid,) = STATUS.unpack(control.recv(STATUS.size))
        for descriptor in write_ends:
            os.close(descriptor)
        return ForkedProcess(pid, open(stderr, encoding="utf-8"), status)

    def _launch_once(self) -> socket.socket:
        if self._control is None:
            self._control = self._launch()
        return self._control

    def _launch(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_REQUEST_BYTES)
        programs = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        programs.bind(self._address)
        programs.listen(64)
        with theirs, programs:
            # It ends when the other end of the socket is closed, at the latest when this process
            # ends.
            descriptors = (theirs.fileno(), programs.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.forks", *map(str, descriptors)],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
            )
        atexit.register(self._close, ours)
        return ours

    def _close(self, control: socket.socket) -> None:
        """End the process that forks. Forks that are still running are not affected."""
        control.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_S)


FORK_SERVER = ForkServer()


# In the process that forks, and in the forks


def serve(control: socket.socket, programs: socket.socket) -> bool:
    """Fork for each request, until the tests end; return whether this process is a fork.

    Args:
        control: has requests of the tests, with descriptors for standard output and standard error,
            and a pipe for the exit status.
        programs: accepts connections of processes that run `PROGRAM`. Each has one request, with
            descriptors for standard input, output and error.
    """
    wakeup, write_wakeup = os.pipe()
    os.set_blocking(write_wakeup, False)
    signal.set_wakeup_fd(write_wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, int] = {}
    connected: dict[int, int] = {}
    while True:
        sockets = (control.fileno(), programs.fileno())
        ready, _, _ = select.select([wakeup, *sockets, *connected], [], [])
        if wakeup in ready:
            os.read(wakeup, 1024)
            _report_exits(running)
            connected = {each: pid for each, pid in connected.items() if pid in running}
        for connection in connected.keys() & {*ready}:  # its other end was killed
            os.kill(connected.pop(connection), signal.SIGKILL)
        if control.fileno() in ready:
            content, descriptors, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, 3)
            if not content:  # the tests have ended
                return False
            *streams, status = descriptors
            if not (pid := _fork(content, [None, *streams])):
                return True
            running[pid] = status
            control.send(STATUS.pack(pid))
        if programs.fileno() in ready:
            connection, pid = _fork_for_program(programs)
            if not pid:
                return True
            running[pid], connected[connection] = connection, pid


def _fork_for_program(programs: socket.socket) -> tuple[int, int]:
    """Accept a connection and fork for its request; return its descriptor and the process id."""
    connection, _ = programs.accept()
    content, streams, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 3)
    if not (pid := _fork(content, streams)):
        return 0, 0
    handle = os.pidfd_open(pid)
    with suppress(OSError):  # the program was killed
        socket.send_fds(connection, [b"\0"], [handle])
    os.close(handle)
    return connection.detach(), pid


def _fork(content: bytes, streams: Sequence[int | None]) -> int:
    """Fork, and close the streams here; return the process id, or 0 in the fork."""
    pid = os.fork()
    if pid == 0:
        _prepare_fork(json.loads(content), streams)
        return 0
    for each in filter(None, streams):
        os.close(each)
    return pid


def _report_exits(running: dict[int, int]) -> None:
    """Write the status of each fork that has ended into its pipe."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            pipe = running.pop(pid)
            with suppress(OSError):  # the reading end is closed
                os.write(pipe, STATUS.pack(os.waitstatus_to_exitcode(status)))
            os.close(pipe)


def _prepare_fork(request: Mapping[str, object], streams: Sequence[int | None]) -> None:
    """Give a fork the state of a new interpreter with the arguments of the request.

    Args:
        request: see `ForkServer.start` and `PROGRAM`.
        streams: descriptors that become standard input, output and error; None: unchanged.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, descriptor in enumerate(streams):
        if descriptor is not None:
            os.dup2(descriptor, number)
    os.closerange(3, MAX_DESCRIPTORS)
    env, directory, arguments = request["env"], request["directory"], request["arguments"]
    assert isinstance(env, dict)
    assert isinstance(directory, str)
    assert isinstance(arguments, list)
    if (limits := request["descriptors"]) is not None:
        assert isinstance(limits, list)
        soft, hard = limits
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if (umask := request.get("umask")) is not None:
        assert isinstance(umask, int)
        os.umask(umask)
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
    control, programs = (socket.socket(fileno=int(each)) for each in sys.argv[1:])
    return run() if serve(control, programs) else 0


if __name__ == "__main__":
    sys.exit(main())
