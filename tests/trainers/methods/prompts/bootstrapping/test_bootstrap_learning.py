"""Bootstrapping on a real tiny model, by the recipes: demonstrations that were found make the team
right, weights learnt from them make them superfluous, and a checkpoint is what the run said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.types import Task
from marlora.recipes import bootstrap_few_shot, bootstrap_finetune
from marlora.recipes.cli.main import main
from marlora.rollouts.types import Episode
from marlora.trainers.methods.prompts.bootstrapping.bootstrap_few_shot import (
    BootstrapFewShotConfig,
    BootstrapFewShotTrainer,
)
from marlora.trainers.testbeds.rules import rule_chain

torch.set_num_threads(1)


def loud(task: Task, episode: Episode) -> float:
    """A score that no model has learnt and that differs between replies."""
    return sum(str(episode.output).encode()) % 7 / 6


def evaluated(checkpoint: Path, *flags: str) -> tuple[float, float]:
    """What `marlora eval` says of a checkpoint: the accuracies before and after."""
    main(["eval", str(checkpoint), "--engine", "transformers", *flags])
    found = json.loads((checkpoint.parents[1] / "eval/eval.json").read_text())["eval"]
    return found["before"]["accuracy"], found["after"]["accuracy"]


def test_a_checkpoint_is_worth_what_the_run_said(model: Path, tmp_path: Path) -> None:
    """To the last digit, with demonstrations that change what a random model says."""
    config = BootstrapFewShotConfig(
        output_dir=str(tmp_path / "run"),
        model=str(model),
        engine="transformers",
        tasks="marlora.rollouts.tasks.toy:rule_tasks",
        rewards=[f"{__name__}:loud"],
        num_eval_tasks=6,
        num_val_tasks=0,
        candidates=["unshuffled"],
        max_bootstrapped_demos=2,
        success_threshold=0.5,
        max_completion_length=3,
    )
    made = BootstrapFewShotTrainer(system=rule_chain(), args=config)
    summary = made.train()
    assert made.run.values, "a set was adopted"
    before, after = (summary["eval"][when]["accuracy"] for when in ("before", "after"))
    assert before != after
    checkpoint = tmp_path / "run/checkpoints" / f"step-{summary['steps']:06d}"
    assert evaluated(checkpoint, "--trust_checkpoint") == (before, after)


def run(recipe: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> dict[str, Any]:
    """Run a recipe with its own settings; its summary."""
    monkeypatch.setattr("sys.argv", ["recipe", "--output_dir", str(folder), *flags])
    recipe.main()
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demonstrations_then_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(bootstrap_few_shot, monkeypatch, tmp_path / "few")
    assert found["eval"]["before"]["accuracy"] == 0.0
    assert found["eval"]["after"]["accuracy"] > 0.95 and found["policies"] == {}
    checkpoint = tmp_path / "few/checkpoints/step-000007"
    assert evaluated(checkpoint)[1] == found["eval"]["after"]["accuracy"]
    distilled = run(
        bootstrap_finetune,
        monkeypatch,
        tmp_path / "weights",
        *("--teacher", "{}", "--exclude_demos", "true", "--init", str(checkpoint)),
        *("--ablate_adapters", "false"),
    )
    assert distilled["eval"]["after"]["accuracy"] > 0.95, "without a demonstration"
    control = run(
        bootstrap_finetune,
        monkeypatch,
        tmp_path / "control",
        *("--teacher", "{}", "--select", "random", "--ablate_adapters", "false"),
    )
    assert control["eval"]["after"]["accuracy"] < 0.1
