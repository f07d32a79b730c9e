"""Count the words of a private dialect. The glossary has the terms of the field for them.

`python -m tests.support.dialect` prints the number of words per 1,000 lines of each folder, and the
files with the most of them. `--write` records the counts in dialect.json, which may only shrink.
"""

import argparse
import io
import json
import re
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("dialect.json")

WORDS = (
    r"sa(?:y|ys|id|ying)|tell(?:s|ing)?|told|untold|hear(?:s|d|ing)?|unheard|speakers?"
    r"|somebody|nobody|everybody|anybody|whoever"
    r"|goodbye|farewell|parting|vanish(?:es|ed)?|let(?:s|ting)? go"
    r"|com(?:e|es|ing) back|came back|wish(?:es)?|what (?:it|they|is|was|were) missed"
    r"|fell behind|fall behind|caught up|laggards?|is behind|are behind"
    r"|gates?|hold(?:s)? back|held back|books|ledger|ow(?:ed|es|e)"
    r"|nth|lives|canar(?:y|ies)|allowances?|excus(?:e|ed|es)"
    r"|rights|doors?|under way|take(?:s)? note|figures|rooms?|doubts?|courier|office"
    r"|in hand|letting in|let(?:s)? in|in work|good for|be had|that is none"
)
DIALECT = re.compile(rf"(?<![a-z])(?:{WORDS})(?![a-z])")
"""Searched in lower case, because `re.IGNORECASE` takes five times as long."""

FOLDERS = ("service", "tests", "bench", "helm", "docs", "examples")
EXEMPT = {"docs/glossary.md", "tests/support/dialect.py"}
"""Files that list the words."""

SUFFIXES = {".py", ".md", ".js", ".ts", ".html", ".yaml", ".toml"}


def texts_of(path: Path) -> Iterator[str]:
    """Yield the texts of a file: of code its comments, strings and names, of other files all.

    They are in lower case.
    """
    source = path.read_text(encoding="utf-8").lower()
    if not DIALECT.search(source.replace("_", " ")):  # to find tokens takes a hundred times as long
        return
    if path.suffix != ".py":
        yield source
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield token.string
        elif token.type == tokenize.NAME:
            yield token.string.replace("_", " ")


def count(path: Path) -> int:
    """Return the number of words of the dialect in a file."""
    return sum(len(DIALECT.findall(text)) for text in texts_of(path))


def files() -> Iterator[Path]:
    """Yield the files of the project that contain language. It needs no Git repository."""
    found = [*ROOT.glob("*"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*"))]
    for path in sorted(found):
        name = path.relative_to(ROOT).as_posix()
        is_generated = name.startswith("bench/results") or "node_modules" in path.parts
        if path.suffix in SUFFIXES and path.is_file() and not is_generated and name not in EXEMPT:
            yield path


def counts() -> Mapping[str, int]:
    """Return the counts of the files, without those of 0."""
    found = {path.relative_to(ROOT).as_posix(): count(path) for path in files()}
    return {name: number for name, number in found.items() if number}


def main() -> None:
    """Print the counts, or record them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="record today's counts")
    found = counts()
    if parser.parse_args().write:
        RECORD.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    words: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        parts = name.split("/")
        folder = "/".join(parts[: 3 if parts[0] == "service" else 1]) if len(parts) > 1 else "."
        words[folder] += found.get(name, 0)
        lines[folder] += len(path.read_text(encoding="utf-8").splitlines())
    for folder in sorted(words, key=lambda each: -words[each]):
        if lines[folder]:
            share = 1000 * words[folder] / lines[folder]
            print(f"{words[folder]:6} words, {share:6.1f} in 1,000 lines: {folder}")
    for name, number in Counter(found).most_common(15):
        print(f"{number:6} {name}")


if __name__ == "__main__":
    main()
