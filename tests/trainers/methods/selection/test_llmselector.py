"""LLMSelector's runs: the allocation that is found beats every single model and equals brute force,
on functions and on tiny models; from shuffled scores it does not.

The functions: locating A .95, B .5, C .6 and solving A .1, B .95, C .6; one model everywhere is
right in .095, .475 and .36, A that locates with B that solves in .9025.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import SettingError
from marlora.recipes.cli.main import main
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.store import Store
from marlora.trainers.methods.selection.llmselector import LLMSelectorTrainer
from marlora.trainers.values.search import Candidate
from tests.trainers.reading import rows
from tests.trainers.selectors import located_and_solved, selector

pytestmark = pytest.mark.usefixtures("one_thread")


def allocation(trained: LLMSelectorTrainer) -> tuple[str, ...]:
    return tuple(trained.memory["history"][-1])


def brute_force(trained: LLMSelectorTrainer) -> dict[tuple[str, ...], float]:
    """The mean score of every allocation on the tasks of the search."""
    with trained.run as run:
        return {
            each: run.evaluator.measure(
                run.state.with_values(trained._values(each)), trained.search_tasks
            ).accuracy
            for each in itertools.product(trained.models, repeat=len(trained.modules))
        }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path) -> LLMSelectorTrainer:
    """A finished run from CC; its folder holds what it came to."""
    made = selector(tmp_path_factory.mktemp("runs") / "run", model, start="given")
    made.train()
    return made


def summary_of(trained: LLMSelectorTrainer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (trained.args.folder / "summary.json").read_text(encoding="utf-8")
    )
    return found


def test_what_it_finds_beats_every_single_model(trained: LLMSelectorTrainer) -> None:
    summary = summary_of(trained)
    assert allocation(trained) == ("A", "B")
    alone = {name: found["accuracy"] for name, found in summary["uniform"].items()}
    after = summary["eval"]["after"]["accuracy"]
    assert after > 0.7 and max(alone.values()) < 0.5, (after, alone)
    assert all(found["paired"]["ci95"][0] > 0.05 for found in summary["uniform"].values())
    assert summary["policies"]["A"]["sha256_before"] == summary["policies"]["A"]["sha256_after"]
    assert summary["tokens"]["trained"] == 0


def test_its_steps_are_the_sheets(trained: LLMSelectorTrainer) -> None:
    """From CC: A locates, B solves, then a round without change. Six allocations besides the first
    are asked for, and nothing is played twice."""
    history = [["C", "C"], ["A", "C"], ["A", "B"], ["A", "B"], ["A", "B"]]
    assert trained.memory["history"] == history
    assert summary_of(trained)["done"].startswith("converged: 2 steps in a row")
    found = [row["selection"] for row in rows(trained.args.folder)]
    assert [(row["module"], row["model"]) for row in found] == [
        ("locate", "A"),
        ("solve", "B"),
        ("locate", "A"),
        ("solve", "B"),
    ]
    accuracies = [row["accuracy"] for row in found]
    assert accuracies == sorted(accuracies), "coordinate search by means never gets worse"
    # CC AC BC | AA AB | BB CB | none: the last step's were measured before
    assert [row["allocations"] for row in found] == [3, 5, 7, 7]
    played = [e for e in Store(trained.args.folder / "episodes") if e.kind == "trial"]
    assert len(played) == 7 * 40 and len({e.state.key for e in played}) == 7
    assert {turn.policy for e in played for turn in e.turns} == {"A", "B", "C"}


def test_it_equals_brute_force_and_random_allocations_are_worse(
    trained: LLMSelectorTrainer,
) -> None:
    """Control: as many allocations as the search measured, drawn and not looked at."""
    found, rng = brute_force(trained), random.Random(0)
    assert len(found) == 9 and found[allocation(trained)] == max(found.values())
    count = sum(bool(each.scores) for each in trained.search.candidates)
    drawn = [found[tuple(rng.choices("ABC", k=2))] for _ in range(count)]
    assert sum(drawn) / count < found[allocation(trained)] - 0.3, drawn


def test_from_another_start_votes_find_it_too(tmp_path: Path, model: Path) -> None:
    made = selector(tmp_path / "run", model, rule="votes", seed=1, measure_uniform=False)
    made.train()
    assert made.memory["history"][0] != ["C", "C"] and allocation(made) == ("A", "B")


def test_an_adapter_that_nobody_spoke_with_answers_itself(tmp_path: Path, model: Path) -> None:
    """Not the base under its name: trials of a mapping name the versions of its adapters."""
    adapter = random_adapter(model, tmp_path / "adapter")
    policies = {"A": {"init": str(adapter)}, "B": {"init": "fresh"}, "C": {"init": "fresh"}}
    made = selector(tmp_path / "run", model, policies=policies, start="given")
    with made.run as run:
        state = run.state.with_values(made._values(["A", "C"]))
        (episode,) = run.rollouts.play(made.search_tasks[:1], state)
    located, solved = episode.turns
    assert located.policy == "A" and located.version.startswith("A-v"), located
    assert solved.version == "", "an untrained adapter is the base"
    assert episode.state.versions == {"A": located.version}


def random_adapter(base: Path, folder: Path) -> Path:
    """A PEFT folder of a LoRA whose B is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base)
    shape = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(network, shape).save_pretrained(folder)
    return folder


