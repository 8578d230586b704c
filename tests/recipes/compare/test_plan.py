"""Plans: what is refused, and what the runs of an arm get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import AgentSpec, SettingError
from marlora.recipes.compare.arms import PlannedRun
from marlora.recipes.compare.comparison import claim
from marlora.recipes.compare.plan import ComparisonPlan, read_plan
from tests.recipes.compare.plans import SFT, plan_of, written


def plan(tmp_path: Path, **changes: Any) -> ComparisonPlan:
    return ComparisonPlan("p", plan_of(tmp_path, **changes))


def team(**changes: Any) -> dict[str, Any]:
    return {**plan_of(Path("x"))["team"], **changes}


def arm(**changes: Any) -> dict[str, Any]:
    return {"arms": {"sft": {**SFT, **changes}}}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"arm": {}}, "arm: unknown setting; did you mean 'arms'"),
    ({"arms": {}}, "arms: empty"),
    ({"arms": {"a/b": SFT}}, "arms.a/b: expected a name of letters"),
    ({"arms": {"a": {"recipe": "sft"}}}, "arms.a.recipe: no recipe 'sft'"),
    ({"arms": {"a": {"recipe": "nowhere.py"}}}, "arms.a.recipe: no file"),
    ({"arms": {"a": {**SFT, "seed": [1]}}}, "arms.a.seed: unknown setting; did you mean 'seeds'"),
    ({"arms": {"a": SFT, "b": {**SFT, "control_of": "c"}}}, "arms.b.control_of: no other arm 'c'"),
    ({"arms": {"a": {**SFT, "control_of": "a"}}}, "arms.a.control_of: no other arm 'a'"),
    (
        {"arms": {"a": {**SFT, "output_dir": "runs/x"}, "b": {**SFT, "output_dir": "runs/y/../x"}}},
        "arms.b: shares the output folder",
    ),
    (
        {
            "arms": {
                "a": {**SFT, "output_dir": "runs/x"},
                "b": {**SFT, "output_dir": "runs/x/seed-0"},
            }
        },
        "arms.b: shares the output folder",
    ),
    ({"arms": {"a": {**SFT, "compared_with": "b"}}}, "arms.a.compared_with: no other arm 'b'"),
    ({"seeds": [0, 1, 0]}, "seeds: 0 is listed twice"),
    ({"seeds": []}, "seeds: expected a list"),
    ({"seeds": [True]}, "seeds: expected whole numbers"),
    (arm(seeds=[2, 2]), "arms.sft.seeds: 2 is listed twice"),
    (arm(settings={"seed": 3}), "arms.sft.settings.seed: is the plan's"),
    (arm(settings={"num_eval_tasks": 3}), "arms.sft.settings.num_eval_tasks: is the team's"),
    (arm(settings={"episodes": "runs/x"}), "arms.sft.settings.episodes: is the plan's"),
    (arm(settings={"policies": {"first": {"base": "tiny"}}}), "policies.first.base: unknown"),
    (arm(settings={"agents": {"first": {"prompt": "x"}}}), "agents.first.prompt: unknown"),
    (arm(settings={"values": {"first.prompt": "x"}}), "settings.values: are the team's"),
    (arm(settings={"system": {"agents": ["a"]}}), "settings.system: expected the class"),
    ({"budget": {}}, "budget: missing"),
    ({"budget": {"tokens": 3}}, "budget.tokens: 3 is below one evaluation"),
    ({"budget": {"calls": 1}}, "budget.calls: 1 is below one evaluation"),
    ({"budget": {"token": 3000}}, "budget.token: unknown setting"),
    ({"team": team(tassks="x")}, "team.tassks: unknown setting; did you mean 'tasks'"),
    ({"team": team(output_dir="x")}, "team.output_dir: the plan sets it"),
    ({"team": team(num_eval_tasks=0)}, "num_eval_tasks: expected at least 1"),
    ({"team": team(num_val_tasks=0), "prompts": [{"first.prompt": "x"}]}, "prompts: the best one"),
    ({"noise_repeats": 1}, "noise_repeats: expected at least 2"),
    ({"headroom": {"n": 3}}, "headroom.n: unknown setting"),
    ({"headroom": {"model": {"adapter": {}}}}, "headroom.model: expected base or url"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=range(len(BAD)))
def test_bad_plans_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path / "bad.yaml", plan_of(tmp_path / "out", **changes))
    with pytest.raises(SettingError) as caught:
        read_plan(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_run_gets_the_settings_of_team_arm_and_plan(tmp_path: Path) -> None:
    policies = {"first": {"learning_rate": 0.1}, "pool": {"base": "tiny-first"}}
    settings = {
        "policies": {"first": {"trainable": False}},
        "helpers": {"writer": {}},
        "agents": {"last": {"policy": "first"}},
    }
    made = plan(tmp_path, team=team(policies=policies), **arm(settings=settings, seeds=[3, 5]))
    runs = list(made.runs())
    assert [run.folder.name for run in runs] == ["seed-3", "seed-5"]
    own = made.settings_of(runs[1])
    assert own["policies"] == {
        "first": {"learning_rate": 0.1, "trainable": False},
        "pool": {"base": "tiny-first"},
    }
    assert own["agents"] == {"last": {"policy": "first"}}
    assert own["helpers"] == {"writer": {}} and own["seed"] == 5 and own["resume"] is True
    assert own["budget"] == {"tokens": 10000} and own["tasks"] == made.team["tasks"]
    assert own["output_dir"] == str(tmp_path / "runs" / "sft" / "seed-5")


def test_an_arm_may_have_a_system_of_its_own(tmp_path: Path) -> None:
    """Its agents and values are its own, what is asked and measured stays the team's."""
    own = {
        "system": {"class": "marlora.agents.patterns.swarm:Swarm", "agents": ["a", "b"]},
        "agents": {"a": {"prompt": "x"}},
        "policies": {"b": {"base": "tiny-first", "trainable": False}},
    }
    agents = {"first": {"prompt": "first"}}
    of_team = team(agents=agents, values={"last.prompt": "y"}, policies={"pool": {"base": "tiny"}})
    arms = {"swarm": {**SFT, "settings": own}, "sft": SFT}
    made = plan(tmp_path, team=of_team, arms=arms)
    swarm, sft = (made.settings_of(run) for run in made.runs())
    assert swarm["system"] == own["system"] and swarm["agents"] == own["agents"]
    assert "values" not in swarm
    assert swarm["policies"] == {"pool": {"base": "tiny"}, **own["policies"]}
    assert swarm["tasks"] == sft["tasks"] and swarm["rewards"] == sft["rewards"]
    assert sft["agents"] == agents and sft["values"] == {"last.prompt": "y"}
    assert made.arms["swarm"].system.endswith("Swarm") and not made.arms["sft"].system


