"""Learn which operators of a supernet answer which query, for what they cost (MaAS): draw systems,
play them, make those that did well for little more likely. No weight of a model is trained.

accelerate launch recipes/maas_supernet.py [--config recipes/maas_supernet.yaml] \\
    [--field value] [--agents.NAME.prompt "..."]
python -m marlora.recipes.maas_supernet --dry_run true   (plan: policies, memory, first prompt)
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.policy_gradient.maas import MaASTrainer


def main() -> None:
    launch(MaASTrainer, __file__)


if __name__ == "__main__":
    run(main)
