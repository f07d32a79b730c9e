"""The reference pages state what the code does: their tables are compared with it."""

import asyncio
import dataclasses
import inspect
import math
import re
import runpy
from collections.abc import Callable
from http import HTTPStatus
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import pytest
import websocket_relay
from prometheus_client.parser import text_string_to_metric_families
from websocket_relay.cli.main import CLIENT_COMMANDS, main
from websocket_relay.client import events
from websocket_relay.config.changes import RELOADABLE
from websocket_relay.config.loader import load
from websocket_relay.config.model import JwtSettings
from websocket_relay.lifecycle import Phase
from websocket_relay.outcomes import (
    FAILED,
    INTERRUPTED,
    WRONG_USAGE,
    Close,
    Refusal,
    RelayError,
    SettingsError,
    TokenProblem,
)

from tests.support.issuer import KeyServer, key_set, make_signer
from tests.support.markdown import code_spans, section, tables
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import HOST, PACKAGE, ROOT, RelayProcess, StartRelay

REFERENCE = ROOT / "docs" / "reference"

SETTINGS, COMMANDS, CLOSES, METRICS, HTTP, PYTHON_CLIENT, BROWSER_CLIENT = (
    (REFERENCE / f"{name}.md").read_text()
    for name in (
        "settings",
        "commands",
        "close-codes",
        "metrics",
        "http",
        "python-client",
        "browser-client",
    )
)

TYPES_OF_RELAY_JS = (PACKAGE / "browser" / "relay.d.ts").read_text()


def first_table(page: str, heading: str) -> list[list[str]]:
    return tables(section(page, heading))[0]


# Settings


@pytest.mark.fast
def test_the_tables_of_settings_are_generated_from_the_code() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "settings_page.py"))
    assert generator["with_tables"](SETTINGS) == SETTINGS, "run make config"


@pytest.mark.fast
def test_the_page_of_connection_states_is_generated_from_the_code() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "close_states_page.py"))
    assert generator["page"]() == generator["PAGE"].read_text(), "run make config"


@pytest.mark.fast
def test_the_table_of_settings_that_change_at_run_time_is_complete() -> None:
    rows = first_table(SETTINGS, "Change settings at run time")
    names = [span for settings, _ in rows for span in code_spans(settings.partition(";")[0])]
    except_for = {"auth.jwt.*", "auth.jwt.jwks_url"}
    listed = {*names} - except_for
    listed |= {f"auth.jwt.{name}" for name in JwtSettings.model_fields if name != "jwks_url"}
    assert except_for < {*names}
    assert listed == {".".join(path) for path in RELOADABLE}


@pytest.mark.fast
def test_the_errors_shown_for_settings_are_those_of_the_relay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("server: {port: 70000}\nauth: {mode: jwt}\n")
    with pytest.raises(SettingsError) as raised:
        load(None, {"RELAY__LIMITS__MAX_CONECTIONS": "5000"})
    shown = re.findall(r"^websocket-relay: (.+)$", SETTINGS, re.MULTILINE)
    assert shown == list(raised.value.problems)


# Close codes and refusals


def closes_on_the_page() -> set[tuple[int, str, str]]:
    return {
        (int(number), reason.strip("`").removesuffix("; retry_ms=N"), label.strip("`"))
        for number, reason, label, *_ in first_table(CLOSES, "Closes")
    }


def refusals_on_the_page() -> set[tuple[int, str, str]]:
    return {
        (int(status), reason.strip("`"), label.strip("`"))
        for status, reason, label, *_ in first_table(CLOSES, "Refusals")
    }


@pytest.mark.fast
def test_the_table_of_closes_is_complete() -> None:
    assert closes_on_the_page() == {(each.code, each.reason, each.label) for each in Close}


@pytest.mark.fast
def test_the_table_of_refusals_is_complete() -> None:
    assert refusals_on_the_page() == {
        (int(each.status), each.reason, each.label) for each in Refusal
    }


@pytest.mark.fast
def test_the_labels_on_the_page_about_dropped_clients_exist() -> None:
    page = (ROOT / "docs/how-to/dropped-clients.md").read_text()
    closes = first_table(page, "2. Find the cause")
    refusals = first_table(page, "Refused")
    named = {label for row in closes for label in code_spans(row[1])}
    assert named <= {close.label for close in Close}
    assert len(named) > 10
    named = {label for row in refusals for label in code_spans(row[0])}
    assert named <= {each.label for each in Refusal}
    assert len(named) > 10


