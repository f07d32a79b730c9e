"""Settings: environment over file over defaults, and an error line for each problem."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from websocket_relay.cli.main import main
from websocket_relay.config.loader import SECRETS, load
from websocket_relay.outcomes import SettingsError

from tests.support import refused_settings
from tests.support.admission import refusal_answer
from tests.support.certificates import make_pair
from tests.support.issuer import Signer, make_signer
from tests.support.nats_accounts import USER, NatsAccounts, Nkey
from tests.support.refused_settings import SECRET
from tests.support.relay_process import (
    CommandResult,
    RelayProcess,
    StartRelay,
    environment,
    run_command,
)

pytestmark = pytest.mark.fast

DEFAULTS: dict[str, dict[str, Any]] = {
    "server": {
        "host": "*",
        "port": 8443,
        "socket": "",
        "tls": {
            "enabled": False,
            "cert_file": "cert.pem",
            "key_file": "key.pem",
            "client_ca_file": "",
        },
        "allowed_origins": ["*"],
        "trusted_proxies": [],
        "keepalive_timeout_s": 130,
        "proxy_protocol": False,
        "base_path": "",
    },
    "metrics": {"enabled": True, "host": "*", "port": 9090},
    "channels": {"max_channels": 10_000},
    "limits": {
        "max_message_bytes": 1_048_576,
        "max_connections": 0,
        "max_channels_per_connection": 128,
        "max_http_connections": 1000,
        "max_connections_per_ip": 0,
        "max_connections_per_user": 0,
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
            "secrets": [],
            "audience": [],
            "issuer": [],
            "claim": "relay",
            "leeway_s": 0,
        },
        "hook": {
            "url": "",
            "headers": ["cookie", "authorization"],
            "timeout_s": 5,
            "max_in_flight": 100,
        },
    },
    "hooks": {
        "url": "",
        "secret": "",
        "messages": [],
        "timeout_s": 5,
        "max_pending": 100_000,
    },
    "shutdown": {"readiness_delay_s": 0, "spread_s": 5, "timeout_s": 10},
    "logging": {"level": "info", "format": "text"},
}

MASKED = "**********"

# Each setting, a value other than its default, and that value as an environment variable.
LEAVES: list[tuple[str, Any, str]] = [
    ("server.host", "127.0.0.2", "127.0.0.2"),
    ("server.port", 8000, "8000"),
    ("server.socket", "relay.sock", "relay.sock"),
    ("server.tls.enabled", True, "true"),
    ("server.tls.cert_file", "other/cert.pem", "other/cert.pem"),
    ("server.tls.key_file", "other/key.pem", "other/key.pem"),
    ("server.tls.client_ca_file", "other/cert.pem", "other/cert.pem"),
    (
        "server.allowed_origins",
        ["https://a.example", "https://b.example"],
        '["https://a.example", "https://b.example"]',
    ),
    ("server.trusted_proxies", ["10.0.0.7", "fd00::/8"], "10.0.0.7, fd00::/8"),
    ("server.keepalive_timeout_s", 90.5, "90.5"),
    ("server.proxy_protocol", True, "true"),
    ("server.base_path", "/live", "/live"),
    ("metrics.enabled", False, "false"),
    ("metrics.host", "127.0.0.1", "127.0.0.1"),
    ("metrics.port", 9100, "9100"),
    ("channels.max_channels", 7, "7"),
    ("limits.max_message_bytes", 65_536, "65536"),
    ("limits.max_connections", 12, "12"),
    ("limits.max_channels_per_connection", 11, "11"),
    ("limits.max_http_connections", 13, "13"),
    ("limits.max_connections_per_ip", 3, "3"),
    ("limits.max_connections_per_user", 4, "4"),
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
    ("presence.channels", ["news", "chat.*"], "news, chat.*"),
    ("presence.grace_s", 2.5, "2.5"),
    ("presence.max_clients", 9, "9"),
    ("hooks.url", "https://backend.example/hooks", "https://backend.example/hooks"),
    ("hooks.secret", MASKED, SECRET),
    ("hooks.messages", ["news", "chat.*"], "news, chat.*"),
    ("hooks.timeout_s", 2.5, "2.5"),
    ("hooks.max_pending", 500, "500"),
    ("backplane.url", "tls://broker:4222", "tls://broker:4222"),
    ("backplane.username", "user", "user"),
    ("backplane.password", MASKED, SECRET),
    ("backplane.password_file", "other/nkey", "other/nkey"),
    ("backplane.ca_file", "other/cert.pem", "other/cert.pem"),
    ("backplane.cert_file", "other/cert.pem", "other/cert.pem"),
    ("backplane.key_file", "other/key.pem", "other/key.pem"),
    ("backplane.creds_file", "other/creds", "other/creds"),
    ("backplane.nkey_file", "other/nkey", "other/nkey"),
    ("backplane.domain", "hub", "hub"),
    ("backplane.inbox_prefix", "_INBOX.relay", "_INBOX.relay"),
    ("backplane.stream", "chat_2", "chat_2"),
    ("backplane.on_outage", "local", "local"),
    ("auth.mode", "jwt", "jwt"),
    ("auth.jwt.secret", MASKED, SECRET),
    ("auth.jwt.public_key_file", "other/jwt.pem", "other/jwt.pem"),
    ("auth.jwt.jwks_url", "https://issuer.example/keys", "https://issuer.example/keys"),
    ("auth.jwt.algorithms", ["HS512", "RS256"], "HS512,RS256"),
    ("auth.jwt.secrets", [MASKED, MASKED], json.dumps([SECRET, f"{SECRET}, too"])),
    ("auth.jwt.audience", ["the relay"], "the relay"),
    (
        "auth.jwt.issuer",
        ["https://a.example", "https://b.example"],
        "https://a.example,https://b.example",
    ),
    ("auth.jwt.claim", "app_metadata.relay", "app_metadata.relay"),
    ("auth.jwt.leeway_s", 2.5, "2.5"),
    ("auth.hook.url", "https://app.example/relay", "https://app.example/relay"),
    ("auth.hook.headers", ["x-session", "cookie"], "X-Session, cookie"),
    ("auth.hook.timeout_s", 2.5, "2.5"),
    ("auth.hook.max_in_flight", 7, "7"),
    ("hooks.url", "https://app.example/events", "https://app.example/events"),
    ("hooks.secret", MASKED, SECRET),
    ("hooks.messages", ["orders.*", "news"], "orders.*, news"),
    ("hooks.timeout_s", 2.5, "2.5"),
    ("hooks.max_pending", 10, "10"),
    ("api.key", MASKED, SECRET),
    ("console.enabled", False, "false"),
    ("shutdown.readiness_delay_s", 1, "1"),
    ("shutdown.spread_s", 2.5, "2.5"),
    ("shutdown.timeout_s", 30, "30"),
    ("logging.level", "debug", "debug"),
    ("logging.format", "json", "json"),
]

ALTERNATIVES = {
    "auth.jwt.jwks_url": [],
    "backplane.password_file": ["backplane.url"],
    "backplane.creds_file": ["backplane.url"],
    "backplane.nkey_file": ["backplane.url"],
}
"""Settings that exclude others of the table; which of the others they need."""

Check = Callable[..., CommandResult]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Run `check` in an empty directory with this text as its config.yaml, and these variables.

    It runs in this process, because it runs many times. A test with the mark `processes` has a
    process for it.
    """

    def run(text: str | None = None, **env: str) -> CommandResult:
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
        stdout, stderr = capsys.readouterr()
        return CommandResult(exit_code, stdout, stderr)

    return run


