"""A run whose method changes values: proposals, trials, asides, memory, budget, the state kept at the
end, and all of it after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.types import SettingError, Task
from marlora.recipes.cli.main import main
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.store import Store
from marlora.trainers.config import RunConfig
from marlora.trainers.errors import RunError
from marlora.trainers.loop.step_result import StepResult
from marlora.trainers.trainer import Trainer
from marlora.trainers.values.memory import Memory

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["say 1", "say 2", "say 3", "say 2"]  # what the helper proposes, in order; 3 is best
REPLY = 6  # tokens of a reply at most


class Cut(BaseException):
    """Stands for a kill."""


def said(prompt: str, ref: ModelRef, sampling: Any, k: int) -> str:
    """An agent says the last digit of its system message (0 without one); the helper proposes."""
    if "propose" in prompt:
        return PROMPTS[int(prompt.rpartition("number ")[2].partition("<")[0])]
    head = prompt.partition("<|user|>")[0]
    return next((c for c in reversed(head) if c.isdigit()), "0")


class Tuner(Trainer[RunConfig]):
    """Asks a helper for a prompt, measures it on the validation tasks, adopts it if it is better."""

    Config = RunConfig
    hook: Callable[[str], None] = staticmethod(lambda where: None)

    def parts(self) -> Sequence[Memory]:
        self.memory = Memory("tuner")
        return (self.memory,)

    def step(self, step: int) -> StepResult:
        run = self.run
        talk = run.rollouts.ask(
            Chain([self.spec.helper("writer")]), Task(f"ask-{step}", f"propose number {step - 1}")
        )
        self.hook("asked")
        state = run.state.with_values({"solver.prompt": str(talk.output)})
        new = run.evaluator.measure(state, self.spec.val_tasks).accuracy
        self.hook("measured")
        old = run.evaluator.measure(run.state, self.spec.val_tasks).accuracy
        self.memory["scores"] = [*self.memory.get("scores", []), new]
        self.hook("remembered")
        better = new > old
        done = "nothing better is known" if self.memory["scores"][-2:] == [1.0, 2 / 3] else ""
        return StepResult({"new": new, "old": old}, state=state if better else None, done=done)


def tuner(
    folder: Path,
    model: Path,
    *,
    cls: type[Tuner] | None = None,
    system: Chain | None = None,
    **changes: Any,
) -> Tuner:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        policies={"solver": {"trainable": False}},
        helpers={"writer": {"prompt": "You write prompts."}},
        tasks="tests.trainers.state_tasks:digits",
        rewards=["tests.trainers.state_tasks:worth"],
        num_val_tasks=4,
        max_steps=4,
        max_completion_length=REPLY,
        save_every=1,
    )
    return (cls or Tuner)(
        system=system or Chain(["solver"]),
        args=RunConfig(**{**settings, **changes}),
        engine=ScriptedEngine(said),
    )


def facts(folder: Path) -> dict[str, Any]:
    """What a run came to: everything but times."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for rows in [*summary["ledger"].values(), *summary["ledger_by_policy"].values()]:
        for row in rows.values():
            del row["seconds"]
    state = json.loads(
        (
            folder / "checkpoints" / f"step-{summary['steps']:06d}" / "trainer" / "state.json"
        ).read_text(encoding="utf-8")
    )
    stored = sorted((e.id, e.output, e.kind) for e in Store(folder / "episodes"))
    kept = ("eval", "ledger", "ledger_by_policy", "budget", "done", "state", "steps", "tokens")
    return {**{k: summary[k] for k in kept}, "parts": state["parts"], "stored": stored}


