"""The rendered chart with real relays: its settings, its probes, and the script of `helm test`."""

import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from tests.support.certificates import make_pair
from tests.support.helm import CI_VALUES, KubernetesObject, merge_values, nested_values, newest_helm
from tests.support.issuer import SECRET, make_signer
from tests.support.pod import Pod, Secrets
from tests.support.relay_process import (
    HOST,
    CommandResult,
    RelayProcess,
    merged,
    run_command,
    run_python,
)

PAIR = make_pair()
SIGNER = make_signer("ES256")
SECRETS: Secrets = {
    "relay-tls": {"tls.crt": PAIR.certificate_pem, "tls.key": PAIR.key_pem},
    "relay-broker": {
        "password": b"pa55word\n",
        "address": b"rediss://:pa55word@redis:6380/0",
    },
    "relay-broker-client": {"tls.crt": PAIR.certificate_pem, "tls.key": PAIR.key_pem},
    "relay-broker-ca": {"ca.crt": PAIR.certificate_pem},
    "relay-jwt": {"secret": SECRET.encode(), "secrets.json": f'["the next {SECRET}"]'.encode()},
    "relay-hooks": {"secret": SECRET.encode()},
    "relay-api": {"api-key": b"the key of the server API, of no use elsewhere\n"},
    "relay-jwt-key": {"public.pem": SIGNER.public_pem},
    "relay-test-token": {"token": SIGNER.token(exp=int(time.time()) + 3600).encode() + b"\n"},
}

TLS = {"config": {"server": {"tls": {"enabled": True}}}, "tls": {"secretName": "relay-tls"}}
NO_METRICS = nested_values("config.metrics.enabled", False)
SECRET_TOKENS = {
    "config": {
        "auth": {
            "mode": "jwt",
            "jwt": {
                "audience": ["relay", "another"],
                "issuer": "https://issuer",
                "claim": "https://issuer/relay",
            },
        }
    },
    "secrets": {"jwtSecret": {"name": "relay-jwt"}},
}
KEY_TOKENS = {
    "config": {"auth": {"mode": "jwt", "jwt": {"algorithms": ["ES256"]}}},
    "secrets": {"jwtPublicKey": {"name": "relay-jwt-key"}},
}
GIVEN_TOKEN = nested_values("test.token.name", "relay-test-token")
LOCAL_PORTS = {"server": {"host": HOST, "port": 0}, "metrics": {"host": HOST, "port": 0}}


class LocalRelease:
    """A release of the chart on this machine: directories are its volumes.

    Args:
        objects: as Helm rendered them.
        directory: for the volumes.
    """

    def __init__(self, objects: list[KubernetesObject], directory: Path) -> None:
        (self.deployment,) = (each for each in objects if each["kind"] == "Deployment")
        (test,) = (each for each in objects if each["kind"] == "Pod")
        template = self.deployment["spec"]["template"]
        self.relay_pod = Pod(template, SECRETS, directory / "relay")
        self.test_pod = Pod(test, SECRETS, directory / "test")
        self._directory = directory

    @property
    def config_file(self) -> Path:
        """The settings file of the container."""
        flag, path = self.relay_pod.container["args"]
        assert flag == "--config-file"
        return self.relay_pod.path(path)

    def relay(self) -> RelayProcess:
        """Return a relay with the settings of a pod, on free ports."""
        config = yaml.safe_load(self.config_file.read_text())
        return RelayProcess(
            self._directory, merged(config, LOCAL_PORTS), self.relay_pod.environment
        )

    def run_test(self, relay: RelayProcess) -> CommandResult:
        """Run the command of the pod of `helm test`."""
        variables = self.test_pod.environment
        scheme, _, rest = variables["RELAY_TEST_URL"].partition("://")
        variables["RELAY_TEST_URL"] = f"{scheme}://{HOST}:{relay.port}/{rest.partition('/')[2]}"
        program, *arguments = self.test_pod.container["command"]
        assert program == "python"
        return run_python(*arguments, env=variables)


@contextmanager
def running(
    directory: Path, *values: Mapping[str, Any]
) -> Iterator[tuple[LocalRelease, RelayProcess]]:
    release = LocalRelease(newest_helm().objects(values=merge_values(*values)), directory)
    with release.relay() as relay:
        yield release, relay


