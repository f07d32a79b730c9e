"""Start real brokers for tests: each a process of its own, with a directory and a port. Knows no
relay.

Which programs they are: programs.py.
"""

import asyncio
import json
import os
import random
import signal
import socket
import ssl
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.support.certificates import CertificatePair

START_TIMEOUT_S = 10.0

PORTS = range(20_000, 30_000)
"""Below those that the kernel gives to clients: one of them would take a broker's port while that
is being restarted."""


def free_port() -> int:
    """Return a port that nobody listens on."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Broker:
    """A broker's process. What it holds is in its directory, over restarts.

    Args:
        program: of the broker.
        directory: for what it holds.
        pair: serve TLS with it.
        password: ask for it.
        user: and for this name.
    """

    schemes = ("", "")

    def __init__(
        self,
        program: Path,
        directory: Path,
        *,
        pair: CertificatePair | None = None,
        password: str = "",
        user: str = "",
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = free_port()
        self.pair = pair
        self.password = password
        self.user = user
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._log = directory / "broker.log"
        if pair is not None:
            pair.write_to(directory)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        """Where it is, and as whom to talk to it."""
        return self.url_with(self.credentials)

    @property
    def credentials(self) -> str:
        """What stands before the @ of its URL."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """Which process it is."""
        assert self._process is not None
        return self._process.pid

    def url_with(self, credentials: str) -> str:
        """Return where it is, with credentials of the caller's."""
        scheme = self.schemes[self.pair is not None]
        at = f"{credentials}@" if credentials else ""
        query = f"?ssl_ca_certs={self.directory / 'cert.pem'}" if self.pair else ""
        return f"{scheme}://{at}localhost:{self.port}{query}"

    @property
    def log(self) -> str:
        """What it wrote to its log."""
        return self._log.read_text(errors="replace")

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        process = self._process = self._launched()
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await self._answers():
                assert process.poll() is None, self._log.read_text()
                await asyncio.sleep(0.02)

    def _launched(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [self._program, *self._arguments()],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        """Ask it to stop, and wait until it has."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it at once."""
        self._end(signal.SIGKILL)

    async def restart(self) -> None:
        """Kill it at once, and start it again."""
        self.kill()
        await self.start()

    def freeze(self) -> None:
        """Let it do nothing any more; the kernel still takes what it is sent."""
        self._signal(signal.SIGSTOP)
        assert self._process is not None
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)  # all its threads have

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.send_signal(number)
        self._process.wait(START_TIMEOUT_S)
        self._process = None

    def _arguments(self) -> list[str]:
        raise NotImplementedError

    async def _answers(self) -> bool:
        raise NotImplementedError

    async def _converse(self, question: bytes, *, tls_first: bool) -> bytes:
        context = None
        if tls_first:
            context = ssl.create_default_context(cafile=self.directory / "cert.pem")
        try:
            reader, writer = await asyncio.open_connection("localhost", self.port, ssl=context)
        except OSError:
            return b""
        try:
            writer.write(question)
            return await reader.readline()
        except OSError:
            return b""
        finally:
            writer.transport.abort()


class RedisBroker(Broker):
    """A Redis that has what it acknowledged on the disk (AOF), or says that it has not.

    Args:
        fsync: `always` loses nothing that it acknowledged; `everysec` is what others run; without
            any it keeps nothing over a restart.
    """

    schemes = ("redis", "rediss")

    def __init__(self, *arguments: Any, fsync: str = "always", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._fsync = fsync

    @property
    def credentials(self) -> str:
        return f":{self.password}" if self.password else ""

    def _arguments(self) -> list[str]:
        lines = [
            "bind 127.0.0.1 ::1",
            f"port {0 if self.pair else self.port}",
            'save ""',
            f"appendonly {'yes' if self._fsync else 'no'}",
        ]
        if self._fsync:
            lines += [f"appendfsync {self._fsync}"]
        if self.pair:
            lines += [
                f"tls-port {self.port}",
                "tls-cert-file cert.pem",
                "tls-key-file key.pem",
                "tls-auth-clients no",
            ]
        if self.password:
            lines += [f"requirepass {self.password}"]
        file = self.directory / "redis.conf"
        file.write_text("\n".join(lines))
        return [str(file)]

    async def _answers(self) -> bool:
        answer = await self._converse(b"PING\r\n", tls_first=self.pair is not None)
        return answer.startswith((b"+PONG", b"-NOAUTH"))


class NatsBroker(Broker):
    """A NATS with JetStream that keeps its streams in files.

    Args:
        max_payload: what it takes at once.
        jetstream: whether it keeps anything at all.
        token: ask for it.
        permissions: what the user may do, as NATS writes it; everything, where this is empty.
    """

    schemes = ("nats", "tls")

    def __init__(
        self,
        *arguments: Any,
        max_payload: int = 1_048_576,
        jetstream: bool = True,
        token: str = "",
        permissions: Mapping[str, object] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._max_payload = max_payload
        self._jetstream = jetstream
        self._token = token
        self._permissions = permissions or {}

    @property
    def credentials(self) -> str:
        return self._token or (f"{self.user}:{self.password}" if self.password else "")

    def _arguments(self) -> list[str]:
        lines = [f'listen: "localhost:{self.port}"', f"max_payload: {self._max_payload}"]
        if self._jetstream:
            lines += [f'jetstream {{ store_dir: "{self.directory}/streams" }}']
        if self.pair:
            lines += ["tls { cert_file: cert.pem, key_file: key.pem }"]
        if self._token:
            lines += [f'authorization {{ token: "{self._token}" }}']
        elif self.password:
            who = {"user": self.user, "password": self.password, "permissions": self._permissions}
            lines += [f"authorization {json.dumps({'users': [who]})}"]
        file = self.directory / "nats.conf"
        file.write_text("\n".join(lines))
        return ["--config", str(file)]

    async def _answers(self) -> bool:
        return (await self._converse(b"", tls_first=False)).startswith(b"INFO")