def test_a_proposal_that_is_better_is_adopted_and_is_the_state_of_the_checkpoint(
    model: Path, tmp_path: Path
) -> None:
    summary = tuner(tmp_path / "run", model).train()
    assert summary["eval"]["before"]["accuracy"] == 0 and summary["eval"]["after"]["accuracy"] == 1
    assert summary["steps"] == 4 and summary["done"] == "nothing better is known"
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    values = json.loads((checkpoint / "values" / "values.json").read_text(encoding="utf-8"))
    assert values == {"solver.prompt": "say 3"}
    assert json.loads((checkpoint / "values" / "origin.json").read_text(encoding="utf-8")) == {}
    hashes = summary["state"]["values"]["solver.prompt"]
    assert hashes["sha256_before"] == "" and len(hashes["sha256_after"]) == 64


def test_every_kind_of_call_is_on_the_ledger_and_what_is_measured_again_costs_nothing(
    model: Path, tmp_path: Path
) -> None:
    summary = tuner(tmp_path / "run", model).train()
    rows = summary["ledger"]
    assert {kind: list(own) for kind, own in rows.items()} == {
        "trial": ["solver"],
        "aside": ["writer"],
        "eval": ["solver"],
    }
    # the start and three proposals that differ, four tasks each; the fourth is the second again
    assert rows["trial"]["solver"]["calls"] == 16 and rows["trial"]["solver"]["cached_tokens"] > 0
    assert rows["aside"]["writer"]["calls"] == 4 and rows["eval"]["solver"]["calls"] == 6
    stored = list(Store(tmp_path / "run" / "episodes"))
    for kind in ("trial", "aside", "eval"):
        mine = [u for e in stored if e.kind == kind for u in e.usage.values()]
        (row,) = rows[kind].values()
        assert row["sampled_tokens"] == sum(u.sampled_tokens for u in mine)
        assert row["prompt_tokens"] == sum(u.prompt_tokens for u in mine)
    spent = sum(
        row["prompt_tokens"] + row["sampled_tokens"]
        for kind in ("trial", "aside")
        for row in rows[kind].values()
    )
    assert summary["budget"]["spent"]["tokens"] == spent
    assert summary["tokens"]["sampled"] == sum(
        rows[kind][name]["sampled_tokens"]
        for kind, name in (("trial", "solver"), ("aside", "writer"))
    )


