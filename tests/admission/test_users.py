"""Users: named by a token, the backend or a certificate, and limited in their connections."""

import ssl
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from websocket_relay.identity import user_of_certificate
from websockets.http11 import Response

from tests.support.admission import connect_with_token, jwt_settings, refusal_answer
from tests.support.certificates import CertificatePair, make_home_made_ca, make_pair
from tests.support.hook_backend import HookBackend, hook_settings
from tests.support.http_requests import TEXT_TYPE, publish_by_post
from tests.support.issuer import ALL_CHANNELS, sign_token
from tests.support.relay_process import RelayProcess, StartRelay, merged, path_of, receive
from tests.support.relay_v1 import open_relay_v1
from tests.support.server_api import WITH_KEY, disconnect, request_api

SUBJECTS = {
    "CN=ann": "ann",
    "CN=device-7,OU=sensors,O=Example": "device-7",
    "CN=ä ö": "ä ö",
    "OU=sensors,O=Example": "OU=sensors,O=Example",
    "CN=one,CN=two": "CN=one,CN=two",
    "": "",
}
"""Subjects of certificates, with the users that they name."""

PRESENCE = {"presence": {"channels": ["*"]}}


# The user of a certificate


@pytest.mark.fast
def test_the_user_is_the_only_common_name_or_else_the_whole_subject() -> None:
    certificates = {subject: make_pair(subject=subject).certificate for subject in SUBJECTS}
    users = {
        subject: user_of_certificate(certificate.public_bytes(Encoding.DER))
        for subject, certificate in certificates.items()
    }
    assert users == SUBJECTS


@pytest.mark.fast
def test_a_subject_longer_than_any_order_can_name_names_no_user() -> None:
    for count, is_user in ((16, True), (17, False)):
        subject = ",".join([f"OU={'x' * 60}"] * count)
        certificate = make_pair(subject=subject).certificate.public_bytes(Encoding.DER)
        assert user_of_certificate(certificate) == (subject if is_user else "")


@pytest.mark.fast
def test_a_certificate_that_can_not_be_parsed_names_no_user() -> None:
    assert user_of_certificate(b"no certificate") == ""


StartMtlsRelay = Callable[..., RelayProcess]


@pytest.fixture
def authority() -> CertificatePair:
    return make_home_made_ca()


@pytest.fixture
def mtls_relay_with(
    tls_relay_with: StartRelay, authority: CertificatePair, tmp_path: Path
) -> StartMtlsRelay:
    """Start a relay whose clients need certificates."""
    (tmp_path / "ca.pem").write_bytes(authority.certificate_pem)
    tls = {"server": {"tls": {"client_ca_file": str(tmp_path / "ca.pem")}}}

    def start(**settings: Any) -> RelayProcess:
        return tls_relay_with(**merged(tls, settings))

    return start


@pytest.fixture
def context_of(
    authority: CertificatePair, pair: CertificatePair, tmp_path: Path
) -> Callable[[str], ssl.SSLContext]:
    """Return the context of a client whose certificate has a subject."""

    def make(subject: str) -> ssl.SSLContext:
        directory = tmp_path / f"subject {subject}"
        directory.mkdir()
        make_pair(issuer=authority, subject=subject).write_to(directory)
        context = pair.client_context()
        context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
        return context

    return make


async def users_in(relay: RelayProcess, channel: str, context: ssl.SSLContext) -> list[str]:
    relay.tls_context = context
    present = (await relay.get(f"{path_of(channel)}/presence")).raise_for_status().json()
    return sorted(client["user"] for client in present["clients"])


async def test_a_client_is_the_user_that_its_certificate_names(
    mtls_relay_with: StartMtlsRelay,
    context_of: Callable[[str], ssl.SSLContext],
    channel: str,
) -> None:
    relay = mtls_relay_with(**PRESENCE)
    ann, sensors = context_of("CN=ann"), context_of("OU=sensors,O=Example")
    async with (
        relay.client(channel, ssl=ann) as client,
        open_relay_v1(relay, path_of(channel), ssl=sensors) as other,
    ):
        await other.next_notice("subscribed")
        await client.send("hello")
        assert await other.next_message() == await receive(client) == "hello"
        assert await users_in(relay, channel, ann) == ["OU=sensors,O=Example", "ann"]
    session = other.welcome["session"]
    for context, is_resumed in ((ann, False), (sensors, True)):
        path = f"/?session={session}"
        async with open_relay_v1(relay, path, ssl=context) as resumed:
            assert resumed.welcome["resumed"] is is_resumed


async def test_a_certificate_permits_nothing_and_a_token_names_the_user_instead(
    mtls_relay_with: StartMtlsRelay,
    context_of: Callable[[str], ssl.SSLContext],
    channel: str,
) -> None:
    relay = mtls_relay_with(auth=jwt_settings(), **PRESENCE)
    context = context_of("CN=ann")
    answer = await refusal_answer(relay.client(channel, ssl=context))
    assert answer.status_code == 401
    relay.tls_context = context
    async with (
        connect_with_token(relay, channel, sign_token(sub="bob")),
        connect_with_token(relay, channel, sign_token()),
    ):
        path = f"{path_of(channel)}/presence?access_token={sign_token()}"
        present = (await relay.get(path)).json()
    assert sorted(client["user"] for client in present["clients"]) == ["ann", "bob"]


