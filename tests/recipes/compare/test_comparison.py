"""Whole comparisons on a model that has learnt nothing: rows that are always there, arms that fail,
resume, budgets. Recipes run in this process here; processes that are killed stand in
`test_processes.py`."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from marlora.agents.types import SettingError
from marlora.recipes.cli.main import main
from marlora.recipes.compare import comparison, processes, runs
from marlora.recipes.compare.dry_run import dry_run
from marlora.recipes.compare.measured import run_result
from marlora.recipes.compare.plan import ComparisonPlan
from marlora.recipes.compare.reference import LEAST_VOTE, PROMPTS, SINGLE, TEAM, VOTES, Reference
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.report.run_data import RunData
from marlora.trainers.errors import RunError
from tests.recipes.compare.plans import SFT, plan_of, written

pytestmark = pytest.mark.usefixtures("one_thread")


def in_process(words: Sequence[str], log: Path) -> int:
    """Stands for `runs.supervised`: a recipe's `main` in this process, and its exit code."""
    before, sys.argv = sys.argv, ["recipe", *words[3:]]
    try:
        importlib.import_module(words[2]).main()
    except SettingError as error:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"warning: something else\nerror: {error}\n")
        return 2
    finally:
        sys.argv = before
    return 0


def silent(line: str) -> None:
    pass


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The recipes that were started, in order."""
    names: list[str] = []

    def run(words: Sequence[str], log: Path) -> int:
        names.append(Path(words[-1]).stem)
        return in_process(words, log)

    monkeypatch.setattr(runs, "supervised", run)
    monkeypatch.setattr(processes, "can_fork", lambda words: False)
    return names


ARMS = {
    "sft": SFT,
    "still": {**SFT, "control_of": "sft", "settings": {**SFT["settings"], "learning_rate": 0.0}},
    "edges": {"recipe": "gptswarm_edges"},
}


def test_a_comparison_has_all_rows_and_goes_on_where_it_was(
    model: Path, tmp_path: Path, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    prompts = [{"first.prompt": "a"}, {"first.prompt": "b", "last.prompt": "b"}]
    plan = plan_of(folder, model, arms=ARMS, prompts=prompts)
    path = written(tmp_path / "plan.yaml", plan)
    numbers, markdown = tmp_path / "numbers.json", tmp_path / "table.md"
    words = ["compare", str(path), "--json", str(numbers), "--markdown", str(markdown)]

    # one arm cannot take the team: the others have their rows, and the command says so
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert "1 run has no result; edges, seed 0: the recipe does not take" in shown.err
    assert started == ["sft-seed-0", "still-seed-0", "edges-seed-0"]
    result = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in result["rows"]}
    references = [TEAM, SINGLE, PROMPTS, VOTES[SINGLE], VOTES[TEAM]]
    assert list(rows) == [*references, "sft", "still"]
    assert set(result["noise"]) == {"greedy", "sampled"}
    assert set(result["failed"]) == {"edges, seed 0"}
    assert "system" in result["failed"]["edges, seed 0"]
    assert json.loads(numbers.read_text(encoding="utf-8")) == result
    assert "| edges" not in markdown.read_text(encoding="utf-8")

    # a control that cannot learn ends as the team began, token for token
    still, team = rows["still"], rows[TEAM]
    assert (still["score"], still["tokens_per_task"]) == (team["score"], team["tokens_per_task"])
    assert still["starts_at"] == team["score"] and still["control_of"] == "sft"
    pairs = {(each["from"], each["to"]) for each in result["comparisons"]}
    against = [TEAM, VOTES[SINGLE]]  # the team's tokens pay for no vote of the team
    assert pairs == {(a, b) for a in against for b in ("sft", "still")} | {
        ("still", "sft"),
        (TEAM, PROMPTS),
    }

    # votes are paid for by the dearest arm; what is no vote says so
    dearest = max(rows["sft"]["tokens_per_task"], still["tokens_per_task"])
    assert rows[VOTES[SINGLE]]["tokens_per_task"] <= dearest + 1e-9
    assert rows[VOTES[TEAM]]["note"].startswith(f"no vote: {dearest:,.0f} tokens per task pay for")
    assert rows[VOTES[TEAM]]["samples"] == 1 and rows[VOTES[TEAM]]["score"] == team["score"]
    assert "- team, self-consistency: no vote" in markdown.read_text(encoding="utf-8")
    assert rows[PROMPTS]["spent"]["tokens"] > 0 and re.fullmatch(
        r"number [1-9] of \d, chosen on validation tasks", rows[PROMPTS]["note"]
    )

    # what learning took is what the run's ledger says, and within the budget
    summary = json.loads((folder / "runs/sft/seed-0/summary.json").read_text(encoding="utf-8"))
    assert rows["sft"]["spent"]["tokens"] == summary["budget"]["spent"]["tokens"] <= 10000
    assert sum(each["tokens"] for each in rows["sft"]["by_role"].values()) == pytest.approx(
        rows["sft"]["spent"]["tokens"]
    )
    policies = rows["sft"]["by_policy"]
    assert {name: row["calls_per_episode"] for name, row in policies.items()} == {
        "first": 1.0,
        "last": 1.0,
    }
    assert all(row["grad_norm"] > 0 for row in policies.values())
    curve = result["curves"]["sft"]["held-out"]["0"]
    assert curve[0][0] == 0 and curve[-1][0] == rows["sft"]["spent"]["tokens"]

    # the bill has everything: what was played for the rows, and the runs with their evaluations
    bill = {entry["what"]: entry["tokens"] for entry in result["bill"]}
    learnt = sum(rows[name]["spent"]["tokens"] for name in ("sft", "still"))
    assert bill["runs of the arms, learning"] == pytest.approx(learnt)
    ledger = summary["ledger"]["eval"].values()
    assert bill["runs of the arms, evaluation"] >= sum(e["prompt_tokens"] for e in ledger) > 0
    played = (e for e in Store(folder / "reference" / "episodes"))
    usages = [usage for e in played for usage in e.usage.values()]
    spent = sum(usage.prompt_tokens + usage.sampled_tokens for usage in usages)
    assert bill["reference rows"] == pytest.approx(spent) and spent > 0

    # again, with one more arm: only that one and the one without a result are started
    stored = {e.id for e in Store(folder / "reference" / "episodes")}
    arms = {**ARMS, "more": {**SFT, "recipe": "sft_team", "compared_with": "sft"}}
    written(path, {**plan, "arms": arms})
    del started[:]
    with pytest.raises(SystemExit):
        main([*words, "--so_far"])
    so_far = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    assert not started and so_far["rows"] == result["rows"], "no run is started"
    assert so_far["failed"] == {f"{name}, seed 0": runs.NOT_RUN for name in ("edges", "more")}
    with pytest.raises(SystemExit):
        main(words)
    assert started == ["edges-seed-0", "more-seed-0"]
    again = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    assert again["rows"][: len(result["rows"])] == result["rows"]
    (among,) = (e for e in again["comparisons"] if (e["from"], e["to"]) == ("sft", "more"))
    assert among["difference"] == 0 and list(among["by_seed"]) == ["0"]
    assert {e.id for e in Store(folder / "reference" / "episodes")} == stored


def test_a_budget_below_one_evaluation_is_refused_before_any_arm(
    model: Path, tmp_path: Path, started: list[str]
) -> None:
    """What an evaluation costs is known once the team was measured."""
    plan = ComparisonPlan("p", plan_of(tmp_path, model, budget={"tokens": 30}))
    with pytest.raises(SettingError, match=r"budget\.tokens: 30 is below one evaluation"):
        comparison.compare_arms(plan, silent)
    assert not started and not (tmp_path / "compare.json").exists()
    # the folder is still free for the plan with another budget, and for no file that is not ours
    comparison.claimed(ComparisonPlan("p", plan_of(tmp_path, model)))
    (tmp_path / "plan.json").write_text('{"name": "app"}', encoding="utf-8")
    with pytest.raises(SettingError, match="is no comparison's"):
        comparison.claimed(ComparisonPlan("p", plan_of(tmp_path, model)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [{"first.prompt": "x"}, {"third.prompt": "x"}]}, r"prompts\[1\]: .*third"),
        ({"single_agent": {"promt": "x"}}, r"single_agent\.promt: .*did you mean 'prompt'"),
    ],
)
def test_rows_that_cannot_be_are_refused_before_anything_is_played(
    model: Path, tmp_path: Path, started: list[str], changes: dict[str, Any], message: str
) -> None:
    plan = ComparisonPlan("p", plan_of(tmp_path, model, **changes))
    with pytest.raises(SettingError, match=message):
        comparison.compare_arms(plan, silent)
    assert not started and not (tmp_path / "reference").exists()


def test_a_budget_ends_a_run_and_is_never_exceeded(
    model: Path, tmp_path: Path, started: list[str]
) -> None:
    arms = {"sft": {**SFT, "settings": {**SFT["settings"], "max_steps": 50}}}
    plan = ComparisonPlan("p", plan_of(tmp_path, model, arms=arms, budget={"tokens": 450}))
    result = comparison.compare_arms(plan, silent)
    row = next(row for row in result["rows"] if row["name"] == "sft")
    assert row["stopped"] and 0 < row["steps"] < 50
    assert 225 < row["spent"]["tokens"] <= 450 and not result["failed"]


def test_more_than_the_budget_is_a_failure(
    model: Path, tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ComparisonPlan("p", plan_of(tmp_path, model))
    (run,) = plan.runs()
    run.folder.mkdir(parents=True)
    (run.folder / "summary.json").write_text(
        json.dumps({"steps": 2, "budget": {"spent": {"tokens": 10001}}}), encoding="utf-8"
    )
    assert runs.is_finished(run)
    assert comparison.failures(plan, [runs.Outcome(run)]) == {
        "sft, seed 0": "over its budget, tokens: 10,001 of 10,000"
    }
    # a run that went on after its summary was written has not finished
    (run.folder / "metrics.jsonl").write_text('{"step": 3}\n', encoding="utf-8")
    assert not runs.is_finished(run)


def test_a_run_of_other_settings_is_not_taken_for_the_arms(
    model: Path, tmp_path: Path, started: list[str]
) -> None:
    """Nor is it changed: a folder that an arm names may hold any run."""
    own = {**SFT, "output_dir": str(tmp_path / "mine")}
    plan = ComparisonPlan("p", plan_of(tmp_path / "a", model, arms={"sft": own}))
    comparison.compare_part(plan, 0, silent)
    assert runs.other_settings(plan, next(plan.runs())) == ""
    kept = next(plan.runs()).folder / "config.yaml"
    settings = yaml.safe_load(kept.read_text(encoding="utf-8"))
    settings["rewards"].append("rated")  # as a trainer does that scores more than it was told
    kept.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert runs.other_settings(plan, next(plan.runs())) == ""
    settings["rewards"][0] = "numeric"
    kept.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert runs.other_settings(plan, next(plan.runs())).startswith(
        "rewards is ['numeric', 'rated']"
    )
    other = {**own, "settings": {**SFT["settings"], "max_steps": 3, "select": "random"}}
    changed = ComparisonPlan("p", plan_of(tmp_path / "b", model, arms={"sft": other}))
    with pytest.raises(RunError, match=r"max_steps is 2 there, 3 in the plan; select is 'all'"):
        comparison.compare_part(changed, 0, silent)
    imitated = {"recipe": "grpo_team", "output_dir": own["output_dir"]}
    by_another = ComparisonPlan("p", plan_of(tmp_path / "c", model, arms={"sft": imitated}))
    assert runs.other_settings(by_another, next(by_another.runs())).startswith(
        "recipe is 'sft_team' there, 'grpo_team' in the plan"
    )
    assert len(started) == 1


def test_a_vote_takes_three_answers(model: Path, tmp_path: Path) -> None:
    """Tokens of two samples pay for none: then the row is the one greedy answer."""
    plan = ComparisonPlan("p", plan_of(tmp_path, model))
    with Reference(plan, tmp_path / "reference") as reference:
        team, single = reference.team(), reference.single()
        few, many = reference.votes(2.5 * team.tokens), reference.votes(9 * team.tokens)
    assert few[VOTES[TEAM]] == (2, team)
    if few[VOTES[SINGLE]][0] < LEAST_VOTE:
        assert few[VOTES[SINGLE]][1] == single
    samples, measurement = many[VOTES[TEAM]]
    assert samples >= 8 and measurement.calls == pytest.approx(samples * team.calls)
    assert (
        comparison.vote_note(9, 90.0) == "majority of 9 sampled answers, at most 90 tokens per task"
    )
    assert comparison.vote_note(2, 90.0).startswith("no vote: 90 tokens per task pay for 2 sampled")


def test_arms_are_measured_by_the_reward_that_the_rows_are_measured_by(
    model: Path, tmp_path: Path, started: list[str]
) -> None:
    """A reward function whose name is not that of its setting, and more than one reward: the first
    one counts for arms as for rows. Votes may take more than the dearest arm does."""
    plan = plan_of(tmp_path, model, vote_tokens=400)
    plan["team"]["rewards"] = ["tests.recipes.compare.plans:first_judge", "length"]
    result = comparison.compare_arms(ComparisonPlan("p", plan), silent)
    rows = {row["name"]: row["score"] for row in result["rows"]}
    assert rows["sft"] == rows[TEAM] == 0.25
    votes = [row for row in result["rows"] if row["name"] in VOTES.values()]
    assert all(row["samples"] >= LEAST_VOTE for row in votes)
    assert all(200 < row["tokens_per_task"] <= result["vote_tokens"] == 400 for row in votes)
    assert result["curves"]["sft"]["held-out"]["0"][0][1] == 0.25


def test_the_dry_run_says_what_each_arm_may_spend_and_who_refuses(
    model: Path, tmp_path: Path
) -> None:
    plan = ComparisonPlan("p", plan_of(tmp_path / "out", model, arms=ARMS, seeds=[0, 1, 2]))
    lines = list(dry_run(plan))
    assert "runs         9, which may spend at most 90,000 tokens" in lines
    (of_sft,) = (line for line in lines if line.startswith("  sft: "))
    assert of_sft == "  sft: sft_team, 3 seeds: at most 30,000 tokens"
    edges = lines.index(next(line for line in lines if line.startswith("  edges: ")))
    assert lines[edges + 1].startswith("    the recipe does not take the plan's team")
    memory = next(n for n, line in enumerate(lines) if line.startswith("    memory "))
    assert "GiB" in "".join(lines[memory : memory + 6])
    assert not (tmp_path / "out").exists()


def test_one_part_is_one_run(model: Path, tmp_path: Path, started: list[str]) -> None:
    plan = ComparisonPlan("p", plan_of(tmp_path, model, arms={"sft": SFT, "more": SFT}))
    comparison.compare_part(plan, 1, silent)
    assert started == ["more-seed-0"] and not (tmp_path / "reference").exists()
    data = RunData.read(tmp_path / "runs" / "more" / "seed-0")
    assert run_result(data, 0).steps == 2
    with pytest.raises(SettingError, match="--part 2: the plan has runs 0 to 1"):
        comparison.compare_part(plan, 2, silent)


def test_headroom_says_whether_there_is_anything_to_gain(model: Path, tmp_path: Path) -> None:
    """The other model is the same one: what it answers is what the team answers."""
    plan: Any = plan_of(tmp_path, model, headroom={"samples": 2, "model": {"base": str(model)}})
    result = comparison.measure_headroom(ComparisonPlan("p", plan))
    assert 0 <= result["sampled"] <= result["best_of"]["score"]
    assert result["tasks"] == 2 and result["held_out_tasks"] == 4 and result["comparisons"] == 3
    assert result["other_model"] == result["team"] <= 1
    assert result["best_of"]["samples"] == 2 and result["detectable"] > 0
    assert not (tmp_path / "runs").exists()
    # what is kept counts for this plan, with as many comparisons as it has by then; for no other
    said: list[str] = []
    assert comparison.kept_headroom(ComparisonPlan("p", plan), said.append) == result
    more = ComparisonPlan("p", {**plan, "arms": {"sft": SFT, "more": SFT}})
    kept = comparison.kept_headroom(more, said.append)
    assert kept and kept["comparisons"] == 6 and kept["detectable"] > result["detectable"]
    assert not said
    for changes in ({"seeds": [1]}, {"headroom": {"samples": 3}}):
        assert not comparison.kept_headroom(ComparisonPlan("p", {**plan, **changes}), said.append)
    assert len(said) == 2 and "so it is left out" in said[0]
