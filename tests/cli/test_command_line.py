"""The command line: its exit statuses, its help, and the certificate for development."""

import datetime
import socket
import ssl
import stat
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from tests.support.certificates import make_pair
from tests.support.relay_process import HOST, StartRelay, receive, run_command


@pytest.mark.parametrize("command", [[], ["serve"], ["check"], ["healthcheck"], ["dev-cert"]])
def test_every_command_has_help(tmp_path: Path, command: list[str]) -> None:
    done = run_command(*command, "--help", directory=tmp_path)
    assert done.exit_code == 0
    assert done.stdout.lower().startswith("usage")
    assert done.stderr == ""
    option = "--directory" if command == ["dev-cert"] else "--config-file"
    assert option in done.stdout


def test_the_help_names_the_commands(tmp_path: Path) -> None:
    text = run_command("--help", directory=tmp_path).stdout
    assert all(name in text for name in ("serve", "check", "healthcheck", "dev-cert"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["--fly"],
        ["check", "--fly"],
        ["serve", "now"],
        ["--config-file"],
        ["dev-cert", "--directory"],
        ["dev-cert", "here"],
    ],
)
def test_bad_usage_ends_with_2_and_says_why(tmp_path: Path, arguments: list[str]) -> None:
    done = run_command(*arguments, directory=tmp_path)
    assert done.exit_code == 2
    assert done.error_lines
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# Ports


@pytest.mark.parametrize("section", ["server", "metrics"])
def test_a_port_in_use_ends_with_1_and_one_line(tmp_path: Path, section: str) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        settings = {
            "server": {"host": HOST, "port": 0},
            "metrics": {"host": HOST, "port": 0},
        }
        settings[section]["port"] = port
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        done = run_command(directory=tmp_path)
    assert done.exit_code == 1
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.error_lines if "in use" in line)
    assert str(port) in line


def test_an_address_that_is_not_ours_ends_with_1_and_one_line(tmp_path: Path) -> None:
    settings = {"server": {"host": "192.0.2.77", "port": 0}, "metrics": {"enabled": False}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    done = run_command(directory=tmp_path)
    assert done.exit_code == 1
    assert "Traceback" not in done.stderr
    (_,) = (line for line in done.error_lines if "192.0.2.77" in line)


async def test_a_relay_listens_on_ipv6_too(relay_with: StartRelay) -> None:
    relay = relay_with(server={"host": "::1"})
    async with relay.client("news", host="::1", port=relay.port) as client:
        assert client.remote_address[0] == "::1"


# The certificate for development


def read_certificate(directory: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((directory / "cert.pem").read_bytes())


def test_dev_cert_writes_a_pair_that_fits_and_a_key_that_only_its_owner_reads(
    tmp_path: Path,
) -> None:
    done = run_command("dev-cert", directory=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")


def test_the_dev_certificate_is_for_this_machine_and_valid_now(tmp_path: Path) -> None:
    run_command("dev-cert", directory=tmp_path)
    certificate = read_certificate(tmp_path)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "localhost" in names.get_values_for_type(x509.DNSName)
    addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    assert {"127.0.0.1", "::1"} <= addresses
    now = datetime.datetime.now(datetime.UTC)
    assert certificate.not_valid_before_utc <= now
    assert certificate.not_valid_after_utc > now + datetime.timedelta(days=7)


def test_dev_cert_writes_where_it_is_told(tmp_path: Path) -> None:
    target = tmp_path / "certificates"
    target.mkdir()
    done = run_command("dev-cert", "--directory", str(target), directory=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert {file.name for file in target.iterdir()} == {"cert.pem", "key.pem"}
    assert {file.name for file in tmp_path.iterdir()} == {"certificates"}


def test_dev_cert_can_write_its_own_pair_anew(tmp_path: Path) -> None:
    run_command("dev-cert", directory=tmp_path)
    first = read_certificate(tmp_path)
    done = run_command("dev-cert", directory=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert read_certificate(tmp_path).not_valid_after_utc >= first.not_valid_after_utc
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")


@pytest.mark.parametrize("name", ["cert.pem", "key.pem"])
def test_dev_cert_does_not_touch_files_that_are_not_its_own(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious\n")
    done = run_command("dev-cert", directory=tmp_path)
    assert done.exit_code in (1, 2)
    assert "Traceback" not in done.stderr
    (line,) = done.error_lines
    assert name in line
    assert (tmp_path / name).read_text() == "precious\n"
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_dev_cert_does_not_touch_a_certificate_of_someone_else(tmp_path: Path) -> None:
    pair = make_pair()
    pair.write_to(tmp_path)
    done = run_command("dev-cert", directory=tmp_path)
    assert done.exit_code in (1, 2)
    assert (tmp_path / "cert.pem").read_bytes() == pair.certificate_pem
    assert (tmp_path / "key.pem").read_bytes() == pair.key_pem


# The log


async def test_the_log_is_one_event_a_line_and_holds_no_payload(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(logging={"level": "debug"}, shutdown={"spread_s": 0.1, "timeout_s": 5})
    async with relay.client("news") as client:
        await client.send("a secret payload")
        await receive(client)
        assert await relay.stop() == 0
    assert relay.complaints == []
    assert "secret" not in "\n".join(relay.log_lines)


def test_the_log_is_text_by_default(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        settings = {
            "server": {"host": HOST, "port": taken.getsockname()[1]},
            "metrics": {"host": HOST, "port": 0},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        done = run_command(directory=tmp_path)
    assert not [line for line in done.error_lines if line.startswith("{")]
