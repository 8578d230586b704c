"""Learn the edges of a swarm by REINFORCE (GPTSwarm): draw graphs, play them, make those that did
well more likely. No weight of a model is trained.

accelerate launch recipes/gptswarm_edges.py [--config recipes/gptswarm_edges.yaml] \\
    [--field value] [--agents.NAME.prompt "..."]
python -m marlora.recipes.gptswarm_edges --dry_run true   (plan: policies, memory, first prompt)
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.policy_gradient.gptswarm import GPTSwarmTrainer


def main() -> None:
    launch(GPTSwarmTrainer, __file__)


if __name__ == "__main__":
    run(main)
