"""Which state was in force at which step, by hand: how stale an episode is, and what is too old to
be learnt from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from marlora.agents.state import TeamState
from marlora.agents.types import Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.errors import RunError
from marlora.trainers.weight_sync.team_states import TeamStates

TASK = Task("t", "a prompt", "42")


def episode(
    versions: Mapping[str, str],
    *turns: tuple[str, str, int],
    values: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Episode:
    """`turns`: (policy, the version that spoke, sampled tokens)."""
    spoken = [
        Turn(
            n,
            policy,
            policy=policy,
            version=version,
            token_ids=(7,) * count,
            logprobs=(-1.0,) * count,
        )
        for n, (policy, version, count) in enumerate(turns)
    ]
    return Episode(
        "e", "g", TASK, state=TeamState(versions, values or {}), turns=tuple(spoken), **fields
    )


def test_states_of_the_last_steps_are_known_and_older_ones_forgotten() -> None:
    team = TeamStates(2)
    states = [TeamState({"a": f"a-v{step}"}) for step in range(5)]
    for step, state in enumerate(states):
        team.put(step, state)
    assert team.of == {2: states[2], 3: states[3], 4: states[4]} and team.newest == states[4]
    assert [team.age(episode({"a": f"a-v{step}"})) for step in (4, 3, 2, 1, 0)] == [
        0,
        1,
        2,
        None,
        None,
    ]
    assert [team.named(ahead) for ahead in (0, 1, 2)] == states[2:]
    known = {3: TeamState({"a": "x"}), 4: TeamState({"a": "y"})}
    assert TeamStates(0, known).named(0) == TeamState({"a": "y"})


def test_a_version_that_stayed_is_as_young_as_its_last_step() -> None:
    """Step 3 changed nothing (not finite): what the version of step 2 plays is not behind."""
    team = TeamStates(1)
    for step, name in ((1, "v1"), (2, "v2"), (3, "v2")):
        team.put(step, TeamState({"a": name}))
    assert team.age(episode({"a": "v2"})) == 0 and team.age(episode({"a": "v1"})) is None


def test_a_young_run_is_played_by_what_there_is() -> None:
    team, first, second = TeamStates(2), TeamState(), TeamState({"a": "v1"})
    team.put(0, first)
    assert [team.named(ahead) for ahead in (0, 1, 2)] == [first] * 3
    team.put(1, second)
    assert [team.named(ahead) for ahead in (0, 1, 2)] == [first, first, second]


def test_too_old_or_with_a_foreign_turn_is_refused_at_consumption() -> None:
    team = TeamStates(1)
    for step in range(4):
        team.put(step, TeamState({"a": f"a-v{step}", "b": f"b-v{step}"}))
    fresh, late = {"a": "a-v3", "b": "b-v3"}, {"a": "a-v2", "b": "b-v2"}
    right = [
        episode(fresh, ("a", "a-v3", 1), ("b", "b-v3", 1)),
        episode(late, ("a", "a-v2", 1), ("base", "", 1)),
    ]
    assert team.ages(right) == [0, 1]
    assert team.ages([episode({"a": "a-v2"}, ("a", "a-v2", 2), parent="p")]) == [1], (
        "a child names the policies that spoke in it"
    )
    with pytest.raises(RunError, match="more than max_staleness 1 states behind"):
        team.ages([episode({"a": "a-v1", "b": "b-v1"})])
    with pytest.raises(RunError, match="more than max_staleness 1"):
        team.ages([episode({"a": "a-v3", "b": "b-v2"})])  # never in force together
    mixed = episode(late, ("a", "a-v2", 1), ("b", "b-v3", 1))
    with pytest.raises(RunError, match=r"turn 1: spoken by 'b-v3'.*an episode keeps its version"):
        team.ages([mixed])
    team.pin = "call"
    assert team.ages([mixed, *right]) == [1, 0, 1], "as old as what it began with"
    for foreign in (("b", "b-v2", 1), ("b", "", 1), ("a", "b-v3", 1)):
        with pytest.raises(
            RunError, match=r"turn 0: spoken by .*a turn is as young as its episode"
        ):
            team.ages([episode(fresh, foreign)])


def test_values_are_as_stale_as_adapters() -> None:
    """The adapter stays; the table of logits changes at each step."""
    team = TeamStates(1)
    tables = [{"edges": {"e": {"on": float(step), "off": 0.0}}} for step in range(4)]
    for step, table in enumerate(tables):
        team.put(step, TeamState({"a": "a-v1"}, table))
    versions = {"a": "a-v1"}
    assert team.ages(
        [episode(versions, values=tables[3]), episode(versions, values=tables[2])]
    ) == [0, 1]
    for old in (tables[1], tables[0], {}):
        with pytest.raises(RunError, match="more than max_staleness 1 states behind"):
            team.ages([episode(versions, values=old)])
    child = episode(versions, ("a", "a-v1", 1), values=tables[2], parent="p")
    assert team.ages([child]) == [1], "a child names all values of its parent's state"
    with pytest.raises(RunError, match="more than max_staleness 1 states behind"):
        team.ages([episode(versions, ("a", "a-v1", 1), values=tables[1], parent="p")])


def test_values_that_came_back_are_as_young_as_their_last_step() -> None:
    team = TeamStates(2)
    for step, prompt in enumerate(["A", "B", "A"]):
        team.put(step, TeamState({}, {"a.prompt": prompt}))
    assert team.ages([episode({}, values={"a.prompt": p}) for p in "AB"]) == [0, 1]
