"""SFT for a team: every agent imitates its own turns of successful episodes, played here or taken
from a store.

accelerate launch recipes/sft_team.py [--config recipes/sft_team.yaml] [--field value]

From another run's episodes, playing evaluations only:
accelerate launch recipes/sft_team.py --episodes runs/x/episodes
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.imitation.sft import SFTTrainer


def main() -> None:
    launch(SFTTrainer, __file__)


if __name__ == "__main__":
    run(main)
