"""Reward model: the probability that an answer to a question is right. A LoRA and a linear head
on the base (see `scalar_heads.py`).

The verifier of MAPoRL (arXiv:2502.18439): answers are sampled and compared with the gold answer,
every task gives as many right as wrong ones, and the head learns by binary cross-entropy at every
token of the answer; the score of an answer is what it says at the last one. It reads question and
answer only, no debate and no gold answer, so what it says may be shown to agents. Against the
paper: the mean is over the tokens of an answer, then over answers, so that long ones do not count
more; equal answers to a task count once.

accelerate launch recipes/verifier.py [--episodes RUN] [--field value]

Then, by name: reward
`verified(marlora.trainers.methods.reward_model.verifier:trained(RUN/verifier))`, or the same
without `verified(...)` as the verifier of a `Collaboration`. A second copy of the base is loaded
for it, in this process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import math
import random
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from ....agents.lookup import trusted
from ....agents.seeds import derive_seed
from ....agents.settings import setting
from ....agents.types import AdapterSpec, Message, SettingError, Task, from_json, to_json
from ....rollouts.files import files_sha256
from ....rollouts.renderer import ChatRenderer
from ....rollouts.report.sections import stored
from ....rollouts.types import Episode
from ... import checkpoint as ckpt
from ...batching.batches import pack
from ...batching.samples import Denominators, TrainingSequence
from ...config import RunConfig
from ...errors import RunError
from ...model.local_models import local_model
from ...trainer import Trainer
from ...update.learner_base import LearnerBase, load_base
from ...update.losses.statistics import Stats
from ...update.minibatches import minibatches
from ...update.scalar_heads import HeadSpec, ScalarHead, Targets, after
from .calibration import ScoredAnswer, calibration, calibration_section

NAME, CARD = "verifier", "verifier.json"


@dataclass
class VerifierConfig(RunConfig):
    """Settings of the verifier's training; what is played is what makes its answers."""

    output_dir: str = setting("run folder; the verifier is its folder `verifier`", "runs/verifier")
    rewards: list[str] = setting(
        "`correct` is the accuracy of the base, `right` labels the answers",
        factory=lambda: ["correct", "right"],
    )
    instruction: str = setting(
        "system message before every question that the verifier reads; empty: none", ""
    )
    label: str = setting(
        "the reward of turns that says whether an answer is right (from 0.5)", "right"
    )
    per_task: int = setting(
        "right and wrong answers kept of a task, at most, of each", 10, at_least=1
    )
    min_answers: int = setting(
        "a step with fewer answers left after balancing is refused", 32, at_least=1
    )
    num_train_epochs: int = setting("passes over the answers of a step", 1, at_least=1)
    train_batch_size: int = setting("answers per optimizer update", 8, at_least=1)
    learning_rate: float = setting("peak learning rate of LoRA and head", 2e-4, at_least=0)
    max_steps: int = setting("steps of playing and learning", 1, at_least=0)

    def check(self) -> None:
        if self.label not in [name.rpartition(":")[2] for name in self.rewards]:
            raise SettingError(
                f"label {self.label!r}: not among the rewards {', '.join(self.rewards)}; `right`"
                " labels every answer"
            )


@dataclass(frozen=True)
class Answer:
    """A labelled answer to a task."""

    task: str
    prompt: str
    text: str
    right: bool


# answers


def answers_of(episodes: Iterable[Episode], label: str = "right") -> list[Answer]:
    """Every turn with a finite reward of this name, siblings included; right from 0.5. Equal
    answers to a task count once."""
    found: dict[tuple[str, str], Answer] = {}
    for episode in episodes:
        values = {
            (r.turn, r.sibling): r.value
            for r in episode.rewards
            if r.name == label and r.value == r.value
        }
        for turn in episode.turns:
            value = values.get((turn.index, turn.sibling))
            if value is not None and turn.text.strip() and not turn.saw_gold:
                found[episode.task.id, turn.text] = Answer(
                    episode.task.id, episode.task.prompt, turn.text, value >= 0.5
                )
    return list(found.values())