@pytest.fixture
def problems_of(tmp_path: Path) -> Callable[[str], tuple[str, ...]]:
    """Load a config.yaml with this text; return the problems with it."""
    file = tmp_path / "config.yaml"

    def find(text: str) -> tuple[str, ...]:
        file.write_text(text)
        try:
            load(file, {})
        except SettingsError as error:
            return tuple(error.problems)
        return ()

    return find


ProblemsOf = Callable[[str], tuple[str, ...]]


def effective(done: CommandResult) -> dict[str, Any]:
    """Assert that the settings are valid; return them."""
    assert done.exit_code == 0, done.stderr
    settings = yaml.safe_load(done.stdout)
    assert isinstance(settings, dict)
    return settings


def leaf(settings: dict[str, Any], key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = value[name]
    return value


def nested_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Return the tree of settings whose leaves have these keys, like server.port."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section = tree
        *sections, name = key.split(".")
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return tree


def variable_of(key: str) -> str:
    return "RELAY__" + key.replace(".", "__").upper()


def assert_rejected(done: CommandResult, *words: str) -> None:
    """Assert that there is one error line, that it has these words, and that the status is 2."""
    assert done.exit_code == 2, done
    assert "Traceback" not in done.stderr
    (line,) = done.error_lines
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"


# Effective settings


def test_without_a_file_the_defaults_are_effective(check: Check) -> None:
    settings = effective(check())
    for section, values in DEFAULTS.items():
        for name, value in values.items():
            assert settings[section][name] == value, f"{section}.{name}"


@pytest.fixture
def files_of_settings(tmp_path: Path) -> None:
    """Write the files that the settings in LEAVES name."""
    other = tmp_path / "other"
    other.mkdir()
    make_pair().write_to(other)
    (other / "jwt.pem").write_bytes(make_signer("RS256").public_pem)
    (other / "nkey").write_text(Nkey(USER).seed)
    (other / "creds").write_text(NatsAccounts(subscribe=[]).credentials)


@pytest.mark.parametrize("source", ["file", "environment"])
@pytest.mark.usefixtures("files_of_settings")
def test_every_setting_is_read_from_the_file_and_from_the_environment(
    check: Check, source: str
) -> None:
    """The table has every setting, or the effective settings would have more."""
    expected = {key: value for key, value, _ in LEAVES}
    written = {key: value for key, _, value in LEAVES}
    together = [key for key in expected if key not in ALTERNATIVES]
    for keys in (together, *([key, *needed] for key, needed in ALTERNATIVES.items())):
        if source == "file":
            secrets: dict[str, Any] = {key: SECRET for key in keys if expected[key] == MASKED}
            secrets["auth.jwt.secrets"] = [SECRET, SECRET]
            values = {key: secrets.get(key, expected[key]) for key in keys}
            settings = effective(check(yaml.safe_dump(nested_settings(values))))
        else:
            settings = effective(check(**{variable_of(key): written[key] for key in keys}))
        if keys is together:
            assert settings == nested_settings(expected | dict.fromkeys(ALTERNATIVES, ""))
        else:
            assert {key: leaf(settings, key) for key in keys} == {
                key: expected[key] for key in keys
            }


def test_the_environment_overrides_the_file_and_the_file_the_defaults(check: Check) -> None:
    file = "server: {port: 1111, host: 127.0.0.3}\nlimits: {max_connections: 5}\n"
    settings = effective(check(file, RELAY__SERVER__PORT="2222"))
    assert settings["server"]["port"] == 2222
    assert settings["server"]["host"] == "127.0.0.3"
    assert settings["limits"]["max_connections"] == 5
    assert settings["metrics"]["port"] == 9090


@pytest.mark.processes
def test_a_given_file_replaces_the_file_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("server: {port: 1111}\n")
    (tmp_path / "other.yaml").write_text("server: {port: 2222}\n")
    done = run_command("check", "--config-file", "other.yaml", directory=tmp_path)
    assert effective(done)["server"]["port"] == 2222


@pytest.mark.parametrize(
    "text", ["# a comment only\n", "---\n", "{}\n", "server:\n  # port: 1111\nlimits: {}\n"]
)
def test_a_file_or_a_section_without_settings_leaves_the_defaults(check: Check, text: str) -> None:
    assert effective(check(text))["server"]["port"] == 8443


def test_variables_that_kubernetes_sets_for_a_service_are_ignored(check: Check) -> None:
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


def test_the_output_of_check_is_a_valid_settings_file(check: Check) -> None:
    first = check("server: {port: 1111, allowed_origins: ['https://a.example']}\n")
    assert first.error_lines == []
    assert effective(check(first.stdout)) == effective(first)


# Invalid settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("sever: {port: 1}", ["sever"], id="unknown section"),
        pytest.param("server: {prot: 1}", ["server.prot"], id="unknown key"),
        pytest.param("server: {tls: {enable: true}}", ["server.tls.enable"], id="unknown deep key"),
        pytest.param("port: 8443", ["port"], id="key without its section"),
        pytest.param("server: {port: 70000}", ["server.port", "70000", "65535"], id="too large"),
        pytest.param("server: {port: -1}", ["server.port", "-1", "0"], id="negative"),
        pytest.param(
            "keepalive: {ping_interval_s: 0}", ["keepalive.ping_interval_s", "0"], id="zero"
        ),
        pytest.param(
            "keepalive: {ping_timeout_s: .nan}", ["keepalive.ping_timeout_s", "nan"], id="NaN"
        ),
        pytest.param(
            "logging: {level: loud}", ["logging.level", "loud", "info", "debug"], id="no choice"
        ),
        pytest.param("server: {port: many}", ["server.port", "many"], id="word for a number"),
        pytest.param("server: {port: [1]}", ["server.port"], id="list for a number"),
        pytest.param("server: {port: 1.5}", ["server.port", "1.5"], id="fraction for an integer"),
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
        pytest.param("server: {host: null}", ["server.host"], id="null for a string"),
        pytest.param("- a\n- b\n", [], id="a list"),
        pytest.param("just words", [], id="a string"),
        pytest.param("server: {port: 1", [], id="no YAML"),
        pytest.param("server:\n\tport: 1\n", [], id="tabs"),
        pytest.param("server: {port: 1}\nserver: {port: 2}\n", ["server"], id="duplicate key"),
        pytest.param("a: !!python/object/apply:os.getcwd []", [], id="code"),
        pytest.param("server: {port: 1}\n---\nserver: {port: 2}\n", [], id="two documents"),
    ],
)
def test_an_invalid_file_is_rejected_with_one_line_that_names_it(
    check: Check, text: str, words: list[str]
) -> None:
    assert_rejected(check(text), "config.yaml", *words)


