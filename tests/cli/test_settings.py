"""Settings: environment over file over defaults, and an error line for whatever is wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from websocket_relay.cli.main import main
from websocket_relay.config.loader import load
from websocket_relay.outcomes import SettingsError

from tests.support.admission import refused
from tests.support.certificates import make_pair
from tests.support.issuer import Signer, signer
from tests.support.relay_process import Finished, Relay, StartRelay, environment, run_command

pytestmark = pytest.mark.fast

DEFAULTS: dict[str, dict[str, Any]] = {
    "server": {
        "host": "0.0.0.0",
        "port": 8443,
        "tls": {"enabled": False, "cert_file": "cert.pem", "key_file": "key.pem"},
        "allowed_origins": ["*"],
        "trusted_proxies": [],
        "base_path": "",
    },
    "metrics": {"enabled": True, "host": "0.0.0.0", "port": 9090},
    "channels": {"max_channels": 10_000},
    "limits": {
        "max_message_bytes": 1_048_576,
        "max_connections": 0,
        "max_http_connections": 1000,
        "max_connections_per_ip": 0,
        "max_handshakes_per_s": 0,
        "max_messages_per_s": 0,
        "handshake_timeout_s": 10,
        "send_backlog_bytes": 1_048_576,
        "total_backlog_bytes": 268_435_456,
    },
    "keepalive": {"ping_interval_s": 20, "ping_timeout_s": 20},
    "compression": {"enabled": False, "min_message_bytes": 256},
    "history": {"max_messages": 10_000, "max_bytes": 16_777_216, "max_age_s": 300},
    "auth": {
        "mode": "none",
        "jwt": {
            "secret": "",
            "public_key_file": "",
            "jwks_url": "",
            "algorithms": ["HS256"],
            "audience": "",
            "issuer": "",
        },
    },
    "shutdown": {"readiness_delay_s": 0, "spread_s": 5, "timeout_s": 10},
    "logging": {"level": "info", "format": "text"},
}

SECRET = "a secret that nobody may ever see printed"
MASKED = "**********"

# What must be set beside a setting so that it makes sense.
ALONGSIDE = {"auth.mode": {"RELAY__AUTH__JWT__SECRET": SECRET}}

# Every setting there is, another value than the default's, and how a shell would say it.
LEAVES: list[tuple[str, Any, str]] = [
    ("server.host", "127.0.0.2", "127.0.0.2"),
    ("server.port", 8000, "8000"),
    ("server.tls.enabled", True, "true"),
    ("server.tls.cert_file", "other/cert.pem", "other/cert.pem"),
    ("server.tls.key_file", "other/key.pem", "other/key.pem"),
    (
        "server.allowed_origins",
        ["https://a.example", "https://b.example"],
        '["https://a.example", "https://b.example"]',
    ),
    ("server.trusted_proxies", ["10.0.0.7", "fd00::/8"], "10.0.0.7, fd00::/8"),
    ("server.base_path", "/live", "/live"),
    ("metrics.enabled", False, "false"),
    ("metrics.host", "127.0.0.1", "127.0.0.1"),
    ("metrics.port", 9100, "9100"),
    ("channels.max_channels", 7, "7"),
    ("limits.max_message_bytes", 65_536, "65536"),
    ("limits.max_connections", 12, "12"),
    ("limits.max_http_connections", 13, "13"),
    ("limits.max_connections_per_ip", 3, "3"),
    ("limits.max_handshakes_per_s", 50, "50"),
    ("limits.max_messages_per_s", 20, "20"),
    ("limits.handshake_timeout_s", 2.5, "2.5"),
    ("limits.send_backlog_bytes", 2_097_152, "2097152"),
    ("limits.total_backlog_bytes", 536_870_912, "536870912"),
    ("keepalive.ping_interval_s", 7.5, "7.5"),
    ("keepalive.ping_timeout_s", 3, "3"),
    ("compression.enabled", True, "true"),
    ("compression.min_message_bytes", 64, "64"),
    ("history.max_messages", 100, "100"),
    ("history.max_bytes", 65_536, "65536"),
    ("history.max_age_s", 60, "60"),
    ("backplane.url", "redis://broker:6379/3", "redis://broker:6379/3"),
    ("backplane.stream", "chat_2", "chat_2"),
    ("backplane.on_outage", "local", "local"),
    ("auth.mode", "jwt", "jwt"),
    ("auth.jwt.secret", MASKED, SECRET),
    ("auth.jwt.public_key_file", "other/jwt.pem", "other/jwt.pem"),
    ("auth.jwt.jwks_url", "https://issuer.example/keys", "https://issuer.example/keys"),
    ("auth.jwt.algorithms", ["HS512", "RS256"], "HS512,RS256"),
    ("auth.jwt.audience", "the relay", "the relay"),
    ("auth.jwt.issuer", "https://issuer.example", "https://issuer.example"),
    ("console.enabled", False, "false"),
    ("shutdown.readiness_delay_s", 1, "1"),
    ("shutdown.spread_s", 2.5, "2.5"),
    ("shutdown.timeout_s", 30, "30"),
    ("logging.level", "debug", "debug"),
    ("logging.format", "json", "json"),
]

Check = Callable[..., Finished]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Run `check` in an empty directory with this text as its config.yaml.

    In this process, for it is done by the hundred; where a file is named it has one of its own.
    """

    def run(text: str | None = None, **env: str) -> Finished:
        if text is not None:
            (tmp_path / "config.yaml").write_text(text)
        kept = environment(env)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            for name in os.environ.keys() - kept.keys():
                patch.delenv(name)
            for name, value in kept.items():
                patch.setenv(name, value)
            exit_code = main(["check"])
        said = capsys.readouterr()
        return Finished(exit_code, said.out, said.err)

    return run


