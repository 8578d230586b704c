"""
Train a team by GRPO: play, compare the episodes of a task, update one adapter per agent, publish, prove, go on.

accelerate launch recipes/grpo_team.py [--config recipes/grpo_team.yaml] [--field value] [--agents.NAME.prompt "..."]
python -m marlora.recipes.grpo_team --dry_run true          (the plan: policies, devices, memory, first prompt)
"""

from __future__ import annotations

from marlora.recipes.settings import parse, run
from marlora.recipes.tables import summary_table
from marlora.trainers.grpo import GRPOConfig, GRPOTrainer
from marlora.trainers.plan import print_plan


def train(config: GRPOConfig, recipe: str) -> None:
    """Train by these settings and print what came out, or print the plan if it is a dry run."""
    trainer = GRPOTrainer(args=config, recipe=recipe)
    if config.dry_run:
        print_plan(trainer.run)
        return
    summary = trainer.train()
    if trainer.run.ranks.main:
        print(summary_table(summary, config.output_dir))


def main() -> None:
    train(parse(GRPOConfig, __file__), "grpo_team")


if __name__ == "__main__":
    run(main)
