"""Signed requests to the operator's servers, and the log of those that fail."""

import logging

import pytest
from websocket_relay.admission import hook
from websocket_relay.admission.hook import LOG_BURST, FailureLog
from websocket_relay.outgoing_http import sign
from websocket_relay.token_bucket import TokenBucket

from tests.support.issuer import KeyServer, key_set, make_signer
from tests.support.relay_process import run_python

FIRST_REQUEST = """
import asyncio, sys
from websocket_relay.admission.jwks import Jwks
from websocket_relay.outgoing_http import SignedCalls
kind, url = sys.argv[1:]
hook = SignedCalls(url, "", timeout_s=9, max_connections=1, setting="") if kind == "hook" else None
keys = Jwks(url) if kind == "keys" else None
async def request():
    before = set(sys.modules)
    await (hook.post(b"") if hook else keys.fetch_until_available())
    print(*sorted(set(sys.modules) - before))
asyncio.run(request())
"""

pytestmark = pytest.mark.fast


def test_a_signature_is_that_of_the_time_and_the_body() -> None:
    """The value is OpenSSL's: openssl dgst -sha256 -hmac SECRET, of "1796122146.BODY"."""
    body = b'{"events":[]}'
    digest = "98760d882474d8283d25af81120cb8b36c28ba7030ec1dbac018f846bba8a69d"
    assert sign(b"secret of the hooks", body, 1_796_122_146) == f"t=1796122146,v1={digest}"
    for secret, signed, at in (
        (b"another secret", body, 1_796_122_146),
        (b"secret of the hooks", body + b" ", 1_796_122_146),
        (b"secret of the hooks", body, 1_796_122_147),
    ):
        assert digest not in sign(secret, signed, at)


async def test_failures_are_logged_at_a_bounded_rate_with_their_number(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", hook.__name__)
    failures = FailureLog("https://app.example/relay?key=secret")
    failures.record_success()
    for _ in range(100):
        failures.record_failure("status 500")
    assert [record.getMessage() for record in caplog.records] == ["hook request failed"] * LOG_BURST
    assert vars(caplog.records[0])["url"] == "https://app.example/relay"
    failures.record_success()
    failures.record_success()
    assert caplog.records[-1].getMessage() == "hook recovered"
    assert len(caplog.records) == LOG_BURST + 1
    monkeypatch.setattr(failures, "_rate", TokenBucket(1, 1))  # a minute later
    failures.record_failure("timeout after 5 seconds")
    last = caplog.records[-1]
    assert (last.levelno, vars(last)["count"]) == (logging.ERROR, 100 - LOG_BURST + 1)
    assert vars(last)["error"] == "timeout after 5 seconds"


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["hook", "keys"])
def test_the_first_request_imports_nothing_while_the_event_loop_runs(kind: str) -> None:
    with KeyServer(key_set(make_signer("ES256"))) as server:
        done = run_python("-c", FIRST_REQUEST, kind, server.url)
    assert (done.exit_code, done.stdout) == (0, "\n"), done
