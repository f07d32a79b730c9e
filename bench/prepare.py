"""Build what is measured and what measures: C, Go, npm and Python parts. Starts no server."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
RIVALS = HERE / "rivals"
LOADGEN = BUILD / "loadgen"
FLOOR = BUILD / "floor"
GORILLA = BUILD / "gorilla"
CERTIFICATES = BUILD / "tls"
NGINX = Path("/usr/sbin/nginx")  # not on everyone's path
DEBIAN_GOPATH = Path("/usr/share/gocode")  # where golang-github-gorilla-websocket-dev puts it
BUILD_TIMEOUT_S = 600


class AbsentError(Exception):
    """A part is not available on this machine; the message has its name and the reason."""


def _run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it failed"]
        message = next((line for line in lines if "fatal error" in line), lines[-1])
        raise AbsentError(f"{Path(str(command[0])).name}: {message}")


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise AbsentError(f"{name} is not installed")
    return path


def python_parts() -> None:
    """Install what only the benchmark needs, at its locked versions, into this environment."""
    if all(map(find_spec, ("httptools", "matplotlib", "socketify"))):
        return
    print("installing bench/requirements.lock", flush=True)
    lock = HERE / "requirements.lock"
    _run(sys.executable, "-m", "pip", "install", "-q", "--require-hashes", "-r", lock)


def _compile(source: Path, program: Path, *libraries: str) -> None:
    BUILD.mkdir(exist_ok=True)
    _run(_tool("cc"), "-O2", "-Wall", "-Wextra", "-o", program, source, "-lm", *libraries)


def loadgen() -> None:
    """Compile the load generator; without it there is no benchmark."""
    _compile(HERE / "loadgen.c", LOADGEN, "-lz", "-lssl", "-lcrypto")


def certificate() -> None:
    """Write the certificate of all servers with TLS, with a key on P-256."""
    _run(sys.executable, "-m", "websocket_relay", "dev-cert", "--directory", CERTIFICATES)


def floor() -> None:
    """Compile `floor`."""
    _compile(RIVALS / "floor.c", FLOOR)


def uwebsockets() -> None:
    """Check that socketify can be imported."""
    if find_spec("socketify") is None:
        raise AbsentError("socketify has no build for this machine")


def ws_node() -> None:
    """Install ws at its locked version."""
    _tool("node")
    folder = RIVALS / "ws_node"
    lock, installed = folder / "package-lock.json", folder / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        _run(_tool("npm"), "ci", "--no-audit", "--no-fund", cwd=folder)


def gorilla() -> None:
    """Compile the Go hub from Debian's package of gorilla/websocket, or else from the module."""
    BUILD.mkdir(exist_ok=True)
    env = {name: value for name, value in os.environ.items() if not name.startswith("GO")}
    if (DEBIAN_GOPATH / "src/github.com/gorilla/websocket").is_dir():
        env |= {"GO111MODULE": "off", "GOPATH": str(DEBIAN_GOPATH)}
    _run(_tool("go"), "build", "-o", GORILLA, ".", cwd=RIVALS / "gorilla", env=env)


def gorilla_tls() -> None:
    """Compile the Go hub, and write its certificate."""
    gorilla()
    certificate()


def nginx_tls() -> None:
    """Check that nginx is installed, and write its certificate."""
    if not NGINX.is_file() and shutil.which("nginx") is None:
        raise AbsentError("nginx is not installed")
    certificate()
