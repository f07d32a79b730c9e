"""Tokens: a client is admitted with a valid token only, and does what the token permits.

Which tokens are valid is tested on the verifier, and what they permit on the permissions; how the
relay answers, closes and logs is tested on a relay.
"""

import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websocket_relay.admission import verifier as verifier_module
from websocket_relay.admission.permissions import Permissions
from websocket_relay.admission.verifier import TokenVerifier
from websocket_relay.config.model import JwtSettings
from websocket_relay.outcomes import RefusedError
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from tests.support.admission import (
    HMAC_ALGORITHMS,
    assert_admitted,
    assert_invalid_token,
    connect_with_token,
    jwt_settings,
    refusal_answer,
)
from tests.support.issuer import (
    ALL_CHANNELS,
    OTHER_SECRET,
    SECRET,
    base64url,
    make_signer,
    sign_token,
    signed_as_is,
)
from tests.support.raw_client import (
    CLOSE,
    TEXT,
    RawClient,
    close_payload,
    frame,
    raw_websocket,
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
)

HS256 = {"alg": "HS256", "typ": "JWT"}
NOT_ALLOWED = (1008, "not allowed to publish")


@pytest.fixture(scope="module")
def shared_guarded_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path_factory.mktemp("guarded"), {"auth": jwt_settings()}) as relay:
        yield relay


@pytest.fixture
async def jwt_relay(shared_guarded_relay: RelayProcess) -> AsyncIterator[RelayProcess]:
    """A relay that requires tokens signed with the secret."""
    await shared_guarded_relay.await_metric("websocket_connected_clients", 0)
    yield shared_guarded_relay
    assert shared_guarded_relay.unexpected_lines == []


def verifier_with(**settings: Any) -> TokenVerifier:
    """Return a verifier with the settings of `jwt_relay` and others."""
    return TokenVerifier(JwtSettings(**jwt_settings(**settings)["jwt"]))


async def assert_invalid(verifier: TokenVerifier, encoded: str, problem: str) -> None:
    with pytest.raises(RefusedError) as raised:
        await verifier.verify(encoded)
    assert str(raised.value) == f"invalid token: {problem}"


# Three ways to send a token


async def test_a_token_in_the_authorization_header_is_accepted(
    jwt_relay: RelayProcess, channel: str
) -> None:
    for scheme in ("Bearer", "bearer", "BEARER", "Bearer  "):
        headers = {"Authorization": f"{scheme} {sign_token()}"}
        await assert_admitted(jwt_relay.client(channel, additional_headers=headers))


async def test_a_token_in_the_query_is_accepted(jwt_relay: RelayProcess, channel: str) -> None:
    escaped = sign_token().replace(".", "%2E").replace("e", "%65")
    for query in (
        f"access_token={sign_token()}",
        f"a=b&access_token={sign_token()}&c=d",
        f"&access_token={sign_token()}",
        f"access_token={escaped}",
    ):
        await assert_admitted(jwt_relay.client(path=f"{path_of(channel)}?{query}"))


async def test_a_token_among_the_subprotocols_is_accepted(
    jwt_relay: RelayProcess, channel: str
) -> None:
    for scheme in ("bearer", "Bearer"):
        offer = [Subprotocol(scheme), Subprotocol(sign_token())]
        await assert_admitted(jwt_relay.client(channel, subprotocols=offer))


async def test_the_header_precedes_the_query_and_the_query_precedes_the_subprotocols(
    jwt_relay: RelayProcess, channel: str
) -> None:
    valid, invalid = sign_token(), sign_token(OTHER_SECRET)

    def connect_with(header: str, query: str, subprotocol: str) -> connect:
        return jwt_relay.client(
            path=f"{path_of(channel)}?access_token={query}" if query else path_of(channel),
            additional_headers={"Authorization": header} if header else {},
            subprotocols=[Subprotocol("bearer"), Subprotocol(subprotocol)],
        )

    await assert_admitted(connect_with(f"Bearer {valid}", invalid, invalid))
    await assert_admitted(connect_with("", valid, invalid))
    await assert_admitted(connect_with("Basic dXNlcjpwYXNz", valid, invalid))
    await assert_admitted(connect_with("Bearer ", "", valid))
    assert_invalid_token(
        await refusal_answer(connect_with(f"Bearer {invalid}", valid, valid)), "signature"
    )
    assert_invalid_token(await refusal_answer(connect_with("", invalid, valid)), "signature")
    assert_invalid_token(await refusal_answer(connect_with("", "", invalid)), "signature")


