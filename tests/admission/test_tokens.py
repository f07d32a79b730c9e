"""Tokens: without a good one nobody comes in, and what it allows is all that may be done."""

import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from tests.support import browser
from tests.support.admission import HMAC, assert_bad, bearing, guarding, refused, works
from tests.support.issuer import (
    EVERYTHING,
    OTHER_SECRET,
    SECRET,
    hand_made,
    in_base64,
    signer,
    token,
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
    Relay,
    StartRelay,
    closed,
    eventually,
    path_of,
    receive,
)

HS256 = {"alg": "HS256", "typ": "JWT"}


@pytest.fixture(scope="module")
def shared_guarded_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    with Relay(tmp_path_factory.mktemp("guarded"), {"auth": guarding()}) as relay:
        yield relay


@pytest.fixture
async def guarded_relay(shared_guarded_relay: Relay) -> AsyncIterator[Relay]:
    """A relay that asks for tokens signed with the secret."""
    await shared_guarded_relay.metric_is("websocket_connected_clients", 0)
    yield shared_guarded_relay
    assert shared_guarded_relay.complaints == []


@pytest.fixture(scope="module")
def strict_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay that asks for an audience and an issuer."""
    auth = guarding(audience="the relay", issuer="https://issuer.example")
    with Relay(tmp_path_factory.mktemp("strict"), {"auth": auth}) as relay:
        yield relay


# Three ways to bring it


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
async def test_a_token_in_the_authorization_header_lets_in(
    guarded_relay: Relay, channel: str, scheme: str
) -> None:
    headers = {"Authorization": f"{scheme} {token()}"}
    await works(guarded_relay.client(channel, additional_headers=headers))


@pytest.mark.parametrize(
    "query", ["access_token={}", "a=b&access_token={}&c=d", "&access_token={}"]
)
async def test_a_token_in_the_query_lets_in(guarded_relay: Relay, channel: str, query: str) -> None:
    path = f"{path_of(channel)}?{query.format(token())}"
    await works(guarded_relay.client(path=path))


async def test_a_token_that_is_escaped_in_the_query_lets_in(
    guarded_relay: Relay, channel: str
) -> None:
    escaped = token().replace(".", "%2E").replace("e", "%65")
    await works(guarded_relay.client(path=f"{path_of(channel)}?access_token={escaped}"))


async def test_a_token_among_the_subprotocols_lets_in(guarded_relay: Relay, channel: str) -> None:
    offer = [Subprotocol("bearer"), Subprotocol(token())]
    await works(guarded_relay.client(channel, subprotocols=offer))


async def test_the_header_goes_before_the_query_and_the_query_before_the_subprotocols(
    guarded_relay: Relay, channel: str
) -> None:
    good, bad = token(), token(OTHER_SECRET)

    def ways(header: str, query: str, subprotocol: str) -> connect:
        return guarded_relay.client(
            path=f"{path_of(channel)}?access_token={query}" if query else path_of(channel),
            additional_headers={"Authorization": header} if header else {},
            subprotocols=[Subprotocol("bearer"), Subprotocol(subprotocol)],
        )

    await works(ways(f"Bearer {good}", bad, bad))
    await works(ways("", good, bad))
    await works(ways("Basic dXNlcjpwYXNz", good, bad))
    await works(ways("Bearer ", "", good))
    assert_bad(await refused(ways(f"Bearer {bad}", good, good)), "signature")
    assert_bad(await refused(ways("", bad, good)), "signature")


@pytest.mark.parametrize("second", ["Bearer {good}", "Bearer {bad}", "Basic YTpi", ""])
async def test_more_than_one_authorization_is_refused(
    guarded_relay: Relay, channel: str, second: str
) -> None:
    """A proxy may have looked at the other one."""
    good, bad = token(), token(OTHER_SECRET)
    other = second.format(good=good, bad=bad)
    lines = [("Authorization", f"Bearer {good}"), ("Authorization", other)]
    for both in (lines, lines[::-1]):
        attempt = guarded_relay.client(channel, additional_headers=both)
        assert_bad(await refused(attempt), "malformed")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"additional_headers": {"Authorization": "Bearer "}}, id="empty header"),
        pytest.param({"additional_headers": {"Authorization": "Basic YTpi"}}, id="other scheme"),
        pytest.param({"additional_headers": {"Authorization": "Bearer"}}, id="scheme alone"),
        pytest.param({"path": "/?access_token="}, id="empty parameter"),
        pytest.param({"path": "/?token=abc"}, id="other parameter"),
        pytest.param({"path": "/?xaccess_token=abc"}, id="parameter that ends like it"),
        pytest.param({"subprotocols": ["bearer"]}, id="subprotocol alone"),
        pytest.param({"subprotocols": ["chat", "bearer"]}, id="subprotocol at the end"),
    ],
)
async def test_without_a_token_nobody_comes_in(
    guarded_relay: Relay, options: dict[str, Any]
) -> None:
    before = await guarded_relay.metric("websocket_refusals_total", reason="no_token")
    answer = await refused(guarded_relay.client(**options))
    assert answer.status_code == 401
    assert bytes(answer.body or b"") == b"token required\n"
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    await guarded_relay.metric_is("websocket_refusals_total", before + 1, reason="no_token")


# What is answered to subprotocols

OFFERS = [
    pytest.param(["bearer", "{}"], "bearer", id="bearer"),
    pytest.param(["bearer", "{}", "chat"], "chat", id="another behind"),
    pytest.param(["chat", "bearer", "{}"], "chat", id="another in front"),
    pytest.param(["bearer", "{}", "chat.v2", "chat.v1"], "chat.v2", id="the first"),
    pytest.param(["chat", "bearer", "{}", "relay.v1"], "relay.v1", id="the relay's own"),
]


@pytest.mark.parametrize(("offer", "selected"), OFFERS)
@pytest.mark.parametrize("mode", ["jwt", "none"])
async def test_the_token_is_never_the_subprotocol_that_is_selected(
    guarded_relay: Relay,
    relay: Relay,
    channel: str,
    mode: str,
    offer: list[str],
    selected: str,
) -> None:
    brought = token()
    offered = ", ".join(offer).format(brought)
    async with await (guarded_relay if mode == "jwt" else relay).tcp() as raw:
        answer = await raw.upgrade(path_of(channel), Sec_WebSocket_Protocol=offered)
        assert answer.headers["sec-websocket-protocol"] == selected
        assert brought not in str(answer.headers)


MISPLACED = [
    pytest.param(["{}"], None, id="alone"),
    pytest.param(["chat", "{}"], "chat", id="at the end"),
    pytest.param(["{}", "chat"], "chat", id="in front"),
    pytest.param(["{}", "bearer"], "bearer", id="in front of bearer"),
]


@pytest.mark.parametrize(("offer", "selected"), MISPLACED)
@pytest.mark.parametrize("mode", ["jwt", "none"])
async def test_a_token_that_stands_in_the_wrong_place_is_not_selected(
    guarded_relay: Relay,
    relay: Relay,
    channel: str,
    mode: str,
    offer: list[str],
    selected: str | None,
) -> None:
    brought = token()
    offered = ", ".join(offer).format(brought)
    bearer = f"Bearer {token()}"
    async with await (guarded_relay if mode == "jwt" else relay).tcp() as raw:
        answer = await raw.upgrade(
            path_of(channel), Sec_WebSocket_Protocol=offered, Authorization=bearer
        )
        assert answer.headers.get("sec-websocket-protocol") == selected
        assert brought not in str(answer.headers)


async def test_a_subprotocol_with_dots_is_no_token(relay: Relay, channel: str) -> None:
    for offered in ("v1.2.3", "eyJ.chat", "com.eyJ.chat"):
        async with relay.client(channel, subprotocols=[Subprotocol(offered)]) as client:
            assert client.subprotocol == offered


async def test_without_tokens_a_bearer_is_not_verified(relay: Relay, channel: str) -> None:
    await works(bearing(relay, channel, "nonsense"))
    offer = [Subprotocol("bearer"), Subprotocol("nonsense")]
    async with relay.client(channel, subprotocols=offer) as client:
        assert client.subprotocol == "bearer"


async def test_a_browser_comes_in_with_a_token(guarded_relay: Relay, channel: str) -> None:
    script = """([url, protocols]) => new Promise((resolve, reject) => {
        const socket = new WebSocket(url, protocols);
        socket.onopen = () => socket.send("from a browser");
        socket.onmessage = (event) => { resolve([socket.protocol, event.data]); socket.close(); };
        socket.onerror = () => reject(new Error("not let in"));
    })"""
    url = guarded_relay.ws_url(path_of(channel))
    async with browser.page() as page:
        said = [
            await page.evaluate(script, [url, ["bearer", token(), *more]])
            for more in ([], ["chat"])
        ]
    assert said == [["bearer", "from a browser"], ["chat", "from a browser"]]


# What is not accepted


def unpadded(content: object) -> str:
    return in_base64(json.dumps(content).encode())


def later(seconds: float) -> int:
    return int(time.time() + seconds)


def public_key_as_secret() -> str:
    """Sign with a public key's text, which attackers have, as if it were the secret."""
    return hand_made(HS256, {"relay": EVERYTHING}, signer("RS256").public_pem.decode())


