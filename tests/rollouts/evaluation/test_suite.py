"""A suite with a scripted engine: what is played, kept and shared, and every measure by hand."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.debate import Debate
from marlora.agents.patterns.vote import Vote
from marlora.agents.state import TeamState, outside_models
from marlora.agents.system import System
from marlora.agents.team import Team
from marlora.agents.types import (
    AgentSpec,
    Message,
    PolicySpec,
    Reward,
    SettingError,
    Task,
    Turn,
    Usage,
)
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.episodes.runner import EpisodeRunner
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.evaluation.statistics import Evaluation
from marlora.rollouts.evaluation.suite import (
    Measured,
    Plan,
    Variant,
    compare,
    measure,
    play,
    prompt_hash,
    seen,
    suite,
)
from marlora.rollouts.evaluation.variants import asked, distinct
from marlora.rollouts.rewards.builtin import correct
from marlora.rollouts.types import Episode

TASKS = tuple(Task(f"t{n}", f"say {n}", str(n)) for n in range(4))


def rollouts(engine: ScriptedEngine, system: System | None = None) -> EpisodeRunner:
    system = system or Vote(["a", "b"])
    return EpisodeRunner(
        system,
        {s.policy: EngineCompleter(engine, engine.tokens, s.policy) for s in system.specs},
        [correct],
    )


def scripted(answer: str = "0") -> ScriptedEngine:
    return ScriptedEngine(
        lambda prompt, ref, sampling, k: (
            answer if sampling.temperature == 0 else str(sampling.seed % 4)
        )
    )


@contextlib.contextmanager
def quiet(name: str, total: int, done: int) -> Iterator[Any]:
    yield lambda episode: None


def variant(engine: ScriptedEngine, name: str = "team", **changes: Any) -> Variant:
    return dataclasses.replace(
        Variant(name, rollouts(engine), TeamState(), {}, {"a": "base", "b": "base"}), **changes
    )


def test_what_is_stored_is_not_played_again(tmp_path: Path) -> None:
    engine, plan = scripted(), Plan(TASKS, "correct")
    first = asyncio.run(play(variant(engine), plan, tmp_path, quiet))
    assert [e.task.id for e in first] == ["t0", "t1", "t2", "t3"] and len(engine.calls) == 8
    again = asyncio.run(play(variant(engine, "another name"), plan, tmp_path, quiet))
    assert again == first and len(engine.calls) == 8
    more = Plan((*TASKS, Task("t4", "say 4", "4")), "correct")
    asyncio.run(play(variant(engine), more, tmp_path, quiet))
    assert len(engine.calls) == 10, "only the new task"
    changed = Plan((Task("t0", "say it", "0"),), "correct")
    asyncio.run(play(variant(engine), changed, tmp_path, quiet))
    assert len(engine.calls) == 12, "another task of the same id"


def test_a_stopped_suite_goes_on_where_it_was(tmp_path: Path) -> None:
    played: list[str] = []

    @contextlib.contextmanager
    def stopping(name: str, total: int, done: int) -> Iterator[Any]:
        def tick(episode: Episode) -> None:
            played.append(episode.id)
            if len(played) == 3:
                raise KeyboardInterrupt

        yield tick

    engine = scripted()
    one = variant(
        engine,
        rollouts=dataclasses.replace(
            rollouts(engine), limits=dataclasses.replace(rollouts(engine).limits, concurrency=1)
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(play(one, Plan(TASKS, "correct"), tmp_path, stopping))
    found = asyncio.run(play(one, Plan(TASKS, "correct"), tmp_path, stopping))
    assert sorted(played) == sorted(e.id for e in found) and len(played) == 4, (
        "each episode was played once"
    )


KEYED: dict[str, Any] = {
    "adapters": lambda c: dataclasses.replace(
        c, state=TeamState({"a": "a-v1"}), sha256={"a": "f00"}
    ),
    "base": lambda c: dataclasses.replace(c, bases={"a": "other", "b": "base"}),
    "values": lambda c: dataclasses.replace(c, state=TeamState({}, {"a.prompt": "Think."})),
    "table": lambda c: dataclasses.replace(c, state=TeamState({}, {"edges": {"ab": {"x": 1.0}}})),
    "mapping": lambda c: dataclasses.replace(
        c, state=TeamState({}, {"a.policy": "b"}), bases={"a": "base", "b": "other"}
    ),
    "outside": lambda c: dataclasses.replace(
        c, state=TeamState(outside={"a": "http://127.0.0.1:9/v1 judge"})
    ),
    "prompt": lambda c: dataclasses.replace(
        c, rollouts=dataclasses.replace(c.rollouts, system=Vote([AgentSpec("a", prompt="x"), "b"]))
    ),
    "system": lambda c: dataclasses.replace(
        c, rollouts=dataclasses.replace(c.rollouts, system=Debate(["a", "b"]))
    ),
    "rewards": lambda c: dataclasses.replace(
        c, rollouts=dataclasses.replace(c.rollouts, rewards=[])
    ),
}


@pytest.mark.parametrize("what", KEYED)
def test_the_key_is_what_the_answers_depend_on(what: str) -> None:
    one = variant(scripted())
    assert KEYED[what](one).key(0, True) != one.key(0, True)
    assert dataclasses.replace(one, name="x").key(0, True) == one.key(0, True) != one.key(1, True)
    assert one.key(0, True) != one.key(0, False)
    assert dataclasses.replace(one, sha256={"a": "f00"}).key(0, True) == one.key(0, True), (
        "an adapter that is off"
    )


def test_outside_models_share_a_key_only_if_address_and_model_are_the_same() -> None:
    """Whether the agent's spec or a value names the policy."""

    def key(policy: str = "judge", **model: str) -> str:
        spec = PolicySpec(policy, **{"url": "http://one/v1", "base": "small", **model})
        state = TeamState(values={"a.policy": policy}, outside=outside_models({policy: spec}))
        vote = rollouts(scripted(), Vote([AgentSpec("a", policy=policy), "b"]))
        by_spec = variant(scripted(), rollouts=vote, state=dataclasses.replace(state, values={}))
        keys.append(by_spec.key(0, True))
        return variant(scripted(), state=state).key(0, True)

    keys: list[str] = []
    models: list[dict[str, str]] = [
        {},
        {"base": "large"},
        {"url": "http://two/v1"},
        {"url": "http://two/v1", "base": "large"},
    ]
    assert len({key(**model) for model in models}) == len(set(keys)) == 4
    assert key(key_env="HOME") == key() and keys[-1] == keys[-2] == keys[0]
    assert variant(scripted()).key(0, True) not in keys