def test_a_value_below_the_minimum_of_its_setting_is_rejected(problems_of: ProblemsOf) -> None:
    too_small = {
        "limits.max_message_bytes": 0,
        "limits.max_connections": -5,
        "limits.handshake_timeout_s": 0,
        "channels.max_channels": 0,
        "shutdown.spread_s": -1,
    }
    for key, value in too_small.items():
        (problem,) = problems_of(yaml.safe_dump(nested_settings({key: value})))
        assert f"{key}: {value} is not allowed" in problem


def test_a_file_that_is_not_utf_8_is_rejected(check: Check, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"server: {host: '\xff\xfe'}\n")
    assert_rejected(check(), "config.yaml")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("RELAY__SERVER__PORT", "70000", ["70000", "65535"]),
        ("RELAY__METRICS__ENABLED", "perhaps", ["perhaps"]),
        ("RELAY__LOGGING__LEVEL", "loud", ["loud", "info"]),
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
def test_an_invalid_variable_is_rejected_with_one_line_that_names_it(
    check: Check, variable: str, value: str, words: list[str]
) -> None:
    done = check("server: {port: 1111}\n", **{variable: value})
    assert_rejected(done, variable, *words)
    assert "config.yaml" not in done.stderr


def test_a_valid_variable_hides_no_problem_of_the_file(check: Check) -> None:
    done = check("server: {port: 1111, prot: 2}\n", RELAY__SERVER__PORT="2222")
    assert_rejected(done, "config.yaml", "server.prot")


def test_every_problem_has_a_line(check: Check) -> None:
    file = "server: {port: 70000, prot: 1}\nlogging: {level: loud}\n"
    done = check(file, RELAY__METRICS__PORT="many", RELAY__METRICS__PROT="1")
    assert done.exit_code == 2
    assert len(done.error_lines) == 5
    for key in ("server.port", "server.prot", "logging.level"):
        (line,) = (line for line in done.error_lines if key in line)
        assert "config.yaml" in line
    for variable in ("RELAY__METRICS__PORT", "RELAY__METRICS__PROT"):
        assert len([line for line in done.error_lines if f"{variable}:" in line]) == 1


@pytest.mark.parametrize("command", [[], ["check"]], ids=["serve", "check"])
@pytest.mark.processes
def test_a_given_file_that_is_missing_ends_a_command(tmp_path: Path, command: list[str]) -> None:
    done = run_command(*command, "--config-file", "missing.yaml", directory=tmp_path)
    assert_rejected(done, "missing.yaml")


@pytest.mark.processes
def test_a_directory_is_rejected_as_a_settings_file(tmp_path: Path) -> None:
    done = run_command("check", "--config-file", str(tmp_path), directory=tmp_path)
    assert_rejected(done, str(tmp_path))


@pytest.mark.parametrize("command", [[], ["serve"]], ids=["default", "serve"])
@pytest.mark.processes
def test_the_relay_does_not_start_with_an_invalid_setting(
    tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "config.yaml").write_text("server: {port: 70000}\n")
    done = run_command(*command, directory=tmp_path)
    assert_rejected(done, "config.yaml", "server.port", "70000", "65535")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no certificate", "cert.pem"),
        ("no key", "key.pem"),
        ("broken certificate", ".pem"),
        ("broken key", "key.pem"),
        ("another key", ".pem"),
        ("empty certificate", ".pem"),
        ("exchanged files", ".pem"),
    ],
)
def test_tls_files_that_are_no_pair_are_rejected_with_one_line(
    check: Check, tmp_path: Path, fault: str, words: str
) -> None:
    pair = make_pair()
    files: dict[str, bytes | None] = {"cert.pem": pair.certificate_pem, "key.pem": pair.key_pem}
    match fault:
        case "no certificate":
            files["cert.pem"] = None
        case "no key":
            files["key.pem"] = None
        case "broken certificate":
            files["cert.pem"] = b"-----BEGIN CERTIFICATE-----\nnonsense\n"
        case "broken key":
            files["key.pem"] = b"nonsense"
        case "another key":
            files["key.pem"] = make_pair().key_pem
        case "empty certificate":
            files["cert.pem"] = b""
        case "exchanged files":
            files = {"cert.pem": pair.key_pem, "key.pem": pair.certificate_pem}
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    assert_rejected(check("server: {tls: {enabled: true}}\n"), words)


