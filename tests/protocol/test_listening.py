"""Where the relay listens: all addresses, some of them, a Unix socket, an inherited socket."""

import asyncio
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from websocket_relay.outcomes import StartError
from websocket_relay.server import sockets
from websocket_relay.server.sockets import inherited_socket, tcp_sockets
from websockets.asyncio.client import connect, unix_connect

from tests.support.admission import refusal_answer
from tests.support.brokers import free_port
from tests.support.programs import SYSTEMD_SOCKET_ACTIVATE, needed
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import (
    HOST,
    NO_CA,
    RelayProcess,
    StartRelay,
    environment,
    eventually,
    merged,
    receive,
    run_command,
)

IPV6 = "::1"


def reachable(port: int, *addresses: str) -> list[str]:
    """Return the addresses at which a port accepts connections."""
    found = []
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with closing(socket.socket(family)) as client:
            client.settimeout(PATIENCE_S)
            if client.connect_ex((address, port)) == 0:
                found.append(address)
    return found


@pytest.mark.fast
@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("*", [HOST, "127.0.0.2", IPV6]),
        ("::", [HOST, "127.0.0.2", IPV6]),
        ("0.0.0.0", [HOST, "127.0.0.2"]),
        ("127.0.0.2, ::1", ["127.0.0.2", IPV6]),
        ("127.0.0.1, 127.0.0.1", [HOST]),
    ],
)
def test_a_port_listens_on_all_addresses_or_on_those_of_a_list(
    hosts: str, expected: list[str]
) -> None:
    with ExitStack() as stack:
        opened = [stack.enter_context(each) for each in tcp_sockets("server", hosts, 0)]
        port = opened[0].getsockname()[1]
        assert reachable(port, HOST, "127.0.0.2", IPV6) == expected


async def test_both_ports_listen_on_both_families_and_ipv4_clients_have_ipv4_addresses(
    relay_with: StartRelay,
) -> None:
    """On one socket for both families their address would be `::ffff:127.0.0.1`."""
    hosts = ["127.0.0.1", "[::1]"]
    relay = relay_with(
        server={"host": "*", "trusted_proxies": [HOST, IPV6]},
        metrics={"host": hosts},
        limits={"max_connections_per_ip": 1},
    )
    assert reachable(relay.metrics_port, HOST, "127.0.0.2", IPV6) == [HOST, IPV6]
    for host, forwarded in ((HOST, "203.0.113.1"), (f"[{IPV6}]", "203.0.113.2")):
        headers = {"X-Forwarded-For": forwarded}
        url = relay.ws_url(host=host)
        async with connect(url, proxy=None, additional_headers=headers):
            again = connect(url, proxy=None, additional_headers=headers)
            assert (await refusal_answer(again)).status_code == 503, host


@pytest.mark.fast
def test_a_machine_without_ipv6_listens_on_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    bind = sockets._bind

    def bind_without_ipv6(
        family: socket.AddressFamily, address: sockets.SocketAddress, port: int
    ) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return bind(family, address, port)

    monkeypatch.setattr(sockets, "_bind", bind_without_ipv6)
    (listening,) = tcp_sockets("server", "*", 0)
    with closing(listening):
        assert listening.getsockname()[0] == "0.0.0.0"
    with pytest.raises(StartError, match=r"^server.host: can't listen on ::1 port 0: Address fam"):
        tcp_sockets("server", "::1", 0)


@pytest.mark.fast
def test_a_busy_port_of_any_address_is_an_error_that_names_the_setting() -> None:
    with closing(socket.create_server((HOST, 0))) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(StartError, match=rf"^metrics.port: .* port {port}: Address already"):
            tcp_sockets("metrics", f"::1, {HOST}", port)
        assert reachable(port, IPV6) == [], "the first socket is closed again"


# A Unix socket


@contextmanager
def unix_relay(directory: Path, **settings: Any) -> Iterator[tuple[RelayProcess, Path]]:
    path = directory / "relay.sock"
    relay = RelayProcess(directory, merged({"server": {"socket": str(path)}}, settings))
    with relay:
        yield relay, path


