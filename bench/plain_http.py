"""Measure what plain HTTP requests cost the subscribers: how late messages are meanwhile.

A client publishes a message every 10 ms, by schedule, and receives it back; another process holds
keep-alive connections that each send the next request when they have the answer. Knows the relay
only as a process, so several checkouts can be compared in one run:

    python -m bench.plain_http --checkout before=../old --checkout after=.
"""

import argparse
import asyncio
import json
import os
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvloop
from websockets.asyncio.client import ClientConnection, connect

from bench import machine

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "plain_http.json"
HOST = "127.0.0.1"
SETTINGS = {
    "server": {"host": HOST, "port": 0},
    "metrics": {"host": HOST, "port": 0},
    "logging": {"format": "json"},
}
LOADS = {
    "quiet": ("relay", "/readyz", 0),
    "readyz": ("relay", "/readyz", 400),
    "stats": ("relay", "/stats", 50),
    "metrics": ("metrics", "/metrics", 50),
}
"""By name: which port, which path, and how many connections."""

INTERVAL_S = 0.01
WARM_UP_S = 4.0
PATIENCE_S = 30.0
LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


class Requester(asyncio.Protocol):
    """A keep-alive connection that sends the next request when it has the answer.

    Args:
        request: the bytes of one request.
        answers: a list of one number, which grows with each answer.
    """

    def __init__(self, request: bytes, answers: list[int]) -> None:
        self._request = request
        self._answers = answers
        self._received = b""
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.write(self._request)  # type: ignore[attr-defined]  # it is a Transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        length = LENGTH.search(head)
        if length is not None and len(body) >= int(length[1]):
            self._received = b""
            self._answers[0] += 1
            self._transport.write(self._request)  # type: ignore[attr-defined]

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set_result(None)


async def _request_without_end(port: int, path: str, count: int) -> None:
    """Keep `count` connections open; print the number of answers when SIGTERM arrives."""
    request = f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    loop, answers, stopped = asyncio.get_running_loop(), [0], asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)

    async def hold() -> None:
        while True:
            with suppress(OSError):
                _, requester = await loop.create_connection(
                    lambda: Requester(request, answers), HOST, port
                )
                await requester.lost
            await asyncio.sleep(0.1)

    holders = [loop.create_task(hold()) for _ in range(count)]
    await stopped.wait()
    print(answers[0], flush=True)
    for holder in holders:
        holder.cancel()


@contextmanager
def _relay(checkout: Path) -> Iterator[dict[str, int]]:
    """Run a checkout's relay; yield its ports."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "relay.json"
        file.write_text(json.dumps(SETTINGS))  # JSON is YAML
        process = subprocess.Popen(
            [sys.executable, "-m", "websocket_relay", "--config-file", str(file)],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stderr is not None
            ports, event = {}, {"event": ""}
            while event["event"] != "ready":
                event = json.loads(process.stderr.readline())
                if "port" in event:
                    ports[event["event"].split()[0]] = event["port"]
            yield ports
        finally:
            process.kill()
            process.wait()


@contextmanager
def _requests(port: int, path: str, count: int) -> Iterator[list[int]]:
    """Request meanwhile; the list has the number of answers at the end."""
    answers: list[int] = []
    command = [sys.executable, "-m", "bench.plain_http", "--request", str(port), path, str(count)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield answers
    finally:
        process.terminate()
        answers.append(int(process.communicate(timeout=PATIENCE_S)[0] or 0))


async def _delays_s(client: ClientConnection, seconds: float) -> list[float]:
    """Publish by schedule; return the delay of each message after its scheduled time."""
    delays: list[float] = []
    started = time.perf_counter()
    due = [started + number * INTERVAL_S for number in range(int(seconds / INTERVAL_S))]

    async def publish() -> None:
        for at in due:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            await client.send("x" * 128)

    publishing = asyncio.create_task(publish())
    async with asyncio.timeout(seconds + PATIENCE_S):
        for at in due:
            await client.recv()
            delays.append(time.perf_counter() - at)
    await publishing
    return delays


async def _seconds_to_answer(port: int) -> float:
    """Request /healthz on a connection of its own."""
    started = time.perf_counter()
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(f"GET /healthz HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        status = await reader.readline()
        writer.close()
    return time.perf_counter() - started if b" 200 " in status else PATIENCE_S


async def _measured(ports: dict[str, int], load: str, seconds: float) -> dict[str, float]:
    port, path, count = LOADS[load]
    url = f"ws://{HOST}:{ports['relay']}/channels/bench"
    async with connect(url, proxy=None, ping_interval=None) as client:
        with _requests(ports[port], path, count) as answers:
            await asyncio.sleep(WARM_UP_S)
            delays = sorted(await _delays_s(client, seconds))
            probe_s = await _seconds_to_answer(ports["metrics"])
    return {
        "median_ms": statistics.median(delays) * 1e3,
        "p99_ms": delays[len(delays) * 99 // 100] * 1e3,
        "max_ms": delays[-1] * 1e3,
        "probe_ms": probe_s * 1e3,
        "answers_per_s": answers[0] / (seconds + WARM_UP_S),
    }


async def _probe_among_slow_heads(ports: dict[str, int], count: int = 1_000) -> dict[str, float]:
    """Begin requests on the metrics port, never end them, and time the answer to a probe."""
    heads = []
    try:
        for _ in range(count):
            heads.append(socket.create_connection((HOST, ports["metrics"]), PATIENCE_S))
            heads[-1].sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        return {"probe_ms": await _seconds_to_answer(ports["metrics"]) * 1e3}
    finally:
        for head in heads:
            head.close()


def _round(checkouts: dict[str, Path], seconds: float) -> Iterator[tuple[str, str, Any]]:
    for load in LOADS:
        for name, checkout in checkouts.items():
            with _relay(checkout) as ports:
                yield name, load, uvloop.run(_measured(ports, load, seconds))
    for name, checkout in checkouts.items():
        with _relay(checkout) as ports:
            yield name, "slow heads", uvloop.run(_probe_among_slow_heads(ports))


def _named(text: str) -> tuple[str, Path]:
    name, _, path = text.rpartition("=")
    return name or "relay", Path(path).resolve()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the medians of the rounds."""
    parser = argparse.ArgumentParser(prog="python -m bench.plain_http", description=__doc__)
    parser.add_argument("--checkout", type=_named, action="append", metavar="NAME=DIR")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S")
    parser.add_argument("--output", type=Path, default=RESULT, metavar="FILE")
    parser.add_argument("--request", nargs=3, metavar=("PORT", "PATH", "COUNT"))
    options = parser.parse_args(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if options.request:
        port, path, count = options.request
        uvloop.run(_request_without_end(int(port), path, int(count)))
        return
    checkouts = dict(options.checkout or [_named(str(HERE.parent))])
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for _ in range(options.rounds):
        for name, load, values in _round(checkouts, options.seconds):
            print(f"{name:10} {load:10}", {key: round(value, 1) for key, value in values.items()})
            found.setdefault(load, {}).setdefault(name, []).append(values)
    medians = {
        load: {
            name: {
                key: round(statistics.median(each[key] for each in rounds), 2) for key in rounds[0]
            }
            for name, rounds in by_name.items()
        }
        for load, by_name in found.items()
    }
    document = {"machine": machine.facts(), "rounds": options.rounds, "medians": medians}
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
