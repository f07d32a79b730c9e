"""Count the lines of the package's code, and list its largest classes and functions.

    python -m bench.code_size [CHECKOUT]

Blank lines, comments and docstrings do not count. A class includes its methods, a function those
inside it. Scripts, styles and pages count, without comments.
"""

import argparse
import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("service", "websocket_relay")
LISTED = 10

UNCOUNTED = frozenset(
    {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
)
WEB = (".css", ".html", ".js", ".ts")
WEB_COMMENT = re.compile(r"/\*.*?\*/|<!--.*?-->", re.DOTALL)

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_lines(text: str) -> set[int]:
    """Return the numbers of the lines that contain code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in UNCOUNTED:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):  # a docstring
                lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return lines


def web_line_count(text: str) -> int:
    """Return the number of lines of a script, a style or a page that contain code."""
    lines = (line.strip() for line in WEB_COMMENT.sub("", text).splitlines())
    return sum(1 for line in lines if line and not line.startswith("//"))


def definitions(tree: ast.AST, outer: str = "") -> Iterator[tuple[str, Definition]]:
    """Yield the classes and functions, with their qualified names."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            name = f"{outer}{node.name}"
            yield name, node
            yield from definitions(node, f"{name}.")
        else:
            yield from definitions(node, outer)


def main() -> None:
    """Print the numbers of a checkout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", nargs="?", type=Path, default=ROOT)
    package = parser.parse_args().checkout / PACKAGE
    totals: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    for file in sorted(package.rglob("*")):
        if file.suffix in WEB:
            totals[file.suffix] += web_line_count(file.read_text())
        if file.suffix != ".py":
            continue
        text = file.read_text()
        lines = python_lines(text)
        totals[file.suffix] += len(lines)
        module = file.relative_to(package).with_suffix("").as_posix()
        for name, node in definitions(ast.parse(text)):
            size = len(lines.intersection(range(node.lineno, (node.end_lineno or 0) + 1)))
            kind = classes if isinstance(node, ast.ClassDef) else functions
            kind[f"{module}: {name}"] = size
    parts = ", ".join(f"{suffix} {count:,}" for suffix, count in sorted(totals.items()))
    print(f"{totals.total():,} lines of code ({parts})")
    for title, sizes in (("classes", classes), ("functions", functions)):
        print(f"\nlargest {title}")
        for name, size in sizes.most_common(LISTED):
            print(f"{size:6}  {name}")


if __name__ == "__main__":
    main()
