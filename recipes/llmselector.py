"""Find a model for every agent of a team: base, adapters, other bases or outside models, one place
at a time.

accelerate launch recipes/llmselector.py [--config recipes/llmselector.yaml] [--field value] \\
    [--policies.NAME.init CHECKPOINT#POLICY]
python -m marlora.recipes.llmselector --dry_run true   (plan: policies, memory, first prompt)
"""

from __future__ import annotations

from marlora.recipes.launch.launch import launch
from marlora.recipes.launch.settings import run
from marlora.trainers.methods.selection.llmselector import LLMSelectorTrainer


def main() -> None:
    launch(LLMSelectorTrainer, __file__)


if __name__ == "__main__":
    run(main)
