"""The script of docs/how-to/publish-from-a-backend.md retries as its page states."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import ModuleType
from typing import Any

import pytest

from tests.support.pages import fenced_blocks
from tests.support.relay_process import HOST, ROOT

PAGE = ROOT / "docs" / "how-to" / "publish-from-a-backend.md"
CUT_OFF = 0
"""Stands for a connection that ends without a response."""


class FakeTime:
    """Stands for the module `time` in the script only; pauses take no time.

    Other threads use the module, too: the time limits of the tests, for example.
    """

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def monotonic(self) -> float:
        return sum(self.pauses)


@pytest.fixture
def script() -> Any:
    """The script as a module."""
    (text,) = (each.text for each in fenced_blocks(PAGE.read_text()) if each.title == "publish.py")
    module: Any = ModuleType("publish")
    exec(compile(text, "publish.py", "exec"), module.__dict__)
    module.time = FakeTime()
    return module


@pytest.fixture
def waits(script: Any) -> list[float]:
    """The pauses that the script makes."""
    pauses: list[float] = script.time.pauses
    return pauses


@contextmanager
def answering(statuses: Sequence[int]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Answer one request after another with these; yield the URL, and keys and bodies received."""
    left, requests = list(statuses), []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            requests.append((self.headers["Idempotency-Key"], body))
            status = left.pop(0)
            if status == CUT_OFF:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Retry-After", "3")
            self.end_headers()
            self.wfile.write(b'{"position":"1-2-3"}')

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer((HOST, 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_address[1]}/channels/news", requests
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("outcome", [503, 504, 502, 408, CUT_OFF])
def test_a_message_is_sent_again_under_its_key_until_the_relay_accepts_it(
    script: Any, waits: list[float], outcome: int
) -> None:
    with answering([outcome, outcome, 202]) as (url, requests):
        assert script.publish(url, "text") == "1-2-3"
    keys = {key for key, _ in requests}
    assert len(keys) == 1
    assert [body for _, body in requests] == ["text"] * 3
    assert waits == [1 if outcome == CUT_OFF else 3] * 2


def test_each_message_has_a_key_of_its_own(script: Any) -> None:
    with answering([202, 202]) as (url, requests):
        for _ in range(2):
            script.publish(url, "text")
    assert len({key for key, _ in requests}) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 413, 422])
def test_a_refusal_of_the_request_is_final(script: Any, waits: list[float], status: int) -> None:
    with answering([status]) as (url, requests):
        with pytest.raises(script.PublishError):
            script.publish(url, "text")
        assert (len(requests), waits) == (1, [])


def test_a_relay_that_is_not_there_is_tried_for_a_minute(script: Any, waits: list[float]) -> None:
    with answering([]) as (url, _):
        pass
    with pytest.raises(script.PublishError):
        script.publish(url, "text")
    assert sum(waits) == 60