NO_TIMES: list[Any] = ["soon", [], {}, math.inf, math.nan, "9999999999", None]
NO_TEXTS: list[Any] = [None, 5, 1.5, True, [], ["text"], {}]
WRONG_TYPES: dict[str, list[Any]] = {
    "exp": [True, False],
    "nbf": ["0", "soon", [], {}, None, True, False, math.inf, -math.inf, math.nan],
    "iat": [*NO_TIMES, "0", True, False, -math.inf],
    "iss": NO_TEXTS,
    "sub": NO_TEXTS,
    "jti": NO_TEXTS,
    "aud": [None, 0, False, {}],
}
NO_OBJECTS: list[Any] = [[], "text", 5, None, True]
NO_KEY_IDS: list[Any] = [5, None, [], {}, True]
BAD: list[Any] = [
    # Signatures
    pytest.param(lambda: token(OTHER_SECRET), "signature", id="other secret"),
    pytest.param(lambda: token(SECRET.upper()), "signature", id="secret in other case"),
    pytest.param(public_key_as_secret, "signature", id="public key as secret"),
    pytest.param(lambda: token().rpartition(".")[0] + ".", "signature", id="no signature"),
    pytest.param(
        lambda: token(relay=None).rpartition(".")[0] + "." + token().rpartition(".")[2],
        "signature",
        id="another token's signature",
    ),
    pytest.param(
        lambda: hand_made(HS256, {}, "").rpartition(".")[0] + "." + in_base64(b"x" * 32),
        "signature",
        id="made up signature",
    ),
    # Algorithms
    pytest.param(
        lambda: f"{unpadded({'alg': 'none'})}.{unpadded({'relay': EVERYTHING})}.",
        "algorithm",
        id="none",
    ),
    *(
        pytest.param(partial(hand_made, {"alg": alg}, {"relay": EVERYTHING}), "algorithm")
        for alg in ("none", "None", "nOnE", "", "HS1", "hs256", "PS256", "ES256K")
    ),
    *(
        pytest.param(
            partial(hand_made, {"alg": alg}, {"relay": EVERYTHING}),
            "algorithm",
            id=f"alg {alg!r}",
        )
        for alg in (None, 5, True, [], ["HS256"], {"HS256": 1})
    ),
    pytest.param(lambda: hand_made({}, {"relay": EVERYTHING}), "algorithm", id="no alg"),
    pytest.param(lambda: signer("RS256").token(), "algorithm", id="not configured"),
    # Times
    pytest.param(lambda: token(exp=later(-1)), "expired", id="expired"),
    pytest.param(lambda: token(exp=0), "expired", id="expired long ago"),
    pytest.param(lambda: token(exp=-1e300), "expired", id="expired before time began"),
    pytest.param(lambda: token(nbf=later(60)), "not yet valid", id="nbf"),
    *(
        pytest.param(partial(hand_made, HS256, {"exp": exp}), "malformed", id=f"exp {exp!r}")
        for exp in NO_TIMES
    ),
    pytest.param(
        lambda: hand_made(HS256, b'{"exp":' + b"9" * 5000 + b"}"), "malformed", id="5000 digits"
    ),
    pytest.param(lambda: token(nbf=10**400), "not yet valid", id="nbf past all bounds"),
    # For somebody else, and be it nobody
    *(
        pytest.param(
            partial(hand_made, HS256, {"relay": EVERYTHING, "aud": aud}),
            "unexpected audience",
            id=f"aud {aud!r}",
        )
        for aud in ("somebody", ["somebody"], [], "", 5, True, [5], {"somebody": 1})
    ),
    # Claims of the wrong type (RFC 7519 section 4.1)
    *(
        pytest.param(
            partial(hand_made, HS256, {"relay": EVERYTHING, name: value}),
            "malformed",
            id=f"{name} {value!r}",
        )
        for name, values in WRONG_TYPES.items()
        for value in values
    ),
    # No token at all
    *(
        pytest.param(partial(str, text), "malformed", id=f"text {text[:12]!r}")
        for text in ("x", ".", "..", "...", "a.b", "a.b.c", "x.e30.", "a" * 40_000, "." * 9000)
    ),
    pytest.param(lambda: token() + ".x", "malformed", id="a part too many"),
    pytest.param(lambda: token().replace(".", "", 1), "malformed", id="a part too few"),
    pytest.param(lambda: token() + "!", "malformed", id="no base64"),
    pytest.param(lambda: token() + "\xe9", "malformed", id="no ASCII"),
    pytest.param(lambda: token(padding="x" * 20_000), "malformed", id="too long"),
    # No JSON, or too much of it
    pytest.param(lambda: hand_made(b"\xff\xfe", {}), "malformed", id="header no UTF-8"),
    pytest.param(lambda: hand_made(b"[" * 8000, {}), "malformed", id="nested header"),
    pytest.param(lambda: hand_made([HS256], {}), "malformed", id="header a list"),
    pytest.param(lambda: hand_made(HS256, b"[" * 8000), "malformed", id="nested payload"),
    pytest.param(lambda: hand_made(HS256, b'{"a":' * 1500), "malformed", id="nested objects"),
    pytest.param(lambda: hand_made(HS256, b"\xff"), "malformed", id="payload no UTF-8"),
    pytest.param(lambda: hand_made(HS256, b""), "malformed", id="payload empty"),
    *(
        pytest.param(partial(hand_made, HS256, body), "malformed", id=f"payload {body!r}")
        for body in NO_OBJECTS
    ),
    # Headers that ask for what the relay does not do
    pytest.param(
        lambda: hand_made(HS256 | {"crit": ["exp"], "exp": 1}, {"relay": EVERYTHING}),
        "malformed",
        id="crit",
    ),
    pytest.param(lambda: hand_made(HS256 | {"crit": "b64"}, {}), "malformed", id="crit a text"),
    pytest.param(
        lambda: hand_made(HS256 | {"crit": ["b64"], "b64": False}, {"relay": EVERYTHING}),
        "malformed",
        id="b64 false",
    ),
    pytest.param(
        lambda: hand_made(HS256 | {"b64": False}, b""), "malformed", id="b64 false, not critical"
    ),
    *(
        pytest.param(
            partial(hand_made, HS256 | {"kid": kid}, {"relay": EVERYTHING}),
            "malformed",
            id=f"kid {kid!r}",
        )
        for kid in NO_KEY_IDS
    ),
]