def test_variants_that_are_the_same_are_one() -> None:
    engine = scripted()
    kept, same = distinct(
        [
            variant(engine),
            variant(engine, "twin"),
            variant(engine, "other", bases={"a": "x", "b": "x"}),
        ],
        0,
        True,
    )
    assert [c.name for c in kept] == ["team", "other"] and same == {"twin": "team"}


def test_samples_and_seeds_draw_the_same_numbers_for_all(tmp_path: Path) -> None:
    engine, plan = scripted(), Plan(TASKS, "correct", seeds=(0, 1), samples=2, greedy=False)
    found = asyncio.run(
        suite(
            [variant(engine), variant(engine, "other", bases={"a": "x", "b": "x"})],
            plan,
            tmp_path,
            quiet,
        )
    )
    one, two = found["team"], found["other"]
    assert len(one.episodes) == 16 and [e.output for e in one.episodes] == [
        e.output for e in two.episodes
    ]
    assert len({e.seed for e in one.episodes}) == 16
    assert set(one.row["by_seed"]) == {"0", "1"}
    assert set(one.row["pass_at"]) == set(one.row["majority_at"]) == {"1", "2", "4"}
    assert one.row["pass_at"]["1"] == pytest.approx(one.row["accuracy"])
    with pytest.raises(SettingError, match="every sample is the same"):
        Plan(TASKS, "correct", samples=2)
    with pytest.raises(SettingError, match="task set is empty"):
        Plan((), "correct")


class Family(System):
    """Plays one child per task."""

    async def run(self, task: Task, team: Team) -> str:
        children = await team.play(
            Vote(self.specs), [Task(f"{task.id}-child", task.prompt, task.answer)]
        )
        return str(children[0].output)


def test_children_are_kept_and_cost_their_parents(tmp_path: Path) -> None:
    engine = scripted()
    one = variant(engine, rollouts=rollouts(engine, Family(["a"])))
    plan = Plan(TASKS[:1], "correct")
    first = asyncio.run(play(one, plan, tmp_path, quiet))
    assert [e.parent for e in first] == [None, first[0].id]
    row = asyncio.run(measure(one, plan, asyncio.run(play(one, plan, tmp_path, quiet)))).row
    assert row["num_tasks"] == 1 and row["cost"]["calls"] == 1 and row["accuracy"] == 1


def turn(index: int, agent: str, text: str, **more: Any) -> Turn:
    return Turn(index, agent, (Message("user", "?"),), text=text, **more)


def episode(task: Task, output: str | None, *turns: Turn, **more: Any) -> Episode:
    value = float(output == task.answer)
    given = {
        "rewards": (Reward("correct", value), Reward("kind", 0.5, agent="a")),
        "usage": {"a": Usage(2, 30, 5, 1.5)},
        **more,
    }
    return Episode(task.id, task.id, task, turns=turns, output=output, **given)


