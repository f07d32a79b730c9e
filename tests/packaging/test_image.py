"""The image: built from the Dockerfile, run as an operator runs it, and inspected.

`make image-test` runs these tests. `make test` does not: they need docker or podman.
"""

import json
import os
import shutil
import tarfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.certificates import make_pair
from tests.support.containers import Container, Engine, find_base, find_engine
from tests.support.relay_process import ROOT, await_close, open_pipe_when_read, receive

pytestmark = [pytest.mark.image, pytest.mark.timeout(900)]

IMAGE = "localhost/websocket-relay:test"
CONFIG = "/etc/websocket-relay"
MAX_ADDED_BYTES = 85_000_000
"""The limit of what the image adds to its base."""

PARTS = ("Dockerfile", ".dockerignore", "Makefile", "pyproject.toml", "README.md", "CHANGELOG.md",
         "LICENSE", "requirements", "service")  # fmt: skip

Start = Callable[..., Container]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return find_engine(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def base(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    return find_base(engine, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def image(engine: Engine, base: str) -> str:
    engine.make_image(IMAGE, base)
    return IMAGE


@pytest.fixture
def start(engine: Engine, image: str, tmp_path: Path) -> Iterator[Start]:
    """Start a container, hardened, and wait until it is ready."""
    with ExitStack() as stack:

        def run(**arguments: Any) -> Container:
            return stack.enter_context(Container(engine, image, tmp_path, **arguments))

        yield run


def mounted(file: Path, name: str) -> str:
    """Return the option that mounts a file in the directory of the settings."""
    file.chmod(0o444)  # the user id of the relay is unknown on this machine
    return f"--volume={file}:{CONFIG}/{name}:ro"


# A running container


async def test_a_container_relays_without_settings(start: Start) -> None:
    relay = start()
    async with relay.client() as one, relay.client() as two:
        await one.send("hello")
        assert await receive(one) == await receive(two) == "hello"
    assert (await relay.get("/readyz")).json() == {"status": "ready"}
    assert (await relay.metric("websocket_messages_total")) == 1


async def test_a_container_needs_no_shell(start: Start) -> None:
    relay = start(options=[f"--volume=/dev/null:/bin/{name}:ro" for name in ("sh", "bash")])
    async with relay.client() as client:
        await client.send("hello")
        assert await receive(client) == "hello"


def test_the_relay_is_process_1_without_capabilities(start: Start) -> None:
    relay = start()
    status = dict(
        line.split(":\t", 1)
        for line in relay.exec_python("print(open('/proc/1/status').read())").splitlines()
        if ":\t" in line
    )
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"10001"}
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[kind], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"
    command = relay.exec_python("print(open('/proc/1/cmdline').read())").split("\0")
    assert command[1].endswith("/websocket-relay")


async def test_settings_come_from_a_mounted_file_and_the_environment(
    start: Start, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"server": {"port": 7001}, "metrics": {"port": 7002}}))
    relay = start(
        options=[mounted(file, "config.yaml")],
        env={"RELAY__METRICS__PORT": "7003", "RELAY__SERVER__BASE_PATH": "/relay"},
        ports=(7001, 7003),
    )
    async with relay.client(path="/relay/channels/news") as client:
        await client.send("hello")
        assert await receive(client) == "hello"
    assert (await relay.metric("websocket_messages_total")) == 1
    relay.exec_command("websocket-relay", "healthcheck")


async def test_a_mounted_certificate_enables_tls(start: Start, tmp_path: Path) -> None:
    pair = make_pair()
    pair.write_to(tmp_path)
    relay = start(
        options=[mounted(tmp_path / name, name) for name in ("cert.pem", "key.pem")],
        env={"RELAY__SERVER__TLS__ENABLED": "true", "RELAY__METRICS__ENABLED": "false"},
        settings={"server": {"tls": {"enabled": True}}},
        ports=(8443, 9090),
    )
    relay.tls_context = pair.client_context()
    async with relay.client() as client:
        await client.send("hello")
        assert await receive(client) == "hello"
    relay.exec_command("websocket-relay", "healthcheck")


def test_an_invalid_setting_ends_the_start_with_an_error_line(engine: Engine, image: str) -> None:
    done = engine.run_unchecked("run", "--rm", "--env=RELAY__SERVER__PORT=many", image)
    assert done.returncode == 2
    assert "websocket-relay: RELAY__SERVER__PORT" in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_stop_closes_clients_with_1001_and_ends_with_0(start: Start) -> None:
    relay = start(env={"RELAY__SHUTDOWN__SPREAD_S": "0.5"})
    async with relay.client() as client:
        relay.signal()
        code, reason = await await_close(client)
        assert code == 1001
        assert str(reason).startswith("draining; retry_ms=")
    assert await relay.exit_code() == 0
    assert [event["event"] for event in relay.log_events][-1] == "stopped"


async def test_a_signal_before_the_settings_are_read_ends_the_container_with_0(
    engine: Engine, image: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "unread")
    options = [mounted(tmp_path / "unread", "config.yaml")]
    relay = Container(engine, image, tmp_path, options=options)
    try:
        relay.launch()
        async with open_pipe_when_read(tmp_path / "unread"):
            relay.signal()
        assert await relay.exit_code() == 0
        assert relay.log_events == []
    finally:
        relay.end()


