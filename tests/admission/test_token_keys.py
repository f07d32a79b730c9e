"""Keys of tokens: from a file or from the issuer's server, each for its own algorithms only.

What the keys alone decide is tested on the verifier; whatever depends on the relay's process, log
or metrics is tested on a relay.
"""

import asyncio
import gzip
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from websocket_relay.admission import jwks
from websocket_relay.admission.verifier import TokenVerifier
from websocket_relay.config.model import JwtSettings
from websocket_relay.outcomes import RefusedError
from websockets.exceptions import InvalidStatus
from websockets.http11 import Response

from tests.support.admission import (
    assert_admitted,
    assert_invalid_token,
    connect_with_token,
    refusal_answer,
)
from tests.support.certificates import make_home_made_ca, make_pair
from tests.support.issuer import (
    ALL_CHANNELS,
    ASYMMETRIC,
    CURVES,
    SECRET,
    KeyServer,
    Signer,
    base64url,
    key_set,
    make_signer,
    sign_token,
    signed_as_is,
    write_key_file,
)
from tests.support.raw_client import CLOSE, close_payload, frame, upgrade_request
from tests.support.relay_process import RelayProcess, StartRelay, path_of

ONE, TWO, THREE = (make_signer("ES256", f"key-{number}", number) for number in (1, 2, 3))
BAD_SIGNATURE = "invalid token: signature"
UNKNOWN_KEY = "invalid token: unknown key"
UNAVAILABLE = "signing keys unavailable"


def key_file_settings(directory: Path, pem: bytes, *algorithms: str) -> dict[str, Any]:
    return {"public_key_file": write_key_file(directory, pem), "algorithms": list(algorithms)}


def jwks_settings(server: KeyServer, *algorithms: str, **further: Any) -> dict[str, Any]:
    return {"jwks_url": server.url, "algorithms": list(algorithms or ["ES256"])} | further


def auth_by_url(server: KeyServer, **further: Any) -> dict[str, Any]:
    return {"mode": "jwt", "jwt": jwks_settings(server, **further)}


@pytest.fixture(autouse=True)
def patient_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetches in the test's own process have time on a busy machine, too."""
    monkeypatch.setattr(jwks, "FETCH_S", 60)


@pytest.fixture
def key_server() -> Iterator[KeyServer]:
    """A key server with one key."""
    with KeyServer(key_set(ONE)) as server:
        yield server


@asynccontextmanager
async def verifier_with_keys_of(
    server: KeyServer, *algorithms: str, **further: Any
) -> AsyncIterator[TokenVerifier]:
    """Yield a verifier that has fetched the server's keys."""
    verifier = TokenVerifier(JwtSettings(**jwks_settings(server, *algorithms, **further)))
    assert verifier.jwks is not None
    async with verifier.jwks as keys:
        await keys.fetch_until_available()
        yield verifier


async def refusal_of(verifier: TokenVerifier, encoded: str) -> str:
    """Assert that a token is refused; return the reason."""
    with pytest.raises(RefusedError) as raised:
        await verifier.verify(encoded)
    return str(raised.value)


def fields_of(event: str, caplog: pytest.LogCaptureFixture) -> Mapping[str, Any]:
    """Return the fields of the only record of a log event."""
    (record,) = (record for record in caplog.records if record.getMessage() == event)
    return vars(record)


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., RelayProcess]]:
    """Start a relay that listens and may not be ready: `launched(auth=auth_by_url(server))`."""
    with ExitStack() as stack:

        def launch(**settings: Any) -> RelayProcess:
            relay = RelayProcess(tmp_path, settings)
            stack.callback(relay.end)
            relay.start()
            relay.block_until_logged("relay listening")
            return relay

        yield launch


async def assert_not_ready(relay: RelayProcess) -> None:
    """Assert that both ports answer what the relay waits for, and that the relay is alive."""
    for get in (relay.get, relay.get_metrics):
        answer = await get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": "waiting for signing keys"})
        assert (await get("/healthz")).status_code == 200


async def assert_ready(relay: RelayProcess) -> None:
    answer = await relay.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})


