"""Keys of tokens: from a file or from the issuer's server, each for its own algorithms only."""

import asyncio
import gzip
import json
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from websocket_relay.admission import jwks
from websockets.exceptions import InvalidStatus
from websockets.http11 import Response

from tests.support.admission import assert_bad, bearing, refused, works
from tests.support.certificates import make_pair
from tests.support.issuer import (
    ASYMMETRIC,
    EVERYTHING,
    SECRET,
    KeyServer,
    Signer,
    hand_made,
    in_base64,
    key_set,
    signer,
    token,
    write,
)
from tests.support.raw_client import CLOSE, close_payload, frame, upgrade_request
from tests.support.relay_process import Relay, StartRelay, path_of

ONE, TWO, THREE = (signer("ES256", f"key-{number}", number) for number in (1, 2, 3))


def by_file(directory: Path, pem: bytes, *algorithms: str) -> dict[str, Any]:
    file = write(directory, pem)
    return {"mode": "jwt", "jwt": {"public_key_file": file, "algorithms": list(algorithms)}}


def by_url(server: KeyServer, *algorithms: str, **further: Any) -> dict[str, Any]:
    of_jwt = {"jwks_url": server.url, "algorithms": list(algorithms or ["ES256"])} | further
    return {"mode": "jwt", "jwt": of_jwt}


@pytest.fixture
def key_server() -> Iterator[KeyServer]:
    """A key server that has one key."""
    with KeyServer(key_set(ONE)) as server:
        yield server


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., Relay]]:
    """Start a relay that listens, and may not be ready yet: `launched(auth=by_url(server))`."""
    with ExitStack() as stack:

        def launch(**settings: Any) -> Relay:
            relay = Relay(tmp_path, settings)
            stack.callback(relay.end)
            relay.start()
            relay.await_log("relay listening")
            return relay

        yield launch


async def assert_not_ready(relay: Relay) -> None:
    """Insist that both ports say what is missing, and that the relay is alive."""
    for get in (relay.get, relay.get_metrics):
        answer = await get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": "waiting for keys"})
        assert (await get("/healthz")).status_code == 200


async def assert_ready(relay: Relay) -> None:
    answer = await relay.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})


async def answer_of(relay: Relay, channel: str | None, brought: str) -> int:
    """Return the status with which a client is answered; it leaves at once."""
    try:
        async with bearing(relay, channel, brought):
            return 101
    except InvalidStatus as refusal:
        return refusal.response.status_code


def assert_unavailable(answer: Response) -> None:
    """Insist on the documented answer where keys can't be had."""
    assert answer.status_code == 503
    assert bytes(answer.body or b"") == b"signing keys unavailable\n"
    assert 1 <= int(answer.headers["Retry-After"]) <= 5


# One key in a file


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "ES384", "ES512", "EdDSA"])
async def test_a_key_in_a_file_checks_tokens(
    relay_with: StartRelay, tmp_path: Path, channel: str, algorithm: str
) -> None:
    own, other = signer(algorithm), signer(algorithm, number=1)
    relay = relay_with(auth=by_file(tmp_path, own.public_pem, algorithm))
    await works(bearing(relay, channel, own.token()))
    await works(bearing(relay, channel, own.token({"kid": "any"})))
    assert_bad(await refused(bearing(relay, channel, other.token())), "signature")
    assert_bad(await refused(bearing(relay, channel, token())), "algorithm")
    assert "websocket_jwks_fetches_total" not in (await relay.metrics()).names


async def test_an_ed448_key_in_a_file_checks_tokens(
    relay_with: StartRelay, tmp_path: Path, channel: str
) -> None:
    own = Signer("EdDSA", ed448.Ed448PrivateKey.generate())
    relay = relay_with(auth=by_file(tmp_path, own.public_pem, "EdDSA"))
    await works(bearing(relay, channel, own.token()))


