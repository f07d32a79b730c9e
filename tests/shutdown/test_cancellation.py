"""Cancellation: each task that runs for long ends when it is cancelled, wherever it waits.

`Waits` counts the places where the tasks of a part wait, in that part and in the libraries that it
uses. Each run cancels the part at the next place: as soon as it waits, or in the same turn of the
event loop as the result. There Python 3.11's `asyncio.wait_for` loses a cancellation.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from enum import Enum, auto
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from websocket_relay.admission.jwks import Jwks
from websocket_relay.cancellation import (
    RETRY_CANCEL_S,
    Deadline,
    cancel_until_done,
    run_cancellable,
)
from websocket_relay.channels.history import History
from websocket_relay.channels.keepalive import keep_alive
from websocket_relay.client import Relay as Client
from websocket_relay.metrics import Metrics
from websocket_relay.tls import Certificates
from websocket_relay.wire.registry import ConnectionRegistry

from tests.support.certificates import make_pair
from tests.support.issuer import KeyServer, key_set, signer
from tests.support.logs_kept import Replica, broker_of
from tests.support.relay_process import Relay
from tests.support.stops import KINDS, unfit

ENDS_WITHIN_S = 5.0
"""A few turns of the event loop and some repetitions, on a machine that is busy."""

Begin = Callable[[], Coroutine[Any, Any, object]]


class Part(NamedTuple):
    """What is cancelled.

    Attributes:
        begin: begins it.
        has_done_enough: tells whether it has waited wherever it can.
    """

    begin: Begin
    has_done_enough: Callable[[], object]


class Moment(Enum):
    """When a task is cancelled that waits for a result."""

    BEFORE_THE_RESULT = auto()
    WITH_THE_RESULT = auto()  # in the same turn of the event loop


class Watched(Coroutine[Any, Any, Any]):
    """A coroutine whose waits are reported."""

    def __init__(self, inner: Coroutine[Any, Any, Any], on_wait: Callable[[Any], None]) -> None:
        self._inner = inner
        self._on_wait = on_wait

    def send(self, value: Any) -> Any:
        """Run it until it waits again."""
        awaited = self._inner.send(value)
        self._on_wait(awaited)
        return awaited

    def throw(self, *error: Any) -> Any:
        """Raise an error where it waits."""
        awaited = self._inner.throw(*error)
        self._on_wait(awaited)
        return awaited

    def close(self) -> None:
        """End it."""
        self._inner.close()

    def __await__(self) -> Any:
        """Never be awaited: only tasks run it."""
        raise NotImplementedError


class Waits:
    """Cancels a task at one of the places where it waits.

    Args:
        place: which of them, from 1.
        moment: when.
        counts_all: counts also the places where tasks wait that the task starts.

    Attributes:
        is_found: whether there is such a place.
        is_cancelled: whether the task was cancelled there.
    """

    def __init__(self, place: int, moment: Moment, *, counts_all: bool) -> None:
        self.is_found = self.is_cancelled = False
        self._left = place
        self._moment = moment
        self._counts_all = counts_all
        self._task: asyncio.Task[Any] | None = None

    @contextmanager
    def watch(self, begin: Begin) -> Iterator[asyncio.Task[Any]]:
        """Run a coroutine in a task."""
        loop = asyncio.get_running_loop()
        if self._counts_all:
            loop.set_task_factory(self._watched)
        try:
            self._task = self._watched(loop, begin())
            yield self._task
        finally:
            loop.set_task_factory(None)

    def _watched(
        self, loop: asyncio.AbstractEventLoop, inner: Any, **options: Any
    ) -> asyncio.Task[Any]:
        return asyncio.Task(Watched(inner, self._on_wait), loop=loop, **options)

    def _on_wait(self, awaited: Any) -> None:
        self._left -= 1
        if self._left:
            return
        self.is_found = True
        if self._moment is Moment.WITH_THE_RESULT and asyncio.isfuture(awaited):
            # The task itself is woken by a callback that is added after this one.
            awaited.add_done_callback(self._cancel)
        else:
            asyncio.get_running_loop().call_soon(self._cancel)

    def _cancel(self, _: object = None) -> None:
        if self._task is not None and self._task.cancel():
            self.is_cancelled = True


async def cancel_at_each_place(
    run: Callable[[], AbstractAsyncContextManager[Part]],
    moment: Moment,
    *,
    counts_all: bool = False,
) -> int:
    """Run a part again and again, and cancel it at each place where it waits.

    Args:
        run: gives the part, anew for each run.
        moment: when it is cancelled.
        counts_all: see `Waits`.

    Returns:
        How many places there are.
    """
    for place in itertools.count(1):
        waits = Waits(place, moment, counts_all=counts_all)
        async with run() as (begin, has_done_enough):
            with waits.watch(begin) as task:
                while not (  # noqa: ASYNC110 - an event would be one more place
                    waits.is_cancelled or has_done_enough() or task.done()
                ):
                    await asyncio.sleep(0.001)
                await ended(task, place, is_repeated=not counts_all)
        if not waits.is_found:
            return place - 1
    raise AssertionError


async def ended(task: asyncio.Task[Any], place: int, *, is_repeated: bool) -> None:
    """Wait for the end of a cancelled task; repeat the cancellation or not, as its owner does."""
    if not task.cancelling():
        task.cancel()
    try:
        async with asyncio.timeout(ENDS_WITHIN_S):
            if is_repeated:
                await asyncio.wait([task], timeout=RETRY_CANCEL_S)
                await cancel_until_done(task)
            else:
                await asyncio.wait([task])
    except TimeoutError:
        pytest.fail(f"cancelled at place {place} it runs on: {task}")
    if not task.cancelled():
        task.result()


# The backplane


@pytest.fixture(params=KINDS)
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    async with broker_of(request.param, tmp_path) as broker:
        yield broker.url


@pytest.fixture(params=KINDS)
async def unfit_url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    async with unfit(request.param, tmp_path) as address:
        yield address


def replica_on(url: str) -> Replica:
    """Return a replica that is not started, with a message to append."""
    replica = Replica(url, "relay", "reject", 1_048_576)
    replica.say(b"hello")
    return replica


@pytest.mark.parametrize("moment", Moment)
async def test_a_replica_ends_wherever_it_or_its_broker_s_library_waits(
    url: str, moment: Moment
) -> None:
    @asynccontextmanager
    async def run() -> AsyncIterator[Part]:
        replica = replica_on(url)
        yield Part(lambda: run_cancellable(replica.backplane.run), lambda: replica.entries)

    assert await cancel_at_each_place(run, moment, counts_all=True) > 10


@pytest.mark.parametrize("moment", Moment)
@pytest.mark.parametrize("method", ["_read", "_write"])
async def test_a_task_of_a_replica_ends_wherever_it_waits(
    url: str, method: str, moment: Moment
) -> None:
    @asynccontextmanager
    async def run() -> AsyncIterator[Part]:
        replica = replica_on(url)
        other = {"_read": "_write", "_write": "_read"}[method]
        helping = asyncio.create_task(getattr(replica.backplane, other)())
        try:
            yield Part(getattr(replica.backplane, method), lambda: replica.entries)
        finally:
            await cancel_until_done(helping)
            await replica.backplane._stream.close()  # type: ignore[attr-defined]

    assert await cancel_at_each_place(run, moment) > 2


@pytest.mark.parametrize("moment", Moment)
async def test_a_replica_whose_stream_is_unfit_ends_wherever_it_waits(
    unfit_url: str, moment: Moment
) -> None:
    @asynccontextmanager
    async def run() -> AsyncIterator[Part]:
        replica = replica_on(unfit_url)
        failures: dict[str, set[str]] = replica.backplane._failures  # type: ignore[attr-defined]
        yield Part(
            lambda: run_cancellable(replica.backplane.run),
            lambda: {"read", "append"} <= {*failures},
        )

    assert await cancel_at_each_place(run, moment, counts_all=True) > 10


# What else runs as long as the relay does


@pytest.mark.parametrize("moment", Moment)
async def test_the_keys_of_an_issuer_are_fetched_until_cancelled(moment: Moment) -> None:
    with KeyServer(key_set(signer("ES256", "one"))) as server:

        @asynccontextmanager
        async def run() -> AsyncIterator[Part]:
            jwks = Jwks(server.url)

            async def fetch() -> None:
                async with jwks:
                    await jwks.fetch_until_available()

            yield Part(lambda: run_cancellable(fetch), lambda: jwks.fetches["ok"])

        assert await cancel_at_each_place(run, moment, counts_all=True) > 5


@pytest.mark.parametrize("moment", Moment)
async def test_what_recurs_ends_while_it_sleeps(moment: Moment, tmp_path: Path) -> None:
    make_pair().write_to(tmp_path)
    history = History(
        max_messages=1, max_bytes=1, max_age_s=1, max_channels=1, clock=time.monotonic
    )
    recurring: list[Begin] = [
        Certificates(tmp_path / "cert.pem", tmp_path / "key.pem").watch,
        Metrics().measure_loop_lag,
        history.run_expiry,
        lambda: keep_alive(ConnectionRegistry(), ping_interval_s=0.05, ping_timeout_s=0.05),
    ]

    async def cancelled(begin: Begin) -> None:
        waits = Waits(1, moment, counts_all=False)
        with waits.watch(begin) as task:
            await asyncio.wait([task], timeout=ENDS_WITHIN_S)
            assert task.cancelled()

    async with asyncio.TaskGroup() as group:
        for begin in recurring:
            group.create_task(cancelled(begin))


@pytest.mark.parametrize("moment", Moment)
async def test_a_python_client_ends_wherever_it_waits(
    relay: Relay, channel: str, moment: Moment
) -> None:
    @asynccontextmanager
    async def run() -> AsyncIterator[Part]:
        client = Client(relay.ws_url(f"/channels/{channel}"))

        async def converse() -> None:
            async with client:
                await client.send("hello")
                await anext(client)

        yield Part(lambda: run_cancellable(converse), lambda: False)

    assert await cancel_at_each_place(run, moment, counts_all=True) > 5


# What the relay ends tasks and calls with


async def loses_cancellations(count: int) -> None:
    """Run on after so many cancellations."""
    for _ in range(count):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(ENDS_WITHIN_S)
    await asyncio.sleep(ENDS_WITHIN_S)


async def test_tasks_are_cancelled_until_they_are_done() -> None:
    tasks = [asyncio.create_task(loses_cancellations(count)) for count in range(3)]
    await asyncio.sleep(0)
    await cancel_until_done(*tasks)
    assert all(task.cancelled() for task in tasks)


async def test_who_is_cancelled_while_it_cancels_tasks_ends_when_they_are_done() -> None:
    task = asyncio.create_task(loses_cancellations(2))
    await asyncio.sleep(0)
    cancelling = asyncio.create_task(cancel_until_done(task))
    await asyncio.sleep(0)
    cancelling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelling
    assert task.cancelled()


async def test_one_cancellation_ends_what_loses_some() -> None:
    task = asyncio.create_task(run_cancellable(lambda: loses_cancellations(2)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_before_the_first_step_begins_nothing() -> None:
    has_begun = False

    async def begin() -> None:
        nonlocal has_begun
        has_begun = True

    task = asyncio.create_task(run_cancellable(begin))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not has_begun


async def test_what_a_cancelled_task_returns_is_no_result_and_what_it_raises_is_raised() -> None:
    async def returns() -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(ENDS_WITHIN_S)
        return "done"

    async def raises() -> None:
        try:
            await asyncio.sleep(ENDS_WITHIN_S)
        finally:
            raise ValueError("while it cleaned up")

    for begin, error in ((returns, asyncio.CancelledError), (raises, ValueError)):
        task = asyncio.create_task(run_cancellable(begin))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(error):
            await task


async def test_what_is_not_cancelled_gives_its_result() -> None:
    async def returns() -> str:
        return "done"

    assert await run_cancellable(returns) == "done"


async def test_a_deadline_holds_although_its_cancellation_is_lost() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        async with Deadline(0.01):
            await loses_cancellations(2)
    assert time.monotonic() - started < ENDS_WITHIN_S
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_a_deadline_that_is_met_does_nothing() -> None:
    async with Deadline(ENDS_WITHIN_S):
        await asyncio.sleep(0)


async def test_a_cancellation_from_outside_is_no_missed_deadline() -> None:
    async def wait() -> None:
        async with Deadline(0.01):
            await loses_cancellations(1)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