def effective(done: Finished) -> dict[str, Any]:
    """Insist that the settings are in order; return them."""
    assert done.exit_code == 0, done.stderr
    settings = yaml.safe_load(done.stdout)
    assert isinstance(settings, dict)
    return settings


def leaf(settings: dict[str, Any], key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = value[name]
    return value


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def variable_of(key: str) -> str:
    return "RELAY__" + key.replace(".", "__").upper()


def assert_refused(done: Finished, *words: str) -> None:
    """Insist on one error line that holds these words, and on exit status 2."""
    assert done.exit_code == 2, done
    assert "Traceback" not in done.stderr
    (line,) = done.error_lines
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"


# What is in force


def test_without_a_file_the_defaults_are_in_force(check: Check) -> None:
    settings = effective(check())
    for section, values in DEFAULTS.items():
        for name, value in values.items():
            assert settings[section][name] == value, f"{section}.{name}"


def test_the_table_below_holds_every_setting(check: Check) -> None:
    def keys(settings: dict[str, Any], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for name, value in settings.items():
            section = isinstance(value, dict)
            found |= keys(value, f"{prefix}{name}.") if section else {f"{prefix}{name}"}
        return found

    assert keys(effective(check())) == {key for key, _, _ in LEAVES}


@pytest.mark.parametrize(("key", "value", "said"), LEAVES, ids=[key for key, _, _ in LEAVES])
def test_every_setting_has_its_environment_variable(
    check: Check, tmp_path: Path, key: str, value: Any, said: str
) -> None:
    make_pair().write_to(tmp_path)  # so that TLS can be turned on
    settings = effective(check(**{variable_of(key): said}, **ALONGSIDE.get(key, {})))
    assert leaf(settings, key) == value
    assert type(leaf(settings, key)) is type(value) or isinstance(value, int | float)


def test_every_setting_can_be_given_in_the_file(check: Check, tmp_path: Path) -> None:
    make_pair().write_to(tmp_path)
    (tmp_path / "other").mkdir()
    make_pair().write_to(tmp_path / "other")
    (tmp_path / "other" / "jwt.pem").write_bytes(signer("RS256").public_pem)
    tree: dict[str, Any] = {}
    for key, value, said in LEAVES:
        section = tree
        *sections, name = key.split(".")
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = said if key == "auth.jwt.secret" else value
    tree["auth"]["jwt"]["jwks_url"] = ""  # goes not with a key file
    settings = effective(check(yaml.safe_dump(tree)))
    tree["auth"]["jwt"]["secret"] = MASKED
    assert settings == tree


def test_the_environment_wins_over_the_file_and_the_file_over_the_defaults(check: Check) -> None:
    file = "server: {port: 1111, host: 127.0.0.3}\nlimits: {max_connections: 5}\n"
    settings = effective(check(file, RELAY__SERVER__PORT="2222"))
    assert settings["server"]["port"] == 2222
    assert settings["server"]["host"] == "127.0.0.3"
    assert settings["limits"]["max_connections"] == 5
    assert settings["metrics"]["port"] == 9090


@pytest.mark.processes
def test_a_named_file_is_read_instead_of_the_one_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("server: {port: 1111}\n")
    (tmp_path / "other.yaml").write_text("server: {port: 2222}\n")
    done = run_command("check", "--config-file", "other.yaml", directory=tmp_path)
    assert effective(done)["server"]["port"] == 2222


def test_the_file_in_the_working_directory_is_read_by_default(check: Check) -> None:
    assert effective(check("server: {port: 1111}\n"))["server"]["port"] == 1111


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n", "{}\n"])
def test_a_file_without_settings_leaves_the_defaults(check: Check, text: str) -> None:
    assert effective(check(text))["server"]["port"] == 8443


def test_a_section_without_settings_leaves_the_defaults(check: Check) -> None:
    settings = effective(check("server:\n  # port: 1111\nlimits: {}\n"))
    assert settings["server"]["port"] == 8443


def test_what_kubernetes_puts_into_the_environment_does_no_harm(check: Check) -> None:
    settings = effective(
        check(
            RELAY_PORT="tcp://10.0.0.1:8443",
            RELAY_SERVICE_HOST="10.0.0.1",
            RELAY_SERVICE_PORT="8443",
            RELAY_SERVICE_PORT_METRICS="9090",
            RELAY_PORT_8443_TCP="tcp://10.0.0.1:8443",
            RELAY_PORT_8443_TCP_ADDR="10.0.0.1",
            SERVER__PORT="1",
            PORT="1",
        )
    )
    assert settings["server"]["port"] == 8443


def test_what_check_prints_can_be_read_again(check: Check) -> None:
    first = check("server: {port: 1111, allowed_origins: ['https://a.example']}\n")
    assert first.error_lines == []
    assert effective(check(first.stdout)) == effective(first)


# What is wrong


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("sever: {port: 1}", ["sever"], id="unknown section"),
        pytest.param("server: {prot: 1}", ["server.prot"], id="unknown key"),
        pytest.param("server: {tls: {enable: true}}", ["server.tls.enable"], id="unknown deep key"),
        pytest.param("port: 8443", ["port"], id="key without its section"),
        pytest.param("server: {port: 70000}", ["server.port", "70000", "65535"], id="port too big"),
        pytest.param("server: {port: -1}", ["server.port", "-1", "0"], id="negative port"),
        pytest.param(
            "limits: {max_message_bytes: 0}", ["limits.max_message_bytes", "0"], id="no message"
        ),
        pytest.param(
            "limits: {max_connections: -5}", ["limits.max_connections", "-5", "0"], id="negative"
        ),
        pytest.param(
            "channels: {max_channels: 0}", ["channels.max_channels", "0"], id="no channel"
        ),
        pytest.param(
            "keepalive: {ping_interval_s: 0}",
            ["keepalive.ping_interval_s", "0"],
            id="zero interval",
        ),
        pytest.param(
            "keepalive: {ping_timeout_s: .nan}",
            ["keepalive.ping_timeout_s", "nan"],
            id="not a number",
        ),
        pytest.param(
            "limits: {handshake_timeout_s: 0}",
            ["limits.handshake_timeout_s", "0"],
            id="zero deadline",
        ),
        pytest.param("shutdown: {spread_s: -1}", ["shutdown.spread_s", "-1", "0"], id="spread"),
        pytest.param(
            "logging: {level: loud}", ["logging.level", "loud", "info", "debug"], id="level"
        ),
        pytest.param("logging: {format: xml}", ["logging.format", "xml", "json"], id="format"),
        pytest.param("server: {port: many}", ["server.port", "many"], id="word for a number"),
        pytest.param("server: {port: [1]}", ["server.port"], id="list for a number"),
        pytest.param("server: {port: 1.5}", ["server.port", "1.5"], id="fraction for a number"),
        pytest.param(
            "metrics: {enabled: perhaps}", ["metrics.enabled", "perhaps"], id="word for a switch"
        ),
        pytest.param(
            "keepalive: {ping_interval_s: 20s}",
            ["keepalive.ping_interval_s", "20s"],
            id="unit in a duration",
        ),
        pytest.param(
            "server: {allowed_origins: {a: b}}", ["server.allowed_origins"], id="map for a list"
        ),
        pytest.param("server: 5", ["server", "5"], id="number for a section"),
        pytest.param("server: [1, 2]", ["server"], id="list for a section"),
        pytest.param("server: {host: null}", ["server.host"], id="nothing for a word"),
        pytest.param("- a\n- b\n", [], id="a list"),
        pytest.param("just words", [], id="a word"),
        pytest.param("server: {port: 1", [], id="no YAML"),
        pytest.param("server:\n\tport: 1\n", [], id="tabs"),
        pytest.param("server: {port: 1}\nserver: {port: 2}\n", ["server"], id="a key twice"),
        pytest.param("a: !!python/object/apply:os.getcwd []", [], id="code"),
        pytest.param("server: {port: 1}\n---\nserver: {port: 2}\n", [], id="two documents"),
    ],
)
def test_a_faulty_file_is_refused_with_one_line_that_names_it(
    check: Check, text: str, words: list[str]
) -> None:
    assert_refused(check(text), "config.yaml", *words)


