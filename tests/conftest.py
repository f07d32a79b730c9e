"""How the tests run: the plugins, how many tests at a time, and the event loop of each."""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Generator, Mapping

import pytest
import uvloop

pytest.register_assert_rewrite("tests.support")
pytest_plugins = [
    "tests.support.browser",
    "tests.support.fast",
    "tests.support.fixtures",
    "tests.support.not_tested",
    "tests.support.time_limit",
]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what runs in its background, and the commands under test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

LIKE_THE_RELAY = {
    "tests.backplane.test_backplane",
    "tests.backplane.test_outages",
    "tests.backplane.test_redis_failover",
    "tests.http.test_keep_alive",
    "tests.shutdown.test_cancellation",
    "tests.unit.test_writes",
}
"""Tests that run the relay's parts themselves, in the loop that it runs them in: what that makes of
a lost connection is its own."""


def pytest_xdist_auto_num_workers() -> int:
    """Return how many tests run at a time: two thirds of their time they wait for something."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return 3 * cores


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect the tests without garbage collection, which takes a third of that time otherwise.

    The modules and tests stay to the end of the run: later collections skip them.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Choose the loop of a test."""
    module = item.getparent(pytest.Module)
    is_like_the_relay = module is not None and module.obj.__name__ in LIKE_THE_RELAY
    return {"loop": uvloop.new_event_loop if is_like_the_relay else asyncio.new_event_loop}
