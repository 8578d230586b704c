"""Few-shot bootstrapping on a scripted engine that is right only behind worked examples of the rule:
what it finds, what its controls do not find, and what becomes of a run that is cut off."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.types import Sampling, SettingError, Task
from marlora.rollouts.engines.base import EngineError, ModelRef
from marlora.rollouts.engines.scripted import Fault, ScriptedEngine
from marlora.rollouts.tasks.toy import RULE
from marlora.rollouts.types import Episode
from marlora.trainers.methods.prompts.bootstrapping.bootstrap_few_shot import (
    BootstrapFewShotConfig,
    BootstrapFewShotTrainer,
)
from tests.trainers.methods.prompts.bootstrapping.rules_run import teacher, trainer
from tests.trainers.reading import rows

LABELS = {
    "first": {"user": "{prompt}", "assistant": "{_first}"},
    "last": {"user": "{_first}", "assistant": "{answer}"},
}
ALL = ["zero-shot", "labeled", "unshuffled", "shuffled"]


def pairs(made: BootstrapFewShotTrainer, agent: str) -> list[tuple[str, str]]:
    """The demonstrations in force of an agent: (question, answer)."""
    texts = [message["content"] for message in made.run.values.get(f"{agent}.demos", [])]
    return list(zip(texts[0::2], texts[1::2], strict=True))


def in_the_rule(made: BootstrapFewShotTrainer) -> list[bool]:
    """For every demonstration in force, whether it was made in the way that the tasks want."""
    return [
        int(said) == int(asked[-1]) // 2 + way
        for agent, way in RULE.items()
        for asked, said in pairs(made, agent)
    ]


def spent(summary: dict[str, Any]) -> int:
    return int(summary["budget"]["spent"]["tokens"])


def test_it_finds_demonstrations_of_the_rule(model: Path, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", model)
    summary = made.train()
    assert summary["eval"]["before"]["accuracy"] == 0.0
    assert summary["eval"]["after"]["accuracy"] == 1.0
    assert all(in_the_rule(made)) and len(in_the_rule(made)) == 6
    judged_by = {task.prompt for task in [*made.spec.val_tasks, *made.spec.eval_tasks]}
    assert not judged_by & {question for question, _ in pairs(made, "first")}
    steps = [row["candidate"] for row in rows(tmp_path / "run")]
    assert [s["name"] for s in steps] == [*ALL[:3], "shuffled 0", "shuffled 1"], "C + 3 candidates"
    assert [s["adopted"] for s in steps] == [False, False, True, False, False], (
        "the first wins ties"
    )
    assert all(count <= 3 for s in steps for count in s["demos"].values())
    scores = [c["score"] for c in summary["candidates"]]
    assert scores == sorted(scores, reverse=True) and scores[0] >= steps[0]["score"] == 0.0
    assert {e.kind for e in made.run.rollouts.store} == {"trial", "eval"}, "nothing is learnt from"


def shuffled_score(task: Task, episode: Episode) -> float:
    """A success that has nothing to do with the task: about every fifth run has it."""
    return float(zlib.crc32(f"{task.id} {episode.output}".encode()) % 5 == 0)


@pytest.mark.parametrize(
    ("rewards", "changes"),
    [
        (["exact"], {"select": "all"}),  # demonstrations whatever came of their run
        ([shuffled_score, "exact"], {}),
    ],
    ids=["random demonstrations", "shuffled scores"],
)
def test_without_true_scores_it_finds_none(
    rewards: list[Any], changes: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """With at least the budget of the run above."""
    made = trainer(tmp_path / "run", model, rewards=rewards, num_candidate_programs=4, **changes)
    summary = made.train()
    with made.run as run:
        played = run.rollouts.stored("after")
        accuracy = sum(e.reward("exact") for e in played) / len(played)
    assert len(played) == 20 and accuracy < 0.1
    assert spent(summary) > 5600


def test_demonstrations_come_from_successful_runs_of_their_own_tasks(
    model: Path, tmp_path: Path
) -> None:
    """Of 20 tasks the agents are right on the half whose number is even, whatever they are shown."""

    def half(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
        asked = prompt.rpartition("<|user|>")[2].partition("<|end|>")[0]
        first = "<|system|>first" in prompt
        right = int(asked) % 2 == 0 if first else True
        return str(int(asked[-1]) // 2 + RULE["first" if first else "last"]) if right else "9"

    made = trainer(
        tmp_path / "run",
        model,
        say=half,
        num_tasks=20,
        num_val_tasks=0,
        candidates=["unshuffled"],
        max_bootstrapped_demos=4,
        max_rounds=1,
    )
    made.train()
    asked = [question for question, _ in pairs(made, "first")]
    even = [task.prompt for task in made.spec.tasks if int(task.id) % 2 == 0]
    assert asked == even[:4], "the first successes, in order; adopted without a validation task"
    trials = list(made.run.rollouts.store.read(kind="trial"))
    last = [task.prompt for task in made.spec.tasks].index(even[3])
    assert len(trials) == last + 1, "none is played beyond the last success that is needed"


def shown_its_own(episode: Episode) -> bool:
    """Did an agent's chat hold its question before it was asked?"""
    return any(
        turn.messages[-1].content in [m.content for m in turn.messages[:-1]]
        for turn in episode.turns
        if turn.agent == "first"
    )