def test_the_search_budget_ends_it(tmp_path: Path, model: Path) -> None:
    trained = selector(
        tmp_path / "run", model, start="given", search_budget=3, measure_uniform=False
    )
    summary = trained.train()
    assert summary["steps"] == 1 and allocation(trained) == ("A", "C")
    assert summary["done"] == "search_budget: 2 allocations measured, another step takes 2"


def test_some_agents_and_some_models_only(tmp_path: Path, model: Path) -> None:
    trained = selector(
        tmp_path / "run",
        model,
        modules=["solve"],
        candidates=["B", "C"],
        start="given",
        num_search_tasks=20,
        measure_uniform=False,
    )
    summary = trained.train()
    assert allocation(trained) == ("B",) and summary["steps"] == 2
    assert set(summary["state"]["values"]) == {"solve.policy"}


# the diagnoser

DIAGNOSER = {"diagnoser": {"prompt": "diagnose", "sampling": {"temperature": 0, "max_tokens": 80}}}


def test_verdicts_alone_find_it_too(tmp_path: Path, model: Path) -> None:
    """alpha 1, beta 0: a place gets the model that is blamed least."""
    trained = selector(
        tmp_path / "run",
        model,
        start="given",
        alpha=1.0,
        beta=0.0,
        num_search_tasks=20,
        helpers=DIAGNOSER,
        measure_uniform=False,
    )
    summary = trained.train()
    assert allocation(trained) == ("A", "B")
    asides = [e for e in Store(tmp_path / "run" / "episodes") if e.kind == "aside"]
    assert len(asides) == summary["ledger"]["aside"]["diagnoser"]["calls"] > 20
    assert all(turn.saw_gold for e in asides for turn in e.turns)
    trials = {e.id: e for e in Store(tmp_path / "run" / "episodes") if e.kind == "trial"}
    assert all(trials[e.follows].reward("exact") == 0 for e in asides), "solved ones are not asked"
    assert len({(e.follows, e.task.id) for e in asides}) == len(asides), "none is asked twice"
    config = (tmp_path / "run" / "checkpoints").glob("*/system.json")
    assert all("diagnoser" not in file.read_text(encoding="utf-8") for file in config)


# controls


class Shuffled(LLMSelectorTrainer):
    """Scores that belong to other models: each step's are dealt out by chance."""

    def _scores(self, candidate: Candidate, module: str) -> dict[str, float]:
        scores = super()._scores(candidate, module)
        rng = random.Random(f"{self.args.seed} {sorted(candidate.values.items())}")
        shuffled = [rng.random() for _ in scores]
        return dict(zip(scores, shuffled, strict=True))


