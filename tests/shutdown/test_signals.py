"""Signals at any moment: the relay ends with status 0, after one signal or twenty, and in time."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, Signals
from typing import Any

import pytest
import yaml
from websocket_relay.__main__ import OTHER_COMMANDS
from websocket_relay.server.signals import SIGNALS

from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import (
    QUIET_SETTINGS,
    ROOT,
    RelayProcess,
    StartRelay,
    environment,
    open_pipe_when_read,
    run_command,
)
from tests.support.stops import blocked_signals

OFFSETS_MS = (0, 10, 40, 160, 640)
"""After the start of the process. The interpreter takes some 20 ms, the imports several hundred."""

BURST = 20
"""Signals in a row."""

FIELDS = ("Name", "SigBlk")
"""Of /proc/[pid]/status, see proc(5)."""


async def test_at_any_moment_of_the_start_sigterm_ends_the_relay_with_0_and_others_do_not(
    tmp_path: Path,
) -> None:
    async def status_after(offset_ms: int) -> tuple[int, int, list[str]]:
        directory = tmp_path / str(offset_ms)
        directory.mkdir()
        relay = RelayProcess(directory)
        try:
            with blocked_signals():  # as the image does; before that, the kernel ends the process
                relay.launch()
            for number in (SIGHUP, SIGUSR1, SIGUSR2):
                relay.signal(number)
            await asyncio.sleep(offset_ms / 1000)
            return offset_ms, await relay.stop(), relay.unexpected_lines
        finally:
            await asyncio.to_thread(relay.end)

    ends = await asyncio.gather(*map(status_after, OFFSETS_MS))
    assert ends == [(offset_ms, 0, []) for offset_ms in OFFSETS_MS]


@pytest.mark.parametrize("number", [SIGTERM, SIGINT, SIGQUIT])
async def test_signals_during_the_whole_stop_end_the_relay_with_0(
    relay_with: StartRelay, number: Signals
) -> None:
    relay = relay_with(shutdown={"spread_s": 0, "timeout_s": 5})
    while relay.process.poll() is None:
        relay.signal(number)
        await asyncio.sleep(0.003)
    assert await relay.exit_code() == 0


async def test_a_closed_terminal_ends_the_relay(tmp_path: Path) -> None:
    """The kernel sends SIGHUP then, which reloads the settings otherwise."""
    master, slave = os.openpty()
    # The first terminal that the leader of a session opens becomes the session's terminal.
    process = relay_process(
        tmp_path,
        prefix=["/bin/sh", "-c", f'exec "$@" < {os.ttyname(slave)}', "sh"],
        env=environment({"RELAY__SHUTDOWN__SPREAD_S": "0"}),
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    os.close(slave)
    try:
        await asyncio.to_thread(read_until, process.stderr.fileno(), b'"ready"')
        os.close(master)
        assert await asyncio.to_thread(process.wait, PATIENCE_S) == 0
        assert b'"draining"' in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


async def test_twenty_signals_at_once_act_as_one(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 0, "timeout_s": 5})
    for _ in range(BURST):
        relay.signal()
    assert await relay.exit_code() == 0
    assert relay.log_events[-1]["event"] == "stopped"


HANGING = """
import sys, time
from websocket_relay.__main__ import main
from websocket_relay.server import run

def hang(*arguments, **options):
    time.sleep(3600)

