"""TLS: messages over wss://, and certificates that are renewed while the relay runs."""

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from websocket_relay import watched_files
from websocket_relay.outcomes import Refusal, SettingsError, TlsFailure
from websocket_relay.tls import Certificates
from websocket_relay.watched_files import States, WatchedFiles
from websocket_relay.wire.http_connections import HttpConnections
from websocket_relay.wire.tls_transport import TlsTransport

from tests.support.certificates import (
    CertificatePair,
    make_home_made_ca,
    make_pair,
    replace_file,
)
from tests.support.http_requests import get_request
from tests.support.raw_client import (
    CLOSE,
    PATIENCE_S,
    TEXT,
    close_payload,
    frame,
    upgrade_request,
)
from tests.support.relay_process import (
    HOST,
    RelayProcess,
    StartRelay,
    await_close,
    eventually,
    path_of,
    receive,
    receive_many,
    run_command,
)

CLIENT_HELLO = bytes.fromhex("1603010200010001fc0303") + bytes(32)
"""The start of a TLS handshake."""

FAILURES = "websocket_tls_handshake_failures_total"
EXPIRY = "websocket_tls_certificate_expiry_timestamp_seconds"
MIB = 1_048_576


async def served_serial(port: int, server_name: str | None = "localhost") -> int:
    """Return the serial number of the certificate that a new handshake receives."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # With an IP address as the name, the handshake has no SNI.
    async with asyncio.timeout(PATIENCE_S):
        _, writer = await asyncio.open_connection(
            HOST, port, ssl=context, server_hostname=server_name or HOST
        )
        connection = writer.get_extra_info("ssl_object")
        certificate = connection.getpeercert(binary_form=True)
        writer.close()
        await writer.wait_closed()
    return x509.load_der_x509_certificate(certificate).serial_number


# Connections


async def test_messages_are_relayed_over_tls(tls_relay_with: StartRelay, channel: str) -> None:
    relay = tls_relay_with()
    async with relay.client(channel) as first, relay.client(channel) as second:
        for message in ("hello", b"\x00\xff", "x" * MIB):
            await first.send(message)
            assert await receive(second) == message
            assert await receive(first) == message
        await first.close()
        assert (await await_close(first))[0] == 1000
    assert (await relay.get("/healthz")).status_code == 200
    assert relay.block_until_logged("relay listening")["tls"] is True


async def test_many_tls_clients_receive_all_messages(
    tls_relay_with: StartRelay, channel: str
) -> None:
    relay, count = tls_relay_with(), 40
    async with AsyncExitStack() as stack:
        connecting = (stack.enter_async_context(relay.client(channel)) for _ in range(count))
        clients = await asyncio.gather(*connecting)
        await asyncio.gather(*(client.send("hello") for client in clients))
        for client in clients:
            assert await receive_many(client, count) == ["hello"] * count


async def test_plain_bytes_on_a_tls_port_affect_no_other_client(
    tls_relay_with: StartRelay, channel: str
) -> None:
    relay = tls_relay_with()
    async with relay.client(channel) as other, await relay.connect_tcp() as plain:
        await plain.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await plain.read_to_end()
        await other.send("still here")
        assert await receive(other) == "still here"


def handshake(port: int, context: ssl.SSLContext) -> None:
    """Perform a handshake that the client or the relay rejects."""
    with (
        socket.create_connection((HOST, port), PATIENCE_S) as connected,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(connected, server_hostname="localhost")


async def test_handshakes_that_fail_are_counted_and_logged_by_reason(
    tls_relay_with: StartRelay,
) -> None:
    """A client that does not trust the certificate sends an alert, or only disconnects."""
    relay = tls_relay_with(limits={"handshake_timeout_s": 1})
    outdated = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outdated.maximum_version = ssl.TLSVersion.TLSv1_2
    outdated.set_ciphers("AES128-SHA")
    other_ca = make_pair().client_context()
    async with await relay.connect_tcp() as silent, await relay.connect_tcp() as partial:
        await partial.send(CLIENT_HELLO[:20])
        for context in (other_ca, other_ca, outdated):
            await asyncio.to_thread(handshake, relay.port, context)
        async with await relay.connect_tcp() as leaving:
            await leaving.send(CLIENT_HELLO[:20])
        async with await relay.connect_tcp() as plain:
            await plain.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await plain.read_to_end()
        async with await relay.connect_tcp():
            pass  # a health check by TCP
        await silent.read_to_end()
        await partial.read_to_end()
    expected = {
        "certificate_rejected": 2,
        "client_certificate": 0,
        "unsupported": 1,
        "disconnected": 1,
        "not_tls": 1,
        "timeout": 2,
        "other": 0,
    }
    for reason, count in expected.items():
        await relay.await_metric(FAILURES, count, reason=reason)
    events = [each for each in relay.log_events if each["event"] == "failed TLS handshakes"]
    assert {each["reason"]: each["count"] for each in events} == {
        reason: 1 for reason, count in expected.items() if count
    }, "one line each, the rest at the end of the minute"
    assert len(events) == 5


async def test_a_tls_client_that_resets_its_connection_is_counted_as_disconnected(
    tls_relay_with: StartRelay, channel: str
) -> None:
    relay = tls_relay_with()
    async with relay.client(channel) as other:
        lost = await relay.client(channel)
        await relay.await_metric("websocket_connected_clients", 2)
        lost.transport.abort()
        await relay.await_metric("websocket_connected_clients", 1)
        await other.send("still here")
        assert await receive(other) == "still here"


async def test_the_relay_serves_with_the_pair_that_dev_cert_writes(
    relay_with: StartRelay, tmp_path: Path
) -> None:
    assert run_command("dev-cert", directory=tmp_path).exit_code == 0
    settings = {"enabled": True, "cert_file": str(tmp_path / "cert.pem")}
    relay = relay_with(server={"tls": settings | {"key_file": str(tmp_path / "key.pem")}})
    relay.tls_context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    async with (
        relay.client("news") as by_address,
        relay.client("news", server_hostname="localhost") as by_name,
    ):
        await by_name.send("hello")
        assert await receive(by_address) == "hello"


async def test_no_expiry_is_exported_without_a_certificate(relay: RelayProcess) -> None:
    """An expiry of 0 would fire every alert on certificates."""
    samples = [sample for sample in (await relay.metrics()).samples if sample.name == EXPIRY]
    assert samples == []


# Versions, sessions and ends


def connect_blocking(relay: RelayProcess, context: ssl.SSLContext, **options: Any) -> ssl.SSLSocket:
    """Return a connection with TLS; its calls block for a bounded time."""
    connected = socket.create_connection((HOST, relay.port), PATIENCE_S)
    return context.wrap_socket(connected, server_hostname="localhost", **options)


def read_head(client: ssl.SSLSocket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        received = client.recv(1)
        assert received, head
        head += received
    return head


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_session_is_resumed_with_both_versions(
    tls_relay_with: StartRelay, pair: CertificatePair, version: ssl.TLSVersion
) -> None:
    relay = tls_relay_with()
    context = pair.client_context()
    context.minimum_version = context.maximum_version = version

    def resumed() -> list[bool | None]:
        found: list[bool | None] = []
        session = None
        for _ in range(3):
            with connect_blocking(relay, context, session=session) as client:
                client.sendall(upgrade_request())
                assert b" 101 " in read_head(client)
                session = client.session
                found.append(client.session_reused)
        return found

    assert await asyncio.to_thread(resumed) == [False, True, True]


async def test_versions_before_1_2_are_refused(
    tls_relay_with: StartRelay, pair: CertificatePair
) -> None:
    relay = tls_relay_with()
    context = pair.client_context()
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    await asyncio.to_thread(handshake, relay.port, context)
    await relay.await_metric(FAILURES, 1, reason="unsupported")


async def test_what_is_sent_before_close_notify_is_relayed_and_the_close_is_answered(
    tls_relay_with: StartRelay, pair: CertificatePair, channel: str
) -> None:
    relay = tls_relay_with()

    def publish_and_close() -> bytes:
        """Send messages and close_notify at once; return what arrives after that."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = pair.client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        with socket.create_connection((HOST, relay.port), PATIENCE_S) as connected:

            def until_done(step: Callable[[], object]) -> None:
                while True:
                    try:
                        step()
                    except ssl.SSLWantReadError:
                        connected.sendall(outgoing.read())
                        incoming.write(connected.recv(4096))
                    else:
                        return

            until_done(client.do_handshake)
            client.write(upgrade_request(path_of(channel)))
            until_done(lambda: client.read(4096))
            client.write(frame(TEXT, b"last words") * 3)
            with suppress(ssl.SSLWantReadError):
                client.unwrap()
            connected.sendall(outgoing.read())
            received = b""
            while data := connected.recv(4096):
                received += data
            return received

    async with relay.client(channel) as subscriber:
        assert await asyncio.to_thread(publish_and_close), "nothing, not even close_notify"
        assert await receive_many(subscriber, 3) == ["last words"] * 3
        await relay.await_metric("websocket_connected_clients", 1)


