"""Train a team by preferences between its runs: play, pair the runs of a task by score, move all
adapters by one joint loss, publish, prove.

accelerate launch recipes/sysdpo.py [--config recipes/sysdpo.yaml] [--field value]

Offline, from the store of another run; the control, plain DPO for each agent; only the other agent
learns; several drafts of what led to an output; no training, the best of four episodes:
python -m marlora.recipes.sysdpo --episodes runs/grpo_team
python -m marlora.recipes.sysdpo --mode independent
python -m marlora.recipes.sysdpo --policies.last.trainable false
python -m marlora.recipes.sysdpo --mode sampling --train_batch_size 0
python -m marlora.recipes.sysdpo --max_steps 0 --best_of 4
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.preference.sysdpo import PreferenceTrainer


def main() -> None:
    launch(PreferenceTrainer, __file__)


if __name__ == "__main__":
    run(main)