def test_the_table_of_token_problems_is_complete() -> None:
    details = [code_spans(detail) for detail, _ in first_table(CLOSES, "Why a token is invalid")]
    assert details == [[problem] for problem in TokenProblem]


async def status_of(relay: RelayProcess, request: bytes) -> int:
    """Send bytes on a connection of their own; return the status of the answer."""
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(HOST, relay.port)
        writer.write(request)
        status_line = await reader.readline()
        writer.close()
    return int(status_line.split()[1])


async def test_the_table_of_http_s_own_answers_is_complete(relay: RelayProcess) -> None:
    host = b"Host: relay\r\n"
    answers = {
        await status_of(relay, request)
        for request in (
            b"GET / HTTP/1.1\r\n" + 2 * host + b"\r\n",
            b"GET /nowhere HTTP/1.1\r\n" + host + b"\r\n",
            b"PUT /channels/a HTTP/1.1\r\n" + host + b"\r\n",
            b"GET /channels/a HTTP/1.1\r\n" + host + b"\r\n",
            b"GET / HTTP/1.1\r\n" + host + 300 * b"A: b\r\n" + b"\r\n",
            b"POST / HTTP/1.1\r\n" + host + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
            b"GET / HTTP/2.0\r\n" + host + b"\r\n",
        )
    }
    others = {HTTPStatus.INTERNAL_SERVER_ERROR}  # a bug, which is not provoked here
    rows = first_table(CLOSES, "Answers of HTTP itself")
    assert answers | others == {int(status) for status, *_ in rows}


# Metrics


def labels_on_the_page(cell: str) -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """Return the label names of a cell with their values, one tuple for each series."""
    names, _, values = cell.partition(":")
    series: set[tuple[str, ...]]
    if "#closes" in values:
        series = {(str(number), label) for number, _, label in closes_on_the_page()}
    elif "#refusals" in values:
        series = {(label,) for _, _, label in refusals_on_the_page()}
    else:
        series = {(value,) for value in code_spans(values)}
    return {tuple(code_spans(names)): series} if names else {}


