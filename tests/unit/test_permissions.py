"""The permissions in a token's claims, in each form that a claim may have."""

import json
from typing import Any

import pytest
from websocket_relay.admission.permissions import MAX_INFO_BYTES, Permissions, is_info
from websocket_relay.identity import MAX_USER_CHARACTERS
from websocket_relay.outcomes import Refusal, RefusedError, TokenProblem

pytestmark = pytest.mark.fast


def permissions_of(relay: object, **claims: Any) -> Permissions:
    return Permissions.of({"relay": relay, **claims}, None)


def test_admin_is_a_boolean_of_the_claim_and_includes_the_stats() -> None:
    admin = permissions_of({"admin": True})
    assert (admin.admin, admin.stats) == (True, True)
    assert not admin.is_empty
    assert not admin.may_subscribe("news")
    assert not admin.may_publish("news")
    for value in (False, None, 1, "true", [True]):
        permissions = permissions_of({"admin": value})
        assert (permissions.admin, permissions.stats) == (False, False), value
        assert permissions.is_empty
    stats = permissions_of({"stats": True})
    assert (stats.admin, stats.stats) == (False, True)


def test_admin_in_the_other_forms_of_the_claim() -> None:
    as_text = json.dumps({"admin": True})
    for claim in (as_text, "relay:admin", "openid relay:admin email", ["relay:admin"]):
        permissions = permissions_of(claim)
        assert (permissions.admin, permissions.stats) == (True, True), claim
    for claim in ("admin", "relay:administrator", "xrelay:admin", ["admin"], "{admin}"):
        assert not permissions_of(claim).admin, claim


def test_admin_outside_the_claim_permits_nothing() -> None:
    claims = {"admin": True, "stats": True, "relay": {}}
    assert Permissions.of(claims, None).is_empty


@pytest.mark.parametrize("info", [None, "Ann", 5, 0.5, True, ["a"], {"name": "Ann", "age": None}])
def test_info_is_any_json_value(info: Any) -> None:
    assert permissions_of({"info": info}).info == info


def test_a_claim_without_info_shows_nothing() -> None:
    for claim in ({}, {"subscribe": ["*"]}, "relay:subscribe:news", None, 5):
        assert permissions_of(claim).info is None


def test_info_has_at_most_1_kib_as_compact_json_in_utf_8() -> None:
    largest = "x" * (MAX_INFO_BYTES - 2)  # without its quotation marks
    assert permissions_of({"info": largest}).info == largest
    for accepted in ({"a": [1, 2]}, "é" * 511, "🎉" * 255, "\ud800" * 340):
        assert is_info(accepted)
    for info in (f"{largest}x", {"name": largest}, [0] * 600, "é" * 512, "\ud800" * 341):
        with pytest.raises(RefusedError) as raised:
            permissions_of({"info": info})
        assert raised.value.why is Refusal.INVALID_TOKEN
        assert raised.value.detail == TokenProblem.INFO


def test_info_that_is_no_json_is_rejected() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    for value in (nested, {1, 2}, b"bytes", object(), float("nan"), [float("-inf")]):
        assert not is_info(value)


def test_the_user_has_at_most_as_many_characters_as_one_in_an_order() -> None:
    longest = "é" * MAX_USER_CHARACTERS
    assert permissions_of({}, sub=longest).user == longest
    claims: list[Any] = [{}, None]
    for claim in claims:
        with pytest.raises(RefusedError) as raised:
            permissions_of(claim, sub=f"{longest}x")
        assert raised.value.why is Refusal.INVALID_TOKEN
        assert raised.value.detail == TokenProblem.USER


def test_the_user_is_the_subject_if_that_is_text() -> None:
    assert permissions_of({}, sub="ann").user == "ann"
    assert permissions_of(None, sub="ann").user == "ann"
    for subject in (None, 5, ["ann"], True):
        assert permissions_of({}, sub=subject).user == ""
