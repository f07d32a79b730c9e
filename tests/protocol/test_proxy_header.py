"""The PROXY protocol: the client's address in front of TLS and HTTP, from trusted proxies only."""

import asyncio
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest
from websocket_relay.wire.proxy_header import ProxyHeaderError, parse_header
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from tests.support.admission import refusal_answer
from tests.support.brokers import free_port
from tests.support.http_requests import get_request
from tests.support.programs import HAPROXY, needed
from tests.support.proxies import file_of
from tests.support.raw_client import RawClient
from tests.support.relay_process import HOST, RelayProcess, StartRelay, eventually

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
LINE = b"PROXY TCP4 203.0.113.7 10.0.0.1 51234 443\r\n"
IPV4 = bytes([203, 0, 113, 7, 10, 0, 0, 1]) + (51_234).to_bytes(2, "big") + b"\x01\xbb"
IPV6 = bytes.fromhex("20010db8000000000000000000000007") * 2 + b"\xc8\x22\x01\xbb"


def header_v2(command: int, family: int, body: bytes, *, size: int | None = None) -> bytes:
    length = len(body) if size is None else size
    return SIGNATURE + bytes([command, family]) + length.to_bytes(2, "big") + body


HEADERS = {
    "v1, IPv4": (LINE, ("203.0.113.7", 51_234)),
    "v1, IPv6": (b"PROXY TCP6 2001:db8::7 ::1 0 65535\r\n", ("2001:db8::7", 0)),
    "v1, unknown": (b"PROXY UNKNOWN\r\n", None),
    "v1, unknown with more": (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", None),
    "v2, IPv4": (header_v2(0x21, 0x11, IPV4), ("203.0.113.7", 51_234)),
    "v2, IPv6": (header_v2(0x21, 0x21, IPV6), ("2001:db8::7", 51_234)),
    "v2, extensions": (header_v2(0x21, 0x11, IPV4 + bytes(4084)), ("203.0.113.7", 51_234)),
    "v2, local": (header_v2(0x20, 0x00, b""), None),
    "v2, local with addresses": (header_v2(0x20, 0x11, IPV4), None),
    "v2, unspecified": (header_v2(0x21, 0x00, b"\x03\x00\x00"), None),
    "v2, Unix socket": (header_v2(0x21, 0x31, bytes(216)), None),
}

HOSTILE = {
    "HTTP": get_request("/healthz"),
    "TLS": bytes.fromhex("1603010200010001fc0303"),
    "nothing known": b"\x00",
    "v1, endless": b"PROXY TCP4 " + b"1" * 96,
    "v1, line end too late": b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",
    "v1, other family": b"PROXY UDP4 203.0.113.7 10.0.0.1 1 2\r\n",
    "v1, no family": b"PROXY \r\n",
    "v1, two spaces": b"PROXY  TCP4 203.0.113.7 10.0.0.1 1 2\r\n",
    "v1, mixed families": b"PROXY TCP4 2001:db8::7 10.0.0.1 1 2\r\n",
    "v1, name": b"PROXY TCP4 localhost 10.0.0.1 1 2\r\n",
    "v1, zone": b"PROXY TCP6 fe80::1%a ::1 1 2\r\n",
    "v1, port too large": b"PROXY TCP4 203.0.113.7 10.0.0.1 65536 2\r\n",
    "v1, negative port": b"PROXY TCP4 203.0.113.7 10.0.0.1 -1 2\r\n",
    "v1, no port": b"PROXY TCP4 203.0.113.7 10.0.0.1 1\r\n",
    "v1, not ASCII": b"PROXY TCP4 203.0.113.\xb2 10.0.0.1 1 2\r\n",
    "v1, control characters": b"PROXY TCP4 203.0.113.7\n 10.0.0.1 1 2\r\n",
    "v2, version 1": header_v2(0x11, 0x11, IPV4),
    "v2, other command": header_v2(0x22, 0x11, IPV4),
    "v2, UDP": header_v2(0x21, 0x12, IPV4),
    "v2, too short": header_v2(0x21, 0x11, IPV4[:11]),
    "v2, too long": header_v2(0x21, 0x11, b"", size=4097),
}


@pytest.mark.fast
@pytest.mark.parametrize(("header", "address"), HEADERS.values(), ids=HEADERS)
def test_a_header_is_parsed_with_its_last_byte(
    header: bytes, address: tuple[str, int] | None
) -> None:
    for size in range(1, len(header)):
        assert parse_header(header[:size]) is None
    assert parse_header(header) == (address, len(header))
    assert parse_header(header + LINE) == (address, len(header)), "the rest belongs to the client"


@pytest.mark.fast
@pytest.mark.parametrize("received", HOSTILE.values(), ids=HOSTILE)
def test_bytes_that_are_no_header_are_invalid(received: bytes) -> None:
    with pytest.raises(ProxyHeaderError):
        parse_header(received)


async def connect_from(address: str, relay: RelayProcess) -> RawClient:
    connected = socket.create_connection((HOST, relay.port), 5, (address, 0))
    connected.setblocking(False)
    return RawClient(connected)


async def test_only_trusted_proxies_send_the_header_and_their_deadline_is_that_of_a_handshake(
    relay_with: StartRelay,
) -> None:
    proxy, other = "127.0.0.2", "127.0.0.3"
    relay = relay_with(
        server={"proxy_protocol": True, "trusted_proxies": [proxy]},
        limits={"handshake_timeout_s": 1},
    )
    request = get_request("/healthz")
    for address, sent, statuses in (
        (proxy, [LINE + request], [200]),
        (proxy, [LINE, request], [200]),
        (proxy, [*(bytes([octet]) for octet in LINE), request], [200]),
        (proxy, [HEADERS["v2, IPv6"][0] + request], [200]),
        (proxy, [request], []),
        (proxy, [HOSTILE["v2, too long"]], []),
        (proxy, [LINE + LINE + request], [400]),
        (other, [request], [200]),
        (other, [LINE + request], [400]),
    ):
        async with await connect_from(address, relay) as raw:
            for part in sent:
                await raw.send(part)
                await asyncio.sleep(0)
            for status in statuses:
                assert (await raw.read_response()).status == status, (address, sent)
            if not statuses:
                assert await raw.read_to_end() == b"", sent
    reasons = "websocket_refusals_total"
    await relay.await_metric(reasons, 2, reason="invalid_proxy_header")
    logged = await relay.await_log("clients refused")
    expected = {"reason": "invalid_proxy_header", "setting": "server.proxy_protocol", "count": 1}
    assert logged.items() >= expected.items()
    before = await relay.metric(reasons, reason="handshake_timeout")
    async with await connect_from(proxy, relay) as silent, await connect_from(proxy, relay) as slow:
        await slow.send(LINE[:20])
        assert (await silent.read_to_end(), await slow.read_to_end()) == (b"", b"")
    await relay.await_metric(reasons, before + 2, reason="handshake_timeout")


async def test_a_connection_that_is_reset_before_it_is_accepted_is_no_error(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(server={"proxy_protocol": True, "trusted_proxies": [HOST]})
    relay.signal(signal.SIGSTOP)
    async with await relay.connect_tcp() as raw:
        raw.reset()
    relay.signal(signal.SIGCONT)
    async with await relay.connect_tcp() as raw:
        await raw.send(LINE + get_request("/healthz"))
        assert (await raw.read_response()).status == 200
        assert await relay.metric("websocket_http_connections", port="relay") == 1
    assert relay.unexpected_lines == []


@contextmanager
def haproxy(directory: Path, relay_port: int, version: str) -> Iterator[int]:
    """Run HAProxy with the file of the how-to page; yield its port."""
    port = free_port()
    text = file_of("haproxy", "haproxy", "/etc/haproxy/haproxy.cfg with PROXY protocol")
    changes = {
        "bind :443": f"bind {HOST}:{port}",
        "relay-0:8443": f"{HOST}:{relay_port}",
        "relay-1:8443": f"{HOST}:{relay_port} backup",
        "send-proxy-v2": version,
        "maxconn 32768": "maxconn 400",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    file = directory / f"{version}.cfg"
    file.write_text(text)
    with subprocess.Popen([needed(HAPROXY), "-f", file], stderr=subprocess.DEVNULL) as process:
        try:
            yield port
        finally:
            process.kill()


@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2"])
async def test_haproxy_sends_the_client_s_address_before_tls(
    tls_relay_with: StartRelay, tmp_path: Path, channel: str, version: str
) -> None:
    server = {"proxy_protocol": True, "trusted_proxies": [HOST]}
    relay = tls_relay_with(server=server, limits={"max_connections_per_ip": 1})
    with haproxy(tmp_path, relay.port, version) as port:

        def client_from(address: str) -> connect:
            url = f"wss://{HOST}:{port}/channels/{channel}"
            return connect(url, ssl=relay.tls_context, proxy=None, local_addr=(address, 0))

        async def is_up() -> tuple[bool, object]:
            try:
                async with client_from("127.0.0.4"):
                    return True, None
            except (OSError, EOFError, WebSocketException) as error:
                return False, error

        await eventually(is_up, "HAProxy passes connections to the relay")
        async with AsyncExitStack() as stack:
            for address in ("127.0.0.2", "127.0.0.3"):
                await stack.enter_async_context(client_from(address))
                assert (await refusal_answer(client_from(address))).status_code == 503, address
    assert await relay.metric("websocket_refusals_total", reason="invalid_proxy_header") == 0
