"""Cancellation: each task that runs as long as the relay ends when it is cancelled at any await.

`CancelAtWait` counts the awaits at which the tasks of a component wait, in the component and in the
libraries that it uses. Each run cancels the component at the next one: as soon as it waits, or in
the same turn of the event loop as the result. There Python 3.11's `asyncio.wait_for` loses a
cancellation.
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
from websocket_relay.backplane.replicated import ReplicatedBackplane
from websocket_relay.cancellation import (
    RETRY_CANCEL_S,
    Deadline,
    cancel_until_done,
    run_cancellable,
)
from websocket_relay.channels.history import History
from websocket_relay.channels.keepalive import Keepalive
from websocket_relay.client import Relay as Client
from websocket_relay.cluster.blocks import Blocks, BlockStatements
from websocket_relay.metrics import Metrics
from websocket_relay.tls import Certificates
from websocket_relay.wire.registry import ConnectionRegistry

from tests.support.broker_logs import BackplaneReplica, make_broker
from tests.support.certificates import make_pair
from tests.support.control_logs import SharedLog
from tests.support.issuer import KeyServer, key_set, make_signer
from tests.support.relay_process import RelayProcess
from tests.support.stops import KINDS, misconfigured
from tests.support.tcp_proxy import TcpProxy

ENDS_WITHIN_S = 5.0
"""A few turns of the event loop and some repetitions, on a busy machine."""

StartCoroutine = Callable[[], Coroutine[Any, Any, object]]


class CancelledRun(NamedTuple):
    """One run of a component that is cancelled.

    Attributes:
        start: returns the coroutine of the component.
        is_complete: whether the run has been at all of its awaits.
    """

    start: StartCoroutine
    is_complete: Callable[[], object]


class Moment(Enum):
    """When a task that waits for a result is cancelled."""

    BEFORE_THE_RESULT = auto()
    WITH_THE_RESULT = auto()  # in the same turn of the event loop


class WatchedCoroutine(Coroutine[Any, Any, Any]):
    """A coroutine that reports each await at which it waits."""

    def __init__(self, inner: Coroutine[Any, Any, Any], on_wait: Callable[[Any], None]) -> None:
        self._inner = inner
        self._on_wait = on_wait

    def send(self, value: Any) -> Any:
        """Run the coroutine until it waits again."""
        awaited = self._inner.send(value)
        self._on_wait(awaited)
        return awaited

    def throw(self, *error: Any) -> Any:
        """Raise an error at the current await."""
        awaited = self._inner.throw(*error)
        self._on_wait(awaited)
        return awaited

    def close(self) -> None:
        """Close the coroutine."""
        self._inner.close()

    def __await__(self) -> Any:
        """Raise: only tasks run the coroutine."""
        raise NotImplementedError


class CancelAtWait:
    """Cancel a task at one of the awaits at which it waits.

    Args:
        number: of the await, from 1.
        moment: when the task is cancelled.
        counts_all: whether the awaits of the tasks that the task starts count too.

    Attributes:
        is_found: whether there is such an await.
        is_cancelled: whether the task was cancelled there.
    """

    def __init__(self, number: int, moment: Moment, *, counts_all: bool) -> None:
        self.is_found = self.is_cancelled = False
        self._remaining = number
        self._moment = moment
        self._counts_all = counts_all
        self._task: asyncio.Task[Any] | None = None

    @contextmanager
    def watch(self, start: StartCoroutine) -> Iterator[asyncio.Task[Any]]:
        """Run a coroutine in a task."""
        loop = asyncio.get_running_loop()
        if self._counts_all:
            loop.set_task_factory(self._watched_task)
        try:
            self._task = self._watched_task(loop, start())
            yield self._task
        finally:
            loop.set_task_factory(None)

    def _watched_task(
        self, loop: asyncio.AbstractEventLoop, inner: Any, **options: Any
    ) -> asyncio.Task[Any]:
        return asyncio.Task(WatchedCoroutine(inner, self._on_wait), loop=loop, **options)

    def _on_wait(self, awaited: Any) -> None:
        self._remaining -= 1
        if self._remaining:
            return
        self.is_found = True
        if self._moment is Moment.WITH_THE_RESULT and asyncio.isfuture(awaited):
            # The callback that wakes the task is added after this one.
            awaited.add_done_callback(self._cancel)
        else:
            asyncio.get_running_loop().call_soon(self._cancel)

    def _cancel(self, _: object = None) -> None:
        if self._task is not None and self._task.cancel():
            self.is_cancelled = True


async def cancel_at_each_wait(
    run: Callable[[], AbstractAsyncContextManager[CancelledRun]],
    moment: Moment,
    *,
    counts_all: bool = False,
) -> int:
    """Run a component repeatedly, and cancel each run at another of its awaits.

    Args:
        run: prepares a new run.
        moment: when the run is cancelled.
        counts_all: see `CancelAtWait`.

    Returns:
        The number of awaits.
    """
    for number in itertools.count(1):
        cancel = CancelAtWait(number, moment, counts_all=counts_all)
        async with run() as (start, is_complete):
            with cancel.watch(start) as task:
                while not (  # noqa: ASYNC110 - to wait for an event would be one more await
                    cancel.is_cancelled or is_complete() or task.done()
                ):
                    await asyncio.sleep(0.001)
                await assert_ends(task, number, is_repeated=not counts_all)
        if not cancel.is_found:
            return number - 1
    raise AssertionError


async def assert_ends(task: asyncio.Task[Any], number: int, *, is_repeated: bool) -> None:
    """Wait for the end of a cancelled task, and repeat the cancellation if its owner does so."""
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
        pytest.fail(f"cancelled at await {number}, and still running: {task}")
    if not task.cancelled():
        task.result()


# The backplane


@pytest.fixture(params=KINDS)
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    async with make_broker(request.param, tmp_path) as broker:
        yield broker.url


@pytest.fixture(params=KINDS)
async def unusable_url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    async with misconfigured(request.param, tmp_path) as address:
        yield address


STREAM_NUMBERS = itertools.count()


def replica_on(url: str, stream: str = "") -> BackplaneReplica:
    """Return a replica that is not started, with a message to append.

    Each replica has a stream of its own. In a stream that runs share, the number of awaits would
    grow with the messages of earlier runs, which a replica reads first.
    """
    name = stream or f"relay-{next(STREAM_NUMBERS)}"
    replica = BackplaneReplica(url, name, "reject", 1_048_576)
    replica.publish(b"hello")
    return replica


async def test_a_replica_ends_at_any_await_of_its_own_or_of_the_library_of_its_broker(
    url: str,
) -> None:
    @asynccontextmanager
    async def run() -> AsyncIterator[CancelledRun]:
        replica = replica_on(url)
        yield CancelledRun(lambda: run_cancellable(replica.backplane.run), lambda: replica.entries)

    for moment in Moment:
        assert await cancel_at_each_wait(run, moment, counts_all=True) > 10


@pytest.mark.parametrize("part", ["producer", "consumer"])
async def test_a_task_of_a_replica_ends_at_any_await(url: str, part: str) -> None:
    @asynccontextmanager
    async def run() -> AsyncIterator[CancelledRun]:
        replica = replica_on(url)
        assert isinstance(replica.backplane, ReplicatedBackplane)
        tasks = {
            "producer": replica.backplane.producer.run,
            "consumer": replica.backplane.consumer.run,
        }
        start = tasks.pop(part)
        (start_other,) = tasks.values()
        running = asyncio.create_task(start_other())
        try:
            yield CancelledRun(start, lambda: replica.entries)
        finally:
            await cancel_until_done(running)
            await replica.backplane.stream.close()

    for moment in Moment:
        assert await cancel_at_each_wait(run, moment) > 2


async def test_a_replica_with_an_unusable_stream_ends_at_any_await(
    unusable_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    @asynccontextmanager
    async def run() -> AsyncIterator[CancelledRun]:
        caplog.clear()
        replica = replica_on(unusable_url, "relay")
        yield CancelledRun(
            lambda: run_cancellable(replica.backplane.run),
            lambda: {"read", "append"} <= {each.__dict__.get("action") for each in caplog.records},
        )

    for moment in Moment:
        assert await cancel_at_each_wait(run, moment, counts_all=True) > 10


# Other tasks that run as long as the relay


@pytest.mark.parametrize("moment", Moment)
async def test_the_fetch_of_signing_keys_ends_at_any_await(moment: Moment) -> None:
    with KeyServer(key_set(make_signer("ES256", "one"))) as server:

        @asynccontextmanager
        async def run() -> AsyncIterator[CancelledRun]:
            jwks = Jwks(server.url)

            async def fetch() -> None:
                async with jwks:
                    await jwks.fetch_until_available()

            yield CancelledRun(lambda: run_cancellable(fetch), lambda: jwks.fetches["ok"])

        assert await cancel_at_each_wait(run, moment, counts_all=True) > 5


@pytest.mark.parametrize("moment", Moment)
async def test_a_periodic_task_ends_while_it_sleeps(moment: Moment, tmp_path: Path) -> None:
    make_pair().write_to(tmp_path)
    history = History(
        max_messages=1, max_bytes=1, max_age_s=1, max_channels=1, clock=time.monotonic
    )
    statements = BlockStatements(
        Blocks(), SharedLog().control(), is_alone=True, up=asyncio.Event(), learned=lambda _: None
    )
    periodic: list[StartCoroutine] = [
        Certificates(tmp_path / "cert.pem", tmp_path / "key.pem").run,
        Metrics().run,
        history.run,
        Keepalive(ConnectionRegistry(), 0.05, 0.05, encode_heartbeat=bytes).run,
        statements.run,
    ]

    async def assert_cancelled(start: StartCoroutine) -> None:
        cancel = CancelAtWait(1, moment, counts_all=False)
        with cancel.watch(start) as task:
            await asyncio.wait([task], timeout=ENDS_WITHIN_S)
            assert task.cancelled()

    async with asyncio.TaskGroup() as group:
        for start in periodic:
            group.create_task(assert_cancelled(start))


@pytest.mark.parametrize("moment", Moment)
async def test_a_python_client_ends_at_any_await(
    relay: RelayProcess, channel: str, moment: Moment
) -> None:
    @asynccontextmanager
    async def run() -> AsyncIterator[CancelledRun]:
        client = Client(relay.ws_url(), token=token)

        async def publish_and_receive() -> None:
            async with client:
                await client.renew_token()
                async with client.subscribe(channel) as subscription:
                    await client.publish(channel, "hello")
                    await anext(subscription)
                await client.close()

        yield CancelledRun(lambda: run_cancellable(publish_and_receive), lambda: False)

    async def token() -> str:
        await asyncio.sleep(0)
        return ""

    assert await cancel_at_each_wait(run, moment, counts_all=True) > 10


@pytest.mark.parametrize("call", ["publish", "iterate", "subscribe", "renew", "wait_closed"])
async def test_a_call_of_a_python_client_ends_while_the_relay_does_not_answer(
    relay: RelayProcess, channel: str, call: str
) -> None:
    async with TcpProxy(relay.port) as proxy:
        client = Client(proxy.url())
        await client.__aenter__()
        proxy.stall()
        calls: dict[str, StartCoroutine] = {
            "publish": lambda: client.publish(channel, "hello"),
            "iterate": lambda: anext(client.subscribe(channel)),
            "subscribe": client.subscribe(channel + "-other").__aenter__,
            "renew": client.renew_token,
            "wait_closed": client.wait_closed,
        }
        task = asyncio.create_task(calls[call]())
        await asyncio.wait([task], timeout=0.05)
        task.cancel()
        async with asyncio.timeout(ENDS_WITHIN_S):
            await asyncio.wait([task])
        assert task.cancelled()
        async with asyncio.timeout(ENDS_WITHIN_S):
            await client.close(timeout_s=0.1)


# The functions that end tasks and calls


async def ignore_cancellations(count: int) -> None:
    """Ignore this number of cancellations."""
    for _ in range(count):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(ENDS_WITHIN_S)
    await asyncio.sleep(ENDS_WITHIN_S)


async def test_tasks_are_cancelled_until_they_are_done() -> None:
    tasks = [asyncio.create_task(ignore_cancellations(count)) for count in range(3)]
    await asyncio.sleep(0)
    await cancel_until_done(*tasks)
    assert all(task.cancelled() for task in tasks)


async def test_a_task_that_is_cancelled_while_it_cancels_others_ends_when_they_are_done() -> None:
    task = asyncio.create_task(ignore_cancellations(2))
    await asyncio.sleep(0)
    cancelling = asyncio.create_task(cancel_until_done(task))
    await asyncio.sleep(0)
    cancelling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelling
    assert task.cancelled()


async def test_one_cancellation_ends_a_coroutine_that_ignores_some() -> None:
    task = asyncio.create_task(run_cancellable(lambda: ignore_cancellations(2)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_before_the_first_step_starts_nothing() -> None:
    has_started = False

    async def start() -> None:
        nonlocal has_started
        has_started = True

    task = asyncio.create_task(run_cancellable(start))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not has_started


async def test_the_result_of_a_cancelled_coroutine_is_discarded_and_its_error_is_raised() -> None:
    async def returns() -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(ENDS_WITHIN_S)
        return "done"

    async def raises() -> None:
        try:
            await asyncio.sleep(ENDS_WITHIN_S)
        finally:
            raise ValueError("while it cleaned up")

    for start, error in ((returns, asyncio.CancelledError), (raises, ValueError)):
        task = asyncio.create_task(run_cancellable(start))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(error):
            await task


async def test_a_coroutine_that_is_not_cancelled_returns_its_result() -> None:
    async def returns() -> str:
        return "done"

    assert await run_cancellable(returns) == "done"


async def test_a_deadline_ends_a_block_that_ignores_its_cancellation() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        async with Deadline(0.01):
            await ignore_cancellations(2)
    assert time.monotonic() - started < ENDS_WITHIN_S
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_a_deadline_has_no_effect_on_a_block_that_ends_before_it() -> None:
    async with Deadline(ENDS_WITHIN_S):
        await asyncio.sleep(0)


async def test_a_cancellation_from_outside_is_not_reported_as_a_timeout() -> None:
    async def wait() -> None:
        async with Deadline(0.01):
            await ignore_cancellations(1)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
