"""Ask all replicas something, by control entries: each answers with one of its own.

An order is a question, too, whose answer is what was done. Only the replica that asked keeps the
answers. Knows no question.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from websocket_relay.cluster.control_log import ControlEntry, ControlLog, Fields
from websocket_relay.cluster.incarnations import SILENCE_S, Incarnations
from websocket_relay.outcomes import Refusal, RefusedError

log = logging.getLogger(__name__)

ANSWER_S = 1.0
"""Time in which replicas answer."""

NOVICE_S = 1.5
"""A replica that has read the log for less does not know all others, and waits ANSWER_S anyway."""

MAX_IN_FLIGHT = 16
"""Questions of this replica that are not answered yet."""

ID_BYTES = 8

PART_BYTES = 65_536
"""Size of a control entry with a part of an answer, roughly."""

MAX_PARTS = 16
"""An answer that is larger is truncated."""


class Answer(NamedTuple):
    """What one replica answers.

    Attributes:
        items: what JSON can hold.
        is_truncated: whether there are more.
    """

    items: Sequence[Any]
    is_truncated: bool = False


class Answers(NamedTuple):
    """What the replicas have answered in time.

    Attributes:
        items: of all replicas.
        missing: the names of replicas that are alive and have not answered.
        is_truncated: whether a replica has more items.
    """

    items: Sequence[Any]
    missing: Sequence[str]
    is_truncated: bool


Work = Generator[None, None, Answer]
"""Work on an answer: each step does some of it."""

Responder = Callable[[ControlEntry], Work]
"""Starts the work on the answer to a question, which the entry has in its field `of`."""


@dataclass(slots=True)
class _PartialAnswer:
    """The parts of an answer that were read."""

    items: list[Any] = field(default_factory=list)
    parts: int = 0
    is_truncated: bool = False


class _Question:
    """A question of this replica that is in flight."""

    def __init__(self, asked: Mapping[str, Fields], *, knows_all: bool) -> None:
        self.asked = asked  # facts of the replicas that are alive, by their ids
        self._knows_all = knows_all
        self._partial: dict[str, _PartialAnswer] = {}
        self.answered: dict[str, _PartialAnswer] = {}  # by incarnation
        self.refusal: Refusal | None = None
        self.done = asyncio.Event()

    def add_part(self, fields: Fields) -> None:
        incarnation = fields["incarnation"]
        partial = self._partial.setdefault(incarnation, _PartialAnswer())
        partial.items += fields["items"]
        partial.parts += 1
        partial.is_truncated |= fields["truncated"]
        if partial.parts == fields["parts"]:
            self.answered[incarnation] = partial
        if self._knows_all and self.asked.keys() <= self.answered.keys():
            self.done.set()

    def refuse(self, why: Refusal) -> None:
        self.refusal = why
        self.done.set()

    def answers(self) -> Answers:
        missing = [
            str(facts.get("name", incarnation))
            for incarnation, facts in self.asked.items()
            if incarnation not in self.answered
        ]
        items = [item for answer in self.answered.values() for item in answer.items]
        is_truncated = any(answer.is_truncated for answer in self.answered.values())
        return Answers(items, sorted(missing), is_truncated)


class Questions:
    """The questions of this replica, and its answers to those of all replicas.

    Args:
        control: the entries.
        replicas: that are alive.
        name: of this replica.
        is_alone: whether there are no others.
        is_up: returns whether entries can be appended.
        has_started: returns whether the log was read up to where this replica began: questions
            from before are answered already.
        schedule: runs work in slices.
    """

    def __init__(
        self,
        control: ControlLog,
        replicas: Incarnations,
        *,
        name: str,
        is_alone: bool,
        is_up: Callable[[], bool],
        has_started: Callable[[], bool],
        schedule: Callable[[Iterator[None]], None],
    ) -> None:
        self._control = control
        self._replicas = replicas
        self._name = name
        self._is_alone = is_alone
        self._is_up = is_up
        self._has_started = has_started
        self._schedule = schedule
        self._responders: dict[str, Responder] = {}
        self._in_flight: dict[str, _Question] = {}
        self.results = {"complete": 0, "incomplete": 0}
        control.handle("question", self._on_question)
        control.handle("answer", self._on_answer)

    def metrics(self) -> dict[str, dict[str, int]]:
        """Return the values of the metrics of questions."""
        return {"questions": self.results}

    def respond(self, kind: str, responder: Responder) -> None:
        """Answer all questions of a kind, of every replica."""
        self._responders[kind] = responder

    def check_availability(self) -> None:
        """Check that this replica can know the others now.

        Raises:
            RefusedError: the log is not available.
        """
        if not self._is_up():
            raise RefusedError(Refusal.BACKPLANE_UNAVAILABLE)

    async def ask(
        self, kind: str, of: Fields, *, unconfirmed: Refusal = Refusal.BACKPLANE_UNAVAILABLE
    ) -> Answers:
        """Ask all replicas, this one included, and wait for their answers.

        Args:
            kind: whose responder answers.
            of: the question.
            unconfirmed: why it is refused if the replicas may read it nevertheless.

        Raises:
            RefusedError: there are too many questions in flight, or the log is not available.
        """
        self.check_availability()
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            raise RefusedError(Refusal.API_REQUESTS)
        name = secrets.token_hex(ID_BYTES)
        own = self._replicas.own
        asked = {own: {"name": self._name}, **self._replicas.alive(SILENCE_S)}
        knows_all = self._is_alone or self._replicas.listened_s >= NOVICE_S
        question = self._in_flight[name] = _Question(asked, knows_all=knows_all)
        try:
            fields = {"incarnation": own, "id": name, "ask": kind, "of": of}
            self._control.append(
                "question",
                fields,
                failed=partial(question.refuse, Refusal.BACKPLANE_UNAVAILABLE),
                unconfirmed=partial(question.refuse, unconfirmed),
            )
            async with asyncio.timeout(ANSWER_S):
                await question.done.wait()
        except TimeoutError:
            pass
        finally:
            del self._in_flight[name]
        if question.refusal is not None:
            raise RefusedError(question.refusal)
        answers = question.answers()
        self.results["incomplete" if answers.missing else "complete"] += 1
        return answers

    # What is read

    def _on_question(self, entry: ControlEntry) -> None:
        responder = self._responders.get(entry.fields["ask"])
        if responder is not None:
            self._schedule(self._work(entry.fields["id"], responder(entry)))

    def _work(self, name: str, work: Work) -> Iterator[None]:
        try:
            answer = yield from work
        except Exception:  # of this question: the slices of others go on
            log.exception("question not answered")
            return
        if self._has_started():
            self._answer(name, answer)

    def _answer(self, name: str, answer: Answer) -> None:
        parts, is_truncated = split(answer.items)
        fields = {
            "incarnation": self._replicas.own,
            "id": name,
            "parts": len(parts),
            "truncated": answer.is_truncated or is_truncated,
        }
        for part in parts:
            self._control.append("answer", {**fields, "items": part})

    def _on_answer(self, entry: ControlEntry) -> None:
        question = self._in_flight.get(entry.fields["id"])
        if question is not None:
            question.add_part(entry.fields)


def split(
    items: Sequence[Any], *, part_bytes: int = PART_BYTES, max_parts: int = MAX_PARTS
) -> tuple[Sequence[Sequence[Any]], bool]:
    """Return items in parts of a bounded size, one part at least, and whether some are left out.

    Args:
        items: what JSON can hold.
        part_bytes: a part is complete once it has so many.
        max_parts: further parts are left out.
    """
    parts: list[list[Any]] = [[]]
    size = 0
    for item in items:
        if size >= part_bytes:
            if len(parts) == max_parts:
                return parts, True
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += len(json.dumps(item, separators=(",", ":")))
    return parts, False