async def status_of_client(relay: RelayProcess, channel: str | None, encoded: str) -> int:
    """Return the status that a client with a token receives; disconnect it at once."""
    try:
        async with connect_with_token(relay, channel, encoded):
            return 101
    except InvalidStatus as refusal:
        return refusal.response.status_code


def assert_unavailable(answer: Response) -> None:
    """Assert that the answer is the documented one while keys are unavailable."""
    assert answer.status_code == 503
    assert bytes(answer.body or b"").decode() == f"{UNAVAILABLE}\n"
    assert 1 <= int(answer.headers["Retry-After"]) <= 5


# One key in a file


async def test_a_public_key_file_verifies_tokens_of_its_algorithm_only(tmp_path: Path) -> None:
    pairs = [
        (make_signer(algorithm), make_signer(algorithm, number=1))
        for algorithm in ("RS256", "PS256", *CURVES, "EdDSA", "Ed25519", "Ed448")
    ]
    pairs.append((Signer("EdDSA", ed448.Ed448PrivateKey.generate()), make_signer("EdDSA")))
    for own, other in pairs:
        settings = key_file_settings(tmp_path, own.public_pem, own.algorithm)
        verifier = TokenVerifier(JwtSettings(**settings))
        await verifier.verify(own.token())
        await verifier.verify(own.token({"kid": "any"}))
        assert await refusal_of(verifier, other.token()) == BAD_SIGNATURE, own.algorithm
        assert await refusal_of(verifier, sign_token()) == "invalid token: algorithm", own.algorithm


async def test_a_public_key_is_not_a_secret_and_a_secret_is_not_a_public_key(
    relay_with: StartRelay, tmp_path: Path, channel: str
) -> None:
    """Algorithm confusion: an HMAC whose secret is the public key, which everyone can read."""
    own = make_signer("RS256")
    settings = key_file_settings(tmp_path, own.public_pem, "RS256", "HS256")
    relay = relay_with(auth={"mode": "jwt", "jwt": settings | {"secret": SECRET}})
    await assert_admitted(connect_with_token(relay, channel, own.token()))
    await assert_admitted(connect_with_token(relay, channel, sign_token()))
    for text in (own.public_pem.decode(), own.public_pem.decode().strip(), ""):
        forged = signed_as_is({"alg": "HS256"}, {"relay": ALL_CHANNELS}, text)
        assert_invalid_token(
            await refusal_answer(connect_with_token(relay, channel, forged)), "signature"
        )
    body = own.token().split(".")[1]
    for algorithm in ("RS256", "HS256"):
        head = base64url(json.dumps({"alg": algorithm}).encode())
        genuine = own.token().split(".")[2], sign_token().split(".")[2]
        for signature in genuine:
            answer = await refusal_answer(
                connect_with_token(relay, channel, f"{head}.{body}.{signature}")
            )
            assert_invalid_token(answer, "signature")
    assert "websocket_jwks_fetches_total" not in (await relay.metrics()).names


# The issuer's key set


async def test_the_issuers_keys_verify_tokens_of_every_algorithm() -> None:
    signers = [make_signer(algorithm, f"key of {algorithm}") for algorithm in ASYMMETRIC]
    others = [make_signer(algorithm, f"key of {algorithm}", 1) for algorithm in ASYMMETRIC]
    with KeyServer(key_set(*signers)) as server:
        async with verifier_with_keys_of(server, *ASYMMETRIC, "HS256", secret=SECRET) as verifier:
            for own, other in zip(signers, others, strict=True):
                await verifier.verify(own.token())
                assert await refusal_of(verifier, other.token()) == BAD_SIGNATURE, own.algorithm
            await verifier.verify(sign_token())
            assert verifier.jwks is not None
            assert verifier.jwks.fetches == {"ok": 1, "error": 0}
        assert server.requests == 1


async def test_a_token_without_a_key_id_is_verified_with_the_only_key_of_its_algorithm() -> None:
    rsa_key, curve = make_signer("RS256", "rsa"), make_signer("ES384", "curve")
    with KeyServer(key_set(ONE, TWO, rsa_key, curve)) as server:
        async with verifier_with_keys_of(server, "ES256", "ES384", "RS256") as verifier:
            await verifier.verify(Signer(curve.algorithm, curve.key).token())
            ambiguous = Signer(ONE.algorithm, ONE.key)
            assert await refusal_of(verifier, ambiguous.token()) == UNKNOWN_KEY
        assert server.requests == 1, "another fetch could not make the key unambiguous"


