"""Train a team by PPO: play, let a critic per agent estimate returns, update policies and
critics, publish, verify, go on.

accelerate launch recipes/ppo_team.py [--config recipes/ppo_team.yaml] [--field value] \\
    [--agents.NAME.prompt "..."]
python -m marlora.recipes.ppo_team --dry_run true    (plan: policies, devices, memory, first prompt)
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.policy_gradient.ppo import PPOTrainer


def main() -> None:
    launch(PPOTrainer, __file__)


if __name__ == "__main__":
    run(main)
