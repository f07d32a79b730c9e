"""`websocket-relay healthcheck`: whether the relay with these settings is alive, or ready."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from websocket_relay.cli import healthcheck
from websocket_relay.cli.main import main

from tests.support.relay_process import CommandResult, RelayProcess, StartRelay, merged, run_command

DISABLED = {"enabled": False}

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "the defaults": {},
    "metrics off": {"metrics": DISABLED},
    "metrics off, and a base path": {"metrics": DISABLED, "server": {"base_path": "/relay"}},
    "the PROXY protocol from this machine, too": {
        "metrics": DISABLED,
        "server": {"trusted_proxies": ["127.0.0.0/8"], "proxy_protocol": True},
    },
    "all IPv4 addresses": {"metrics": {"host": "0.0.0.0"}},
    "all IPv6 addresses": {"metrics": DISABLED, "server": {"host": "::"}},
}


def check_health(relay: RelayProcess, directory: Path, *options: str) -> CommandResult:
    """Run the command with the settings of a relay; the ports come from the environment."""
    (directory / "checked.yaml").write_text(yaml.safe_dump(relay.settings))
    ports = {"RELAY__SERVER__PORT": str(relay.port)}
    if relay.settings["metrics"].get("enabled", True):
        ports["RELAY__METRICS__PORT"] = str(relay.metrics_port)
    arguments = ("healthcheck", "--config-file", "checked.yaml", *options)
    return run_command(*arguments, directory=directory, env=ports)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_relay_that_serves_is_healthy(relay_with: StartRelay, tmp_path: Path, name: str) -> None:
    relay = relay_with(**SETTINGS[name])
    assert check_health(relay, tmp_path) == CommandResult(0, "", "")
    assert check_health(relay, tmp_path, "--ready") == CommandResult(0, "", "")


@pytest.mark.parametrize("metrics", [True, False], ids=["metrics", "no metrics"])
def test_a_relay_with_tls_is_healthy(
    tls_relay_with: StartRelay, tmp_path: Path, metrics: bool
) -> None:
    relay = tls_relay_with(metrics={"enabled": metrics})
    assert check_health(relay, tmp_path) == CommandResult(0, "", "")


def test_a_relay_that_waits_for_its_broker_is_healthy_and_not_ready(tmp_path: Path) -> None:
    relay = RelayProcess(tmp_path, {"backplane": {"url": "redis://127.0.0.1:1/0"}})
    try:
        relay.start()
        relay.block_until_logged("relay listening")
        assert check_health(relay, tmp_path) == CommandResult(0, "", "")
        reason = "/readyz answers 503: waiting for the backplane"
        line = f"websocket-relay: 127.0.0.1:{relay.metrics_port}{reason}\n"
        assert check_health(relay, tmp_path, "--ready") == CommandResult(1, "", line)
    finally:
        relay.end()


def test_a_relay_that_hangs_is_not_healthy(
    relay_with: StartRelay,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command runs in this process, where its time-out can be shorter."""
    monkeypatch.setattr(healthcheck, "TIMEOUT_S", 0.1)
    relay = relay_with()
    port = relay.metrics_port
    file = tmp_path / "checked.yaml"
    file.write_text(yaml.safe_dump(merged(relay.settings, {"metrics": {"port": port}})))
    relay.signal(signal.SIGSTOP)
    exit_code = main(["healthcheck", "--config-file", str(file)])
    relay.signal(signal.SIGCONT)
    stdout, stderr = capsys.readouterr()
    assert (exit_code, stdout) == (1, "")
    (line,) = stderr.splitlines()
    assert line.startswith(f"websocket-relay: no answer from 127.0.0.1:{port}: ")


def test_a_relay_that_has_ended_is_not_healthy(relay_with: StartRelay, tmp_path: Path) -> None:
    relay = relay_with()
    relay.end()
    done = check_health(relay, tmp_path)
    assert done.exit_code == 1
    assert len(done.error_lines) == 1


def test_invalid_settings_end_with_2(tmp_path: Path) -> None:
    done = run_command("healthcheck", directory=tmp_path, env={"RELAY__METRICS__PORTS": "1"})
    assert done.exit_code == 2
    assert len(done.error_lines) == 1