async def test_a_public_key_is_no_secret_and_a_secret_no_public_key(
    relay_with: StartRelay, tmp_path: Path, channel: str
) -> None:
    """The old confusion: to sign with the public key, which everybody has, as if by HMAC."""
    own = signer("RS256")
    auth = by_file(tmp_path, own.public_pem, "RS256", "HS256")
    auth["jwt"]["secret"] = SECRET
    relay = relay_with(auth=auth)
    await works(bearing(relay, channel, own.token()))
    await works(bearing(relay, channel, token()))
    for text in (own.public_pem.decode(), own.public_pem.decode().strip(), ""):
        forged = hand_made({"alg": "HS256"}, {"relay": EVERYTHING}, text)
        assert_bad(await refused(bearing(relay, channel, forged)), "signature")
    body = own.token().split(".")[1]
    for algorithm in ("RS256", "HS256"):
        head = in_base64(json.dumps({"alg": algorithm}).encode())
        genuine = own.token().split(".")[2], token().split(".")[2]
        for signature in genuine:
            answer = await refused(bearing(relay, channel, f"{head}.{body}.{signature}"))
            assert_bad(answer, "signature")


# The issuer's key set


async def test_the_issuers_keys_check_tokens_of_every_algorithm(
    relay_with: StartRelay, channel: str
) -> None:
    signers = [signer(algorithm, f"key of {algorithm}") for algorithm in ASYMMETRIC]
    strangers = [signer(algorithm, f"key of {algorithm}", 1) for algorithm in ASYMMETRIC]
    with KeyServer(key_set(*signers)) as server:
        relay = relay_with(auth=by_url(server, *ASYMMETRIC, "HS256", secret=SECRET))
        for own, stranger in zip(signers, strangers, strict=True):
            await works(bearing(relay, channel, own.token()))
            assert_bad(await refused(bearing(relay, channel, stranger.token())), "signature")
        await works(bearing(relay, channel, token()))
        assert server.requests == 1
    assert await relay.metric("websocket_jwks_fetches_total", result="ok") == 1
    assert await relay.metric("websocket_jwks_fetches_total", result="error") == 0


async def test_a_token_without_a_key_id_is_for_the_only_key_of_its_algorithm(
    relay_with: StartRelay, channel: str
) -> None:
    rsa, curve = signer("RS256", "rsa"), signer("ES384", "curve")
    with KeyServer(key_set(ONE, TWO, rsa, curve)) as server:
        relay = relay_with(auth=by_url(server, "ES256", "ES384", "RS256"))
        nameless = Signer(curve.algorithm, curve.key)
        await works(bearing(relay, channel, nameless.token()))
        ambiguous = Signer(ONE.algorithm, ONE.key)
        assert_bad(await refused(bearing(relay, channel, ambiguous.token())), "unknown key")
        assert server.requests == 1, "fetched for a token that no key set could help"


async def test_a_key_is_good_for_its_own_algorithm_only(
    relay_with: StartRelay, channel: str
) -> None:
    rsa = signer("RS256", "rsa")
    listed = [
        rsa.jwk(alg="RS512"),
        signer("EdDSA", "ed").jwk(),
        ONE.jwk(use="enc"),
        TWO.jwk(key_ops=["sign"]),
        THREE.jwk(use="sig", key_ops=["verify"], alg="ES256"),
        {"kty": "oct", "kid": "oct", "k": in_base64(b"x" * 32)},
    ]
    with KeyServer(json.dumps({"keys": listed}).encode()) as server:
        algorithms = ["RS256", "RS512", "ES256", "ES384", "EdDSA", "HS256"]
        relay = relay_with(auth=by_url(server, *algorithms, secret=SECRET))
        await works(bearing(relay, channel, Signer("RS512", rsa.key, "rsa").token()))
        await works(bearing(relay, channel, THREE.token()))
        for unfit in (
            rsa,
            ONE,
            TWO,
            Signer("ES256", ONE.key, "rsa"),
            Signer("ES256", ONE.key, "ed"),
        ):
            assert_bad(await refused(bearing(relay, channel, unfit.token())), "unknown key")
        by_listed_secret = hand_made(
            {"alg": "HS256", "kid": "oct"}, {"relay": EVERYTHING}, "x" * 32
        )
        assert_bad(await refused(bearing(relay, channel, by_listed_secret)), "signature")


