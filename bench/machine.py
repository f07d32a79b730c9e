"""The facts of a result beside its values: the machine, the versions, the commit."""

import os
import platform
import re
import subprocess
import zlib
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench import prepare

LIBRARIES = (
    "fastapi",
    "starlette",
    "uvicorn",
    "uvloop",
    "websockets",
    "prometheus-client",
    "pyjwt",
    "redis",
    "hiredis",
    "nats-py",
    "socketify",
)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=prepare.HERE, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    text = Path("/proc/cpuinfo").read_text()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1) if match else platform.machine()


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _first_match(pattern: str, path: Path) -> str | None:
    match = re.search(pattern, path.read_text()) if path.exists() else None
    return match.group(1) if match else None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["zlib"] = zlib.ZLIB_RUNTIME_VERSION
    rivals = prepare.RIVALS
    found["cc"] = (_output("cc", "--version") or "").partition("\n")[0] or None
    found["node"] = _output("node", "--version")
    found["ws"] = _first_match(
        r'node_modules/ws": {\s*"version": "([^"]+)"', rivals / "ws_node" / "package-lock.json"
    )
    found["go"] = (_output("go", "version") or "").removeprefix("go version ") or None
    found["gorilla/websocket"] = _first_match(
        r"gorilla/websocket v(\S+)", rivals / "gorilla" / "go.mod"
    )
    return found


def _commit() -> dict[str, Any]:
    """Return the commit, and whether the tree differs from it, apart from results."""
    changes = _output("git", "status", "--porcelain", "--", ":/", ":(exclude,top)bench/results")
    return {"commit": _output("git", "rev-parse", "HEAD"), "dirty": bool(changes)}


def facts() -> dict[str, Any]:
    """Return all facts."""
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_gib": _memory_gib(),
            "kernel": platform.release(),
            "system": platform.platform(),
        },
        "versions": _versions(),
        **_commit(),
    }
