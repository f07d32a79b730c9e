"""The language of code and docs: dialect words may only become fewer."""

import json
from collections.abc import Mapping

import pytest

from tests.support.dialect import RECORD, counts
from tests.support.relay_process import ROOT

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def found() -> Mapping[str, int]:
    return counts()


def test_no_file_has_more_words_of_the_dialect_than_are_recorded(found: Mapping[str, int]) -> None:
    recorded = json.loads(RECORD.read_text())
    more = {name: number for name, number in found.items() if number > recorded.get(name, 0)}
    assert more == {}, "use the terms of docs/glossary.md"


def test_the_record_shrinks_with_the_words(found: Mapping[str, int]) -> None:
    stale = [
        name
        for name, number in json.loads(RECORD.read_text()).items()
        if number > found.get(name, 0)
    ]
    assert stale == [], "record it: python -m tests.support.dialect --write"


def test_no_test_module_imports_another() -> None:
    imports = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in (ROOT / "tests").rglob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith(("from tests.", "import tests.")) and ".test_" in line
    ]
    assert imports == []