async def test_a_key_verifies_tokens_of_its_own_algorithm_and_use_only() -> None:
    rsa_key = make_signer("RS256", "rsa")
    listed = [
        rsa_key.jwk(alg="RS512"),
        make_signer("EdDSA", "ed").jwk(),
        ONE.jwk(use="enc"),
        TWO.jwk(key_ops=["sign"]),
        THREE.jwk(use="sig", key_ops=["verify"], alg="ES256"),
        {"kty": "oct", "kid": "oct", "k": base64url(b"x" * 32)},
    ]
    unsuitable = (
        rsa_key,
        ONE,
        TWO,
        Signer("ES256", ONE.key, "rsa"),
        Signer("ES256", ONE.key, "ed"),
    )
    algorithms = ("RS256", "RS512", "ES256", "ES384", "EdDSA", "HS256")
    with KeyServer(json.dumps({"keys": listed}).encode()) as server:
        async with verifier_with_keys_of(server, *algorithms, secret=SECRET) as verifier:
            await verifier.verify(Signer("RS512", rsa_key.key, "rsa").token())
            await verifier.verify(THREE.token())
            for each in unsuitable:
                assert await refusal_of(verifier, each.token()) == UNKNOWN_KEY
            header = {"alg": "HS256", "kid": "oct"}
            by_listed_secret = signed_as_is(header, {"relay": ALL_CHANNELS}, "x" * 32)
            assert await refusal_of(verifier, by_listed_secret) == BAD_SIGNATURE


async def test_a_key_of_an_edwards_curve_verifies_both_names_of_its_algorithm_and_no_other() -> (
    None
):
    """RFC 9864 replaces EdDSA by the names of the curves. Issuers publish either."""
    old, new = make_signer("EdDSA", "old"), make_signer("Ed25519", "new")
    goldilocks = make_signer("Ed448", "448")
    listed = [old.jwk(alg="EdDSA"), new.jwk(alg="Ed25519"), goldilocks.jwk(alg="Ed448")]
    with KeyServer(json.dumps({"keys": listed}).encode()) as server:
        async with verifier_with_keys_of(server, "EdDSA", "Ed25519", "Ed448") as verifier:
            for own in (old, new, goldilocks):
                for name in ("EdDSA", "Ed448" if own is goldilocks else "Ed25519"):
                    await verifier.verify(Signer(name, own.key, own.kid).token())
            other_curve = Signer("Ed25519", goldilocks.key, "448")
            assert await refusal_of(verifier, other_curve.token()) == UNKNOWN_KEY
        async with verifier_with_keys_of(server, "EdDSA") as verifier:
            assert await refusal_of(verifier, new.token()) == "invalid token: algorithm"


async def test_a_key_or_key_address_in_the_token_itself_is_ignored(key_server: KeyServer) -> None:
    attacker = Signer("ES256", TWO.key, ONE.kid)
    with KeyServer(key_set(attacker)) as attackers_server:
        async with verifier_with_keys_of(key_server) as verifier:
            for member, value in {
                "jwk": attacker.jwk(),
                "jku": attackers_server.url,
                "x5u": attackers_server.url,
                "x5c": ["AAAA"],
            }.items():
                forged = attacker.token({member: value})
                assert await refusal_of(verifier, forged) == BAD_SIGNATURE, member
        assert attackers_server.requests == 0


