"""Start real proxies with the files of the how-to pages. Knows those pages, and no relay."""

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2
import yaml

from tests.support.brokers import free_port
from tests.support.certificates import CertificatePair, replace_file
from tests.support.pages import Block, fenced_blocks
from tests.support.programs import HAPROXY, NGINX, TRAEFIK, needed
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import HOST, ROOT, eventually, merged

HOW_TO = ROOT / "docs" / "how-to"
SITE = "relay.example.com"
"""The host on the pages under which clients reach the proxy."""

RELAYS = ("relay-0", "relay-1")


def blocks_of(page: str, language: str, title: str = "") -> list[Block]:
    """Return the blocks of a how-to page that have a language and a title."""
    text = (HOW_TO / f"{page}.md").read_text()
    return [
        each for each in fenced_blocks(text) if (each.language, each.title) == (language, title)
    ]


def file_of(page: str, language: str, title: str) -> str:
    """Return a configuration file that a how-to page shows."""
    (block,) = blocks_of(page, language, title)
    return block.text


def relay_settings_of(page: str) -> dict[str, Any]:
    """Return the settings of the relay that a how-to page requires."""
    return reduce(merged, (yaml.safe_load(each.text) for each in blocks_of(page, "yaml")), {})


def diffs_of(page: str, title: str) -> list[Mapping[str, str]]:
    """Return the changes that a how-to page makes to a file: for each diff, old and new lines."""

    def lines(block: Block, sign: str) -> str:
        kept = [line for line in block.text.splitlines() if line.startswith(sign)]
        return "\n".join(line.removeprefix(sign) for line in kept)

    return [{lines(each, "-"): lines(each, "+")} for each in blocks_of(page, "diff", title)]


