"""Clients that lose their replica and reconnect, in steps of simulated time. Measures nothing.

Every client is simulated: it waits as examples/client.html does, connects to a replica that a
balancer chooses, queues, and is admitted, refused or timed out. Of a replica only its core is
simulated, which does one handshake after another. Knows no scenario by name and no file.
"""

import random
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from websocket_relay.server.drain import RETRY_WINDOW_S
from websocket_relay.token_bucket import TokenBucket

STEPS_PER_S = 100
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # examples/client.html
RATE_EPOCH_S = 10.0  # a TokenBucket needs a clock that is later than its burst


@dataclass(frozen=True, slots=True)
class Fleet:
    """The fleet before the event.

    Attributes:
        clients: evenly spread over the replicas.
        replicas: how many.
        handshakes_per_s: capacity of one replica without other work.
        refusals_per_s: the same for answers with 503, and for handshakes that time out.
        max_handshakes_per_s: the relay's limit; 0 for none.
        spread_s: a replica that stops closes its clients over this time.
        retry_window_s: upper bound of their random `retry_ms`.
        handshake_timeout_s: after it the relay ends an unfinished handshake.
        to_emptiest: the balancer chooses the replica with the fewest clients; else a random one.
    """

    clients: int
    replicas: int
    handshakes_per_s: float
    refusals_per_s: float
    max_handshakes_per_s: int = 0
    spread_s: float = 5.0
    retry_window_s: float = RETRY_WINDOW_S
    handshake_timeout_s: float = 10.0
    to_emptiest: bool = False


@dataclass(frozen=True, slots=True)
class CrowdOutcome:
    """The outcome of an event. Times in seconds.

    Attributes:
        returns: reconnections of all clients.
        attempts: handshakes that were requested.
        refused, given_up, unreached: attempts that were answered with 503, that timed out, that
            were sent to a replica that is gone.
        peak_per_s: most requests to all replicas together in a second.
        peak_of_one_per_s: most requests to one replica in a second.
        longest_queue_s: the wait of the last client in the longest queue.
        away_s: how long clients were away: the median, the 99th percentile and the longest.
        loads: clients of each replica afterwards.
        asked, let_in, away: handshakes requested and completed in each second, and clients that
            were away at its end.
    """

    returns: int
    attempts: int
    refused: int
    given_up: int
    unreached: int
    peak_per_s: int
    peak_of_one_per_s: int
    longest_queue_s: float
    away_s: tuple[float, float, float]
    loads: tuple[int, ...]
    asked: tuple[int, ...]
    let_in: tuple[int, ...]
    away: tuple[int, ...]


class SimulatedReplica:
    """A core that does handshakes in the order of the requests."""

    __slots__ = ("asked", "clients", "free_at", "is_gone", "is_refusing", "rate", "second", "size")

    def __init__(self, max_handshakes_per_s: int) -> None:
        limit = max_handshakes_per_s
        self.rate = TokenBucket(limit, limit) if limit else None
        self.clients: list[int] = []
        self.size = 0  # clients, and pending handshakes
        self.free_at = 0.0
        self.is_gone = False
        self.is_refusing = False
        self.second = self.asked = 0  # requests in this second

    def count_asked(self, second: int) -> int:
        """Count a request; return the number in this second."""
        if second != self.second:
            self.second, self.asked = second, 0
        self.asked += 1
        return self.asked


