"""README and how-to guides can be followed, block by block."""

from pathlib import Path

import pytest

from tests.support import browser
from tests.support.pages import PageReader
from tests.support.relay_process import ROOT
from tests.support.terminal import Output, poll_until

pytestmark = browser.SHARED

README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs").glob("how-to/*.md"))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
async def test_every_block_of_a_guide_works(reader: PageReader, page: Path) -> None:
    async with reader:
        await reader.follow(page)


def greetings(output: Output) -> list[str]:
    return [line for line in output.lines if line.startswith("hello from ")]


@pytest.mark.timeout(180)
async def test_every_message_of_the_readme_arrives_in_a_terminal_and_in_a_browser(
    reader: PageReader,
) -> None:
    async with reader:
        await reader.follow(README)
        subscribers = [output for output in reader.outputs if greetings(output)]
        assert len(subscribers) == 2
        await poll_until(
            lambda: all(len(greetings(each)) == 4 for each in subscribers),
            lambda: "\n".join(map(str, subscribers)),
        )
    terminal, window = map(greetings, subscribers)
    assert terminal == window