def test_labelled_demonstrations_never_show_a_run_its_own_task(model: Path, tmp_path: Path) -> None:
    """All 8 tasks are labelled, so each would be shown to its own run. Right are only those that
    are shown the 7 others: at temperature 0, at the first try."""
    made = trainer(
        tmp_path / "run",
        model,
        num_tasks=28,
        num_val_tasks=20,
        candidates=["zero-shot", "labeled", "unshuffled"],
        labeled_demos=LABELS,
        max_rounds=1,
    )
    summary = made.train()
    trials = [
        e
        for e in made.run.rollouts.store.read(kind="trial")
        if e.task.id in {t.id for t in made.spec.tasks}
    ]
    assert len(trials) == 3 and not any(map(shown_its_own, trials))
    assert all(len(e.turns[0].messages) == 1 + 2 * 7 + 1 for e in trials)
    none, labelled, bootstrapped = (row["candidate"] for row in rows(tmp_path / "run"))
    assert labelled["demos"] == {"first": 8, "last": 8} and labelled["adopted"]
    assert bootstrapped["runs"] == 3 and bootstrapped["demos"] == {"first": 8, "last": 8}
    assert (none["score"], labelled["score"], bootstrapped["adopted"]) == (0.0, 1.0, False)
    assert summary["eval"]["after"]["accuracy"] == 1.0 and all(in_the_rule(made))


def test_demonstrations_that_somebody_wrote_stay_unless_others_are_better(
    model: Path, tmp_path: Path
) -> None:
    shots = [{"role": "user", "content": "112"}, {"role": "assistant", "content": "6"}]
    last = [{"role": "user", "content": "6"}, {"role": "assistant", "content": "3"}]
    made = trainer(
        tmp_path / "run", model, values={"first.demos": shots, "last.demos": last}, max_rounds=1
    )
    before = made.run.values.copy()
    summary = made.train()
    assert summary["eval"]["before"]["accuracy"] == 1.0 and made.run.values == before
    zero, _, own, *_ = (row["candidate"] for row in rows(tmp_path / "run"))
    assert zero["score"] == 0.0 and not zero["adopted"]
    assert own["runs"] == 3 and not own["adopted"], (
        "the team with its demonstrations was the teacher"
    )


def test_a_teacher_may_have_values_of_its_own(model: Path, tmp_path: Path) -> None:
    """A teacher that knows the rule is right at the first try, at temperature 0."""
    shots = {
        "first.demos": [{"role": "user", "content": "112"}, {"role": "assistant", "content": "6"}],
        "last.demos": [{"role": "user", "content": "6"}, {"role": "assistant", "content": "3"}],
    }
    made = trainer(tmp_path / "run", model, teacher=shots, candidates=["unshuffled"], max_rounds=1)
    assert made.train()["eval"]["after"]["accuracy"] == 1.0
    assert pairs(made, "first")[0][0] != "112" and len(pairs(made, "first")) == 3


