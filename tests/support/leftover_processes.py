"""Kill the processes that tests started, when the process that runs the tests has ended.

Fixtures end the processes that they start. A worker that crashes, or that a time limit ends, runs
no teardown of a fixture. A small process therefore waits for the end of the worker, and kills all
processes that have the worker's mark in their environment (Linux: in /proc).
"""

import os
import subprocess
import sys
import uuid

import pytest

VARIABLE = "PROCESS_OF_TESTS"

KILLER = """\
import os, signal, sys, time

sys.stdin.read()  # its other end is closed when the process of the tests has ended
mark = sys.argv[1].encode()
deadline = time.monotonic() + 10
found = os.path.isdir("/proc")
while found and time.monotonic() < deadline:  # a killed process may just have started another one
    found = False
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if mark in file.read().split(b"\\0"):
                    os.kill(int(pid), signal.SIGKILL)
                    found = True
        except OSError:  # it has ended, or belongs to another user
            pass
"""


def kill_when_this_process_ends(config: pytest.Config) -> None:
    """Mark the environment, and start the process that waits for the end of this one."""
    unmarked = {name: value for name, value in os.environ.items() if name != VARIABLE}
    mark = os.environ[VARIABLE] = uuid.uuid4().hex
    killer = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", KILLER, f"{VARIABLE}={mark}"],
        env=unmarked,  # the killer of an outer test run must not kill it
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C must not end it
    )

    def end() -> None:
        assert killer.stdin is not None
        killer.stdin.close()
        killer.wait()

    config.add_cleanup(end)
