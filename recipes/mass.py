"""MASS: prompts of a team's blocks, the topology that they form, and prompts of the whole. No
weight moves. Needs the extra `search`: pip install 'marlora[search]'

accelerate launch recipes/mass.py [--config recipes/mass.yaml] [--field value]
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.prompts.search.mass import MASSTrainer


def main() -> None:
    launch(MASSTrainer, __file__)


if __name__ == "__main__":
    run(main)
