"""GEPA: prompts evolve by reflection on the turns of one agent at a time, along a Pareto front. No
weight moves. Needs the extra `gepa`: pip install 'marlora[gepa]'

accelerate launch recipes/gepa_prompts.py [--config recipes/gepa_prompts.yaml] [--field value]
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.prompts.search.gepa_prompts import GEPATrainer


def main() -> None:
    launch(GEPATrainer, __file__)


if __name__ == "__main__":
    run(main)
