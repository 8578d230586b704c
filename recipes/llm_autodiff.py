"""LLM-AutoDiff: a team's prompts are rewritten by feedback on errors, with several proposals and a
gate of two stages. No weight moves.

accelerate launch recipes/llm_autodiff.py [--config recipes/llm_autodiff.yaml] [--field value]

What helpers say comes from models that `helpers` names: the run's own, or outside ones:
--helpers.optimizer.url http://HOST:PORT/v1 --helpers.optimizer.base MODEL
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.text_feedback.llm_autodiff import LLMAutoDiffTrainer


def main() -> None:
    launch(LLMAutoDiffTrainer, __file__)


if __name__ == "__main__":
    run(main)
