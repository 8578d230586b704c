"""Settings that all methods of feedback in words share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...agents.settings import Settings, parsed_mapping, setting
from ...agents.types import SettingError
from ..values.acceptance import GATES


@dataclass
class FeedbackConfig(Settings):
    """Params, gate, prompts and batches of methods that learn from feedback in words. It stands
    before `RunConfig` among a method's bases: some defaults are other ones."""

    trains_weights: ClassVar[bool] = False
    collects: ClassVar[bool] = False

    params: list[str] = setting(
        "the params that are rewritten, such as solver.prompt; empty: the prompts of all agents",
        factory=list,
    )
    gate: str = setting(
        "whether proposed values replace those in force, by validation tasks: always (nothing is"
        " measured), not_worse, strictly_better, better_or_perfect (also an equal score of 1)",
        "not_worse",
        choices=GATES,
    )
    prompts: dict | str | None = setting(
        "by name: prompts of the method that other ones stand in for", factory=dict
    )
    metric_purpose: str = setting(
        "a sentence on what the metric measures, for the helpers",
        "The metric compares the prediction with the expected output; higher is better.",
    )
    show_answer: bool = setting(
        "helpers are shown the tasks' answers (their turns are then never trained on)", True
    )
    feedback: str = setting(
        "what the rewriter is told: own, or as a control at the same calls shuffled (of each output"
        " what is said of the next one of the batch) or none (nothing)",
        "own",
        choices=("own", "shuffled", "none"),
    )
    max_value_length: int = setting(
        "characters of a proposed value at most; a longer one is refused", 20_000, at_least=1
    )
    copies: str = setting(
        "what becomes of a value that holds a training task word for word: flag (a warning) or"
        " refuse",
        "flag",
        choices=("flag", "refuse"),
    )
    tasks_per_step: int = setting("tasks whose outputs are judged in a step", 3, at_least=1)
    num_generations: int = setting("episodes of a task in a step", 1, at_least=1)
    temperature: float = setting(
        "sampling temperature of agents that name no sampling of their own", 0.0, at_least=0
    )
    num_val_tasks: int = setting(
        "tasks cut from the training ones, by which the gate decides", 20, at_least=0
    )
    max_steps: int = setting("steps: play, judge, propagate, rewrite, accept", 12, at_least=0)
    save_every: int = setting(
        "steps between checkpoints; the last step is always saved", 1, at_least=1
    )

    def prepare(self) -> None:
        self.prompts = parsed_mapping("prompts", self.prompts)

    def check(self) -> None:
        if self.gate != "always" and not self.num_val_tasks:
            raise SettingError(
                f"gate: {self.gate} compares values on validation tasks; set num_val_tasks above 0,"
                " or gate to always"
            )
        if self.feedback == "shuffled" and self.tasks_per_step < 2:
            raise SettingError(
                "feedback: shuffled gives one task's feedback to another one of the batch; set"
                f" tasks_per_step to at least 2, not {self.tasks_per_step}"
            )
