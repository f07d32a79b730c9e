"""Questions to all replicas: who answers, who is missing, and what bounds the answers."""

import asyncio
import json
from collections import deque
from collections.abc import Iterator

import pytest
from websocket_relay.backplane.interface import Position
from websocket_relay.cluster import questions
from websocket_relay.cluster.control_log import ControlEntry
from websocket_relay.cluster.incarnations import Incarnations
from websocket_relay.cluster.questions import Answer, Questions, Work, split
from websocket_relay.outcomes import Refusal, RefusedError

from tests.support.control_logs import SharedLog

pytestmark = pytest.mark.fast


class Replica:
    """A replica that answers each question with its name and the question, if it is not frozen."""

    def __init__(self, log: SharedLog, name: str) -> None:
        self.name = name
        self.is_up = self.has_started = True
        self.is_frozen = False
        self.incarnations = Incarnations()
        self.items: list[object] = []
        self.questions = Questions(
            log.control(),
            self.incarnations,
            name=name,
            is_alone=False,
            is_up=lambda: self.is_up,
            has_started=lambda: self.has_started,
            schedule=self._schedule,
        )
        self.questions.respond("name", self._respond)

    def _respond(self, entry: ControlEntry) -> Work:
        yield
        if "fail" in entry.fields["of"]:
            raise RuntimeError("no answer")
        return Answer([self.name, *self.items])

    def _schedule(self, work: Iterator[None]) -> None:
        if not self.is_frozen:
            deque(work, maxlen=0)


@pytest.fixture
def log() -> SharedLog:
    return SharedLog()


@pytest.fixture
def replicas(log: SharedLog, monkeypatch: pytest.MonkeyPatch) -> list[Replica]:
    """Three replicas that know each other, and do not wait long for an answer."""
    monkeypatch.setattr(questions, "ANSWER_S", 0.05)
    monkeypatch.setattr(questions, "NOVICE_S", 0.0)
    replicas = [Replica(log, name) for name in "abc"]
    for replica in replicas:
        for other in replicas:
            replica.incarnations.record_sign(
                other.incarnations.own, Position(1, 1, 0), {"name": other.name}
            )
    return replicas


async def test_all_replicas_answer_and_the_one_that_asks_is_among_them(
    replicas: list[Replica],
) -> None:
    for replica in replicas:
        answers = await replica.questions.ask("name", {"q": 1})
        assert sorted(answers.items) == ["a", "b", "c"]
        assert (answers.missing, answers.is_truncated) == ([], False)
        assert replica.questions.metrics() == {"questions": {"complete": 1, "incomplete": 0}}


async def test_a_replica_that_does_not_answer_is_named(replicas: list[Replica]) -> None:
    replicas[1].is_frozen = True
    replicas[2].has_started = False
    answers = await replicas[0].questions.ask("name", {"q": 1})
    assert answers.items == ["a"]
    assert answers.missing == ["b", "c"]
    assert replicas[0].questions.metrics() == {"questions": {"complete": 0, "incomplete": 1}}


async def test_a_failure_of_one_question_leaves_it_unanswered_and_no_other(
    replicas: list[Replica],
) -> None:
    answers = await replicas[0].questions.ask("name", {"a": 1})
    assert len(answers.items) == 3
    answers = await replicas[0].questions.ask("name", {"fail": 1})
    assert answers.missing == ["a", "b", "c"]


async def test_a_large_answer_comes_in_parts_and_is_put_together(
    log: SharedLog, replicas: list[Replica]
) -> None:
    replicas[1].items = ["x" * 1_000] * 500
    answers = await replicas[0].questions.ask("name", {"q": 1})
    assert len(answers.items) == 503
    assert not answers.is_truncated
    parts = [fields for fields in log.entries if fields["kind"] == "answer"]
    assert len(parts) > 8
    replicas[1].items = ["x" * 10_000] * 500
    answers = await replicas[0].questions.ask("name", {"q": 1})
    assert answers.is_truncated
    assert 100 < len(answers.items) < 200


async def test_a_question_is_refused_in_an_outage_and_above_the_bound(
    log: SharedLog, replicas: list[Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = replicas[0]
    asking.is_up = False
    with pytest.raises(RefusedError) as refused:
        await asking.questions.ask("name", {"q": 1})
    assert refused.value.why is Refusal.BACKPLANE_UNAVAILABLE
    asking.is_up, log.fails = True, True
    with pytest.raises(RefusedError) as refused:
        await asking.questions.ask("name", {"q": 1})
    assert refused.value.why is Refusal.BACKPLANE_UNAVAILABLE
    log.confirms = False
    for unconfirmed in (Refusal.BACKPLANE_UNAVAILABLE, Refusal.UNCONFIRMED):
        with pytest.raises(RefusedError) as refused:
            await asking.questions.ask("name", {"q": 1}, unconfirmed=unconfirmed)
        assert refused.value.why is unconfirmed
    log.fails = False
    replicas[1].is_frozen = True
    monkeypatch.setattr(questions, "MAX_IN_FLIGHT", 2)
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(asking.questions.ask("name", {"q": 1})) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(RefusedError) as refused:
            await asking.questions.ask("name", {"q": 1})
        assert refused.value.why is Refusal.API_REQUESTS
    assert [task.result().missing for task in waiting] == [["b"], ["b"]]


def test_an_answer_is_split_into_parts_and_truncated_at_the_bound() -> None:
    assert split([]) == ([[]], False)
    items = ["x" * 8] * 10  # 10 bytes each
    assert split(items, part_bytes=100, max_parts=1) == ([items], False)
    assert split(items, part_bytes=20, max_parts=5) == ([["x" * 8] * 2] * 5, False)
    parts, is_truncated = split(items, part_bytes=20, max_parts=3)
    assert (len(parts), is_truncated) == (3, True)
    assert all(len(json.dumps(part)) < 40 for part in parts)
