"""Access to brokers: passwords, certificates and keys from files, which are renewed."""

import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from websocket_relay.backplane.access import BrokerAccess
from websocket_relay.backplane.timings import DEFAULT_TIMINGS, Timings
from websocket_relay.outcomes import UnusableSettingError

from tests.support.broker_logs import (
    QUICK_OUTAGES,
    BackplaneLog,
    BackplaneReplica,
    make_broker,
    wait_until,
)
from tests.support.brokers import NatsBroker, free_port
from tests.support.certificates import make_home_made_ca, make_pair, replace_file
from tests.support.nats_accounts import USER, NatsAccounts, Nkey

INBOX = "_INBOX_relay"


@pytest.fixture(autouse=True)
def no_secret_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    assert "s3cret" not in logged(caplog)


def logged(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(str(record.__dict__) for record in caplog.records)


async def start_nats(stack: AsyncExitStack, directory: Path, **options: Any) -> NatsBroker:
    broker = make_broker("nats", directory, **options)
    assert isinstance(broker, NatsBroker)
    return await stack.enter_async_context(broker)


async def assert_relays(replica: BackplaneReplica) -> None:
    before = len(replica.entries)
    replica.publish(b"message")
    await replica.await_count(before + 1)


async def test_renewed_certificates_and_a_rotated_password_need_no_restart(
    stack: AsyncExitStack, kind: str, tmp_path: Path
) -> None:
    options = {"user": "relay"} if kind == "nats" else {}
    password_file, ca_file, ca = tmp_path / "password", tmp_path / "ca.pem", make_home_made_ca()
    password_file.write_text("first-s3cret\n")
    ca_file.write_bytes(ca.certificate_pem)
    broker = await stack.enter_async_context(
        make_broker(
            kind,
            tmp_path / "broker",
            pair=make_pair(issuer=ca),
            client_pair=make_pair(),
            password="first-s3cret",
            **options,
        )
    )
    access = BrokerAccess(
        username=broker.user,
        password_file=str(password_file),
        ca_file=str(ca_file),
        cert_file=str(broker.client_directory / "cert.pem"),
        key_file=str(broker.client_directory / "key.pem"),
    )
    log = BackplaneLog(stack, None, broker.url_with("").partition("?")[0])
    log.timings = QUICK_OUTAGES
    replica = await log.start_replica(access=access)
    await assert_relays(replica)
    new_ca = make_home_made_ca()
    replace_file(ca_file, new_ca.certificate_pem)
    replace_file(password_file, b"second-s3cret\n")
    broker.password, broker.pair = "second-s3cret", make_pair(issuer=new_ca)
    broker.client_pair = make_pair()
    broker.write_certificates()
    broker.kill()
    await replica.await_outage()
    await broker.start()
    await replica.await_up()
    await assert_relays(replica)
    assert replica.backplane.counters.lost == 0


async def test_a_file_that_was_deleted_is_logged_with_the_setting_that_names_it(
    stack: AsyncExitStack, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(make_home_made_ca().certificate_pem)
    scheme = "rediss" if kind == "redis" else "tls"
    log = BackplaneLog(stack, None, f"{scheme}://localhost:{free_port()}?ssl_ca_certs={ca_file}")
    await log.start_replica(await_up=False)
    ca_file.unlink()
    await wait_until(lambda: f"{ca_file}: No such file" in logged(caplog))
    assert "backplane.url: " in logged(caplog)
    assert "backplane.ca_file" not in logged(caplog)


@pytest.mark.parametrize("scheme", ["rediss", "tls"])
def test_an_encrypted_key_without_its_passphrase_is_refused_without_a_prompt(
    scheme: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pair = make_pair()
    pair.write_to(tmp_path)
    encryption = serialization.BestAvailableEncryption(b"s3cret")
    encrypted = pair.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    (tmp_path / "key.pem").write_bytes(encrypted)
    files = f"ssl_certfile={tmp_path / 'cert.pem'}&ssl_keyfile={tmp_path / 'key.pem'}"
    with pytest.raises(UnusableSettingError, match=r"key\.pem: "):
        BackplaneReplica(f"{scheme}://localhost?{files}", "relay", "reject", 1)
    assert capfd.readouterr() == ("", "")
    if scheme == "rediss":
        BackplaneReplica(f"{scheme}://localhost?{files}&ssl_password=s3cret", "relay", "reject", 1)


# NATS


@pytest.mark.parametrize("way", ["creds_file", "nkey_file"])
async def test_a_user_with_a_key_and_private_inboxes_is_admitted_by_nats(
    stack: AsyncExitStack, tmp_path: Path, way: str
) -> None:
    file = tmp_path / "key"
    if way == "creds_file":
        accounts = NatsAccounts(subscribe=[f"{INBOX}.>"])
        settings = accounts.settings
        file.write_text(accounts.credentials)
    else:
        key = Nkey(USER)
        permissions = {"subscribe": [f"{INBOX}.>"]}
        settings = {"authorization": {"users": [{"nkey": key.public, "permissions": permissions}]}}
        file.write_text(f"{key.seed}\n")
    broker = await start_nats(stack, tmp_path / "broker", settings=settings)
    log = BackplaneLog(stack, broker, broker.url)
    access = replace(BrokerAccess(inbox_prefix=INBOX), **{way: str(file)})
    await assert_relays(await log.start_replica(access=access))


async def test_a_stream_in_the_domain_of_another_nats_is_used(
    stack: AsyncExitStack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    hub = {"jetstream": {"domain": "hub"}, "leafnodes": {"listen": f"localhost:{port}"}}
    remote = {"remotes": [{"url": f"nats://localhost:{port}"}], "reconnect": "100ms"}
    await start_nats(stack, tmp_path / "hub", settings=hub, jetstream=False)
    leaf = await start_nats(
        stack, tmp_path / "leaf", settings={"leafnodes": remote}, jetstream=False
    )
    log = BackplaneLog(stack, leaf, leaf.url)
    await assert_relays(await log.start_replica(access=BrokerAccess(domain="hub")))
    await log.start_replica(access=BrokerAccess(domain="other"), await_up=False)
    await wait_until(lambda: "or there is no domain other" in logged(caplog))


async def test_a_nats_that_expects_the_tls_handshake_first_gets_it(
    stack: AsyncExitStack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = await start_nats(stack, tmp_path, pair=make_pair(), handshake_first=True)
    log = BackplaneLog(stack, broker, broker.url)
    log.timings = Timings(connect_timeout_s=0.2)
    replica = await log.start_replica(await_up=False)
    await wait_until(lambda: "handshake_first=true" in logged(caplog))
    await replica.stop()
    log.timings = DEFAULT_TIMINGS
    await assert_relays(await log.start_replica(url=f"{broker.url}&handshake_first=true"))
