"""Start real proxies with the settings of docs/how-to/alerts.md. Knows the page, and no relay."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx2

from tests.support.brokers import free_port
from tests.support.certificates import Pair, replace
from tests.support.programs import HAPROXY, NGINX, TRAEFIK, needed
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import HOST, ROOT, eventually

PAGE = (ROOT / "docs" / "how-to" / "alerts.md").read_text()
NAMES = ("relay-0", "relay-1")


def block(section: str, language: str, number: int = 0) -> str:
    """Return a file that stands on the page."""
    (text,) = re.findall(rf"^### {section}$(.+?)(?=^##)", PAGE + "\n## ", re.MULTILINE | re.DOTALL)
    found: list[str] = re.findall(rf"^```{language}\n(.+?)^```$", text, re.MULTILINE | re.DOTALL)
    return found[number]


class Proxy:
    """A proxy's process, with TLS, in front of two relays.

    Args:
        directory: for its files.
        pair: its certificate.
        ports: of the relays.
        changes: of what the page says, further than what this machine needs.
    """

    name = ""

    def __init__(
        self, directory: Path, pair: Pair, ports: Sequence[int], changes: Mapping[str, str]
    ) -> None:
        self.directory = directory
        self.port = free_port()
        self.pair = pair
        self._relays = {
            f"{name}:8443": f"{HOST}:{port}" for name, port in zip(NAMES, ports, strict=True)
        }
        self._changes = changes
        self._process: subprocess.Popen[str] | None = None
        self._lines: list[str] = []
        directory.mkdir()
        pair.write_to(directory)

    def __enter__(self) -> Self:
        self._write_files()
        self._process = subprocess.Popen(
            self._command(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)  # its workers, too
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def log(self) -> str:
        """What it wrote, wherever."""
        files = [file.read_text() for file in self.directory.glob("*.log")]
        return "\n".join([*self._lines, *files])

    def url(self, path: str, scheme: str = "wss") -> str:
        """Return where something is."""
        return f"{scheme}://{HOST}:{self.port}{path}"

    async def is_up(self) -> None:
        """Wait until it passes requests on."""
        async with self._http() as http:

            async def now() -> tuple[bool, object]:
                try:
                    answer = await http.get(self.url("/readyz", "https"))
                except httpx2.TransportError as error:
                    return False, (error, self.log)
                return answer.status_code == 200, (answer.status_code, self.log)

            await eventually(now, f"{self.name} works")

    def _http(self) -> httpx2.AsyncClient:
        tls = self.pair.trusting_context()
        return httpx2.AsyncClient(verify=tls, trust_env=False, timeout=PATIENCE_S)

    async def reload(self) -> None:
        """Have it read its files again, and wait until it has."""
        raise NotImplementedError

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _write_files(self) -> None:
        raise NotImplementedError

    def _here(self, text: str, changes: Mapping[str, str]) -> str:
        """Return a file of the page for this machine: addresses, ports and paths."""
        for there, here in {**changes, **self._relays, **self._changes}.items():
            assert there in text, there
            text = text.replace(there, here)
        return text

    def _children(self) -> set[str]:
        assert self._process is not None
        pid = self._process.pid
        return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())

    async def _reload_by(self, number: signal.Signals) -> None:
        assert self._process is not None
        before = self._children()
        self._process.send_signal(number)

        async def now() -> tuple[bool, object]:
            return len(self._children() - before) > 0, self.log

        await eventually(now, "new workers")

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        self._lines.extend(self._process.stdout)


class Nginx(Proxy):
    """nginx."""

    name = "nginx"

    def _write_files(self) -> None:
        there = self.directory
        # What it writes to by default belongs to another user, who must be there.
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"    {kind}_temp_path {there}/{kind};\n" for kind in kinds)
        changes = {
            "/etc/nginx/": f"{there}/",
            "/var/log/nginx/": f"{there}/",
            "listen 443": f"listen {HOST}:{self.port}",
            "\nhttp {\n": f"\nhttp {{\n{paths}",
            "worker_processes auto": f"pid {there}/nginx.pid; worker_processes 2",
        }
        (there / "nginx.conf").write_text(self._here(block("nginx", "nginx"), changes))

    def _command(self) -> list[str]:
        file = str(self.directory / "nginx.conf")
        return [str(needed(NGINX)), "-e", "stderr", "-c", file, "-g", "daemon off;"]

    async def reload(self) -> None:
        await self._reload_by(signal.SIGHUP)


class Haproxy(Proxy):
    """HAProxy, with a master."""

    name = "haproxy"

    def _write_files(self) -> None:
        there, pair = self.directory, self.pair
        (there / "relay.pem").write_bytes(pair.certificate_pem + pair.key_pem)
        changes = {
            "/etc/haproxy/": f"{there}/",
            "bind :443": f"bind {HOST}:{self.port}",
            "maxconn 32768": "maxconn 400",  # it does not start without the descriptors
        }
        (there / "haproxy.cfg").write_text(self._here(block("HAProxy", "haproxy"), changes))

    def _command(self) -> list[str]:
        return [str(needed(HAPROXY)), "-W", "-f", str(self.directory / "haproxy.cfg")]

    async def reload(self) -> None:
        await self._reload_by(signal.SIGUSR2)


class Traefik(Proxy):
    """Traefik, which watches its file."""

    name = "traefik"

    def _write_files(self) -> None:
        there = self.directory
        static = block("Traefik", "yaml", 0)
        static = static.replace(":443", f"{HOST}:{self.port}").replace("/etc/traefik", str(there))
        (there / "traefik.yaml").write_text(static)
        changes = {"/etc/traefik/": f"{there}/"}
        text = self._here(block("Traefik", "yaml", 1), changes)
        (there / "relays.yaml").write_text(text)

    def _command(self) -> list[str]:
        return [str(needed(TRAEFIK)), f"--configfile={self.directory / 'traefik.yaml'}"]

    async def reload(self) -> None:
        # It says nothing of it. So a path becomes its own to answer, and not a relay's.
        file = self.directory / "relays.yaml"
        other_rule = "PathPrefix(`/`) && !Path(`/reloaded`)"
        replace(file, file.read_text().replace("PathPrefix(`/`)", other_rule).encode())
        async with self._http() as http:

            async def now() -> tuple[bool, object]:
                said = (await http.get(self.url("/reloaded", "https"))).text
                return said == "404 page not found\n", said

            await eventually(now, "the new file is read")


PROXIES: Mapping[str, type[Proxy]] = {kind.name: kind for kind in (Nginx, Haproxy, Traefik)}
