"""A-BAD-BO on a tiny random model: what is kept, tried, put in force; kills, ranks, the budget, and
settings that cannot work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import SettingError
from marlora.recipes.cli.main import main
from marlora.trainers.errors import RunError
from marlora.trainers.methods.selection.abadbo import ABADBOConfig, ABADBOTrainer
from marlora.trainers.methods.selection.loss_targets import Place
from tests.trainers.forks import two_ranks
from tests.trainers.methods.selection.abadbo_run import adapters, end, trainer
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")
POLICIES = ("first", "last")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> ABADBOTrainer:
    """A run that nothing cut off."""
    made = trainer(tmp_path_factory.mktemp("whole") / "run", model)
    made.train()
    return made


def summary_of(made: ABADBOTrainer) -> dict[str, Any]:
    path = made.args.folder / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def test_adapters_are_kept_along_every_training_run(whole: ABADBOTrainer) -> None:
    """8 turns per policy, 4 per update, twice: 4 updates, of which every second is kept, and the
    untrained adapter."""
    paths = whole.memory["paths"]
    assert set(paths) == set(POLICIES)
    for policy, runs in paths.items():
        assert [len(kept) for kept in runs] == [3, 3]
        assert runs[0][0] == runs[1][0], "both begin with the same adapter"
        assert runs[0][1]["sha256"] != runs[1][1]["sha256"], "and take orders of their own"
        for kept in runs:
            losses = [each["loss"] for each in kept]
            assert losses == sorted(losses, reverse=True)
        for run, kept in enumerate(runs):
            for at in range(len(kept)):
                folder = whole.args.folder / "local_training" / policy / f"{run:02}-{at:04}"
                assert (folder / "adapter_model.safetensors").is_file()


def test_both_ends_and_every_target_are_observed(whole: ABADBOTrainer) -> None:
    tried, limits = whole.memory["tried"], summary_of(whole)["limits"]
    assert [row["name"] for row in tried] == ["start", "fully trained", "target 1", "target 2"]
    assert [len(row["scores"]) for row in tried] == [1, 2, 2, 2]
    paths = whole.memory["paths"]
    for policy in POLICIES:
        losses = [[each["loss"] for each in kept] for kept in paths[policy]]
        low, high = limits[policy]
        least = min(map(min, losses))
        assert low in (pytest.approx(1.1 * least), least) and low < high <= losses[0][0]
        assert tried[0]["target"][policy] == tried[0]["achieved"][policy] == losses[0][0]
        assert tried[1]["achieved"][policy] in [own[-1] for own in losses]
        assert tried[2]["target"][policy] == pytest.approx((low + high) / 2)
        for row in tried[2:]:
            assert low - 1e-9 <= row["target"][policy] <= high + 1e-9
            far = [min(abs(loss - row["target"][policy]) for loss in own) for own in losses]
            gap = abs(row["achieved"][policy] - row["target"][policy])
            assert any(gap == pytest.approx(each) for each in far), "the nearest of its run"
            up = row["achieved"][policy] > row["target"][policy]
            assert (row["slope"][policy] > 0) == up
    for row in tried[2:]:
        assert row["error"] == pytest.approx(abs(row["predicted"] - row["score"]))
        assert row["deviation"] > 0 and row["score"] == max(row["scores"])


def test_the_best_team_is_in_force_and_the_report_says_so(whole: ABADBOTrainer) -> None:
    summary = summary_of(whole)
    tried, best = whole.memory["tried"], whole.memory["best"]
    assert tried[best]["score"] == max(row["score"] for row in tried)
    assert best == min(n for n, row in enumerate(tried) if row["score"] == tried[best]["score"])
    place = {p: Place(**each) for p, each in tried[best]["team"].items()}
    paths = whole.memory["paths"]
    kept = {p: paths[p][at.run][at.at]["sha256"] for p, at in place.items()}
    assert adapters(whole) == kept
    assert [row["kept"] for row in summary["targets"]] == [n == best for n in range(len(tried))]
    again = whole.run.evaluator.results  # the last state, measured by the run itself
    assert again["val-step-000003"]["accuracy"] == pytest.approx(tried[best]["score"])
    report = (whole.args.folder / "report.html").read_text(encoding="utf-8")
    assert "target 2" in report and "fully trained" in report
    assert "finding" not in summary, "the policies were trained"
    first = rows(whole.args.folder)[0]["policies"]
    assert all(first[policy]["tokens"] > 0 for policy in POLICIES)
    scores = [row["target"]["best_score"] for row in rows(whole.args.folder)[1:]]
    assert scores == sorted(scores)


def test_what_is_only_tried_moves_nothing(whole: ABADBOTrainer) -> None:
    """A step whose team is not better leaves the state as the step before left it."""
    states = [row["state"] for row in rows(whole.args.folder)]
    for number, row in enumerate(rows(whole.args.folder)[1:], 1):
        moved = row["target"]["best"] == row["target"]["name"]
        assert (states[number] != states[number - 1]) == moved, row


class Cut(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize(("measured", "step"), [(2, 1), pytest.param(5, 3, marks=pytest.mark.slow)])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    measured: int,
    step: int,
    whole: ABADBOTrainer,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two teams of a step, with other adapters in the learner than before it."""
    cut = trainer(tmp_path / "run", model)
    play, calls = cut.run.rollouts.play, [0]

    def killed(*args: Any, **settings: Any) -> Any:
        calls[0] += 1
        if calls[0] > measured:
            raise Cut
        return play(*args, **settings)

    monkeypatch.setattr(cut.run.rollouts, "play", killed)
    with pytest.raises(Cut):
        cut.train()
    assert cut.run.step == step - 1
    again = trainer(tmp_path / "run", model, resume=True)
    summary = again.train()
    assert end(again) == end(whole)
    ids = [sorted(e.id for e in made.run.rollouts.store) for made in (again, whole)]
    assert ids[0] == ids[1], "nothing is played twice"
    assert summary["eval"] == summary_of(whole)["eval"]


