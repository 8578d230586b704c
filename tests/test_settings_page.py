"""docs/settings.md and `--help` say what the settings are today."""

from __future__ import annotations

from marlora.recipes.launch.help_text import FILE
from tests.settings_page import PAGE, help_file, page


def test_the_page_is_todays() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.settings_page"


def test_what_help_shows_is_todays() -> None:
    assert FILE.read_text(encoding="utf-8") == help_file(), "run python -m tests.settings_page"
