"""BetterTogether on the toy model that goes by worked examples: strategies, what each letter moves,
which state is kept, failures, kills, ranks, and settings that cannot work.

`python -m tests.trainers.methods.prompts.test_better_together FOLDER MODEL` plays a run on each rank,
which writes what it ends with to FOLDER.rankN.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from marlora.agents.types import SettingError, Task
from marlora.recipes.cli.main import main
from marlora.rollouts.types import Episode
from marlora.trainers.errors import RunError
from marlora.trainers.methods.prompts.better_together import (
    BetterTogetherConfig,
    BetterTogetherTrainer,
)
from marlora.trainers.methods.prompts.bootstrapping.bootstrap_finetune import (
    BootstrapFinetuneTrainer,
)
from marlora.trainers.testbeds.rules import rule_chain
from tests.trainers.forks import two_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def loud(task: Task, episode: Episode) -> float:
    """A score that no model has learnt and that differs between replies."""
    return sum(str(episode.output).encode()) % 7 / 6


def trainer(folder: Path, model: Path | str, **changes: Any) -> BetterTogetherTrainer:
    """Unshuffled demonstrations, and one step of imitation, on a random tiny model."""
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        tasks="marlora.rollouts.tasks.toy:rule_tasks",
        rewards=["tests.trainers.methods.prompts.test_better_together:loud"],
        num_eval_tasks=4,
        num_val_tasks=4,
        prompt_method={
            "method": "bootstrap_few_shot",
            "candidates": ["unshuffled"],
            "max_bootstrapped_demos": 1,
            "success_threshold": 0.5,
        },
        weight_method={
            "method": "bootstrap_finetune",
            "success_threshold": 0.3,
            "num_train_epochs": 1,
        },
        tasks_per_step=6,
        num_generations=1,
        max_completion_length=3,
        lora_r=2,
        learning_rate=1e-2,
        lora_target_modules=["q_proj", "v_proj"],
        ablate_adapters=False,
    )
    return BetterTogetherTrainer(
        system=rule_chain({"first": "first", "last": "last"}),
        args=BetterTogetherConfig(**{**settings, **changes}),
    )


def adapters(made: BetterTogetherTrainer) -> dict[str, str]:
    """Hash of every adapter."""
    (base,) = made.run.learner.bases.values()
    return {policy: base.adapters.sha256(policy) for policy in base.policies}


def saved(folder: Path, step: int) -> tuple[Any, dict[str, Any]]:
    """(values, hash of each adapter) of a checkpoint."""
    place = folder / "checkpoints" / f"step-{step:06d}"
    system = json.loads((place / "system.json").read_text(encoding="utf-8"))
    values = json.loads((place / "values" / "values.json").read_text(encoding="utf-8"))
    return values, {name: each["sha256"] for name, each in system["adapters"].items()}


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> BetterTogetherTrainer:
    """A run of all letters that nothing cut off, which keeps its last state."""
    made = trainer(tmp_path_factory.mktemp("whole") / "run", model, keep="last", save_total_limit=9)
    made.train()
    return made


def test_candidates_are_the_start_and_every_prefix(whole: BetterTogetherTrainer) -> None:
    summary = json.loads((whole.args.folder / "summary.json").read_text(encoding="utf-8"))
    prefixes = [row["strategy"] for row in summary["strategies"]]
    assert prefixes == ["", "p", "p -> w", "p -> w -> p"] and summary["steps"] == 3


def test_p_moves_values_alone_and_w_adapters_alone(whole: BetterTogetherTrainer) -> None:
    folder = whole.args.folder
    start, prompted, trained, last = (saved(folder, step) for step in range(4))
    assert start[0] == {} and set(prompted[0]) <= {"first.demos", "last.demos"}
    assert start[1] == prompted[1] and trained[0] == prompted[0] and trained[1] != prompted[1]
    assert last[1] == trained[1]
    lessons = [e for e in whole.run.rollouts.store.read(kind="train")]
    assert len(lessons) == 6 and all(e.state.values == prompted[0] for e in lessons)


def test_a_checkpoint_is_worth_what_the_run_said(
    whole: BetterTogetherTrainer, tmp_path: Path
) -> None:
    summary = json.loads((whole.args.folder / "summary.json").read_text(encoding="utf-8"))
    argv = ["eval", str(whole.args.folder / "checkpoints" / "step-000003"), "--trust_checkpoint"]
    main([*argv, "--engine", "transformers", "--output", str(tmp_path / "eval")])
    found = json.loads((tmp_path / "eval/eval.json").read_text(encoding="utf-8"))["eval"]
    for when in ("before", "after"):
        assert found[when]["accuracy"] == summary["eval"][when]["accuracy"]
    assert found["before"]["accuracy"] != found["after"]["accuracy"]


class Cut(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("step", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    step: int,
    whole: BetterTogetherTrainer,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind the letter's work, before it counts."""
    settings: dict[str, Any] = dict(keep="last", save_total_limit=9)
    cut = trainer(tmp_path / "run", model, **settings)
    own = cut.step

    def killed(number: int) -> Any:
        result = own(number)
        if number == step:
            raise Cut
        return result

    monkeypatch.setattr(cut, "step", killed)
    with pytest.raises(Cut):
        cut.train()
    again = trainer(tmp_path / "run", model, resume=True, **settings)
    again.train()
    assert again.run.values == whole.run.values and adapters(again) == adapters(whole)
    for number in range(4):
        assert saved(tmp_path / "run", number) == saved(whole.args.folder, number)


