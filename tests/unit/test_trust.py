"""Servers are verified by the same rules on all versions of Python."""

import ssl
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from redis.asyncio import SSLConnection
from websocket_relay.backplane.access import BrokerAccess
from websocket_relay.backplane.redis import load_certificates
from websocket_relay.cli.common import tls_context
from websocket_relay.trust import verifying_context

from tests.support.certificates import make_home_made_ca, make_pair

pytestmark = pytest.mark.fast


def shake_hands(client_context: ssl.SSLContext, server_context: ssl.SSLContext) -> None:
    """Make a TLS handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname="localhost")
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    waiting = [client, server]
    while waiting:
        for each in list(waiting):
            try:
                each.do_handshake()
                waiting.remove(each)
            except ssl.SSLWantReadError:
                pass


def redis_context(file: str) -> ssl.SSLContext:
    """Return the context of a connection to a Redis."""
    connection = SSLConnection(ssl_ca_certs=file)
    load_certificates(connection, "")
    context = connection.ssl_context.get()
    assert isinstance(context, ssl.SSLContext)
    return context


@pytest.mark.parametrize(
    "context_for",
    [
        verifying_context,
        lambda file: BrokerAccess(ca_file=file).tls_context(),
        redis_context,
        lambda file: tls_context(Namespace(ca=Path(file), url="wss://localhost")),
    ],
    ids=["any server", "broker", "Redis", "--ca"],
)
def test_a_home_made_ca_is_trusted_alone_and_for_its_own_servers_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context_for: Callable[[str], ssl.SSLContext]
) -> None:
    ca, of_system = make_home_made_ca(), make_home_made_ca()
    (tmp_path / "ca.pem").write_bytes(ca.certificate_pem)
    (tmp_path / "system.pem").write_bytes(of_system.certificate_pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "system.pem"))
    for issuer in (ca, of_system):
        make_pair(issuer=issuer).write_to(tmp_path)
        server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server_context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        client_context = context_for(str(tmp_path / "ca.pem"))
        if issuer is ca:
            shake_hands(client_context, server_context)
        else:
            with pytest.raises(ssl.SSLCertVerificationError):
                shake_hands(client_context, server_context)
