"""Train a debate by MAPoRL: a verifier scores every answer, PPO learns what an answer does for
those that follow from it.

accelerate launch recipes/maporl.py [--config recipes/maporl.yaml] [--field value]

Ablations: --verifier "" --feedback false (no verifier: the gold answer alone), --shaping none,
--system.agents '[{"name": "ann", "policy": "pair"}]' (single-agent PPO).

GSM8K on a GPU: first a verifier (the command is in recipes/maporl_gsm8k.yaml), then
accelerate launch recipes/maporl.py --config recipes/maporl_gsm8k.yaml
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.policy_gradient.maporl import MAPoRLTrainer


def main() -> None:
    launch(MAPoRLTrainer, __file__)


if __name__ == "__main__":
    run(main)
