"""Train a program of your own by GRPO, as it is: it asks an OpenAI-compatible address, and each
model name is an agent with a LoRA.

accelerate launch recipes/own_program.py [--config recipes/own_program.yaml] [--field value] \\
    [--system.main my_module:main]
python -m marlora.recipes.own_program --dry_run true          (the plan: policies, devices, memory)

The program is an async function `main(task, base_url, api_key)` or, with `system.class`
marlora.rollouts.gateway.programs:Command, any command in any environment. `recipes/programs/` has
two roles written with `openai`, `recipes/programs/frameworks/` with twelve frameworks.
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.policy_gradient.grpo import GRPOTrainer


def main() -> None:
    launch(GRPOTrainer, __file__)


if __name__ == "__main__":
    run(main)
