"""Links of the pages outside of docs/, and to them. MkDocs checks those within docs/."""

import re
from pathlib import Path

import pytest

from tests.support.markdown import anchors
from tests.support.relay_process import ROOT

pytestmark = pytest.mark.fast

DOCS = ROOT / "docs"
FOLDERS = (".agents", ".github", "bench", "helm", "k8s")
BUILT = {"build", "node_modules"}
"""Folders with what a program has written or downloaded."""

IN_FOLDERS = [page for name in FOLDERS for page in (ROOT / name).rglob("*.md")]
OUTSIDE = [
    *ROOT.glob("*.md"),
    *(page for page in IN_FOLDERS if not BUILT.intersection(page.relative_to(ROOT).parts)),
]
LINK = re.compile(r"\]\((?P<path>[^)#:\s]*)(?:#(?P<anchor>[^)\s]+))?\)")


def broken_links(page: Path) -> list[str]:
    """Return the links of a page that lead to no file, or to no heading of a page."""
    return [
        f"{page.relative_to(ROOT)}: {link[0][2:-1]}"
        for link in LINK.finditer(page.read_text())
        if not _has_target(page, link["path"], link["anchor"])
    ]


def _has_target(page: Path, path: str, anchor: str | None) -> bool:
    target = (page.parent / path).resolve() if path else page
    if target.is_relative_to(DOCS) and page.is_relative_to(DOCS):
        return True  # or MkDocs reports it
    if anchor is None or target.suffix != ".md":
        return target.exists()
    return target.exists() and anchor in anchors(target.read_text())


@pytest.mark.parametrize("page", OUTSIDE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_outside_of_docs_has_a_target(page: Path) -> None:
    assert broken_links(page) == []


def test_every_link_out_of_docs_has_a_target() -> None:
    assert [link for page in sorted(DOCS.rglob("*.md")) for link in broken_links(page)] == []