@pytest.mark.processes
def test_the_relay_does_not_start_without_its_certificate(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("server: {port: 0, tls: {enabled: true}}\n")
    assert_rejected(run_command(directory=tmp_path), "cert.pem")


@pytest.mark.parametrize("proxy", ["::ffff:127.0.0.1", "::ffff:127.0.0.0/104", "127.0.0.0/8"])
@pytest.mark.processes
async def test_a_trusted_proxy_is_an_ipv4_address_or_network_in_either_notation(
    relay_with: StartRelay, proxy: str
) -> None:
    relay = relay_with(server={"trusted_proxies": [proxy]}, limits={"max_connections_per_ip": 1})
    first = {"X-Forwarded-For": "203.0.113.1"}
    second = {"X-Forwarded-For": "203.0.113.2"}
    async with (
        relay.client(additional_headers=first),
        relay.client(additional_headers=second),
    ):
        answer = await refusal_answer(relay.client(additional_headers=first))
        assert answer.status_code == 503


@pytest.mark.parametrize("proxy", refused_settings.PROXIES)
def test_a_trusted_proxy_that_is_no_address_and_no_network_is_rejected(
    problems_of: ProblemsOf, proxy: str
) -> None:
    (problem,) = problems_of(yaml.safe_dump({"server": {"trusted_proxies": [proxy]}}))
    assert "server.trusted_proxies" in problem
    assert "10.0.0.0/8" in problem


@pytest.mark.parametrize(
    ("origin", "sent"),
    [
        ("HTTPS://App.Example", "https://app.example"),
        ("https://example.com:443", "https://example.com"),
        ("http://example.com:080", "http://example.com"),
        ("http://example.com:443", "http://example.com:443"),
        ("https://münchen.example", "https://xn--mnchen-3ya.example"),
        ("https://*.BÜCHER.example:*", "https://*.xn--bcher-kva.example:*"),
        ("http://[0:0::1]:3000", "http://[::1]:3000"),
        ("http://a_b.example", "http://a_b.example"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("moz-extension://*", "moz-extension://*"),
        ("file://", "file://"),
        ("null", "null"),
    ],
)
def test_an_origin_is_brought_into_the_form_that_browsers_send(
    check: Check, origin: str, sent: str
) -> None:
    settings = yaml.safe_dump({"server": {"allowed_origins": [origin]}})
    assert effective(check(settings))["server"]["allowed_origins"] == [sent]


@pytest.mark.parametrize(("origin", "words"), refused_settings.ORIGINS)
def test_an_origin_that_no_browser_sends_is_rejected(
    problems_of: ProblemsOf, origin: str, words: str
) -> None:
    (problem,) = problems_of(yaml.safe_dump({"server": {"allowed_origins": [origin]}}))
    assert "server.allowed_origins" in problem
    assert words in problem


@pytest.mark.parametrize(("server", "words"), refused_settings.SERVERS)
def test_an_address_to_listen_on_that_can_not_work_is_rejected(
    problems_of: ProblemsOf, server: dict[str, Any], words: list[str]
) -> None:
    (problem,) = problems_of(yaml.safe_dump({"server": server}))
    assert [word for word in words if word not in problem] == [], problem


# Tokens


def jwt_settings(**of_jwt: Any) -> str:
    """Return a settings file that requires tokens."""
    return yaml.safe_dump({"auth": {"mode": "jwt", "jwt": of_jwt}})


@pytest.mark.parametrize(("of_jwt", "words"), refused_settings.TOKENS)
def test_an_algorithm_without_a_key_and_a_key_without_an_algorithm_are_rejected(
    check: Check, of_jwt: dict[str, Any], words: list[str]
) -> None:
    assert_rejected(check(jwt_settings(**of_jwt)), "config.yaml", "auth", *words)


def test_a_missing_key_is_reported_with_the_variable_that_requires_it(check: Check) -> None:
    done = check(RELAY__AUTH__MODE="jwt")
    assert_rejected(done, "RELAY__AUTH__MODE", "auth.jwt.secret")
    assert "config.yaml" not in done.stderr


NO_TOKENS = "auth.mode is none: all clients are accepted"


# The backend that decides about clients


def hook_settings(**of_hook: Any) -> dict[str, Any]:
    """Return settings without warnings, with which a backend is asked."""
    hook = {"url": "http://app.example/relay"} | of_hook
    return {
        "auth": {"mode": "hook", "hook": hook},
        "hooks": {"secret": SECRET},
        "server": {"allowed_origins": ["https://app.example"]},
    }


def test_the_mode_hook_needs_a_url(check: Check) -> None:
    assert check(yaml.safe_dump(hook_settings())).faults == []
    done = check(yaml.safe_dump(hook_settings(url="")))
    assert_rejected(done, "config.yaml", "auth.mode is hook", "auth.hook.url")
    assert_rejected(check("{}", RELAY__AUTH__MODE="hook"), "RELAY__AUTH__MODE", "auth.hook.url")


@pytest.mark.parametrize(
    "url", ["app.example", "ftp://app.example", "http://", "http://app.example:x", "http://a b"]
)
def test_the_url_of_a_hook_is_http_or_https(check: Check, url: str) -> None:
    assert_rejected(check(yaml.safe_dump(hook_settings(url=url))), "auth.hook.url", "a URL like")
    assert_rejected(check(yaml.safe_dump({"hooks": {"url": url}})), "hooks.url", "a URL like")


def test_the_password_in_the_url_of_a_hook_is_rejected_and_not_shown(check: Check) -> None:
    for settings in (
        hook_settings(url="http://relay:s3cr3t@app.example/"),
        {"hooks": {"url": "http://relay:s3cr3t@app.example/"}},
    ):
        done = check(yaml.safe_dump(settings))
        assert_rejected(done, "not shown", "without a password")
        assert "s3cr3t" not in done.stderr


@pytest.mark.parametrize("headers", [["a b"], [""], ["cookie:"], ["ä"], [5]])
def test_headers_that_a_hook_gets_are_names_of_headers(check: Check, headers: list[Any]) -> None:
    done = check(yaml.safe_dump(hook_settings(headers=headers)))
    assert_rejected(done, "auth.hook.headers", "names of headers")


def test_names_of_headers_have_lower_case_and_are_listed_once(check: Check) -> None:
    done = check(yaml.safe_dump(hook_settings(headers=["Cookie", "X-Session", "cookie"])))
    assert leaf(effective(done), "auth.hook.headers") == ["cookie", "x-session"]


@pytest.mark.parametrize(
    ("changed", "warnings"),
    [
        ({}, []),
        (
            {"hooks": {}},
            ["hooks.secret is empty: requests are not signed (unsigned: auth.hook.url)"],
        ),
        (
            {"server": {"allowed_origins": ["*"]}},
            ["any page may use the cookies of its visitors (allowed_origins: *)"],
        ),
        ({"auth": {"hook": {"url": "http://a.example"}}}, [f"{NO_TOKENS} (unused: auth.hook.url)"]),
    ],
)
def test_a_hook_that_others_may_misuse_or_that_is_unused_is_a_warning(
    check: Check, changed: dict[str, Any], warnings: list[str]
) -> None:
    done = check(yaml.safe_dump(hook_settings() | changed))
    assert done.faults == [f"websocket-relay: warning: {warning}" for warning in warnings]


@pytest.mark.parametrize(
    ("changed", "warnings"),
    [
        ({}, []),
        ({"presence": {}, "hooks": {"messages": ["news"]}}, []),
        (
            {"hooks": {"secret": ""}},
            ["hooks.secret is empty: requests are not signed (unsigned: hooks.url)"],
        ),
        (
            {"auth": {"mode": "jwt", "jwt": {"secret": SECRET}}, "hooks": {"secret": ""}},
            ["hooks.secret is empty: requests are not signed (unsigned: hooks.url)"],
        ),
        (
            {"auth": hook_settings(headers=["authorization"])["auth"], "hooks": {"secret": ""}},
            ["hooks.secret is empty: requests are not signed (unsigned: auth.hook.url, hooks.url)"],
        ),
        (
            {"presence": {}},
            ["hooks.url receives no events (empty: presence.channels, hooks.messages)"],
        ),
    ],
)
def test_webhooks_without_a_signature_or_without_events_are_a_warning(
    check: Check, changed: dict[str, Any], warnings: list[str]
) -> None:
    hooks = {"url": "http://app.example/events", "secret": SECRET} | changed.get("hooks", {})
    settings = {"presence": {"channels": ["news"]}} | changed | {"hooks": hooks}
    done = check(yaml.safe_dump(settings))
    assert done.faults == [f"websocket-relay: warning: {warning}" for warning in warnings]


def test_without_cookies_any_origin_is_no_warning(check: Check) -> None:
    settings = hook_settings(headers=["authorization"]) | {"server": {"allowed_origins": ["*"]}}
    assert check(yaml.safe_dump(settings)).faults == []


# Unused keys


@pytest.mark.parametrize(
    "of_jwt",
    [
        {"secret": SECRET},
        {"public_key_file": "missing.pem", "algorithms": ["RS256"]},
        {"secret": SECRET, "jwks_url": "https://issuer.example/"},
    ],
    ids=["secret", "key file", "secret and URL"],
)
def test_unused_keys_of_tokens_are_a_warning_and_not_read(
    check: Check, of_jwt: dict[str, Any]
) -> None:
    done = check(yaml.safe_dump({"auth": {"jwt": of_jwt}}))
    unused = ", ".join(f"auth.jwt.{name}" for name in of_jwt if name != "algorithms")
    assert leaf(effective(done), "auth.mode") == "none"
    assert done.error_lines == [f"websocket-relay: warning: {NO_TOKENS} (unused: {unused})"]


@pytest.mark.parametrize(
    ("algorithm", "length", "warns"),
    [("HS256", 31, True), ("HS256", 32, False), ("HS384", 47, True), ("HS512", 64, False)],
)
def test_a_short_secret_is_a_warning(
    check: Check, algorithm: str, length: int, warns: bool
) -> None:
    done = check(jwt_settings(secret="s" * length, algorithms=[algorithm]))
    least = {"HS256": 32, "HS384": 48, "HS512": 64}[algorithm]
    facts = f"(algorithm: {algorithm}, min_bytes: {least})"
    line = f"websocket-relay: warning: auth.jwt.secret is short {facts}"
    assert (done.exit_code, done.error_lines) == (0, [line] * warns)


@pytest.mark.parametrize("key", [" s3cret", "s3cret ", "grün", "s3\tcret", "s3\ncret"])
def test_the_key_of_the_api_is_one_that_a_header_can_have(check: Check, key: str) -> None:
    done = check(yaml.safe_dump({"api": {"key": key}}))
    assert_rejected(done, "config.yaml: api.key: ", "printable ASCII")
    assert key not in done.stderr


@pytest.mark.parametrize(("length", "warns"), [(31, True), (32, False)])
def test_a_short_key_of_the_api_causes_a_warning(check: Check, length: int, warns: bool) -> None:
    done = check(yaml.safe_dump({"api": {"key": "k" * length}}))
    line = "websocket-relay: warning: api.key is short (min_bytes: 32)"
    assert (done.exit_code, done.faults) == (0, [line] * warns)


@pytest.mark.parametrize(
    ("auth", "event", "facts"),
    [
        ({"jwt": {"secret": "s3cr3t"}}, NO_TOKENS, {"unused": "auth.jwt.secret"}),
        (
            {"mode": "jwt", "jwt": {"secret": "s3cr3t"}},
            "auth.jwt.secret is short",
            {"algorithm": "HS256"},
        ),
    ],
    ids=["unused keys", "short secret"],
)
@pytest.mark.processes
def test_a_warning_about_settings_is_an_event_of_the_log_without_the_secret(
    tmp_path: Path, auth: dict[str, Any], event: str, facts: dict[str, str]
) -> None:
    with RelayProcess(tmp_path, {"auth": auth}) as relay:
        (warning,) = (line for line in relay.log_events if line["level"] == "warning")
        assert warning["event"] == event
        assert facts.items() <= warning.items()
        assert "s3cr3t" not in "".join(relay.log_lines)
        assert relay.unexpected_lines == []


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
        pytest.param(
            ["RS256"], make_signer("RS256").private_pem, ["private key"], id="a private key"
        ),
        pytest.param(["RS256"], make_pair().certificate_pem, ["PEM"], id="a certificate"),
        pytest.param(["RS256"], make_signer("ES256").public_pem, ["RS256"], id="EC for RSA"),
        pytest.param(["ES256"], make_signer("RS256").public_pem, ["ES256"], id="RSA for EC"),
        pytest.param(
            ["RS256"],
            Signer("RS256", rsa.generate_private_key(65_537, 1024)).public_pem,
            ["RSA", "fewer than 2048 bits"],
            id="a short RSA key",
        ),
        pytest.param(["ES256"], make_signer("ES384").public_pem, ["ES256"], id="another curve"),
        pytest.param(["EdDSA"], make_signer("ES256").public_pem, ["EdDSA"], id="EC for Ed25519"),
        pytest.param(
            ["ES256", "ES384"],
            make_signer("ES256").public_pem,
            ["ES384"],
            id="one key for two curves",
        ),
        pytest.param(
            ["ES256"],
            Signer("ES256", ec.generate_private_key(ec.SECP224R1())).public_pem,
            ["ES256"],
            id="a curve of no algorithm",
        ),
    ],
)
def test_an_unusable_key_file_is_rejected_with_one_line(
    check: Check, tmp_path: Path, algorithms: list[str], content: bytes | None, words: list[str]
) -> None:
    if content is not None:
        (tmp_path / "jwt.pem").write_bytes(content)
    done = check(jwt_settings(algorithms=algorithms, public_key_file="jwt.pem"))
    assert_rejected(done, "config.yaml: auth.jwt.public_key_file: jwt.pem: ", *words)


