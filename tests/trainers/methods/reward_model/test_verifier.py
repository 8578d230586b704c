"""The learned verifier: its loss by hand, balance, what it reads, and that it learns, is saved and
serves by name."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.patterns.collaboration import Collaboration
from marlora.agents.tools.verifiers import resolve_verifier
from marlora.agents.types import AgentSpec, Message, Reward, SettingError, Task, Turn
from marlora.rollouts.renderer import ChatRenderer
from marlora.rollouts.rewards.builtin import resolve_rewards, reward_name
from marlora.rollouts.rewards.scoring import score
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.rollouts.types import Episode
from marlora.trainers.batching.samples import Denominators
from marlora.trainers.errors import RunError
from marlora.trainers.methods.reward_model.verifier import (
    Answer,
    TrainedVerifier,
    VerifierConfig,
    VerifierTrainer,
    answers_of,
    balanced,
    reading,
    trained,
    verifier_loss,
)
from marlora.trainers.testbeds.tiny import tiny_random_model, tiny_tokenizer

torch.set_num_threads(1)


# the loss


@pytest.mark.parametrize(
    ("label", "mean", "last"), [(1.0, 0.324287, 0.105361), (0.0, 1.474283, 2.302585)]
)
def test_loss_by_hand(label: float, mean: float, last: float) -> None:
    """Token probabilities .6, .7, .9."""
    probs = torch.tensor([0.6, 0.7, 0.9])
    targets = {"right": torch.full((3,), label), "weight": torch.full((3,), 1 / 3)}
    loss, stats = verifier_loss(probs.logit(), targets, Denominators(3, 1))
    assert loss.item() == pytest.approx(mean, abs=1e-6)
    assert stats["token_accuracy"] == 3 * label
    targets = {"right": torch.full((1,), label), "weight": torch.ones(1)}
    assert verifier_loss(probs[-1:].logit(), targets, Denominators(1, 1))[
        0
    ].item() == pytest.approx(last, abs=1e-6)


def test_a_long_answer_counts_no_more_than_a_short_one() -> None:
    """Answers of one token (p .9, right) and of three (p .6, .7, .9, wrong): (.105361 + 1.474283) /
    2."""
    scores = torch.tensor([0.9, 0.6, 0.7, 0.9]).logit()
    targets = {
        "right": torch.tensor([1.0, 0, 0, 0]),
        "weight": torch.tensor([1, 1 / 3, 1 / 3, 1 / 3]),
    }
    assert verifier_loss(scores, targets, Denominators(4, 2))[0].item() == pytest.approx(
        0.789822, abs=1e-6
    )


# answers


def test_answers_are_the_turns_with_a_label() -> None:
    turns = tuple(
        Turn(n, "a", text=text, saw_gold=gold)
        for n, (text, gold) in enumerate(
            [("20", False), ("21", False), ("20", True), ("", False), ("20", False)]
        )
    )
    rewards = (
        *(Reward("right", float(n % 2 == 0), turn=n) for n in range(4)),
        Reward("right", float("nan"), turn=4),
        Reward("correct", 1.0),
    )
    found = answers_of([Episode("e", "g", Task("t", "7+8+5", "20"), turns=turns, rewards=rewards)])
    assert found == [Answer("t", "7+8+5", "20", True), Answer("t", "7+8+5", "21", False)]


def answers(task: str, right: int, wrong: int) -> list[Answer]:
    return [Answer(task, "?", f"{k}", k < right) for k in range(right + wrong)]


def test_every_task_gives_as_many_right_as_wrong_answers() -> None:
    given = answers("a", 30, 4) + answers("b", 12, 15) + answers("c", 5, 0)
    kept = balanced(given, per_task=10, seed=0)
    counts = {
        (task, right): sum(a.task == task and a.right is right for a in kept)
        for task in "abc"
        for right in (True, False)
    }
    assert counts == {
        ("a", True): 4,
        ("a", False): 4,
        ("b", True): 10,
        ("b", False): 10,
        ("c", True): 0,
        ("c", False): 0,
    }
    assert balanced(given, 10, 0) == kept and balanced(given, 10, 1) != kept


def test_what_cannot_be_balanced_is_refused_with_numbers() -> None:
    with pytest.raises(
        RunError,
        match=(
            r"46 different answers to 3 tasks, 42 right and 4 wrong; only 1 tasks have both, so 8"
            r" are left .* is 32"
        ),
    ):
        balanced(
            answers("a", 30, 4) + answers("b", 7, 0) + answers("c", 5, 0), 10, 0, min_answers=32
        )


def test_it_reads_question_and_answer_and_is_asked_at_the_answers_tokens() -> None:
    tokens = ChatRenderer(tiny_tokenizer())
    prompt = tokens.prompt([Message("user", "7+8")])
    sample = reading(tokens, "7+8", "15")
    assert tokens.show(sample.ids[: len(prompt) + 3]) == tokens.show(prompt) + "15<|end|>"
    # A head reads one position before its term: the terms begin at the answer's second token.
    assert [i - 1 for i, on in enumerate(sample.mask) if on] == [
        len(prompt),
        len(prompt) + 1,
        len(prompt) + 2,
    ]


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"label": "write"}, "label 'write': not among"), ({"per_task": 0}, "per_task: expected")],
)
def test_settings_that_cannot_work(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingError, match=match):
        VerifierConfig(model="m", **settings)


# training and serving


def even(task: Task, episode: Episode) -> list[Reward]:
    """Stands for the comparison with the gold answer: something that the text shows."""
    return [
        Reward("even", float(sum(t.text.encode()) % 2), turn=t.index, sibling=t.sibling)
        for t in episode.turns
    ]


def found(task: Task, episode: Episode) -> float:
    return 0.0


def train(folder: Path, model: Path, **changes: Any) -> tuple[VerifierTrainer, dict[str, Any]]:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        rewards=["found", "even"],
        label="even",
        num_eval_tasks=8,
        tasks_per_step=16,
        num_generations=8,
        max_completion_length=3,
        per_task=2,
        num_train_epochs=2,
        lora_r=4,
        lora_alpha=8.0,
        learning_rate=1e-2,
        lora_target_modules=["q_proj", "v_proj"],
        train_batch_size=16,
    )
    system = Collaboration([AgentSpec("a", policy="base")], rounds=1)
    trainer = VerifierTrainer(
        system=system,
        tasks=tiny_tasks()[:40],
        eval_tasks=tiny_tasks("eval")[:8],
        rewards=[found, even],
        args=VerifierConfig(**{**settings, **changes}),
    )
    return trainer, trainer.train()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VerifierTrainer, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("verifier")
    return folder, *train(folder / "run", tiny_random_model(folder / "model"))


def test_it_is_saved_with_its_calibration(
    made: tuple[Path, VerifierTrainer, dict[str, Any]],
) -> None:
    folder, trainer, summary = made
    told = summary["verifier"]
    card = json.loads((folder / "run" / "verifier" / "verifier.json").read_text())
    assert (
        card["calibration"] == told["calibration"]
        and card["sha256"] == told["sha256"] == trainer.base.heads["verifier"].sha256()
    )
    assert (
        told["calibration"]["num"] >= 16
        and 0 <= told["calibration"]["ece"] <= 1
        and told["calibration"]["ranked"] is not None
    )
    row = json.loads((folder / "run" / "metrics.jsonl").read_text())["verifier"]
    assert (
        row["kept"] >= 32
        and row["updates"] >= 4
        and row["loss"] != row["loss_first"] == pytest.approx(0.693147, abs=1e-5)
    )


def test_it_serves_by_name_what_was_trained(
    made: tuple[Path, VerifierTrainer, dict[str, Any]],
) -> None:
    folder, trainer, _ = made
    name = f"marlora.trainers.methods.reward_model.verifier:trained({folder / 'run' / 'verifier'})"
    task, texts = Task("t", "7+8+5", "20"), ["20", "a", "<|end|>"]
    samples = [reading(trainer.base.tokens, task.prompt, text) for text in texts]
    head = trainer.base.heads["verifier"]
    expected = [float(head.read([s], trainer.run.ranks)[-1].sigmoid()) for s in samples]
    (reward,) = resolve_rewards([f"verified({name})"])
    turns = tuple(Turn(n, "a", text=text) for n, text in enumerate(texts))
    given = asyncio.run(score(task, Episode("e", "g", task, turns=turns), [reward]))
    assert [r.value for r in given] == pytest.approx(expected, abs=1e-5) and len(set(expected)) == 3
    assert {r.name for r in given} == {"verifier"} and [r.turn for r in given] == [0, 1, 2]
    assert resolve_verifier(name) is trained(str(folder / "run" / "verifier"))  # one copy in memory
    assert reward_name(reward) == f"marlora.rollouts.rewards.builtin:verified({name})"


def test_what_is_not_the_verifier_that_was_saved_is_refused(
    made: tuple[Path, VerifierTrainer, dict[str, Any]], tmp_path: Path
) -> None:
    folder = made[0] / "run" / "verifier"
    with pytest.raises(SettingError, match=r"no verifier\.json there"):
        TrainedVerifier(folder.parent)
    torn = shutil.copytree(folder, tmp_path / "torn")
    (torn / "head.safetensors").write_bytes(b"x")
    with pytest.raises(SettingError, match="altered or torn"):
        TrainedVerifier(torn)
    moved = TrainedVerifier(folder)
    moved.card["files"] = "0" * 64
    with pytest.raises(SettingError, match="has other files"):
        moved.score("7+8", "15")
