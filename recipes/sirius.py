"""SiriuS: a team learns from its own successes, and from failures corrected with feedback from an
agent that knows the answer.

accelerate launch recipes/sirius.py [--config recipes/sirius_problem_solving.yaml] \\
    [--max_iterations 2] [--field value]
accelerate launch recipes/sirius.py --config recipes/sirius_actor_critic.yaml
"""

from __future__ import annotations

from pathlib import Path

from marlora.recipes.launch.launch import train
from marlora.recipes.launch.settings import parse, run
from marlora.trainers.methods.imitation.sirius import SiriusTrainer


def main() -> None:
    train(
        SiriusTrainer,
        parse(SiriusTrainer.Config, Path(__file__).with_name("sirius_problem_solving.yaml")),
        "sirius",
    )


if __name__ == "__main__":
    run(main)
