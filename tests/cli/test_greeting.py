"""What the relay prints for who has started it: addresses to open, and commands that work."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from websocket_relay.config.model import Settings
from websocket_relay.server.greeting import greeting

from tests.support.certificates import make_pair
from tests.support.programs import BESIDE_PYTHON
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import QUIET_SETTINGS, environment, merged

PATHS = {"PATH": os.pathsep.join((BESIDE_PYTHON, os.environ["PATH"]))}


def told(metrics_port: int | None = 9090, **settings: Any) -> dict[str, str]:
    """Return what the lines of a greeting say, by their first words."""
    text = greeting(Settings(**settings), 8443, metrics_port, argv0="/x/websocket-relay")
    _, *lines = text.splitlines()
    return {word: what.strip() for word, _, what in (line.strip().partition(" ") for line in lines)}


@pytest.mark.fast
def test_addresses_are_those_that_a_client_on_the_same_machine_uses() -> None:
    lines = told()
    assert lines["clients"] == "ws://localhost:8443/ and ws://localhost:8443/channels/NAME"
    assert lines["console"] == "http://localhost:8443/"
    assert lines["metrics"] == "http://localhost:9090/metrics"
    assert lines["receive"].endswith(" listen ws://localhost:8443/")
    assert lines["send"].endswith(" send ws://localhost:8443/ hello")


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("0.0.0.0", "localhost"),
        ("::", "localhost"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "[::1]"),
        ("relay.example.com", "relay.example.com"),
    ],
)
@pytest.mark.fast
def test_a_host_is_shown_as_it_stands_in_an_address(host: str, shown: str) -> None:
    lines = told(server={"host": host}, metrics={"host": host})
    assert lines["console"] == f"http://{shown}:8443/"
    assert lines["metrics"] == f"http://{shown}:9090/metrics"


@pytest.mark.fast
def test_addresses_have_the_base_path() -> None:
    lines = told(server={"base_path": "/relay"})
    assert lines["clients"].startswith("ws://localhost:8443/relay/ and")
    assert lines["console"] == "http://localhost:8443/relay/"


@pytest.mark.fast
def test_what_is_switched_off_is_not_shown() -> None:
    assert "console" not in told(console={"enabled": False})
    assert "metrics" not in told(metrics_port=None)


@pytest.mark.fast
def test_commands_have_a_place_for_the_token_where_one_is_required() -> None:
    lines = told(auth={"mode": "jwt", "jwt": {"secret": "s" * 32}})
    assert " listen --token-file FILE ws://" in lines["receive"]


@contextmanager
def started(directory: Path, settings: Mapping[str, Any]) -> Iterator["subprocess.Popen[str]"]:
    """Start a relay whose standard output is read."""
    file = directory / "relay.yaml"
    file.write_text(yaml.safe_dump(merged(QUIET_SETTINGS, settings)))
    command = [sys.executable, "-m", "websocket_relay", "--config-file", str(file)]
    with subprocess.Popen(
        command,
        env=environment(PATHS),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("tls", [False, True], ids=["ws", "wss"])
def test_the_commands_that_are_printed_work(tmp_path: Path, tls: bool) -> None:
    settings: dict[str, Any] = {"logging": {"format": "text"}}
    if tls:
        make_pair().write_to(tmp_path)
        files = {"cert_file": str(tmp_path / "cert.pem"), "key_file": str(tmp_path / "key.pem")}
        settings["server"] = {"host": "localhost", "tls": {"enabled": True, **files}}
    with started(tmp_path, settings) as relay:
        assert relay.stdout is not None
        lines = {}
        while "send" not in lines:
            word, _, what = relay.stdout.readline().strip().partition(" ")
            lines[word] = what.strip()
        run: dict[str, Any] = {
            "cwd": tmp_path,
            "env": environment(PATHS),
            "text": True,
            "capture_output": True,
            "timeout": PATIENCE_S,
        }
        sent = subprocess.run(shlex.split(lines["send"]), check=False, **run)
        assert sent.returncode == 0, sent.stderr
        receive = [*shlex.split(lines["receive"]), "--history", "1", "--count", "1"]
        received = subprocess.run(receive, check=False, **run)
        assert received.stdout == "hello\n", received.stderr


def test_with_a_log_for_machines_nothing_is_printed(tmp_path: Path) -> None:
    with started(tmp_path, {"logging": {"format": "json"}}) as relay:
        assert relay.stderr is not None
        assert any('"ready"' in line for line in relay.stderr)
        relay.send_signal(signal.SIGTERM)
        assert relay.communicate(timeout=PATIENCE_S)[0] == ""