def test_from_shuffled_scores_nothing_is_learnt(tmp_path: Path, model: Path) -> None:
    """Over three seeds the allocations are spread and their mean is far from the best."""
    found = []
    for seed in range(3):
        made = selector(
            tmp_path / f"{seed}",
            model,
            cls=Shuffled,
            seed=seed,
            num_search_tasks=8,
            num_eval_tasks=20,
            measure_uniform=False,
            max_steps=2,
        )
        found.append((made.train()["eval"]["after"]["accuracy"], allocation(made)))
    assert len({each for _, each in found}) >= 2, found
    assert sum(value for value, _ in found) / len(found) < 0.65, found


# resume, ranks, checkpoint


class Killed(Exception):
    """Stands for a kill."""


def facts(folder: Path) -> dict[str, Any]:
    """What a run came to: everything but times."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for found in [*summary["ledger"].values(), *summary["ledger_by_policy"].values()]:
        for row in found.values():
            del row["seconds"]
    stored = sorted((e.id, e.output, e.kind) for e in Store(folder / "episodes"))
    last = folder / "checkpoints" / f"step-{summary['steps']:06d}" / "trainer" / "parts"
    parts = {
        str(file.relative_to(last)): json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(last.rglob("*.json"))
    }
    # `budget`: what is spent so far, stored episodes of steps that are done again included
    timed = ("seconds", "proof")
    steps = [{k: v for k, v in row.items() if k not in timed} for row in rows(folder)]
    kept = ("eval", "ledger", "budget", "done", "state", "steps", "uniform")
    return {**{k: summary[k] for k in kept}, "parts": parts, "stored": stored, "rows": steps}


CUT: dict[str, Any] = dict(
    num_eval_tasks=10, start="given", alpha=0.5, helpers=DIAGNOSER, num_search_tasks=20
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    selector(folder, model, **CUT).train()
    return facts(folder)


@pytest.mark.parametrize(
    ("episode", "save_every"), [(90, 10), pytest.param(190, 1, marks=pytest.mark.slow)]
)
def test_a_run_that_was_killed_inside_a_measurement_goes_on(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Mapping[str, Any],
    episode: int,
    save_every: int,
) -> None:
    settings = {**CUT, "save_every": save_every}
    kept, extend = [0], Store.extend

    def count(self: Store, episodes: Any, **how: Any) -> None:
        kept[0] += 1
        if kept[0] > episode:
            raise Killed
        extend(self, episodes, **how)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "extend", count)
        with pytest.raises(Killed):
            selector(tmp_path / "cut", model, **settings).train()
    selector(tmp_path / "cut", model, resume=True, **settings).train()
    assert facts(tmp_path / "cut") == undisturbed


def test_evaluating_the_checkpoint_gives_what_the_run_says(
    tmp_path: Path, trained: LLMSelectorTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from marlora.rollouts.checkpoints import team

    async def start(*args: Any, **settings: Any) -> ScriptedEngine:
        return ScriptedEngine(located_and_solved)

    monkeypatch.setattr(team, "start_engine", start)
    summary = summary_of(trained)
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
        ({"modules": ["solv"]}, r"modules: no 'solv' here; did you mean 'solve'\?"),
        ({"candidates": ["A", "D"]}, "candidates: no 'D' here"),
        ({"candidates": ["A"]}, r"candidates: only \['A'\]; expected at least two policies"),
        ({"search_budget": 1}, "search_budget: 1 is less than a step takes, 2 for 3 models"),
        ({"start": "given", "candidates": ["A", "B"]}, "'locate' speaks with 'C', which is none"),
        ({"alpha": 0.5}, "helpers.diagnoser: missing"),
        ({"alpha": 0.0, "beta": 0.0}, "alpha and beta: both are 0"),
        ({"rule": "median"}, "rule: expected one of mean, votes"),
        ({"policies": {"A": {"trainable": True, "init": "fresh"}}}, "trains no policy"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, model: Path, changes: Mapping[str, Any], problem: str
) -> None:
    with pytest.raises(SettingError, match=problem):
        selector(tmp_path / "run", model, **changes)
