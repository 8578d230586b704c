"""DyLAN's team optimisation: the agents it selects are the accurate ones, and they make the better
team; from importance that is dealt out by chance it selects any.

Seven agents are right in .2 to .9 of the items, evenly spaced, and nobody persuades anybody.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.patterns.temporal_network import members, team_value
from marlora.agents.seeds import derive_seed
from marlora.agents.testing import fake_team
from marlora.agents.types import Message, Sampling, SettingError, Task
from marlora.recipes.cli.main import main
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.types import Episode
from marlora.trainers.methods.selection.dylan import DyLANConfig, DyLANTrainer
from marlora.trainers.methods.selection.importance import Importance, importance
from tests.trainers.reading import rows
from tests.trainers.selectors import ACCURACY, dylan, items, network, rated

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = ModelRef("base", "")
NAMES = [*ACCURACY]
BEST, WORST = ["g3", "g4", "g5", "g6"], ["g0", "g1", "g2", "g3"]
FRESH = items("fresh", count=30)  # neither trained on nor held out


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of numbers without ties."""
    ranks = [[sorted(each).index(value) for value in each] for each in (a, b)]
    n = len(a)
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(*ranks, strict=True)) / (n * (n * n - 1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path) -> DyLANTrainer:
    """A finished run."""
    made = dylan(tmp_path_factory.mktemp("runs") / "run", model)
    made.train()
    return made


def accuracy(trained: DyLANTrainer, names: Sequence[str]) -> float:
    with trained.run as run:
        state = run.state.with_values({"team": team_value(names)})
        return run.evaluator.measure(state, FRESH).accuracy


def test_the_accurate_agents_are_the_team(trained: DyLANTrainer) -> None:
    row = rows(trained.args.folder)[-1]
    told = f"{row['importance']}, {row['team']}"
    assert rank_correlation([*row["importance"].values()], [*ACCURACY.values()]) > 0.8, told
    assert len({*members(row["team"])} & {*BEST}) >= 3 and "g6" in row["team"], told
    assert sum(row["importance"].values()) == pytest.approx(3.0), "every step of a trial sums to 1"
    assert (row["unread"], row["unmatched"]) == (0.0, 0.0)
    summary = summary_of(trained.args.folder)
    assert summary["done"].startswith("converged: 3 steps in a row chose")
    assert set(summary["state"]["values"]) == {"team"} and summary["tokens"]["trained"] == 0


def test_they_make_a_better_team_than_random_ones(trained: DyLANTrainer) -> None:
    """Selected, the mean of random teams of four (control), the least accurate four."""
    selected = accuracy(trained, members(trained.run.values["team"]))
    rng = random.Random(0)
    drawn = [accuracy(trained, rng.sample(NAMES, 4)) for _ in range(3)]
    lowest = accuracy(trained, WORST)
    told = f"selected {selected}, random {drawn}, lowest {lowest}"
    print(told)
    assert selected > fmean(drawn) + 0.08 and fmean(drawn) > lowest + 0.05, told


def test_an_early_end_saves_calls_at_equal_accuracy(trained: DyLANTrainer) -> None:
    with trained.run as run:
        early = run.rollouts.play(FRESH, greedy=True)
        whole = run.rollouts.play(FRESH, greedy=True, system=trained.trial)
    calls = [fmean(len(e.turns) for e in found) for found in (early, whole)]
    right = [fmean(e.reward("exact") for e in found) for found in (early, whole)]
    assert calls[1] == 12 and calls[0] < 9, calls
    assert abs(right[0] - right[1]) <= 0.1, right


class Shuffled(DyLANTrainer):
    """Importance that is dealt out among the agents by chance."""

    def importances(self, episodes: Sequence[Episode]) -> list[Importance]:
        return [
            dataclasses.replace(each, agents=dict(zip(names, each.agents.values(), strict=True)))
            for episode, each in zip(episodes, super().importances(episodes), strict=True)
            for names in [random.Random(f"{self.args.seed} {episode.id}").sample(NAMES, len(NAMES))]
        ]


def test_from_shuffled_importance_any_team_is_chosen(tmp_path: Path, model: Path) -> None:
    correlations = []
    for seed in range(3):
        made = dylan(
            tmp_path / f"{seed}", model, cls=Shuffled, seed=seed, max_steps=1, num_eval_tasks=1
        )
        made.train()
        found = rows(tmp_path / f"{seed}")[-1]["importance"]
        correlations.append(rank_correlation([found[name] for name in NAMES], [*ACCURACY.values()]))
    assert abs(fmean(correlations)) < 0.5 and min(correlations) < 0.35, correlations


def test_nothing_of_the_gold_answer_is_used(tmp_path: Path, model: Path) -> None:
    """Tasks whose answers are all wrong select the same team."""
    wrong = [dataclasses.replace(task, answer="E") for task in items()]
    found = []
    for tasks in (items(), wrong):
        folder = tmp_path / f"{len(found)}"
        settings = dict(output_dir=str(folder), model=str(model), max_steps=1, tasks_per_step=10)
        DyLANTrainer(
            system=network(),
            tasks=tasks,
            eval_tasks=items("eval", count=1),
            rewards=["exact"],
            engine=ScriptedEngine(rated),
            args=DyLANConfig(**settings),  # type: ignore[arg-type]
        ).train()
        found.append((rows(folder)[0]["importance"], rows(folder)[0]["team"]))
    assert found[0] == found[1]


# the ranker


def test_the_ranked_agents_are_more_often_right_than_two_by_chance() -> None:
    """A judge that knows picks two of the accurate half; the authors' code lets two go on whose
    places in a shuffled loop have the ranker's numbers, which are any two."""

    def answer(agent: str, messages: Sequence[Message]) -> str:
        prompt = f"<|system|>{agent}<|end|><|user|>{messages[-1].content}<|end|>"
        return rated(prompt, BASE, Sampling(seed=0), 0)

    system = network(ranker="judge", consensus=1.0)
    rng, right, chance = random.Random(0), [], []
    for task in items(count=60):
        team = fake_team(system.specs, answer)
        asyncio.run(system.run(task.public(), team))
        last = {turn.agent: turn.text[0] == task.answer for turn in team.turns[15:]}
        before = {turn.agent: turn.text[0] == task.answer for turn in team.turns[7:14]}
        assert len(last) == 2 and team.turns[14].agent == "judge"
        right.append(fmean(last.values()))
        chance.append(fmean(rng.sample([*before.values()], 2)))
    assert fmean(right) > 0.95 and fmean(chance) < 0.7, (fmean(right), fmean(chance))


# resume and checkpoint


class Killed(Exception):
    """The process is gone."""


def facts(folder: Path) -> dict[str, Any]:
    """What a run came to: everything but times."""
    summary = summary_of(folder)
    for found in summary["ledger"].values():
        for row in found.values():
            del row["seconds"]
    stored = sorted((e.id, e.output, e.rewards) for e in Store(folder / "episodes"))
    last = folder / "checkpoints" / f"step-{summary['steps']:06d}" / "trainer" / "parts"
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(last.rglob("*.json"))]
    timed = ("seconds", "proof")
    steps = [{k: v for k, v in row.items() if k not in timed} for row in rows(folder)]
    kept = ("eval", "ledger", "budget", "done", "state", "steps")
    return {**{k: summary[k] for k in kept}, "parts": parts, "stored": stored, "rows": steps}


