"""Which pairs are made of episodes, and which rows TRL gets."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from marlora.agents.types import Message, Reward, SettingError, Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.credit.pairs import Pair, PairConfig, agent_pairs, pairs_of


def turn(index: int, agent: str, prompt: str, reply: int, **fields: Any) -> Turn:
    ids = tuple(map(ord, prompt))
    given: dict[str, Any] = {
        "messages": (Message("user", prompt),),
        "prompt_ids": ids,
        "token_ids": (reply, 1),
        "text": str(reply),
    }
    return Turn(index, agent, **{**given, **fields})


def episode(
    name: str, reward: float | None, *turns: Turn, task: str = "t", **fields: Any
) -> Episode:
    rewards = () if reward is None else (Reward("r", reward),)
    said = turns or (turn(0, "solver", "2+2?", ord(name[-1])),)
    return Episode(
        name, f"step-1/{task}", Task(task, "2+2?"), turns=said, rewards=rewards, **fields
    )


def names(pairs: list[Pair]) -> list[tuple[str, str, float]]:
    return [(p.chosen[0].id, p.rejected[0].id, p.gap) for p in pairs]


def test_every_two_episodes_of_a_task_that_differ_in_score_make_a_pair() -> None:
    found = pairs_of(
        [episode("a", 1.0), episode("b", 0.0), episode("c", 0.5), episode("d", 1.0)],
        PairConfig(),
        seed=0,
    )
    assert names(found) == [
        ("a", "b", 1.0),
        ("a", "c", 0.5),
        ("c", "b", 0.5),
        ("d", "b", 1.0),
        ("d", "c", 0.5),
    ]  # a and d tie
    assert all(p.weight == 1.0 and p.episodes == p.chosen + p.rejected for p in found)


def test_near_ties_are_dropped_by_the_threshold() -> None:
    episodes = [episode("a", 1.0), episode("b", 0.0), episode("c", 0.5)]
    assert names(pairs_of(episodes, PairConfig(min_gap=0.5), seed=0)) == [("a", "b", 1.0)]
    assert pairs_of(episodes, PairConfig(min_gap=1.0), seed=0) == []


def test_tasks_are_not_compared_but_steps_are() -> None:
    later = dataclasses.replace(episode("b", 0.0), group="step-9/t")
    assert names(
        pairs_of([episode("a", 1.0), later, episode("c", 0.0, task="other")], PairConfig(), seed=0)
    ) == [("a", "b", 1.0)]


def test_what_failed_has_no_score_is_a_child_or_says_the_same_makes_no_pair() -> None:
    twin = episode("x", 0.25, turn(0, "solver", "2+2?", ord("a")))
    odd = [
        episode("b", math.nan),
        episode("c", None),
        episode("d", 0.0, error="boom"),
        episode("e", 0.0, parent="a"),
        twin,
    ]
    assert pairs_of([episode("a", 1.0), *odd], PairConfig(), seed=0) == []


def test_only_rewards_with_a_weight_count() -> None:
    polite = dataclasses.replace(
        episode("a", 0.0), rewards=(Reward("r", 0.0), Reward("polite", 1.0))
    )
    plain = dataclasses.replace(
        episode("b", 1.0), rewards=(Reward("r", 1.0), Reward("polite", 0.0))
    )
    assert names(pairs_of([polite, plain], PairConfig(reward_weights={"polite": 2.0}), seed=0)) == [
        ("a", "b", 2.0)
    ]


def test_a_cap_draws_pairs_by_the_seed() -> None:
    episodes = [episode(c, float(i), task=t) for t in ("s", "t") for i, c in enumerate("abcdef")]
    config = PairConfig(max_pairs_per_task=4)
    one, again, other = (names(pairs_of(episodes, config, seed)) for seed in (1, 1, 2))
    assert one == again != other and len(one) == len(other) == 8
    assert set(one) <= set(names(pairs_of(episodes, PairConfig(), 0)))
    assert [pair.chosen[0].task.id for pair in pairs_of(episodes, config, 1)] == ["s"] * 4 + [
        "t"
    ] * 4


@pytest.mark.parametrize(
    "settings", [{"min_gap": -1.0}, {"min_gap": math.inf}, {"max_pairs_per_task": -1}]
)
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(
        SettingError, match=f"{next(iter(settings))}: expected (a number from 0|at least 0), got"
    ):
        PairConfig(**settings)


def test_rows_for_trl_are_replies_to_one_prompt() -> None:
    """The solver's first turns answer the same question; the critic read different drafts; the
    solver's last turn is missing once."""
    chosen = episode(
        "w",
        1.0,
        turn(0, "solver", "2+2?", 4),
        turn(1, "critic", "4?", 9),
        turn(2, "solver", "2+2?49", 4),
    )
    rejected = episode("l", 0.0, turn(0, "solver", "2+2?", 5), turn(1, "critic", "5?", 8))
    rows, dropped = agent_pairs([Pair((chosen,), (rejected,), 1.0)], ["solver", "critic"])
    assert rows == [
        {
            "prompt": [{"role": "user", "content": "2+2?"}],
            "chosen": [{"role": "assistant", "content": "4"}],
            "rejected": [{"role": "assistant", "content": "5"}],
            "prompt_ids": [50, 43, 50, 63],
            "chosen_ids": [4, 1],
            "rejected_ids": [5, 1],
        }
    ]
    assert dropped == {
        ("critic", "was asked different things"): 1,
        ("solver", "spoke in one episode only"): 1,
    }
    assert agent_pairs([Pair((chosen,), (rejected,), 1.0)], ["critic"])[0] == []


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ({"reply": 4}, {"reply": 4}, "said the same"),
        ({"reply": 4, "saw_gold": True}, {"reply": 5}, "saw the answer"),
        ({"reply": 4}, {"reply": 5, "token_ids": ()}, "no tokens"),
    ],
)
def test_rows_that_teach_nothing_or_too_much_are_dropped(
    chosen: dict[str, Any], rejected: dict[str, Any], reason: str
) -> None:
    sides = [
        (episode(name, 1.0, turn(0, "solver", "2+2?", **how)),)
        for name, how in (("w", chosen), ("l", rejected))
    ]
    assert agent_pairs([Pair(sides[0], sides[1], 1.0)], ["solver"]) == ([], {("solver", reason): 1})