async def test_more_than_one_authorization_header_is_refused(
    jwt_relay: RelayProcess, channel: str
) -> None:
    """A proxy may have verified the other one."""
    first = f"Bearer {sign_token()}"
    for second in (
        f"Bearer {sign_token()}",
        f"Bearer {sign_token(OTHER_SECRET)}",
        "Basic YTpi",
        "",
    ):
        lines = [("Authorization", first), ("Authorization", second)]
        for both in (lines, lines[::-1]):
            attempt = jwt_relay.client(channel, additional_headers=both)
            assert_invalid_token(await refusal_answer(attempt), "malformed")


WITHOUT_TOKEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "empty header": {"additional_headers": {"Authorization": "Bearer "}},
    "other scheme": {"additional_headers": {"Authorization": "Basic YTpi"}},
    "scheme only": {"additional_headers": {"Authorization": "Bearer"}},
    "empty parameter": {"path": "/?access_token="},
    "other parameter": {"path": "/?token=abc"},
    "parameter with the same end": {"path": "/?xaccess_token=abc"},
    "subprotocol only": {"subprotocols": ["bearer"]},
    "subprotocol at the end": {"subprotocols": ["chat", "bearer"]},
}


async def test_a_client_without_a_token_is_refused_with_401(jwt_relay: RelayProcess) -> None:
    before = await jwt_relay.metric("websocket_refusals_total", reason="token_required")
    for case, options in WITHOUT_TOKEN.items():
        answer = await refusal_answer(jwt_relay.client(**options))
        assert answer.status_code == 401, case
        assert bytes(answer.body or b"") == b"token required\n"
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    expected = before + len(WITHOUT_TOKEN)
    await jwt_relay.await_metric("websocket_refusals_total", expected, reason="token_required")


# The selected subprotocol

TOKEN_AFTER_BEARER = [
    (["bearer", "{}"], "bearer"),
    (["Bearer", "{}"], "Bearer"),  # a browser compares the answer with its offer
    (["BEARER", "{}", "chat"], "chat"),
    (["bearer", "{}", "chat"], "chat"),
    (["chat", "bearer", "{}"], "chat"),
    (["bearer", "{}", "chat.v2", "chat.v1"], "chat.v2"),
    (["chat", "bearer", "{}", "relay.v1"], "relay.v1"),
]
TOKEN_ELSEWHERE = [
    (["{}"], None),
    (["chat", "{}"], "chat"),
    (["{}", "chat"], "chat"),
    (["{}", "bearer"], "bearer"),
]


async def test_a_token_is_never_the_selected_subprotocol(
    jwt_relay: RelayProcess, relay: RelayProcess, channel: str
) -> None:
    for with_tokens in (jwt_relay, relay):
        for offer, selected in TOKEN_AFTER_BEARER:
            encoded = sign_token()
            offered = ", ".join(offer).format(encoded)
            async with await with_tokens.connect_tcp() as raw:
                answer = await raw.upgrade(path_of(channel), Sec_WebSocket_Protocol=offered)
                assert answer.headers["sec-websocket-protocol"] == selected
                assert encoded not in str(answer.headers)


async def test_a_token_at_the_wrong_place_among_the_subprotocols_is_not_selected(
    jwt_relay: RelayProcess, relay: RelayProcess, channel: str
) -> None:
    bearer = f"Bearer {sign_token()}"
    for with_tokens in (jwt_relay, relay):
        for offer, selected in TOKEN_ELSEWHERE:
            encoded = sign_token()
            offered = ", ".join(offer).format(encoded)
            async with await with_tokens.connect_tcp() as raw:
                answer = await raw.upgrade(
                    path_of(channel), Sec_WebSocket_Protocol=offered, Authorization=bearer
                )
                assert answer.headers.get("sec-websocket-protocol") == selected
                assert encoded not in str(answer.headers)


async def test_a_subprotocol_with_dots_is_not_taken_for_a_token(
    relay: RelayProcess, channel: str
) -> None:
    for offered in ("v1.2.3", "eyJ.chat", "com.eyJ.chat"):
        async with relay.client(channel, subprotocols=[Subprotocol(offered)]) as client:
            assert client.subprotocol == offered