def test_the_search_ends_at_the_score_asked_for(model: Path, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", model, stop_at_score=0.9)
    summary = made.train()
    assert summary["steps"] == 3 and made.run.log.done == "stop_at_score: 1.0000 on validation"


def test_a_candidate_that_cannot_win_is_not_measured_to_the_end(
    model: Path, tmp_path: Path
) -> None:
    """Five tasks are played at a time; nothing exceeds the first set's 20 of 20."""
    made = trainer(tmp_path / "run", model, max_concurrency=5)
    summary = made.train()
    first, *others = (row["candidate"] for row in rows(tmp_path / "run")[2:])
    assert (first["score"], first["num_tasks"], first["adopted"]) == (1.0, 20, True)
    assert [(c["score"], c["num_tasks"]) for c in others] == [(None, 5), (None, 5)]
    assert "stopped after 5 of 20 tasks" in made.search[others[0]["id"]].verdict
    scores = [c["score"] for c in summary["candidates"]]
    assert scores == [1.0, 0.0, None, None] and summary["eval"]["after"]["accuracy"] == 1.0


# cut off


def end(made: BootstrapFewShotTrainer) -> tuple[Any, ...]:
    """What a run ends with: the state, the archive, the ids of all that was played."""
    played = sorted(episode.id for episode in made.run.rollouts.store)
    return made.run.values, made.search.state_dict(), played


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> BootstrapFewShotTrainer:
    """A run that nothing cut off."""
    made = trainer(tmp_path_factory.mktemp("whole") / "run", model)
    made.train()
    return made


@pytest.mark.parametrize("call", [60, 150, 230, 290])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    call: int, whole: BootstrapFewShotTrainer, model: Path, tmp_path: Path
) -> None:
    """Inside the measurement of the team as it began, inside bootstrapping, inside a candidate's
    evaluation."""
    broken = ScriptedEngine(teacher, faults={call: Fault("raise", error=EngineError("gone"))})
    with pytest.raises(EngineError, match="gone"):
        trainer(tmp_path / "cut", model, engine=broken).train()
    again = trainer(tmp_path / "cut", model, resume=True)
    again.train()
    assert end(whole) == end(again)


def test_the_budget_ends_the_search_with_the_best_so_far(model: Path, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", model, budget={"tokens": 3500})
    summary = made.train()
    assert summary["budget"]["stopped"] and spent(summary) <= 3500
    assert summary["steps"] == 3, "the fourth candidate was not measured to the end"
    assert summary["eval"]["after"]["accuracy"] == 1.0 and all(in_the_rule(made))
    assert made.search.current is not None and made.search.current.proposer == "unshuffled"


# settings


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"candidates": []}, "candidates: none to try"),
        ({"candidates": ["shuffled"], "num_candidate_programs": 0}, "candidates: none to try"),
        ({"candidates": ["zeroshot"]}, "candidates: expected one of .*did you mean 'zero-shot'"),
        ({"num_val_tasks": 0}, "num_val_tasks: 5 candidates are compared on validation tasks"),
        ({"max_steps": 7}, "max_steps: a step is a candidate and there are 5"),
        ({"episodes": "x"}, "episodes: this method plays its runs itself"),
        (
            {"labeled_demos": {"frist": {}}},
            "labeled_demos.frist: no such agent; did you mean 'first'",
        ),
        ({"labeled_demos": {"first": {"user": "{gold}"}}}, r"labeled_demos.first.user: .*\{gold\}"),
        ({"labeled_demos": {"first": {"users": "x"}}}, "labeled_demos.first.users: unknown field"),
        ({"teacher": {"first.demo": []}}, "teacher.first.demo: no such param"),
        ({"teacher": {"first.policy": "big"}}, "teacher.first.policy: no policy 'big' is served"),
        ({"teacher": {"first.prompt": 3}}, "teacher.first.prompt: expected a text"),
        ({"policies": {"base": {"trainable": True}}}, "policies.base.trainable"),
    ],
)
def test_settings_that_cannot_work(
    changes: dict[str, Any], error: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=error):
        trainer(tmp_path / "run", model, **changes)


def test_the_defaults_are_those_of_the_code() -> None:
    """Sheet, section 4: max_boot 4, max_label 16, rounds 1, C 16, so 19 candidates."""
    config = BootstrapFewShotConfig(model="m")
    assert (config.max_bootstrapped_demos, config.max_labeled_demos, config.max_rounds) == (
        4,
        16,
        1,
    )
    assert config.num_candidate_programs == 16 and config.max_steps == 19
