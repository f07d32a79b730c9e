"""The content of pyproject.toml."""

import tomllib

from tests.support.relay_process import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
