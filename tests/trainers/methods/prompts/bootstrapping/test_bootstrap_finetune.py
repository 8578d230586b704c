"""Fine-tuning by bootstrapping: which turns are lessons, in which chat they are learnt, and what a run
leaves behind."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.types import Message, Reward, SettingError, Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.batching.samples import TrainingSequence
from marlora.trainers.credit.filtering import SelectionConfig, filter_turns
from marlora.trainers.testbeds.tiny import tiny_random_model
from marlora.trainers.update.learner import Learner
from marlora.trainers.update.losses.nll import weighted_nll
from tests.trainers.methods.prompts.bootstrapping.finetune_run import SHOT, adapters, trainer
from tests.trainers.reading import rows

torch.set_num_threads(1)
SHOWN = "<|user|>1+2+3<|end|><|assistant|>3<|end|>"


@pytest.fixture
def learnt(monkeypatch: pytest.MonkeyPatch) -> list[TrainingSequence]:
    """What is learnt from, in order."""
    seen: list[TrainingSequence] = []
    real = Learner.learn

    def spy(learner: Learner, step: int, samples: list[TrainingSequence], *args: Any) -> Any:
        seen.extend(samples)
        return real(learner, step, samples, *args)

    monkeypatch.setattr(Learner, "learn", spy)
    return seen


# which turns

TASK = Task("t", "?", "20")


def run_of(name: str, agents: str, reward: float) -> Episode:
    turns = tuple(
        Turn(n, agent, (Message("user", "u"),), text=f"{n}") for n, agent in enumerate(agents)
    )
    return Episode(name, name, TASK, turns=turns, rewards=(Reward("r", reward),), output="x")


def test_every_call_of_a_successful_run_is_a_lesson() -> None:
    """BetterTogether, fact 3: 40 kept runs of 3 calls are 120 lessons, 40 of each module that is
    called once. DSPy, fact 7: a module called three times in a run gives three."""
    kept = [run_of(f"{n}", "abc", 1.0) for n in range(40)]
    lost = [run_of(f"lost {n}", "abc", score) for n, score in enumerate((0.0, 0.1, -1.0, math.nan))]
    found = filter_turns([*kept, *lost], SelectionConfig()).kept
    assert len(found) == 120 and Counter(turn.agent for turn in found) == dict.fromkeys("abc", 40)
    assert len(filter_turns([run_of("e", "aaa", 1.0)], SelectionConfig()).kept) == 3


def test_the_loss_is_the_mean_over_all_tokens() -> None:
    """BetterTogether, fact 4: (.5, .5), (.25), (.8, .9, .7): -sum(log p) / 6 = 0.576295, not the
    mean of the modules' means, 0.769278."""
    chances = torch.tensor([0.5, 0.5, 0.25, 0.8, 0.9, 0.7], dtype=torch.float64)
    loss, _ = weighted_nll(chances.log(), torch.ones(6, dtype=torch.float64), 6.0)
    assert loss.item() == pytest.approx(0.576295, abs=1e-6)


# in which chat


def test_a_teacher_with_demonstrations_is_imitated_without_them(
    learnt: list[TrainingSequence], model: Path, tmp_path: Path
) -> None:
    made = trainer(tmp_path / "run", model, teacher={"first.demos": SHOT})
    summary = made.train()
    tokens = made.run.learner.base_of("first").tokens
    played = list(made.run.rollouts.store.read(kind="train"))
    assert len(played) == 8 and made.run.values == {}, "the teacher's values are its own"
    for turn in (t for e in played for t in e.turns):
        assert (SHOWN in tokens.show(turn.prompt_ids)) == (turn.agent == "first")
    shown = [tokens.show(sample.ids) for sample in learnt]
    assert learnt and not any(SHOWN in text for text in shown)
    sampled = {t.token_ids for e in played for t in e.turns if t.agent == "first"}
    for sample in (s for s in learnt if s.policy == "first"):
        reply = tuple(i for i, m in zip(sample.ids, sample.mask, strict=True) if m)
        assert reply in sampled, "the sampled tokens, behind another prompt"
        assert tokens.show(sample.ids).startswith("<|system|>first<|end|><|user|>")
    assert (
        summary["policies"]["first"]["sha256_before"]
        != summary["policies"]["first"]["sha256_after"]
    )