@pytest.mark.parametrize("member", ["jwk", "jku", "x5u", "x5c"])
async def test_a_key_that_the_token_itself_brings_is_not_used(
    relay_with: StartRelay, key_server: KeyServer, channel: str, member: str
) -> None:
    relay = relay_with(auth=by_url(key_server))
    attacker = Signer("ES256", TWO.key, ONE.kid)
    with KeyServer(key_set(attacker)) as attackers_server:
        brought = {
            "jwk": attacker.jwk(),
            "jku": attackers_server.url,
            "x5u": attackers_server.url,
            "x5c": ["AAAA"],
        }[member]
        forged = attacker.token({member: brought})
        assert_bad(await refused(bearing(relay, channel, forged)), "signature")
        assert attackers_server.requests == 0


async def test_a_set_may_have_256_keys(relay_with: StartRelay, channel: str) -> None:
    with KeyServer(crowded_set(255, TWO)) as server:
        relay = relay_with(auth=by_url(server))
        await works(bearing(relay, channel, TWO.token()))
        assert relay.await_log("keys fetched")["keys"] == 256


async def test_broken_keys_do_the_good_ones_no_harm(relay_with: StartRelay, channel: str) -> None:
    good = ONE.jwk()
    broken: list[Any] = [
        None,
        5,
        "key",
        [],
        {},
        {"kty": "EC"},
        {"kty": ["EC"]},
        {"kty": "EC", "crv": "P-256", "x": 5, "y": None},
        good | {"kid": "b1", "x": "AAAA"},
        good | {"kid": "b2", "y": good["x"]},
        good | {"kid": "b3", "crv": "P-0"},
        good | {"kid": "b4", "crv": "secp256k1"},
        good | {"kid": "b5", "alg": ["ES256"]},
        good | {"kid": "b6", "key_ops": "verify"},
        {"kty": "RSA", "n": "AQAB", "e": "AA"},
        {"kty": "RSA", "n": "!", "e": "AQAB"},
        {"kty": "OKP", "crv": "Ed25519", "x": "AAAA"},
        {"kty": "OKP", "crv": "X25519", "x": in_base64(b"x" * 32)},
        {"kty": "AKP", "alg": "ML-DSA-44"},
        good | {"kid": 5},
    ]
    with KeyServer(json.dumps({"keys": [*broken, good], "more": 1}).encode()) as server:
        relay = relay_with(auth=by_url(server, "ES256", "RS256", "EdDSA"))
        await works(bearing(relay, channel, ONE.token()))


async def test_a_private_key_in_the_set_is_not_used(relay_with: StartRelay, channel: str) -> None:
    assert isinstance(TWO.key, ec.EllipticCurvePrivateKey)
    number = TWO.key.private_numbers().private_value
    leaked = TWO.jwk(d=in_base64(number.to_bytes(32, "big")))
    with KeyServer(json.dumps({"keys": [ONE.jwk(), leaked]}).encode()) as server:
        relay = relay_with(auth=by_url(server))
        assert_bad(await refused(bearing(relay, channel, TWO.token())), "unknown key")