def test_an_adapter_that_was_altered_is_not_tried(
    whole: ABADBOTrainer, model: Path, tmp_path: Path
) -> None:
    made = trainer(tmp_path / "run", model)
    with made.run:
        made.run.finish(1, made.step(1))
        folder = made.args.folder / "local_training" / "first"
        for file in folder.glob("*/adapter_model.safetensors"):
            file.write_bytes((folder / "00-0000" / file.name).read_bytes())
        with pytest.raises(SettingError, match="not the adapter that was kept there"):
            made.step(2)


@pytest.mark.slow
@pytest.mark.process
def test_two_ranks_try_the_same_and_hold_the_same(whole: ABADBOTrainer, tmp_path: Path) -> None:
    done = two_ranks(
        "tests.trainers.methods.selection.abadbo_run", tmp_path / "two", whole.args.model
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (
        json.loads((tmp_path / f"two.rank{rank}.json").read_text(encoding="utf-8"))
        for rank in (0, 1)
    )
    assert first == second and len(first["memory"]["tried"]) == 4
    for policy, runs in whole.memory["paths"].items():
        for mine, theirs in zip(runs, first["memory"]["paths"][policy], strict=True):
            for one, two in zip(mine, theirs, strict=True):
                assert one["loss"] == pytest.approx(two["loss"], rel=1e-3), "as one rank learns"


def test_a_checkpoint_is_worth_what_the_run_said(whole: ABADBOTrainer, tmp_path: Path) -> None:
    summary = summary_of(whole)
    checkpoint = whole.args.folder / "checkpoints" / "step-000003"
    argv = ["eval", str(checkpoint), "--trust_checkpoint", "--engine", "transformers"]
    assert main([*argv, "--output", str(tmp_path / "eval")]) in (0, None)
    found = json.loads((tmp_path / "eval/eval.json").read_text(encoding="utf-8"))["eval"]
    for when in ("before", "after"):
        assert found[when]["accuracy"] == summary["eval"][when]["accuracy"]


def test_the_budget_ends_the_search_with_the_best_so_far(
    whole: ABADBOTrainer, model: Path, tmp_path: Path
) -> None:
    limit = int(0.75 * summary_of(whole)["budget"]["spent"]["tokens"])
    made = trainer(tmp_path / "run", model, budget={"tokens": limit})
    summary = made.train()
    assert summary["budget"]["stopped"] and summary["budget"]["spent"]["tokens"] <= limit
    assert summary["steps"] < 3 and summary["done"] == "the budget is spent"
    if summary["steps"]:
        best = made.memory["tried"][made.memory["best"]]["team"]
        paths = made.memory["paths"]
        kept = {p: paths[p][at["run"]][at["at"]]["sha256"] for p, at in best.items()}
        assert adapters(made) == kept


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"bound_factor": 1.1}, "bound_factor: expected a number above 1.1"),
        ({"num_targets": 0}, "num_targets: expected at least 1"),
        ({"num_val_tasks": 0}, "num_val_tasks: expected at least 1"),
        ({"max_steps": 2}, "max_steps: a step is a target and there are 2 after the first"),
        ({"max_staleness": 1}, "max_staleness: only the first step plays to learn"),
    ],
)
def test_settings_that_cannot_work(
    changes: dict[str, Any], error: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=error):
        trainer(tmp_path / "run", model, **changes)


def test_a_policy_without_a_turn_of_its_own_is_named(model: Path, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", model, select="success", rewards=["exact"])
    with pytest.raises(RunError, match=r"step 1: no turn was kept|no turn of its own was kept"):
        made.train()


def test_without_botorch_the_run_does_not_begin(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "botorch", None)
    with pytest.raises(SettingError, match=r"pip install 'marlora\[bayes\]'"):
        trainer(tmp_path / "run", model)


def test_steps_follow_from_the_targets() -> None:
    config = ABADBOConfig(model="m")
    assert (config.num_targets, config.max_steps, config.teams_per_target) == (10, 11, 5)
    assert (config.ucb_beta, config.tolerance, config.bound_factor) == (1.0, 0.1, 5.0)
