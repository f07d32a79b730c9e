"""The greeting of a relay at a terminal: addresses to open, and commands that work."""

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
from websocket_relay.server.sockets import ListeningAddress

from tests.support.certificates import make_pair
from tests.support.programs import PYTHON_DIRECTORY
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import QUIET_SETTINGS, environment, merged

PATHS = {"PATH": os.pathsep.join((PYTHON_DIRECTORY, os.environ["PATH"]))}


def greeting_lines(metrics_port: int | None = 9090, **settings: Any) -> dict[str, str]:
    """Return the lines of a greeting by their first words."""
    address = ListeningAddress("0.0.0.0", 8443)
    text = greeting(Settings(**settings), address, metrics_port, argv0="/x/websocket-relay")
    _, *lines = text.splitlines()
    return {word: rest.strip() for word, _, rest in (line.strip().partition(" ") for line in lines)}


@pytest.mark.fast
def test_addresses_are_those_of_a_client_on_the_same_machine() -> None:
    lines = greeting_lines()
    assert lines["clients"] == "ws://localhost:8443/ and ws://localhost:8443/channels/NAME"
    assert lines["console"] == "http://localhost:8443/"
    assert lines["metrics"] == "http://localhost:9090/metrics"
    assert lines["receive"].endswith(" listen ws://localhost:8443/")
    assert lines["send"].endswith(" send ws://localhost:8443/ hello")


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("*", "localhost"),
        ("0.0.0.0", "localhost"),
        ("::", "localhost"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "[::1]"),
        ("10.0.0.7, fd00::7", "10.0.0.7"),
        ("relay.example.com", "relay.example.com"),
    ],
)
@pytest.mark.fast
def test_a_host_is_shown_as_it_is_written_in_a_url(host: str, shown: str) -> None:
    lines = greeting_lines(server={"host": host}, metrics={"host": host})
    assert lines["console"] == f"http://{shown}:8443/"
    assert lines["metrics"] == f"http://{shown}:9090/metrics"


@pytest.mark.fast
def test_addresses_have_the_base_path() -> None:
    lines = greeting_lines(server={"base_path": "/relay"})
    assert lines["clients"].startswith("ws://localhost:8443/relay/ and")
    assert lines["console"] == "http://localhost:8443/relay/"


@pytest.mark.fast
def test_a_disabled_console_and_disabled_metrics_are_not_shown() -> None:
    assert "console" not in greeting_lines(console={"enabled": False})
    assert "metrics" not in greeting_lines(metrics_port=None)


@pytest.mark.fast
def test_commands_have_an_argument_for_the_token_if_one_is_required() -> None:
    lines = greeting_lines(auth={"mode": "jwt", "jwt": {"secret": "s" * 32}})
    assert " listen --token-file FILE ws://" in lines["receive"]


@pytest.mark.fast
@pytest.mark.parametrize(("proxy_protocol", "option"), [(False, ""), (True, " --haproxy-protocol")])
def test_the_check_of_a_unix_socket_sends_what_a_proxy_sends(
    proxy_protocol: bool, option: str
) -> None:
    server: Any = {"socket": "/run/relay.sock", "proxy_protocol": proxy_protocol}
    address = ListeningAddress("/run/relay.sock", None)
    text = greeting(Settings(server=server), address, None)
    command = "curl --unix-socket /run/relay.sock http://localhost/readyz"
    assert command.replace("curl", f"curl{option}") in text


@contextmanager
def running_relay(
    directory: Path, settings: Mapping[str, Any]
) -> Iterator["subprocess.Popen[str]"]:
    """Run a relay in an interpreter, with pipes as its standard output and error.

    A fork has another argv[0], which the greeting contains.
    """
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


def test_the_printed_commands_work_also_with_a_self_signed_certificate(tmp_path: Path) -> None:
    make_pair().write_to(tmp_path)
    files = {"cert_file": str(tmp_path / "cert.pem"), "key_file": str(tmp_path / "key.pem")}
    server = {"host": "localhost", "tls": {"enabled": True, **files}}
    with running_relay(tmp_path, {"logging": {"format": "text"}, "server": server}) as relay:
        assert relay.stdout is not None
        lines = {}
        while "send" not in lines:
            word, _, rest = relay.stdout.readline().strip().partition(" ")
            lines[word] = rest.strip()
        options: dict[str, Any] = {
            "cwd": tmp_path,
            "env": environment(PATHS),
            "text": True,
            "capture_output": True,
            "timeout": PATIENCE_S,
        }
        assert " wss://localhost:" in lines["send"]
        sent = subprocess.run(shlex.split(lines["send"]), check=False, **options)
        assert sent.returncode == 0, sent.stderr
        receive = [*shlex.split(lines["receive"]), "--history", "1", "--count", "1"]
        received = subprocess.run(receive, check=False, **options)
        assert received.stdout == "hello\n", received.stderr


def test_no_greeting_is_printed_beside_a_log_of_json(tmp_path: Path) -> None:
    with running_relay(tmp_path, {"logging": {"format": "json"}}) as relay:
        assert relay.stderr is not None
        assert any('"ready"' in line for line in relay.stderr)
        relay.send_signal(signal.SIGTERM)
        assert relay.communicate(timeout=PATIENCE_S)[0] == ""