def test_a_file_that_is_not_utf_8_is_refused(check: Check, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"server: {host: '\xff\xfe'}\n")
    assert_refused(check(), "config.yaml")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("RELAY__SERVER__PORT", "70000", ["70000", "65535"]),
        ("RELAY__SERVER__PORT", "many", ["many"]),
        ("RELAY__METRICS__ENABLED", "perhaps", ["perhaps"]),
        ("RELAY__LOGGING__LEVEL", "loud", ["loud", "info"]),
        ("RELAY__KEEPALIVE__PING_INTERVAL_S", "0", ["0"]),
        ("RELAY__LIMITS__MAX_MESSAGE_BYTES", "", []),
        ("RELAY__SERVER__ALLOWED_ORIGINS", "[unfinished", ["[unfinished"]),
        ("RELAY__SERVER__PROT", "1", []),
        ("RELAY__SEVER__PORT", "1", []),
        ("RELAY__PORT", "1", []),
        ("RELAY__SERVER__TLS__CERT", "x", []),
        ("RELAY__SERVER__PORT__NUMBER", "1", []),
        ("RELAY__", "1", []),
    ],
)
def test_a_faulty_variable_is_refused_with_one_line_that_names_it(
    check: Check, variable: str, value: str, words: list[str]
) -> None:
    assert_refused(check(**{variable: value}), variable, *words)