@pytest.mark.process
@pytest.mark.slow
def test_two_ranks_take_the_same_way_and_hold_the_same(
    whole: BetterTogetherTrainer, tmp_path: Path
) -> None:
    done = two_ranks(
        "tests.trainers.methods.prompts.test_better_together", tmp_path / "two", whole.args.model
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (
        json.loads((tmp_path / f"two.rank{rank}.json").read_text(encoding="utf-8"))
        for rank in (0, 1)
    )
    assert first == second and len(first["adapters"]) == 2
    assert saved(tmp_path / "two", 1)[0] == saved(whole.args.folder, 1)[0], "as one rank finds"


def test_a_letter_that_fails_is_undone_and_ends_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = BootstrapFinetuneTrainer.step

    def failing(self: BootstrapFinetuneTrainer, step: int) -> Any:
        own(self, step)
        raise RunError("step 1: a disk was full")

    monkeypatch.setattr(BootstrapFinetuneTrainer, "step", failing)
    made = trainer(tmp_path / "run", model, strategy="w -> p", save_total_limit=9)
    summary = made.train()
    assert summary["steps"] == 1 and summary["done"] == (
        "strategy w failed: step 1: a disk was full"
    )
    assert saved(tmp_path / "run", 1) == saved(tmp_path / "run", 0), "the update is undone"
    assert [row["strategy"] for row in summary["strategies"]] == ["", "w"]
    assert summary["strategies"][0]["kept"] and summary["eval"]["after"]["accuracy"] is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scores", "kept"), [([5, 6, 6, 5.5], 1), ([5, 4, 3, 2], 0), ([1, 2, 3, 4], 3)]
)
def test_the_best_state_is_kept_and_the_earlier_of_equal_ones(
    scores: list[float], kept: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fact 7: of 50, 60, 60, 55 the second."""
    made = trainer(tmp_path / "run", model, save_total_limit=9)
    remember = made.run.evaluator._remember
    monkeypatch.setattr(
        made.run.evaluator, "_remember", lambda accuracy: remember(scores[made.run.step])
    )
    summary = made.train()
    assert [n for n, row in enumerate(summary["strategies"]) if row["kept"]] == [kept]
    values, hashes = saved(tmp_path / "run", kept)
    assert made.run.values == values and saved(tmp_path / "run", 3) == (values, hashes)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"strategy": ""}, "strategy: empty"),
        ({"strategy": "p -> w -> x"}, "strategy: unknown letter 'x' in 'p -> w -> x'"),
        ({"strategy": "p -> "}, "strategy: unknown letter ''"),
        ({"prompt_method": {"method": "miprov2"}}, "prompt_method.method: .*did you mean 'mipro'"),
        ({"prompt_method": {}}, "prompt_method.method: no such method ''"),
        ({"weight_method": {"method": "sft", "lora_r": 3}}, "weight_method.lora_r: a setting of"),
        (
            {"weight_method": {"method": "sft", "num_train_epoch": 3}},
            "weight_method.num_train_epoch: unknown setting; did you mean 'num_train_epochs'",
        ),
        ({"prompt_method": {"method": "bootstrap_few_shot", "candidates": []}}, "candidates: none"),
        ({"prompt_method": {"method": "mipro"}}, "minibatch_size: 35 tasks of 4 validation tasks"),
        ({"num_val_tasks": 0}, "num_val_tasks: expected at least 1"),
        ({"eval_every": 2}, "eval_every, save_every: every letter is measured"),
        ({"max_steps": 2}, "max_steps: a step is a letter of the strategy and there are 3"),
        ({"weight_method": {"method": "bootstrap_finetune", "teacher": {"x.y": 1}}}, "teacher.x.y"),
    ],
)
def test_settings_that_cannot_work(
    changes: dict[str, Any], error: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=error):
        trainer(tmp_path / "run", model, **changes)


@pytest.mark.slow
def test_prompts_then_weights_then_prompts_make_the_toy_model_right(tmp_path: Path) -> None:
    """`tiny-rules` is never right at first; with demonstrations it is, and weights are learnt from
    the runs made with them. The control learns from demonstrations of any run."""

    def run(name: str, select: str) -> dict[str, Any]:
        return trainer(
            tmp_path / name,
            "tiny-rules",
            rewards=["exact"],
            num_eval_tasks=60,
            num_val_tasks=30,
            prompt_method={
                "method": "bootstrap_few_shot",
                "candidates": ["unshuffled"],
                "max_rounds": 4 if select == "success" else 1,
                "select": select,
            },
            weight_method={"method": "bootstrap_finetune", "select": select, "num_train_epochs": 1},
            tasks_per_step=24,
            learning_rate=2e-3,
        ).train()

    summary = run("true", "success")
    assert summary["eval"]["before"]["accuracy"] == 0 < 0.9 < summary["eval"]["after"]["accuracy"]
    rows = summary["strategies"]
    assert rows[1]["accuracy"] > 0.9 and max(row["accuracy"] for row in rows) == next(
        row["accuracy"] for row in rows if row["kept"]
    )
    assert run("control", "all")["eval"]["after"]["accuracy"] < 0.1


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = trainer(Path(sys.argv[1]), sys.argv[2], keep="last", save_total_limit=9)
    made.train()
    ended = {"values": made.run.values, "adapters": adapters(made)}
    Path(f"{sys.argv[1]}.rank{made.run.ranks.rank}.json").write_text(
        json.dumps(ended), encoding="utf-8"
    )
