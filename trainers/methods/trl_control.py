"""TRL's trainers as a baseline (`--trainer trl`): an adapter of the run is lent to one of them,
one policy at a time, and comes back trained.

What follows is the run's own work, unchanged: publish, proof, checkpoint, evaluation. TRL gets a
copy of the base for itself, because its trainers patch the model they train, and its optimizer
begins anew at every step.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...agents.seeds import derive_seed
from ...agents.settings import Settings, setting
from ...agents.types import SettingError
from ..update.learner import Learner
from ..update.learner_base import LearnerBase
from ..update.optimizer_step import UpdateResult

Row = Mapping[str, Any]
# (PEFT model, tokenizer, rows, arguments that TRL's configs share) -> a trainer of TRL's, ready to
# train
Make = Callable[[Any, Any, Sequence[Row], dict[str, Any]], Any]


@dataclass
class TrainerChoice(Settings):
    """Which implementation makes the update."""

    trainer: str = setting(
        "marlora, or trl: the same data through TRL's trainer, as a baseline",
        "marlora",
        choices=("marlora", "trl"),
    )

    def check(self) -> None:
        if self.trainer == "trl" and getattr(self, "num_iterations", 1) != 1:
            raise SettingError(
                "num_iterations: trainer trl makes one update of a batch; set 1, or repeat by"
                " num_train_epochs"
            )


@dataclass(frozen=True)
class TRLExample:
    """What one policy learns from: rows in the columns of TRL's trainer, and how many tokens of
    them are trained."""

    rows: Sequence[Row]
    tokens: int


def learn_with_trl(
    learner: Learner, step: int, lessons: Mapping[str, TRLExample], make: Make
) -> dict[str, UpdateResult]:
    """Train each policy that has rows by the trainer `make` gives; what `Learner.learn` is for our
    own update."""
    if learner.ranks.size > 1:
        raise SettingError(
            f"trainer trl: expected one process, got {learner.ranks.size}; it is a baseline for"
            " small runs"
        )
    start, done = time.perf_counter(), {}
    for base in learner.bases.values():
        for policy in base.adapters.trainable:
            lesson = lessons.get(policy)
            if lesson is not None and lesson.rows:
                done[policy] = _learn(learner, base, policy, step, lesson, make)
    learner.log.spend("train", time.perf_counter() - start)
    learner.log.trained(sum(result.tokens for result in done.values()))
    return done


def _learn(
    learner: Learner, base: LearnerBase, policy: str, step: int, lesson: TRLExample, make: Make
) -> UpdateResult:
    from transformers.trainer_callback import PrinterCallback

    rate = learner.config.learning_rate_at(step, base.optimizers.peak[policy])
    with lent(base, policy) as (model, folder), torch.random.fork_rng(devices=[]):
        shared = {
            "output_dir": str(folder / "trl"),
            "learning_rate": rate,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch",
            "weight_decay": learner.config.weight_decay,
            "max_grad_norm": learner.config.max_grad_norm,
            "max_length": None,
            "seed": derive_seed(learner.config.seed, "trl", policy, step) % 2**31,
            "use_cpu": learner.ranks.device.type == "cpu",
            "gradient_checkpointing": base.adapters.recomputes,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        trainer = make(model, base.tokens.tokenizer, lesson.rows, shared)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logged = [row for row in trainer.state.log_history if "loss" in row]
    stats = {
        key: float(value) for key, value in logged[-1].items() if isinstance(value, (int, float))
    }
    return UpdateResult(
        stats, 0.0, lesson.tokens, len(lesson.rows), rate, grad_norm=stats.pop("grad_norm", 0.0)
    )


@contextlib.contextmanager
def lent(base: LearnerBase, policy: str) -> Iterator[tuple[Any, Path]]:
    """A PEFT model of its own that holds this one adapter (named `default`), and a scratch folder;
    what it has become at the end is read back into the run's adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ours = base.adapters.model.get_base_model()
    with tempfile.TemporaryDirectory(prefix="marlora-trl-") as scratch:
        folder = Path(scratch)
        base.adapters.save(policy, folder / "lent")
        copy = AutoModelForCausalLM.from_pretrained(base.path, dtype=ours.dtype).to(
            base.adapters.device
        )
        model = PeftModel.from_pretrained(copy, str(folder / "lent"), is_trainable=True)
        yield model, folder
        model.save_pretrained(str(folder / "back"), selected_adapters=["default"])
        base.adapters.load(policy, folder / "back")
