"""What the backend is asked about a client, and which answers are valid."""

import json
import time
from typing import Any

import pytest
from websocket_relay.admission.hook_messages import (
    HookAnswerError,
    encode_question,
    encode_renewal,
    parse_answer,
)
from websocket_relay.admission.permissions import MAX_INFO_BYTES
from websocket_relay.admission.policy import Action, AdmissionRequest, RequestSource
from websocket_relay.identity import MAX_USER_CHARACTERS
from websocket_relay.outcomes import RefusedError

pytestmark = pytest.mark.fast

HEADERS = ("cookie", "authorization")


def request_with(channels: tuple[str, ...] = ("news",), **fields: Any) -> AdmissionRequest:
    lines = [(name.encode(), value.encode("latin-1")) for name, value in fields.pop("lines", [])]
    return AdmissionRequest(
        channels,
        fields.pop("origin", None),
        "relay.example",
        fields.pop("query", b""),
        fields.pop("subprotocols", ()),
        fields.pop("host", "192.0.2.7"),
        authorization=[value for name, value in lines if name == b"authorization"]
        and [value.decode("latin-1") for name, value in lines if name == b"authorization"],
        headers=lines,
    )


def question_of(request: AdmissionRequest, headers: tuple[str, ...] = HEADERS) -> Any:
    return json.loads(encode_question(request, Action.SUBSCRIBE, headers))


def test_a_question_names_channel_action_and_where_the_request_is_from() -> None:
    request = request_with(origin="https://app.example", query=b"a=%C3%A4&b=\xe4")
    assert question_of(request) == {
        "channel": "news",
        "action": "subscribe",
        "address": "192.0.2.7",
        "origin": "https://app.example",
        "headers": {},
        "query": "a=%C3%A4&b=\xe4",
    }
    question = json.loads(encode_question(request_with(host=None), Action.PUBLISH, HEADERS))
    assert (question["action"], question["address"], question["origin"]) == ("publish", None, None)


@pytest.mark.parametrize("channels", [(), ("one", "two")])
def test_a_question_about_no_channel_or_several_names_none(channels: tuple[str, ...]) -> None:
    assert question_of(request_with(channels))["channel"] is None


def test_only_the_listed_headers_are_passed_on_and_lines_are_joined() -> None:
    lines = [
        ("cookie", "a=1"),
        ("x-other", "no"),
        ("cookie", "b=\xe4"),
        ("x-session", "1"),
        ("x-session", "2"),
    ]
    passed_on = question_of(request_with(lines=lines), ("cookie", "x-session"))["headers"]
    assert passed_on == {"cookie": "a=1; b=\xe4", "x-session": "1, 2"}
    assert question_of(request_with(lines=lines), ())["headers"] == {}


def test_a_token_is_passed_on_as_authorization_unless_that_is_not_listed() -> None:
    bearer = {"authorization": "Bearer T"}
    by_query = request_with(query=b"access_token=T")
    by_subprotocol = request_with(subprotocols=("bearer", "T"))
    for request in (by_query, by_subprotocol):
        assert question_of(request)["headers"] == bearer
        assert question_of(request, ("cookie",))["headers"] == {}
    other = request_with(query=b"access_token=T", lines=[("authorization", "Basic eDp5")])
    assert question_of(other)["headers"] == {"authorization": "Basic eDp5"}


def test_two_authorization_lines_are_refused() -> None:
    """The backend might check another one than the client's proxy."""
    request = request_with(lines=[("authorization", "Bearer T"), ("authorization", "Bearer U")])
    with pytest.raises(RefusedError):
        encode_question(request, Action.SUBSCRIBE, HEADERS)
    assert question_of(request, ("cookie",))["headers"] == {}


def test_a_renewal_has_the_token_only() -> None:
    source = RequestSource("192.0.2.7", "https://app.example")
    assert json.loads(encode_renewal(source, "T")) == {
        "channel": None,
        "action": "subscribe",
        "address": "192.0.2.7",
        "origin": "https://app.example",
        "headers": {"authorization": "Bearer T"},
        "query": "",
    }


