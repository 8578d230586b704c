"""`marlora eval` on tasks whose gold answers no reply can match."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from marlora.agents.types import SettingError, Task
from marlora.recipes.cli.checkpoint.evaluate import tasks_for
from marlora.rollouts.rewards.builtin import correct


def test_tasks_that_no_reply_can_match_are_refused_before_anything_is_played() -> None:
    tasks = [Task("a", "?", "So 48 + 24 clips were sold.\n#### 72"), Task("b", "?", {})]
    team: Any = SimpleNamespace(
        tasks=lambda name, limit: tasks, rollouts=SimpleNamespace(rewards=[correct])
    )
    args = argparse.Namespace(num_tasks=None, checkpoint=["x"])
    with pytest.raises(SettingError, match="reward 'correct' in 2 of 2 held-out tasks"):
        tasks_for(args, {"a": team}, "sold.jsonl")
