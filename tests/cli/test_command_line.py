"""The command line: exit statuses, help, ports, and the certificate for development."""

import datetime
import socket
import ssl
import stat
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from tests.support.certificates import make_pair
from tests.support.relay_process import HOST, StartRelay, run_command

COMMANDS = ("serve", "check", "healthcheck", "dev-cert")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_every_command_has_help(tmp_path: Path, command: list[str]) -> None:
    done = run_command(*command, "--help", directory=tmp_path)
    assert done.exit_code == 0
    assert done.stdout.lower().startswith("usage")
    assert done.stderr == ""
    option = "--directory" if command == ["dev-cert"] else "--config-file"
    assert option in done.stdout
    if not command:
        assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [["fly"], ["check", "--fly"], ["serve", "now"], ["--config-file"], ["dev-cert", "here"]],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2_and_an_error_line(tmp_path: Path, arguments: list[str]) -> None:
    done = run_command(*arguments, directory=tmp_path)
    assert done.exit_code == 2
    assert done.error_lines
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# Ports


@pytest.mark.parametrize("source", ["config.yaml", "RELAY__SERVER__PORT", "--port"])
def test_a_port_in_use_ends_with_1_and_one_line_that_names_the_setting_and_its_source(
    tmp_path: Path, source: str
) -> None:
    with socket.create_server((HOST, 0)) as listening:
        port = str(listening.getsockname()[1])
        server = {"host": HOST, "port": port if source == "config.yaml" else "0"}
        settings = {"server": server, "metrics": {"host": HOST, "port": 0}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        options = [source, port] if source == "--port" else []
        env = {"RELAY__SERVER__PORT": port} if source == "RELAY__SERVER__PORT" else None
        done = run_command(*options, directory=tmp_path, env=env)
    assert done.exit_code == 1
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.error_lines if "in use" in line)
    problem = f"server.port: can't listen on {HOST} port {port}: Address already in use"
    assert line == f"websocket-relay: {source}: {problem}"
    assert not any(line.startswith("{") for line in done.error_lines)


# Options for settings


@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
def test_options_before_and_after_the_command_take_precedence_over_environment_and_file(
    tmp_path: Path, is_before: bool
) -> None:
    (tmp_path / "config.yaml").write_text("server: {host: file.example, port: 1}")
    options = ("--host", "option.example", "--port", "2", "--log-level", "debug")
    env = {"RELAY__SERVER__PORT": "3", "RELAY__LOGGING__LEVEL": "error"}
    arguments = (*options, "check") if is_before else ("check", *options)
    done = run_command(*arguments, directory=tmp_path, env=env)
    effective = yaml.safe_load(done.stdout)
    assert (effective["server"]["host"], effective["server"]["port"]) == ("option.example", 2)
    assert effective["logging"]["level"] == "debug"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--port", "70000"], "--port: server.port: '70000' is not allowed"),
        (["serve", "--host", ""], "--host: server.host: '' is not allowed"),
        (["check", "--log-level", "loud"], "--log-level: logging.level: 'loud' is not allowed"),
    ],
)
def test_an_invalid_option_is_one_line(tmp_path: Path, arguments: list[str], problem: str) -> None:
    done = run_command(*arguments, directory=tmp_path)
    assert done.exit_code == 2
    (line,) = done.error_lines
    assert line.startswith(f"websocket-relay: {problem}; allowed: ")


def test_an_address_of_another_machine_ends_with_1_and_one_line(tmp_path: Path) -> None:
    settings = {"server": {"host": "192.0.2.77", "port": 0}, "metrics": {"enabled": False}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    done = run_command(directory=tmp_path)
    assert done.exit_code == 1
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.error_lines if "192.0.2.77" in line)
    assert line.startswith("websocket-relay: config.yaml: server.host: can't listen on 192.0.2.77 ")


async def test_a_relay_listens_on_ipv6(relay_with: StartRelay) -> None:
    relay = relay_with(server={"host": "::1"})
    async with relay.client("news", host="::1", port=relay.port) as client:
        assert client.remote_address[0] == "::1"


# The certificate for development


def read_certificate(directory: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((directory / "cert.pem").read_bytes())


def load_pair(directory: Path) -> None:
    """Load the certificate and the key; fail if they are no pair."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")


def test_dev_cert_writes_a_valid_pair_for_this_machine_and_a_private_key(tmp_path: Path) -> None:
    done = run_command("dev-cert", directory=tmp_path)
    assert done.exit_code == 0, done.stderr
    load_pair(tmp_path)
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    certificate = read_certificate(tmp_path)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "localhost" in names.get_values_for_type(x509.DNSName)
    addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    assert {"127.0.0.1", "::1"} <= addresses
    now = datetime.datetime.now(datetime.UTC)
    assert certificate.not_valid_before_utc <= now
    assert certificate.not_valid_after_utc > now + datetime.timedelta(days=7)


def test_dev_cert_writes_into_the_given_directory_only(tmp_path: Path) -> None:
    target = tmp_path / "certificates"
    target.mkdir()
    done = run_command("dev-cert", "--directory", str(target), directory=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert {file.name for file in target.iterdir()} == {"cert.pem", "key.pem"}
    assert {file.name for file in tmp_path.iterdir()} == {"certificates"}


def test_dev_cert_replaces_a_pair_that_it_wrote(tmp_path: Path) -> None:
    run_command("dev-cert", directory=tmp_path)
    first = read_certificate(tmp_path)
    done = run_command("dev-cert", directory=tmp_path)
    assert done.exit_code == 0, done.stderr
    second = read_certificate(tmp_path)
    assert second.serial_number != first.serial_number
    assert second.not_valid_after_utc >= first.not_valid_after_utc
    load_pair(tmp_path)


@pytest.mark.parametrize("name", ["cert.pem", "key.pem"])
def test_dev_cert_does_not_overwrite_a_file_that_is_no_pair_of_its_own(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("precious\n")
    done = run_command("dev-cert", directory=tmp_path)
    assert done.exit_code in (1, 2)
    assert "Traceback" not in done.stderr
    (line,) = done.error_lines
    assert name in line
    assert (tmp_path / name).read_text() == "precious\n"
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_dev_cert_does_not_overwrite_a_certificate_of_another_issuer(tmp_path: Path) -> None:
    pair = make_pair()
    pair.write_to(tmp_path)
    done = run_command("dev-cert", directory=tmp_path)
    assert done.exit_code in (1, 2)
    assert (tmp_path / "cert.pem").read_bytes() == pair.certificate_pem
    assert (tmp_path / "key.pem").read_bytes() == pair.key_pem