@pytest.mark.parametrize(("make", "detail"), BAD)
async def test_a_token_that_is_not_good_is_refused_before_the_upgrade(
    guarded_relay: Relay, channel: str, make: Callable[[], str], detail: str
) -> None:
    before = await guarded_relay.metric("websocket_refusals_total", reason="bad_token")
    async with await guarded_relay.tcp() as raw:
        await raw.send(upgrade_request(path_of(channel), Authorization=f"Bearer {make()}"))
        answer = await raw.response()
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'
        body = await raw.exactly(int(answer.headers["content-length"]))
        assert body.decode() == f"invalid token: {detail}\n"
    await guarded_relay.metric_is("websocket_refusals_total", before + 1, reason="bad_token")


async def test_a_bad_token_is_refused_in_all_three_ways(guarded_relay: Relay) -> None:
    bad = token(OTHER_SECRET)
    for attempt in (
        bearing(guarded_relay, None, bad),
        guarded_relay.client(path=f"/?access_token={bad}"),
        guarded_relay.client(subprotocols=[Subprotocol("bearer"), Subprotocol(bad)]),
    ):
        assert_bad(await refused(attempt), "signature")


@pytest.mark.parametrize(
    ("claims", "detail"),
    [
        ({"aud": "somebody"}, "wrong audience"),
        ({"aud": ["somebody", "the relay and more"]}, "wrong audience"),
        ({"aud": None}, "wrong audience"),
        ({"aud": []}, "wrong audience"),
        ({"aud": 5}, "wrong audience"),
        ({"aud": [5, "the relay"]}, "wrong audience"),
        ({"iss": None}, "wrong issuer"),
        ({"iss": "https://issuer.example/"}, "wrong issuer"),
    ],
)
async def test_the_audience_and_the_issuer_have_to_be_right(
    strict_relay: Relay, channel: str, claims: dict[str, Any], detail: str
) -> None:
    right = {"aud": "the relay", "iss": "https://issuer.example"}
    answer = await refused(bearing(strict_relay, channel, token(**(right | claims))))
    assert_bad(answer, detail)