async def test_a_key_set_may_have_256_keys(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", jwks.__name__)
    with KeyServer(key_set_of(256, TWO)) as server:
        async with verifier_with_keys_of(server) as verifier:
            await verifier.verify(TWO.token())
    assert fields_of("signing keys fetched", caplog)["keys"] == 256


async def test_invalid_keys_of_a_set_are_skipped() -> None:
    valid = ONE.jwk()
    invalid: list[Any] = [
        None,
        5,
        "key",
        [],
        {},
        {"kty": "EC"},
        {"kty": ["EC"]},
        {"kty": "EC", "crv": "P-256", "x": 5, "y": None},
        valid | {"kid": "b1", "x": "AAAA"},
        valid | {"kid": "b2", "y": valid["x"]},
        valid | {"kid": "b3", "crv": "P-0"},
        valid | {"kid": "b4", "crv": "secp256k1"},
        valid | {"kid": "b5", "alg": ["ES256"]},
        valid | {"kid": "b6", "key_ops": "verify"},
        {"kty": "RSA", "n": "AQAB", "e": "AA"},
        {"kty": "RSA", "n": "!", "e": "AQAB"},
        {"kty": "OKP", "crv": "Ed25519", "x": "AAAA"},
        {"kty": "OKP", "crv": "X25519", "x": base64url(b"x" * 32)},
        {"kty": "AKP", "alg": "ML-DSA-44"},
        valid | {"kid": 5},
    ]
    with KeyServer(json.dumps({"keys": [*invalid, valid], "more": 1}).encode()) as server:
        async with verifier_with_keys_of(server, "ES256", "RS256", "EdDSA") as verifier:
            await verifier.verify(ONE.token())


async def test_a_private_key_in_the_set_is_not_used() -> None:
    assert isinstance(TWO.key, ec.EllipticCurvePrivateKey)
    number = TWO.key.private_numbers().private_value
    private = TWO.jwk(d=base64url(number.to_bytes(32, "big")))
    with KeyServer(json.dumps({"keys": [ONE.jwk(), private]}).encode()) as server:
        async with verifier_with_keys_of(server) as verifier:
            assert await refusal_of(verifier, TWO.token()) == UNKNOWN_KEY


def short_signer(kid: str) -> Signer:
    return Signer("RS256", rsa.generate_private_key(public_exponent=65_537, key_size=1024), kid)


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")  # when signing
async def test_short_rsa_keys_of_the_set_are_ignored_with_one_warning_per_fetch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", jwks.__name__)
    short, long = short_signer("short"), make_signer("RS256", "long")
    with KeyServer(key_set(short, short_signer("short too"), long)) as server:
        async with verifier_with_keys_of(server, "RS256") as verifier:
            assert fields_of("signing keys fetched", caplog)["keys"] == 1
            await verifier.verify(long.token())
            assert await refusal_of(verifier, short.token()) == UNKNOWN_KEY
        assert server.requests == 2
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.getMessage() for record in warnings] == ["short RSA keys ignored"] * 2
    assert {(vars(record)["keys"], vars(record)["min_bits"]) for record in warnings} == {(2, 2048)}


