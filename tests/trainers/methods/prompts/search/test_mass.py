"""MASS on the scripted team of its method sheet: stages, influence, the topology that is chosen, what
its control does not find, the gate, and what becomes of a run that is cut off."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.programs.building_blocks import BuildingBlocks
from marlora.agents.types import Sampling, SettingError
from marlora.rollouts.engines.base import EngineError, ModelRef
from marlora.rollouts.engines.scripted import Fault, ScriptedEngine
from marlora.trainers.methods.prompts.search.mass import MASSConfig, MASSTrainer
from marlora.trainers.methods.prompts.search.mipro import MIPROTrainer
from tests.trainers.methods.prompts.search.mass_run import OPTIMIZER, team, trainer, useless
from tests.trainers.methods.prompts.search.search_runs import (
    end,
    evaluated,
    on_two_ranks,
    summary_of,
)
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")
STAGES = ["predictor", "reflect", "debate", "aggregate", "topology", "workflow"]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> MASSTrainer:
    """A run that nothing cut off."""
    made = trainer(tmp_path_factory.mktemp("whole") / "run", model)
    made.train()
    return made


def test_the_stages_come_in_order_and_search_prompts_once_each(whole: MASSTrainer) -> None:
    """1 + blocks + 1 calls of the prompt optimizer."""
    assert [row["mass"]["stage"] for row in rows(whole.args.folder)] == STAGES
    asked = whole.memory["optimized"]
    assert list(asked) == [*STAGES[:4], "workflow"] and len(asked) == 1 + 3 + 1
    about = [e.task.id for e in whole.run.rollouts.store.read(kind="aside")]
    agents = [re.sub(r"/\d+$", "", name).removeprefix("instruction/") for name in about]
    spoken = list(dict.fromkeys(agents))
    assert spoken == ["p", "r", "d", "g"], "a block's search asks for its own agent alone"


def test_influence_is_what_a_block_does_for_the_score(whole: MASSTrainer) -> None:
    """Reflection repairs half of the errors, debate and a vote of equal answers none."""
    scores, influence = whole.memory["scores"], whole.memory["influence"]
    assert scores["predictor"] < scores["reflect"] and scores["debate"] == scores["predictor"]
    assert influence["reflect"] == pytest.approx(scores["reflect"] / scores["predictor"])
    assert influence["debate"] == influence["aggregate"] == 1.0
    chances = whole.memory["draws"]["chances"]
    assert chances["reflect"] > 0.9 and sum(chances.values()) == pytest.approx(1.0)
    assert whole.memory["draws"]["space"] == 125


def test_the_best_topology_is_in_force_with_the_prompts_that_were_found(whole: MASSTrainer) -> None:
    summary = summary_of(whole)
    tried = summary["mass"]["topologies"]
    assert len(tried) == 4 and tried[0]["agents"] == 1, "the predictor alone, and three drawn"
    best = max(each["score"] for each in tried)
    fewest = min(each["agents"] for each in tried if each["score"] == best)
    values = whole.run.values
    chosen = {name: values[name] for name in whole.system.blocks}
    (found,) = [t for t in tried if t["agents"] == fewest and t["score"] == best]
    assert chosen == {name: found["topology"][name] for name in chosen}
    assert chosen["reflect"] >= 1 and chosen["debate"] == 0 and chosen["aggregate"] == 1
    assert values["p.prompt"] == "p: way 1" and values["r.prompt"] == "r: way 2"
    accuracy = {when: summary["eval"][when]["accuracy"] for when in ("before", "after")}
    assert accuracy["before"] < 0.4 < 0.7 < accuracy["after"]
    report = (whole.args.folder / "report.html").read_text(encoding="utf-8")
    assert "topologies" in report


def test_the_predictor_stays_as_it_was_found_while_blocks_are_searched(whole: MASSTrainer) -> None:
    """Trials of stage 1 are of the least team that has the block."""
    by_shape: dict[str, set[str]] = {}
    for episode in whole.run.rollouts.store.read(kind="trial"):
        values = episode.state.values
        shape = str({name: values[name] for name in ("reflect", "debate", "aggregate")})
        by_shape.setdefault(shape, set()).add(values.get("p.prompt", "p: go"))
    alone, debate = (str({"reflect": 0, "debate": n, "aggregate": 1}) for n in (0, 1))
    assert len(by_shape[alone]) > 1 and by_shape[debate] == {"p: way 1"}
    assert by_shape[str({"reflect": 0, "debate": 0, "aggregate": 3})] == {"p: way 1"}


@pytest.mark.slow
def test_where_reflection_repairs_nothing_the_predictor_stays_alone(
    model: Path, tmp_path: Path, whole: MASSTrainer
) -> None:
    """The control: its feedback is of no use, so no block has influence."""
    made = trainer(tmp_path / "run", model, say=useless)
    summary = made.train()
    assert set(made.memory["influence"].values()) == {1.0}
    assert made.run.values["reflect"] == 0 and made.run.values["aggregate"] == 1
    assert summary["eval"]["after"]["accuracy"] < summary_of(whole)["eval"]["after"]["accuracy"]


def never(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """A predictor that is right only where it reflects."""
    said = team(prompt, ref, sampling, k)
    alone = prompt.startswith("<|system|>p:") and "<FEEDBACK>" not in prompt
    return "no" if alone else said


@pytest.mark.slow
def test_a_predictor_that_solves_nothing_still_has_an_influence_to_divide_by(
    model: Path, tmp_path: Path
) -> None:
    made = trainer(tmp_path / "run", model, say=never, blocks=["reflect"], num_topologies=2)
    made.train()
    scores = made.memory["scores"]
    assert scores["predictor"] == 0 < scores["reflect"]
    assert made.memory["influence"]["reflect"] == pytest.approx(scores["reflect"] / (0.5 / 40))
    assert made.run.values["reflect"] >= 1


@pytest.mark.slow
def test_stage_three_counts_only_if_the_team_is_better(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimizer whose last result is worse: the team stays as stage 2 left it."""
    own = MIPROTrainer.all_steps

    def worse(self: MIPROTrainer) -> Any:
        state = own(self) or self.start
        last = len(self.modules) > 1
        return state.with_values({"p.prompt": "p: way 3"}) if last else state

    monkeypatch.setattr(MIPROTrainer, "all_steps", worse)
    made = trainer(tmp_path / "run", model, blocks=["reflect"], num_topologies=2)
    made.train()
    last = rows(tmp_path / "run")[-1]["mass"]
    assert not last["accepted"] and last["score"] < last["before"]
    assert last["verdict"].startswith("not better") and made.run.values["p.prompt"] == "p: way 1"