@pytest.mark.parametrize("audience", ["the relay", ["the relay"], ["somebody", "the relay"]])
async def test_the_right_audience_and_issuer_let_in(
    strict_relay: Relay, channel: str, audience: str | list[str]
) -> None:
    right = token(aud=audience, iss="https://issuer.example")
    await works(bearing(strict_relay, channel, right))


async def test_an_issuer_that_nobody_asks_for_does_no_harm(
    guarded_relay: Relay, channel: str
) -> None:
    await works(bearing(guarded_relay, channel, token(iss="https://anybody.example", sub="me")))


@pytest.mark.parametrize(
    "claims",
    [
        pytest.param({"nbf": later(3)}, id="valid in a moment, by a clock that is ahead"),
        pytest.param({"iat": later(600)}, id="made in ten minutes"),
        pytest.param({"iat": 10**400, "nbf": -(10**400)}, id="times past all bounds"),
        pytest.param({"iat": 0.5, "nbf": -0.5}, id="parts of seconds"),
        pytest.param({"iss": "", "sub": "", "jti": ""}, id="texts that say nothing"),
    ],
)
async def test_what_is_not_asked_of_a_token_does_no_harm(
    guarded_relay: Relay, channel: str, claims: dict[str, Any]
) -> None:
    body = {"relay": EVERYTHING, "exp": later(60)} | claims
    await works(bearing(guarded_relay, channel, hand_made(HS256, body)))