def test_the_team_as_it_is_trains_nothing(tmp_path: Path) -> None:
    made = plan(tmp_path, team=team(policies={"first": {"trainable": True}}))
    specs = made.config.policy_specs((AgentSpec("first", policy="first"),))
    assert not specs["first"].trainable
    assert made.settings_of(next(made.runs()))["policies"] == {"first": {"trainable": True}}


def test_runs_go_seed_by_seed(tmp_path: Path) -> None:
    arms = {"a": SFT, "b": {**SFT, "seeds": [1, 2]}}
    made = plan(tmp_path, seeds=[0, 1], arms=arms)
    order = [(run.arm.name, run.seed) for run in made.runs()]
    assert order == [("a", 0), ("a", 1), ("b", 1), ("b", 2)]
    assert PlannedRun(made.arms["b"], 2).name == "b, seed 2"


def test_a_folder_is_one_plans(tmp_path: Path) -> None:
    """More arms and seeds may come; another team or budget, or other settings of an arm, are another
    comparison."""
    claim(plan(tmp_path))
    claim(plan(tmp_path, seeds=[0, 1], arms={"sft": SFT, "more": SFT}))
    claim(plan(tmp_path))  # what `more` ran stays there
    for changes, message in (
        ({"team": team(num_eval_tasks=5)}, r"another team \(num_eval_tasks\)"),
        ({"seeds": [1, 0]}, r"whose first seed is 0.* list seed 0 first"),
        ({"budget": {"tokens": 20000}}, r"another budget \(tokens\)"),
        (arm(settings={**SFT["settings"], "max_steps": 3}), "arm 'sft' with another recipe"),
        ({"arms": {"more": {**SFT, "recipe": "grpo_team"}}}, "arm 'more' with another recipe"),
    ):
        with pytest.raises(SettingError, match=message):
            claim(plan(tmp_path, **changes))