def test_a_faulty_variable_is_told_from_a_faulty_file(check: Check) -> None:
    done = check("server: {port: 1111}\n", RELAY__SERVER__PORT="70000")
    assert_refused(done, "RELAY__SERVER__PORT", "70000")
    assert "config.yaml" not in done.stderr


def test_a_good_variable_hides_no_fault_elsewhere_in_the_file(check: Check) -> None:
    done = check("server: {port: 1111, prot: 2}\n", RELAY__SERVER__PORT="2222")
    assert_refused(done, "config.yaml", "server.prot")


def test_every_problem_has_its_own_line(check: Check) -> None:
    file = "server: {port: 70000, prot: 1}\nlogging: {level: loud}\n"
    done = check(file, RELAY__METRICS__PORT="many", RELAY__METRICS__PROT="1")
    assert done.exit_code == 2
    assert len(done.error_lines) == 5
    for key in ("server.port", "server.prot", "logging.level"):
        (line,) = (line for line in done.error_lines if key in line)
        assert "config.yaml" in line
    for variable in ("RELAY__METRICS__PORT", "RELAY__METRICS__PROT"):
        assert len([line for line in done.error_lines if f"{variable}:" in line]) == 1


@pytest.mark.parametrize("command", [[], ["serve"], ["check"]])
@pytest.mark.processes
def test_a_named_file_that_is_missing_stops_every_command(
    tmp_path: Path, command: list[str]
) -> None:
    done = run_command(*command, "--config-file", "missing.yaml", directory=tmp_path)
    assert_refused(done, "missing.yaml")


@pytest.mark.processes
def test_a_named_directory_is_no_file(tmp_path: Path) -> None:
    done = run_command("check", "--config-file", str(tmp_path), directory=tmp_path)
    assert_refused(done, str(tmp_path))


@pytest.mark.parametrize("command", [[], ["serve"]])
@pytest.mark.processes
def test_the_relay_does_not_start_with_a_faulty_setting(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "config.yaml").write_text("server: {port: 70000}\n")
    done = run_command(*command, directory=tmp_path)
    assert_refused(done, "config.yaml", "server.port", "70000", "65535")


def write_tls_files(directory: Path, fault: str) -> None:
    """Write a certificate and a key with one thing wrong."""
    pair = make_pair()
    pair.write_to(directory)
    certificate, key = directory / "cert.pem", directory / "key.pem"
    match fault:
        case "no certificate":
            certificate.unlink()
        case "no key":
            key.unlink()
        case "broken certificate":
            certificate.write_bytes(b"-----BEGIN CERTIFICATE-----\nnonsense\n")
        case "broken key":
            key.write_bytes(b"nonsense")
        case "another pair's key":
            key.write_bytes(make_pair().key_pem)
        case "empty certificate":
            certificate.write_bytes(b"")
        case "swapped":
            certificate.write_bytes(pair.key_pem)
            key.write_bytes(pair.certificate_pem)


@pytest.mark.parametrize(
    "fault",
    [
        "no certificate",
        "no key",
        "broken certificate",
        "broken key",
        "another pair's key",
        "empty certificate",
        "swapped",
    ],
)
@pytest.mark.processes
def test_tls_with_files_that_do_not_serve_is_refused_with_one_line(
    tmp_path: Path, fault: str
) -> None:
    write_tls_files(tmp_path, fault)
    (tmp_path / "config.yaml").write_text("server: {port: 0, tls: {enabled: true}}\n")
    done = run_command(directory=tmp_path)
    words = {"no certificate": "cert.pem", "no key": "key.pem", "broken key": "key.pem"}
    assert_refused(done, words.get(fault, ".pem"))


@pytest.mark.parametrize("proxy", ["::ffff:127.0.0.1", "::ffff:127.0.0.0/104", "127.0.0.0/8"])
@pytest.mark.processes
async def test_a_trusted_proxy_may_be_written_in_either_form_of_its_address(
    relay_with: StartRelay, proxy: str
) -> None:
    relay = relay_with(server={"trusted_proxies": [proxy]}, limits={"max_connections_per_ip": 1})
    for_one = {"X-Forwarded-For": "203.0.113.1"}
    for_another = {"X-Forwarded-For": "203.0.113.2"}
    async with (
        relay.client(additional_headers=for_one),
        relay.client(additional_headers=for_another),
    ):
        answer = await refused(relay.client(additional_headers=for_one))
        assert answer.status_code == 503


