"""Define the names of channels. Knows no channel."""

import re

CHANNEL_NAME = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._:-]{1,128}")
"""Excludes `.` and `..`, which browsers remove from a path before they request it."""

DEFAULT_CHANNEL = "default"
