"""MIPRO on the scripted team of its method sheet: what it finds, what its controls do not find, what
the proposer is asked, and what becomes of a run that is cut off."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from marlora.agents.types import Sampling, SettingError, Task
from marlora.recipes.cli.main import main
from marlora.rollouts.engines.base import EngineError, ModelRef
from marlora.rollouts.engines.scripted import Fault, ScriptedEngine
from marlora.rollouts.types import Episode
from marlora.trainers.methods.prompts.search.mipro import MIPROConfig, MIPROTrainer
from marlora.trainers.methods.prompts.search.mipro_proposer import TIPS
from tests.repository import ROOT
from tests.trainers.methods.prompts.search.mipro_run import team, trainer
from tests.trainers.methods.prompts.search.search_runs import (
    end,
    evaluated,
    on_two_ranks,
    summary_of,
)
from tests.trainers.reading import rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> MIPROTrainer:
    """A run that nothing cut off."""
    made = trainer(tmp_path_factory.mktemp("whole") / "run", model)
    made.train()
    return made


def test_it_finds_the_right_instructions_of_both_agents(whole: MIPROTrainer) -> None:
    summary = summary_of(whole)
    assert summary["eval"]["before"]["accuracy"] < 0.4 < 0.75 < summary["eval"]["after"]["accuracy"]
    assert whole.run.values["a.prompt"] == "a: way 1" and whole.run.values["b.prompt"] == "b: way 2"
    scores = [row["score"] for row in summary["candidates"]]
    assert scores == sorted(scores, reverse=True) and summary["policies"] == {}
    assert {e.kind for e in whole.run.rollouts.store} == {"trial", "aside", "eval"}


def test_the_log_and_the_runs_asked_for_are_those_of_the_sheet(whole: MIPROTrainer) -> None:
    """F2 and F3 with T 12, S 4, B 10, 24 tasks: 12 + 3 + 1 evaluations, 10 x 12 + 24 x 4 runs."""
    search = summary_of(whole)["search"]
    assert (search["trials"], search["evaluations"], search["runs"]) == (12, 16, 216)
    trials = whole.memory["trials"]
    assert [n for n, trial in enumerate(trials) if trial["full"]] == [0, 5, 10, 15]
    assert set(trials[0]["choice"].values()) == {0}
    best = [row["trial"]["best_score"] for row in rows(whole.spec.config.folder)[1:]]
    assert best == sorted(best) and best[0] >= trials[0]["score"], "the best so far never falls"
    played = [e for e in whole.run.rollouts.store.read(kind="trial") if e.parent is None]
    assert len(played) < 216 + 60, "what was played before with the same state is not played again"


def test_the_first_option_is_what_the_agent_has(whole: MIPROTrainer) -> None:
    """Fact 6; and sets and instructions differ."""
    options = whole.memory["options"]
    assert list(options) == ["a.prompt", "a.demos", "b.prompt", "b.demos"]
    assert [options[f"{a}.prompt"][0] for a in "ab"] == ["a: go", "b: go"]
    assert [options[f"{a}.demos"][0] for a in "ab"] == [[], []]
    for own in options.values():
        assert all(own.count(option) == 1 for option in own)
    sizes = [len(own) // 2 for own in options["a.demos"]]
    assert len(sizes) == 4 and sizes[1] == 3 and all(1 <= size <= 3 for size in sizes[1:])
    used = {m["content"] for own in options["a.demos"] for m in own if m["role"] == "user"}
    assert used <= {task.prompt for task in whole.spec.tasks}, "never of a validation task"


def shuffled_score(task: Task, episode: Episode) -> float:
    """A score that has nothing to do with what is right: about half of the runs have it."""
    return zlib.crc32(f"{task.id} {episode.turns[0].messages}".encode()) % 2


@pytest.mark.slow
def test_controls_of_equal_budget(whole: MIPROTrainer, model: Path, tmp_path: Path) -> None:
    """Random search scores as many runs and finds no better; with shuffled scores nothing that is
    right is found."""
    after = summary_of(whole)["eval"]["after"]["accuracy"]
    drawn = trainer(tmp_path / "random", model, sampler="random")
    summary = drawn.train()
    assert summary["search"]["runs"] == 216 and summary["eval"]["after"]["accuracy"] <= after
    lost = trainer(tmp_path / "shuffled", model, rewards=[shuffled_score, "exact"])
    summary = lost.train()
    with lost.run as run:
        played = run.rollouts.stored("after")
        accuracy = sum(episode.reward("exact") for episode in played) / len(played)
    assert summary["search"]["runs"] == 216 and accuracy < after - 0.1


# the proposer


def asides(made: MIPROTrainer) -> dict[str, Episode]:
    return {e.task.id: e for e in made.run.rollouts.store.read(kind="aside")}


def test_the_proposer_is_shown_tasks_program_demonstrations_and_a_tip(whole: MIPROTrainer) -> None:
    asked = asides(whole)
    assert list(asked)[:5] == [
        "observations/0",
        "observations/10",
        "summary",
        "program",
        "module/a",
    ]
    assert len(asked) == 2 + 1 + 1 + 2 + 8, "four instructions for each of two agents"
    first, more = asked["observations/0"].task.prompt, asked["observations/10"].task.prompt
    shown = [task.prompt for task in whole.spec.tasks]
    assert all(f"Question: {text}\nAnswer: yes" in first for text in shown[:10])
    assert shown[10] not in first and shown[10] in more and "They are questions." in more
    assert not any(t.prompt in e.task.prompt for t in whole.spec.val_tasks for e in asked.values())
    assert (
        "class Chain" in asked["program"].task.prompt
        and "a: agent a" in asked["program"].task.prompt
    )
    proposal = asked["instruction/b/1"].task.prompt
    for words in ("<DATASET>", "<PROGRAM>", "<AGENT>", "<EXAMPLES>\nuser: solve train"):
        assert words in proposal
    assert "<CURRENT_INSTRUCTION>\nb: go" in proposal and "for agent b" in proposal
    texts = [e.task.prompt for name, e in asked.items() if name.startswith("instruction")]
    tips = {name for name, tip in TIPS.items() if tip and any(tip in text for text in texts)}
    assert len(tips) >= 2
    assert all(turn.saw_gold for episode in asked.values() for turn in episode.turns)


def test_what_the_proposer_is_not_to_see_is_not_asked_for(model: Path, tmp_path: Path) -> None:
    made = trainer(
        tmp_path / "run",
        model,
        data_aware_proposer=False,
        program_aware_proposer=False,
        fewshot_aware_proposer=False,
        tip_aware_proposer=False,
        num_trials=1,
        num_eval_tasks=2,
    )
    made.train()
    asked = asides(made)
    assert all(name.startswith("instruction/") for name in asked) and len(asked) == 8
    assert not any(
        f"<{name}>" in e.task.prompt
        for e in asked.values()
        for name in ("DATASET", "PROGRAM", "AGENT", "EXAMPLES")
    )
    assert not any(tip in e.task.prompt for e in asked.values() for tip in TIPS.values() if tip)


def proposals(*texts: str) -> Any:
    """The team, with a proposer that says these in turn, by the seed of its request."""

    def say(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
        if "between <INSTRUCTION> and" in prompt:
            return texts[(sampling.seed or 0) % len(texts)]
        return team(prompt, ref, sampling, k)

    return say


def test_a_proposer_without_a_usable_instruction_ends_the_run(model: Path, tmp_path: Path) -> None:
    """The team stays as it is, the run is whole, and it says why."""
    made = trainer(
        tmp_path / "run",
        model,
        say=proposals("<INSTRUCTION>cut of", "<INSTRUCTION> </INSTRUCTION>"),
        max_bootstrapped_demos=0,
        data_aware_proposer=False,
        num_eval_tasks=2,
        num_val_tasks=10,
    )
    summary = made.train()
    dropped = summary["search"]["proposals"]["dropped"]
    assert summary["steps"] == 1 and set(dropped) == {"truncated", "unanswered"}
    assert sum(dropped.values()) == summary["search"]["proposals"]["asked"] == 8
    assert summary["done"].startswith("helpers.proposer: none of 8 instructions is usable")
    assert "truncated" in summary["done"] and made.run.values == {}


def test_without_a_usable_instruction_demonstrations_are_searched(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(
        tmp_path / "run",
        model,
        say=proposals("<INSTRUCTION>cut of"),
        num_trials=2,
        num_eval_tasks=2,
        num_val_tasks=10,
    )
    summary = made.train()
    options = made.memory["options"]
    assert [len(options[f"{name}.prompt"]) for name in "ab"] == [1, 1]
    assert max(len(options[f"{name}.demos"]) for name in "ab") > 1
    assert summary["steps"] == 3 and "usable" not in summary.get("done", "")
    assert "Demonstrations alone are searched" in "".join(capsys.readouterr())


def test_instructions_alone_are_searched_without_demonstrations(
    model: Path, tmp_path: Path
) -> None:
    """Three runs are still shown to the proposer. Replies without tags are taken whole, and what is
    dropped leaves the others."""
    made = trainer(
        tmp_path / "run",
        model,
        say=proposals("way 1", "way 2", "<INSTRUCTION>cut of", "<INSTRUCTION>way 3</INSTRUCTION>"),
        max_bootstrapped_demos=0,
        num_trials=4,
        num_eval_tasks=4,
        num_val_tasks=10,
        minibatch_size=0,
    )
    summary = made.train()
    options = made.memory["options"]
    assert list(options) == ["a.prompt", "b.prompt"] and not any(
        text in own for own in options.values() for text in ("", "cut of", "<INSTRUCTION>cut of")
    )
    assert summary["search"]["runs"] == 10 * 5 and summary["search"]["evaluations"] == 5
    shown = asides(made)["instruction/a/0"].task.prompt.count("user: solve")
    assert shown == 3 and not any(name.endswith(".demos") for name in made.run.values)


# cut off


@pytest.mark.parametrize(
    "call",
    [pytest.param(100, marks=pytest.mark.slow), 200, pytest.param(300, marks=pytest.mark.slow)],
)
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    call: int, whole: MIPROTrainer, model: Path, tmp_path: Path
) -> None:
    """In the first step, in a trial, in a full evaluation: same options, suggestions and values."""
    broken = ScriptedEngine(
        team, faults={call: Fault("raise", error=EngineError("gone"))}, context=16_384
    )
    with pytest.raises(EngineError, match="gone"):
        trainer(tmp_path / "cut", model, engine=broken).train()
    again = trainer(tmp_path / "cut", model, resume=True)
    again.train()
    assert end(again) == end(whole)
    ids = [sorted(e.id for e in made.run.rollouts.store) for made in (again, whole)]
    assert ids[0] == ids[1], "nothing is played or asked twice"


@pytest.mark.slow
@pytest.mark.process
def test_two_ranks_find_what_one_finds(whole: MIPROTrainer, tmp_path: Path) -> None:
    first, second = on_two_ranks("tests.trainers.methods.prompts.search.mipro_run", whole, tmp_path)
    assert first == second == end(whole)


@pytest.mark.slow
def test_the_budget_ends_the_search_with_the_best_so_far(
    whole: MIPROTrainer, model: Path, tmp_path: Path
) -> None:
    spent = int(summary_of(whole)["budget"]["spent"]["tokens"])
    limit = int(0.8 * spent)
    made = trainer(tmp_path / "run", model, budget={"tokens": limit})
    summary = made.train()
    assert summary["budget"]["stopped"] and summary["budget"]["spent"]["tokens"] <= limit
    assert 1 < summary["steps"] < 13 and made.search.current is not None
    assert made.run.values["a.prompt"] == made.search.current.values["a.prompt"]
    state = [row["trial"]["best"] for row in rows(tmp_path / "run")[1:]]
    assert made.search.current.id == state[-1]


def test_a_checkpoint_is_worth_what_the_run_said(
    whole: MIPROTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path / "run", Path(whole.args.model), num_trials=2, num_eval_tasks=20)
    made.train()
    found = evaluated(made, team, 3, tmp_path, monkeypatch)
    assert found["before"]["accuracy"] != found["after"]["accuracy"]


@pytest.mark.slow
def test_demonstrations_alone_are_found_on_a_real_tiny_model(tmp_path: Path) -> None:
    """`tiny-rules` is right only behind worked examples of both agents; no helper is asked."""
    settings = ROOT / "recipes" / "bootstrap_few_shot.yaml"
    config = yaml.safe_load(settings.read_text(encoding="utf-8"))
    own = {key: value for key, value in config.items() if key != "num_candidate_programs"}
    own |= {"output_dir": str(tmp_path / "run"), "num_eval_tasks": 60, "num_instructions": 1}
    own |= {"num_candidates": 4, "num_trials": 6, "minibatch_size": 20, "full_eval_steps": 3}
    summary = MIPROTrainer(args=MIPROConfig(**own)).train()
    assert summary["eval"]["before"]["accuracy"] == 0.0
    assert summary["eval"]["after"]["accuracy"] > 0.9 and "aside" not in summary["ledger"]
    checkpoint = tmp_path / "run/checkpoints/step-000007"
    values = json.loads((checkpoint / "values/values.json").read_text(encoding="utf-8"))
    assert values["first.demos"] and values["last.demos"]
    main(["eval", str(checkpoint), "--engine", "transformers"])
    found = json.loads((tmp_path / "run/eval/eval.json").read_text(encoding="utf-8"))["eval"]
    assert found["after"]["accuracy"] == summary["eval"]["after"]["accuracy"]


# settings


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"helpers": {}}, "helpers.proposer: missing; this method asks a helper"),
        ({"minibatch_size": 25}, "minibatch_size: 25 tasks of 24 validation tasks"),
        ({"num_val_tasks": 0}, "num_val_tasks"),
        ({"num_val_tasks": 60}, "num_val_tasks: 60 of 60 training tasks leave none"),
        ({"full_eval_steps": 0}, "full_eval_steps: expected at least 1"),
        ({"sampler": "tpes"}, "sampler: expected one of .*did you mean 'tpe'"),
        ({"max_steps": 9}, "max_steps: a step is a trial and there are 12 after the first"),
        ({"episodes": "x"}, "episodes: this method plays its runs itself"),
        (
            {"max_bootstrapped_demos": 0, "num_instructions": 1},
            "num_instructions: 1 is the one that every agent has",
        ),
        ({"teacher": {"a.demo": []}}, "teacher.a.demo: no such param"),
        ({"labeled_demos": {"c": {}}}, "labeled_demos.c: no such agent"),
    ],
)
def test_settings_that_cannot_work(
    changes: dict[str, Any], error: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=error):
        trainer(tmp_path / "run", model, **changes)


def test_without_optuna_the_run_does_not_begin(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SettingError, match=r"pip install 'marlora\[search\]'"):
        trainer(tmp_path / "run", model)
    assert trainer(tmp_path / "run", model, sampler="random").num_trials == 12


def test_sizes_are_those_of_the_presets() -> None:
    """Fact 5: with demonstrations 6 sets and 3 instructions, without them 6 instructions."""
    light = MIPROConfig(model="m")
    assert (light.num_candidates, light.instructions, light.num_val_tasks) == (6, 3, 100)
    assert (light.minibatch_size, light.full_eval_steps, light.trials(2)) == (35, 5, 20)
    alone = MIPROConfig(model="m", max_bootstrapped_demos=0, max_labeled_demos=0)
    assert alone.instructions == 6 and alone.trials(1) == 9