@pytest.mark.parametrize("at", [pytest.param(0.2, marks=pytest.mark.slow), 0.6])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    at: float, whole: MASSTrainer, model: Path, tmp_path: Path
) -> None:
    """Inside a search of prompts."""
    calls = int(at * summary_of(whole)["budget"]["spent"]["calls"])
    engine = ScriptedEngine(
        team, context=16_384, faults={calls: Fault("raise", error=EngineError("gone"))}
    )
    with pytest.raises(EngineError):
        trainer(tmp_path / "run", model, engine=engine).train()
    again = trainer(tmp_path / "run", model, resume=True)
    again.train()
    assert end(again) == end(whole)
    ids = [sorted(e.id for e in made.run.rollouts.store) for made in (again, whole)]
    assert ids[0] == ids[1], "nothing is played or asked twice"


@pytest.mark.slow
@pytest.mark.process
def test_two_ranks_find_what_one_finds(whole: MASSTrainer, tmp_path: Path) -> None:
    first, second = on_two_ranks("tests.trainers.methods.prompts.search.mass_run", whole, tmp_path)
    assert first == second == end(whole)


@pytest.mark.slow
def test_the_budget_ends_the_search_with_what_it_has(
    whole: MASSTrainer, model: Path, tmp_path: Path
) -> None:
    limit = int(0.4 * summary_of(whole)["budget"]["spent"]["tokens"])
    made = trainer(tmp_path / "run", model, budget={"tokens": limit})
    summary = made.train()
    assert summary["budget"]["stopped"] and summary["budget"]["spent"]["tokens"] <= limit
    assert 0 < summary["steps"] < 6 and made.run.values["p.prompt"] == "p: way 1"


def test_a_checkpoint_is_worth_what_the_run_said(
    whole: MASSTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(whole, team, 6, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"helpers": {}}, "helpers.proposer: missing"),
        ({"blocks": ["summarize"]}, "blocks: the team has no summarizer"),
        ({"blocks": ["reflex"]}, "blocks: expected one of .*did you mean 'reflect'"),
        ({"blocks": ["debate", "debate"]}, "blocks: each once"),
        ({"blocks": ["reflect", "execute"]}, "blocks: execute runs public tests, and task"),
        ({"max_steps": 3}, "max_steps: a step is a stage and there are 6"),
        ({"prompt_optimizer": {"modules": ["p"]}}, "prompt_optimizer.modules: every stage"),
        ({"prompt_optimizer": {"num_trial": 3}}, "prompt_optimizer.num_trial: unknown setting"),
        ({"prompt_optimizer": {"seed": 3}}, "prompt_optimizer.seed: a setting of the whole run"),
        (
            {"prompt_optimizer": {**OPTIMIZER, "minibatch_size": 30}},
            "minibatch_size: 30 tasks of 20",
        ),
        ({"influence_temperature": 0}, "influence_temperature: expected a number above 0"),
        ({"activation": "random"}, "activation: expected one of influential, printed"),
    ],
)
def test_settings_that_cannot_work(
    changes: dict[str, Any], error: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=error):
        trainer(tmp_path / "run", model, **changes)


def test_other_systems_are_refused(model: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(output_dir=str(tmp_path / "run"), model=str(model))
    settings |= {"helpers": {"proposer": {}}, "tasks": "arithmetic", "rewards": ["exact"]}
    with pytest.raises(SettingError, match=r"system.class: Chain; MASS searches"):
        MASSTrainer(system=Chain(["a"]), args=MASSConfig(**settings))
    with pytest.raises(SettingError, match="blocks: the team is a predictor alone"):
        MASSTrainer(system=BuildingBlocks(["a"]), args=MASSConfig(**settings))
