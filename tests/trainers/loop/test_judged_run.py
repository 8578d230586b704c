"""Whole runs whose reward is a judge: learnt from, killed, evaluated from the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.types import SettingError
from marlora.recipes.cli.main import main
from marlora.recipes.launch.launch import reward_flags
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode
from marlora.trainers.config import RunConfig
from marlora.trainers.loop.step_result import StepResult
from marlora.trainers.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Cut(BaseException):
    """Stands for a kill."""


def said(prompt: str, ref: ModelRef, sampling: Any, k: int) -> str:
    """The team answers with the task's last digit; the critic likes even ones, and of 3 it says
    nothing that counts."""
    if "<ANSWER>" not in prompt:
        return next((c for c in reversed(prompt) if c.isdigit()), "0")
    digit = int(prompt.partition("<ANSWER>\n")[2][0])
    return "Score: 9" if digit == 3 else f"<SCORE>{0 if digit % 2 else 10}</SCORE>"


class Collector(Trainer[RunConfig]):
    """Collects, and notes the mean score."""

    Config = RunConfig
    hook: Callable[[], None] = staticmethod(lambda: None)

    def step(self, step: int) -> StepResult:
        episodes = self.run.rollouts.collect(step)
        self.hook()
        scores = [r.value for e in episodes for r in e.rewards if r.name == "critic"]
        return StepResult({"scored": len([s for s in scores if s == s])}, episodes=episodes)


def collector(folder: Path, model: Path, **changes: Any) -> Collector:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        policies={"solver": {"trainable": False}},
        helpers={"critic": {"prompt": "You judge."}},
        tasks="tests.trainers.state_tasks:digits",
        rewards=["judge(critic)"],
        max_steps=2,
        tasks_per_step=4,
        num_generations=1,
        max_completion_length=6,
        save_every=1,
    )
    args = RunConfig(**{**settings, **changes})
    return Collector(system=Chain(["solver"]), args=args, engine=ScriptedEngine(said))


def talks(folder: Path, kind: str = "aside") -> list[Episode]:
    return [e for e in Store(folder / "episodes") if e.kind == kind and e.parent]


def facts(folder: Path) -> Any:
    """What a run came to, without times."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for rows in summary["ledger"].values():
        for row in rows.values():
            del row["seconds"]
    stored = sorted((e.id, e.output) for e in Store(folder / "episodes"))
    return summary["eval"], summary["ledger"], summary["budget"], stored


def test_a_judge_is_served_recorded_and_metered(model: Path, tmp_path: Path) -> None:
    made = collector(tmp_path / "run", model)
    summary = made.train()
    assert reward_flags(made.spec.rewards) == ["--rewards", "correct"]
    rows = summary["ledger"]
    assert rows["train"]["solver"]["calls"] == 8 and rows["aside"]["critic"]["calls"] == 8
    assert rows["eval"]["critic"]["calls"] == rows["eval"]["solver"]["calls"] > 0
    assert len(talks(tmp_path / "run")) == 8
    played = {e.id: e for e in Store(tmp_path / "run" / "episodes") if e.kind == "train"}
    for talk in talks(tmp_path / "run"):
        (score,) = played[talk.follows].rewards
        digit = int(played[talk.follows].output or "")
        assert score.name == "critic" and (talk.output or "?") in score.text
        assert (score.value != score.value) == (digit == 3)
        assert digit == 3 or score.value == (0.0 if digit % 2 else 1.0)
    learning = sum(
        row["prompt_tokens"] + row["sampled_tokens"]
        for kind in ("train", "aside")
        for row in rows[kind].values()
    )
    assert summary["budget"]["spent"]["tokens"] == learning


def test_a_killed_run_comes_to_the_same_and_asks_nothing_twice(model: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    collector(whole, model).train()
    killed = collector(cut, model)

    def hook() -> None:
        if killed.run.step == 1:
            raise Cut

    killed.hook = hook  # type: ignore[method-assign]
    with pytest.raises(Cut):
        killed.train()
    collector(cut, model, resume=True).train()
    assert facts(cut) == facts(whole)


def test_a_budget_holds_for_the_judge_too(model: Path, tmp_path: Path) -> None:
    summary = collector(tmp_path / "run", model, budget={"calls": 5}).train()
    assert summary["budget"]["spent"]["calls"] == 5
    assert summary["done"] == "the budget is spent"


def test_its_checkpoint_is_evaluated_by_another_reward_or_an_outside_judge(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from marlora.rollouts.checkpoints import team

    async def start(*args: Any, **settings: Any) -> ScriptedEngine:
        return ScriptedEngine(said)

    monkeypatch.setattr(team, "start_engine", start)
    collector(tmp_path / "run", model).train()
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step-000002")
    argv = ["eval", checkpoint, "--trust_checkpoint", "--output", str(tmp_path / "eval")]
    with pytest.raises(SystemExit):
        main(argv)
    assert "--rewards 'judge(URL, MODEL)'" in capsys.readouterr().err
    main([*argv, "--rewards", "exact"])
    result = json.loads((tmp_path / "eval" / "eval.json").read_text(encoding="utf-8"))
    assert result["metric"] == "exact"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"helpers": {}}, r"reward judge\(critic\): no helper 'critic'.*Give its model"),
        ({"rewards": ["judge(critc)"]}, "did you mean 'critic'"),
        (
            {
                "rewards": ["judge(http://127.0.0.1:9/v1, m)"],
                "helpers": {"judge": {"prompt": "another"}},
            },
            "an agent, a policy or a helper is called 'judge'",
        ),
    ],
)
def test_a_judge_that_cannot_be_served(
    changes: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=message):
        collector(tmp_path / "run", model, **changes)


def test_an_outside_judge_is_a_helper_by_itself(model: Path, tmp_path: Path) -> None:
    made = collector(tmp_path / "run", model, rewards=["judge(http://127.0.0.1:9/v1, m)"])
    policy = made.spec.served_policies["judge"]
    assert (policy.url, policy.base) == ("http://127.0.0.1:9/v1", "m") and not policy.trainable
    assert reward_flags(made.spec.rewards) == []
    outside = {"critic": {"url": "http://127.0.0.1:9/v1", "base": "m", "key_env": "PATH"}}
    made = collector(tmp_path / "run", model, helpers=outside, rewards=["judge(critic)", "exact"])
    name = "judge(http://127.0.0.1:9/v1, m, PATH)"
    assert reward_flags(made.spec.rewards) == ["--rewards", name, "exact"]