async def test_without_authentication_a_token_is_not_verified(
    relay: RelayProcess, channel: str
) -> None:
    await assert_admitted(connect_with_token(relay, channel, "nonsense"))
    offer = [Subprotocol("bearer"), Subprotocol("nonsense")]
    async with relay.client(channel, subprotocols=offer) as client:
        assert client.subprotocol == "bearer"


# Invalid tokens


def unpadded(content: object) -> str:
    return base64url(json.dumps(content).encode())


def after_now(seconds: float) -> int:
    return int(time.time() + seconds)


def without_signature(encoded: str) -> str:
    return encoded.rpartition(".")[0] + "."


def signature_of(encoded: str) -> str:
    return encoded.rpartition(".")[2]


def with_claims(**claims: Any) -> str:
    """Sign claims as they are: without `exp`, and of any type."""
    return signed_as_is(HS256, {"relay": ALL_CHANNELS} | claims)


NO_NUMBERS: list[Any] = ["soon", [], {}, math.inf, math.nan, "9999999999", None]
NO_STRINGS: list[Any] = [None, 5, 1.5, True, [], ["text"], {}]
WRONG_TYPES: dict[str, list[Any]] = {
    "exp": [*NO_NUMBERS, True, False],
    "nbf": ["0", "soon", [], {}, None, True, False, math.inf, -math.inf, math.nan],
    "iat": [*NO_NUMBERS, "0", True, False, -math.inf],
    "iss": NO_STRINGS,
    "sub": NO_STRINGS,
    "jti": NO_STRINGS,
    "aud": [None, 0, False, {}],
}
"""Registered claims (RFC 7519 section 4.1) with values that they must not have."""


WRONG_SIGNATURES: dict[str, Callable[[], str]] = {
    "another secret": lambda: sign_token(OTHER_SECRET),
    "the secret in upper case": lambda: sign_token(SECRET.upper()),
    # Attackers know the public key. Its text must not serve as the secret of an HMAC.
    "a public key as the secret": lambda: signed_as_is(
        HS256, {"relay": ALL_CHANNELS}, make_signer("RS256").public_pem.decode()
    ),
    "none": lambda: without_signature(sign_token()),
    "of another token": lambda: (
        without_signature(sign_token(relay=None)) + signature_of(sign_token())
    ),
    "invented": lambda: without_signature(signed_as_is(HS256, {}, "")) + base64url(b"x" * 32),
}


@pytest.mark.parametrize("case", WRONG_SIGNATURES)
@pytest.mark.fast
async def test_a_wrong_signature_is_refused(case: str) -> None:
    await assert_invalid(verifier_with(), WRONG_SIGNATURES[case](), "signature")


@pytest.mark.fast
async def test_a_token_without_an_accepted_algorithm_is_refused() -> None:
    unsigned = f"{unpadded({'alg': 'none'})}.{unpadded({'relay': ALL_CHANNELS})}."
    names: list[Any] = ["none", "None", "nOnE", "", "HS1", "hs256", "PS256", "Ed25519"]
    not_strings: list[Any] = [None, 5, True, [], ["HS256"], {"HS256": 1}]
    for encoded in (
        unsigned,
        signed_as_is({}, {"relay": ALL_CHANNELS}),
        make_signer("RS256").token(),
        *(signed_as_is({"alg": alg}, {"relay": ALL_CHANNELS}) for alg in names + not_strings),
    ):
        await assert_invalid(verifier_with(), encoded, "algorithm")


@pytest.mark.fast
async def test_an_expired_token_and_one_that_is_not_valid_yet_are_refused() -> None:
    """By default `nbf` has a leeway of 5 s for a clock that is ahead, `exp` has none."""
    for encoded in (
        sign_token(exp=after_now(-1)),
        sign_token(exp=0),
        sign_token(exp=-1e300),
        with_claims(exp=after_now(-1), nbf=after_now(3)),
        signed_as_is(HS256, {"relay": {}, "exp": after_now(-1)}),
    ):
        await assert_invalid(verifier_with(), encoded, "expired")
    for encoded in (sign_token(nbf=after_now(60)), sign_token(nbf=10**400)):
        await assert_invalid(verifier_with(), encoded, "not yet valid")


