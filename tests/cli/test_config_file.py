"""The config.yaml of the repository contains the settings and their defaults."""

from pathlib import Path

import pytest
from websocket_relay.config.loader import load
from websocket_relay.config.model import Settings
from websocket_relay.config.render import default_file

pytestmark = pytest.mark.fast

CONFIG_FILE = Path(__file__).parents[2] / "config.yaml"


def test_config_yaml_is_up_to_date_with_the_settings() -> None:
    assert CONFIG_FILE.read_text() == default_file(), "run make config"


def test_config_yaml_contains_the_defaults() -> None:
    assert load(CONFIG_FILE, {}) == Settings()