@pytest.mark.processes
def test_the_relay_does_not_start_with_an_unusable_key_file(tmp_path: Path) -> None:
    file = jwt_settings(algorithms=["RS256"], public_key_file="missing.pem")
    (tmp_path / "config.yaml").write_text(file)
    assert_rejected(run_command(directory=tmp_path), "auth.jwt.public_key_file", "missing.pem")


def test_a_directory_is_rejected_as_a_key_file(check: Check, tmp_path: Path) -> None:
    done = check(jwt_settings(algorithms=["RS256"], public_key_file=str(tmp_path)))
    assert_rejected(done, f"config.yaml: auth.jwt.public_key_file: {tmp_path}: a directory")


def test_an_unusable_key_is_reported_with_the_variable_that_names_it(check: Check) -> None:
    file = jwt_settings(algorithms=["RS256"], public_key_file="of-the-file.pem")
    done = check(file, RELAY__AUTH__JWT__PUBLIC_KEY_FILE="missing.pem")
    variable = "RELAY__AUTH__JWT__PUBLIC_KEY_FILE"
    assert_rejected(done, f"{variable}: auth.jwt.public_key_file: missing.pem: no such file")
    assert "config.yaml" not in done.stderr
    done = check(jwt_settings(), RELAY__AUTH__JWT__SECRET=f"{SECRET}\n")
    assert_rejected(done, "RELAY__AUTH__JWT__SECRET: auth.jwt.secret: white space")


