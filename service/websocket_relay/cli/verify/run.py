"""The command `verify`: publish and receive while the user breaks things. Knows no server code."""

import asyncio
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any

from websocket_relay.cancellation import cancel_until_done
from websocket_relay.cli.bench.summary import milliseconds
from websocket_relay.cli.bench.tally import Latencies
from websocket_relay.cli.common import (
    add_command,
    new_client,
    non_negative_seconds,
    positive_int,
    print_notice,
    run_with_url,
    show_progress,
    shown_url,
    urls_of,
)
from websocket_relay.cli.verify.judge import DeliveryJudge, MessageId, Outcome
from websocket_relay.cli.verify.summary import VerifyLoad, VerifyResult, table
from websocket_relay.client import Connected, Disconnected, Relay, Subscription, UnconfirmedError
from websocket_relay.outcomes import FAILED, RelayError

DESCRIPTION = """\
Prove that a relay loses, doubles and reorders no message while you break things.

Publishers and subscribers use the relay until Ctrl-C, or for --seconds. Meanwhile restart, upgrade
or kill relays and their broker. With several URLs, of replicas, each connection uses the next one.
At the end the command compares what was published with what each subscriber received. The exit
status is 0 only if nothing was lost, doubled or reordered. A message that is reported as
unconfirmed may be delivered once or not at all. Use channels of their own."""

EXAMPLES = """\
examples:
  websocket-relay verify ws://localhost:8443
  websocket-relay verify --seconds 60 --json verify.json ws://localhost:8443 ws://localhost:8444
  websocket-relay verify --clients 50 --rate 500 --channel test wss://relay.example.com

"""

PROGRESS_S = 0.5
POLL_S = 0.05
SETTLE_TIMEOUT_S, OUTAGE_TIMEOUT_S = 5.0, 60.0
"""Limits of the wait at the end, from the last answer, delivery or connection: where all clients
are connected, and where not."""

MAX_IN_FLIGHT = 1_000
"""Unanswered messages of one publisher; it waits at the limit, for example in an outage."""


