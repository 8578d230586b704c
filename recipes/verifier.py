"""
Train a verifier: sample answers, compare them with the gold answers, learn to tell right from wrong; how well it does is reported.

accelerate launch recipes/verifier.py [--config recipes/verifier.yaml] [--field value]
python -m marlora.recipes.verifier --episodes runs/store       (from answers that are stored already)
"""

from __future__ import annotations

from marlora.recipes.launch import launch
from marlora.recipes.settings import run
from marlora.trainers.verifier import VerifierTrainer


def main() -> None:
    launch(VerifierTrainer, __file__)


if __name__ == "__main__":
    run(main)
