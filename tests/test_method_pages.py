"""docs/methods/ says what the methods are today."""

from __future__ import annotations

from tests.method_pages import FOLDER, pages


def test_the_pages_are_todays() -> None:
    found = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert found == pages(), "run python -m tests.method_pages"
