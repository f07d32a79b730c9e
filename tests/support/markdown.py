"""Pages in Markdown, read as GitHub reads them."""

import re


def anchors(page: str) -> set[str]:
    """Return what a page's headings are called in addresses, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
