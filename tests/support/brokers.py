"""Run real brokers for tests: each is a process with a directory and a port. Knows no relay.

programs.py finds their programs.
"""

import asyncio
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.support.certificates import CertificatePair

START_TIMEOUT_S = 10.0

PORTS = range(20_000, 30_000)
"""Below the ephemeral ports: a client could take one of those while a broker restarts."""


def free_port() -> int:
    """Return a port that no socket is bound to, and that no later call returns.

    On Linux a socket stays bound to it that does not listen: calls in other processes see that the
    port is in use, and a server, which sets SO_REUSEADDR, can listen on it again and again.
    """
    while True:
        port = random.choice(PORTS)
        reserving = socket.socket()
        try:
            reserving.bind(("127.0.0.1", port))
        except OSError:
            reserving.close()
            continue
        if sys.platform == "linux":
            reserving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserving.detach()  # bound until this process ends
        else:
            reserving.close()
        return port


def is_free(port: int) -> bool:
    """Return whether no socket is bound to a port."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


class Broker:
    """A broker's process. Its data is in its directory and survives restarts.

    Args:
        program: of the broker.
        directory: for its settings, data and log.
        pair: the certificate for TLS; None: no TLS.
        client_pair: the certificate that clients need; None: they need none.
        password: that clients need; empty: none.
        user: the name that belongs to the password.
    """

    schemes = ("", "")

    def __init__(
        self,
        program: Path,
        directory: Path,
        *,
        pair: CertificatePair | None = None,
        client_pair: CertificatePair | None = None,
        password: str = "",
        user: str = "",
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = free_port()
        self.pair = pair
        self.client_pair = client_pair
        self.client_directory = directory / "client"
        self.password = password
        self.user = user
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._log = directory / "broker.log"
        self.write_certificates()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        """The URL with the credentials that the broker requires."""
        return self.url_with(self.credentials)

    @property
    def credentials(self) -> str:
        """The part of the URL before the @; empty: none."""
        raise NotImplementedError

    def write_certificates(self) -> None:
        """Write the certificates, also after they were replaced."""
        if self.pair is not None:
            self.pair.write_to(self.directory)
        if self.client_pair is not None:
            self.client_directory.mkdir(exist_ok=True)
            self.client_pair.write_to(self.client_directory)

    @property
    def pid(self) -> int:
        """The id of the process."""
        assert self._process is not None
        return self._process.pid

    def url_with(self, credentials: str) -> str:
        """Return the URL with other credentials."""
        scheme = self.schemes[self.pair is not None]
        userinfo = f"{credentials}@" if credentials else ""
        query = f"?ssl_ca_certs={self.directory / 'cert.pem'}" if self.pair else ""
        return f"{scheme}://{userinfo}localhost:{self.port}{query}"

    @property
    def log(self) -> str:
        """The text of the broker's log."""
        return self._log.read_text(errors="replace")

    async def start(self) -> None:
        """Start the process, and wait until it answers."""
        process = self._process = self._launch()
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await self._answers():
                assert process.poll() is None, self._log.read_text()
                await asyncio.sleep(0.02)

    def _launch(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [self._program, *self._arguments()],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        """Send SIGTERM, and wait for the end of the process."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end of the process."""
        self._end(signal.SIGKILL)

    async def restart(self) -> None:
        """Kill the process, and start another one on the same data and port."""
        self.kill()
        await self.start()

    def freeze(self) -> None:
        """Stop all threads of the process; the kernel still receives data for it."""
        self._signal(signal.SIGSTOP)
        assert self._process is not None
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)  # until all threads are stopped

    def thaw(self) -> None:
        """Continue a frozen process."""
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

    async def _first_line(self, request: bytes, *, uses_tls: bool) -> bytes:
        """Send a request on a new connection; return the first line of the answer, or nothing."""
        context = None
        if uses_tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if self.client_pair is not None:
                files = (self.client_directory / "cert.pem", self.client_directory / "key.pem")
                context.load_cert_chain(*files)
        try:
            reader, writer = await asyncio.open_connection("localhost", self.port, ssl=context)
        except OSError:
            return b""
        try:
            writer.write(request)
            return await reader.readline()
        except OSError:
            return b""
        finally:
            writer.transport.abort()


class RedisBroker(Broker):
    """A Redis with an append-only file (AOF).

    Args:
        fsync: `always`: all acknowledged entries survive a crash; `everysec`: the usual setting
            of operators; empty: no file, all entries are lost at a restart.
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
                *(
                    ["tls-auth-clients yes", "tls-ca-cert-file client/cert.pem"]
                    if self.client_pair
                    else ["tls-auth-clients no"]
                ),
            ]
        if self.password:
            lines += [f"requirepass {self.password}"]
        file = self.directory / "redis.conf"
        file.write_text("\n".join(lines))
        return [str(file)]

    async def _answers(self) -> bool:
        answer = await self._first_line(b"PING\r\n", uses_tls=self.pair is not None)
        return answer.startswith((b"+PONG", b"-NOAUTH"))


class NatsBroker(Broker):
    """A NATS whose JetStream stores its streams in files.

    Args:
        max_payload: the largest message, in bytes.
        jetstream: whether JetStream is enabled.
        token: that clients need; empty: none.
        permissions: of the user, in the form of NATS's settings; empty: all.
        handshake_first: whether TLS begins before the first message of the server.
        settings: further settings.
    """

    schemes = ("nats", "tls")

    def __init__(
        self,
        *arguments: Any,
        max_payload: int = 1_048_576,
        jetstream: bool = True,
        token: str = "",
        permissions: Mapping[str, object] | None = None,
        handshake_first: bool = False,
        settings: Mapping[str, object] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._max_payload = max_payload
        self._jetstream = jetstream
        self._token = token
        self._permissions = permissions or {}
        self._handshake_first = handshake_first
        self._settings = settings or {}

    @property
    def credentials(self) -> str:
        return self._token or (f"{self.user}:{self.password}" if self.password else "")

    def _arguments(self) -> list[str]:
        lines = [f'listen: "localhost:{self.port}"', f"max_payload: {self._max_payload}"]
        if self._jetstream:
            lines += [f'jetstream {{ store_dir: "{self.directory}/streams" }}']
        if self.pair:
            tls: dict[str, object] = {"cert_file": "cert.pem", "key_file": "key.pem"}
            tls |= {"handshake_first": self._handshake_first}
            if self.client_pair:
                tls |= {"verify": True, "ca_file": "client/cert.pem"}
            lines += [f"tls {json.dumps(tls)}"]
        if self._token:
            lines += [f'authorization {{ token: "{self._token}" }}']
        elif self.password:
            user = {"user": self.user, "password": self.password, "permissions": self._permissions}
            lines += [f"authorization {json.dumps({'users': [user]})}"]
        lines += [f"{name}: {json.dumps(value)}" for name, value in self._settings.items()]
        file = self.directory / "nats.conf"
        file.write_text("\n".join(lines))
        return ["--config", str(file)]

    async def _answers(self) -> bool:
        answer = await self._first_line(b"", uses_tls=self._handshake_first)
        return answer.startswith(b"INFO")
