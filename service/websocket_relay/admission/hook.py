"""Ask the operator's backend which clients are admitted, and what they may do.

Each request of a client is asked about anew: no answer is kept, so a session that has ended is not
admitted again. Owns the bound on questions in flight and their counters. Knows no connection and no
token.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from http import HTTPStatus
from time import perf_counter

from websocket_relay.admission.hook_messages import (
    AUTHORIZATION,
    HookAnswerError,
    encode_question,
    encode_renewal,
    parse_answer,
)
from websocket_relay.admission.permissions import Permissions
from websocket_relay.admission.policy import Action, AdmissionRequest, RequestSource
from websocket_relay.counters import Values
from websocket_relay.outcomes import Refusal, RefusedError, TokenProblem
from websocket_relay.outgoing_http import AnswerTooLargeError, CallAnswer, CallError, SignedCalls
from websocket_relay.token_bucket import TokenBucket
from websocket_relay.wire.asgi import enter_task

log = logging.getLogger(__name__)

SETTING = "auth.hook.url"

MAX_TOKEN_CHARACTERS = 16_384
"""Maximum length of a token that is passed on, as in `verifier`."""

LOG_INTERVAL_S = 60.0
LOG_BURST = 3
"""Rate limit of log lines about failed requests, as a token bucket: every client may cause one."""

REFUSALS = {
    HTTPStatus.UNAUTHORIZED: Refusal.NOT_AUTHENTICATED,
    HTTPStatus.FORBIDDEN: Refusal.FORBIDDEN,
}
"""The answers that refuse a client, by their status."""

RESULTS = dict.fromkeys(REFUSALS.values(), "refused") | {Refusal.DRAINING: "cancelled"}
"""The results of questions that are refused; of all others: error."""


class AdmissionHook:
    """The backend, as an authenticator: see `policy.Authenticator`.

    Args:
        url: of the backend.
        secret: signs the questions; empty: they are not signed.
        headers: the names of the headers of a request that are passed on, in lower case.
        timeout_s: maximum time until the answer.
        max_in_flight: maximum number of questions at a time.
        observe: called with the seconds that each answer or failure took.

    Raises:
        UnusableSettingError: the environment names a proxy or authorities that can't be used.
    """

    def __init__(
        self,
        url: str,
        secret: str,
        headers: Sequence[str],
        *,
        timeout_s: float,
        max_in_flight: int,
        observe: Callable[[float], None],
    ) -> None:
        self._headers = headers
        self._max_in_flight = max_in_flight
        self._observe = observe
        self._calls = SignedCalls(
            url, secret, timeout_s=timeout_s, max_connections=max_in_flight, setting=SETTING
        )
        self._results = {"ok": 0, "refused": 0, "error": 0, "cancelled": 0}
        self._in_flight = 0
        self._is_stopping = False
        self._scopes: set[asyncio.Timeout] = set()  # of the questions in flight
        self._failures = FailureLog(url)

    def configure(self, secret: str, headers: Sequence[str], timeout_s: float) -> None:
        """Replace the settings, for the questions from now on."""
        self._headers = headers
        self._calls.configure(secret, timeout_s)

    def metrics(self) -> Values:
        """Return the values of the metrics of the hook."""
        return {"auth_hook_requests": self._results, "auth_hook_in_flight": self._in_flight}

    async def authenticate(self, request: AdmissionRequest, action: Action) -> Permissions:
        """Return what the client of a request may do.

        Raises:
            RefusedError: the backend refuses it, or does not answer.
        """
        return await self._ask(encode_question(request, action, self._headers))

    def source_of(self, request: AdmissionRequest) -> RequestSource | None:
        """Return what `renew` needs to know of the request that opened a connection."""
        return RequestSource(request.host, request.origin)

    async def renew(self, token: str, source: RequestSource | None) -> Permissions:
        """Return what a connected client may do by a new token.

        Raises:
            RefusedError: the backend refuses it, or does not answer, or gets no tokens.
        """
        if AUTHORIZATION not in self._headers:
            raise RefusedError(Refusal.INVALID_COMMAND, "the hook gets no tokens")
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise RefusedError(Refusal.INVALID_TOKEN, TokenProblem.MALFORMED)
        return await self._ask(encode_renewal(source or RequestSource(None, None), token))

    def refuse_pending(self) -> None:
        """Refuse the clients whose questions are in flight, and later ones: the relay stops."""
        self._is_stopping = True
        for scope in self._scopes:
            scope.reschedule(asyncio.get_running_loop().time())

    async def close(self) -> None:
        """Close the connections."""
        await self._calls.close()

    async def _ask(self, question: bytes) -> Permissions:
        if self._is_stopping:
            raise RefusedError(Refusal.DRAINING)
        if self._in_flight >= self._max_in_flight:
            raise RefusedError(Refusal.HOOK_REQUESTS)
        self._in_flight += 1
        result = "cancelled"
        try:
            await enter_task()
            started_at = perf_counter()
            try:
                permissions = await self._call(question)
                result = "ok"
            except RefusedError as error:
                result = RESULTS.get(error.why, "error")
                raise
            finally:
                if result != "cancelled":
                    self._observe(perf_counter() - started_at)
        finally:
            self._in_flight -= 1
            self._results[result] += 1
        return permissions

    async def _call(self, question: bytes) -> Permissions:
        try:
            async with asyncio.timeout(None) as scope:
                self._scopes.add(scope)
                try:
                    answer = await self._calls.post(question)
                finally:
                    self._scopes.discard(scope)
            return self._permissions_of(answer)
        except TimeoutError:  # see refuse_pending
            raise RefusedError(Refusal.DRAINING) from None
        except (AnswerTooLargeError, HookAnswerError) as error:
            self._failures.record_failure(str(error))
            raise RefusedError(Refusal.HOOK_ANSWER_INVALID) from None
        except CallError as error:
            self._failures.record_failure(str(error))
            raise RefusedError(Refusal.HOOK_UNAVAILABLE) from None

    def _permissions_of(self, answer: CallAnswer) -> Permissions:
        if answer.status in REFUSALS:
            self._failures.record_success()
            raise RefusedError(REFUSALS[HTTPStatus(answer.status)])
        if answer.status != HTTPStatus.OK:
            raise CallError(f"status {answer.status}")
        permissions = parse_answer(answer.body)
        self._failures.record_success()
        return permissions


class FailureLog:
    """The log of failed requests, at a bounded rate.

    Args:
        url: of the backend; its query is not logged.
    """

    def __init__(self, url: str) -> None:
        self._url = url.partition("?")[0]
        self._rate = TokenBucket(1 / LOG_INTERVAL_S, LOG_BURST)
        self._unlogged = 0
        self._is_failing = False  # according to the log

    def record_failure(self, reason: str) -> None:
        """Record a failure, and log it if no other one has been logged lately."""
        self._unlogged += 1
        if self._rate.take(asyncio.get_running_loop().time()):
            facts = {"url": self._url, "error": reason, "count": self._unlogged}
            log.error("hook request failed", extra=facts)
            self._unlogged, self._is_failing = 0, True

    def record_success(self) -> None:
        """Record an answer, and log the first after a logged failure."""
        if self._is_failing:
            self._is_failing = False
            log.info("hook recovered", extra={"url": self._url})
