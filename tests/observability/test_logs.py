"""The log: the events of its reference page are those of the code, as JSON, without a secret."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
from websockets.exceptions import InvalidStatus

from tests.support.admission import jwt_settings
from tests.support.issuer import sign_token
from tests.support.raw_client import BINARY, CLOSE, TEXT, frame, raw_websocket
from tests.support.relay_process import (
    HOST,
    NO_CA,
    PACKAGE,
    PROGRAM_S,
    ROOT,
    RelayProcess,
    StartRelay,
    await_close,
    environment,
    receive,
)

PAGE = ROOT / "docs" / "reference" / "logs.md"
ROW = re.compile(r"^\| `(?P<event>[^`]+)` \| (?P<level>[a-z]+) \|(?P<fields>[^|]*)\|")
ALWAYS = {"timestamp", "level", "event"}
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}
SOMETIMES = {"trace_id", "span_id"}


class LogEvent(NamedTuple):
    """An event of the log: its text, its level, and the names of its fields."""

    text: str
    level: str
    fields: frozenset[str]


def documented_events() -> list[LogEvent]:
    rows = map(ROW.match, PAGE.read_text().splitlines())
    return [
        LogEvent(row["event"], row["level"], frozenset(re.findall(r"`([^`]+)`", row["fields"])))
        for row in rows
        if row is not None
    ]


def events_of_the_code() -> Iterator[LogEvent]:
    """Yield the events that the code logs, found by the calls of its loggers."""
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        for scope in ast.walk(tree):
            if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
                for call in ast.walk(scope):
                    if isinstance(call, ast.Call):
                        yield from _events(call, scope, file)


def _events(call: ast.Call, scope: ast.AST, file: Path) -> Iterator[LogEvent]:
    match call:
        case ast.Call(func=ast.Name("SettingsWarning"), args=[ast.Constant(str(text)), facts]):
            yield LogEvent(text, "warning", _keys(facts, scope))  # as `run` logs it
        case ast.Call(func=ast.Attribute(ast.Name("log"), "warning"), args=[ast.Attribute()]):
            assert ast.unparse(call) == "log.warning(warning.text, extra=warning.facts)"
        case ast.Call(func=ast.Attribute(ast.Name("log"), "log"), args=[ast.Name(level), text]):
            choice = _value_of(level, scope)
            assert isinstance(choice, ast.IfExp), file
            for branch in (choice.body, choice.orelse):
                yield LogEvent(_text(text), _text(branch), _fields(call, scope))
        case ast.Call(func=ast.Attribute(ast.Name("log"), level), args=[text]):
            assert level in LEVELS, f"{file}: {ast.unparse(call)}"
            named = "error" if level == "exception" else level
            yield LogEvent(_text(text), named, _fields(call, scope))
        case ast.Call(func=ast.Attribute(ast.Name("log"))):
            raise AssertionError(f"{file}: unexpected call: {ast.unparse(call)}")


def _text(node: ast.AST) -> str:
    """Return a constant string, or the level that a constant of `logging` names."""
    match node:
        case ast.Constant(str(text)):
            return text
        case ast.Attribute(ast.Name("logging"), name):
            return name.lower()
    raise AssertionError(f"not a constant: {ast.unparse(node)}")


def _fields(call: ast.Call, scope: ast.AST) -> frozenset[str]:
    assert isinstance(call.func, ast.Attribute)
    fields = frozenset({"exception"} if call.func.attr == "exception" else ())
    for keyword in call.keywords:
        fields |= {"exception"} if keyword.arg == "exc_info" else _keys(keyword.value, scope)
    return fields


def _keys(node: ast.AST, scope: ast.AST) -> frozenset[str]:
    facts = _value_of(node.id, scope) if isinstance(node, ast.Name) else node
    assert isinstance(facts, ast.Dict), ast.unparse(node)
    return frozenset(_text(key) for key in facts.keys if key is not None)


def _value_of(name: str, scope: ast.AST) -> ast.AST:
    (value,) = (
        node.value
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign)
        and [ast.unparse(target) for target in node.targets] == [name]
    )
    return value


# docs/logs.md


def test_the_table_has_every_event_of_the_code_and_no_other() -> None:
    rows = documented_events()
    assert len(rows) == len(set(rows)), "duplicate rows"
    assert set(rows) == set(events_of_the_code())


@pytest.mark.fast
def test_the_table_is_sorted() -> None:
    rows = [event.text for event in documented_events()]
    assert rows == sorted(rows)


@pytest.mark.fast
def test_the_relay_logs_by_module_loggers_only() -> None:
    for file in PACKAGE.rglob("*.py"):
        if "cli" in file.parts or file.name == "greeting.py":
            continue  # they print to a terminal
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(func=ast.Name("print")):
                    raise AssertionError(f"{file}: {ast.unparse(node)}")
                case ast.Call(func=ast.Attribute(ast.Name("logging"), name)):
                    assert name not in LEVELS, f"{file}: {ast.unparse(node)}"
                case ast.Assign([ast.Name(name)], ast.Call(args=[ast.Name("__name__")])):
                    assert name == "log", f"{file}: {ast.unparse(node)}"


# The lines of a relay


def assert_documented(lines: Sequence[dict[str, Any]]) -> None:
    """Assert that the lines of the relay's own loggers are events of docs/logs.md."""
    known = set(documented_events())
    for line in lines:
        fields = frozenset(line) - ALWAYS - SOMETIMES
        if "logger" not in line:
            assert LogEvent(line["event"], line["level"], fields) in known, line


