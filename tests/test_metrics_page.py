"""docs/metrics.md says what the metrics are today."""

from __future__ import annotations

from tests.metrics_page import PAGE, page


def test_the_page_is_todays() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.metrics_page"
