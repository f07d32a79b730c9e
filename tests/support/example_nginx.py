"""Run nginx with examples/nginx.conf in front of relays on this machine."""

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from tests.support.brokers import free_port
from tests.support.programs import NGINX, needed
from tests.support.relay_process import HOST, ROOT, RelayProcess, eventually

NGINX_CONF = ROOT / "examples" / "nginx.conf"


def adapted_conf(ports: Mapping[str, int], port: int, directory: Path) -> str:
    """Return examples/nginx.conf with the addresses, ports and paths of this machine.

    Nothing else is changed. Names of relays need Docker's resolver and nginx 1.27.3.

    Args:
        ports: of the relays, by their names.
        port: for clients.
        directory: for the files that nginx writes.
    """
    changes = {
        " /tmp/": f" {directory}/",
        "resolver 127.0.0.11 valid=2s;": "",
        "listen 8443": f"listen {HOST}:{port}",
        "/dev/stdout": f"{directory}/access.log",
    } | {f"{name}:8443 resolve": f"{HOST}:{own}" for name, own in ports.items()}
    text = NGINX_CONF.read_text()
    for original, replacement in changes.items():
        assert original in text
        text = text.replace(original, replacement)
    return text


class ExampleNginx(RelayProcess):
    """An nginx. It has the interface of a relay, for the clients of the tests."""

    def __init__(self, directory: Path, ports: Mapping[str, int]) -> None:
        super().__init__(directory)
        self._port = free_port()
        self._access_log = directory / "access.log"
        self._file = directory / "nginx.conf"
        self._file.write_text(adapted_conf(ports, self._port, directory))

    def __enter__(self) -> Self:
        self.launch()
        return self

    @property
    def port(self) -> int:
        return self._port

    @property
    def access_log(self) -> list[str]:
        return self._access_log.read_text().splitlines()

    def command(self, *arguments: str) -> list[str]:
        return [str(needed(NGINX)), "-e", "stderr", "-c", str(self._file), *arguments]

    def launch(self) -> None:
        self._process = subprocess.Popen(
            self.command("-g", "daemon off;"),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._log_reader = threading.Thread(target=self._read_log, daemon=True)
        self._log_reader.start()

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # with its workers
        super().end()

    async def await_up(self) -> None:
        """Wait until it accepts connections."""

        async def try_to_connect() -> tuple[bool, object]:
            try:
                _, writer = await asyncio.open_connection(HOST, self._port)
            except OSError as error:
                return False, error
            writer.close()
            await writer.wait_closed()
            return True, None

        await eventually(try_to_connect, "nginx accepts connections")