@pytest.mark.fast
async def test_the_leeway_is_added_to_the_lifetime_of_a_token_at_both_ends() -> None:
    verifier = verifier_with(leeway_s=30)
    expiry = after_now(-20)
    permissions = await verifier.verify(sign_token(exp=expiry, nbf=after_now(20)))
    assert permissions.expires_at == expiry + 30
    await assert_invalid(verifier, sign_token(exp=after_now(-31)), "expired")
    await assert_invalid(verifier, sign_token(nbf=after_now(40)), "not yet valid")


@pytest.mark.fast
async def test_a_token_for_an_audience_is_refused_by_a_relay_without_one() -> None:
    for audience in ("another", ["another"], [], "", 5, True, [5], {"another": 1}):
        await assert_invalid(verifier_with(), with_claims(aud=audience), "unexpected audience")


@pytest.mark.parametrize("claim", WRONG_TYPES)
@pytest.mark.fast
async def test_a_registered_claim_of_the_wrong_type_makes_a_token_malformed(claim: str) -> None:
    for value in WRONG_TYPES[claim]:
        await assert_invalid(verifier_with(), with_claims(**{claim: value}), "malformed")


MALFORMED: dict[str, Callable[[], str]] = {
    "more than 4,300 digits": lambda: signed_as_is(HS256, b'{"exp":' + b"9" * 5000 + b"}"),
    "an additional part": lambda: sign_token() + ".x",
    "a missing part": lambda: sign_token().replace(".", "", 1),
    "not base64": lambda: sign_token() + "!",
    "not ASCII": lambda: sign_token() + "\xe9",
    "too long": lambda: sign_token(padding="x" * 20_000),
    # JSON
    "header not UTF-8": lambda: signed_as_is(b"\xff\xfe", {}),
    "nested header": lambda: signed_as_is(b"[" * 8000, {}),
    "header a list": lambda: signed_as_is([HS256], {}),
    "nested payload": lambda: signed_as_is(HS256, b"[" * 8000),
    "nested objects": lambda: signed_as_is(HS256, b'{"a":' * 1500),
    "payload not UTF-8": lambda: signed_as_is(HS256, b"\xff"),
    "payload empty": lambda: signed_as_is(HS256, b""),
    # Headers that demand what the relay does not support
    "crit": lambda: signed_as_is(HS256 | {"crit": ["exp"], "exp": 1}, {"relay": ALL_CHANNELS}),
    "crit a string": lambda: signed_as_is(HS256 | {"crit": "b64"}, {}),
    "b64 false": lambda: signed_as_is(
        HS256 | {"crit": ["b64"], "b64": False}, {"relay": ALL_CHANNELS}
    ),
    "b64 false, not critical": lambda: signed_as_is(HS256 | {"b64": False}, b""),
}
NO_TOKENS = ("x", ".", "..", "...", "a.b", "a.b.c", "x.e30.", "a" * 40_000, "." * 9000)
NO_OBJECTS: list[Any] = [[], "text", 5, None, True]
NO_KEY_IDS: list[Any] = [5, None, [], {}, True]


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.fast
async def test_a_malformed_token_is_refused(case: str) -> None:
    await assert_invalid(verifier_with(), MALFORMED[case](), "malformed")


@pytest.mark.fast
async def test_text_that_is_no_token_and_json_of_the_wrong_type_are_refused() -> None:
    for encoded in (
        *NO_TOKENS,
        *(signed_as_is(HS256, payload) for payload in NO_OBJECTS),
        *(signed_as_is(HS256 | {"kid": kid}, {"relay": ALL_CHANNELS}) for kid in NO_KEY_IDS),
    ):
        await assert_invalid(verifier_with(), encoded, "malformed")


INVALID: list[Any] = [
    pytest.param(lambda: sign_token(OTHER_SECRET), "signature", id="signature"),
    pytest.param(lambda: make_signer("RS256").token(), "algorithm", id="algorithm"),
    pytest.param(lambda: sign_token(exp=after_now(-1)), "expired", id="expired"),
    pytest.param(lambda: sign_token(nbf=after_now(60)), "not yet valid", id="not yet valid"),
    pytest.param(lambda: with_claims(aud="another"), "unexpected audience", id="audience"),
    pytest.param(lambda: "a" * 40_000, "malformed", id="too long"),
    pytest.param(lambda: sign_token() + "\xe9", "malformed", id="not ASCII"),
    pytest.param(lambda: signed_as_is(HS256, b"[" * 8000), "malformed", id="nested"),
]