@pytest.mark.parametrize("proxy", ["10.0.0.0/99", "10.0.0.7/8", "proxy.example", "*", ""])
def test_a_trusted_proxy_is_an_address_or_a_network(check: Check, proxy: str) -> None:
    done = check(yaml.safe_dump({"server": {"trusted_proxies": [proxy]}}))
    assert_refused(done, "server.trusted_proxies", "10.0.0.0/8")


# Tokens


def guarding(**of_jwt: Any) -> str:
    return yaml.safe_dump({"auth": {"mode": "jwt", "jwt": of_jwt}})


@pytest.mark.parametrize(
    ("of_jwt", "words"),
    [
        pytest.param({}, ["HS256", "auth.jwt.secret"], id="nothing"),
        pytest.param(
            {"algorithms": ["RS256"], "secret": SECRET},
            ["RS256", "auth.jwt.public_key_file", "auth.jwt.jwks_url"],
            id="a secret for a public algorithm",
        ),
        pytest.param(
            {"algorithms": ["HS256", "ES256"], "jwks_url": "https://issuer.example/"},
            ["HS256", "auth.jwt.secret"],
            id="no secret beside a URL",
        ),
        pytest.param(
            {
                "algorithms": ["ES256"],
                "jwks_url": "https://issuer.example/",
                "public_key_file": "x",
            },
            ["auth.jwt.public_key_file", "auth.jwt.jwks_url", "both"],
            id="a file and a URL",
        ),
        pytest.param(
            {"jwks_url": "https://issuer.example/"},
            ["auth.jwt.jwks_url is set", "auth.jwt.algorithms (HS256)", "RS256", "ES256", "EdDSA"],
            id="a URL and the default algorithm",
        ),
        pytest.param(
            {"public_key_file": "jwt.pem", "secret": SECRET, "algorithms": ["HS256", "HS512"]},
            ["auth.jwt.public_key_file is set", "(HS256, HS512)", "RS256"],
            id="a key file that no algorithm uses",
        ),
    ],
)
def test_every_algorithm_needs_its_key(
    check: Check, of_jwt: dict[str, Any], words: list[str]
) -> None:
    assert_refused(check(guarding(**of_jwt)), "config.yaml", "auth", *words)


def test_a_key_that_is_missing_is_told_by_the_variable_that_asks_for_it(check: Check) -> None:
    done = check(RELAY__AUTH__MODE="jwt")
    assert_refused(done, "RELAY__AUTH__MODE", "auth.jwt.secret")
    assert "config.yaml" not in done.stderr


def test_without_tokens_nothing_is_asked_of_their_keys(check: Check) -> None:
    unused = {"algorithms": ["RS256"], "public_key_file": "missing.pem"}
    assert leaf(effective(check(yaml.safe_dump({"auth": {"jwt": unused}}))), "auth.mode") == "none"


@pytest.mark.parametrize(
    "of_jwt",
    [
        {"secret": SECRET},
        {"public_key_file": "jwt.pem", "algorithms": ["RS256"]},
        {"jwks_url": "https://issuer.example/"},
        {"secret": SECRET, "jwks_url": "https://issuer.example/"},
    ],
)
@pytest.mark.processes
def test_keys_that_nobody_is_asked_for_are_a_warning(
    check: Check, tmp_path: Path, of_jwt: dict[str, Any]
) -> None:
    settings = {"auth": {"jwt": of_jwt}}
    unused = ", ".join(f"auth.jwt.{name}" for name in of_jwt if name != "algorithms")
    text = "auth.mode is none: all clients are accepted"
    done = check(yaml.safe_dump(settings))
    assert effective(done)
    assert done.error_lines == [f"websocket-relay: warning: {text} (unused: {unused})"]
    with Relay(tmp_path, settings) as relay:
        (warning,) = (event for event in relay.log_events if event["level"] == "warning")
        assert (warning["event"], warning["unused"]) == (text, unused)
        assert SECRET not in "".join(relay.log_lines)