@pytest.mark.parametrize("where", ["asked", "measured", "remembered"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_that_is_killed_inside_a_step_comes_to_the_same(
    where: str, step: int, model: Path, tmp_path: Path
) -> None:
    """Also inside an optimizer's talk and inside a gate; nothing is played or counted twice."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tuner(whole, model).train()
    killed = tuner(cut, model)

    def hook(place: str) -> None:
        if place == where and killed.run.step == step - 1:
            raise Cut

    killed.hook = hook  # type: ignore[method-assign]
    with pytest.raises(Cut):
        killed.train()
    tuner(cut, model, resume=True).train()
    assert facts(cut) == facts(whole)
    again = facts(cut)
    tuner(cut, model, resume=True).train()  # nothing is left to do
    assert facts(cut)["stored"] == again["stored"] and facts(cut)["eval"] == again["eval"]


def test_a_stop_inside_a_step_leaves_memory_as_it_was_before_it(
    model: Path, tmp_path: Path
) -> None:
    made = tuner(tmp_path / "run", model)

    def hook(place: str) -> None:
        if place == "remembered" and made.run.step == 1:
            made.run.stop.asked = True
            made.run.rollouts.play(made.spec.val_tasks, n=2)  # notices it

    made.hook = hook  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        made.train()
    saved = tmp_path / "run" / "checkpoints" / "step-000001" / "trainer" / "parts" / "tuner"
    (file,) = saved.iterdir()
    assert json.loads(file.read_text(encoding="utf-8"))["scores"] == [1 / 3]


def test_a_resumed_run_does_not_report_an_evaluation_of_other_values(
    model: Path, tmp_path: Path
) -> None:
    """Adapters did not move, so they cannot tell one state from the other."""
    folder = tmp_path / "run"
    first = tuner(folder, model, max_steps=1).train()
    assert first["eval"]["after"]["accuracy"] == pytest.approx(1 / 3)
    more = tuner(folder, model, max_steps=3, resume=True).train()
    assert more["eval"]["after"]["accuracy"] == 1
    assert more["eval"]["before"]["accuracy"] == 0, (
        "measured with the state that the run began with"
    )


def test_evaluating_the_checkpoint_gives_what_the_run_says(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marlora.rollouts.checkpoints import team

    async def start(*args: Any, **settings: Any) -> ScriptedEngine:
        return ScriptedEngine(said)

    monkeypatch.setattr(team, "start_engine", start)
    folder = tmp_path / "run"
    summary = tuner(folder, model, seed=3).train()
    out = tmp_path / "eval"
    argv = ["eval", str(folder / "checkpoints" / "step-000004"), "--trust_checkpoint"]
    assert main([*argv, "--output", str(out)]) in (0, None)
    result = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    assert result["seed"] == 3, "what a system draws is drawn as the run did"
    for when in ("before", "after"):
        assert result["eval"][when]["accuracy"] == summary["eval"][when]["accuracy"]


# the budget


def tokens_of(folder: Path, *kinds: str) -> int:
    used = [u for e in Store(folder / "episodes") if e.kind in kinds for u in e.usage.values()]
    return sum(u.prompt_tokens + u.sampled_tokens for u in used)


@pytest.mark.parametrize("limit", [60, 150, 333, 500])
def test_a_budget_is_never_exceeded_and_the_run_ends_whole(
    limit: int, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    summary = tuner(folder, model, budget={"tokens": limit}).train()
    spent = summary["budget"]
    assert spent["limit"] == {"tokens": limit} and spent["spent"]["tokens"] <= limit
    assert summary["done"] == "the budget is spent" and "budget.tokens" in spent["stopped"]
    assert summary["eval"]["after"]["accuracy"] is not None, "held-out tasks are no learning"
    assert spent["spent"]["tokens"] == tokens_of(folder, "trial", "aside", "train") + sum(
        row["prompt_tokens"] + row["sampled_tokens"] for row in unstored(folder)
    )
    assert "the budget is spent" in (folder / "report.html").read_text(encoding="utf-8")


def unstored(folder: Path) -> list[dict[str, Any]]:
    """Calls of episodes that came to nothing, as the last checkpoint keeps them."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    state = json.loads((newest / "trainer" / "state.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = state["ledger"]["unstored"]
    return [row for row in rows if row["kind"] != "eval"]


def test_a_run_whose_budget_is_raised_goes_on_and_comes_to_what_it_would_have(
    model: Path, tmp_path: Path
) -> None:
    whole, raised = tmp_path / "whole", tmp_path / "raised"
    tuner(whole, model).train()
    first = tuner(raised, model, budget={"tokens": 200}).train()
    assert first["steps"] < 4
    same = tuner(raised, model, budget={"tokens": 200}, resume=True).train()
    assert same["steps"] == first["steps"] and same["done"] == "the budget is spent"
    more = tuner(raised, model, budget={"tokens": 5000}, resume=True).train()
    expected = json.loads((whole / "summary.json").read_text(encoding="utf-8"))
    for key in ("eval", "state", "done", "steps"):
        assert more[key] == expected[key]


def test_a_budget_that_is_too_small_for_the_first_call_says_so(model: Path, tmp_path: Path) -> None:
    summary = tuner(tmp_path / "run", model, budget={"tokens": 5}).train()
    assert summary["steps"] == 0 and summary["budget"]["spent"]["tokens"] == 0
    assert "the next call (aside, agent 'writer')" in summary["budget"]["stopped"]


# how a run begins and ends


def test_a_run_may_begin_with_values_and_with_a_whole_checkpoint(
    model: Path, tmp_path: Path
) -> None:
    first = tuner(tmp_path / "first", model, values={"solver.prompt": "say 2"}, max_steps=1)
    summary = first.train()
    assert summary["eval"]["before"]["accuracy"] == pytest.approx(2 / 3)
    assert summary["eval"]["after"]["accuracy"] == pytest.approx(2 / 3), "say 1 was no better"
    learnt = tuner(tmp_path / "learnt", model).train()
    assert learnt["eval"]["after"]["accuracy"] == 1
    checkpoint = tmp_path / "learnt" / "checkpoints" / "step-000004"
    second = tuner(tmp_path / "second", model, init=str(checkpoint), max_steps=1).train()
    assert second["eval"]["before"]["accuracy"] == 1, "before is the state that the run began with"
    assert second["state"]["values"]["solver.prompt"]["sha256_before"]


class Restless(Tuner):
    """Adopts whatever the helper proposes."""

    def step(self, step: int) -> StepResult:
        result = super().step(step)
        value = json.loads(json.dumps(PROMPTS[step - 1]))
        return StepResult(
            result.metrics, state=self.run.state.with_values({"solver.prompt": value})
        )


@pytest.mark.parametrize(("keep", "accuracy"), [("last", 2 / 3), ("best", 1.0)])
def test_the_state_kept_is_the_last_or_the_best_on_validation_tasks(
    keep: str, accuracy: float, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    made = tuner(folder, model, keep=keep, eval_every=1, cls=Restless)
    summary = made.train()
    assert summary["eval"]["after"]["accuracy"] == pytest.approx(accuracy)
    values = folder / "checkpoints" / "step-000004" / "values" / "values.json"
    kept = json.loads(values.read_text(encoding="utf-8"))["solver.prompt"]
    assert kept == {"last": "say 2", "best": "say 3"}[keep]
    again = tuner(folder, model, keep=keep, eval_every=1, cls=Restless, resume=True).train()
    assert again["eval"] == summary["eval"] and again["state"] == summary["state"]


# bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"values": {"solver.promt": "x"}}, "values.solver.promt: no such param; did you mean"),
        ({"values": {"solver.prompt": 3}}, "values.solver.prompt: expected a text, got 3"),
        ({"values": {"solver.policy": "nobody"}}, "values.solver.policy: no policy 'nobody'"),
        ({"helpers": {"solver": {}}}, "helpers.solver: the team has an agent"),
        ({"helpers": {"writer": {"modell": "x"}}}, "helpers.writer.modell: unknown field"),
        ({"helpers": {}}, "helpers.writer: missing"),
        ({"budget": {"token": 3}}, "budget.token"),
        ({"budget": {"tokens": 0}}, "budget.tokens"),
        ({"budget": {"cost": 1}}, "budget.cost: no policy has a price"),
        ({"keep": "best"}, "keep: best is chosen on validation tasks"),
        ({"num_val_tasks": 8}, "num_val_tasks: 8 of 8 training tasks leave none"),
        ({"policies": {"sovler": {}}}, "policies.sovler: no agent speaks with it"),
    ],
)
def test_settings_that_cannot_work_are_one_line(
    settings: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError) as refused:
        tuner(tmp_path / "run", model, **settings).train()
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_proposed_value_that_no_param_takes_loses_nothing(model: Path, tmp_path: Path) -> None:
    class Wrong(Tuner):
        def step(self, step: int) -> StepResult:
            result = super().step(step)
            bad = self.run.state.with_values({"solver.demos": "no list"})
            return result if step == 1 else StepResult(result.metrics, state=bad)

    folder = tmp_path / "run"
    with pytest.raises(RunError, match=r"step 2: the proposed state cannot be: .*solver\.demos"):
        tuner(folder, model, cls=Wrong).train()
    assert (folder / "checkpoints" / "step-000001" / "manifest.json").is_file()


def test_a_checkpoint_whose_values_name_an_agent_that_is_gone(model: Path, tmp_path: Path) -> None:
    tuner(tmp_path / "run", model, max_steps=1).train()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    with pytest.raises(SettingError, match=r"values\.solver\.prompt: no such param"):
        tuner(tmp_path / "other", model, init=str(checkpoint), system=Chain(["other"]), policies={})
