"""Private names of libraries: each that is used is listed, bounded and as it is described."""

import re
import tomllib
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement

from tests.support.markdown import code_spans, section, tables
from tests.support.private_names import Use, described, uses_in
from tests.support.relay_process import ROOT

pytestmark = pytest.mark.fast

PAGE = ROOT / "docs" / "explanation" / "architecture.md"
HEADING = "Private names of libraries"

(TABLE,) = tables(section(PAGE.read_text(), HEADING))
"""Rows: a requirement, a module, private names of the library that it uses, and why."""


def test_every_private_name_of_a_library_is_in_the_table() -> None:
    listed = {
        Use(module.strip("`"), name.partition("(")[0].rpartition(".")[2])
        for _, module, names, _ in TABLE
        for name in code_spans(names)
    }
    assert uses_in(ROOT / "service") == listed


@pytest.mark.parametrize("name", [name for row in TABLE for name in code_spans(row[2])])
def test_the_libraries_have_the_private_names_that_are_used(name: str) -> None:
    assert described(name.partition("(")[0]) == name


@pytest.mark.parametrize("requirement", sorted({code_spans(row[0])[0] for row in TABLE}))
def test_a_library_with_private_names_has_an_upper_bound(requirement: str) -> None:
    listed = Requirement(requirement)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert requirement in map(without_extras, project["optional-dependencies"]["server"])
    upper = [each.version for each in listed.specifier if each.operator == "<"]
    assert upper, "a new version may lack the names"
    assert listed.specifier.contains(version(listed.name))


def without_extras(requirement: str) -> str:
    return re.sub(r"\[.*?\]", "", requirement)
