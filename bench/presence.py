"""What presence costs: a storm of joins, and a rolling update.

usage: python -m bench.presence    writes bench/results/presence.json and .md

The storm: 10,000 clients of relay.v1 connect to one channel within seconds, without presence, with
it, and with each client notified of the others. The update: 2,000 clients move from one replica to
the other, as the first one drains; another client counts the joins and leaves that it is sent.
"""

import asyncio
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from bench import machine, prepare
from bench.__main__ import RESULTS
from bench.loads import Generator, _wait_open, result
from bench.report import table
from bench.servers import RELAY, Running, Server, started
from tests.support.brokers import RedisBroker
from tests.support.programs import ANY_REDIS, needed
from tests.support.relay_process import RelayProcess

SERVER_CORE, CLIENT_CORE = 0, 1
STORM_CLIENTS, MOVING_CLIENTS = 10_000, 2_000
SETTLE_S = 3.0
GRACE_S = 10
CHANNEL = "bench"
ON = (("RELAY__PRESENCE__CHANNELS", CHANNEL),)
RELAY_V1 = Subprotocol("relay.v1")

Counts = dict[str, int]


def _storm(server: Server, **options: int) -> dict[str, float]:
    """Connect all clients; return what that costs the server."""
    with started(server, SERVER_CORE) as running:
        generator = Generator(CLIENT_CORE, SERVER_CORE, 1.0)
        cpu_s, sent_bytes = running.cpu_s(), _sent_bytes(running)
        began = time.monotonic()
        clients: dict[str, Any] = {"clients": STORM_CLIENTS, "v1": 1, **options}
        with generator.started("idle", running, **clients) as process:
            _wait_open(process)
            opened_s = time.monotonic() - began
            time.sleep(SETTLE_S)
            costs = {
                "opened_s": opened_s,
                "cpu_us_per_client": (running.cpu_s() - cpu_s) / STORM_CLIENTS * 1e6,
                "bytes_per_client": (_sent_bytes(running) - sent_bytes) / STORM_CLIENTS,
                "private_bytes": running.private_bytes(),
            }
            result(process)
    return costs


def _sent_bytes(running: Running) -> int:
    """Return what the kernel has sent on loopback: the server's side and the clients' together."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    return 0


async def _join(port: int, session: str = "") -> tuple[ClientConnection, str]:
    """Connect a client of the channel; return its session, too."""
    query = f"?session={session}" if session else ""
    url = f"ws://127.0.0.1:{port}/channels/{CHANNEL}{query}"
    connection = await connect(url, subprotocols=[RELAY_V1], compression=None, ping_interval=None)
    welcome = json.loads(await connection.recv())
    return connection, welcome["session"]


async def _move(connection: ClientConnection, session: str, port: int) -> ClientConnection:
    """Wait until the replica closes a client, and resume on the other one."""
    try:
        async for _ in connection:
            pass
    except ConnectionClosed:
        pass
    return (await _join(port, session))[0]


async def _count_changes(port: int, counts: Counter[str]) -> None:
    """Count the notices that a client is sent which is notified of joins and leaves."""
    url = f"ws://127.0.0.1:{port}/channels/{CHANNEL}?presence=true"
    async with connect(url, subprotocols=[RELAY_V1], ping_interval=None, max_size=None) as watcher:
        async for message in watcher:
            assert isinstance(message, str)
            counts[json.loads(message.partition("\n")[0]).get("type", "message")] += 1


async def _rolling_update() -> Counts:
    """Drain one of two replicas; return the notices that another client gets of it."""
    with TemporaryDirectory() as folder:
        async with RedisBroker(needed(*ANY_REDIS), Path(folder) / "broker") as broker:
            settings: dict[str, Any] = {
                "backplane": {"url": broker.url},
                "presence": {"channels": [CHANNEL], "grace_s": GRACE_S, "max_clients": 5_000},
                "shutdown": {"spread_s": 5, "timeout_s": 20},
            }
            for name in ("one", "two"):
                (Path(folder) / name).mkdir()
            with (
                RelayProcess(Path(folder) / "one", settings) as one,
                RelayProcess(Path(folder) / "two", settings) as two,
            ):
                clients = [await _join(one.port) for _ in range(MOVING_CLIENTS)]
                counts: Counter[str] = Counter()
                watching = asyncio.create_task(_count_changes(two.port, counts))
                await asyncio.sleep(SETTLE_S)
                counts.clear()
                moving = [asyncio.create_task(_move(*client, two.port)) for client in clients]
                await one.stop()
                moved = await asyncio.gather(*moving)
                await asyncio.sleep(GRACE_S + 2 * SETTLE_S)
                watching.cancel()
                for connection in moved:
                    connection.transport.abort()
                return {"moved": len(moved), "joined": counts["joined"], "left": counts["left"]}


def _page(facts: dict[str, object], storms: dict[str, dict[str, float]], moved: Counts) -> str:
    rows = [["10,000 clients", "open after, s", "CPU each, us", "sent each, KiB", "memory, MiB"]]
    for name, each in storms.items():
        opened_s, cpu_us = f"{each['opened_s']:.1f}", f"{each['cpu_us_per_client']:.0f}"
        sent, memory = each["bytes_per_client"] / 1024, each["private_bytes"] / 1_048_576
        rows.append([name, opened_s, cpu_us, f"{sent:.1f}", f"{memory:.0f}"])
    head = ["# What presence costs", "", f"{facts['when']}, commit {facts['commit']}.", ""]
    update = (
        f"A rolling update: {moved['moved']:,} clients moved from one replica to the other. Another"
        f" client was sent {moved['joined']} joins and {moved['left']} leaves."
    )
    return "\n".join([*head, *table(rows), "", update, ""])


def main() -> None:
    """Measure, print and write."""
    prepare.loadgen()
    present = replace(RELAY, environment=(*RELAY.environment, *ON))
    storms = {
        "without presence": _storm(RELAY),
        "with presence": _storm(present),
        "and each client notified": _storm(present, watch=1),
    }
    facts, moved = machine.facts(), asyncio.run(_rolling_update())
    page = _page(facts, storms, moved)
    print(page)
    text = json.dumps({**facts, "storms": storms, "update": moved}, indent=1) + "\n"
    (RESULTS / "presence.json").write_text(text)
    (RESULTS / "presence.md").write_text(page)


if __name__ == "__main__":
    main()