@pytest.mark.parametrize(("encode", "problem"), INVALID)
async def test_an_invalid_token_is_refused_before_the_upgrade(
    jwt_relay: RelayProcess, channel: str, encode: Callable[[], str], problem: str
) -> None:
    before = await jwt_relay.metric("websocket_refusals_total", reason="invalid_token")
    async with await jwt_relay.connect_tcp() as raw:
        await raw.send(upgrade_request(path_of(channel), Authorization=f"Bearer {encode()}"))
        answer = await raw.read_response()
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'
        body = await raw.read_exactly(int(answer.headers["content-length"]))
        assert body.decode() == f"invalid token: {problem}\n"
    await jwt_relay.await_metric("websocket_refusals_total", before + 1, reason="invalid_token")


# Audience, issuer, algorithms, times


@pytest.mark.fast
async def test_the_required_audience_and_issuer_are_verified() -> None:
    verifier = verifier_with(audience="the relay", issuer="https://issuer.example")
    required: dict[str, Any] = {"aud": "the relay", "iss": "https://issuer.example"}
    wrong_audiences: list[Any] = [
        "another",
        ["another", "the relay and more"],
        None,
        [],
        5,
        [5, "the relay"],
    ]
    for audience in wrong_audiences:
        claims = required | {"aud": audience}
        await assert_invalid(verifier, sign_token(**claims), "wrong audience")
    for issuer in (None, "https://issuer.example/"):
        await assert_invalid(verifier, sign_token(**required | {"iss": issuer}), "wrong issuer")
    for right_audience in ("the relay", ["the relay"], ["another", "the relay"]):
        await verifier.verify(sign_token(**required | {"aud": right_audience}))


@pytest.mark.fast
async def test_one_of_several_audiences_and_issuers_is_enough() -> None:
    verifier = verifier_with(audience=["one", "two"], issuer=["https://a", "https://b"])
    for audience, issuer in (("one", "https://b"), (["other", "two"], "https://a")):
        await verifier.verify(sign_token(aud=audience, iss=issuer))
    await assert_invalid(verifier, sign_token(aud="other", iss="https://a"), "wrong audience")
    for wrong in (None, "https://c", "https://a,https://b"):
        await assert_invalid(verifier, sign_token(aud="one", iss=wrong), "wrong issuer")


@pytest.mark.fast
async def test_each_of_several_secrets_verifies_tokens() -> None:
    third = "a third secret of sixty-four bytes, which one setting alone has: 3"
    for settings in (
        {"secrets": [OTHER_SECRET]},
        {"secret": "", "secrets": [SECRET, OTHER_SECRET]},
    ):
        verifier = verifier_with(**settings)
        for secret in (SECRET, OTHER_SECRET):
            await verifier.verify(sign_token(secret))
            await assert_invalid(verifier, sign_token(secret, exp=1), "expired")
        for wrong in (third, ""):
            await assert_invalid(verifier, signed_as_is(HS256, {"relay": {}}, wrong), "signature")