@pytest.mark.parametrize(
    ("algorithms", "content", "words"),
    [
        pytest.param(["RS256"], None, ["no such file"], id="missing"),
        pytest.param(["RS256"], b"", ["PEM"], id="empty"),
        pytest.param(["RS256"], b"nonsense", ["PEM"], id="no PEM"),
        pytest.param(["RS256"], b"\xff\x00", ["PEM"], id="binary"),
        pytest.param(
            ["RS256"],
            b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
            ["PEM"],
            id="broken PEM",
        ),
        pytest.param(["RS256"], signer("RS256").private_pem, ["private key"], id="a private key"),
        pytest.param(["RS256"], make_pair().certificate_pem, ["PEM"], id="a certificate"),
        pytest.param(["RS256"], signer("ES256").public_pem, ["RS256"], id="EC for RSA"),
        pytest.param(["ES256"], signer("RS256").public_pem, ["ES256"], id="RSA for EC"),
        pytest.param(
            ["RS256"],
            Signer("RS256", rsa.generate_private_key(65_537, 1024)).public_pem,
            ["RSA", "fewer than 2048 bits"],
            id="a short RSA key",
        ),
        pytest.param(["ES256"], signer("ES384").public_pem, ["ES256"], id="another curve"),
        pytest.param(["EdDSA"], signer("ES256").public_pem, ["EdDSA"], id="EC for Ed25519"),
        pytest.param(
            ["ES256", "ES384"], signer("ES256").public_pem, ["ES384"], id="one key for two curves"
        ),
        pytest.param(
            ["ES256"],
            Signer("ES256", ec.generate_private_key(ec.SECP256K1())).public_pem,
            ["ES256"],
            id="a curve that no algorithm has",
        ),
    ],
)
def test_a_key_file_that_does_not_do_is_refused_with_one_line(
    check: Check, tmp_path: Path, algorithms: list[str], content: bytes | None, words: list[str]
) -> None:
    if content is not None:
        (tmp_path / "jwt.pem").write_bytes(content)
    done = check(guarding(algorithms=algorithms, public_key_file="jwt.pem"))
    assert_refused(done, "config.yaml: auth.jwt.public_key_file: jwt.pem: ", *words)


@pytest.mark.processes
def test_the_relay_does_not_start_with_a_key_file_that_does_not_do(tmp_path: Path) -> None:
    file = guarding(algorithms=["RS256"], public_key_file="missing.pem")
    (tmp_path / "config.yaml").write_text(file)
    assert_refused(run_command(directory=tmp_path), "auth.jwt.public_key_file", "missing.pem")


def test_a_directory_is_no_key_file(check: Check, tmp_path: Path) -> None:
    done = check(guarding(algorithms=["RS256"], public_key_file=str(tmp_path)))
    assert_refused(done, f"config.yaml: auth.jwt.public_key_file: {tmp_path}: a directory")


def test_a_key_that_does_not_do_is_told_by_the_variable_that_names_it(check: Check) -> None:
    file = guarding(algorithms=["RS256"], public_key_file="of-the-file.pem")
    done = check(file, RELAY__AUTH__JWT__PUBLIC_KEY_FILE="missing.pem")
    variable = "RELAY__AUTH__JWT__PUBLIC_KEY_FILE"
    assert_refused(done, f"{variable}: auth.jwt.public_key_file: missing.pem: no such file")
    assert "config.yaml" not in done.stderr
    done = check(guarding(), RELAY__AUTH__JWT__SECRET=f"{SECRET}\n")
    assert_refused(done, "RELAY__AUTH__JWT__SECRET: auth.jwt.secret: white space")


@pytest.mark.parametrize(
    "url",
    [
        "issuer.example/keys",
        "ftp://issuer.example/keys",
        "file:///etc/passwd",
        "https://",
        "https:///keys",
        "https://user:password@issuer.example/keys",
        "https://token@issuer.example/keys",
        "https://issuer.example:99999/keys",
        "https://issuer.example:x/keys",
        "https://[::1/keys",
        "https://issuer.example/a b",
        "https://issuer.example/a\nb",
    ],
)
def test_a_url_that_no_keys_can_be_fetched_from_is_refused(tmp_path: Path, url: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(guarding(algorithms=["RS256"], jwks_url=url))
    with pytest.raises(SettingsError) as error:
        load(file, {})
    (problem,) = error.value.problems
    assert "auth.jwt.jwks_url" in problem
    assert "https://" in problem
    assert "user" not in problem


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080/keys", "https://[::1]/?a=b", "HTTPS://a"])
def test_a_url_of_the_web_is_one(tmp_path: Path, url: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(guarding(algorithms=["RS256"], jwks_url=url))
    assert load(file, {}).auth.jwt.jwks_url == url


@pytest.mark.parametrize(
    "secret",
    [
        signer("RS256").public_pem.decode(),
        signer("RS256").private_pem.decode(),
        json.dumps(signer("RS256").jwk()),
    ],
)
def test_a_key_where_a_secret_should_be_is_refused(check: Check, secret: str) -> None:
    done = check(guarding(secret=secret))
    assert_refused(done, "config.yaml: auth.jwt.secret: ", "PEM")
    assert secret[40:60] not in done.stderr


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:S3CR3T@broker:6379/0", "redis://***@broker:6379/0"),
        ("rediss://:S3CR3T%2F@broker", "rediss://***@broker"),
        ("redis://broker:6379/0?password=S3CR3T", "redis://broker:6379/0"),
        ("nats://user:S3CR3T@one:4222,user:S3CR3T@two:4222", "nats://***@two:4222"),
        ("tls://S3CR3T@broker:4222", "tls://***@broker:4222"),
    ],
)
def test_what_is_secret_in_a_brokers_address_is_never_shown(
    check: Check, url: str, shown: str
) -> None:
    for done in (check(f"backplane: {{url: '{url}'}}"), check(RELAY__BACKPLANE__URL=url)):
        assert leaf(effective(done), "backplane.url") == shown
        assert "S3CR3T" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "url", ["S3CR3T", "http://user:S3CR3T@broker", "redis://user:S3CR3T@broker:port", "nats://"]
)
def test_an_address_of_no_broker_is_refused_and_its_secret_not_shown(
    check: Check, url: str
) -> None:
    done = check(f"backplane: {{url: '{url}'}}")
    assert_refused(done, "config.yaml: backplane.url: ")
    assert "S3CR3T" not in done.stderr
    done = check("", RELAY__BACKPLANE__URL=url)
    assert_refused(done, "RELAY__BACKPLANE__URL: backplane.url: ")
    assert "S3CR3T" not in done.stderr