async def test_a_clock_that_is_behind_lets_nobody_stay_longer(
    guarded_relay: Relay, channel: str
) -> None:
    """There is no leeway for exp, and it counts before rights do."""
    for rights in (EVERYTHING, {}):
        body = {"relay": rights, "exp": later(-1), "nbf": later(3)}
        answer = await refused(bearing(guarded_relay, channel, hand_made(HS256, body)))
        assert_bad(answer, "expired")


@pytest.mark.parametrize("algorithm", HMAC)
async def test_the_secret_checks_every_algorithm_of_its_kind(
    guarded_relay: Relay, channel: str, algorithm: str
) -> None:
    await works(bearing(guarded_relay, channel, token(algorithm=algorithm)))
    answer = await refused(bearing(guarded_relay, channel, token(OTHER_SECRET, algorithm)))
    assert_bad(answer, "signature")


async def test_an_algorithm_of_the_same_kind_that_is_not_listed_is_refused(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(auth=guarding(algorithms=["HS512"]))
    await works(bearing(relay, channel, token(algorithm="HS512")))
    assert_bad(await refused(bearing(relay, channel, token(algorithm="HS256"))), "algorithm")


# Rights

REACH = [
    pytest.param(["news"], "news", True, id="the name"),
    pytest.param(["news"], "newsletter", False, id="only the name"),
    pytest.param(["news"], "new", False, id="not its beginning"),
    pytest.param(["chat.*"], "chat.room", True, id="the rest"),
    pytest.param(["chat.*"], "chat.", True, id="no rest"),
    pytest.param(["chat.*"], "chat", False, id="less than the pattern"),
    pytest.param(["chat.*"], "chatXroom", False, id="a dot is a dot"),
    pytest.param(["*"], "anything", True, id="everything"),
    pytest.param(["a*z"], "abcz", False, id="a star in the middle"),
    pytest.param(["*.news"], "my.news", False, id="a star in front"),
    pytest.param(["**"], "anything", False, id="two stars"),
    pytest.param(["c?at"], "chat", False, id="no other wildcards"),
    pytest.param([".*"], "chat", False, id="no expressions"),
    pytest.param(["other", "chat.*", "news"], "news", True, id="one of several"),
    pytest.param(["News"], "news", False, id="other case"),
    pytest.param([""], "news", False, id="an empty pattern"),
    pytest.param([], "news", False, id="no pattern"),
]


@pytest.mark.parametrize(("patterns", "name", "reaches"), REACH)
async def test_a_right_reaches_as_far_as_its_patterns(
    guarded_relay: Relay, patterns: list[str], name: str, reaches: bool
) -> None:
    brought = token(relay={"subscribe": patterns, "publish": patterns})
    if reaches:
        await works(bearing(guarded_relay, name, brought))
        return
    before = await guarded_relay.metric("websocket_refusals_total", reason="not_authorized")
    answer = await refused(bearing(guarded_relay, name, brought))
    assert answer.status_code == 403
    assert bytes(answer.body or b"") == b"not authorized for this channel\n"
    await guarded_relay.metric_is("websocket_refusals_total", before + 1, reason="not_authorized")


async def test_the_root_asks_for_a_right_to_the_channel_default(guarded_relay: Relay) -> None:
    right = {"subscribe": ["default"], "publish": ["default"]}
    await works(bearing(guarded_relay, None, token(relay=right)))
    elsewhere = token(relay={"subscribe": ["news"]})
    assert (await refused(bearing(guarded_relay, None, elsewhere))).status_code == 403


@pytest.mark.parametrize(
    "claim",
    [
        None,
        "*",
        ["*"],
        5,
        {},
        {"subscribe": "*"},
        {"subscribe": None},
        {"subscribe": {"*": True}},
        {"subscribe": [["*"], 5, None, {"*": 1}]},
        {"Subscribe": ["*"]},
        {"publish": ["*"]},
    ],
)
async def test_a_claim_of_another_shape_gives_no_right(
    guarded_relay: Relay, channel: str, claim: object
) -> None:
    answer = await refused(bearing(guarded_relay, channel, token(relay=claim)))
    assert answer.status_code == 403


@pytest.mark.parametrize("publish", [[], ["other"], "*", None])
async def test_without_a_right_to_publish_the_first_message_ends_the_connection(
    guarded_relay: Relay, channel: str, publish: object
) -> None:
    listener = token(relay={"subscribe": ["*"], "publish": publish})
    async with (
        bearing(guarded_relay, channel, token()) as speaker,
        bearing(guarded_relay, channel, listener) as mute,
    ):
        await speaker.send("hello")
        assert await receive(mute) == "hello"
        await mute.send("I may not")
        assert await closed(mute) == (1008, "not allowed to publish")
        await speaker.send("still here")
        assert [await receive(speaker) for _ in range(2)] == ["hello", "still here"]


async def test_a_right_to_publish_is_one_right_for_each_channel(
    guarded_relay: Relay, channel: str
) -> None:
    brought = token(relay={"subscribe": ["*"], "publish": [f"{channel}-loud*"]})
    await works(bearing(guarded_relay, f"{channel}-loud-1", brought))
    async with bearing(guarded_relay, f"{channel}-quiet", brought) as client:
        await client.send("I may not")
        assert await closed(client) == (1008, "not allowed to publish")


async def test_a_message_sent_with_the_request_needs_the_right_too(
    guarded_relay: Relay, channel: str
) -> None:
    listener = token(relay={"subscribe": ["*"]})
    async with await guarded_relay.tcp() as raw:
        await raw.upgrade(
            path_of(channel),
            behind=frame(TEXT, b"early"),
            Authorization=f"Bearer {listener}",
        )
        assert await raw.close_frame() == (1008, "not allowed to publish")


# Expiry


async def test_a_connection_ends_when_its_token_expires_and_not_before(
    guarded_relay: Relay, channel: str
) -> None:
    expiry = int(time.time()) + 3
    async with (
        bearing(guarded_relay, channel, token(exp=expiry)) as guest,
        bearing(guarded_relay, channel, token(exp=None)) as resident,
    ):
        await guest.send("hello")
        assert await receive(guest) == "hello"
        assert await receive(resident) == "hello"
        assert await closed(guest) == (3000, "token expired")
        assert time.time() >= expiry
        await resident.send("still here")
        assert await receive(resident) == "still here"
    await guarded_relay.metric_reaches("websocket_closes_total", 1, reason="token_expired")


async def test_who_goes_on_talking_when_its_token_has_expired_is_not_heard(
    guarded_relay: Relay, channel: str
) -> None:
    brought = token(exp=int(time.time()) + 2)
    async with (
        bearing(guarded_relay, channel, token(exp=None)) as other,
        raw_websocket(
            HOST, guarded_relay.port, path_of(channel), Authorization=f"Bearer {brought}"
        ) as guest,
    ):
        assert await guest.close_frame() == (3000, "token expired")
        await guest.send(frame(TEXT, b"too late") + frame(CLOSE, close_payload(3000)))
        assert await guest.ended() == b""
        await other.send("next")
        assert await receive(other) == "next"


@pytest.mark.parametrize("expiry", [b"1e300", b"9" * 400, b"253402300799", b"4102444800.5"])
async def test_a_token_may_expire_very_late(
    guarded_relay: Relay, channel: str, expiry: bytes
) -> None:
    payload = b'{"relay":' + json.dumps(EVERYTHING).encode() + b',"exp":' + expiry + b"}"
    await works(bearing(guarded_relay, channel, hand_made(HS256, payload)))


# Nothing of it gets out


async def listening_port(relay: Relay) -> int:
    """Wait until a relay listens on its only port, whatever its log looks like."""

    async def look() -> tuple[bool, object]:
        ports = relay.listening_ports()
        return len(ports) == 1, ports

    await eventually(look, "one port")
    (port,) = relay.listening_ports()
    return port


@pytest.mark.parametrize("log_format", ["json", "text"])
async def test_no_part_of_a_token_gets_out(tmp_path: Path, channel: str, log_format: str) -> None:
    secret_claim = "very-secret-subject"
    tokens = [
        token(sub=secret_claim),
        token(OTHER_SECRET, sub=secret_claim),
        token(exp=1, sub=secret_claim),
        token(relay=None, sub=secret_claim),
        hand_made(HS256 | {"kid": 5}, {"sub": secret_claim}),
    ]
    settings = {
        "auth": guarding(),
        "logging": {"level": "debug", "format": log_format},
        "metrics": {"enabled": False},
    }
    relay = Relay(tmp_path, settings)
    relay.launch()
    try:
        port = await listening_port(relay)
        said = b""
        for brought in tokens:
            query = f"{path_of(channel)}?access_token={brought}"
            plain = f"GET {query} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()
            offer = {"Sec-WebSocket-Protocol": f"bearer, {brought}"}
            bearer = {"Authorization": f"Bearer {brought}"}
            for request in (
                plain,
                upgrade_request(query) + frame(CLOSE),
                upgrade_request(path_of(channel), **offer) + frame(CLOSE),
                upgrade_request(path_of(channel), **bearer) + frame(CLOSE),
            ):
                async with await RawClient.to(HOST, port) as raw:
                    await raw.send(request)
                    said += await raw.ended()
        await relay.stop()
    finally:
        relay.end()
    assert said.count(b"HTTP/1.1 101") == 3
    places = {"answers": said.decode("latin-1"), "log": "\n".join(relay.log_lines)}
    assert "ready" in places["log"]
    for place, text in places.items():
        for hidden in (secret_claim, SECRET, *(part for t in tokens for part in t.split("."))):
            assert hidden not in text, place


async def test_no_part_of_a_token_is_on_the_metrics_page(
    guarded_relay: Relay, channel: str
) -> None:
    tokens = [token(sub="secret"), token(OTHER_SECRET, sub="secret")]
    await works(bearing(guarded_relay, channel, tokens[0]))
    await refused(guarded_relay.client(path=f"{path_of(channel)}?access_token={tokens[1]}"))
    await guarded_relay.get(f"/?access_token={tokens[0]}")
    page = (await guarded_relay.get_metrics()).text
    assert "websocket_refusals_total" in page
    assert not [part for t in tokens for part in t.split(".") if part in page]