async def test_a_relay_with_an_audience_admits_tokens_for_it_only(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(auth=jwt_settings(audience="the relay", issuer="https://issuer.example"))
    issuer = "https://issuer.example"
    await assert_admitted(
        connect_with_token(relay, channel, sign_token(aud="the relay", iss=issuer))
    )
    answer = await refusal_answer(
        connect_with_token(relay, channel, sign_token(aud="another", iss=issuer))
    )
    assert_invalid_token(answer, "wrong audience")


@pytest.mark.fast
async def test_claims_that_are_not_checked_do_not_make_a_token_invalid() -> None:
    for claims in (
        {"iss": "https://any.example", "sub": "me"},
        {"nbf": after_now(3)},  # the issuer's clock is ahead
        {"iat": after_now(600)},
        {"iat": 10**400, "nbf": -(10**400)},
        {"iat": 0.5, "nbf": -0.5},
        {"iss": "", "sub": "", "jti": ""},
    ):
        permissions = await verifier_with().verify(with_claims(exp=after_now(60), **claims))
        assert permissions.may_publish("news")


@pytest.mark.fast
async def test_a_secret_verifies_every_accepted_hmac_algorithm_and_no_other() -> None:
    for algorithm in HMAC_ALGORITHMS:
        await verifier_with().verify(sign_token(algorithm=algorithm))
        await assert_invalid(verifier_with(), sign_token(OTHER_SECRET, algorithm), "signature")
    only_hs512 = verifier_with(algorithms=["HS512"])
    await only_hs512.verify(sign_token(algorithm="HS512"))
    await assert_invalid(only_hs512, sign_token(algorithm="HS256"), "algorithm")


# Permissions

PATTERNS = [
    (["news"], "news", True),
    (["news"], "newsletter", False),
    (["news"], "new", False),
    (["chat.*"], "chat.lobby", True),
    (["chat.*"], "chat.", True),
    (["chat.*"], "chat", False),
    (["chat.*"], "chatXroom", False),  # a dot is literal
    (["*"], "anything", True),
    (["a*z"], "abcz", False),  # a star is literal unless it is the last character
    (["*.news"], "my.news", False),
    (["**"], "anything", False),
    (["c?at"], "chat", False),
    ([".*"], "chat", False),
    (["other", "chat.*", "news"], "news", True),
    (["News"], "news", False),
    ([""], "news", False),
    ([], "news", False),
]


@pytest.mark.parametrize(("patterns", "name", "is_permitted"), PATTERNS)
@pytest.mark.fast
def test_a_pattern_is_a_name_or_a_prefix_with_a_trailing_star(
    patterns: list[str], name: str, is_permitted: bool
) -> None:
    permissions = Permissions.of({"relay": {"subscribe": patterns, "publish": patterns}}, None)
    assert permissions.may_subscribe(name) is is_permitted
    assert permissions.may_publish(name) is is_permitted


@pytest.mark.fast
def test_a_malformed_claim_permits_nothing() -> None:
    malformed: list[Any] = [
        None,
        "*",
        ["*"],
        5,
        {},
        {"subscribe": "*", "publish": "*"},
        {"subscribe": None, "publish": None},
        {"subscribe": {"*": True}},
        {"subscribe": [["*"], 5, None, {"*": 1}]},
        {"Subscribe": ["*"]},
    ]
    for claim in malformed:
        permissions = Permissions.of({"relay": claim}, None)
        assert not permissions.may_subscribe("news"), claim
        assert not permissions.may_publish("news"), claim
    assert not Permissions.of({"relay": {"publish": ["*"]}}, None).may_subscribe("news")


NEWS: dict[str, Any] = {"subscribe": ["news"], "publish": ["chat.*"], "stats": True}
URL_CLAIM = "https://example.com/relay"
SCOPES = "openid relay:subscribe:news relay:publish:chat.* relay:stats"
PLACES: list[tuple[str, dict[str, Any]]] = [
    ("relay", {"relay": json.dumps(NEWS)}),
    ("relay", {"relay": f" {json.dumps(NEWS)}"}),
    (URL_CLAIM, {URL_CLAIM: NEWS, "relay": {}}),
    (f"{URL_CLAIM}.v1", {URL_CLAIM: {"v1": NEWS}}),
    ("app_metadata.relay", {"app_metadata": {"relay": NEWS}}),
    ("app_metadata.relay", {"app_metadata.relay": NEWS, "app_metadata": {"relay": {}}}),
    ("a.b.c.d", {"a.b": {"c.d": json.dumps(NEWS)}, "a": {"b": {"c": {"d": {}}}}}),
    ("scope", {"scope": SCOPES}),
    ("permissions", {"permissions": [*SCOPES.split(), 5, None]}),
]
"""Settings of auth.jwt.claim, and claims that permit the same."""


@pytest.mark.parametrize(("path", "claims"), PLACES)
@pytest.mark.fast
def test_permissions_may_be_in_any_claim_as_an_object_as_text_or_as_scopes(
    path: str, claims: dict[str, Any]
) -> None:
    expected = Permissions(("news",), ("chat.*",), None, stats=True)
    assert Permissions.of(claims, None, path) == expected


@pytest.mark.fast
def test_a_claim_in_another_place_or_form_permits_nothing() -> None:
    for path, claims in (
        ("relay", {"app_metadata": {"relay": NEWS}}),
        ("app_metadata.relay", {"relay": NEWS, "app_metadata": json.dumps({"relay": NEWS})}),
        (".relay", {"relay": NEWS}),
        ("relay.", {"relay": NEWS}),
        ("relay", {"relay": "{" + "[" * 100_000}),
        ("relay", {"relay": json.dumps([NEWS])}),
        ("scope", {"scope": "relay:subscribe relay:Subscribe:news subscribe:news relay:admins"}),
        ("scope", {"scope": "xrelay:subscribe:news"}),
    ):
        assert Permissions.of(claims, None, path).is_empty, claims


@pytest.mark.fast
async def test_the_log_has_why_a_token_permits_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", verifier_module.__name__)
    for claim, problem in (
        ("relay", "it names no permission"),
        ("x.y", "the token has no such claim"),
    ):
        caplog.clear()
        await verifier_with(claim=claim).verify(sign_token(relay={"Subscribe": ["secret-name"]}))
        (record,) = caplog.records
        assert record.getMessage() == "token permits nothing"
        assert (vars(record)["claim"], vars(record)["problem"]) == (claim, problem)
        assert "secret-name" not in str(vars(record))


async def test_a_client_is_admitted_only_to_channels_that_its_token_permits(
    jwt_relay: RelayProcess,
) -> None:
    claim = {"subscribe": ["news", "chat.*"], "publish": ["news", "chat.*"]}
    for name in ("news", "chat.lobby"):
        await assert_admitted(connect_with_token(jwt_relay, name, sign_token(relay=claim)))
    before = await jwt_relay.metric("websocket_refusals_total", reason="not_authorized")
    for name, encoded in (
        ("newsletter", sign_token(relay=claim)),
        ("news", sign_token(relay={"publish": ["*"]})),
        ("news", sign_token(relay=None)),
    ):
        answer = await refusal_answer(connect_with_token(jwt_relay, name, encoded))
        assert answer.status_code == 403
        assert bytes(answer.body or b"") == b"not authorized for this channel\n"
    await jwt_relay.await_metric("websocket_refusals_total", before + 3, reason="not_authorized")


async def test_the_root_requires_permission_for_the_channel_default(
    jwt_relay: RelayProcess,
) -> None:
    claim = {"subscribe": ["default"], "publish": ["default"]}
    await assert_admitted(connect_with_token(jwt_relay, None, sign_token(relay=claim)))
    elsewhere = sign_token(relay={"subscribe": ["news"]})
    assert (await refusal_answer(connect_with_token(jwt_relay, None, elsewhere))).status_code == 403


async def test_a_client_without_permission_to_publish_is_closed_at_its_first_message(
    jwt_relay: RelayProcess, channel: str
) -> None:
    only_subscribe = sign_token(relay={"subscribe": ["*"], "publish": ["other"]})
    async with (
        connect_with_token(jwt_relay, channel, sign_token()) as publisher,
        connect_with_token(jwt_relay, channel, only_subscribe) as subscriber,
    ):
        await publisher.send("hello")
        assert await receive(subscriber) == "hello"
        await subscriber.send("not permitted")
        assert await await_close(subscriber) == NOT_ALLOWED
        await publisher.send("still connected")
        assert [await receive(publisher) for _ in range(2)] == ["hello", "still connected"]


async def test_permission_to_publish_is_checked_for_each_channel(
    jwt_relay: RelayProcess, channel: str
) -> None:
    encoded = sign_token(relay={"subscribe": ["*"], "publish": [f"{channel}-open*"]})
    await assert_admitted(connect_with_token(jwt_relay, f"{channel}-open-1", encoded))
    async with connect_with_token(jwt_relay, f"{channel}-closed", encoded) as client:
        await client.send("not permitted")
        assert await await_close(client) == NOT_ALLOWED


async def test_a_message_in_the_same_packet_as_the_request_needs_permission_to_publish(
    jwt_relay: RelayProcess, channel: str
) -> None:
    bearer = f"Bearer {sign_token(relay={'subscribe': ['*']})}"
    async with await jwt_relay.connect_tcp() as raw:
        early = frame(TEXT, b"early")
        await raw.upgrade(path_of(channel), trailing=early, Authorization=bearer)
        assert await raw.read_close_frame() == NOT_ALLOWED


# Expiry


async def test_a_client_is_closed_when_its_token_expires_and_its_later_messages_are_not_relayed(
    jwt_relay: RelayProcess, channel: str
) -> None:
    expiry = int(time.time()) + 3
    bearer = f"Bearer {sign_token(exp=expiry)}"
    async with (
        connect_with_token(jwt_relay, channel, sign_token(exp=None)) as unlimited,
        connect_with_token(jwt_relay, channel, sign_token(exp=expiry)) as expiring,
        raw_websocket(HOST, jwt_relay.port, path_of(channel), Authorization=bearer) as sending_on,
    ):
        await expiring.send("hello")
        assert await receive(expiring) == "hello"
        assert await receive(unlimited) == "hello"
        assert await await_close(expiring) == (3000, "token expired")
        assert time.time() >= expiry
        assert await sending_on.read_close_frame() == (3000, "token expired")
        await sending_on.send(frame(TEXT, b"too late") + frame(CLOSE, close_payload(3000)))
        assert await sending_on.read_to_end() == b""
        await unlimited.send("still connected")
        assert await receive(unlimited) == "still connected"
    await jwt_relay.await_metric_at_least("websocket_closes_total", 2, reason="token_expired")


async def test_a_connection_ends_with_its_token_and_the_leeway(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(auth=jwt_settings(leeway_s=2))
    expiry = int(time.time())
    async with connect_with_token(relay, channel, sign_token(exp=expiry)) as client:
        assert await await_close(client) == (3000, "token expired")
        assert time.time() >= expiry + 2


async def test_a_token_may_expire_in_the_far_future(jwt_relay: RelayProcess, channel: str) -> None:
    for expiry in (b"1e300", b"9" * 400, b"253402300799", b"4102444800.5"):
        payload = b'{"relay":' + json.dumps(ALL_CHANNELS).encode() + b',"exp":' + expiry + b"}"
        await assert_admitted(connect_with_token(jwt_relay, channel, signed_as_is(HS256, payload)))


# Tokens are not revealed


async def listening_port(relay: RelayProcess) -> int:
    """Wait until a relay listens on its only port, whatever the format of its log."""

    async def listening_ports() -> tuple[bool, object]:
        ports = relay.listening_ports()
        return len(ports) == 1, ports

    await eventually(listening_ports, "one port")
    (port,) = relay.listening_ports()
    return port


@pytest.mark.parametrize("log_format", ["json", "text"])
async def test_answers_and_log_contain_no_part_of_a_token(
    tmp_path: Path, channel: str, log_format: str
) -> None:
    secret_claim = "very-secret-subject"
    tokens = [
        sign_token(sub=secret_claim),
        sign_token(OTHER_SECRET, sub=secret_claim),
        sign_token(exp=1, sub=secret_claim),
        sign_token(relay=None, sub=secret_claim),
        signed_as_is(HS256 | {"kid": 5}, {"sub": secret_claim}),
    ]
    settings = {
        "auth": jwt_settings(),
        "logging": {"level": "debug", "format": log_format},
        "metrics": {"enabled": False},
    }
    relay = RelayProcess(tmp_path, settings)
    relay.start()
    try:
        port = await listening_port(relay)
        answers = b""
        for encoded in tokens:
            query = f"{path_of(channel)}?access_token={encoded}"
            plain = f"GET {query} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()
            offer = {"Sec-WebSocket-Protocol": f"bearer, {encoded}"}
            bearer = {"Authorization": f"Bearer {encoded}"}
            for request in (
                plain,
                upgrade_request(query) + frame(CLOSE),
                upgrade_request(path_of(channel), **offer) + frame(CLOSE),
                upgrade_request(path_of(channel), **bearer) + frame(CLOSE),
            ):
                async with await RawClient.connect(HOST, port) as raw:
                    await raw.send(request)
                    answers += await raw.read_to_end()
        await relay.stop()
    finally:
        relay.end()
    assert answers.count(b"HTTP/1.1 101") == 3
    places = {"answers": answers.decode("latin-1"), "log": "\n".join(relay.log_lines)}
    assert "ready" in places["log"]
    for place, text in places.items():
        for hidden in (secret_claim, SECRET, *(part for t in tokens for part in t.split("."))):
            assert hidden not in text, place


async def test_the_metrics_page_contains_no_part_of_a_token(
    jwt_relay: RelayProcess, channel: str
) -> None:
    tokens = [sign_token(sub="secret"), sign_token(OTHER_SECRET, sub="secret")]
    await assert_admitted(connect_with_token(jwt_relay, channel, tokens[0]))
    await refusal_answer(jwt_relay.client(path=f"{path_of(channel)}?access_token={tokens[1]}"))
    await jwt_relay.get(f"/?access_token={tokens[0]}")
    page = (await jwt_relay.get_metrics()).text
    assert "websocket_refusals_total" in page
    assert not [part for t in tokens for part in t.split(".") if part in page]