def answer_with(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_an_answer_is_read_as_permissions() -> None:
    permissions = parse_answer(
        answer_with(
            user="ann",
            subscribe=["news", "chat.*"],
            publish=["chat.*"],
            info={"name": "Ann"},
            stats=True,
            other=[1],
        )
    )
    assert permissions.subscribe == ("news", "chat.*")
    assert permissions.publish == ("chat.*",)
    assert (permissions.user, permissions.info) == ("ann", {"name": "Ann"})
    assert (permissions.stats, permissions.admin) == (True, False)
    assert permissions.expires_at is None
    admin = parse_answer(answer_with(admin=True))
    assert (admin.stats, admin.admin) == (True, True)


FIELDS = ("user", "subscribe", "publish", "expires_in_s", "info", "stats", "admin")


def test_fields_that_are_absent_or_null_permit_nothing() -> None:
    nothing = parse_answer(b"{}")
    assert nothing.is_empty
    assert nothing.user == ""
    assert parse_answer(answer_with(**dict.fromkeys(FIELDS))) == nothing


@pytest.mark.parametrize("seconds", [1, 0.25, 86_400])
def test_permissions_expire_so_many_seconds_from_now(seconds: float) -> None:
    before = time.time()
    expires_at = parse_answer(answer_with(expires_in_s=seconds)).expires_at
    assert expires_at is not None
    assert before + seconds <= expires_at <= time.time() + seconds


@pytest.mark.parametrize("seconds", [b"1e300", b"9" * 4000, b"400000000"])
def test_permissions_that_last_for_many_years_never_expire(seconds: bytes) -> None:
    assert parse_answer(b'{"expires_in_s":' + seconds + b"}").expires_at is None


def test_the_largest_valid_user_and_info_are_accepted() -> None:
    user, info = "ä" * MAX_USER_CHARACTERS, "x" * (MAX_INFO_BYTES - 2)
    permissions = parse_answer(answer_with(user=user, info=info))
    assert (permissions.user, permissions.info) == (user, info)


NO_PATTERNS: list[Any] = ["*", True, {"a": 1}, ["*", 5], [["*"]], [None]]
NO_DURATIONS: list[Any] = [0, -1, True, "60", []]
NO_FLAGS: list[Any] = [1, "true", []]

INVALID: list[tuple[bytes, str]] = [
    (b"", "not JSON"),
    (b"<html>", "not JSON"),
    (b'{"user":"\xff"}', "not JSON"),
    (b'{"info":NaN}', "not JSON"),
    (b'{"expires_in_s":Infinity}', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"expires_in_s":' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"user":"ann","user":"bob"}', "a key is repeated"),
    (b'{"info":{"a":1,"a":2}}', "a key is repeated"),
    (b"null", "not a JSON object"),
    (b"[]", "not a JSON object"),
    (b'"ann"', "not a JSON object"),
    *(
        (answer_with(user=user), "user")
        for user in (5, True, ["ann"], "x" * (MAX_USER_CHARACTERS + 1))
    ),
    *(
        (answer_with(**{name: value}), f"{name} is no list")
        for name in ("subscribe", "publish")
        for value in NO_PATTERNS
    ),
    *((answer_with(expires_in_s=value), "expires_in_s") for value in NO_DURATIONS),
    (b'{"expires_in_s":1e999}', "expires_in_s"),
    (answer_with(info="x" * (MAX_INFO_BYTES - 1)), "info"),
    *((answer_with(**{name: value}), name) for name in ("stats", "admin") for value in NO_FLAGS),
]


@pytest.mark.parametrize(("body", "problem"), INVALID)
def test_an_invalid_answer_is_rejected_with_the_field(body: bytes, problem: str) -> None:
    with pytest.raises(HookAnswerError, match=problem):
        parse_answer(body)