@pytest.mark.parametrize("password", ["12/S3CR3T", "a/S3CR3T", "a?S3CR3T", "a#S3CR3T", "a?S3@CR3T"])
@pytest.mark.parametrize("scheme", ["redis", "rediss", "nats", "tls"])
def test_a_password_that_is_not_percent_encoded_is_refused_and_not_shown(
    check: Check, scheme: str, password: str
) -> None:
    done = check(RELAY__BACKPLANE__URL=f"{scheme}://user:{password}@broker:6379/0")
    assert_refused(done, f"RELAY__BACKPLANE__URL: backplane.url: '{scheme}://***': ", "%2F for /")
    assert not any(part in done.stderr for part in ("user", "S3", "CR3T"))


@pytest.mark.parametrize("name", ["", "a b", "a.b", "a*", "grüße", "x" * 65])
def test_a_stream_has_a_name_that_every_broker_takes(check: Check, name: str) -> None:
    assert_refused(check(f"backplane: {{stream: '{name}'}}"), "backplane.stream", "1 to 64")


@pytest.mark.parametrize("secret", [f"{SECRET}\n", f"{SECRET}\r\n", f" {SECRET}", f"{SECRET}\t"])
@pytest.mark.parametrize("command", [[], ["check"]])
@pytest.mark.processes
def test_a_secret_with_white_space_at_an_end_is_refused(
    tmp_path: Path, command: list[str], secret: str
) -> None:
    """A file's newline: with it nobody's token would be accepted, and nobody would know why."""
    (tmp_path / "config.yaml").write_text(guarding(secret=secret))
    done = run_command(*command, directory=tmp_path)
    assert_refused(done, "config.yaml: auth.jwt.secret: white space at an end", "newline")
    assert SECRET not in done.stderr


def test_a_secret_with_white_space_inside_is_a_secret(check: Check) -> None:
    assert check(guarding(secret=SECRET)).stderr == ""


def test_an_algorithm_that_there_is_not_is_shown_with_those_that_there_are(check: Check) -> None:
    for wrong in ("HS265", "PS256", "ES256K", "none", "hs256", "Ed25519"):
        done = check(guarding(secret=SECRET, algorithms=["HS256", wrong]))
        assert_refused(done, "auth.jwt.algorithms", f"'{wrong}' is not allowed", "HS256", "EdDSA")
        done = check(guarding(secret=SECRET), RELAY__AUTH__JWT__ALGORITHMS=wrong)
        assert_refused(done, "RELAY__AUTH__JWT__ALGORITHMS", f"'{wrong}'", "HS256", "EdDSA")
    assert_refused(check(guarding(secret=SECRET, algorithms=[])), "[] is not allowed", "HS256")


def test_a_secret_that_is_no_text_is_refused(check: Check) -> None:
    done = check(RELAY__AUTH__MODE="jwt", RELAY__AUTH__JWT__SECRET="\udcff\udcfe")
    assert_refused(done, "RELAY__AUTH__JWT__SECRET", "UTF-8")


@pytest.mark.parametrize(
    ("algorithm", "length", "warns"),
    [("HS256", 31, True), ("HS256", 32, False), ("HS384", 47, True), ("HS512", 64, False)],
)
@pytest.mark.processes
def test_a_short_secret_is_a_warning(
    check: Check, tmp_path: Path, algorithm: str, length: int, warns: bool
) -> None:
    secret = "s3cr3t-" + "z" * (length - 7)
    settings = {"auth": {"mode": "jwt", "jwt": {"secret": secret, "algorithms": [algorithm]}}}
    done = check(yaml.safe_dump(settings))
    least = {"HS256": 32, "HS384": 48, "HS512": 64}[algorithm]
    facts = f"(algorithm: {algorithm}, min_bytes: {least})"
    line = f"websocket-relay: warning: auth.jwt.secret is short {facts}"
    assert (done.exit_code, done.error_lines) == (0, [line] * warns)
    with Relay(tmp_path, settings) as relay:
        warnings = [event for event in relay.log_events if event["level"] == "warning"]
        assert [event["event"] for event in warnings] == ["auth.jwt.secret is short"] * warns
        assert [event["algorithm"] for event in warnings] == [algorithm] * warns
        assert "s3cr3t" not in "".join(relay.log_lines)
        assert relay.complaints == []