@pytest.mark.parametrize("url", refused_settings.JWKS_URLS)
def test_a_jwks_url_that_is_no_http_url_is_rejected(problems_of: ProblemsOf, url: str) -> None:
    (problem,) = problems_of(jwt_settings(algorithms=["RS256"], jwks_url=url))
    assert "auth.jwt.jwks_url" in problem
    assert "https://" in problem
    assert "user" not in problem


def test_a_jwks_url_is_an_http_or_https_url(problems_of: ProblemsOf) -> None:
    for url in ("http://127.0.0.1:8080/keys", "https://[::1]/?a=b", "HTTPS://a"):
        assert problems_of(jwt_settings(algorithms=["RS256"], jwks_url=url)) == ()


NO_AUTHORITIES = {"SSL_CERT_FILE": "", "SSL_CERT_DIR": ""}
UNUSABLE_ENVIRONMENTS: list[tuple[dict[str, str], list[str]]] = [
    ({"ALL_PROXY": "socks5://user:S3CR3T@127.0.0.1:1080"}, ["ALL_PROXY", "SOCKS", "https_proxy"]),
    ({"all_proxy": "socks://127.0.0.1:1080"}, ["all_proxy", "no_proxy to issuer.example"]),
    ({"HTTPS_PROXY": "http://[::1"}, ["HTTPS_PROXY is no HTTP proxy"]),
    ({"https_proxy": "proxy.example:S3CR3T"}, ["https_proxy is no HTTP proxy"]),
    ({"SSL_CERT_FILE": "missing.pem"}, ["SSL_CERT_FILE=missing.pem: No such file"]),
    ({"SSL_CERT_FILE": "config.yaml"}, ["SSL_CERT_FILE=config.yaml: no certificates"]),
    (NO_AUTHORITIES | {"SSL_CERT_DIR": "missing"}, ["SSL_CERT_DIR=missing: No such file"]),
]


@pytest.mark.parametrize(("variables", "words"), UNUSABLE_ENVIRONMENTS)
def test_an_unusable_proxy_or_authority_on_the_way_to_the_issuer_is_named(
    check: Check, variables: dict[str, str], words: list[str]
) -> None:
    file = jwt_settings(algorithms=["RS256"], jwks_url="https://issuer.example/keys")
    done = check(file, **variables)
    assert_rejected(done, "config.yaml: auth.jwt.jwks_url: ", *words)
    assert "S3CR3T" not in done.stderr


def test_a_proxy_that_the_issuer_does_not_need_is_ignored(check: Check) -> None:
    """A desktop sets ALL_PROXY beside the others, for programs that speak SOCKS."""
    file = jwt_settings(algorithms=["RS256"], jwks_url="https://issuer.example/keys")
    socks = {"ALL_PROXY": "socks5://127.0.0.1:1080"}
    for variables in (
        socks | {"https_proxy": "127.0.0.1:3128"},
        socks | {"no_proxy": "localhost,issuer.example"},
        {"http_proxy": "socks5://127.0.0.1:1080"},
    ):
        assert check(file, **variables).faults == []
    assert check(jwt_settings(secret=SECRET), SSL_CERT_FILE="missing.pem", **socks).faults == []


@pytest.mark.parametrize(
    "secret",
    [
        make_signer("RS256").public_pem.decode(),
        make_signer("RS256").private_pem.decode(),
        json.dumps(make_signer("RS256").jwk()),
    ],
    ids=["public key", "private key", "JWK"],
)
def test_a_key_in_place_of_a_secret_is_rejected(check: Check, secret: str) -> None:
    done = check(jwt_settings(secret=secret))
    assert_rejected(done, "config.yaml: auth.jwt.secret: ", "PEM")
    assert secret[40:60] not in done.stderr


