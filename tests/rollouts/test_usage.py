"""The usage of an episode by policy, with numbers worked out by hand."""

from __future__ import annotations

from marlora.agents.types import Task, Turn, Usage
from marlora.rollouts.types import Episode
from marlora.rollouts.usage import total, usage_by_policy


def episode(*turns: Turn, **usage: Usage) -> Episode:
    return Episode("e", "g", Task("t", "?"), kind="trial", turns=turns, usage=usage)


def test_an_agent_with_two_policies_is_split_by_its_turns() -> None:
    turns = [
        Turn(0, "a", policy="p", usage=Usage(0, 30, 10, 1.0)),
        Turn(1, "a", policy="q", prompt_ids=(1,) * 10, token_ids=(2,) * 10),
        Turn(2, "b", policy="q", usage=Usage(1, 5, 5, 1.0)),
    ]
    whole = episode(*turns, a=Usage(2, 40, 20, 1.5), b=Usage(), c=Usage(calls=1))
    assert usage_by_policy(whole) == {
        ("trial", "a", "p"): Usage(1, 30, 10, 1.5),
        ("trial", "a", "q"): Usage(1, 10, 10, 0.0),
        ("trial", "c", ""): Usage(calls=1),
    }
    # the first turns were replayed: the agent's usage is less than its turns say
    part = usage_by_policy(episode(*turns, a=Usage(1, 21, 7, 1.5)))
    assert part["trial", "a", "p"] == Usage(1, 16, 4, 1.5)  # 21 x 3/4, 7 x 1/2, rounded
    assert part["trial", "a", "q"] == Usage(0, 5, 3, 0.0)


def test_turns_that_say_nothing_leave_all_to_the_first_policy() -> None:
    turns = [Turn(0, "a", policy="p"), Turn(1, "a", policy="q")]
    found = usage_by_policy(episode(*turns, a=Usage(2, 9, 9, 0.3, 0, 0.1)))
    assert found["trial", "a", "p"] == Usage(1, 9, 9, 0.3, 0, 0.1)
    assert found["trial", "a", "q"] == Usage(calls=1)


def test_siblings_are_samples_of_one_call() -> None:
    turns = [
        Turn(0, "a", sibling=k, policy="p", prompt_ids=(1,) * 8, token_ids=(2,) * 4)
        for k in range(3)
    ]
    turns.append(Turn(1, "a", policy="q", prompt_ids=(1,) * 6, token_ids=(2,) * 6))
    found = usage_by_policy(episode(*turns, a=Usage(2, 14, 18)))
    assert found["trial", "a", "p"] == Usage(1, 8, 12)
    assert found["trial", "a", "q"] == Usage(1, 6, 6)


def test_a_total_is_the_sum_of_every_number() -> None:
    assert total([]) == Usage()
    assert total([Usage(1, 2, 3, 0.5, 4, 0.25), Usage(10, 20, 30, 1.0, 40, 2.0)]) == Usage(
        11, 22, 33, 1.5, 44, 2.25
    )
