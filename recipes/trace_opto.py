"""Trace: one reading of a run's graph rewrites a team's prompts, numbers, choices and programs. No
weight moves.

accelerate launch recipes/trace_opto.py [--config recipes/trace_opto.yaml] [--field value]

What helpers say comes from models that `helpers` names: the run's own, or outside ones:
--helpers.optimizer.url http://HOST:PORT/v1 --helpers.optimizer.base MODEL
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.text_feedback.trace_opto import TraceTrainer


def main() -> None:
    launch(TraceTrainer, __file__)


if __name__ == "__main__":
    run(main)