@pytest.mark.parametrize("secret", [f"{SECRET}\n", f"{SECRET}\r\n", f" {SECRET}", f"{SECRET}\t"])
def test_a_secret_with_white_space_at_an_end_is_rejected(check: Check, secret: str) -> None:
    """A file's newline, for example: the relay would reject every token, for no visible reason."""
    done = check(jwt_settings(secret=secret))
    assert_rejected(done, "config.yaml: auth.jwt.secret: white space at an end", "newline")
    assert SECRET not in done.stderr


def test_one_of_several_secrets_is_checked_like_the_only_one(check: Check) -> None:
    for second in (f"{SECRET}\n", make_signer("RS256").public_pem.decode(), "", 5, [SECRET]):
        done = check(jwt_settings(secrets=[SECRET, second]))
        assert_rejected(done, "config.yaml: auth.jwt.secrets: ")
        assert SECRET not in done.stderr
    done = check(jwt_settings(), RELAY__AUTH__JWT__SECRETS=f"{SECRET},{SECRET}")
    assert_rejected(done, "RELAY__AUTH__JWT__SECRETS: auth.jwt.secrets", "a JSON list")
    done = check(jwt_settings(secret=SECRET, secrets=["short"]))
    assert "auth.jwt.secret is short" in done.stderr


def test_a_secret_with_white_space_inside_is_valid(check: Check) -> None:
    assert check(jwt_settings(secret=SECRET)).stderr == ""


def test_an_unknown_algorithm_is_rejected_with_the_known_ones(check: Check) -> None:
    for unknown in ("HS265", "PS265", "ES512K", "none", "hs256", "Ed25518"):
        done = check(jwt_settings(secret=SECRET, algorithms=["HS256", unknown]))
        assert_rejected(
            done, "auth.jwt.algorithms", f"'{unknown}' is not allowed", "HS256", "EdDSA"
        )
        done = check(jwt_settings(secret=SECRET), RELAY__AUTH__JWT__ALGORITHMS=unknown)
        assert_rejected(done, "RELAY__AUTH__JWT__ALGORITHMS", f"'{unknown}'", "HS256", "EdDSA")
    done = check(jwt_settings(secret=SECRET, algorithms=[]))
    assert_rejected(done, "[] is not allowed", "HS256")


def test_a_secret_that_is_not_utf_8_is_rejected(check: Check) -> None:
    done = check(RELAY__AUTH__MODE="jwt", RELAY__AUTH__JWT__SECRET="\udcff\udcfe")
    assert_rejected(done, "RELAY__AUTH__JWT__SECRET", "UTF-8")


def test_an_error_between_settings_names_where_they_are_from(check: Check) -> None:
    same = "server.port and metrics.port are the same"
    assert_rejected(check(RELAY__SERVER__PORT="9090"), f"RELAY__SERVER__PORT: {same}")
    assert_rejected(check("server: {port: 9090}"), f"config.yaml: {same}")
    done = check("server: {proxy_protocol: true}", RELAY__SERVER__PORT="1234")
    assert_rejected(done, "config.yaml: server: server.proxy_protocol needs")


def test_a_key_that_pydantic_settings_would_understand_is_unknown(check: Check) -> None:
    for key in ("_env_prefix", "_cli_parse_args", "_env_file"):
        assert_rejected(check(f"{key}: true"), f"config.yaml: {key}: unknown key")


def test_an_unknown_mode_is_rejected_and_shown(check: Check) -> None:
    assert_rejected(check("auth: {mode: jwts}"), "auth.mode", "'jwts'", "none, jwt")
    assert_rejected(check(RELAY__AUTH__MODE="off"), "RELAY__AUTH__MODE", "'off'", "none, jwt")


# The backplane


@pytest.mark.parametrize(("url", "name", "is_accepted"), refused_settings.STREAMS)
def test_the_name_of_a_stream_is_what_its_broker_accepts(
    problems_of: ProblemsOf, url: str, name: str, is_accepted: bool
) -> None:
    problems = problems_of(yaml.safe_dump({"backplane": {"url": url, "stream": name}}))
    assert [problem for problem in problems if "backplane.stream" not in problem] == []
    assert len(problems) == (not is_accepted)


@pytest.mark.parametrize(
    ("url", "of_backplane", "setting", "words"),
    [
        *refused_settings.ACCESS,
        ("tls://b", {"ca_file": "missing.pem"}, "ca_file", "missing.pem: No such file"),
        ("tls://b", {"ca_file": "config.yaml"}, "ca_file", "config.yaml: no certificate"),
        ("rediss://b", {"ca_file": "missing.pem"}, "ca_file", "missing.pem: No such file"),
        ("tls://b?ssl_ca_certs=missing.pem", {}, "url", "missing.pem: No such file"),
        ("redis://b", {"password_file": "missing"}, "password_file", "no such file"),
        ("nats://b", {"nkey_file": "config.yaml"}, "nkey_file", "no seed of a user"),
        ("nats://b", {"nkey_file": "typo"}, "nkey_file", "invalid seed: wrong checksum"),
        ("nats://b", {"creds_file": "nkey"}, "creds_file", "no JWT of a user"),
    ],
)
def test_access_that_does_not_fit_the_broker_is_rejected_with_one_line(
    check: Check, tmp_path: Path, url: str, of_backplane: dict[str, str], setting: str, words: str
) -> None:
    seed = Nkey(USER).seed
    (tmp_path / "nkey").write_text(seed)
    (tmp_path / "typo").write_text(f"{seed[:20]}{'A' if seed[20] != 'A' else 'B'}{seed[21:]}")
    done = check(yaml.safe_dump({"backplane": {"url": url, **of_backplane}}))
    assert_rejected(done, f"config.yaml: backplane.{setting}: ", words)
    assert SECRET not in done.stderr


# Secrets


SECRET_SETTINGS = [
    (".".join(path), "memory://" if path[-1] == "url" else "s3cret " * 9 + "s3cret")
    for path in sorted(SECRETS)
    if path != ("backplane", "password")  # backplane.password_file is a setting of its own
]


