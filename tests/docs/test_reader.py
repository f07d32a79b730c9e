"""The reader of the docs reports where a page is wrong, and leaves no process behind."""

from pathlib import Path

import pytest

from tests.support.pages import PageReader, fenced_blocks, shell_commands
from tests.support.terminal import Output

PAGE = """\
# The title

```sh
echo one \\
  two

# a comment
echo three
```

## A heading, with `code`

1. A step:

    ```yaml title="my.yaml"
    # no heading
    server:
      port: 1
    ```
"""


async def follow(reader: PageReader, directory: Path, text: str) -> None:
    page = directory / "page.md"
    page.write_text(text)
    async with reader:
        await reader.follow(page)


@pytest.mark.fast
def test_blocks_have_a_language_a_title_a_line_and_a_section() -> None:
    shell, settings = fenced_blocks(PAGE)
    assert (shell.language, shell.title, shell.line, shell.section) == ("sh", "", 3, "the-title")
    assert (settings.language, settings.title, settings.line) == ("yaml", "my.yaml", 15)
    assert settings.section == "a-heading-with-code"
    assert settings.text == "# no heading\nserver:\n  port: 1\n"


@pytest.mark.fast
@pytest.mark.parametrize("page", ["```\na\n```\n", "``` sh\na\n```\n", "a\n\n```sh\na\n"])
def test_a_fence_of_another_form_is_not_skipped(page: str) -> None:
    with pytest.raises(AssertionError, match=r"^line \d: "):
        fenced_blocks(page)


@pytest.mark.fast
def test_commands_are_joined_and_numbered() -> None:
    (shell, _) = fenced_blocks(PAGE)
    assert list(shell_commands(shell.text)) == [(1, "echo one   two"), (5, "echo three")]


@pytest.mark.fast
def test_lines_that_were_shown_once_do_not_count_again() -> None:
    output = Output("a command", ["one", "noise", '{"position":"1-2-3"}', "one"])
    assert not output.shows("one\ntwo\n")
    assert output.shows('one\n{"position":"…-…-…"}\n')
    assert output.shows("one\n")
    assert not output.shows("one\n")


async def test_a_failure_names_the_page_and_the_line(reader: PageReader, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="status 3") as caught:
        await follow(reader, tmp_path, "# A page\n\n```sh\ntrue\n(exit 3)\n```\n")
    assert caught.value.__notes__ == ["page.md, line 5: (exit 3)"]


async def test_a_command_leaves_no_process_behind(reader: PageReader, tmp_path: Path) -> None:
    # The reader waits for the end of the output, which the process in the background has open.
    await follow(reader, tmp_path, "```sh\nsleep 1000 & echo started\n```\n```text\nstarted\n```\n")


async def test_a_command_that_should_keep_running_and_ends_fails(
    reader: PageReader, tmp_path: Path
) -> None:
    page = "```sh\npython -m http.server 8000 --bind 192.0.2.1  # until Ctrl-C\n```\n"
    with pytest.raises(AssertionError, match="ended with status 1"):
        await follow(reader, tmp_path, page)


async def test_a_command_takes_the_port_of_another_one(reader: PageReader, tmp_path: Path) -> None:
    serve = "python -m http.server --directory {} 8000  # until Ctrl-C\n"
    await follow(
        reader,
        tmp_path,
        '```html title="one/a.txt"\none\n```\n```html title="two/a.txt"\ntwo\n```\n'
        f"```sh\n{serve.format('one')}{serve.format('two')}"
        "curl --silent --fail http://localhost:8000/a.txt\n```\n```text\ntwo\n```\n",
    )
