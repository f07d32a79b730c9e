"""The events that wait for the receiver of webhooks: their order, their bounds, their encoding."""

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websocket_relay.backplane.interface import Position
from websocket_relay.hooks.delivery import MAX_BATCH_BYTES, MAX_BATCH_EVENTS, encode_batch
from websocket_relay.hooks.events import NO_EVENT, Event, EventId, encode
from websocket_relay.hooks.queue import EventQueue
from websocket_relay.messages import BINARY, TEXT

pytestmark = pytest.mark.fast

MANY_BYTES = 1 << 40


def event(number: int, payload: bytes = b"", kind: int = TEXT) -> Event:
    message = (kind, payload) if payload else None
    return Event(EventId(Position(1, number, 0), 0), 5.0, "published", "news", {}, message)


def numbers(queue: EventQueue) -> list[int | str]:
    """Return the events that can be delivered, those of dropped ones as a text."""
    return [
        f"{each.facts['count']} dropped" if "count" in each.facts else each.event_id.position.offset
        for each in queue.following(NO_EVENT, 1000)
    ]


def test_events_are_delivered_in_the_order_in_which_they_were_added() -> None:
    queue = EventQueue(10, MANY_BYTES)
    for number in range(1, 6):
        assert queue.add(event(number))
    assert numbers(queue) == [1, 2, 3, 4, 5]
    assert [each.event_id for each in queue.following(event(3).event_id, 1)] == [event(4).event_id]
    queue.remove_through(event(2).event_id)
    assert numbers(queue) == [3, 4, 5]


def test_one_event_has_the_number_of_those_that_do_not_fit() -> None:
    queue = EventQueue(2, MANY_BYTES)
    assert [queue.add(event(number)) for number in range(1, 6)] == [True, True, False, False, False]
    assert numbers(queue) == [1, 2]  # the number of dropped events may still grow
    queue.remove_through(event(2).event_id)
    assert numbers(queue) == ["3 dropped"]
    assert queue.add(event(6))
    assert numbers(queue) == ["3 dropped", 6]
    assert not queue.add(event(7))
    queue.remove_through(event(5).event_id)
    assert numbers(queue) == [6, "1 dropped"]


def test_an_event_that_is_larger_than_the_queue_is_dropped_alone() -> None:
    queue = EventQueue(10, 5000)
    assert not queue.add(event(1, bytes(6000)))
    assert numbers(queue) == ["1 dropped"]
    assert not queue.add(event(2, bytes(6000)))
    assert queue.add(event(3, b"small"))
    assert numbers(queue) == ["1 dropped", "1 dropped", 3]
    queue.remove_through(event(3).event_id)
    assert (numbers(queue), queue.bytes, queue.oldest) == ([], 0, None)


@settings(max_examples=200, derandomize=True, database=None)
@given(st.lists(st.one_of(st.integers(0, 3000), st.sampled_from(["deliver", "some"]))))
def test_each_event_is_in_the_queue_or_counted_and_the_bounds_apply(steps: list[int | str]) -> None:
    queue, following, accepted, delivered = EventQueue(5, 6000), 1, NO_EVENT, 0
    for step in [*steps, *["deliver"] * 9]:
        if isinstance(step, int):
            queue.add(event(following, bytes(step)))
            following += 1
        else:
            batch = queue.following(accepted, 2 if step == "some" else 100)
            delivered += sum(each.facts.get("count", 1) for each in batch)
            accepted = batch[-1].event_id if batch else accepted
            queue.remove_through(accepted)
        assert len(queue) <= 5 + 1  # and the number of the dropped ones
        assert queue.bytes <= 6000
    assert len(queue) == 0
    assert delivered == following - 1


@pytest.mark.parametrize("payload", [b"short", 'ä\U0001f600\u2028\x00"\\'.encode() * 40_000, b""])
def test_a_text_is_encoded_in_pieces_without_a_change(payload: bytes) -> None:
    pieces = list(encode(event(1, b"x")._replace(message=(TEXT, payload))))
    decoded = json.loads(b"".join(pieces))
    assert decoded["text"].encode() == payload
    assert max(map(len, pieces)) < 300_000


def test_binary_payloads_are_encoded_as_base64() -> None:
    payload = bytes(range(256)) * 1000
    decoded = json.loads(b"".join(encode(event(1, payload, BINARY))))
    assert base64.b64decode(decoded["base64"], validate=True) == payload
    fields = {"id": "1-1-0/0", "at": 5.0, "type": "published", "channel": "news"}
    assert decoded == {**fields, "base64": decoded["base64"]}


def test_a_name_that_is_no_valid_unicode_is_encoded() -> None:
    broken = Event(NO_EVENT, 1.0, "joined", "news", {"user": "\ud800"})
    assert json.loads(b"".join(encode(broken)))["user"] == "\ud800"


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([10] * 600, MAX_BATCH_EVENTS),
        ([400_000] * 5, 2),
        ([3_000_000, 10], 1),
        ([10, 3_000_000], 1),
    ],
)
async def test_a_request_is_bounded_by_its_events_and_its_bytes(
    sizes: list[int], expected: int
) -> None:
    events = [event(number, b"x" * size) for number, size in enumerate(sizes, 1)]
    batch = await encode_batch(events[:MAX_BATCH_EVENTS])
    decoded = json.loads(bytes(batch.body))["events"]
    assert (len(decoded), batch.events, batch.last) == (expected, expected, events[expected - 1][0])
    assert len(batch.body) <= MAX_BATCH_BYTES or expected == 1


async def test_control_characters_that_grow_when_they_are_encoded_fit_as_well() -> None:
    events = [event(number, b"\x00" * 150_000) for number in range(1, 4)]
    batch = await encode_batch(events)
    assert batch.events == 1
    assert len(json.loads(bytes(batch.body))["events"]) == 1