@pytest.mark.parametrize(("key", "secret"), SECRET_SETTINGS)
def test_every_secret_can_come_from_a_file_that_a_variable_names(
    tmp_path: Path, key: str, secret: str
) -> None:
    text = json.dumps([secret]) if key.endswith("secrets") else secret
    (tmp_path / "secret").write_text(f"{text}\n")
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(nested_settings({key: "of the file", "server.port": 1111}))
    )
    variables = {f"{variable_of(key)}_FILE": str(tmp_path / "secret")}
    settings = load(tmp_path / "config.yaml", variables)
    assert settings.server.port == 1111
    found = leaf(settings.model_dump(), key)
    (loaded,) = found if isinstance(found, tuple) else [found]
    assert loaded.get_secret_value() == secret


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"\n", "empty"),
        (b"\xff\xfe", "not a text in UTF-8"),
        (b"s" * 65_537, "longer than 64 KiB"),
    ],
)
def test_a_file_without_a_usable_secret_is_rejected_with_the_variable_that_names_it(
    check: Check, tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    done = check(RELAY__AUTH__MODE="jwt", RELAY__AUTH__JWT__SECRET_FILE=str(file))
    assert_rejected(done, f"RELAY__AUTH__JWT__SECRET_FILE: {file}: {words}")


def test_a_secret_in_the_place_of_its_file_is_not_shown(check: Check) -> None:
    for value in (SECRET, SECRET * 9, f"/{SECRET}/{SECRET}", f"{SECRET}\n"):
        done = check(RELAY__AUTH__MODE="jwt", RELAY__AUTH__JWT__SECRET_FILE=value)
        assert_rejected(done, "RELAY__AUTH__JWT__SECRET_FILE: the value (not shown): ")
        assert SECRET not in done.stderr


def test_a_secret_of_a_file_is_reported_with_its_variable_and_not_shown(
    check: Check, tmp_path: Path
) -> None:
    file = tmp_path / "secret"
    file.write_text(f" {SECRET}\n")
    done = check(RELAY__AUTH__MODE="jwt", RELAY__AUTH__JWT__SECRET_FILE=str(file))
    assert_rejected(done, "RELAY__AUTH__JWT__SECRET_FILE: auth.jwt.secret: white space at an end")
    done = check(RELAY__BACKPLANE__URL_FILE=str(file))
    assert_rejected(done, "RELAY__BACKPLANE__URL_FILE: backplane.url: ")
    assert SECRET not in done.stderr


def test_a_secret_and_its_file_are_not_both_set(check: Check, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET)
    done = check(RELAY__AUTH__JWT__SECRET=SECRET, RELAY__AUTH__JWT__SECRET_FILE=str(file))
    assert_rejected(done, "RELAY__AUTH__JWT__SECRET", "RELAY__AUTH__JWT__SECRET_FILE", "both set")


@pytest.mark.parametrize("mode", ["jwt", "none"])
def test_check_masks_the_secret_of_tokens(check: Check, mode: str) -> None:
    done = check(yaml.safe_dump({"auth": {"mode": mode, "jwt": {"secret": SECRET}}}))
    assert leaf(effective(done), "auth.jwt.secret") == MASKED
    assert SECRET not in done.stdout + done.stderr


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
def test_check_masks_the_credentials_in_the_url_of_a_broker(
    check: Check, url: str, shown: str
) -> None:
    for done in (check(f"backplane: {{url: '{url}'}}"), check("", RELAY__BACKPLANE__URL=url)):
        assert leaf(effective(done), "backplane.url") == shown
        assert "S3CR3T" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "url", ["S3CR3T", "http://user:S3CR3T@broker", "redis://user:S3CR3T@broker:port", "nats://"]
)
def test_an_invalid_url_of_a_broker_is_rejected_without_its_secret(check: Check, url: str) -> None:
    done = check(f"backplane: {{url: '{url}'}}")
    assert_rejected(done, "config.yaml: backplane.url: ")
    assert "S3CR3T" not in done.stderr
    done = check("", RELAY__BACKPLANE__URL=url)
    assert_rejected(done, "RELAY__BACKPLANE__URL: backplane.url: ")
    assert "S3CR3T" not in done.stderr


@pytest.mark.parametrize(
    ("scheme", "password"),
    [
        ("redis", "12/S3CR3T"),
        ("redis", "a?S3CR3T"),
        ("rediss", "a#S3CR3T"),
        ("nats", "a/S3CR3T"),
        ("tls", "a?S3@CR3T"),
    ],
)
def test_a_password_that_is_not_percent_encoded_is_rejected_and_not_shown(
    check: Check, scheme: str, password: str
) -> None:
    done = check(RELAY__BACKPLANE__URL=f"{scheme}://user:{password}@broker:6379/0")
    assert_rejected(done, f"RELAY__BACKPLANE__URL: backplane.url: '{scheme}://***': ", "%2F for /")
    assert not any(part in done.stderr for part in ("user", "S3", "CR3T"))


FILES_WITH_A_SECRET = (
    "auth: {jwt: {secrets: S3CR3T}}",
    "auth: {jwt: {secret: [S3CR3T]}}",
    "backplane: {password: [S3CR3T]}",
    "backplane: {password: 532370}",
    'backplane: {nkey_file: "S3CR3T\\nS3CR3T"}',
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
)
"""Invalid settings files; in each the secret is in another wrong place."""


def test_no_error_line_shows_a_secret_of_the_file(problems_of: ProblemsOf) -> None:
    found = {text: problems_of(text) for text in FILES_WITH_A_SECRET}
    assert [text for text, problems in found.items() if not problems] == []
    # Of an invalid mode the value is shown, and the name of a key; nothing else.
    lines = [line for problems in found.values() for line in problems if "auth.mode" not in line]
    shown = [line for line in lines if re.search("3CR3T|532370|2020", line)]
    assert shown == []


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param(
            [
                "RELAY__AUTH__JWT__SECRETZ",
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
            ["RELAY__AUTH__JWT__ALGORITHMS", "RELAY__AUTH__JWT__JWKS_URL"], id="invalid values"
        ),
    ],
)
def test_no_error_line_shows_a_secret_of_the_environment(
    check: Check, variables: list[str]
) -> None:
    for value in ("S3CR3T", '{"secret": "S3CR3T"}', '["S3CR3T"]', "[S3CR3T"):
        done = check(**dict.fromkeys(variables, value))
        assert done.exit_code == 2
        assert "S3CR3T" not in done.stdout + done.stderr
        unnamed = [name for name in variables if f"{name}: " not in done.stderr]
        assert not unnamed
