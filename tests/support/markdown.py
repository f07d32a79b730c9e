"""Parse pages of Markdown as GitHub does: anchors, sections, tables and code spans."""

import re


def anchor_of(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")


def anchors(page: str) -> set[str]:
    """Return the anchors of all headings of a page, as GitHub makes them."""
    return set(map(anchor_of, re.findall(r"^#+ (.+)$", page, re.MULTILINE)))


def section(page: str, heading: str) -> str:
    """Return the text below a heading, up to the next heading of any level."""
    found = re.search(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", page, re.DOTALL | re.MULTILINE
    )
    assert found is not None, f"no heading {heading!r}"
    return found[1]


def tables(text: str) -> list[list[list[str]]]:
    """Return the tables of a text: lists of rows, without their heads; a row is a list of cells."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[_cells(row) for row in block.splitlines()[2:]] for block in blocks]


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().removeprefix("|").removesuffix("|").split("|")]


def code_spans(cell: str) -> list[str]:
    """Return the texts in backticks of a table cell."""
    return re.findall(r"`([^`]+)`", cell)
