"""Answer the relay's questions about clients as an application's backend, over real sockets.

It runs in the event loop of the test. Knows no relay.
"""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.support.brokers import free_port
from tests.support.raw_client import PATIENCE_S

HOST = "127.0.0.1"
HOOK_SECRET = "secret of the hooks"
ANN: Mapping[str, Any] = {"user": "ann", "subscribe": ["*"], "publish": ["*"]}
"""Permits all channels."""


class Question(NamedTuple):
    """A request of the relay."""

    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)

    def is_signed_with(self, secret: str) -> bool:
        """Return whether the signature is that of the body and a secret."""
        stated = self.headers.get("relay-signature", "")
        fields = dict(part.partition("=")[::2] for part in stated.split(","))
        signed = f"{fields.get('t')}.".encode() + self.body
        digest = hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()
        return hmac.compare_digest(digest, fields.get("v1", ""))


@dataclass
class HookBackend:
    """The backend.

    Attributes:
        status, body, headers: of its answers.
        may_answer: questions wait for their answers while it is not set.
        closes_without_answer: whether it closes each connection instead of answering.
        unanswered: how many of the next questions it does not answer, likewise.
        questions: all that it was asked.
        connections: how many were opened to it.
        abandoned: how many ended while a question waited for its answer.
    """

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    closes_without_answer: bool = False
    unanswered: int = 0
    questions: list[Question] = field(default_factory=list)
    connections: int = 0
    abandoned: int = 0

    def __post_init__(self) -> None:
        self.permit(**ANN)
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self._changed = asyncio.Condition()
        self._port = free_port()  # stays reserved while the server is stopped
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}/may?key=value"

    @property
    def last(self) -> Any:
        """The last question, parsed."""
        return self.questions[-1].json

    def permit(self, **fields: Any) -> None:
        """Answer with these fields from now on."""
        self.status, self.body = 200, json.dumps(fields).encode()

    def refuse(self, status: int) -> None:
        """Answer with a status and no permissions from now on."""
        self.status, self.body = status, b"no"

    async def wait_for_questions(self, count: int) -> None:
        """Wait until so many questions were asked."""
        await self._wait(lambda: len(self.questions) >= count, "questions")

    async def wait_for_abandoned(self, count: int) -> None:
        """Wait until so many questions were abandoned."""
        await self._wait(lambda: self.abandoned >= count, "abandoned questions")

    async def wait_until_unconnected(self) -> None:
        """Wait until all connections to it are closed."""
        async with asyncio.timeout(PATIENCE_S):
            while self._open:
                await asyncio.wait(self._open)

    async def _wait(self, holds: Any, what: str) -> None:
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(holds)

    async def start(self) -> None:
        """Listen; after a stop, on the same port as before."""
        self._server = await asyncio.start_server(self._serve, HOST, self._port)

    async def stop(self) -> None:
        """Stop listening, and end all connections."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._open):
            task.cancel()
        if self._open:
            await asyncio.wait(self._open)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        self.connections += 1
        try:
            while True:
                await self._answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        request_line, *lines = head.split("\r\n")
        pairs = (line.partition(": ")[::2] for line in lines if line)
        fields = {name.lower(): value for name, value in pairs}
        body = await reader.readexactly(int(fields["content-length"]))
        question = Question(request_line, fields, body)
        async with self._changed:
            self.questions.append(question)
            self._changed.notify_all()
        await self._wait_for_permission(reader)
        if self.closes_without_answer or self.unanswered:
            self.unanswered = max(0, self.unanswered - 1)
            raise ConnectionError
        headers = {"Content-Length": str(len(self.body)), **self.headers}
        text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {self.status} Answer\r\n{text}\r\n".encode() + self.body)
        await writer.drain()

    async def _wait_for_permission(self, reader: asyncio.StreamReader) -> None:
        """Wait until the question may be answered, or is abandoned."""
        if self.may_answer.is_set():
            return
        allowed = asyncio.create_task(self.may_answer.wait())
        ended = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait({allowed, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done() and not ended.cancelled():
                async with self._changed:
                    self.abandoned += 1
                    self._changed.notify_all()
                raise ConnectionError
        finally:
            for task in (allowed, ended):
                task.cancel()
            with suppress(asyncio.CancelledError, ConnectionError):
                await ended


def hook_settings(backend: HookBackend, **hook: Any) -> dict[str, Any]:
    """Return the settings of a relay that asks a backend: `relay_with(**hook_settings(backend))`.

    Args:
        hook: settings of `auth.hook` that differ.
    """
    return {
        "auth": {"mode": "hook", "hook": {"url": backend.url, "timeout_s": 60} | hook},
        "hooks": {"secret": HOOK_SECRET},
        # Nothing but the hook's own deadline ends a question.
        "limits": {"handshake_timeout_s": 120},
    }
