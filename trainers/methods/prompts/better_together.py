"""BetterTogether: searches prompts and trains weights in turn, `p -> w -> p`, in one run; the state
that is best on validation tasks is kept.

Soylu et al., "Fine-Tuning and Prompt Optimization: Two Great Steps that Work Better Together"
(arXiv:2407.10930). A step of the run is a letter of the strategy: `p` a whole search by a prompt
method (few-shot bootstrapping or MIPRO), `w` one step of a weight method (fine-tuning by
bootstrapping, or imitation of the team's own successful turns) on `tasks_per_step` tasks, played
with the prompts and demonstrations in force. Each begins with the state that the one before left.
The state at the start and after every letter is measured on the validation tasks; the best one is
what the run ends with, of equal ones the earlier. A letter that fails is undone and ends the run
with what there is.

Against the authors' code: an adapter per agent and not one model for all; validation tasks are
drawn by the seed, not the first of the set; one validation set compares candidates inside a search
and the states after the letters; a budget that is spent inside a letter ends the run with the
letters before it. Not taken over: shuffling the training tasks between letters.

accelerate launch recipes/better_together.py [--config recipes/better_together.yaml]
    [--strategy "w -> p"] [--field value]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....agents.settings import mapping, parsed_mapping, setting
from ....agents.types import SettingError, nearest
from ...config import RunConfig
from ...errors import RunError
from ...inner_config import inner_config
from ...loop.step_result import StepResult
from ...trainer import Trainer
from ...values.parts import Part
from ..imitation.sft import SFTTrainer
from .bootstrapping.bootstrap_few_shot import BootstrapFewShotTrainer
from .bootstrapping.bootstrap_finetune import BootstrapFinetuneTrainer
from .search.mipro import MIPROTrainer

Methods = Mapping[str, type[Trainer[Any]]]
PROMPT_METHODS: Methods = {"bootstrap_few_shot": BootstrapFewShotTrainer, "mipro": MIPROTrainer}
WEIGHT_METHODS: Methods = {"bootstrap_finetune": BootstrapFinetuneTrainer, "sft": SFTTrainer}
LETTERS = {"p": ("prompt_method", PROMPT_METHODS), "w": ("weight_method", WEIGHT_METHODS)}
ARROW = " -> "


@dataclass
class BetterTogetherConfig(RunConfig):
    """`RunConfig` with a strategy and the settings of its two methods."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/better_together"
    )
    strategy: str = setting("letters p (prompts) and w (weights), in turn", "p -> w -> p")
    prompt_method: dict | str | None = setting(
        "step p: `method` bootstrap_few_shot or mipro, and its own settings",
        factory=lambda: {"method": "bootstrap_few_shot"},
    )
    weight_method: dict | str | None = setting(
        "step w: `method` bootstrap_finetune or sft, and its own settings",
        factory=lambda: {"method": "bootstrap_finetune"},
    )
    num_val_tasks: int = setting(
        "tasks cut from the training ones, by which candidates and states are compared",
        100,
        at_least=1,
    )
    keep: str = setting(
        "the state that the run ends with: its last, or the best on the validation tasks",
        "best",
        choices=("last", "best"),
    )
    eval_every: int = setting("steps between evaluations; 1: after every letter", 1, at_least=1)
    save_every: int = setting("steps between checkpoints", 1, at_least=1)
    max_steps: int = setting("follows from the strategy; leave it out", 0, at_least=0)

    def prepare(self) -> None:
        for name, _ in LETTERS.values():
            setattr(self, name, parsed_mapping(name, getattr(self, name)))

    def check(self) -> None:
        letters = self.letters
        if self.max_steps not in (0, len(letters)):
            raise SettingError(
                f"max_steps: a step is a letter of the strategy and there are {len(letters)}, so"
                f" leave it out; got {self.max_steps}"
            )
        self.max_steps = len(letters)
        if self.eval_every != 1 or self.save_every != 1:
            raise SettingError(
                "eval_every, save_every: every letter is measured and saved; leave them out"
            )
        for letter in LETTERS:
            self.method(letter)

    @property
    def letters(self) -> list[str]:
        """The letters of the strategy. Raises `SettingError`."""
        letters = [letter.strip() for letter in self.strategy.split(ARROW.strip())]
        if letters == [""]:
            raise SettingError("strategy: empty; expected letters such as 'p -> w -> p'")
        for letter in letters:
            if letter not in LETTERS:
                raise SettingError(
                    f"strategy: unknown letter {letter!r} in {self.strategy!r}; expected p"
                    " (prompts) and w (weights), such as 'p -> w -> p'"
                )
        return letters

    def method(self, letter: str) -> tuple[type[Trainer[Any]], RunConfig]:
        """The trainer of a letter and its settings: those of this run, and its own. Raises
        `SettingError`."""
        where, methods = LETTERS[letter]
        own = dict(mapping(where, getattr(self, where)))
        name = own.pop("method", "")
        if name not in methods:
            raise SettingError(
                f"{where}.method: no such method {name!r}; {nearest(str(name), methods)}"
            )
        return methods[name], inner_config(methods[name].Config, self, where, own)


class BetterTogetherTrainer(Trainer[BetterTogetherConfig]):
    """Alternates between prompts and weights. Arguments: see `Trainer`.

    trainer = BetterTogetherTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=Chain(["a", "b"]),
                                    tasks="gsm8k", args=BetterTogetherConfig())
    trainer.train()
    """

    Config = BetterTogetherConfig

    def parts(self) -> Sequence[Part]:
        for letter in dict.fromkeys(self.args.letters):
            self._method(letter)  # settings that cannot work are refused before anything is played
        return []

    def _method(self, letter: str) -> Trainer[Any]:
        """A trainer that takes its steps inside this run, begun with the state in force."""
        return self.inside(*self.args.method(letter), self.run.values)

    def step(self, step: int) -> StepResult:
        """One letter of the strategy."""
        run, letters = self.run, self.args.letters
        letter, prefix = letters[step - 1], ARROW.join(letters[:step])
        if step == 1:  # the state at the start is a candidate too
            run.evaluator.validate()
            run.save()
        run.log.say(f"strategy {prefix}")
        try:
            method = self._method(letter)
            if letter == "p":
                state = method.all_steps()
                result = StepResult({"policies": self.rows({}, ())}, state=state)
            else:
                result = self._weights(method, step)
        except (RunError, SettingError) as error:
            run.log.warn(f"strategy {prefix}: {error}")
            row = {"prefix": prefix, "failed": str(error)}
            return StepResult(
                {"strategy": row, "policies": self.rows({}, ())},
                done=f"strategy {prefix} failed: {error}",
            )
        return dataclasses.replace(
            result, metrics={**result.metrics, "strategy": {"prefix": prefix}}, done=""
        )

    def _weights(self, method: Trainer[Any], step: int) -> StepResult:
        """One step of a weight method, undone if it fails."""
        with self.run.trial() as trial:
            result = method.step(step)
            trial.adopt()
        return result

    def report(self) -> dict[str, Any]:
        """Also `strategies`: accuracy on the validation tasks after each letter, with what was
        played before it, and which state was kept."""
        letters, results = self.args.letters, self.run.evaluator.results
        best = self.run.evaluator.best
        rows = []
        for step in range(self.run.step + 1):
            label = f"step-{step:06d}"
            if f"val-{label}" in results:
                accuracy = results[f"val-{label}"]["accuracy"]
                kept = self.args.keep == "best" and best is not None and best[1] == label
                prefix = ARROW.join(letters[:step])
                rows.append({"strategy": prefix, "accuracy": accuracy, "kept": kept})
        return {**super().report(), "strategies": rows}
