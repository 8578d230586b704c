"""Libraries' own bars are turned off, unless a user asked for them."""

from __future__ import annotations

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging as transformers_logging

from marlora.trainers.monitoring.library_output import BARS, silence_libraries


@pytest.mark.parametrize("wanted", [False, True])
def test_bars_are_turned_off_unless_they_are_asked_for(
    wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in BARS:
        monkeypatch.delenv(name, raising=False)
    if wanted:
        monkeypatch.setenv(BARS[0], "0")
    enable_progress_bars()
    transformers_logging.enable_progress_bar()
    silence_libraries()
    assert are_progress_bars_disabled() is not wanted
    assert transformers_logging.is_progress_bar_enabled() is wanted