def test_the_health_check_needs_no_shell(engine: Engine, image: str, start: Start) -> None:
    found = engine.inspect(image)
    check = found["Config"].get("Healthcheck") or found["Healthcheck"]  # Docker, podman
    form, *command = check["Test"]
    assert form == "CMD"
    start().exec_command(*command)


def test_the_script_of_helm_test_runs_in_the_image(start: Start) -> None:
    script = (ROOT / "helm" / "websocket-relay" / "files" / "round_trip.py").read_text()
    relay = start(env={"RELAY_TEST_URL": "ws://localhost:8443/"})
    assert relay.exec_python(script) == "two clients receive each other's messages, in one order"


# Content


def test_the_image_has_no_pip_no_compiler_and_no_download_program(start: Start) -> None:
    source = """\
import importlib.util as have, shutil
modules = [name for name in ("pip", "ensurepip", "hatchling", "setuptools") if have.find_spec(name)]
programs = ("pip", "pip3", "gcc", "cc", "make", "curl", "wget", "git")
print(modules + [name for name in programs if shutil.which(name)])
"""
    assert start().exec_python(source) == "[]"


def test_the_relay_can_write_nowhere_in_its_installation(start: Start) -> None:
    source = """\
import os
print([path for path, _, _ in os.walk("/opt/websocket-relay") if os.access(path, os.W_OK)])
"""
    assert start().exec_python(source) == "[]"


def test_the_installed_versions_are_those_of_the_lock(start: Start) -> None:
    source = """\
import importlib.metadata as metadata, json
print(json.dumps({d.metadata["Name"].lower(): d.version for d in metadata.distributions()}))
"""
    installed = json.loads(start().exec_python(source))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert installed["websocket-relay"] == project["version"]
    lock = (ROOT / "requirements" / "otel.lock").read_text()
    for name in ("uvicorn", "websockets", "cryptography", "opentelemetry-sdk"):
        assert f"{name}=={installed[name]} " in lock


def test_the_image_has_labels_a_user_ports_and_an_entrypoint(engine: Engine, image: str) -> None:
    config = engine.inspect(image)["Config"]
    assert config["User"] == "10001:10001"
    env = ["env", "--block-signal=TERM,INT,QUIT,HUP,USR1,USR2"]
    assert config["Entrypoint"] == [*env, "websocket-relay"]
    assert sorted(config["ExposedPorts"]) == ["8443/tcp", "9090/tcp"]
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()
              if name.startswith("org.opencontainers.image.")}  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert labels["title"] == project["name"]
    assert labels["version"] == project["version"]
    assert labels["licenses"] == project["license"]
    assert labels["description"]
    assert len(labels["revision"]) == 40


def test_the_image_adds_a_limited_number_of_bytes_to_its_base(start: Start) -> None:
    source = """\
import os
print(sum(os.lstat(os.path.join(where, name)).st_size
          for where, _, names in os.walk("/opt/websocket-relay") for name in names))
"""
    added_bytes = int(start().exec_python(source))
    print(f"\nbeyond its base: {added_bytes / 1e6:.0f} MB")
    assert added_bytes < MAX_ADDED_BYTES


# The build


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the files of which the image is built."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    return tree


def test_a_change_of_the_service_changes_one_layer(
    engine: Engine, base: str, image: str, tree: Path
) -> None:
    with (tree / "service" / "websocket_relay" / "__init__.py").open("a") as file:
        file.write("\n# changed\n")
    engine.make_image(f"{IMAGE}-changed", base, tree)
    before, after = (
        engine.inspect(name)["RootFS"]["Layers"] for name in (image, f"{IMAGE}-changed")
    )
    assert len(before) == len(after)
    changed = [
        number for number, pair in enumerate(zip(before, after, strict=True)) if len(set(pair)) > 1
    ]
    assert len(changed) == 1
    engine("rmi", f"{IMAGE}-changed")


def test_the_build_context_contains_no_other_files(
    engine: Engine, tree: Path, tmp_path: Path
) -> None:
    others = (".git/config", ".venv/bin/python", "secret.txt", "key.pem", "tests/test.py",
              "requirements/dev.lock", "service/websocket_relay/__pycache__/cli.pyc")  # fmt: skip
    for name in others:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("private")
    (tmp_path / "Dockerfile").write_text('FROM scratch\nCOPY . /\nCMD ["none"]\n')
    name = f"{IMAGE}-context"
    engine("build", "--tag", name, "--file", str(tmp_path / "Dockerfile"), str(tree))
    container = engine("create", name).strip()
    engine("export", "--output", str(tmp_path / "context.tar"), container)
    engine("rm", container)
    engine("rmi", name)
    with tarfile.open(tmp_path / "context.tar") as archive:
        sent = {member.name for member in archive if member.isfile()}
    assert "service/websocket_relay/cli/main.py" in sent
    assert not sent & set(others)