async def test_clients_and_http_reach_the_relay_through_a_unix_socket(
    tmp_path: Path, channel: str
) -> None:
    """The process in front of it, for example nginx, is trusted: it may open the socket."""
    with unix_relay(tmp_path, limits={"max_connections_per_ip": 1}) as (relay, path):
        assert relay.block_until_logged("relay listening")["socket"] == str(path)
        mode = path.stat().st_mode
        assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode)) == (True, 0o660)
        uri = f"ws://relay.example/channels/{channel}"

        def client_of(address: str) -> connect:
            return unix_connect(str(path), uri, additional_headers={"X-Forwarded-For": address})

        transport = httpx2.AsyncHTTPTransport(uds=str(path))
        async with (
            client_of("203.0.113.1") as first,
            client_of("203.0.113.2") as second,
            httpx2.AsyncClient(transport=transport, verify=NO_CA, trust_env=False) as http,
            http.stream("GET", f"http://relay/channels/{channel}/events") as events,
        ):
            assert (await refusal_answer(client_of("203.0.113.1"))).status_code == 503
            message = "x" * 1_000_000
            await first.send(message)
            assert await receive(second) == message
            assert events.status_code == 200
        assert await relay.stop() == 0
        assert not path.exists(), "the file is removed at the stop"
        assert relay.unexpected_lines == []


async def test_the_file_of_a_killed_relay_is_replaced_and_that_of_a_running_one_is_an_error(
    tmp_path: Path,
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with unix_relay(tmp_path / "first") as (first, path):
        settings = merged(first.settings, {"metrics": {"port": 0}})
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        busy = run_command("serve", directory=tmp_path)
        assert (busy.exit_code, busy.faults[-1]) == (
            1,
            f"websocket-relay: config.yaml: server.socket: {path}: another process listens on it",
        )
        first.signal(signal.SIGKILL)
        await first.exit_code()
        assert path.exists()
    with RelayProcess(tmp_path / "second", settings) as second:
        async with unix_connect(str(path)):
            pass
        assert await second.stop() == 0
    path.write_text("another program's file")
    other = run_command("serve", directory=tmp_path)
    assert other.faults[-1].endswith(f"server.socket: {path}: exists and is not a socket")
    assert path.exists()


@pytest.mark.parametrize("metrics", [True, False], ids=["metrics", "no metrics"])
def test_check_and_healthcheck_work_with_a_unix_socket(tmp_path: Path, metrics: bool) -> None:
    with unix_relay(tmp_path, metrics={"enabled": metrics}) as (relay, path):
        if metrics:
            relay.settings["metrics"]["port"] = relay.metrics_port
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(relay.settings))
        assert run_command("healthcheck", directory=tmp_path).exit_code == 0
        assert str(path) in run_command("check", directory=tmp_path).stdout
        relay.end()
        done = run_command("healthcheck", directory=tmp_path)
        assert (done.exit_code, len(done.error_lines)) == (1, 1)


# An inherited socket


@contextmanager
def activated(program: Path, listen: str, directory: Path) -> Iterator["subprocess.Popen[str]"]:
    """Start a relay as systemd does: at the first connection, with the listening socket."""
    with subprocess.Popen(
        [program, f"--listen={listen}", sys.executable, "-m", "websocket_relay"],
        cwd=directory,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_a_socket_that_systemd_passes_on_is_used(tmp_path: Path, family: str) -> None:
    program = needed(SYSTEMD_SOCKET_ACTIVATE)
    port, path = free_port(), tmp_path / "systemd.sock"
    settings = {"server": {"socket": "fd:3"}, "metrics": {"enabled": False}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    listen = f"{HOST}:{port}" if family == "tcp" else str(path)
    with activated(program, listen, tmp_path) as process:

        async def is_activated() -> tuple[bool, object]:
            try:
                async with (
                    connect(f"ws://{HOST}:{port}", proxy=None, open_timeout=PATIENCE_S)
                    if family == "tcp"
                    else unix_connect(str(path), open_timeout=PATIENCE_S)
                ) as client:
                    await client.send("hello")
                    return await receive(client) == "hello", None
            except OSError as error:  # systemd-socket-activate does not listen yet
                return False, error

        await eventually(is_activated, "the relay answers on the inherited socket")
        assert process.stdout is not None
        greeting = [await asyncio.to_thread(process.stdout.readline) for _ in range(2)]
        assert str(port if family == "tcp" else path) in greeting[1]
        process.terminate()
        assert await asyncio.to_thread(process.wait, PATIENCE_S) == 0
        assert path.exists() == (family == "unix"), "the file is systemd's own"


@pytest.mark.fast
def test_a_descriptor_that_is_no_listening_socket_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="file descriptor 999 was not inherited"):
        inherited_socket(999)
    with (tmp_path / "file").open("w") as file, pytest.raises(StartError, match="is not a listen"):
        inherited_socket(file.fileno())
    with closing(socket.socket()) as unbound:
        with pytest.raises(StartError, match="is not a listen"):
            inherited_socket(unbound.fileno())
        os.fstat(unbound.fileno())  # it is not closed
