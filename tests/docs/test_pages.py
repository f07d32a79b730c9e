"""The pages for users can be followed: README, tutorial and how-to, block by block."""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import browser
from tests.support.pages import Reader, free_ports
from tests.support.relay_process import ROOT
from tests.support.shell import persons_environment

pytestmark = browser.SHARED

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", DOCS / "tutorial.md", *sorted(DOCS.glob("how-to/*.md"))]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory that looks like the project and may be written to."""
    # Otherwise make would renew it from there, and it would run what lies there ever after.
    fresh = subprocess.run(
        ["make", "--question", ".venv/.dev"], cwd=ROOT, env=persons_environment(), check=False
    )
    assert fresh.returncode == 0, "the environment is out of date: make venv"
    for entry in ROOT.iterdir():
        if entry.suffix != ".pem":
            (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


@pytest.fixture
def reader(project: Path) -> Iterator[Reader]:
    """A reader who works there."""
    with free_ports() as ports:
        reader = Reader(project, ports)
        try:
            yield reader
        finally:
            reader.leave()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
async def test_every_block_of_a_page_works(reader: Reader, page: Path) -> None:
    await reader.follow(await asyncio.to_thread(page.read_text))
    await reader.stop()
