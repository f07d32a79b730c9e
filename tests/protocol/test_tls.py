"""wss://: messages, and certificates renewed under way."""

import asyncio
import ssl
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from cryptography import x509

from tests.support.certificates import Pair, make_pair, replace
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import (
    HOST,
    Relay,
    StartRelay,
    closed,
    receive,
    receive_many,
    run_command,
)

EXPIRY = "websocket_tls_certificate_expiry_timestamp_seconds"
MIB = 1_048_576


async def served_serial(relay: Relay, server_name: str | None = "localhost") -> int:
    """Return the serial number of the certificate that a new handshake gets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # An IP address for a name makes a handshake without SNI.
    async with asyncio.timeout(PATIENCE_S):
        _, writer = await asyncio.open_connection(
            HOST, relay.port, ssl=context, server_hostname=server_name or HOST
        )
        tls = writer.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True)
        writer.close()
        await writer.wait_closed()
    return x509.load_der_x509_certificate(certificate).serial_number


async def test_messages_go_over_tls(tls_relay_with: StartRelay, channel: str) -> None:
    relay = tls_relay_with()
    async with relay.client(channel) as first, relay.client(channel) as second:
        for message in ("hello", b"\x00\xff", "x" * MIB):
            await first.send(message)
            assert await receive(second) == message
            assert await receive(first) == message
        await first.close()
        assert (await closed(first))[0] == 1000
    assert (await relay.get("/healthz")).status_code == 200
    assert relay.await_log("relay listening")["tls"] is True


async def test_a_hundred_tls_clients_hear_everything(
    tls_relay_with: StartRelay, channel: str
) -> None:
    relay = tls_relay_with()
    async with AsyncExitStack() as stack:
        coming = (stack.enter_async_context(relay.client(channel)) for _ in range(100))
        clients = await asyncio.gather(*coming)
        await asyncio.gather(*(client.send("hello") for client in clients))
        for client in clients:
            assert await receive_many(client, 100) == ["hello"] * 100


async def test_plain_bytes_on_a_tls_port_hurt_nobody(
    tls_relay_with: StartRelay, channel: str
) -> None:
    relay = tls_relay_with()
    async with relay.client(channel) as bystander, await relay.tcp() as plain:
        await plain.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await plain.ended()
        await bystander.send("still here")
        assert await receive(bystander) == "still here"


async def test_a_tls_client_that_vanishes_is_counted(
    tls_relay_with: StartRelay, channel: str
) -> None:
    relay = tls_relay_with()
    async with relay.client(channel) as bystander:
        lost = await relay.client(channel)
        await relay.metric_is("websocket_connected_clients", 2)
        lost.transport.abort()
        await relay.metric_is("websocket_connected_clients", 1)
        await bystander.send("still here")
        assert await receive(bystander) == "still here"


async def test_a_renewed_certificate_serves_new_handshakes_and_leaves_open_connections_alone(
    tls_relay_with: StartRelay, pair: Pair, certificate_directory: Path, channel: str
) -> None:
    relay = tls_relay_with()
    assert await served_serial(relay) == pair.serial_number
    assert await relay.metric(EXPIRY) == pair.expiry_timestamp_s
    async with relay.client(channel) as early:
        renewed = make_pair(valid_days=60)
        renewed.write_to(certificate_directory)
        await relay.wait_for_log("certificate renewed")
        assert await served_serial(relay) == renewed.serial_number
        assert await served_serial(relay, server_name=None) == renewed.serial_number
        assert await served_serial(relay, server_name="other.example") == renewed.serial_number
        assert await relay.metric(EXPIRY) == renewed.expiry_timestamp_s
        assert await relay.metric("websocket_tls_reloads_total", result="ok") == 1

        async with relay.client(channel, ssl=renewed.trusting_context()) as late:
            await early.send("from before")
            assert await receive(late) == "from before"
            assert await receive(early) == "from before"
            await late.send("from after")
            assert await receive(early) == "from after"
        assert await relay.metric("websocket_disconnections_total") <= 1


async def test_a_client_that_names_no_host_gets_the_renewed_certificate(
    tls_relay_with: StartRelay, certificate_directory: Path, channel: str
) -> None:
    relay = tls_relay_with()
    renewed = make_pair()
    renewed.write_to(certificate_directory)
    await relay.wait_for_log("certificate renewed")
    # The address in the URL is an IP address, so this handshake carries no SNI.
    async with relay.client(channel, ssl=renewed.trusting_context()) as client:
        await client.send("hello")
        assert await receive(client) == "hello"


async def test_a_certificate_can_be_renewed_again_and_again(
    tls_relay_with: StartRelay, certificate_directory: Path
) -> None:
    relay = tls_relay_with()
    for count in (1, 2, 3):
        renewed = make_pair()
        renewed.write_to(certificate_directory)
        await relay.wait_for_log("certificate renewed", count=count)
        assert await served_serial(relay) == renewed.serial_number


async def test_a_pair_renewed_by_moving_a_link_is_taken(
    relay_with: StartRelay, tmp_path: Path
) -> None:
    """Kubernetes renews a mounted Secret this way: both files at once, behind one link."""
    first, second = make_pair(), make_pair()
    for name, pair in (("first", first), ("second", second)):
        (tmp_path / name).mkdir()
        pair.write_to(tmp_path / name)
    (tmp_path / "current").symlink_to("first")
    tls = {
        "enabled": True,
        "cert_file": str(tmp_path / "current" / "cert.pem"),
        "key_file": str(tmp_path / "current" / "key.pem"),
    }
    relay = relay_with(server={"tls": tls})
    assert await served_serial(relay) == first.serial_number
    (tmp_path / "next").symlink_to("second")
    (tmp_path / "next").replace(tmp_path / "current")
    await relay.wait_for_log("certificate renewed")
    assert await served_serial(relay) == second.serial_number
    errors = [event for event in relay.log_events if event["level"] == "error"]
    assert errors == []


@pytest.mark.parametrize("broken", ["certificate", "key", "other key", "empty", "missing"])
async def test_a_broken_renewal_is_logged_and_the_old_pair_stays_until_a_good_one_comes(
    tls_relay_with: StartRelay, pair: Pair, certificate_directory: Path, channel: str, broken: str
) -> None:
    relay = tls_relay_with()
    certificate, key = certificate_directory / "cert.pem", certificate_directory / "key.pem"
    match broken:
        case "certificate":
            replace(certificate, b"-----BEGIN CERTIFICATE-----\nnonsense\n")
        case "key":
            replace(key, b"nonsense")
        case "other key":
            replace(key, make_pair().key_pem)
        case "empty":
            replace(certificate, b"")
        case "missing":
            certificate.unlink()
    event = await relay.wait_for_log("certificate not renewed")
    assert event["level"] == "error"
    assert event["error"]
    assert await served_serial(relay) == pair.serial_number
    assert await relay.metric(EXPIRY) == pair.expiry_timestamp_s
    await relay.metric_reaches("websocket_tls_reloads_total", 1, result="error")
    async with relay.client(channel) as client:
        await client.send("hello")
        assert await receive(client) == "hello"

    good = make_pair()
    good.write_to(certificate_directory)
    await relay.wait_for_log("certificate renewed")
    assert await served_serial(relay) == good.serial_number


async def test_a_broken_renewal_does_not_fill_the_log(
    tls_relay_with: StartRelay, certificate_directory: Path
) -> None:
    relay = tls_relay_with()
    replace(certificate_directory / "key.pem", b"nonsense")
    await relay.wait_for_log("certificate not renewed")
    # A look comes once a second; by the renewal's there have been several at the broken file.
    await asyncio.sleep(3)
    make_pair().write_to(certificate_directory)
    await relay.wait_for_log("certificate renewed")
    complaints = [e for e in relay.log_events if e["event"] == "certificate not renewed"]
    assert len(complaints) <= 2  # the broken key, and the moment between the two new files


async def test_no_expiry_is_shown_where_there_is_no_certificate(relay: Relay) -> None:
    """An expiry of 0 would set off every alert on certificates."""
    samples = [sample for sample in (await relay.metrics()).samples if sample.name == EXPIRY]
    assert samples == []


async def test_the_relay_serves_with_the_pair_that_dev_cert_writes(
    relay_with: StartRelay, tmp_path: Path
) -> None:
    assert run_command("dev-cert", directory=tmp_path).exit_code == 0
    tls = {"enabled": True, "cert_file": str(tmp_path / "cert.pem")}
    relay = relay_with(server={"tls": tls | {"key_file": str(tmp_path / "key.pem")}})
    relay.tls_context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    async with (
        relay.client("news") as by_address,
        relay.client("news", server_hostname="localhost") as by_name,
    ):
        await by_name.send("hello")
        assert await receive(by_address) == "hello"