def test_measures_by_hand() -> None:
    two = TASKS[:2]
    cut = turn(3, "b", "6", taken=False)
    episodes = [
        episode(
            two[0],
            "0",
            turn(0, "a", "1"),
            turn(1, "b", "0"),
            turn(2, "a", "answer: 0"),
            turn(3, "b", "0.0"),
        ),
        episode(
            two[1],
            "2",
            turn(0, "a", "1"),
            turn(1, "b", "5"),
            turn(2, "a", "2"),
            cut,
            turn(3, "b", "1", sibling=1),
        ),
    ]
    debate = dataclasses.replace(
        variant(scripted()), rollouts=rollouts(scripted(), Debate(["a", "b"]))
    )
    row = asyncio.run(measure(debate, Plan(two, "correct"), episodes)).row
    assert (row["accuracy"], row["num_tasks"], row["failed"]) == (0.5, 2, 0)
    assert row["rewards"] == {"correct": 0.5, "kind of a": 0.5}
    assert row["cost"] == {
        "calls": 2,
        "prompt_tokens": 30,
        "sampled_tokens": 5,
        "seconds": {"mean": 1.5, "median": 1.5, "p95": 1.5},
    }
    assert row["agreement"] == 0.5, "0 and 0.0 agree, 2 and 1 do not"
    assert row["diversity"] == {"agents": 0.75, "samples": None}
    # t0: a 1 -> 0 wrong, right; b 0 -> 0.0 right, right.  t1: a 1 -> 2 right, wrong; b 5 -> 1 (the
    # taken one) wrong, right
    assert row["transitions"] == {
        "answers": [4, 4],
        "accuracy": [0.5, 0.75],
        "gain": 0.25,
        "changes": [{"right_right": 1, "right_wrong": 1, "wrong_right": 2, "wrong_wrong": 0}],
    }
    assert "pass_at" not in row
    vote = asyncio.run(measure(variant(scripted()), Plan(two, "correct"), episodes)).row
    assert vote["transitions"] is None, "turns of a system without rounds need not be answers"


def test_a_critics_answer_stands_beside_its_generators_and_a_summary_is_none() -> None:
    system = Debate(["g", "h", "c", "d", "s"], critics=True, summariser="s")
    one = dataclasses.replace(variant(scripted()), rollouts=rollouts(scripted(), system))
    turns = [
        turn(0, "g", "1"),
        turn(1, "h", "0"),
        turn(2, "s", "0"),
        turn(3, "s", "0"),
        turn(4, "c", "0"),
        turn(5, "d", "5"),
    ]
    row = asyncio.run(
        measure(one, Plan(TASKS[:1], "correct"), [episode(TASKS[0], "0", *turns)])
    ).row
    assert row["transitions"] == {
        "answers": [2, 2],
        "accuracy": [0.5, 0.5],
        "gain": 0.0,
        "changes": [{"right_right": 0, "right_wrong": 1, "wrong_right": 1, "wrong_wrong": 0}],
    }


def test_a_failed_episode_counts_0_and_is_told() -> None:
    failed = episode(TASKS[0], None, rewards=(), error="boom", stop_reason="error")
    row = asyncio.run(measure(variant(scripted()), Plan(TASKS[:1], "correct"), [failed])).row
    assert (row["accuracy"], row["failed"], row["agreement"], row["transitions"]) == (
        0,
        1,
        None,
        None,
    )
    with pytest.raises(SettingError, match="'exact', gives no reward of the team"):
        asyncio.run(
            measure(variant(scripted()), Plan(TASKS[:1], "exact"), [episode(TASKS[0], "0")])
        )


def test_comparisons_are_corrected_for_their_number() -> None:
    def score(name: str, *values: float) -> Measured:
        return Measured(name, "", Evaluation(dict(zip("abcdef", values, strict=True))), (), {})

    base, better, same = (
        score("base", 0, 0, 0, 0, 0, 1),
        score("better", 1, 1, 1, 1, 1, 0),
        score("same", 0, 0, 0, 0, 0, 1),
    )
    found = compare([(base, better), (base, same)])
    # 5 gained, 1 lost: p = 14/64, the smaller of two, so twice that
    assert (found[0]["p"], found[0]["p_holm"], found[0]["gained"], found[0]["lost"]) == (
        14 / 64,
        28 / 64,
        5,
        1,
    )
    assert found[0]["difference"] == pytest.approx(4 / 6) and (
        found[1]["p"],
        found[1]["p_holm"],
    ) == (1, 1)


def test_tasks_are_known_again_by_id_or_by_what_they_ask() -> None:
    asked = {prompt_hash("Say   3\n")}
    assert seen(TASKS, {"t1"}, asked) == ["t1", "t3"] and seen(TASKS, set(), set()) == []


def test_a_store_tells_what_was_asked_in_training(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append(Episode("train-000001/t0/0", "train-000001/t0", TASKS[0]))
        store.append(Episode("eval-before/t1/0", "eval-before/t1", TASKS[1], kind="eval"))
    assert asked(Store(tmp_path)) == {"t0": "say 0"}
