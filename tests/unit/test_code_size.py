"""Counting lines of code."""

import pytest

from bench.code_size import python_lines, web_line_count

pytestmark = pytest.mark.fast

PYTHON = '''\
"""A module."""

import os  # used


def name() -> str:
    """Return a name.

    In two lines.
    """
    # Not the path.
    return os.name + """
    text"""
'''

SCRIPT = """\
// a comment
/**
 * another
 */
const one = 1; // a constant

<!-- a third -->
"""


def test_comments_docstrings_and_blank_lines_are_no_code() -> None:
    assert python_lines(PYTHON) == {3, 6, 12, 13}
    assert web_line_count(SCRIPT) == 1
