"""docs/explanation/security.md promises what tests show: they exist, and its examples work."""

import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from websocket_relay.outcomes import Close, Refusal
from websockets.sync.client import connect

from tests.support.markdown import tables
from tests.support.pages import fenced_blocks
from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import ROOT, StartRelay, run_command

PAGE = (ROOT / "docs" / "explanation" / "security.md").read_text()

ATTACKS = [row for table in tables(PAGE) for row in table if len(row) == 4]
"""What an attacker tries, what prevents it, the reasons of the refusal or close, the tests."""


def named_tests(text: str) -> list[tuple[str, str]]:
    """Return the tests that a text names: `tls: messages go over tls`."""
    return re.findall(r"`(\w+): ([a-z0-9_ ]+)`", text)


def examples(language: str) -> list[str]:
    return [block.text for block in fenced_blocks(PAGE) if block.language == language]


@pytest.mark.fast
def test_every_test_that_the_page_names_exists() -> None:
    named = named_tests(PAGE)
    assert named
    files = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    missing = []
    for file, sentence in named:
        path = files.get(f"test_{file}")
        source = path.read_text() if path else ""
        if f"def test_{sentence.replace(' ', '_')}(" not in source:
            missing.append(f"{file}: {sentence}")
    assert missing == []


@pytest.mark.fast
def test_every_attack_names_a_test() -> None:
    assert len(ATTACKS) > 20
    assert [row[0] for row in ATTACKS if not named_tests(row[3])] == []


@pytest.mark.fast
def test_the_reasons_in_the_tables_are_labels_of_closes_and_refusals() -> None:
    named = {label for row in ATTACKS for label in re.findall(r"[a-z0-9_]+", row[2])}
    assert named <= {outcome.label for outcome in (*Close, *Refusal)}


def test_the_settings_on_the_page_are_valid(tmp_path: Path) -> None:
    assert examples("yaml")
    for example in examples("yaml"):
        (tmp_path / "my.yaml").write_text(example)
        done = run_command("check", "--config-file", "my.yaml", directory=tmp_path)
        assert (done.exit_code, done.faults) == (0, []), example


def test_the_relay_accepts_the_token_that_the_page_makes(
    relay_with: StartRelay, tmp_path: Path
) -> None:
    secret = secrets.token_hex(32)
    (tmp_path / "secret.txt").write_text(f"{secret}\n")
    (program,) = examples("python")
    made = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    relay = relay_with(auth={"mode": "jwt", "jwt": {"secret": secret}})
    headers = {"Authorization": f"Bearer {made.stdout.strip()}"}
    with connect(relay.ws_url("/channels/chat.lobby"), additional_headers=headers) as client:
        client.send("hello, world")
        assert client.recv(PATIENCE_S) == "hello, world"
