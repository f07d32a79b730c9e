"""A log whose reader stalls, has ended, or never was: it blocks no message and no stop."""

import asyncio
import logging
import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGTERM

import httpx2
import pytest
import yaml
from websocket_relay.logs import FLUSH_S, MAX_PENDING_BYTES, LineWriter
from websockets.asyncio.client import connect

from tests.support.brokers import free_port
from tests.support.log_pipe import LogPipe, relay_with_log_pipe
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import (
    HOST,
    NO_CA,
    QUIET_SETTINGS,
    environment,
    eventually,
    merged,
    receive,
)

SETTINGS = {"logging": {"level": "debug"}, "shutdown": {"spread_s": 0}}


async def assert_relays(port: int) -> None:
    """Assert that a message reaches its sender, and that later connections are served."""
    for _ in range(3):  # each leaves a line in the log
        async with connect(f"ws://{HOST}:{port}/channels/news", proxy=None) as client:
            await client.send("hello")
            assert await receive(client) == "hello"


async def test_a_reader_that_stalls_blocks_no_message_and_no_stop_and_misses_no_line(
    tmp_path: Path,
) -> None:
    with relay_with_log_pipe(tmp_path, SETTINGS) as (process, pipe):
        events = await asyncio.to_thread(pipe.read_until, '"ready"')
        (port,) = [each["port"] for each in events if each["event"] == "relay listening"]
        pipe.fill()
        await assert_relays(port)
        lines = await asyncio.to_thread(pipe.read_until, '"client disconnected"', count=3)
        assert [line["event"] for line in lines[len(events) :]] == ["client disconnected"] * 3
        pipe.fill()
        started = time.monotonic()
        process.send_signal(SIGTERM)
        assert await asyncio.to_thread(process.wait, PATIENCE_S) == 0
        assert time.monotonic() - started < 5  # of shutdown.timeout_s: 10


async def test_lines_without_a_reader_are_counted(tmp_path: Path) -> None:
    with relay_with_log_pipe(tmp_path, SETTINGS) as (process, pipe):
        events = await asyncio.to_thread(pipe.read_until, '"ready"')
        ports = {each["event"]: each["port"] for each in events if "port" in each}
        process.stderr.close()
        await assert_relays(ports["relay listening"])

        async def are_counted() -> tuple[bool, object]:
            text = await get(ports["metrics listening"], "/metrics")
            return "websocket_log_lines_dropped_total 3.0" in text, text

        await eventually(are_counted, "3 lines are dropped")


async def get(port: int, path: str) -> str:
    """Return the response to a request, or an error in words."""
    async with httpx2.AsyncClient(verify=NO_CA, trust_env=False) as http:
        try:
            return (await http.get(f"http://{HOST}:{port}{path}")).text
        except httpx2.TransportError as error:
            return str(error)


async def test_a_relay_without_standard_streams_serves_and_stops(tmp_path: Path) -> None:
    """Otherwise sockets would have their numbers, and receive what is written to them."""
    port = free_port()
    settings = merged(QUIET_SETTINGS, {"server": {"port": port}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    process = await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", 'exec "$0" -m websocket_relay <&- >&- 2>&-', sys.executable),
        cwd=tmp_path,
        env=environment(),
    )
    try:

        async def is_ready() -> tuple[bool, object]:
            text = await get(port, "/readyz")
            return text == '{"status":"ready"}', text

        await eventually(is_ready, "ready")
        await assert_relays(port)
        assert standard_streams(process.pid) == [Path(os.devnull)] * 3
        process.send_signal(SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def standard_streams(pid: int) -> list[Path]:
    """Return what the first three descriptors of a process are."""
    return [Path(f"/proc/{pid}/fd/{number}").readlink() for number in range(3)]


# The writer


class OpenPipe(LogPipe):
    """A pipe, with both ends."""

    def __init__(self) -> None:
        reading, self.writing = os.pipe()
        super().__init__(reading, f"/proc/self/fd/{self.writing}")


@pytest.fixture
def pipe() -> Iterator[OpenPipe]:
    open_pipe = OpenPipe()
    yield open_pipe
    os.close(open_pipe.reading)
    os.close(open_pipe.writing)


@pytest.fixture
def writer(pipe: OpenPipe) -> Iterator[LineWriter]:
    """A writer of the root logger's lines to the pipe."""
    line_writer = LineWriter(pipe.writing)
    line_writer.setFormatter(logging.Formatter('{"event": "%(message)s"}'))
    logging.getLogger().addHandler(line_writer)
    yield line_writer
    logging.getLogger().removeHandler(line_writer)


@pytest.mark.fast
def test_lines_above_the_bound_are_dropped_counted_and_reported(
    pipe: OpenPipe, writer: LineWriter
) -> None:
    pipe.fill()
    size, log = 10_000, logging.getLogger("test")
    for number in range(2 * MAX_PENDING_BYTES // size):
        log.warning("%05d%s", number, "x" * size)
    kept = MAX_PENDING_BYTES // (size + 20)
    assert writer.dropped == 2 * MAX_PENDING_BYTES // size - kept
    events = [line["event"] for line in pipe.read_until("log lines dropped")]
    assert [event[:5] for event in events[:-1]] == [f"{number:05}" for number in range(kept)]


@pytest.mark.fast
def test_the_end_waits_for_the_reader_and_no_longer_than_allowed(
    pipe: OpenPipe, writer: LineWriter
) -> None:
    log = logging.getLogger("test")
    log.warning("first")
    writer.flush()
    assert select.select([pipe.reading], [], [], 0)[0], "the line was written"
    pipe.fill()
    log.warning("second")
    started = time.monotonic()
    writer.flush()
    assert time.monotonic() - started < FLUSH_S + 1
    assert [line["event"] for line in pipe.read_until("second")] == ["first", "second"]


@pytest.mark.fast
def test_a_pipe_that_another_process_has_made_non_blocking_loses_no_line(
    pipe: OpenPipe, writer: LineWriter
) -> None:
    pipe.fill()
    os.set_blocking(pipe.writing, False)
    logging.getLogger("test").warning("first")
    assert [line["event"] for line in pipe.read_until("first")] == ["first"]
