"""The order of measurements: servers in turns, over several rounds; disturbed ones are repeated.

Knows loads and servers only by their interfaces.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from bench.loads import Generator, Load
from bench.servers import FailedError, Running, Server, started
from bench.targets import DISTURBED, Measurement

REPEATS = 24  # in one run, so that a busy machine makes it longer but not endless
MOST_TRIES = 3
PAUSE_S = 1.0  # the disturbance may have ended by then


@dataclass(slots=True)
class Rounds:
    """Measure, with a bound on repetitions."""

    generator: Generator
    rounds: int | None  # None: as many as the load has
    show: Callable[[Load, Server, Measurement], None]
    repeats_left: int = REPEATS

    def all(self, loads: list[Load], servers: list[Server]) -> list[Measurement]:
        """Measure every load with a new process of every server."""
        return [
            measurement
            for load in loads
            for measurement in self._load(
                load, [server for server in servers if server.name in load.servers]
            )
        ]

    def _load(self, load: Load, servers: list[Server]) -> list[Measurement]:
        """Measure one server after another while the others wait on the same core.

        Turns are short and alternate in direction: a disturbance then affects all servers alike.
        """
        measurements = []
        rounds = self.rounds or max(1, int(load.rounds * min(1.0, self.generator.scale)))
        with ExitStack() as running:
            ready, failed = self._start(load, servers, running)
            measurements += failed
            for number in range(1, rounds + 1):
                for each in ready if number % 2 else reversed(ready):
                    if number == 1 or each.server.reference:
                        measurements.append(self._one(load, each, number))
        return measurements

    def _start(
        self, load: Load, servers: list[Server], running: ExitStack
    ) -> tuple[list[Running], list[Measurement]]:
        ready, failed = [], []
        for server in servers:
            try:
                ready.append(running.enter_context(started(server, self.generator.server_core)))
            except FailedError as error:
                failed.append(Measurement(load.name, server.name, 1, {}, str(error)))
                self.show(load, server, failed[-1])
        return ready, failed

    def _one(self, load: Load, running: Running, number: int) -> Measurement:
        """Measure, and repeat while other programs use the cores; the calmest try counts."""
        found = self._try(load, running, number)
        while found.disturbed > DISTURBED and found.tries < MOST_TRIES and self.repeats_left:
            self.repeats_left -= 1
            time.sleep(PAUSE_S)
            again = self._try(load, running, number)
            calmer = again if again.disturbed < found.disturbed else found
            found = replace(calmer, tries=found.tries + 1)
        return found

    def _try(self, load: Load, running: Running, number: int) -> Measurement:
        name = running.server.name
        try:
            values = load.run(self.generator, running)
            running.settle()
            found = Measurement(load.name, name, number, values)
        except FailedError as error:
            found = Measurement(load.name, name, number, {}, str(error))
        self.show(load, running.server, found)
        return found