def balanced(
    answers: Sequence[Answer], per_task: int, seed: int, min_answers: int = 1
) -> list[Answer]:
    """As many right as wrong answers of every task, at most `per_task` of each, drawn by `seed`;
    tasks without both give none.

    Trained on what is sampled, a verifier learns how hard a task is. Raises `RunError`, with the
    numbers, if fewer than `min_answers` are left.
    """
    by_task: dict[str, tuple[list[Answer], list[Answer]]] = {}
    for answer in answers:
        by_task.setdefault(answer.task, ([], []))[answer.right].append(answer)
    kept: list[Answer] = []
    for task, (wrong, right) in sorted(by_task.items()):
        rng, count = (
            random.Random(derive_seed(seed, "balanced", task)),
            min(len(wrong), len(right), per_task),
        )
        kept += [*rng.sample(right, count), *rng.sample(wrong, count)]
    if len(kept) < min_answers:
        both = sum(bool(wrong and right) for wrong, right in by_task.values())
        share = sum(answer.right for answer in answers)
        raise RunError(
            f"verifier: {len(answers)} different answers to {len(by_task)} tasks, {share} right and"
            f" {len(answers) - share} wrong; only {both} tasks have both, so {len(kept)} are left"
            f" when balanced, and min_answers is {min_answers}. Sample more (num_generations,"
            " temperature), or let an agent be asked for what is rare"
        )
    return kept


def reading(
    tokens: ChatRenderer, prompt: str, text: str, number: int = 0, instruction: str = ""
) -> TrainingSequence:
    """Question and answer as one chat, after the instruction, if any. Its trained tokens are the
    answer's, its end included; for `ScalarHead`, at the tokens themselves."""
    asked = tokens.prompt(
        [*([Message("system", instruction)] if instruction else []), Message("user", prompt)]
    )
    answer = tokens.write(asked, text).token_ids
    rest, own = len(asked), len(answer)
    return after(
        TrainingSequence(
            NAME,
            str(number),
            ids=(*asked, *answer),
            mask=(0,) * rest + (1,) * own,
            logprobs=(0.0,) * (rest + own),
            advantages=(0.0,) * rest + (1.0,) * own,
            temperatures=(1.0,) * (rest + own),
            sequence=(-1,) * rest + (0,) * own,
        )
    )


# learning


def verifier_loss(
    scores: torch.Tensor, targets: Targets, counts: Denominators
) -> tuple[torch.Tensor, Stats]:
    """This batch's share of the mean over answers of BCE(sigmoid(score), right), averaged over each
    answer's tokens.

    scores: [N] logits, one per token.
    targets: `right` [N] 0 or 1; `weight` [N] 1 / tokens of the answer.
    """
    losses = binary_cross_entropy_with_logits(scores, targets["right"], reduction="none")
    loss = (losses * targets["weight"]).sum() / counts.sequences
    hits = ((scores > 0) == (targets["right"] > 0.5)).sum()
    stats = {
        "loss": loss.detach(),
        "tokens": torch.tensor(float(scores.numel())),
        "token_accuracy": hits,
    }
    return loss, {name: value.double() for name, value in stats.items()}


class VerifierTrainer(Trainer[VerifierConfig]):
    """Plays (or takes `episodes`), labels, balances, and trains the head; policies stay as they
    are. Arguments: see `Trainer`."""

    Config = VerifierConfig

    def heads(self) -> Sequence[HeadSpec]:
        shape = AdapterSpec(
            self.args.lora_r, float(self.args.lora_alpha), tuple(self.args.lora_target_modules)
        )
        return (HeadSpec(NAME, adapter=shape),)

    @property
    def base(self) -> LearnerBase:
        """The base model that carries the head."""
        return next(b for b in self.run.learner.bases.values() if NAME in b.heads)

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Several passes over the step's balanced answers; returns metrics."""
        args = self.args
        found = answers_of(episodes, args.label)
        kept = balanced(found, args.per_task, args.seed, args.min_answers)
        numbers = {"answers": len(found), "right": sum(a.right for a in found), "kept": len(kept)}
        losses = []
        for part in minibatches(
            kept, args.train_batch_size, args.num_train_epochs, derive_seed(args.seed, NAME, step)
        ):
            samples = self._readings(part)
            sizes = torch.tensor([sample.num_trained for sample in samples])
            right = torch.tensor([float(a.right) for a in part])
            targets = {
                "right": right.repeat_interleave(sizes),
                "weight": (1 / sizes).repeat_interleave(sizes),
            }
            done = self.run.learner.learn_head(step, NAME, samples, targets, verifier_loss)
            self.run.log.trained(done.tokens)
            losses.append(done.stats.get("loss", math.nan))
        ends = {
            "loss_first": losses[0],
            "loss": sum(losses[-10:]) / len(losses[-10:]),
            "updates": len(losses),
        }
        return {"verifier": {**numbers, **ends}, "policies": self.rows({}, episodes)}

    def report(self) -> dict[str, Any]:
        """Judges sampled answers to held-out tasks, saves the verifier with what came out, and
        tells it."""
        run = self.run
        held_out = answers_of(
            run.rollouts.play(
                self.spec.eval_tasks, n=self.args.num_generations, kind="eval", label="verifier"
            ),
            self.args.label,
        )
        if not held_out:
            raise RunError(
                f"verifier: no held-out answer has a reward {self.args.label!r}; it cannot be"
                " calibrated"
            )
        head, samples = self.base.heads[NAME], self._readings(held_out)
        ends = torch.tensor([sample.num_trained for sample in samples]).cumsum(0) - 1
        scores = head.read(samples, run.ranks)[ends].sigmoid().tolist()
        measured = calibration(
            [
                ScoredAnswer(a.task, score, a.right)
                for a, score in zip(held_out, scores, strict=True)
            ]
        )
        run.ranks.on_main(lambda: self._save(measured))
        return {
            NAME: {
                "folder": str(self.args.folder / NAME),
                "sha256": head.sha256(),
                "calibration": measured,
            },
            **stored(calibration_section(measured)),
        }

    def _readings(self, answers: Sequence[Answer]) -> list[TrainingSequence]:
        return [
            reading(self.base.tokens, a.prompt, a.text, number, self.args.instruction)
            for number, a in enumerate(answers)
        ]

    def _save(self, measured: Mapping[str, Any]) -> None:
        base = self.base
        head = base.heads[NAME]
        card = {
            "schema": ckpt.SCHEMA,
            "base": base.name,
            "files": files_sha256(base.path),
            "template": base.tokens.template_hash,
            "chat_template_kwargs": base.tokens.settings,
            "adapter": to_json(head.spec.adapter),
            "dtype": self.args.dtype,
            "instruction": self.args.instruction,
            "sha256": head.sha256(),
            "calibration": measured,
        }

        def write(folder: Path) -> None:
            head.save(folder)
            ckpt.write_json(folder / CARD, card)

        ckpt.publish_folder(self.args.folder / NAME, write)


