"""MIPRO: instructions by a helper and demonstrations from successful turns, for all agents,
searched jointly. No weight moves. Needs the extra `search`: pip install 'marlora[search]'

accelerate launch recipes/mipro.py [--config recipes/mipro.yaml] [--field value]
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.prompts.search.mipro import MIPROTrainer


def main() -> None:
    launch(MIPROTrainer, __file__)


if __name__ == "__main__":
    run(main)
