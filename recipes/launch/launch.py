"""The last lines of a recipe: settings, then the plan or the training, and a table of what came
out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlora.recipes.launch.settings import parse
from marlora.recipes.launch.tables import summary_table
from marlora.rollouts.checkpoints.needs import meta_flag, needed_flags
from marlora.rollouts.checkpoints.reader import read_checkpoint
from marlora.trainers.loop.dry_run import print_plan
from marlora.trainers.loop.serve_only import serve
from marlora.trainers.loop.spec import RunSpec
from marlora.trainers.trainer import Trainer


def train(method: type[Trainer[Any]], config: Any, recipe: str) -> None:
    """Train by these settings and print what came out; or print the plan (`dry_run`), or serve for
    others (`serve_only`)."""
    trainer = method(args=config, recipe=recipe)
    if config.dry_run:
        print_plan(trainer.run.spec)
        return
    if config.serve_only:
        serve(trainer.run.spec)
        return
    summary = trainer.train()
    if trainer.run.ranks.main:
        print(summary_table(summary, config.output_dir, *_flags(trainer.run.spec, summary)))


def _flags(spec: RunSpec, summary: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The words that commands need to open the run's last checkpoint, and more of them to play."""
    folder = spec.config.folder / "checkpoints" / f"step-{summary['steps']:06d}"
    data = read_checkpoint(folder)
    engine = ["--engine", spec.config.engine] if spec.config.engine != "auto" else []
    meta = meta_flag(data, spec.eval_tasks[0].public().meta)
    flags = [*needed_flags(data, type(spec.system)), *engine]
    return flags, meta


def launch(trainer: type[Trainer[Any]], file: str) -> None:
    """A recipe's `main`: its settings are the trainer's, and their defaults stand in the YAML
    beside `file`."""
    train(trainer, parse(trainer.Config, file), Path(file).stem)