def add_to(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(
        commands,
        "verify",
        "prove that nothing is lost while you break things",
        DESCRIPTION,
        EXAMPLES,
        url_count="*",
    )
    load = parser.add_argument_group("load")
    for name, default, text in (
        ("--clients", 10, "number of subscribers, on one connection each"),
        ("--publishers", 2, "number of publishers, on one connection each"),
        ("--channels", 2, "number of channels"),
        ("--rate", 100, "messages a second of all publishers together"),
    ):
        load.add_argument(
            name,
            type=positive_int,
            metavar="R" if name == "--rate" else "N",
            default=default,
            help=f"{text} (default: {default})",
        )
    load.add_argument(
        "--channel",
        metavar="PREFIX",
        default="verify",
        help="start of the channels' names (default: verify)",
    )
    load.add_argument(
        "--seconds",
        type=non_negative_seconds,
        metavar="S",
        help="duration of publishing (default: until Ctrl-C)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write all results to a file"
    )
    parser.set_defaults(run=lambda options: run_with_url(parser, options, verify))


async def verify(options: Namespace) -> int:
    """Run publishers and subscribers, and print the result; return the exit status."""
    if options.json:
        options.json.touch()  # report a wrong path before the run, not after it
    load = VerifyLoad(
        clients=options.clients,
        publishers=options.publishers,
        channels=tuple(f"{options.channel}-{number}" for number in range(options.channels)),
        rate_per_s=options.rate,
    )
    show: Callable[[str], None] = show_progress if sys.stderr.isatty() else lambda _: None
    verify_run = VerifyRun(load)
    try:
        await verify_run.run(options, show)
    finally:
        show("")
    result = verify_run.result()
    url = shown_url(options)
    print(table(url, result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result.as_json(url), indent=2) + "\n")
    if not result.verdict.acknowledged:
        print_notice("no message was acknowledged")
    return 0 if result.verdict.is_clean else FAILED


class VerifyRun:
    """One run.

    Args:
        load: the load.
    """

    def __init__(self, load: VerifyLoad) -> None:
        self._load = load
        self._judge = DeliveryJudge(load.clients)
        self._mark = os.urandom(8).hex()
        self._latencies = Latencies()
        self._outages_s: list[float] = []
        self._lost_at: dict[int, float] = {}  # by client, where it is not connected
        self._connected: set[int] = set()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._last_progress = self._start = self._end = 0.0
        self._delivered = 0

    async def run(self, options: Namespace, show: Callable[[str], None]) -> None:
        """Publish and receive for --seconds or until Ctrl-C, then wait for what is in flight.

        Raises:
            RelayError: a client could not connect, or gave up.
        """
        urls, load = urls_of(options), self._load
        show("connecting")
        async with AsyncExitStack() as stack:
            relays = [
                await stack.enter_async_context(
                    new_client(
                        options,
                        partial(self._on_event, number),
                        urls=urls[number % len(urls) :] + urls[: number % len(urls)],
                    )
                )
                for number in range(load.clients + load.publishers)
            ]
            subscriptions = [
                (number, await stack.enter_async_context(relay.subscribe(channel)))
                for number, relay in enumerate(relays[: load.clients])
                for channel in load.channels
            ]
            receiving = [asyncio.create_task(self._receive(*each)) for each in subscriptions]
            show("")
            print_notice(f"connected to {shown_url(options)}; Ctrl-C ends publishing")
            try:
                self._start = self._end = perf_counter()
                await self._publish_until_the_end(relays[load.clients :], options.seconds, show)
                await self._settle(receiving, show)
            finally:
                await cancel_until_done(*receiving, *self._in_flight)

    def result(self) -> VerifyResult:
        """Return the result of the run."""
        return VerifyResult(
            self._load,
            self._judge.verdict(),
            self._end - self._start,
            self._latencies,
            tuple(self._outages_s),
        )

    def _on_event(self, number: int, event: Connected | Disconnected) -> None:
        now = perf_counter()
        if isinstance(event, Connected):
            self._connected.add(number)
            self._last_progress = now
            if (lost_at := self._lost_at.pop(number, None)) is not None:
                self._outages_s.append(now - lost_at)
        elif number in self._connected:
            self._connected.remove(number)
            self._lost_at[number] = now

    # Publishing

    async def _publish_until_the_end(
        self, relays: list[Relay], seconds: float | None, show: Callable[[str], None]
    ) -> None:
        tasks = [
            asyncio.create_task(self._publish(number, relay)) for number, relay in enumerate(relays)
        ]
        deadline = None if seconds is None else self._start + seconds
        try:
            while deadline is None or perf_counter() < deadline:
                done, _ = await asyncio.wait(tasks, timeout=PROGRESS_S)
                for task in done:
                    task.result()
                show(self._progress())
        except asyncio.CancelledError:
            pass  # Ctrl-C, which is the regular end; another one ends the process
        finally:
            self._end = perf_counter()
            await cancel_until_done(*tasks)

    async def _publish(self, publisher: int, relay: Relay) -> None:
        """Publish at the rate; late messages are published as soon as possible."""
        load = self._load
        channel = load.channels[publisher % len(load.channels)]
        step_s = load.publishers / load.rate_per_s
        slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        number = 0
        while True:
            await asyncio.sleep(self._start + number * step_s - perf_counter())
            await slots.acquire()
            number += 1
            task = asyncio.create_task(
                self._publish_one(relay, MessageId(channel, publisher, number))
            )
            self._in_flight.add(task)
            task.add_done_callback(self._in_flight.discard)
            task.add_done_callback(lambda _: slots.release())

    async def _publish_one(self, relay: Relay, message: MessageId) -> None:
        text = f"{self._mark} {message.publisher} {message.number} {perf_counter_ns()}"
        outcome, position = Outcome.UNCONFIRMED, ""  # also where the run ends before the answer
        try:
            position = await relay.publish(message.channel, text)
            outcome = Outcome.ACKNOWLEDGED
        except UnconfirmedError:
            pass
        except RelayError:
            outcome = Outcome.REFUSED
        finally:
            self._judge.on_settled(message, outcome, position)
            self._last_progress = perf_counter()

    # Receiving

    async def _receive(self, subscriber: int, subscription: Subscription) -> None:
        async for message in subscription:
            mark, _, rest = str(message.data).partition(" ")
            if mark != self._mark:
                continue  # of another program
            publisher, number, sent_ns = map(int, rest.split())
            self._latencies.note(perf_counter_ns() - sent_ns)
            self._delivered += 1
            self._last_progress = perf_counter()
            self._judge.on_delivered(
                subscriber, MessageId(message.channel, publisher, number), message.position
            )

    async def _settle(
        self, receiving: list["asyncio.Task[None]"], show: Callable[[str], None]
    ) -> None:
        """Wait for answers and deliveries, as long as some arrive."""
        self._last_progress = perf_counter()
        while self._in_flight or self._judge.verdict().lost:
            limit_s = OUTAGE_TIMEOUT_S if self._lost_at else SETTLE_TIMEOUT_S
            if perf_counter() - self._last_progress > limit_s:
                return
            done, _ = await asyncio.wait(receiving, timeout=POLL_S)
            for task in done:
                task.result()
            show(f"{len(self._in_flight):,} messages without an answer; waiting for deliveries")

    def _progress(self) -> str:
        verdict, load = self._judge.verdict(), self._load
        return (
            f"{perf_counter() - self._start:.0f} s  {verdict.published:,} published"
            f"  {self._delivered:,} delivered  {verdict.unconfirmed:,} unconfirmed"
            f"  {verdict.doubled + verdict.reordered:,} faults"
            f"  {len(self._connected):,} of {load.clients + load.publishers:,} connected"
            f"  p99 {milliseconds(self._latencies.quantile_ms(0.99))}"
        )