async def test_a_renewed_token_is_of_the_same_user_beside_a_certificate(
    mtls_relay_with: StartMtlsRelay, context_of: Callable[[str], ssl.SSLContext]
) -> None:
    relay = mtls_relay_with(auth=jwt_settings())
    headers = {"Authorization": f"Bearer {sign_token()}"}
    context = context_of("CN=ann")
    async with open_relay_v1(relay, ssl=context, additional_headers=headers) as client:
        await client.send("token", token=sign_token(sub="ann"))
        assert (await client.next_notice())["reason"] == "invalid token: other user"
        await client.send("token", token=sign_token())
        assert (await client.next_notice())["type"] == "token"


async def test_the_backend_names_the_user_instead_of_the_certificate(
    mtls_relay_with: StartMtlsRelay, context_of: Callable[[str], ssl.SSLContext], channel: str
) -> None:
    async with HookBackend() as backend:
        relay = mtls_relay_with(**merged(hook_settings(backend), PRESENCE))
        context = context_of("CN=device")
        async with relay.client(channel, ssl=context):
            backend.permit(subscribe=["*"])
            async with relay.client(channel, ssl=context):
                assert await users_in(relay, channel, context) == ["ann", "device"]


async def test_the_certificate_of_a_proxy_that_forwards_names_no_client(
    mtls_relay_with: StartMtlsRelay, context_of: Callable[[str], ssl.SSLContext], channel: str
) -> None:
    settings = {"server": {"trusted_proxies": ["127.0.0.1"]}}
    relay = mtls_relay_with(**merged(settings, PRESENCE))
    context = context_of("CN=proxy")
    headers = {"X-Forwarded-For": "203.0.113.7"}
    async with (
        relay.client(channel, ssl=context, additional_headers=headers),
        relay.client(channel, ssl=context),
    ):
        assert await users_in(relay, channel, context) == ["", "proxy"]


async def test_a_certificate_of_a_blocked_user_opens_nothing(
    mtls_relay_with: StartMtlsRelay, context_of: Callable[[str], ssl.SSLContext], channel: str
) -> None:
    relay = mtls_relay_with(auth=jwt_settings(), **PRESENCE, **WITH_KEY)
    relay.tls_context = context_of("CN=ann")
    await disconnect(relay, user="ann", block_s=600)
    token = sign_token(relay={**ALL_CHANNELS, "admin": True})  # without a user
    answers = [
        await publish_by_post(relay, channel, b"", TEXT_TYPE, {"Authorization": f"Bearer {token}"}),
        await relay.get(f"{path_of(channel)}/events", token),
        await relay.get(f"{path_of(channel)}/presence", token),
        await request_api(relay, "GET", "/clients", secret=token),
    ]
    assert [(each.status_code, each.text) for each in answers] == [(403, "user is blocked\n")] * 4
    refused = await refusal_answer(connect_with_token(relay, channel, token))
    assert refused.body == b"user is blocked\n"


# Connections of one user


def assert_too_many(answer: Response) -> None:
    assert answer.status_code == 503
    assert bytes(answer.body or b"").decode() == "too many connections of this user\n"
    assert 1 <= int(answer.headers["Retry-After"]) <= 5


async def test_each_user_has_a_connection_limit_of_its_own(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(auth=jwt_settings(), limits={"max_connections_per_user": 2})
    ann, bob = sign_token(sub="ann"), sign_token(sub="bob")
    events = f"{path_of(channel)}/events?access_token={ann}"
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(connect_with_token(relay, channel, ann))
        for token in (ann, bob, bob):
            await stack.enter_async_context(connect_with_token(relay, channel, token))
        for token in (ann, bob):
            assert_too_many(await refusal_answer(connect_with_token(relay, channel, token)))
        assert (await relay.get(events)).status_code == 503
        for _ in range(4):  # without a user
            await stack.enter_async_context(connect_with_token(relay, channel, sign_token()))
        await relay.await_metric("websocket_refusals_total", 3, reason="connections_per_user")
        event = await relay.await_log("clients refused")
        assert event["setting"] == "limits.max_connections_per_user"
        await first.close()
        await relay.await_metric("websocket_connected_clients", 7)
        await stack.enter_async_context(connect_with_token(relay, channel, ann))
        assert_too_many(await refusal_answer(connect_with_token(relay, channel, ann)))


async def test_the_limits_of_user_and_address_count_the_same_client(
    relay_with: StartRelay, channel: str
) -> None:
    limits = {"max_connections_per_user": 1, "max_connections_per_ip": 2}
    relay = relay_with(auth=jwt_settings(), limits=limits)
    for _ in range(2):
        async with (
            connect_with_token(relay, channel, sign_token(sub="ann")),
            connect_with_token(relay, channel, sign_token(sub="bob")),
        ):
            answer = await refusal_answer(
                connect_with_token(relay, channel, sign_token(sub="carol"))
            )
            expected = b"too many connections from this address\n"
            assert (answer.status_code, answer.body) == (503, expected)
        await relay.await_metric("websocket_connected_clients", 0)


async def test_users_of_the_backend_and_of_certificates_are_limited_as_well(
    relay_with: StartRelay,
    mtls_relay_with: StartMtlsRelay,
    context_of: Callable[[str], ssl.SSLContext],
    channel: str,
) -> None:
    limits = {"limits": {"max_connections_per_user": 1}}
    async with HookBackend() as backend:
        relay = relay_with(**merged(hook_settings(backend), limits))
        async with relay.client(channel):
            assert_too_many(await refusal_answer(relay.client(channel)))
            backend.permit(user="bob", subscribe=["*"])
            async with relay.client(channel):
                pass
    relay = mtls_relay_with(**limits)
    ann, bob = context_of("CN=ann"), context_of("CN=bob")
    async with relay.client(channel, ssl=ann), relay.client(channel, ssl=bob):
        assert_too_many(await refusal_answer(relay.client(channel, ssl=ann)))