async def test_the_key_server_has_to_prove_who_it_is(
    relay_with: StartRelay, launched: Callable[..., Relay], tmp_path: Path, channel: str
) -> None:
    pair = make_pair()
    pair.write_to(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with KeyServer(key_set(ONE), context) as server:
        trusting = relay_with({"SSL_CERT_FILE": str(tmp_path / "cert.pem")}, auth=by_url(server))
        await works(bearing(trusting, channel, ONE.token()))
        doubting = launched(auth=by_url(server))
        assert "certificate" in doubting.await_log("keys not fetched")["error"].lower()
        assert_unavailable(await refused(bearing(doubting, channel, ONE.token())))
        assert server.requests == 1


def short_signer(kid: str) -> Signer:
    return Signer("RS256", rsa.generate_private_key(public_exponent=65_537, key_size=1024), kid)


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")  # of who signs
async def test_short_rsa_keys_of_the_set_are_not_used_and_told_once_a_fetch(
    relay_with: StartRelay, channel: str
) -> None:
    short, long = short_signer("short"), signer("RS256", "long")
    body = key_set(short, short_signer("short too"), long)
    with KeyServer(body) as server:
        relay = relay_with(auth=by_url(server, "RS256"))
        told = relay.await_log("short RSA keys ignored")
        assert (told["level"], told["keys"], told["min_bits"]) == ("warning", 2, 2048)
        assert relay.await_log("keys fetched")["keys"] == 1
        await works(bearing(relay, channel, long.token()))
        assert_bad(await refused(bearing(relay, channel, short.token())), "unknown key")
        assert server.requests == 2
        relay.await_log("short RSA keys ignored", count=2)
        events = [event["event"] for event in relay.log_events]
        assert events.count("short RSA keys ignored") == 2


@pytest.mark.parametrize("fault", ["no name", "hangs up", "no TLS"])
async def test_the_log_says_what_kept_keys_from_being_fetched(
    launched: Callable[..., Relay], key_server: KeyServer, fault: str
) -> None:
    """The innermost reason: what wraps it says nothing, or that all attempts failed."""
    auth = by_url(key_server)
    match fault:
        case "no name":
            auth["jwt"]["jwks_url"] = "http://issuer.invalid/keys.json"
        case "hangs up":
            key_server.hangs_up = True
        case "no TLS":
            auth["jwt"]["jwks_url"] = key_server.url.replace("http:", "https:")
    relay = launched(auth=auth)
    error = (await relay.wait_for_log("keys not fetched"))["error"]
    expected = {"no name": "name", "hangs up": "disconnected", "no TLS": "SSL"}
    assert expected[fault].lower() in error.lower()


# Renewed keys


async def test_a_new_key_is_fetched_as_soon_as_a_token_names_it(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    relay = relay_with(auth=by_url(key_server))
    await works(bearing(relay, channel, ONE.token()))
    key_server.body = key_set(TWO)
    await works(bearing(relay, channel, TWO.token()))
    await works(bearing(relay, channel, TWO.token()))
    assert key_server.requests == 2
    assert_bad(await refused(bearing(relay, channel, ONE.token())), "unknown key")


async def test_many_who_name_a_new_key_cause_one_fetch(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    relay = relay_with(auth=by_url(key_server))
    key_server.body = key_set(ONE, TWO)
    key_server.go_on.clear()
    many = [asyncio.create_task(answer_of(relay, channel, TWO.token())) for _ in range(20)]
    await asyncio.to_thread(key_server.await_requests, 2)
    await works(bearing(relay, channel, ONE.token()))  # who needs no fetch does not wait for it
    key_server.go_on.set()
    assert await asyncio.gather(*many) == [101] * 20
    assert key_server.requests == 2


async def test_a_client_that_leaves_while_keys_are_fetched_takes_them_from_nobody(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    relay = relay_with(auth=by_url(key_server))
    key_server.body = key_set(TWO)
    key_server.go_on.clear()
    bearer = {"Authorization": f"Bearer {TWO.token()}"}
    leaver = await relay.tcp()
    await leaver.send(upgrade_request(path_of(channel), **bearer))
    await asyncio.to_thread(key_server.await_requests, 2)
    stayer = asyncio.create_task(answer_of(relay, channel, TWO.token()))
    leaver.vanish()
    assert (await relay.get("/healthz")).status_code == 200
    key_server.go_on.set()
    assert await stayer == 101
    assert key_server.requests == 2
    await relay.metric_is("websocket_connected_clients", 0)


async def test_made_up_key_ids_do_not_flood_the_issuer(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    relay = relay_with(auth=by_url(key_server))
    started = time.monotonic()
    answers = []
    for number in range(60):
        made_up = Signer("ES256", TWO.key, f"made up {number}")
        answers.append(await refused(bearing(relay, channel, made_up.token())))
    elapsed_s = time.monotonic() - started
    assert 1 + 5 <= key_server.requests <= 1 + 5 + elapsed_s / 10
    # As long as the issuer may be asked, it is known that it has no such key.
    for answer in answers[:5]:
        assert_bad(answer, "unknown key")
    later = [answer for answer in answers[5:] if answer.status_code == 503]
    assert len(later) >= 55 - elapsed_s / 10
    for answer in later:
        assert_unavailable(answer)
    await works(bearing(relay, channel, ONE.token()))


async def test_keys_that_are_old_are_renewed_while_they_are_used(
    key_server: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, for five minutes are too long to wait."""
    async with jwks.Jwks(key_server.url) as keys:
        await keys.fetch_until_available()
        assert await keys.find("ES256", "key-1") is not None
        assert key_server.requests == 1
        monkeypatch.setattr(jwks, "MAX_AGE_S", -1.0)
        key_server.body = key_set(TWO)
        key_server.go_on.clear()
        async with asyncio.timeout(3):  # it does not wait for the fetch, which has five seconds
            assert await keys.find("ES256", "key-1") is not None
        await asyncio.to_thread(key_server.await_requests, 2)
        assert await keys.find("ES256", "key-1") is not None
        key_server.go_on.set()
        assert await keys.find("ES256", "key-2") is not None, "waits for the fetch under way"
        assert await keys.find("ES256", "key-1") is None
        key_server.stop()
        for _ in range(20):
            assert await keys.find("ES256", "key-2") is not None, "an outage takes known keys"


# Outages


async def test_an_outage_hurts_nobody_whose_key_is_known(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    relay = relay_with(auth=by_url(key_server))
    key_server.stop()
    await works(bearing(relay, channel, ONE.token()))
    assert_unavailable(await refused(bearing(relay, channel, TWO.token())))
    await works(bearing(relay, channel, ONE.token()))
    await relay.wait_for_log("keys not fetched")
    await relay.metric_is("websocket_jwks_fetches_total", 1, result="error")
    await relay.metric_is("websocket_refusals_total", 1, reason="keys")

    key_server.body = key_set(ONE, TWO)
    key_server.start()
    await works(bearing(relay, channel, TWO.token()))
    await relay.metric_is("websocket_jwks_fetches_total", 2, result="ok")
    again = await relay.wait_for_log("keys fetched", count=2)
    assert (again["level"], again["keys"]) == ("info", 2)
    await assert_ready(relay)


async def test_in_a_long_outage_good_tokens_are_not_called_bad(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    """Not even once no more is asked of the issuer: its clients would throw them away."""
    relay = relay_with(auth=by_url(key_server))
    key_server.stop()
    for _ in range(12):
        assert_unavailable(await refused(bearing(relay, channel, TWO.token())))
    fetches = await relay.metric("websocket_jwks_fetches_total", result="error")
    assert 5 <= fetches < 12


async def test_a_relay_is_not_ready_until_it_has_keys(
    launched: Callable[..., Relay], key_server: KeyServer, channel: str
) -> None:
    key_server.go_on.clear()
    relay = launched(auth=by_url(key_server))
    await asyncio.to_thread(key_server.await_requests, 1)
    await assert_not_ready(relay)
    early = asyncio.create_task(answer_of(relay, channel, ONE.token()))
    key_server.go_on.set()
    await relay.wait_for_log("ready")
    await assert_ready(relay)
    assert await early == 101
    assert key_server.requests == 1
    fetched = relay.await_log("keys fetched")
    assert (fetched["level"], fetched["keys"]) == ("info", 1)
    assert relay.complaints == []


async def test_a_relay_starts_without_the_issuer_and_finds_it_later_by_itself(
    launched: Callable[..., Relay], key_server: KeyServer, channel: str
) -> None:
    key_server.stop()
    relay = launched(auth=by_url(key_server))
    event = await relay.wait_for_log("keys not fetched", count=2)
    assert (event["level"], event["error"]) == ("error", "Connection refused")
    await assert_not_ready(relay)
    assert_unavailable(await refused(bearing(relay, channel, ONE.token())))
    key_server.start()
    await relay.wait_for_log("ready")
    await assert_ready(relay)
    await works(bearing(relay, channel, ONE.token()))
    assert key_server.requests == 1
    assert relay.complaints == []


async def test_once_ready_a_relay_stays_so_without_the_issuer(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    relay = relay_with(auth=by_url(key_server))
    key_server.stop()
    assert_unavailable(await refused(bearing(relay, channel, TWO.token())))
    await assert_ready(relay)


async def test_the_wait_for_the_first_keys_ends_with_a_token_that_has_them_fetched(
    launched: Callable[..., Relay], key_server: KeyServer, channel: str
) -> None:
    """The timer's next try may be ten seconds away."""
    key_server.stop()
    relay = launched(auth=by_url(key_server))
    await relay.wait_for_log("keys not fetched", count=3)
    key_server.start()
    await works(bearing(relay, channel, ONE.token()))
    await relay.wait_for_log("ready")
    assert key_server.requests == 1


async def test_an_issuer_that_does_not_answer_has_five_seconds(
    launched: Callable[..., Relay], key_server: KeyServer, channel: str
) -> None:
    key_server.go_on.clear()
    relay = launched(auth=by_url(key_server))
    event = await relay.wait_for_log("keys not fetched")
    assert "5 seconds" in event["error"]
    key_server.go_on.set()
    await works(bearing(relay, channel, ONE.token()))


@pytest.mark.parametrize("answers", [True, False], ids=["silent", "down"])
async def test_a_relay_stops_at_once_while_it_waits_for_its_first_keys(
    launched: Callable[..., Relay], key_server: KeyServer, answers: bool
) -> None:
    """Not even shutdown.readiness_delay_s is waited for: nobody was sent to it."""
    key_server.go_on.clear()
    if not answers:
        key_server.stop()
    stop = {"readiness_delay_s": 8, "timeout_s": 20}
    relay = launched(auth=by_url(key_server), shutdown=stop)
    if answers:
        await asyncio.to_thread(key_server.await_requests, 1)
    else:
        await relay.wait_for_log("keys not fetched")
    await assert_not_ready(relay)
    started = time.monotonic()
    assert await relay.stop() == 0
    assert time.monotonic() - started < 3
    events = [event["event"] for event in relay.log_events]
    assert events[-1] == "stopped"
    assert "ready" not in events
    assert relay.complaints == []


async def test_a_relay_stops_in_time_while_it_waits_for_keys(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    relay = relay_with(auth=by_url(key_server), shutdown={"spread_s": 0, "timeout_s": 2})
    key_server.go_on.clear()
    async with await relay.tcp() as raw:
        bearer = {"Authorization": f"Bearer {TWO.token()}"}
        await raw.send(upgrade_request(path_of(channel), **bearer))
        await asyncio.to_thread(key_server.await_requests, 2)
        started = time.monotonic()
        assert await relay.stop() == 0
        assert time.monotonic() - started < 4
    assert relay.complaints == []


def inflating() -> tuple[bytes, dict[str, str]]:
    return gzip.compress(b" " * 30_000_000), {"Content-Encoding": "gzip"}


def crowded_set(others: int, own: Signer) -> bytes:
    """Return a key set in which a key comes after so many others."""
    listed = [THREE.jwk(kid=f"other-{number}") for number in range(others)]
    return json.dumps({"keys": [*listed, own.jwk()]}, separators=(",", ":")).encode()


FAULTY: list[Any] = [
    pytest.param(b"<html>", {}, 200, "not JSON", id="a page"),
    pytest.param(b"", {}, 200, "not JSON", id="nothing"),
    pytest.param(b"\xff\xfe\xff", {}, 200, "not JSON", id="no text"),
    pytest.param(b'{"keys":' * 100_000, {}, 200, "not JSON", id="nested"),
    pytest.param(*inflating(), 200, "not JSON", id="a compression bomb"),
    pytest.param(b"[]", {}, 200, "not a JWK set", id="a list"),
    pytest.param(b'{"keys": 5}', {}, 200, "not a JWK set", id="no list"),
    pytest.param(b'{"keys": []}', {}, 200, "no usable key", id="no key"),
    pytest.param(
        b'{"keys": [{"kty": "oct", "k": "AAAA"}]}', {}, 200, "no usable key", id="a secret"
    ),
    pytest.param(b" " * 1_048_577 + key_set(ONE, TWO), {}, 200, "bytes", id="too large"),
    pytest.param(crowded_set(256, TWO), {}, 200, "257 keys, more than 256", id="a key too many"),
    pytest.param(crowded_set(7_000, TWO), {}, 200, "more than 256", id="thousands of keys"),
    pytest.param(key_set(ONE, TWO), {}, 500, "500", id="an error"),
    pytest.param(key_set(ONE, TWO), {}, 404, "404", id="not found"),
]


@pytest.mark.parametrize(("body", "headers", "status", "reason"), FAULTY)
async def test_an_answer_that_is_no_key_set_changes_nothing(
    relay_with: StartRelay,
    key_server: KeyServer,
    channel: str,
    body: bytes,
    headers: dict[str, str],
    status: int,
    reason: str,
) -> None:
    relay = relay_with(auth=by_url(key_server))
    key_server.body, key_server.headers, key_server.status = body, headers, status
    assert_unavailable(await refused(bearing(relay, channel, TWO.token())))
    assert reason in (await relay.wait_for_log("keys not fetched"))["error"]
    await works(bearing(relay, channel, ONE.token()))


async def test_a_redirect_is_not_followed(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    """It could lead to where the operator did not mean to ask."""
    relay = relay_with(auth=by_url(key_server))
    with KeyServer(key_set(TWO)) as elsewhere:
        key_server.status, key_server.headers = 302, {"Location": elsewhere.url}
        assert_unavailable(await refused(bearing(relay, channel, TWO.token())))
        assert elsewhere.requests == 0


async def test_a_fetch_leaves_no_url_or_header_of_its_own_in_the_log(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    relay = relay_with(auth=by_url(key_server), logging={"level": "debug"})
    await works(bearing(relay, channel, ONE.token()))
    assert [event["event"] for event in relay.log_events if "key" in event["event"]] == [
        "keys fetched"
    ]
    assert key_server.url not in "\n".join(relay.log_lines)


async def test_who_waited_for_a_key_does_not_come_in_once_the_relay_stops(
    relay_with: StartRelay, key_server: KeyServer, channel: str
) -> None:
    relay = relay_with(auth=by_url(key_server), shutdown={"spread_s": 0, "timeout_s": 4})
    async with await relay.tcp() as stays, await relay.tcp() as late:
        await stays.upgrade(path_of(channel), Authorization=f"Bearer {ONE.token()}")
        key_server.body = key_set(TWO)
        key_server.go_on.clear()
        await late.send(upgrade_request(path_of(channel), Authorization=f"Bearer {TWO.token()}"))
        await asyncio.to_thread(key_server.await_requests, 2)
        relay.signal()
        assert (await stays.close_frame())[0] == 1001  # and it does not answer yet
        key_server.go_on.set()
        assert (await late.response()).status == 503
        await stays.send(frame(CLOSE, close_payload(1001)))
    assert await relay.exit_code() == 0