class Crowd:
    """All clients and all replicas. Use an instance for one event.

    Args:
        fleet: the fleet before the event.
        seed: the same seed has the same outcome.
    """

    def __init__(self, fleet: Fleet, seed: int = 1) -> None:
        self._fleet = fleet
        self._random = random.Random(seed)
        self._replicas = [
            SimulatedReplica(fleet.max_handshakes_per_s) for _ in range(fleet.replicas)
        ]
        for client in range(fleet.clients):
            self._replicas[client % fleet.replicas].clients.append(client)
        for replica in self._replicas:
            replica.size = len(replica.clients)
        self._open = list(self._replicas)  # that the balancer considers available
        self._step = 0
        self._actions: dict[int, list[Callable[[], None]]] = {}
        self._attempts_at: dict[int, list[int]] = {}
        self._finished_at: dict[int, list[tuple[int, SimulatedReplica]]] = {}
        self._failures = bytearray(fleet.clients)  # consecutive, as the page counts them
        self._lost_at = array("d", bytes(8 * fleet.clients))
        self._away_s = array("d")
        self._lost: Counter[int] = Counter()  # by the second, like the next two
        self._asked: Counter[int] = Counter()
        self._admitted: Counter[int] = Counter()
        self._refused = self._given_up = self._unreached = self._peak_of_one = 0
        self._longest_queue_s = 0.0

    def update(
        self, *, at_once: int = 1, pace_s: float = 10.0, unaware_s: float = 0.0
    ) -> CrowdOutcome:
        """Replace every replica: a new one first, then the old one drains.

        Args:
            at_once: number of replicas that are replaced at a time.
            pace_s: time between two replacements. A Deployment waits until the new replicas are
                ready, not until the old ones have ended.
            unaware_s: time in which the balancer still sends clients to a replica that refuses.
        """
        for number, old in enumerate(self._replicas[:]):
            stop_s = number // at_once * pace_s
            self._when(stop_s, partial(self._replace, old))
            self._when(stop_s + unaware_s, partial(self._open.remove, old))
        return self._run()

    def lose(self, *, gone: int, cut: int, unaware_s: float = 10.0) -> CrowdOutcome:
        """Cut off the clients of some replicas all at once.

        Args:
            gone: replicas that are lost for good.
            cut: replicas whose clients lose their connections, the lost ones included.
            unaware_s: time in which the balancer still sends clients to lost replicas.
        """
        for replica in self._replicas[:cut]:
            for client in replica.clients:
                self._disconnect(client, 0.0, self._backoff_s(client))
            replica.clients, replica.size = [], 0
        for replica in self._replicas[:gone]:
            replica.is_gone = True
            self._when(unaware_s, partial(self._open.remove, replica))
        self._replicas = self._replicas[gone:]
        return self._run()

    def _when(self, due_s: float, action: Callable[[], None]) -> None:
        self._actions.setdefault(round(due_s * STEPS_PER_S), []).append(action)

    def _run(self) -> CrowdOutcome:
        while self._actions or self._attempts_at or self._finished_at:
            now_s = self._step / STEPS_PER_S
            for action in self._actions.pop(self._step, ()):
                action()
            for client, replica in self._finished_at.pop(self._step, ()):
                self._finish(client, replica, now_s)
            for client in self._attempts_at.pop(self._step, ()):
                self._connect(client, now_s)
            self._step += 1
        return self._outcome()

    def _replace(self, old: SimulatedReplica) -> None:
        """Drain a replica as service/websocket_relay/server/drain.py does."""
        new = SimulatedReplica(self._fleet.max_handshakes_per_s)
        self._replicas[self._replicas.index(old)] = new
        self._open.append(new)
        old.is_refusing = True
        now_s, spread_s = self._step / STEPS_PER_S, self._fleet.spread_s
        self._random.shuffle(old.clients)
        for number, client in enumerate(old.clients):
            retry_s = self._random.uniform(0, self._fleet.retry_window_s)
            self._disconnect(client, now_s + spread_s * number / len(old.clients), retry_s)

    def _disconnect(self, client: int, closed_s: float, wait_s: float) -> None:
        self._lost_at[client] = closed_s
        self._lost[int(closed_s)] += 1
        self._connect_at(client, closed_s + wait_s)

    def _connect_at(self, client: int, due_s: float) -> None:
        self._attempts_at.setdefault(max(round(due_s * STEPS_PER_S), self._step + 1), []).append(
            client
        )

    def _backoff_s(self, client: int) -> float:
        most_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** self._failures[client])
        return most_s / 2 + self._random.random() * most_s / 2

    def _fail(self, client: int, replica: SimulatedReplica, now_s: float) -> None:
        replica.size -= 1
        wait_s = self._backoff_s(client)
        self._failures[client] = min(self._failures[client] + 1, 10)
        self._connect_at(client, now_s + wait_s)

    def _pick(self) -> SimulatedReplica:
        if self._fleet.to_emptiest:
            return min(self._open, key=lambda replica: replica.size)
        return self._open[int(self._random.random() * len(self._open))]

    def _connect(self, client: int, now_s: float) -> None:
        """Join a replica's queue, which keeps its order: so the wait is known in advance."""
        replica, fleet = self._pick(), self._fleet
        replica.size += 1
        self._asked[int(now_s)] += 1
        self._peak_of_one = max(self._peak_of_one, replica.count_asked(int(now_s)))
        if replica.is_gone:
            self._unreached += 1
            self._fail(client, replica, now_s)
            return
        turn_s = max(now_s, replica.free_at)
        done_s = turn_s + 1 / fleet.handshakes_per_s
        late_s = now_s + fleet.handshake_timeout_s
        self._longest_queue_s = max(self._longest_queue_s, turn_s - now_s)
        if done_s > late_s:
            self._given_up += 1
            replica.free_at = turn_s + 1 / fleet.refusals_per_s
            self._fail(client, replica, late_s)
        elif replica.is_refusing or not self._admits(replica, turn_s):
            self._refused += 1
            replica.free_at = turn_s + 1 / fleet.refusals_per_s
            self._fail(client, replica, replica.free_at)
        else:
            replica.free_at = done_s
            step = max(round(done_s * STEPS_PER_S), self._step + 1)
            self._finished_at.setdefault(step, []).append((client, replica))

    def _admits(self, replica: SimulatedReplica, now_s: float) -> bool:
        return replica.rate is None or replica.rate.take(now_s + RATE_EPOCH_S)

    def _finish(self, client: int, replica: SimulatedReplica, now_s: float) -> None:
        if replica.is_refusing:  # since the client queued
            self._refused += 1
            self._fail(client, replica, now_s)
            return
        replica.clients.append(client)
        self._failures[client] = 0
        self._away_s.append(now_s - self._lost_at[client])
        self._admitted[int(now_s)] += 1

    def _outcome(self) -> CrowdOutcome:
        seconds = range(max(self._admitted) + 1)
        away, timeline = 0, []
        for second in seconds:
            away += self._lost[second] - self._admitted[second]
            timeline.append(away)
        away_s = sorted(self._away_s)
        return CrowdOutcome(
            returns=len(away_s),
            attempts=self._asked.total(),
            refused=self._refused,
            given_up=self._given_up,
            unreached=self._unreached,
            peak_per_s=max(self._asked.values()),
            peak_of_one_per_s=self._peak_of_one,
            longest_queue_s=self._longest_queue_s,
            away_s=(_quantile(away_s, 0.5), _quantile(away_s, 0.99), away_s[-1]),
            loads=tuple(len(replica.clients) for replica in self._replicas),
            asked=tuple(self._asked[second] for second in seconds),
            let_in=tuple(self._admitted[second] for second in seconds),
            away=tuple(timeline),
        )


def _quantile(ascending: Sequence[float], share: float) -> float:
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]
