"""Train a team by GRPO: play, compare the episodes of a task, update one adapter per agent,
publish, verify, go on.

accelerate launch recipes/grpo_team.py [--config recipes/grpo_team.yaml] [--field value] \\
    [--agents.NAME.prompt "..."]
python -m marlora.recipes.grpo_team --dry_run true   (plan: policies, devices, memory, first prompt)
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.policy_gradient.grpo import GRPOTrainer


def main() -> None:
    launch(GRPOTrainer, __file__)


if __name__ == "__main__":
    run(main)
