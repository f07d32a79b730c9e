"""Publishing with an acknowledgement: relay.v1, beside JetStream's own acknowledged publish.

usage: python -m bench.acknowledgements    writes bench/results/acknowledgements.json and .md

One publisher, one core for it and one for the servers. Each publish is in a stream with a file on
the same NATS server; the relay adds its own connection, the fan-out and the answer.
"""

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import nats
from websocket_relay import Relay

from bench import machine
from bench.__main__ import RESULTS
from bench.report import table
from bench.servers import RELAY, Running, started
from tests.support.brokers import NatsBroker
from tests.support.programs import NATS, needed

SERVER_CORE, CLIENT_CORE = 0, 1
ROUNDS, WARMUP_S, WINDOW_S = 5, 0.5, 2.0
IN_FLIGHT = (1, 100)
PAYLOAD = "x" * 128
CHANNEL = "bench"

Publish = Callable[[], Awaitable[object]]
Costs = dict[str, float]


async def _measure(publish: Publish, in_flight: int) -> Costs:
    """Keep so many publishes in flight; return the rate, and the latencies in seconds."""
    latencies: list[float] = []
    ends_at = time.perf_counter() + WARMUP_S + WINDOW_S
    counted_from = ends_at - WINDOW_S

    async def publish_repeatedly() -> None:
        while (sent_at := time.perf_counter()) < ends_at:
            await publish()
            if sent_at >= counted_from:
                latencies.append(time.perf_counter() - sent_at)

    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(publish_repeatedly())
    latencies.sort()
    return {
        "per_s": len(latencies) / WINDOW_S,
        "p50_s": latencies[len(latencies) // 2],
        "p99_s": latencies[len(latencies) * 99 // 100],
    }


@asynccontextmanager
async def _through_relay(server: Running) -> AsyncIterator[Publish]:
    async with Relay(f"ws://127.0.0.1:{server.port}") as relay:
        yield lambda: relay.publish(CHANNEL, PAYLOAD)


@asynccontextmanager
async def _to_jetstream(broker: NatsBroker) -> AsyncIterator[Publish]:
    client = await nats.connect(f"nats://127.0.0.1:{broker.port}")
    try:
        stream = client.jetstream()
        await stream.add_stream(name="bench", subjects=["bench"], max_bytes=1 << 26)
        content = PAYLOAD.encode()
        yield lambda: stream.publish("bench", content)
    finally:
        await client.close()


async def measure() -> dict[str, list[Costs]]:
    """Measure all ways in turns; return the results of each round, by way and number in flight."""
    found: dict[str, list[Costs]] = {}
    with tempfile.TemporaryDirectory() as directory:
        async with NatsBroker(needed(NATS), Path(directory)) as broker:
            os.sched_setaffinity(broker.pid, {SERVER_CORE})
            on_nats = ("RELAY__BACKPLANE__URL", f"nats://127.0.0.1:{broker.port}")
            through_nats = replace(RELAY, environment=(*RELAY.environment, on_nats))
            with started(RELAY, SERVER_CORE) as alone, started(through_nats, SERVER_CORE) as relay:
                await _await_ready(relay)
                async with (
                    _through_relay(alone) as to_memory,
                    _through_relay(relay) as to_relay,
                    _to_jetstream(broker) as to_stream,
                ):
                    ways = {
                        "relay, memory://": to_memory,
                        "relay, NATS": to_relay,
                        "JetStream by nats-py": to_stream,
                    }
                    for _ in range(ROUNDS):
                        for in_flight in IN_FLIGHT:
                            for name, publish in ways.items():
                                costs = await _measure(publish, in_flight)
                                found.setdefault(f"{name}, {in_flight} in flight", []).append(costs)
    return found


async def _await_ready(server: Running) -> None:
    async with Relay(f"ws://127.0.0.1:{server.port}") as relay:
        await relay.publish(CHANNEL, "")


def _page(facts: dict[str, object], found: dict[str, list[Costs]]) -> str:
    rows: list[list[str]] = [
        ["one publisher of 128 bytes", "acknowledged per second", "p50, ms", "p99, ms"]
    ]
    for name, rounds in found.items():
        medians = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        p50, p99 = medians["p50_s"] * 1000, medians["p99_s"] * 1000
        rows.append([name, f"{medians['per_s']:,.0f}", f"{p50:.2f}", f"{p99:.2f}"])
    head = ["# What an acknowledged publish costs", ""]
    head += [f"{facts['when']}, commit {facts['commit']}. Medians of {ROUNDS} rounds.", ""]
    return "\n".join([*head, *table(rows), ""])


def main() -> None:
    """Measure, print and write."""
    os.sched_setaffinity(0, {CLIENT_CORE})
    facts, found = machine.facts(), asyncio.run(measure())
    page = _page(facts, found)
    print(page)
    text = json.dumps({**facts, "rounds": found}, indent=1) + "\n"
    (RESULTS / "acknowledgements.json").write_text(text)
    (RESULTS / "acknowledgements.md").write_text(page)


if __name__ == "__main__":
    main()