@pytest.mark.parametrize("episode", [pytest.param(5, marks=pytest.mark.slow), 18])
def test_a_run_that_was_killed_inside_a_trial_goes_on(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, episode: int
) -> None:
    settings: dict[str, Any] = dict(num_eval_tasks=4, tasks_per_step=5, patience=2, max_steps=4)
    dylan(tmp_path / "whole", model, **settings).train()
    kept, extend = [0], Store.extend

    def count(self: Store, episodes: Any, **how: Any) -> None:
        kept[0] += 1
        if kept[0] > 4 + episode:
            raise Killed
        extend(self, episodes, **how)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "extend", count)
        with pytest.raises(Killed):
            dylan(tmp_path / "cut", model, **settings).train()
    dylan(tmp_path / "cut", model, resume=True, **settings).train()
    assert facts(tmp_path / "cut") == facts(tmp_path / "whole")


def test_evaluating_the_checkpoint_gives_what_the_run_says(
    tmp_path: Path, trained: DyLANTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marlora.rollouts.checkpoints import team

    async def start(*args: Any, **settings: Any) -> ScriptedEngine:
        return ScriptedEngine(rated)

    monkeypatch.setattr(team, "start_engine", start)
    summary = summary_of(trained.args.folder)
    last = trained.args.folder / "checkpoints" / f"step-{summary['steps']:06d}"
    argv = ["eval", str(last), "--trust_checkpoint", "--output", str(tmp_path / "eval")]
    assert main(argv) in (0, None)
    found = json.loads((tmp_path / "eval" / "eval.json").read_text(encoding="utf-8"))["eval"]
    for when in ("before", "after"):
        assert found[when]["accuracy"] == summary["eval"][when]["accuracy"]


# settings


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"team_size": 7}, "team_size: 7 of 7 agents leaves none out"),
        ({"team_size": 1}, "team_size: expected at least 2"),
        ({"patience": 0}, "patience: expected at least 1"),
        ({"network": {"steps": 1}}, "system.steps: agents rate one another from step 2 on"),
        ({"values": {"team": "g0, x"}}, "values.team: 'x' is no agent that answers"),
        ({"policies": {"base": {"trainable": True}}}, "policies.base.trainable"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, model: Path, changes: Mapping[str, Any], problem: str
) -> None:
    with pytest.raises(SettingError, match=problem):
        dylan(tmp_path / "run", model, **changes)


