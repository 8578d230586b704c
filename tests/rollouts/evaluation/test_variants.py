"""Who is measured: rungs, ablations, cross-play, and what a checkpoint was trained on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from marlora.agents.patterns.vote import Vote
from marlora.agents.state import TeamState
from marlora.agents.types import BASE, AgentSpec, SettingError, Task
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.episodes.runner import EpisodeRunner
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.evaluation.variants import (
    ablations,
    cross_play,
    ladder,
    trained_name,
    trained_on,
    trained_team,
)
from marlora.rollouts.rewards.builtin import correct
from marlora.rollouts.types import Episode


def team(
    *agents: str | AgentSpec,
    values: dict[str, Any] | None = None,
    origin: dict[str, Any] | None = None,
    mark: str = "0",
    base: str = "b",
    trained: bool = True,
) -> Any:
    """What `LoadedTeam` gives of a checkpoint whose every policy is `trained`, or none; `origin`:
    the values that its run began with."""
    system = Vote(agents)
    policies = list(dict.fromkeys(spec.policy for spec in system.specs))
    engine = ScriptedEngine(lambda prompt, ref, sampling, k: "1")
    speakers = {name: EngineCompleter(engine, engine.tokens, name) for name in (*policies, BASE)}
    data = {
        "adapters": {p: {"sha256": mark * 64, "trained": True} for p in policies},
        "bases": {base: {"files": f"files of {base}", "policies": policies}},
        "tasks": {"name": "own"},
    }
    versions = {p: f"{p}-{mark}" for p in policies if trained}
    state = TeamState(versions, values or {})
    return SimpleNamespace(
        data=data,
        rollouts=EpisodeRunner(system, speakers, [correct], state=state),
        versions=versions,
        state=state,
        origin=origin or {},
        tasks=lambda split: [Task("t", f"{split} prompt")],
    )


def names(found: list[Any]) -> list[str]:
    return [each.name for each in found]


def test_the_ladder_has_the_rungs_that_differ() -> None:
    assert names(ladder(team("a", "b"))) == ["single agent", "base team"]
    told = team(
        AgentSpec("a", prompt="Add."), "b", values={"b.prompt": "Think.", "decision": {"x": 1}}
    )
    single, without, base, found = ladder(told)
    assert names([single, without, base, found]) == [
        "single agent",
        "team without prompts",
        "base team",
        "values-only team",
    ]
    assert [spec.policy for spec in single.rollouts.system.specs] == [BASE]
    assert single.state == TeamState()
    assert [spec.prompt for spec in without.rollouts.system.specs] == ["", ""]
    assert [spec.prompt for spec in base.rollouts.system.specs] == ["Add.", ""]
    assert without.state == base.state == TeamState({}, {})
    assert found.state == TeamState({}, told.state.values)
    assert len({each.key(0, True) for each in (single, without, base, found)}) == 4


PROGRAM = "async def run(task): return await ask(task)"


def test_every_rung_below_has_the_values_that_the_run_began_with() -> None:
    """A program, a prompt and demonstrations were found; the run began with others."""
    origin = {"program": "start", "a.prompt": "Add.", "a.demos": [], "edge": {"x": 0.0}}
    values = {"program": PROGRAM, "a.prompt": "Think.", "b.demos": ["x"], "edge": {"x": 2.0}}
    told = team(AgentSpec("a", prompt="Own."), "b", values=values, origin=origin)
    rungs = {each.name: each for each in ladder(told)}
    assert rungs["single agent"].state == TeamState()
    assert rungs["base team"].state == TeamState({}, origin)
    assert rungs["team without prompts"].state == TeamState(
        {}, {"program": "start", "edge": {"x": 0.0}}
    ), "neither the program that was found, nor a prompt"
    assert rungs["values-only team"].state == TeamState({}, values)
    trained = trained_team(told, told.versions)
    assert trained.state == TeamState({"a": "a-0", "b": "b-0"}, values)
    assert len({each.key(0, True) for each in (*rungs.values(), trained)}) == 5


def test_where_values_alone_were_learnt_the_trained_team_is_no_rung() -> None:
    told = team("a", "b", values={"program": PROGRAM}, origin={"program": "start"}, trained=False)
    trained = trained_team(told, told.versions)
    assert trained.name == "trained team" and trained.state == TeamState({}, {"program": PROGRAM})
    assert names(ladder(told)) == ["single agent", "base team"]
    base = ladder(told)[1]
    assert base.state == TeamState({}, {"program": "start"})
    assert base.key(0, True) != trained.key(0, True)
    prompted = team("a", "b", origin={"a.prompt": "Add.", "program": "start"}, trained=False)
    assert names(ladder(prompted)) == ["single agent", "team without prompts", "base team"]
    assert ladder(prompted)[1].state == TeamState({}, {"program": "start"})
    same = team("a", "b", values={"program": PROGRAM}, origin={"program": PROGRAM}, trained=False)
    assert ladder(same)[1].key(0, True) == trained.key(0, True), "nothing was learnt"


def test_whose_answers_they_are_is_what_the_values_say() -> None:
    """Adapter `a` is on, `b` is off: with the mapping crossed, the other agent speaks with it."""
    one, crossed = team("a", "b"), team("a", "b", values={"a.policy": "b", "b.policy": "a"})
    both = team("a", "b", values={"b.policy": "a"})
    keys = {trained_team(each, {"a": "a-0"}).key(0, True) for each in (one, crossed, both)}
    assert len(keys) == 3


def test_a_trained_team_says_whether_its_agents_share() -> None:
    own, shared = team("a", "b"), team(AgentSpec("a", policy="p"), AgentSpec("b", policy="p"))
    assert trained_name(own, own.versions) == "trained team, per-agent LoRA"
    assert trained_name(shared, shared.versions) == "trained team, shared-policy LoRA"
    assert (
        trained_name(own, {"a": "a-0"}) == "adapters: a"
        and trained_name(own, {}) == "adapters: none"
    )
    assert trained_team(own, own.versions, "x: ").name == "x: trained team, per-agent LoRA"


def test_what_policies_are_called_makes_no_other_team() -> None:
    """Of a checkpoint with an adapter per agent and one with a shared adapter, the rungs below are
    the same teams."""
    own, shared = (
        team("a", "b", mark="1"),
        team(AgentSpec("a", policy="p"), AgentSpec("b", policy="p"), mark="2"),
    )
    for one, other in zip(ladder(own), ladder(shared), strict=True):
        assert one.key(0, True) == other.key(0, True), one.name
    mine, theirs = (trained_team(each, each.versions) for each in (own, shared))
    assert mine.key(0, True) != theirs.key(0, True)
    twin = team(AgentSpec("a", policy="p"), AgentSpec("b", policy="p"), mark="1")
    assert trained_team(twin, twin.versions).key(0, True) == mine.key(0, True), (
        "both agents speak with the same weights"
    )
    swapped = team(AgentSpec("a", policy="b"), AgentSpec("b", policy="a"), mark="1")
    assert trained_team(swapped, {"a": "a-1"}).key(0, True) != trained_team(own, {"a": "a-1"}).key(
        0, True
    )


def test_each_adapter_alone_and_all_but_each() -> None:
    two, three = team("a", "b"), team("a", "b", "c")
    assert names(ablations(two, two.versions)) == ["only a", "only b"], (
        "of two, all but one is the other alone"
    )
    found = ablations(three, three.versions)
    assert names(found) == ["only a", "only b", "only c", "all but a", "all but b", "all but c"]
    assert (
        found[3].state.versions == {"b": "b-0", "c": "c-0"} and ablations(three, {"a": "a-0"}) == []
    )


def test_cross_play_puts_every_adapter_into_the_other_team() -> None:
    found = cross_play({"x": team("a", "b", mark="1"), "y": team("a", "b", mark="2")})
    assert [(policy, guest, host) for policy, guest, host, _ in found] == [
        ("a", "x", "y"),
        ("a", "y", "x"),
    ]
    first = found[0][3]
    assert first.state.versions == {"a": "a-1", "b": "b-2"} and first.sha256 == {
        "a": "1" * 64,
        "b": "2" * 64,
    }
    assert len(cross_play({m: team("a", "b", "c", mark=m) for m in "12"})) == 6, (
        "of three policies each has a matrix"
    )
    for teams, words in (
        ({"x": team("a", "b")}, "at least two checkpoints"),
        ({"x": team("a"), "y": team("a")}, "at least two adapters"),
        ({"x": team("a", "b"), "y": team("a", "c")}, "y has adapters"),
        ({"x": team("a", "b"), "y": team("a", "b", base="other")}, "y has adapters"),
    ):
        with pytest.raises(SettingError, match=words):
            cross_play(teams)


def test_what_was_trained_on_is_looked_up_where_it_is_written(tmp_path: Path) -> None:
    def store(folder: Path, name: str) -> Path:
        with Store(folder) as found:
            found.append(Episode(f"train-1/{name}/0", f"train-1/{name}", Task(name, f"ask {name}")))
        return folder

    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    assert trained_on(checkpoint, team("a")) == (
        {"t": "train prompt"},
        ["the training split of own"],
    ), "no store: the set's own split"
    store(run / "episodes", "played")
    (run / "config.yaml").write_text(
        yaml.safe_dump({"episodes": str(store(tmp_path / "given" / "episodes", "given").parent)})
    )
    more = store(tmp_path / "more", "more")
    asked, where = trained_on(checkpoint, team("a"), [str(more)])
    assert (
        asked == {"played": "ask played", "given": "ask given", "more": "ask more"}
        and len(where) == 3
    )
    unknown = team("a")
    unknown.data["tasks"]["name"] = ""
    assert trained_on(tmp_path / "copy", unknown) == ({}, []), "nobody can say"
