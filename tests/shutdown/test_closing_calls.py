"""The connections to the operator's backend when the relay stops, which serves in the test."""

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterator

import httpx2
import pytest
from websocket_relay.app import Replica
from websocket_relay.config.model import Settings
from websocket_relay.outgoing_http import CLOSE_S, SignedCalls
from websocket_relay.server import run

from tests.support.hook_backend import HOST, HookBackend, hook_settings
from tests.support.hook_receiver import HookReceiver
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import NO_CA, eventually, merged


class StopOnDemand:
    """The part of `signals.Stop` that the relay uses, without signals."""

    def __init__(self) -> None:
        self.signalled_at: float | None = None

    def attach(self, start_shutdown: Callable[[], object], *_: object) -> None:
        self._start_shutdown = start_shutdown

    def now(self) -> None:
        self.signalled_at = time.monotonic()
        self._start_shutdown()


@pytest.fixture
def unfrozen() -> Iterator[None]:
    """Undo what a start does to the garbage collector."""
    yield
    gc.unfreeze()


async def logged(caplog: pytest.LogCaptureFixture, event: str) -> logging.LogRecord:
    """Wait for an event in the log."""
    found: list[logging.LogRecord] = []

    async def look() -> tuple[bool, object]:
        found[:] = [each for each in caplog.records if each.getMessage() == event]
        return bool(found), caplog.messages

    await eventually(look, event)
    return found[0]


@pytest.mark.usefixtures("unfrozen")
async def test_connections_to_the_backend_are_closed_after_the_last_events(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "websocket_relay")
    async with HookBackend() as backend:
        with HookReceiver() as receiver:
            settings = Settings.model_validate(
                merged(
                    hook_settings(backend),
                    {
                        "server": {"host": HOST, "port": 0},
                        "metrics": {"enabled": False},
                        "hooks": {**receiver.settings, "messages": ["*"]},
                        "shutdown": {"spread_s": 0},
                    },
                )
            )
            relay, stop = Replica(settings), StopOnDemand()
            serving = asyncio.create_task(run._serve(settings, relay, stop, lambda: settings))  # type: ignore[arg-type]  # it sends itself no signals
            await logged(caplog, "ready")
            port = vars(await logged(caplog, "relay listening"))["port"]
            receiver.status = 503
            async with httpx2.AsyncClient(verify=NO_CA, trust_env=False) as http:
                answer = await http.post(f"http://{HOST}:{port}/channels/news", content=b"last")
            assert answer.status_code == 202
            await asyncio.to_thread(receiver.block_until_requested, 1)
            stop.now()
            await logged(caplog, "draining")
            receiver.status = 200
            await serving
            assert len(receiver.accepted) == 1
            await asyncio.to_thread(receiver.block_until, lambda each: each.connections == 0)
            await backend.wait_until_unconnected()


async def test_connections_that_do_not_close_delay_the_stop_for_a_moment_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def hang(_: httpx2.AsyncClient) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(httpx2.AsyncClient, "aclose", hang)
    url = f"http://{HOST}/"
    calls = SignedCalls(url, "", timeout_s=1, max_connections=1, setting="hooks.url")
    started_at = time.monotonic()
    async with asyncio.timeout(PATIENCE_S):
        await calls.close()
    assert time.monotonic() - started_at >= CLOSE_S
