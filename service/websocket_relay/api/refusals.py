"""Answer and count refused requests and connections. Knows no admission rule."""

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Response
from fastapi.responses import PlainTextResponse

from websocket_relay.admission.refusal_log import RefusalLog
from websocket_relay.counters import Counters
from websocket_relay.outcomes import Refusal, RefusedError, TlsFailure, random_retry_after_s

log = logging.getLogger(__name__)

RESPONSE_HEADERS: Mapping[int, Mapping[str, Any]] = {
    HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: {"Accept-Encoding": {"schema": {"type": "string"}}},
    HTTPStatus.SERVICE_UNAVAILABLE: {
        "Retry-After": {"description": "seconds", "schema": {"type": "integer"}}
    },
}
"""The OpenAPI description of the headers of a refusal, by its status."""

UNDOCUMENTED = (
    Refusal.INVALID_HANDSHAKE,
    Refusal.INVALID_PROXY_HEADER,
    Refusal.METRICS_CONNECTIONS,
)
"""Reasons that no request in the OpenAPI document is refused for."""


def refusal_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of a route's refusals."""
    text = {"text/plain": {"schema": {"type": "string"}}}
    reasons_by_status: dict[int, list[str]] = {status: [] for status in statuses}
    for why in Refusal:
        if why.status in reasons_by_status and why not in UNDOCUMENTED:
            reasons_by_status[why.status].append(why.reason)
    return {
        status: {
            "description": "; ".join(reasons),
            "content": text,
            "headers": RESPONSE_HEADERS.get(status, {}),
        }
        for status, reasons in reasons_by_status.items()
    }


class Refusals:
    """Count and answer refusals.

    Args:
        counters: counts refusals by reason.
        refusal_log: logs the limits that were hit.
        trace: called with each refusal that is answered; None: not traced.
    """

    def __init__(
        self,
        counters: Counters,
        refusal_log: RefusalLog,
        trace: Callable[[RefusedError], None] | None = None,
    ) -> None:
        self._counters = counters
        self._refusal_log = refusal_log
        self._trace = trace

    def count(self, why: Refusal) -> None:
        """Count a refusal that is answered elsewhere or not at all."""
        self._counters.refusals[why] += 1
        self._refusal_log.record_refusal(why)

    def count_tls_failure(self, why: TlsFailure) -> None:
        """Count a TLS handshake that failed."""
        self._counters.tls_failures[why] += 1
        self._refusal_log.record_tls_failure(why)

    def answer(self, error: RefusedError) -> Response:
        """Count a refusal and return the response to it."""
        self.count(error.why)
        if self._trace is not None:
            self._trace(error)
        log.debug("refused", extra={"reason": error.why.label, "detail": error.detail})
        return answer_to(error)


def no_such_path(base_path: str) -> RefusedError:
    """Return the refusal of a path that is no channel's. It names the right ones."""
    paths = f"{base_path}/channels/NAME, without a slash at the end, and {base_path}/"
    return RefusedError(Refusal.NO_SUCH_CHANNEL, f"the paths are {paths}")


def answer_to(error: RefusedError) -> Response:
    """Return the response to a refusal, with the headers that its status requires."""
    status = error.why.status
    headers = {}
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = str(random_retry_after_s())
    elif status is HTTPStatus.UNAUTHORIZED:  # RFC 6750 section 3
        is_invalid = error.why is Refusal.INVALID_TOKEN
        headers["WWW-Authenticate"] = 'Bearer error="invalid_token"' if is_invalid else "Bearer"
    elif error.why is Refusal.CONTENT_CODING:  # RFC 9110 section 15.5.16
        headers["Accept-Encoding"] = "identity"
    return PlainTextResponse(f"{error}\n", status, headers)