def test_another_system_is_refused(tmp_path: Path, model: Path) -> None:
    settings = dict(output_dir=str(tmp_path / "run"), model=str(model))
    with pytest.raises(SettingError, match=r"of a .*TemporalNetwork, got Chain"):
        DyLANTrainer(system=Chain(["a", "b"]), args=DyLANConfig(**settings))  # type: ignore[arg-type]


# the sheet's reference run


def stubs(task: Task, seed: int, names: Sequence[str] = NAMES) -> Episode:
    """A trial of the stub agents alone, over four steps."""

    def answer(agent: str, messages: Sequence[Message]) -> str:
        prompt = f"<|system|>{agent}<|end|><|user|>{messages[-1].content}<|end|>"
        return rated(prompt, BASE, Sampling(seed=derive_seed(seed, prompt)), 0)

    system = network(steps=4, consensus=1.0)
    team = fake_team(system.specs, answer, {"team": team_value(names)}, seed=seed)
    output = asyncio.run(system.run(task.public(), team))
    rewards = tuple(team.rewards)
    return Episode(task.id, "g", task, turns=team.turns, rewards=rewards, output=output.text)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_over_ten_seeds_importance_ranks_agents_as_their_accuracy_does() -> None:
    """The sheet's reference: rank correlation .993 in the mean, .929 at worst; selected .907,
    random .718, lowest .451. 100 items, four steps, plain functions."""
    correlations, selected, drawn, lowest = [], [], [], []
    for seed in range(10):
        tasks = items(f"seed {seed}")
        sums = dict.fromkeys(NAMES, 0.0)
        for task in tasks:
            for name, value in importance(stubs(task, seed)).agents.items():
                sums[name] += value
        rng, chosen = random.Random(seed), sorted(sums, key=lambda name: -sums[name])[:4]
        correlations.append(rank_correlation([*sums.values()], [*ACCURACY.values()]))

        teams = [chosen, WORST, *(rng.sample(NAMES, 4) for _ in range(3))]
        scores = [fmean(stubs(t, seed, team).output == t.answer for t in tasks) for team in teams]
        selected.append(scores[0])
        lowest.append(scores[1])
        drawn.append(fmean(scores[2:]))
    told = f"correlations {correlations}, {fmean(selected)}, {fmean(drawn)}, {fmean(lowest)}"
    print(told)
    assert fmean(correlations) > 0.95 and min(correlations) > 0.85, told
    assert fmean(selected) > 0.85, told
    assert fmean(selected) > fmean(drawn) + 0.1 and fmean(drawn) > fmean(lowest) + 0.1, told
