"""Whole runs whose reward is a judge: learnt from, killed, evaluated from the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.types import SettingError
from marlora.recipes.cli.main import main
from marlora.rollouts.checkpoints import team
from marlora.rollouts.checkpoints.needs import needed_flags
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.rewards.helpers import asked_helpers
from marlora.rollouts.types import Episode
from marlora.trainers.config import RunConfig
from marlora.trainers.loop.step_result import StepResult
from marlora.trainers.trainer import Trainer
from tests.trainers.outside import Outside

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


def test_a_killed_run_comes_to_the_same_and_asks_nothing_twice(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    collector(whole, model).train()
    killed = collector(cut, model)

    def hook() -> None:
        if killed.run.step == 1:
            raise Cut

    killed.hook = hook  # type: ignore[method-assign]
    with pytest.raises(Cut):
        killed.train()
    capsys.readouterr()
    collector(cut, model, resume=True).train()
    assert facts(cut) == facts(whole)
    (line,) = (text for text in capsys.readouterr().err.splitlines() if "step 2/2" in text)
    assert " in 2 steps" in line, "the trend goes on from what the killed run had written"


def test_a_budget_holds_for_the_judge_too(model: Path, tmp_path: Path) -> None:
    summary = collector(tmp_path / "run", model, budget={"calls": 5}).train()
    assert summary["budget"]["spent"]["calls"] == 5
    assert summary["done"] == "the budget is spent"


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The bases for which the command line starts an engine, in order; scripted ones."""
    started = list[str]()

    async def start(path: str, *args: Any, **settings: Any) -> ScriptedEngine:
        started.append(path)
        return ScriptedEngine(said)

    monkeypatch.setattr(team, "start_engine", start)
    return started


def evaluated(run: Path, folder: Path, *flags: str) -> dict[str, Any]:
    """What `marlora eval` says of a run's last checkpoint."""
    checkpoint = str(run / "checkpoints" / "step-000002")
    main(["eval", checkpoint, "--output", str(folder), *flags])
    result: dict[str, Any] = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    return result


def system_json(run: Path) -> dict[str, Any]:
    path = run / "checkpoints" / "step-000002" / "system.json"
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def test_its_checkpoint_remembers_the_judge_and_its_talks_are_kept(
    model: Path, tmp_path: Path, engines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = collector(tmp_path / "run", model).train()
    assert system_json(tmp_path / "run")["helpers"] == {"critic": {"prompt": "You judge."}}
    tasks = ["--trust_checkpoint"]  # of the task set, which is the tests'
    result = evaluated(tmp_path / "run", tmp_path / "eval", *tasks)
    assert result["metric"] == "critic" and len(engines) == 1
    (measured,) = result["sets"].values()
    row = measured["contestants"]["base team"]
    assert row["accuracy"] == summary["eval"]["after"]["accuracy"] > 0
    assert row["cost"]["calls"] == 1, "a judge's calls are no cost of the team"
    (store,) = (path for path in (tmp_path / "eval").iterdir() if path.is_dir())
    kept = list(Store(store))
    talks = [episode for episode in kept if episode.follows]
    assert len(talks) * 2 == len(kept) and all(t.parent == t.follows for t in talks)

    def silent(*_: Any) -> str:
        raise AssertionError("all of this was asked before")

    monkeypatch.setattr(ScriptedEngine, "generate", silent)
    assert evaluated(tmp_path / "run", tmp_path / "eval", *tasks)["sets"] == result["sets"]


def test_a_judge_on_another_base_is_served_where_it_is_asked(
    model: Path, tmp_path: Path, engines: list[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "more.safetensors").write_bytes(b"")  # other files: another base
    run = tmp_path / "run"
    collector(run, model, helpers={"critic": {"base": str(other)}}).train()
    assert system_json(run)["helpers"] == {"critic": {"base": str(other)}}
    assert evaluated(run, tmp_path / "eval", "--trust_checkpoint")["metric"] == "critic"
    assert sorted(engines) == sorted([str(model), str(other)])
    engines.clear()
    evaluated(run, tmp_path / "exact", "--trust_checkpoint", "--rewards", "exact")
    assert engines == [str(model)]


def test_an_outside_judge_is_asked_with_consent_and_its_key_stays_outside(
    model: Path,
    tmp_path: Path,
    engines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CRITIC_KEY", "sk-secret-0123456789")
    run, tasks = tmp_path / "run", ["--tasks", "tests.trainers.state_tasks:digits"]
    with Outside(lambda body: "<SCORE>7</SCORE>") as outside:
        spec = {"url": outside.url, "base": "m", "key_env": "CRITIC_KEY"}
        collector(run, model, helpers={"critic": spec}).train()
        asked = len(outside.bodies)
        assert system_json(run)["helpers"] == {"critic": spec} and asked
        assert "sk-secret" not in json.dumps(system_json(run))
        assert needed_flags(system_json(run)) == ["--trust_checkpoint"]
        with pytest.raises(SystemExit):
            evaluated(run, tmp_path / "eval", *tasks)
        said_no = capsys.readouterr().err
        assert "as critic with the key in CRITIC_KEY" in said_no and "--trust_che" in said_no
        assert len(outside.bodies) == asked
        result = evaluated(run, tmp_path / "eval", "--trust_checkpoint")
    (measured,) = result["sets"].values()
    assert measured["contestants"]["base team"]["accuracy"] == pytest.approx(0.7)


def test_a_checkpoint_that_does_not_name_its_judge(
    model: Path, tmp_path: Path, engines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As 0.1 wrote it. Another reward can stand in."""
    run = tmp_path / "run"
    collector(run, model).train()
    data = system_json(run)
    del data["helpers"]
    checkpoint = run / "checkpoints" / "step-000002"
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "system.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SystemExit):
        evaluated(run, tmp_path / "eval", "--trust_checkpoint")
    assert "--rewards 'judge(URL, MODEL)'" in capsys.readouterr().err
    result = evaluated(run, tmp_path / "eval", "--trust_checkpoint", "--rewards", "exact")
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
    assert asked_helpers(made.spec.rewards) == {}, "its name says whom it asks"
