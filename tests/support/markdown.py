"""Pages in Markdown, as GitHub renders them."""

import re
from collections.abc import Iterator

ROW = re.compile(r"(?<!\\)\|")


def anchor_of(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings."""
    return set(map(anchor_of, re.findall(r"^#+ (.+)$", page, re.MULTILINE)))


def table_rows(page: str) -> Iterator[tuple[str, ...]]:
    """Yield the cells of the rows of all tables on a page, their headers left out."""
    is_body = False
    for line in page.splitlines():
        if not line.startswith("|"):
            is_body = False
        elif re.fullmatch(r"[|\s:-]+", line):
            is_body = True
        elif is_body:
            yield tuple(cell.strip() for cell in ROW.split(line)[1:-1])
