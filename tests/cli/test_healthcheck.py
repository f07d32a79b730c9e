"""`websocket-relay healthcheck`: the relay that these settings describe, asked from beside it."""

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.relay_process import Finished, Relay, StartRelay, run_command

OFF = {"enabled": False}

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "the defaults": {},
    "no metrics": {"metrics": OFF},
    "no metrics, and a path prefix": {"metrics": OFF, "server": {"base_path": "/relay"}},
    "every address": {"metrics": {"host": "0.0.0.0"}},
    "every address of IPv6": {"metrics": OFF, "server": {"host": "::"}},
}


def ask(relay: Relay, directory: Path) -> Finished:
    """Run the command with the relay's settings and, from the environment, its ports."""
    (directory / "asked.yaml").write_text(yaml.safe_dump(relay.settings))
    ports = {"RELAY__SERVER__PORT": str(relay.port)}
    if relay.settings["metrics"].get("enabled", True):
        ports["RELAY__METRICS__PORT"] = str(relay.metrics_port)
    return run_command("healthcheck", "--config-file", "asked.yaml", directory=directory, env=ports)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_relay_that_serves_is_alive(relay_with: StartRelay, tmp_path: Path, name: str) -> None:
    assert ask(relay_with(**SETTINGS[name]), tmp_path) == Finished(0, "", "")


@pytest.mark.parametrize("metrics", [True, False])
def test_a_relay_that_speaks_tls_is_alive(
    tls_relay_with: StartRelay, tmp_path: Path, metrics: bool
) -> None:
    relay = tls_relay_with(metrics={"enabled": metrics})
    assert ask(relay, tmp_path) == Finished(0, "", "")


def test_a_relay_that_waits_for_its_broker_is_alive(tmp_path: Path) -> None:
    relay = Relay(tmp_path, {"backplane": {"url": "redis://127.0.0.1:1/0"}})
    try:
        relay.start()
        relay.await_log("relay listening")
        assert ask(relay, tmp_path) == Finished(0, "", "")
    finally:
        relay.end()


def test_a_relay_that_hangs_is_not_alive(relay_with: StartRelay, tmp_path: Path) -> None:
    relay = relay_with()
    relay.signal(signal.SIGSTOP)
    done = ask(relay, tmp_path)
    relay.signal(signal.SIGCONT)
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.error_lines
    assert line.startswith(f"websocket-relay: no answer from 127.0.0.1:{relay.metrics_port}: ")


def test_a_relay_that_is_gone_is_not_alive(relay_with: StartRelay, tmp_path: Path) -> None:
    relay = relay_with()
    relay.end()
    done = ask(relay, tmp_path)
    assert done.exit_code == 1
    assert len(done.error_lines) == 1


def test_settings_that_can_t_be_used_end_with_2(tmp_path: Path) -> None:
    done = run_command("healthcheck", directory=tmp_path, env={"RELAY__METRICS__PORTS": "1"})
    assert done.exit_code == 2
    assert len(done.error_lines) == 1
