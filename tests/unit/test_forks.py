"""The program that runs a command of the relay as a fork: it ends, and is ended, as the fork."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL, SIGTERM

import pytest
import yaml

from tests.support.forks import FORK_SERVER
from tests.support.project import PROJECT
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import QUIET_SETTINGS, environment


@contextmanager
def running_relay(directory: Path) -> Iterator["subprocess.Popen[str]"]:
    """Run a relay by the program, and wait until it is ready."""
    file = directory / "relay.yaml"
    file.write_text(yaml.safe_dump(dict(QUIET_SETTINGS)))
    command = [str(FORK_SERVER.program()), "--config-file", str(file)]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert any('"ready"' in line for line in process.stderr)
            yield process
        finally:
            process.kill()


def test_arguments_streams_and_status_are_those_of_the_fork() -> None:
    command = [str(FORK_SERVER.program()), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert PROJECT["project"]["version"] in done.stdout
    assert done.stderr == ""
    with pytest.raises(subprocess.CalledProcessError, match="exit status 2"):
        subprocess.run([command[0], "fly"], stderr=subprocess.DEVNULL, check=True)


def test_directory_limits_and_umask_are_those_of_the_program(tmp_path: Path) -> None:
    command = 'umask 027 && ulimit -n 100 && "$0" dev-cert && "$0" check'
    done = subprocess.run(
        ["sh", "-c", command, str(FORK_SERVER.program())],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert (tmp_path / "cert.pem").stat().st_mode & 0o777 == 0o640
    assert "too few file descriptors (limit: 100" in done.stderr


def test_a_signal_is_passed_on_to_the_fork(tmp_path: Path) -> None:
    with running_relay(tmp_path) as process:
        process.send_signal(SIGTERM)
        assert process.stderr is not None
        assert '"stopped"' in process.stderr.read()
        assert process.wait(PATIENCE_S) == 0


def test_the_fork_of_a_killed_program_is_killed(tmp_path: Path) -> None:
    with running_relay(tmp_path) as process:
        process.send_signal(SIGKILL)
        assert process.stderr is not None
        assert '"stopped"' not in process.stderr.read()  # to the end, when the fork has closed it
