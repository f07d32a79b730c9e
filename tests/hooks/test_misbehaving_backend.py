"""A backend that hangs, refuses, restarts and lies, to hook and webhooks: no client notices."""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus

from tests.support.hook_backend import ANN
from tests.support.hook_receiver import LIES, SECRET, Misbehave
from tests.support.http_server import HttpServer, send_answer
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import RelayProcess, StartRelay, eventually, receive

TIMEOUT_S = 2.0
BLOCKED_S = 1.0
"""A call that blocked the event loop until its timeout would delay it by more than this; one of
the buckets of the histogram."""

HANGS = 3
LAG = "websocket_event_loop_lag_seconds"
ATTEMPTS = "websocket_hook_attempts_total"


class Backend(HttpServer):
    """The backend of an application, which decides about clients and receives webhooks.

    Attributes:
        misbehave: answers instead, if it is not None.
        texts: the messages that it was sent, also repeated ones.
    """

    def __init__(self) -> None:
        super().__init__(version="HTTP/1.1")
        self.misbehave: Misbehave | None = None
        self.texts: list[str] = []
        self._changed = threading.Condition()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer a question, or receive events."""
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        if not self.is_running:
            request.close_connection = True
        elif self.misbehave is not None:
            self.misbehave(request)
        elif request.path == "/may":
            send_answer(request, 200, json.dumps(ANN).encode())
        else:
            with self._changed:
                self.texts += (event["text"] for event in body["events"])
                self._changed.notify_all()
            send_answer(request, 200)

    async def sent(self, text: str) -> None:
        """Wait until it was sent a message."""

        def block() -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: text in self.texts[-5_000:], PATIENCE_S)

        assert await asyncio.to_thread(block), self.texts[-5:]


class Chat:
    """Two clients, to which one sends a message after the other.

    Attributes:
        texts: the messages that both have received, in this order.
        delayed: how many took longer than BLOCKED_S.
    """

    def __init__(self, publisher: ClientConnection, subscriber: ClientConnection) -> None:
        self.texts: list[str] = []
        self.delayed = 0
        self._clients = publisher, subscriber

    async def run(self) -> None:
        """Send until cancelled."""
        publisher, _ = self._clients
        while True:
            await self._send(publisher, f"message {len(self.texts)}")
            await asyncio.sleep(0.01)

    async def _send(self, publisher: ClientConnection, text: str) -> None:
        started_at = time.monotonic()
        await publisher.send(text)
        for client in self._clients:
            assert await receive(client) == text
        self.delayed += time.monotonic() - started_at > BLOCKED_S
        self.texts.append(text)


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as started:
        yield started


@pytest.fixture
def relay(relay_with: StartRelay, backend: Backend) -> RelayProcess:
    timeout = {"timeout_s": TIMEOUT_S}
    return relay_with(
        auth={"mode": "hook", "hook": {"url": f"{backend.address}/may", **timeout}},
        hooks={"url": f"{backend.address}/hooks", "secret": SECRET, "messages": ["*"], **timeout},
        limits={"handshake_timeout_s": 60},
    )


def answers_with(status: int, body: bytes = b"", **headers: str) -> Misbehave:
    return lambda request: send_answer(request, status, body, **headers)


async def status_of_attempt(relay: RelayProcess) -> int:
    """Return the status with which a client is admitted or refused."""
    try:
        async with relay.client("news"):
            return 101
    except InvalidStatus as refusal:
        return refusal.response.status_code


async def failures(relay: RelayProcess) -> float:
    """Return how many webhooks were not accepted."""
    metrics = await relay.metrics()
    return sum(metrics.value(ATTEMPTS, result=result) for result in ("rejected", "unanswered"))


async def experience(relay: RelayProcess, status: int = 503, *, attempts: int = 1) -> None:
    """Wait until hook and webhooks have experienced what the backend does now."""
    before = await failures(relay)
    for _ in range(attempts):
        assert await status_of_attempt(relay) == status

    async def look() -> tuple[bool, object]:
        after = await failures(relay)
        return after > before, after

    await eventually(look, "a webhook that fails")


async def hang(relay: RelayProcess, backend: Backend) -> None:
    released = threading.Event()

    def wait(request: BaseHTTPRequestHandler) -> None:
        released.wait(PATIENCE_S)
        request.close_connection = True

    backend.misbehave = wait
    await experience(relay, attempts=HANGS)
    backend.misbehave = None
    released.set()


async def refuse(relay: RelayProcess, backend: Backend) -> None:
    for status, refusal in ((500, 503), (429, 503), (302, 503), (401, 401), (403, 403)):
        backend.misbehave = answers_with(status, Location=f"{backend.address}/may")
        await experience(relay, refusal)


async def restart(relay: RelayProcess, backend: Backend) -> None:
    for _ in range(2):
        backend.stop()
        await experience(relay)
        backend.start()
        assert await status_of_attempt(relay) == 101


async def lie(relay: RelayProcess, backend: Backend) -> None:
    for answer in LIES:
        backend.misbehave = answer
        await experience(relay)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("fault", [hang, refuse, restart, lie])
async def test_connected_clients_do_not_notice_what_the_backend_does(
    relay: RelayProcess, backend: Backend, fault: Callable[[RelayProcess, Backend], Awaitable[None]]
) -> None:
    async with relay.client("news") as publisher, relay.client("news") as subscriber:
        chat = Chat(publisher, subscriber)
        chatting = asyncio.create_task(chat.run())
        await fault(relay, backend)
        backend.misbehave = None
        assert await status_of_attempt(relay) == 101
        chatting.cancel()
        await asyncio.wait([chatting])
        assert chatting.cancelled(), chatting.exception()
        # On a busy machine one or two may be late, but not one for each call.
        assert chat.delayed < HANGS
        metrics = await relay.metrics()
        in_time = metrics.value(f"{LAG}_bucket", le=str(BLOCKED_S))
        assert metrics.value(f"{LAG}_count") - in_time < HANGS
        assert len(chat.texts) > 1
    await backend.sent(chat.texts[-1])
    assert list(dict.fromkeys(backend.texts))[: len(chat.texts)] == chat.texts
    assert await relay.metric("websocket_hook_events_dropped_total") == 0
