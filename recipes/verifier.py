"""Train a verifier: sample answers, compare them with the gold answers, learn to tell right from
wrong; how well it does is reported.

accelerate launch recipes/verifier.py [--config recipes/verifier.yaml] [--field value]

From answers that are stored already:
python -m marlora.recipes.verifier --episodes runs/store
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.reward_model.verifier import VerifierTrainer


def main() -> None:
    launch(VerifierTrainer, __file__)


if __name__ == "__main__":
    run(main)
