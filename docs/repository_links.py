"""A hook of MkDocs: links to files outside of docs/ lead to the repository."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:]+)(?P<anchor>#[^)]*)?(?=\))")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page's text with absolute addresses for what is not on the site.

    Raises:
        PluginError: the file does not exist.
    """
    docs = Path(config.docs_dir)
    here = (docs / page.file.src_uri).parent

    def absolute(link: re.Match[str]) -> str:
        target = (here / link["path"]).resolve()
        if target.is_relative_to(docs):
            return link[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: no such file: {link['path']}")
        kind = "tree" if target.is_dir() else "blob"
        path = target.relative_to(docs.parent)
        return f"{config.repo_url}/{kind}/main/{path}{link['anchor'] or ''}"

    return LINK.sub(absolute, markdown)