async def test_the_lines_of_a_running_relay_are_documented_events(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(
        limits={"max_connections": 1, "send_backlog_bytes": 1024},
        logging={"level": "debug"},
        shutdown={"spread_s": 0},
    )
    async with relay.client("news"):
        with pytest.raises(InvalidStatus):
            await relay.client("news")
    await relay.await_log("client disconnected")
    assert await relay.stop() == 0
    logged = {event["event"] for event in relay.log_events}
    assert {"ready", "refused", "clients refused", "draining", "stopped"} <= logged
    assert_documented(relay.log_events)


async def test_the_log_contains_nothing_that_a_client_sent(relay_with: StartRelay) -> None:
    relay = relay_with(
        auth=jwt_settings(),
        limits={"max_message_bytes": 1024},
        logging={"level": "debug"},
        compression={"enabled": True},
        shutdown={"spread_s": 0},
    )
    word, invalid = "very-secret", sign_token(sub="very-secret")[:-8]
    valid = sign_token(relay={"subscribe": ["*"], "publish": ["*"]})
    bearer = {"Authorization": f"Bearer {valid}"}
    for payload in (word, word.encode(), word * 500):
        async with relay.client("news", additional_headers=bearer) as client:
            await client.send(payload)
            if len(payload) < 1024:
                assert await receive(client) == payload
            else:
                assert (await await_close(client))[0] == 1009
    for invalid_frame in (
        frame(TEXT, word.encode() + b"\xff"),
        frame(BINARY, word.encode(), reserved=4),
        frame(CLOSE, b"\x03\xe8" + word.encode()),
        frame(3, word.encode()),
    ):
        path = f"/channels/news?access_token={valid}"
        async with raw_websocket(HOST, relay.port, path) as raw:
            await raw.send(invalid_frame)
            await raw.read_to_end()
    async with httpx2.AsyncClient(verify=NO_CA, trust_env=False, headers=bearer) as http:
        for kind in ("text/plain", "application/x-ndjson"):
            posted = await http.post(
                relay.http_url(f"/channels/{word}"),
                content=word.encode() + b"\xff",
                headers={"Content-Type": kind, "User-Agent": word, "X-Forwarded-For": word},
            )
            assert posted.status_code == 400
    for path in (f"/{word}", f"/channels/{word}?since={word}&access_token={invalid}"):
        with pytest.raises(InvalidStatus):
            await relay.client(path=path, additional_headers={"Origin": word, "Cookie": word})
    assert await relay.stop() == 0
    log = "\n".join(relay.log_lines)
    assert log.count('"client disconnected"') == 7
    for secret in (word, *valid.split("."), *invalid.split(".")):
        assert secret not in log
    assert_documented(relay.log_events)


PROGRAM = """
import logging, sys, warnings
from websocket_relay import logs
from websocket_relay.config import model
logs.configure(model.LoggingSettings(format=sys.argv[1]))
library = logging.getLogger("some.library")
library.warning("%s is %d", "this", 1, extra={"more": [1]})
library.error("no answer from %s (again?)", "https://me:pa55@host:1/path?key=s3cret")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("uvicorn.error").exception("failed")
warnings.warn("careful")
raise RuntimeError("the end")
"""


def run_program(log_format: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, log_format],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
    )
    assert done.returncode == 1
    return done.stderr.splitlines()


def test_lines_of_libraries_warnings_and_a_crash_are_json() -> None:
    lines = list(map(json.loads, run_program("json")))
    library, failure, uvicorn, warning, crash = lines
    for line in lines:
        assert line.keys() >= ALWAYS
    assert library["event"] == "this is 1"
    assert (library["logger"], library["level"], library["more"]) == (
        "some.library",
        "warning",
        [1],
    )
    assert failure["event"] == "no answer from https://host:1/path (again?)"
    assert (uvicorn["logger"], uvicorn["level"]) == ("uvicorn.error", "error")
    assert "ZeroDivisionError" in uvicorn["exception"]
    assert warning["logger"] == "py.warnings"
    assert "careful" in warning["event"]
    assert (crash["event"], crash["level"]) == ("crashed", "critical")
    assert "RuntimeError: the end" in crash["exception"]
    assert_documented([crash])


def test_a_crash_in_a_log_of_text_is_a_traceback_without_variables() -> None:
    lines = run_program("text")
    assert "this is 1" in lines[0]
    assert "RuntimeError: the end" in lines[-1]


def test_the_first_line_of_a_relay_is_its_first_event(tmp_path: Path) -> None:
    with RelayProcess(tmp_path) as relay:
        assert relay.log_events[0]["event"] == "metrics listening"
        assert relay.unexpected_lines == []