@pytest.mark.parametrize("mode", ["jwt", "none"])
def test_check_shows_no_secret(check: Check, mode: str) -> None:
    done = check(yaml.safe_dump({"auth": {"mode": mode, "jwt": {"secret": SECRET}}}))
    assert leaf(effective(done), "auth.jwt.secret") == MASKED
    assert SECRET not in done.stdout + done.stderr


def test_a_wrong_mode_is_shown(check: Check) -> None:
    assert_refused(check("auth: {mode: jwts}"), "auth.mode", "'jwts'", "none, jwt")
    assert_refused(check(RELAY__AUTH__MODE="off"), "RELAY__AUTH__MODE", "'off'", "none, jwt")


@pytest.mark.parametrize(
    "text",
    [
        "auth: {jwt: {secrets: S3CR3T}}",
        "auth: {jwt: {secret: [S3CR3T]}}",
        "auth: {jwt: {secret: {S3CR3T-: 1}}}",
        "auth: {jwt: {secret: 532370}}",
        "auth: {jwt: {secret: 2020-01-02}}",
        "auth: {jwt: S3CR3T}",
        "auth: {jwt: [S3CR3T]}",
        "auth: {jwts: {secret: S3CR3T}}",
        "auth: {secret: S3CR3T}",
        "auth: {mode: [S3CR3T], secret: S3CR3T, jwt: {mode: S3CR3T}}",
        "auth: S3CR3T",
        "auth: [jwt, secret, S3CR3T]",
        "auht: {jwt: {secret: S3CR3T}}",
        "jwt: {secret: S3CR3T}",
        "secret: S3CR3T",
        "server: {jwt: {secret: S3CR3T}}",
        "logging: {level: info, secret: S3CR3T}",
        "- auth: {jwt: {secret: S3CR3T}}",
        "S3CR3T",
        "auth: {jwt: {secret: *S3CR3T}}",
        "auth: {jwt: {secret: !S3CR3T x}}",
        "auth: {jwt: {secret: !!int S3CR3T}}",
        "auth: {jwt: {secret: !!float S3CR3T}}",
        "auth: {jwt: {secret: !!timestamp S3CR3T}}",
        "auth: {jwt: {secret: !!python/name:S3CR3T x}}",
        "auth: {jwt: {secret: '!S3CR3T}}",
        'auth: {jwt: {secret: "\\S3CR3T"}}',
        "auth: {jwt: {secret: @S3CR3T}}",
        "auth: {jwt: {secret: %S3CR3T}}",
        "auth: {jwt: {secret: &S3CR3T a, issuer: &S3CR3T b}}",
        "auth: {jwt: {secret: S3CR3T: S3CR3T}}",
        "auth: {jwt: {jwks_url: 'https://u:S3CR3T@issuer.example'}}",
        "auth: {mode: jwt, jwt: {secret: S3CR3T, algorithms: [RS256]}}",
        "auth: {mode: jwt, jwt: {secret: S3CR3T, algorithms: S3CR3T}}",
        'auth: {mode: jwt, jwt: {algorithms: [RS256], public_key_file: "S3CR3T\\nS3CR3T"}}',
    ],
)
def test_no_error_line_shows_a_secret_of_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError) as error:
        load(file, {})
    # In a mode that is wrong its own value may stand, and a key's name; nothing else may.
    said = [line for line in error.value.problems if "auth.mode" not in line]
    assert "3CR3T" not in "".join(said)
    assert "532370" not in str(error.value)
    assert "2020" not in str(error.value)


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param(
            [
                "RELAY__AUTH__JWT__SECRETS",
                "RELAY__AUTH__JWT__SECRET__VALUE",
                "RELAY__AUTH__SECRET",
                "RELAY__AUHT__JWT__SECRET",
                "RELAY__AUTH_JWT_SECRET",
                "RELAY__SECRET",
                "RELAY__JWT__SECRET",
                "RELAY__SERVER__SECRET",
                "RELAY__AUTH__JWT",
                "RELAY__AUTH",
            ],
            id="unknown names",
        ),
        pytest.param(
            ["RELAY__AUTH__JWT__ALGORITHMS", "RELAY__AUTH__JWT__JWKS_URL"], id="wrong values"
        ),
    ],
)
@pytest.mark.parametrize("value", ["S3CR3T", '{"secret": "S3CR3T"}', '["S3CR3T"]', "[S3CR3T"])
def test_no_error_line_shows_a_secret_of_the_environment(
    check: Check, variables: list[str], value: str
) -> None:
    done = check(**dict.fromkeys(variables, value))
    assert done.exit_code == 2
    assert "S3CR3T" not in done.stdout + done.stderr
    unnamed = [name for name in variables if f"{name}: " not in done.stderr]
    assert not unnamed