def test_the_team_is_its_own_teacher_with_its_demonstrations(
    learnt: list[TrainingSequence], model: Path, tmp_path: Path
) -> None:
    """The code's default: demonstrations stay in the prompt, in learning and afterwards."""
    made = trainer(tmp_path / "run", model, values={"first.demos": SHOT})
    made.train()
    tokens = made.run.learner.base_of("first").tokens
    own = [tokens.show(s.ids) for s in learnt if s.policy == "first"]
    assert own and all(SHOWN in text for text in own)
    assert made.run.values == {"first.demos": SHOT}


def test_demonstrations_are_taken_off_and_the_teacher_keeps_them(
    learnt: list[TrainingSequence], model: Path, tmp_path: Path
) -> None:
    made = trainer(
        tmp_path / "run", model, values={"first.demos": SHOT}, exclude_demos=True, max_steps=2
    )
    made.train()
    assert made.run.values == {"first.demos": [], "last.demos": []}
    tokens = made.run.learner.base_of("first").tokens
    assert learnt and not any(SHOWN in tokens.show(s.ids) for s in learnt)
    for step in (1, 2):
        turns = [t for e in made.run.rollouts.store.read(kind="train", step=step) for t in e.turns]
        first = [t for t in turns if t.agent == "first"]
        assert first and all(SHOWN in tokens.show(t.prompt_ids) for t in first), step


def test_a_teacher_on_another_base_is_encoded_in_the_agents_tokens(
    learnt: list[TrainingSequence], model: Path, tmp_path: Path
) -> None:
    other = tiny_random_model(tmp_path / "other", seed=5)
    made = trainer(
        tmp_path / "run",
        model,
        policies={"big": {"base": str(other)}},
        teacher={"first.policy": "big", "last.policy": "big"},
    )
    made.train()
    played = [t for e in made.run.rollouts.store.read(kind="train") for t in e.turns]
    assert {t.policy for t in played} == {"big"}
    tokens = made.run.learner.base_of("first").tokens
    written = {tokens.write(t.prompt_ids, t.text).token_ids for t in played}
    assert {s.policy for s in learnt} == {"first", "last"}, "the teacher's policy is frozen"
    for sample in learnt:
        assert tuple(i for i, m in zip(sample.ids, sample.mask, strict=True) if m) in written


# what a run leaves


def test_the_loss_on_the_kept_turns_falls_and_only_adapters_move(
    model: Path, tmp_path: Path
) -> None:
    made = trainer(
        tmp_path / "run",
        model,
        num_train_epochs=20,
        learning_rate=3e-2,
        values={"first.prompt": "add"},
    )
    made.train()
    (row,) = rows(tmp_path / "run")
    for policy in ("first", "last"):
        assert row["policies"][policy]["nll_after"] < 0.7 * row["policies"][policy]["nll_before"]
    assert made.run.values == {"first.prompt": "add"}


def test_with_a_learning_rate_of_0_nothing_moves(model: Path, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", model, learning_rate=0.0)
    policies = made.train()["policies"]
    assert all(p["sha256_before"] == p["sha256_after"] for p in policies.values())


def test_a_resumed_run_ends_as_the_whole_one(model: Path, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", model, exclude_demos=True, max_steps=2)
    whole.train()
    trainer(tmp_path / "cut", model, exclude_demos=True, max_steps=1).train()
    again = trainer(tmp_path / "cut", model, exclude_demos=True, max_steps=2, resume=True)
    again.train()
    assert adapters(again) == adapters(whole) and again.run.values == whole.run.values


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"teacher": {"first.demo": []}}, "teacher.first.demo: no such param"),
        ({"teacher": {"first.policy": "big"}}, "teacher.first.policy: no policy 'big' is served"),
        ({"teacher": {"first.demos": SHOT}, "episodes": "x"}, "teacher: with `episodes` nothing"),
        ({"exclude_demos": True, "max_staleness": 1}, "max_staleness: a teacher that is not"),
    ],
)
def test_settings_that_cannot_work(
    changes: dict[str, Any], error: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=error):
        trainer(tmp_path / "run", model, **changes)