async def test_the_certificate_of_the_key_server_is_verified(
    relay_with: StartRelay, launched: Callable[..., RelayProcess], tmp_path: Path, channel: str
) -> None:
    ca = make_home_made_ca()
    (tmp_path / "ca.pem").write_bytes(ca.certificate_pem)
    make_pair(issuer=ca).write_to(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with KeyServer(key_set(ONE), context) as server:
        trust = {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}
        trusting = relay_with(trust, auth=auth_by_url(server))
        await assert_admitted(connect_with_token(trusting, channel, ONE.token()))
        distrusting = launched(auth=auth_by_url(server))
        error = (await distrusting.await_log("signing keys not fetched"))["error"]
        assert "certificate" in error.lower()
        assert_unavailable(
            await refusal_answer(connect_with_token(distrusting, channel, ONE.token()))
        )
        assert server.requests == 1


async def test_the_log_names_the_innermost_cause_of_a_failed_fetch(
    launched: Callable[..., RelayProcess], key_server: KeyServer
) -> None:
    """The errors that wrap it state nothing, or that all attempts failed."""
    key_server.closes_without_answer = True
    tls_url = key_server.url.replace("http:", "https:")
    for url, cause in {
        "http://issuer.invalid/keys.json": "name",
        key_server.url: "disconnected",
        tls_url: "ssl",
    }.items():
        relay = launched(auth=auth_by_url(key_server, jwks_url=url))
        assert cause in (await relay.await_log("signing keys not fetched"))["error"].lower()


async def test_a_proxy_of_the_environment_is_used_and_named_when_it_fails(
    key_server: KeyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("http_proxy", key_server.url.removesuffix("/keys.json"))
    async with jwks.Jwks("http://issuer.invalid/keys.json") as keys:
        assert await keys.find("ES256", "key-1") is not None
        key_server.stop()
        with pytest.raises(RefusedError, match=UNAVAILABLE):
            await keys.find("ES256", "key-2")
    error = fields_of("signing keys not fetched", caplog)["error"]
    assert error.endswith(" (through the proxy in http_proxy)")


async def test_a_key_set_that_is_always_compressed_is_read(key_server: KeyServer) -> None:
    key_server.body = gzip.compress(key_server.body)
    key_server.headers = {"Content-Encoding": "gzip"}
    async with verifier_with_keys_of(key_server) as verifier:
        await verifier.verify(ONE.token())


def discovery(jwks_uri: object) -> bytes:
    """Return an OpenID Connect document, which names the key set."""
    return json.dumps({"issuer": "https://issuer.example", "jwks_uri": jwks_uri}).encode()


async def test_a_key_set_is_discovered_from_the_issuers_openid_configuration(
    key_server: KeyServer,
) -> None:
    with KeyServer(discovery(key_server.url)) as issuer:
        async with verifier_with_keys_of(issuer) as verifier:
            await verifier.verify(ONE.token())
            assert (issuer.requests, key_server.requests) == (1, 1)


async def test_a_discovered_url_that_is_no_key_set_or_less_safe_is_refused(
    key_server: KeyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_pair().write_to(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    with KeyServer(context=context) as issuer, KeyServer(discovery(key_server.url)) as another:
        for url, named, reason in (
            (issuer.url, key_server.url, "its jwks_uri is not https"),
            (issuer.url, "file:///etc/passwd", "its jwks_uri is not a URL"),
            (issuer.url, 5, "its jwks_uri is not a URL"),
            (another.url, another.url, "not a JWK set"),
        ):
            caplog.clear()
            issuer.body = another.body = discovery(named)
            async with jwks.Jwks(url) as keys:
                with pytest.raises(RefusedError, match=UNAVAILABLE):
                    await keys.find("ES256", "key-1")
            assert fields_of("signing keys not fetched", caplog)["error"] == reason
    assert key_server.requests == 0


# Renewed keys


async def test_an_unknown_key_id_causes_a_fetch_at_once(key_server: KeyServer) -> None:
    async with verifier_with_keys_of(key_server) as verifier:
        await verifier.verify(ONE.token())
        key_server.body = key_set(TWO)
        await verifier.verify(TWO.token())
        await verifier.verify(TWO.token())
        assert key_server.requests == 2
        assert await refusal_of(verifier, ONE.token()) == UNKNOWN_KEY


async def test_many_tokens_with_the_same_new_key_id_cause_one_fetch(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    relay = relay_with(auth=auth_by_url(key_server))
    key_server.body = key_set(ONE, TWO)
    key_server.may_answer.clear()
    many = [asyncio.create_task(status_of_client(relay, channel, TWO.token())) for _ in range(20)]
    await asyncio.to_thread(key_server.block_until_requested, 2)
    await assert_admitted(
        connect_with_token(relay, channel, ONE.token())
    )  # a known key does not wait for the fetch
    key_server.may_answer.set()
    assert await asyncio.gather(*many) == [101] * 20
    assert key_server.requests == 2


async def test_a_client_that_disconnects_during_a_fetch_does_not_cancel_it_for_others(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    relay = relay_with(auth=auth_by_url(key_server))
    key_server.body = key_set(TWO)
    key_server.may_answer.clear()
    first = await relay.connect_tcp()
    await first.send(upgrade_request(path_of(channel), Authorization=f"Bearer {TWO.token()}"))
    await asyncio.to_thread(key_server.block_until_requested, 2)
    second = asyncio.create_task(status_of_client(relay, channel, TWO.token()))
    first.reset()
    assert (await relay.get("/healthz")).status_code == 200
    key_server.may_answer.set()
    assert await second == 101
    assert key_server.requests == 2
    await relay.await_metric("websocket_connected_clients", 0)


async def test_unknown_key_ids_cause_a_limited_number_of_fetches(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    """While fetches are allowed, it is certain that the issuer has no such key."""
    relay = relay_with(auth=auth_by_url(key_server))
    count, burst = 20, 5
    started_at = time.monotonic()
    answers = []
    for number in range(count):
        unknown = Signer("ES256", TWO.key, f"unknown {number}")
        answers.append(await refusal_answer(connect_with_token(relay, channel, unknown.token())))
    elapsed_s = time.monotonic() - started_at
    assert 1 + burst <= key_server.requests <= 1 + burst + elapsed_s / 10
    for answer in answers[:burst]:
        assert_invalid_token(answer, "unknown key")
    unavailable = [answer for answer in answers[burst:] if answer.status_code == 503]
    assert len(unavailable) >= count - burst - elapsed_s / 10
    for answer in unavailable:
        assert_unavailable(answer)
    await assert_admitted(connect_with_token(relay, channel, ONE.token()))


async def test_old_keys_are_refetched_in_the_background_when_they_are_used(
    key_server: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with jwks.Jwks(key_server.url) as keys:
        await keys.fetch_until_available()
        assert await keys.find("ES256", "key-1") is not None
        assert key_server.requests == 1
        monkeypatch.setattr(jwks, "MAX_AGE_S", -1.0)
        key_server.body = key_set(TWO)
        key_server.may_answer.clear()
        async with asyncio.timeout(3):  # less than the deadline of the fetch
            assert await keys.find("ES256", "key-1") is not None
        await asyncio.to_thread(key_server.block_until_requested, 2)
        assert await keys.find("ES256", "key-1") is not None
        key_server.may_answer.set()
        assert await keys.find("ES256", "key-2") is not None, "waits for the fetch in flight"
        assert await keys.find("ES256", "key-1") is None
        key_server.stop()
        for _ in range(20):
            assert await keys.find("ES256", "key-2") is not None, "an outage keeps known keys"


# Outages


async def test_an_outage_of_the_issuer_refuses_only_tokens_with_unknown_keys(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    relay = relay_with(auth=auth_by_url(key_server))
    key_server.stop()
    await assert_admitted(connect_with_token(relay, channel, ONE.token()))
    assert_unavailable(await refusal_answer(connect_with_token(relay, channel, TWO.token())))
    await assert_ready(relay)
    await assert_admitted(connect_with_token(relay, channel, ONE.token()))
    await relay.await_log("signing keys not fetched")
    await relay.await_metric("websocket_jwks_fetches_total", 1, result="error")
    await relay.await_metric("websocket_refusals_total", 1, reason="signing_keys")

    key_server.body = key_set(ONE, TWO)
    key_server.start()
    await assert_admitted(connect_with_token(relay, channel, TWO.token()))
    await relay.await_metric("websocket_jwks_fetches_total", 2, result="ok")
    fetched = await relay.await_log("signing keys fetched", count=2)
    assert (fetched["level"], fetched["keys"]) == ("info", 2)
    await assert_ready(relay)


async def test_in_a_long_outage_a_token_with_an_unknown_key_is_not_refused_as_invalid(
    key_server: KeyServer,
) -> None:
    """The reason stays the same at the limit of fetches. Clients discard an invalid token."""
    async with verifier_with_keys_of(key_server) as verifier:
        key_server.stop()
        for _ in range(12):
            assert await refusal_of(verifier, TWO.token()) == UNAVAILABLE
        assert verifier.jwks is not None
        assert 5 <= verifier.jwks.fetches["error"] < 12


async def test_a_relay_is_not_ready_until_it_has_keys(
    launched: Callable[..., RelayProcess], key_server: KeyServer, channel: str
) -> None:
    key_server.may_answer.clear()
    relay = launched(auth=auth_by_url(key_server))
    await asyncio.to_thread(key_server.block_until_requested, 1)
    await assert_not_ready(relay)
    early = asyncio.create_task(status_of_client(relay, channel, ONE.token()))
    key_server.may_answer.set()
    await relay.await_log("ready")
    await assert_ready(relay)
    assert await early == 101
    assert key_server.requests == 1
    fetched = relay.block_until_logged("signing keys fetched")
    assert (fetched["level"], fetched["keys"]) == ("info", 1)
    assert relay.unexpected_lines == []


async def test_a_relay_that_starts_during_an_outage_of_the_issuer_retries_by_itself(
    launched: Callable[..., RelayProcess], key_server: KeyServer, channel: str
) -> None:
    key_server.stop()
    relay = launched(auth=auth_by_url(key_server))
    event = await relay.await_log("signing keys not fetched")
    assert (event["level"], event["error"]) == ("error", "Connection refused")
    await assert_not_ready(relay)
    assert_unavailable(await refusal_answer(connect_with_token(relay, channel, ONE.token())))
    key_server.start()
    await relay.await_log("ready")
    await assert_ready(relay)
    await assert_admitted(connect_with_token(relay, channel, ONE.token()))
    assert key_server.requests == 1
    assert relay.unexpected_lines == []


async def test_a_fetch_that_a_token_causes_ends_the_wait_for_the_first_keys(
    launched: Callable[..., RelayProcess], key_server: KeyServer, channel: str
) -> None:
    """The retry of the timer would be a second request."""
    key_server.stop()
    relay = launched(auth=auth_by_url(key_server))
    await relay.await_log("signing keys not fetched")
    key_server.start()
    await assert_admitted(connect_with_token(relay, channel, ONE.token()))
    await relay.await_log("ready")
    assert key_server.requests == 1


async def test_a_fetch_fails_at_its_deadline(
    key_server: KeyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with jwks.Jwks(key_server.url) as keys:
        with monkeypatch.context() as patch:
            patch.setattr(jwks, "FETCH_S", 0.1)
            key_server.may_answer.clear()
            with pytest.raises(RefusedError, match=UNAVAILABLE):
                await keys.find("ES256", "key-1")
        assert fields_of("signing keys not fetched", caplog)["error"] == "timeout after 0.1 seconds"
        key_server.may_answer.set()
        assert await keys.find("ES256", "key-1") is not None


@pytest.mark.parametrize("answers", [True, False], ids=["silent", "down"])
async def test_a_relay_stops_at_once_while_it_waits_for_its_first_keys(
    launched: Callable[..., RelayProcess], key_server: KeyServer, answers: bool
) -> None:
    """It does not wait for shutdown.readiness_delay_s: no load balancer sent clients to it."""
    key_server.may_answer.clear()
    if not answers:
        key_server.stop()
    stop = {"readiness_delay_s": 8, "timeout_s": 20}
    relay = launched(auth=auth_by_url(key_server), shutdown=stop)
    if answers:
        await asyncio.to_thread(key_server.block_until_requested, 1)
    else:
        await relay.await_log("signing keys not fetched")
    await assert_not_ready(relay)
    started_at = time.monotonic()
    assert await relay.stop() == 0
    assert time.monotonic() - started_at < stop["readiness_delay_s"]
    events = [event["event"] for event in relay.log_events]
    assert events[-1] == "stopped"
    assert "ready" not in events
    assert relay.unexpected_lines == []


async def test_a_relay_stops_in_time_while_a_client_waits_for_a_key(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    relay = relay_with(auth=auth_by_url(key_server), shutdown={"spread_s": 0, "timeout_s": 1})
    key_server.may_answer.clear()
    async with await relay.connect_tcp() as raw:
        bearer = {"Authorization": f"Bearer {TWO.token()}"}
        await raw.send(upgrade_request(path_of(channel), **bearer))
        await asyncio.to_thread(key_server.block_until_requested, 2)
        assert await relay.stop() == 0, "at shutdown.timeout_s it ends with 1"
    assert relay.unexpected_lines == []


async def test_a_client_that_waits_for_a_key_is_refused_when_the_relay_drains(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    relay = relay_with(auth=auth_by_url(key_server), shutdown={"spread_s": 0, "timeout_s": 4})
    async with await relay.connect_tcp() as admitted, await relay.connect_tcp() as waiting:
        await admitted.upgrade(path_of(channel), Authorization=f"Bearer {ONE.token()}")
        key_server.body = key_set(TWO)
        key_server.may_answer.clear()
        await waiting.send(upgrade_request(path_of(channel), Authorization=f"Bearer {TWO.token()}"))
        await asyncio.to_thread(key_server.block_until_requested, 2)
        relay.signal()
        assert (await admitted.read_close_frame())[
            0
        ] == 1001  # not answered yet, so the drain goes on
        key_server.may_answer.set()
        assert (await waiting.read_response()).status == 503
        await admitted.send(frame(CLOSE, close_payload(1001)))
    assert await relay.exit_code() == 0


# Answers that are no key set


def key_set_of(count: int, last: Signer) -> bytes:
    """Return a set of `count` keys."""
    listed = [THREE.jwk(kid=f"other-{number}") for number in range(count - 1)]
    return json.dumps({"keys": [*listed, last.jwk()]}, separators=(",", ":")).encode()


async def test_an_answer_that_is_no_key_set_changes_nothing(
    key_server: KeyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    symmetric = b'{"keys": [{"kty": "oct", "k": "AAAA"}]}'
    bomb = gzip.compress(b" " * 3_000_000)
    gzipped = {"Content-Encoding": "gzip"}
    answers: list[tuple[bytes, Mapping[str, str], int, str]] = [
        (b"<html>", {}, 200, "not JSON"),
        (b"", {}, 200, "not JSON"),
        (b"\xff\xfe\xff", {}, 200, "not JSON"),
        (b'{"keys":' * 100_000, {}, 200, "not JSON"),
        (bomb, gzipped, 200, "more than 1048576 bytes"),
        (gzip.compress(bomb), {"Content-Encoding": "gzip, gzip"}, 200, "'gzip, gzip' is not"),
        (bomb[:-9], gzipped, 200, "bytes"),
        (b"not gzip", gzipped, 200, "incorrect header"),
        (b"brotli", {"Content-Encoding": "br"}, 200, "Content-Encoding 'br' is not supported"),
        (b"[]", {}, 200, "not a JWK set"),
        (b'{"keys": 5}', {}, 200, "not a JWK set"),
        (b'{"keys": []}', {}, 200, "no usable key"),
        (symmetric, {}, 200, "no usable key"),
        (b" " * 1_048_577 + key_set(ONE, TWO), {}, 200, "bytes"),
        (key_set_of(257, TWO), {}, 200, "257 keys, more than 256"),
        (key_set_of(7_000, TWO), {}, 200, "7000 keys, more than 256"),
        (key_set(ONE, TWO), {}, 500, "500"),
        (key_set(ONE, TWO), {}, 404, "404"),
    ]
    monkeypatch.setattr(jwks, "FETCH_BURST", len(answers))
    async with verifier_with_keys_of(key_server) as verifier:
        for body, headers, status, reason in answers:
            key_server.body, key_server.headers, key_server.status = body, dict(headers), status
            caplog.clear()
            assert await refusal_of(verifier, TWO.token()) == UNAVAILABLE, reason
            assert reason in fields_of("signing keys not fetched", caplog)["error"]
            await verifier.verify(ONE.token())


async def test_a_redirect_of_the_key_server_is_not_followed(key_server: KeyServer) -> None:
    """It might lead to a server that the operator did not choose."""
    async with verifier_with_keys_of(key_server) as verifier:
        with KeyServer(key_set(TWO)) as elsewhere:
            key_server.status, key_server.headers = 302, {"Location": elsewhere.url}
            assert await refusal_of(verifier, TWO.token()) == UNAVAILABLE
            assert elsewhere.requests == 0


async def test_a_fetch_leaves_no_url_and_no_header_in_the_log(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    relay = relay_with(auth=auth_by_url(key_server), logging={"level": "debug"})
    await assert_admitted(connect_with_token(relay, channel, ONE.token()))
    assert [event["event"] for event in relay.log_events if "key" in event["event"]] == [
        "signing keys fetched"
    ]
    assert key_server.url not in "\n".join(relay.log_lines)