class Proxy:
    """A proxy's process that ends TLS in front of two relays.

    Args:
        directory: for its files.
        pair: the certificate that it serves.
        ports: the ports of the relays.
        changes: replacements in the page's file, besides those that this machine requires.
    """

    name = ""
    page_file = ""
    """The file on the page of this name that lists the relays."""

    language = ""
    """The language of that block."""

    def __init__(
        self,
        directory: Path,
        pair: CertificatePair,
        ports: Sequence[int],
        changes: Mapping[str, str],
    ) -> None:
        self.directory = directory
        self.port = free_port()
        self.pair = pair
        self._relays = {
            f"{name}:8443": f"{HOST}:{port}" for name, port in zip(RELAYS, ports, strict=True)
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
        os.killpg(self._process.pid, signal.SIGKILL)  # with its workers
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def log(self) -> str:
        """Its output and its log files."""
        files = [file.read_text() for file in self.directory.glob("*.log")]
        return "\n".join([*self._lines, *files])

    @property
    def address(self) -> str:
        """Where it listens, in place of the site on the pages."""
        return f"{HOST}:{self.port}"

    def url(self, path: str, scheme: str = "wss") -> str:
        """Return the URL of a path."""
        return f"{scheme}://{self.address}{path}"

    async def wait_until_up(self, path: str = "/readyz") -> None:
        """Wait until it passes requests for a path to a relay."""
        async with self._http() as http:

            async def now() -> tuple[bool, object]:
                try:
                    answer = await http.get(self.url(path, "https"))
                except httpx2.TransportError as error:
                    return False, (error, self.log)
                return answer.status_code == 200, (answer.status_code, self.log)

            await eventually(now, f"{self.name} passes requests to a relay")

    def _http(self) -> httpx2.AsyncClient:
        tls = self.pair.client_context()
        return httpx2.AsyncClient(verify=tls, trust_env=False, timeout=PATIENCE_S)

    def check_files(self) -> None:
        """Run the proxy's own check of its files.

        Raises:
            AssertionError: it reports an error or a warning.
        """
        done = subprocess.run(
            self._check_command(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        assert "warn" not in output.lower(), output

    async def reload(self) -> None:
        """Make it read its files again, and wait until it has."""
        raise NotImplementedError

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _check_command(self) -> list[str]:
        raise NotImplementedError

    def _write_files(self) -> None:
        raise NotImplementedError

    def _adapted(self, changes: Mapping[str, str]) -> str:
        """Return the page's file with the addresses, ports and paths of this machine."""
        text = file_of(self.name, self.language, self.page_file)
        for old, new in {**changes, **self._relays, **self._changes}.items():
            assert old in text, old
            text = text.replace(old, new)
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
    page_file = "/etc/nginx/nginx.conf"
    language = "nginx"

    def _write_files(self) -> None:
        # Its default directories belong to a user that this machine may not have.
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"    {kind}_temp_path {self.directory}/{kind};\n" for kind in kinds)
        changes = {
            "/etc/nginx/": f"{self.directory}/",
            "/var/log/nginx/": f"{self.directory}/",
            "listen 443": f"listen {self.address}",
            "\nhttp {\n": f"\nhttp {{\n{paths}",
            "worker_processes auto": f"pid {self.directory}/nginx.pid; worker_processes 2",
        }
        (self.directory / "nginx.conf").write_text(self._adapted(changes))

    def _command(self) -> list[str]:
        file = str(self.directory / "nginx.conf")
        return [str(needed(NGINX)), "-e", "stderr", "-c", file, "-g", "daemon off;"]

    def _check_command(self) -> list[str]:
        return [*self._command(), "-t"]

    async def reload(self) -> None:
        await self._reload_by(signal.SIGHUP)


class Haproxy(Proxy):
    """HAProxy, with a master process."""

    name = "haproxy"
    page_file = "/etc/haproxy/haproxy.cfg"
    language = "haproxy"

    def _write_files(self) -> None:
        combined = self.pair.certificate_pem + self.pair.key_pem
        (self.directory / "relay.pem").write_bytes(combined)
        changes = {
            "/etc/haproxy/": f"{self.directory}/",
            "bind :443": f"bind {self.address}",
            "maxconn 32768": "maxconn 400",  # it does not start without the descriptors
        }
        (self.directory / "haproxy.cfg").write_text(self._adapted(changes))

    def _command(self) -> list[str]:
        return [str(needed(HAPROXY)), "-W", "-f", str(self.directory / "haproxy.cfg")]

    def _check_command(self) -> list[str]:
        return [str(needed(HAPROXY)), "-c", "-f", str(self.directory / "haproxy.cfg")]

    async def reload(self) -> None:
        await self._reload_by(signal.SIGUSR2)


class Traefik(Proxy):
    """Traefik, which watches its file of routes."""

    name = "traefik"
    page_file = "/etc/traefik/relays.yaml"
    language = "yaml"

    def _write_files(self) -> None:
        static = file_of("traefik", "yaml", "/etc/traefik/traefik.yaml")
        static = static.replace(":443", self.address)
        static = static.replace("/etc/traefik", str(self.directory))
        (self.directory / "traefik.yaml").write_text(static)
        text = self._adapted({"/etc/traefik/": f"{self.directory}/"})
        (self.directory / "relays.yaml").write_text(text)

    def _command(self) -> list[str]:
        return [str(needed(TRAEFIK)), f"--configfile={self.directory / 'traefik.yaml'}"]

    async def reload(self) -> None:
        # It logs nothing about it. So Traefik itself gets a path to answer instead of a relay.
        file = self.directory / "relays.yaml"
        other_rule = "PathPrefix(`/`) && !Path(`/reloaded`)"
        replace_file(file, file.read_text().replace("PathPrefix(`/`)", other_rule).encode())
        async with self._http() as http:

            async def now() -> tuple[bool, object]:
                text = (await http.get(self.url("/reloaded", "https"))).text
                return text == "404 page not found\n", text

            await eventually(now, "the new file is read")


PROXIES: Mapping[str, type[Proxy]] = {kind.name: kind for kind in (Nginx, Haproxy, Traefik)}
"""The proxies, by the names of their pages."""