# serving


class TrainedVerifier:
    """A saved verifier at work in this process: `await verifier(task, text)` is its score from 0 to
    1.

    One answer at a time, so a score does not depend on what is judged beside it; equal questions
    are asked once. The base is loaded at the first question. Raises `SettingError` if the folder
    holds no whole verifier, or the base is no longer what it was trained on.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / CARD).is_file():
            raise SettingError(
                f"verifier {str(folder)!r}: no {CARD} there; expected the folder `verifier` of a"
                " run of recipes/verifier.py"
            )
        ckpt.verify(self.folder)
        self.card = json.loads((self.folder / CARD).read_text(encoding="utf-8"))
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], float] = {}

    async def __call__(self, task: Task, text: str) -> float:
        return await asyncio.to_thread(self.score, task.prompt, text)

    @functools.cached_property
    def base(self) -> LearnerBase:
        """The base with the head on it. Call it under the lock."""
        card = self.card
        path = local_model(card["base"])
        if card["files"] is not None and files_sha256(path) != card["files"]:
            raise SettingError(
                f"verifier {self.folder}: base {card['base']!r} has other files than when the"
                " verifier was trained"
            )
        config = RunConfig(
            model=card["base"],
            dtype=card["dtype"],
            layout="padded",
            chat_template_kwargs=card.get("chat_template_kwargs"),
        )
        spec = HeadSpec(NAME, adapter=from_json(AdapterSpec, card["adapter"]))
        base = load_base(
            card["base"],
            [],
            config,
            torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            [spec],
        )
        if base.tokens.template_hash != card["template"]:
            raise SettingError(
                f"verifier {self.folder}: the chat template of {card['base']!r} is not the one it"
                " was trained with"
            )
        base.heads[NAME].load(self.folder)
        return base

    def score(self, prompt: str, text: str) -> float:
        """The score of one answer. Thread-safe."""
        with self._lock:
            if (prompt, text) not in self._known:
                self._known[prompt, text] = self._score(prompt, text)
            return self._known[prompt, text]

    @torch.no_grad()
    def _score(self, prompt: str, text: str) -> float:
        head: ScalarHead = self.base.heads[NAME]
        sample = dataclasses.replace(
            reading(self.base.tokens, prompt, text, instruction=self.card["instruction"]),
            policy=head.adapter,
        )
        (batch,) = pack([sample], max_tokens=len(sample.ids), layout="padded")
        with head.adapters.active(head.adapter):
            return float(head.scores(batch.to(head.adapters.device))[-1].sigmoid())


@trusted("verifier maker")
@functools.cache
def trained(folder: str) -> TrainedVerifier:
    """The verifier saved in a folder, loaded once per process: for settings that name it, as
    `marlora.trainers.methods.reward_model.verifier:trained(FOLDER)`."""
    return TrainedVerifier(folder)
