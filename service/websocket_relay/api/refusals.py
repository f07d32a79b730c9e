"""Answer requests that are refused, and count the refusals: the one place for all routes."""

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Response
from fastapi.responses import PlainTextResponse

from websocket_relay.admission.refusal_log import RefusalLog
from websocket_relay.counters import Counters
from websocket_relay.outcomes import Refusal, RefusedError, random_retry_after_s

log = logging.getLogger(__name__)

TOLD: Mapping[int, Mapping[str, Any]] = {
    HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: {"Accept-Encoding": {"schema": {"type": "string"}}},
    HTTPStatus.SERVICE_UNAVAILABLE: {
        "Retry-After": {"description": "seconds", "schema": {"type": "integer"}}
    },
}
"""What refusals say besides, by their status."""

ELSEWHERE = (Refusal.HANDSHAKE, Refusal.METRICS_CONNECTIONS)
"""No request that is described is refused for these."""


def refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what the description of a route says of its refusals."""
    text = {"text/plain": {"schema": {"type": "string"}}}
    reasons: dict[int, list[str]] = {status: [] for status in statuses}
    for why in Refusal:
        if why.status in reasons and why not in ELSEWHERE:
            reasons[why.status].append(why.reason)
    return {
        status: {"description": "; ".join(said), "content": text, "headers": TOLD.get(status, {})}
        for status, said in reasons.items()
    }


class Refusals:
    """Count refusals, and answer them.

    Args:
        ledger: where they are counted.
        pressure: what tells the log of limits that are hit.
        trace: what else is told of each; None: nobody.
    """

    def __init__(
        self,
        ledger: Counters,
        pressure: RefusalLog,
        trace: Callable[[RefusedError], None] | None = None,
    ) -> None:
        self._ledger = ledger
        self._pressure = pressure
        self._trace = trace

    def count(self, why: Refusal) -> None:
        """Count a refusal that is answered elsewhere, or not at all."""
        self._ledger.refusals[why] += 1
        self._pressure.note(why)

    def answer(self, refused: RefusedError) -> Response:
        """Return the answer to a refusal, which is counted."""
        self.count(refused.why)
        if self._trace is not None:
            self._trace(refused)
        log.debug("refused", extra={"reason": refused.why.label, "detail": refused.detail})
        return answer_to(refused)


def answer_to(refused: RefusedError) -> Response:
    """Return what a client is told that is refused."""
    status = refused.why.status
    headers = {}
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = str(random_retry_after_s())
    elif status is HTTPStatus.UNAUTHORIZED:  # RFC 6750 section 3
        bad = refused.why is Refusal.BAD_TOKEN
        headers["WWW-Authenticate"] = 'Bearer error="invalid_token"' if bad else "Bearer"
    elif refused.why is Refusal.CODING:  # RFC 9110 section 15.5.16
        headers["Accept-Encoding"] = "identity"
    return PlainTextResponse(f"{refused}\n", status, headers)