async def test_the_relays_end_of_sending_leaves_the_client_its_own(
    tls_relay_with: StartRelay, pair: CertificatePair, channel: str
) -> None:
    """As with TCP: a client that has sent a close frame still reads all, then the end."""
    relay = tls_relay_with()

    def close_late() -> bytes:
        with connect_blocking(relay, pair.client_context()) as client:
            client.sendall(upgrade_request(path_of(channel)))
            read_head(client)
            client.sendall(frame(CLOSE, close_payload(1000)))
            received = b""
            while data := client.recv(100):
                received += data
            client.sendall(b"ignored")
            return received

    assert await asyncio.to_thread(close_late) == b"\x88\x02\x03\xe8"
    await relay.await_metric("websocket_connected_clients", 0)


async def test_a_fast_publisher_over_tls_is_slowed_down_and_loses_nothing(
    tls_relay_with: StartRelay, pair: CertificatePair, channel: str
) -> None:
    """Reading pauses within what was received; the rest is decrypted later."""
    count, size = 3_000, 4_096
    relay = tls_relay_with(limits={"total_backlog_bytes": MIB, "send_backlog_bytes": MIB // 4})

    def publish() -> None:
        with connect_blocking(relay, pair.client_context()) as client:
            client.sendall(upgrade_request(path_of(channel)))
            read_head(client)
            for number in range(0, count, 100):
                frames = (
                    frame(TEXT, str(each).encode().ljust(size))
                    for each in range(number, number + 100)
                )
                client.sendall(b"".join(frames))
            client.sendall(frame(CLOSE, close_payload(1000)))
            while client.recv(65_536):
                pass

    async with relay.client(channel, max_queue=None) as subscriber:
        publishing = asyncio.create_task(asyncio.to_thread(publish))
        received = await receive_many(subscriber, count)
        await publishing
    assert [int(str(message)) for message in received] == list(range(count))


@pytest.mark.parametrize("size", [1, 7, 100])
async def test_a_connection_is_served_however_its_records_are_cut(
    tls_relay_with: StartRelay, pair: CertificatePair, channel: str, size: int
) -> None:
    relay = tls_relay_with()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = pair.client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    loop = asyncio.get_running_loop()
    async with relay.client(channel) as subscriber:
        with socket.create_connection((HOST, relay.port)) as connected:
            connected.setblocking(False)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            async def flush() -> None:
                wire = outgoing.read()
                for start in range(0, len(wire), size):
                    await loop.sock_sendall(connected, wire[start : start + size])

            async def run(step: Callable[[], Any]) -> Any:
                async with asyncio.timeout(PATIENCE_S):
                    while True:
                        try:
                            result = step()
                        except ssl.SSLWantReadError:
                            await flush()
                            incoming.write(await loop.sock_recv(connected, 4096))
                        else:
                            await flush()
                            return result

            await run(client.do_handshake)
            await run(lambda: client.write(upgrade_request(path_of(channel))))
            assert (await run(lambda: client.read(4096))).startswith(b"HTTP/1.1 101 ")
            await run(lambda: client.write(frame(TEXT, b"in pieces")))
            assert await receive(subscriber) == "in pieces"


class Recorder(asyncio.Protocol):
    """Record what arrives, and act on it."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.act: Callable[[], object] = lambda: None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received.append(data)
        self.act()


@pytest.mark.fast
async def test_a_connection_that_ends_while_another_is_read_takes_none_of_its_records(
    certificate_directory: Path, pair: CertificatePair
) -> None:
    """All connections share the buffers of OpenSSL."""
    loop = asyncio.get_running_loop()
    certificates = Certificates(
        certificate_directory / "cert.pem", certificate_directory / "key.pem"
    )
    connections = HttpConnections(100, Refusal.HTTP_CONNECTIONS, lambda refusal: None)
    protocols: list[Recorder] = []

    def connection() -> TlsTransport:
        protocols.append(Recorder())
        deadline_at = loop.time() + PATIENCE_S
        return TlsTransport(
            protocols[-1], connections, lambda: certificates.context, deadline_at, failures.append
        )

    failures: list[TlsFailure] = []
    server = await loop.create_server(connection, HOST, 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        clients = [
            await asyncio.open_connection(
                HOST, port, ssl=pair.client_context(), server_hostname="localhost"
            )
            for _ in range(3)
        ]
        for number, (_, writer) in enumerate(clients):
            writer.write(b"%d" % number)

        async def all_have_sent() -> tuple[bool, object]:
            return all(each.received for each in protocols), protocols

        await eventually(all_have_sent, "a byte of each")
        first, second, third = sorted(protocols, key=lambda each: each.received)

        def end_the_others() -> None:
            second.transport.write_eof()
            third.transport.close()

        first.act = end_the_others
        for record in (b"one", b"two", b"three"):
            clients[0][1].write(record)

        async def has_all() -> tuple[bool, object]:
            return b"three" in first.received, first.received

        await eventually(has_all, "all records of the first")
        assert b"".join(first.received) == b"0onetwothree"
        for reader, _ in clients[1:]:
            assert await reader.read() == b"", "close_notify, and the end"
        first.transport.write(b"still here")
        assert await clients[0][0].readexactly(10) == b"still here"
        for _, writer in clients:
            writer.close()
    assert failures == []


async def test_bytes_that_are_no_record_end_only_their_connection(
    tls_relay_with: StartRelay, pair: CertificatePair, channel: str
) -> None:
    relay = tls_relay_with()

    def send_nonsense() -> None:
        client = connect_blocking(relay, pair.client_context())
        client.sendall(upgrade_request(path_of(channel)))
        read_head(client)
        raw = socket.socket(fileno=client.detach())
        with raw:
            raw.settimeout(PATIENCE_S)
            raw.sendall(b"nonsense" * 100)
            with suppress(ConnectionError):
                while raw.recv(4096):
                    pass

    async with relay.client(channel) as other:
        await asyncio.to_thread(send_nonsense)
        await relay.await_metric("websocket_connected_clients", 1)
        await other.send("still here")
        assert await receive(other) == "still here"


# Client certificates


async def test_with_client_authorities_every_client_needs_a_certificate_of_one(
    tls_relay_with: StartRelay, pair: CertificatePair, tmp_path: Path, channel: str
) -> None:
    authority = make_home_made_ca()
    (tmp_path / "ca.pem").write_bytes(authority.certificate_pem)
    relay = tls_relay_with(server={"tls": {"client_ca_file": str(tmp_path / "ca.pem")}})
    certificates = {
        "of the authority": make_pair(issuer=authority),
        "of another": make_pair(issuer=make_home_made_ca()),
        "self-signed": make_pair(),
    }
    contexts = {"none": pair.client_context()}
    for name, certificate in certificates.items():
        directory = tmp_path / name
        directory.mkdir()
        certificate.write_to(directory)
        contexts[name] = pair.client_context()
        contexts[name].load_cert_chain(directory / "cert.pem", directory / "key.pem")
    async with relay.client(channel, ssl=contexts["of the authority"]) as client:
        await client.send("hello")
        assert await receive(client) == "hello"

    def is_refused(context: ssl.SSLContext) -> bool:
        try:
            with connect_blocking(relay, context) as refused:
                refused.sendall(get_request("/healthz"))
                return not refused.recv(100)  # with TLS 1.3 the client's handshake ends before
        except (ssl.SSLError, ConnectionError):
            return True

    for name in ("none", "of another", "self-signed"):
        assert await asyncio.to_thread(is_refused, contexts[name]), name
    await relay.await_metric(FAILURES, 3, reason="client_certificate")
    assert not await asyncio.to_thread(is_refused, contexts["of the authority"])


def test_client_authorities_that_can_not_be_loaded_are_named(
    certificate_directory: Path, tmp_path: Path
) -> None:
    files = certificate_directory / "cert.pem", certificate_directory / "key.pem"
    empty = tmp_path / "ca.pem"
    empty.write_text("no certificate\n")
    for file, problem in ((empty, "no certificate or crl found"), (tmp_path / "x", "no such file")):
        with pytest.raises(SettingsError) as raised:
            Certificates(*files, file)
        assert raised.value.problems == (f"server.tls.client_ca_file: {file}: {problem}",)


# Renewal, by a relay


async def test_a_renewed_certificate_serves_new_handshakes_and_keeps_open_connections(
    tls_relay_with: StartRelay, pair: CertificatePair, certificate_directory: Path, channel: str
) -> None:
    relay = tls_relay_with()
    assert await served_serial(relay.port) == pair.serial_number
    assert await relay.metric(EXPIRY) == pair.expiry_timestamp_s
    async with relay.client(channel) as early:
        renewed = make_pair(valid_days=60)
        renewed.write_to(certificate_directory)
        await relay.await_log("certificate renewed")
        for name in ("localhost", None, "other.example"):
            assert await served_serial(relay.port, name) == renewed.serial_number, name
        assert await relay.metric(EXPIRY) == renewed.expiry_timestamp_s
        assert await relay.metric("websocket_tls_reloads_total", result="ok") == 1

        # The address in the URL is an IP address, so this handshake has no SNI.
        async with relay.client(channel, ssl=renewed.client_context()) as late:
            await early.send("from before")
            assert await receive(late) == "from before"
            assert await receive(early) == "from before"
            await late.send("from after")
            assert await receive(early) == "from after"
        assert await relay.metric("websocket_disconnections_total") <= 1


async def test_an_invalid_renewal_is_logged_and_the_old_pair_serves_until_a_valid_one(
    tls_relay_with: StartRelay, pair: CertificatePair, certificate_directory: Path, channel: str
) -> None:
    relay = tls_relay_with()
    replace_file(certificate_directory / "key.pem", make_pair().key_pem)
    event = await relay.await_log("certificate not renewed")
    assert event["level"] == "error"
    assert event["error"]
    assert await served_serial(relay.port) == pair.serial_number
    assert await relay.metric(EXPIRY) == pair.expiry_timestamp_s
    await relay.await_metric_at_least("websocket_tls_reloads_total", 1, result="error")
    async with relay.client(channel) as client:
        await client.send("hello")
        assert await receive(client) == "hello"

    renewed = make_pair()
    renewed.write_to(certificate_directory)
    await relay.await_log("certificate renewed")
    assert await served_serial(relay.port) == renewed.serial_number


# Renewal, in this process


class Watched:
    """Certificates that are watched in this process, with a server that uses them."""

    def __init__(self, certificates: Certificates, port: int) -> None:
        self.port = port
        self._reloads = certificates.reloads
        self.polls = 0

    async def wait_for_reloads(self, result: str, count: int) -> None:
        async def look() -> tuple[bool, object]:
            return self._reloads[result] >= count, self._reloads

        await eventually(look, f"{count} reloads with the result {result}")

    async def wait_for_polls(self, count: int) -> None:
        wanted = self.polls + count

        async def look() -> tuple[bool, object]:
            return self.polls >= wanted, self.polls

        await eventually(look, f"{wanted} polls")


class Closing(asyncio.Protocol):
    """Close the connection once the handshake is complete."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


@asynccontextmanager
async def watched(cert_file: Path, key_file: Path) -> AsyncIterator[Watched]:
    """Poll the files of a pair often, and serve with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watched_files, "POLL_INTERVAL_S", 0.001)
        certificates = Certificates(cert_file, key_file)
        loop = asyncio.get_running_loop()
        connections = HttpConnections(100, Refusal.HTTP_CONNECTIONS, lambda refusal: None)

        def connection() -> TlsTransport:
            deadline_at = loop.time() + PATIENCE_S
            return TlsTransport(
                Closing(), connections, lambda: certificates.context, deadline_at, failures.append
            )

        failures: list[TlsFailure] = []
        server = await loop.create_server(connection, HOST, 0)
        found = Watched(certificates, server.sockets[0].getsockname()[1])
        states: Callable[[WatchedFiles], States] = WatchedFiles._states

        def counted_states(files: WatchedFiles) -> States:
            found.polls += 1
            return states(files)

        patch.setattr(WatchedFiles, "_states", counted_states)
        watching = asyncio.create_task(certificates.run())
        try:
            async with server:
                yield found
        finally:
            watching.cancel()
            await asyncio.wait([watching])


INVALID_CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "certificate": lambda cert, _: replace_file(cert, b"-----BEGIN CERTIFICATE-----\nnonsense\n"),
    "key": lambda _, key: replace_file(key, b"nonsense"),
    "key of another pair": lambda _, key: replace_file(key, make_pair().key_pem),
    "empty": lambda cert, _: replace_file(cert, b""),
    "missing": lambda cert, _: cert.unlink(),
}


def errors_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.fast
@pytest.mark.parametrize("change", INVALID_CHANGES.values(), ids=INVALID_CHANGES)
async def test_an_invalid_pair_is_logged_once_and_never_served(
    certificate_directory: Path,
    pair: CertificatePair,
    change: Callable[[Path, Path], object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = certificate_directory / "cert.pem", certificate_directory / "key.pem"
    async with watched(*files) as found:
        change(*files)
        await found.wait_for_reloads("error", 1)
        assert await served_serial(found.port) == pair.serial_number
        await found.wait_for_polls(3)
        assert errors_in(caplog) == ["certificate not renewed"]
        renewed = make_pair()
        renewed.write_to(certificate_directory)
        await found.wait_for_reloads("ok", 1)
        assert await served_serial(found.port) == renewed.serial_number
    assert errors_in(caplog) == ["certificate not renewed"]


@pytest.mark.fast
async def test_a_certificate_can_be_renewed_many_times(certificate_directory: Path) -> None:
    files = certificate_directory / "cert.pem", certificate_directory / "key.pem"
    async with watched(*files) as found:
        for count in (1, 2, 3):
            renewed = make_pair()
            renewed.write_to(certificate_directory)
            await found.wait_for_reloads("ok", count)
            assert await served_serial(found.port) == renewed.serial_number


@pytest.mark.fast
async def test_a_pair_replaced_by_one_link_is_reloaded_without_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Kubernetes replaces a mounted Secret this way: one link leads to both files."""
    first, second = make_pair(), make_pair()
    for name, pair in (("first", first), ("second", second)):
        (tmp_path / name).mkdir()
        pair.write_to(tmp_path / name)
    (tmp_path / "current").symlink_to("first")
    files = tmp_path / "current" / "cert.pem", tmp_path / "current" / "key.pem"
    async with watched(*files) as found:
        assert await served_serial(found.port) == first.serial_number
        (tmp_path / "next").symlink_to("second")
        (tmp_path / "next").replace(tmp_path / "current")
        await found.wait_for_reloads("ok", 1)
        assert await served_serial(found.port) == second.serial_number
    assert [each for each in caplog.records if each.levelno == logging.ERROR] == []
