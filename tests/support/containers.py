"""Build the image and run containers of it, with docker and its daemon or with podman.

Builds with `make image`, and runs containers with the commands of an operator.
"""

import json
import os
import re
import shutil
import subprocess
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any

from tests.support.programs import MMDEBSTRAP, needed, skip_test
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import HOST, ROOT, RelayProcess
from tests.support.shell import user_environment

BUILD_S = 600
PULL_S = 60

DEFAULT_BASE: str
(DEFAULT_BASE,) = re.findall(r"^ARG BASE=(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
STAND_IN = "localhost/websocket-relay-stand-in:trixie"

# For root without systemd and without permission to raise limits, as in a container of a CI.
PODMAN_CONF = """\
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
log_driver = "k8s-file"
"""

HARDENED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges")

# Makes a Debian with its own Python look like the base image: the program is named `python`, pip is
# installed and may install packages, and the certificates of this machine are trusted.
CUSTOMIZE_BASE = """\
set -e
cd "$1"
rm -f usr/lib/python3*/EXTERNALLY-MANAGED
ln -s python3 usr/bin/python
cp /etc/ssl/certs/ca-certificates.crt etc/ssl/certs/
printf '[global]\\ncert = /etc/ssl/certs/ca-certificates.crt\\n' > etc/pip.conf
wheel=$(ls usr/share/python-wheels/pip-*.whl)
chroot . python3 "/$wheel/pip" install --quiet --no-index --root-user-action ignore "/$wheel"
"""


class Engine:
    """A program that builds images and runs containers.

    Args:
        program: docker or podman.
        directory: for podman's settings file.
    """

    def __init__(self, program: str, directory: Path) -> None:
        self.program = program
        self._env = user_environment()
        self._build_args: tuple[str, ...] = ()
        self._run_args: tuple[str, ...] = HARDENED
        if program == "podman":
            # By default, read-only containers of podman get a tmpfs at /tmp.
            self._run_args = (*HARDENED, "--read-only-tmpfs=false")
            if os.geteuid() == 0 and not Path("/run/systemd/system").exists():
                self._build_args = ("--isolation=chroot",)
                conf = directory / "containers.conf"
                conf.write_text(PODMAN_CONF)
                self._env |= {"CONTAINERS_CONF": str(conf)}

    def __call__(self, *arguments: str, timeout_s: float = PATIENCE_S) -> str:
        """Run a command of the program; return its output.

        Raises:
            AssertionError: it fails.
        """
        done = self.run_unchecked(*arguments, timeout_s=timeout_s)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def run_unchecked(
        self, *arguments: str, timeout_s: float = PATIENCE_S
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command of the program that may fail."""
        return subprocess.run(
            [self.program, *arguments],
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def make_image(self, image: str, base: str, directory: Path = ROOT) -> None:
        """Run `make image`."""
        done = subprocess.run(
            ["make", "image", f"CONTAINER={self.program}", f"IMAGE={image}", f"BASE={base}",
             f"BUILD_ARGS={' '.join(self._build_args)}"],
            cwd=directory,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=BUILD_S,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def inspect(self, image: str) -> dict[str, Any]:
        """Return the metadata of an image."""
        (found,) = json.loads(self("image", "inspect", image))
        return dict(found)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start a container in the foreground."""
        return subprocess.Popen(
            [self.program, "run", "--rm", *self._run_args, *arguments],
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )


class Container(RelayProcess):
    """A relay in a container."""

    def __init__(
        self,
        engine: Engine,
        image: str,
        directory: Path,
        *,
        env: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        options: Sequence[str] = (),
        ports: tuple[int, int] = (8443, 9090),
    ) -> None:
        """Prepare a container.

        Args:
            engine: runs the container.
            image: the image of the container.
            directory: for files of the tests.
            env: variables, besides the one that makes tests able to parse the log.
            settings: those settings of the container that the tests depend on (TLS); they are not
                passed to it.
            options: of the command `run`.
            ports: inside the container, of the relay and of its metrics.
        """
        super().__init__(directory, settings)
        self._engine = engine
        self._image = image
        self._variables = {"RELAY__LOGGING__FORMAT": "json"} | dict(env or {})
        self._options = options
        self._ports = ports
        self.name = f"relay-{uuid.uuid4().hex[:12]}"

    def start(self) -> None:
        self.launch()

    def launch(self) -> None:
        published = [f"--publish={HOST}::{port}" for port in self._ports]
        variables = [f"--env={name}={value}" for name, value in self._variables.items()]
        self._process = self._engine.start(
            f"--name={self.name}", *published, *variables, *self._options, self._image
        )
        self._log_reader = threading.Thread(target=self._read_log, daemon=True)
        self._log_reader.start()

    def end(self) -> None:
        self._engine.run_unchecked("rm", "--force", self.name)
        super().end()

    def signal(self, number: Signals = SIGTERM) -> None:
        self._engine("kill", f"--signal={number.name}", self.name)

    def exec_command(self, *command: str) -> str:
        """Run a command in the container; return its output."""
        return self._engine("exec", self.name, *command)

    def exec_python(self, source: str) -> str:
        """Run Python in the container; return its output without white space at the ends."""
        return self.exec_command("python", "-c", source).strip()

    def _published(self, port: int) -> int:
        return int(self._engine("port", self.name, f"{port}/tcp").strip().rpartition(":")[2])

    @property
    def port(self) -> int:
        return self._published(self._ports[0])

    @property
    def metrics_port(self) -> int:
        return self._published(self._ports[1])


def find_engine(directory: Path) -> Engine:
    """Return the engine that this machine has."""
    for program in ("docker", "podman"):
        engine = Engine(program, directory)
        if shutil.which(program) and engine.run_unchecked("info").returncode == 0:
            return engine
    return skip_test("needs docker with a daemon, or podman (Debian: podman)")


def find_base(engine: Engine, directory: Path) -> str:
    """Return the base image: the one in the variable BASE, the Dockerfile's, or a stand-in."""
    if named := os.environ.get("BASE"):
        return named
    try:
        if engine.run_unchecked("pull", DEFAULT_BASE, timeout_s=PULL_S).returncode == 0:
            return DEFAULT_BASE
    except subprocess.TimeoutExpired:
        pass
    if engine.run_unchecked("image", "inspect", STAND_IN).returncode != 0:
        make_stand_in(engine, directory)
    return STAND_IN


def make_stand_in(engine: Engine, directory: Path) -> None:
    """Make a base image of Debian's packages, for a machine that reaches no image registry."""
    program = needed(MMDEBSTRAP)
    if os.geteuid() != 0:
        skip_test(f"{DEFAULT_BASE} can not be pulled, and only root can run mmdebstrap")

    archive = directory / "base.tar"
    done = subprocess.run(
        [program, "--variant=minbase", "--include=ca-certificates,python3-venv",
         f"--customize-hook={CUSTOMIZE_BASE}", "trixie", str(archive)],
        capture_output=True,
        text=True,
        timeout=BUILD_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    engine("import", str(archive), STAND_IN, timeout_s=BUILD_S)
    archive.unlink()
