"""Select the team of a temporal network by the importance of its agents: trials of all of them,
ratings that flow backward, the best few stay.

accelerate launch recipes/dylan.py [--config recipes/dylan.yaml] [--field value] \\
    [--agents.NAME.prompt "..."]
python -m marlora.recipes.dylan --dry_run true   (plan: policies, devices, memory, first prompt)
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.selection.dylan import DyLANTrainer


def main() -> None:
    launch(DyLANTrainer, __file__)


if __name__ == "__main__":
    run(main)