@pytest.mark.parametrize("values", CI_VALUES, ids=lambda file: file.stem)
def test_the_rendered_settings_are_valid_and_a_pod_has_more_time_than_a_stop_takes(
    values: Path, tmp_path: Path
) -> None:
    release = LocalRelease(newest_helm().objects("--values", str(values)), tmp_path)
    done = run_command(
        "check",
        "--config-file",
        str(release.config_file),
        directory=tmp_path,
        env=release.relay_pod.environment,
    )
    assert (done.exit_code, done.faults) == (0, [])
    settings = release.config_file.read_text()
    assert "pa55word" not in settings
    stop = yaml.safe_load(settings)["shutdown"]
    spec = release.deployment["spec"]
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > stop["timeout_s"]
    # An update replaces the next pod when the clients of this one have reconnected elsewhere.
    probe = release.relay_pod.container["readinessProbe"]
    assert probe["initialDelaySeconds"] + spec["minReadySeconds"] >= stop["readiness_delay_s"]


@pytest.mark.parametrize(
    "values",
    [
        {},
        NO_METRICS,
        merge_values(TLS, NO_METRICS),
        nested_values("config.server.base_path", "/relay"),
    ],
    ids=["default", "no metrics", "TLS, no metrics", "base path"],
)
def test_a_relay_answers_the_probes_of_its_pod(values: Mapping[str, Any], tmp_path: Path) -> None:
    with running(tmp_path, values) as (release, relay):
        ports = {"websocket": lambda: relay.port, "metrics": lambda: relay.metrics_port}
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = release.relay_pod.container[name]["httpGet"]
            scheme = probe.get("scheme", "HTTP").lower()
            url = f"{scheme}://{HOST}:{ports[probe['port']]()}{probe['path']}"
            # A kubelet does not verify certificates.
            assert httpx2.get(url, verify=unverified_context()).status_code == 200


def unverified_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@pytest.mark.parametrize(
    "values",
    [
        {},
        nested_values("config.server.base_path", "/relay"),
        merge_values(TLS, SECRET_TOKENS),
        merge_values(KEY_TOKENS, GIVEN_TOKEN),
    ],
    ids=["default", "base path", "TLS, and tokens with a secret", "given token"],
)
async def test_helm_test_succeeds_with_a_round_trip_of_two_clients(
    values: Mapping[str, Any], tmp_path: Path
) -> None:
    with running(tmp_path, values) as (release, relay):
        done = release.run_test(relay)
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout == "two clients receive each other's messages, in one order\n"
        assert await relay.metric("websocket_messages_total") == 2


def test_helm_test_without_a_token_succeeds_if_the_relay_rejects_it(tmp_path: Path) -> None:
    with running(tmp_path, KEY_TOKENS) as (release, relay):
        done = release.run_test(relay)
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout.startswith("a client without a token is rejected: HTTP 401")


def test_helm_test_without_a_token_fails_if_the_relay_accepts_it(tmp_path: Path) -> None:
    release = LocalRelease(newest_helm().objects(values=KEY_TOKENS), tmp_path)
    config = merged(yaml.safe_load(release.config_file.read_text()), LOCAL_PORTS)
    directory = tmp_path / "open"
    directory.mkdir()
    with RelayProcess(directory, merged(config, {"auth": {"mode": "none"}})) as relay:
        done = release.run_test(relay)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "a client without a token was accepted\n"


def test_helm_test_fails_if_the_relay_serves_another_certificate(tmp_path: Path) -> None:
    other = make_pair()
    with running(tmp_path, TLS) as (release, relay):
        certificate = release.test_pod.path("/run/websocket-relay/tls/tls.crt")
        certificate.write_bytes(other.certificate_pem)
        done = release.run_test(relay)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("round trip failed: certificate not trusted")


async def test_the_relay_serves_the_certificate_of_its_secret(tmp_path: Path) -> None:
    with running(tmp_path, TLS) as (_, relay):
        relay.tls_context = PAIR.client_context()
        async with relay.client() as client:
            await client.send("hello")
            assert await client.recv() == "hello"