run.close_all = hang
sys.exit(main())
"""


async def test_a_stop_that_hangs_is_ended_at_its_deadline(tmp_path: Path) -> None:
    timeout_s = 1.0
    process = relay_process(
        tmp_path,
        program=["-c", HANGING],
        env=environment({"RELAY__SHUTDOWN__TIMEOUT_S": str(timeout_s)}),
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        await asyncio.to_thread(read_until, process.stderr.fileno(), b"ready")
        started = time.monotonic()
        process.send_signal(SIGTERM)
        assert await asyncio.to_thread(process.wait, PATIENCE_S) == 1
        assert timeout_s <= time.monotonic() - started < timeout_s + 1
        last_line = process.stderr.read().splitlines()[-1]
        assert b"shutdown timeout" in last_line
        assert b"hang" in last_line
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def relay_process(
    directory: Path,
    prefix: Sequence[str] = (),
    program: Sequence[str] = ("-m", "websocket_relay"),
    **options: Any,
) -> "subprocess.Popen[bytes]":
    """Start a relay, with a command that starts it as a prefix."""
    file = directory / "relay.yaml"
    file.write_text(yaml.safe_dump(QUIET_SETTINGS))
    command = [*prefix, sys.executable, *program, "--config-file", str(file)]
    return subprocess.Popen(command, cwd=directory, **options)


def read_until(pipe: int, words: bytes) -> None:
    """Read a pipe until it contained these words."""
    seen = b""
    while words not in seen:
        piece = os.read(pipe, 65_536)
        assert piece, seen
        seen += piece


async def test_a_pending_name_resolution_does_not_delay_the_stop(tmp_path: Path) -> None:
    """The C library reads a file for the resolution; here it is a pipe without a writer."""
    os.mkfifo(tmp_path / "aliases")
    settings = {"backplane": {"url": "nats://broker:4222"}, "shutdown": {"timeout_s": 5}}
    relay = RelayProcess(tmp_path, settings, {"HOSTALIASES": str(tmp_path / "aliases")})
    try:
        relay.start()
        await relay.await_log("relay listening")
        started = time.monotonic()
        assert await relay.stop() == 0
        assert time.monotonic() - started < 5
        assert relay.log_events[-1]["event"] == "stopped"
    finally:
        relay.end()


async def test_a_signal_while_the_listening_address_is_resolved_ends_the_relay_with_0(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "aliases")
    settings = {"server": {"host": "elsewhere"}, "shutdown": {"timeout_s": 20}}
    relay = RelayProcess(tmp_path, settings, {"HOSTALIASES": str(tmp_path / "aliases")})
    try:
        relay.start()
        async with open_pipe_when_read(tmp_path / "aliases"):
            started = time.monotonic()
            assert await relay.stop() == 0
            assert time.monotonic() - started < 5
    finally:
        relay.end()


async def test_sigterm_kills_a_command_that_is_not_the_relay(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with blocked_signals():
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "websocket_relay", "check"), cwd=tmp_path, env=environment()
        )
    async with open_pipe_when_read(tmp_path / "config.yaml"), asyncio.timeout(PATIENCE_S):
        command.terminate()
        assert await command.wait() == -SIGTERM


def test_every_command_is_the_relay_or_is_killed_by_signals(tmp_path: Path) -> None:
    listed = run_command("--help", directory=tmp_path).stdout
    commands = re.findall(r"^    ([a-z-]+) ", listed, re.MULTILINE)
    assert {*commands} == OTHER_COMMANDS | {"serve"}


# Process 1, as in a container


def process_1() -> Sequence[str]:
    """Return the command that runs another as process 1 of a namespace; skip if there is none."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("unshare of util-linux is not installed")
    for user in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *user, "--fork", "--pid", "--mount-proc", "--kill-child"]
        if not subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
            return command
    pytest.skip("this user can't create a PID namespace")


def entrypoint() -> list[str]:
    """Return the entry point of the image without the relay's own command."""
    line = re.search(r"^ENTRYPOINT (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert line
    words: list[str] = json.loads(line[1])
    assert words.pop() == "websocket-relay"
    return words


def pid_of_process_1(parent: int) -> int:
    """Wait until a command runs as process 1, with its signals blocked; return its id outside.

    Args:
        parent: the process that created the namespace.
    """
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        for child in children:
            status = Path(f"/proc/{child}/status").read_text()
            name, blocked = (
                re.findall(rf"^{key}:\t(.*)$", status, re.MULTILINE)[0] for key in FIELDS
            )
            if name != "unshare" and int(blocked, 16) & 1 << SIGTERM - 1:
                return int(child)
        time.sleep(0.001)
    raise AssertionError("no process 1 blocks SIGTERM")


@pytest.mark.fast
def test_the_entry_point_of_the_image_blocks_every_signal_that_the_relay_receives() -> None:
    names = ",".join(each.name.removeprefix("SIG") for each in SIGNALS)
    assert entrypoint() == ["env", f"--block-signal={names}"]


async def test_a_signal_at_any_moment_ends_process_1_with_0(tmp_path: Path) -> None:
    prefix = [*process_1(), *entrypoint()]

    async def status_after(offset_ms: int, count: int) -> int:
        process = relay_process(tmp_path, prefix, env=environment(), stderr=subprocess.DEVNULL)
        try:
            number = await asyncio.to_thread(pid_of_process_1, process.pid)
            await asyncio.sleep(offset_ms / 1000)
            for _ in range(count):
                with suppress(ProcessLookupError):
                    os.kill(number, SIGTERM)
                await asyncio.sleep(0.005)
            return await asyncio.to_thread(process.wait, PATIENCE_S)
        finally:
            process.kill()
            process.wait()

    counts = [1 if number % 2 else BURST for number, _ in enumerate(OFFSETS_MS)]
    assert set(await asyncio.gather(*map(status_after, OFFSETS_MS, counts))) == {0}