async def test_the_tables_of_metrics_are_complete(tls_relay_with: StartRelay) -> None:
    with KeyServer(key_set(make_signer("ES256", "key"))) as keys:
        jwt = {"algorithms": ["ES256"], "jwks_url": keys.url}
        hook, hooks = {"url": f"http://{HOST}:9/"}, {"url": f"http://{HOST}:9/"}
        pages = []
        for auth in ({"mode": "jwt", "jwt": jwt}, {"mode": "hook", "hook": hook}):
            relay = tls_relay_with(auth=auth, hooks=hooks, presence={"channels": ["*"]})
            pages.append((await relay.get_metrics()).raise_for_status().text)
    exported = {}
    for family in chain.from_iterable(map(text_string_to_metric_families, pages)):
        if not family.name.startswith("websocket_"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
        for sample in family.samples:
            of_sample = {key: value for key, value in sample.labels.items() if key != "le"}
            if of_sample:
                series = labels.setdefault(tuple(of_sample), set())
                if not name.endswith("_info"):  # its values are versions
                    series.add(tuple(of_sample.values()))
        exported[name] = (family.type, labels)
    documented = {
        code_spans(name)[0]: (kind, labels_on_the_page(labels))
        for table in tables(METRICS)
        for name, kind, labels, _ in table
    }
    assert documented == exported


# HTTP


@pytest.mark.fast
def test_the_table_of_readiness_is_complete() -> None:
    _, statuses = tables(section(HTTP, "Probes"))
    not_ready = {*Phase} - {Phase.READY, Phase.REFUSING} | {"backplane outage"}
    assert {code_spans(status)[0] for status, _ in statuses} == not_ready


async def test_every_endpoint_in_the_tables_is_there_and_none_is_left_out(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(presence={"channels": ["*"]})
    of_the_relay, of_metrics = (
        {tuple(request.split()) for cell, _ in table for request in code_spans(cell)}
        for table in tables(section(HTTP, "Endpoints"))
    )
    described = (await relay.get("/openapi.json")).json()["paths"]
    assert of_the_relay >= {
        (method.upper(), path) for path, methods in described.items() for method in methods
    }
    for method, path in of_the_relay:
        request = f"{method} {path.format(channel='a')} HTTP/1.1\r\nHost: relay\r\n\r\n"
        assert await status_of(relay, request.encode()) not in (404, 405), path
    assert of_metrics == {("GET", path) for path in ("/metrics", "/healthz", "/readyz")}
    for _, path in of_metrics:
        assert (await relay.get_metrics(path)).status_code == 200


async def test_the_table_of_stats_is_complete(relay: RelayProcess) -> None:
    stats = (await relay.get("/stats")).json()
    metrics = {
        code_spans(row[0])[0].removeprefix("websocket_").removesuffix("_total")
        for table in tables(METRICS)
        for row in table
    }
    named = {field for row in first_table(HTTP, "Stats") for field in code_spans(row[0])}
    assert named == stats.keys() - metrics


# Commands


def help_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


ARGUMENT = re.compile(r"^  (?P<names>\S.*?)  +(?P<text>\S.*)$", re.MULTILINE)
DEFAULT = re.compile(r"\(default: (.+)\)$")


def arguments_of(text: str) -> dict[str, str]:
    """Return the arguments in a help text with their defaults; "" where it states none."""
    _, _, listed = text.partition("\n\n")
    found = ((match["names"], DEFAULT.search(match["text"])) for match in ARGUMENT.finditer(listed))
    return {
        names: default[1] if default else ""
        for names, default in found
        if names.startswith("-") or names.isupper()
        if names not in ("-h, --help", "COMMAND")
    }


def options_on_the_page(heading: str) -> dict[str, str]:
    return {
        ", ".join(code_spans(names)): default.replace("`", "")
        for names, default, _ in first_table(COMMANDS, heading)
    }


@pytest.mark.fast
@pytest.mark.parametrize(
    "command", ["serve", "check", "healthcheck", "dev-cert", "listen", "send", "bench", "verify"]
)
def test_the_tables_of_options_are_those_of_the_help(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    has_own_options = command not in ("serve", "check")
    documented = options_on_the_page(command) if has_own_options else {}
    if command in CLIENT_COMMANDS:
        documented |= options_on_the_page("Options of the client commands")
    elif command != "dev-cert":
        documented |= options_on_the_page("Options for settings")
    assert documented == arguments_of(help_of([command], capsys))


@pytest.mark.fast
def test_the_table_of_commands_is_complete(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    listed = re.findall(r"^    ([a-z-]+)  ", help_of([], capsys), re.MULTILINE)
    assert [code_spans(name)[0] for name, _ in first_table(COMMANDS, "Commands")] == listed


@pytest.mark.fast
def test_the_table_of_exit_statuses_is_complete() -> None:
    statuses = {int(status) for status, _ in first_table(COMMANDS, "Exit statuses")}
    assert statuses == {0, FAILED, WRONG_USAGE, INTERRUPTED}


# The Python client


@pytest.mark.fast
def test_every_exported_name_is_on_the_page_of_the_python_client() -> None:
    exported = {*websocket_relay.__all__} - {"__version__"}
    assert {name for name in exported if f"`{name}`" not in PYTHON_CLIENT} == set()


def assert_arguments(table: list[list[str]], call: Callable[..., Any], *positional: str) -> None:
    """Compare a table of keyword arguments with those of a call."""
    documented = {code_spans(name)[0]: default for name, default, _ in table}
    parameters = inspect.signature(call).parameters
    assert list(documented) == [name for name in parameters if name not in positional]
    for name, default in documented.items():
        if default == "no function":
            continue
        assert eval(code_spans(default)[0], {"math": math}) == parameters[name].default, name


def members_in(table: list[list[str]], name: str) -> set[str]:
    return {found for cell, _ in table for found in re.findall(rf"{name}\.(\w+)", cell)}


def public_members(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


@pytest.mark.fast
def test_the_arguments_of_the_python_client_have_the_defaults_in_the_table() -> None:
    arguments, members = tables(section(PYTHON_CLIENT, "Relay"))
    assert_arguments(arguments, websocket_relay.Relay, "url")
    assert public_members(websocket_relay.Relay) | {"channel"} == members_in(members, "relay")


@pytest.mark.fast
def test_the_arguments_and_members_of_a_subscription_are_in_their_tables() -> None:
    arguments, members, _ = tables(section(PYTHON_CLIENT, "Receiving"))
    assert_arguments(arguments, websocket_relay.Relay.subscribe, "self", "channel")
    assert_arguments(arguments, websocket_relay.SyncRelay.subscribe, "self", "channel")
    assert {"channel", "count", "members", "unread", "unsubscribe"} == members_in(
        members, "subscription"
    )


@pytest.mark.fast
def test_the_synchronous_client_has_the_options_and_members_of_the_page() -> None:
    options = inspect.signature(websocket_relay.Relay).parameters
    assert inspect.signature(websocket_relay.SyncRelay).parameters == options
    members = members_in(first_table(PYTHON_CLIENT, "Without asyncio"), "relay")
    assert public_members(websocket_relay.SyncRelay) | {"channel"} == members


@pytest.mark.fast
def test_the_fields_of_messages_and_events_are_in_their_tables() -> None:
    fields = {
        each: [field.name for field in dataclasses.fields(each)]
        for each in (events.Message, *get_args(events.Event))
    }
    received = tables(section(PYTHON_CLIENT, "Receiving"))[2]
    assert [code_spans(name)[0] for name, _ in received] == fields.pop(events.Message)
    documented = {
        code_spans(row[0])[0]: code_spans(row[1]) for row in first_table(PYTHON_CLIENT, "Events")
    }
    assert documented == {each.__name__: names for each, names in fields.items()}


@pytest.mark.fast
def test_the_table_of_errors_is_complete() -> None:
    exported = (getattr(websocket_relay, name) for name in websocket_relay.__all__)
    errors = {
        each.__name__
        for each in exported
        if isinstance(each, type) and issubclass(each, RelayError) and each is not RelayError
    }
    assert {code_spans(name)[0] for name, _ in first_table(PYTHON_CLIENT, "Errors")} == errors


# The browser client


def members_of(declaration: str) -> list[str]:
    """Return the names of an interface's or a class's members in relay.d.ts, once each."""
    found = re.search(
        rf"^export (?:class|interface) {declaration} [^{{]*{{\n(.*?)^}}",
        TYPES_OF_RELAY_JS,
        re.DOTALL | re.MULTILINE,
    )
    assert found is not None, declaration
    names = re.findall(r"^  (?:readonly |get |set )?(\w+)\??[:(<]", found[1], re.MULTILINE)
    return list(dict.fromkeys(names))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("heading", "declaration"), [("Options", "RelayOptions"), ("Channel options", "ChannelOptions")]
)
def test_the_options_of_the_browser_client_are_in_the_tables(
    heading: str, declaration: str
) -> None:
    documented = [code_spans(name)[0] for name, *_ in first_table(BROWSER_CLIENT, heading)]
    assert documented == members_of(declaration)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("heading", "declaration"), [("Members", "Relay"), ("Channel members", "Channel")]
)
def test_the_members_of_the_browser_client_are_in_the_tables(
    heading: str, declaration: str
) -> None:
    documented = {
        code_spans(name)[0].partition("(")[0] for name, _ in first_table(BROWSER_CLIENT, heading)
    }
    assert documented == {*members_of(declaration)} - {"constructor"}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("heading", "declaration"), [("Events", "Relay"), ("Channel events", "Channel")]
)
def test_the_events_of_the_browser_client_are_in_the_tables(heading: str, declaration: str) -> None:
    documented = {
        code_spans(row[0])[0]: {*code_spans(row[1])} for row in first_table(BROWSER_CLIENT, heading)
    }
    assert documented == {
        name: {*members_of(f"{declaration}{name.capitalize()}Event")}
        for name in members_of(f"{declaration}Events")
    }


@pytest.mark.fast
def test_the_codes_of_the_browser_client_s_errors_are_in_the_table() -> None:
    declared = re.search(r"^export type RelayErrorCode = (.+);$", TYPES_OF_RELAY_JS, re.MULTILINE)
    assert declared is not None
    documented = [code_spans(code)[0] for code, _ in first_table(BROWSER_CLIENT, "Publishing")]
    assert documented == re.findall(r'"(\w+)"', declared[1])
