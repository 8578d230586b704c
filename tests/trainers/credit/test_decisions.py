"""Credit for decisions: the rules for turns, over decisions; numbers by hand."""

from __future__ import annotations

import math

import pytest

from marlora.agents.types import Decision, Reward, SettingError, Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.credit.decisions import decision_credit
from marlora.trainers.credit.rules import credit
from marlora.trainers.credit.weights import CreditConfig


def episode(id, reward, names=("x", "y"), group="g", **fields):
    """An episode with a turn and a decision of each name, and one team reward (None: none)."""
    decisions = tuple(
        Decision(i, name, ("yes", "no"), "yes", math.log(0.5)) for i, name in enumerate(names)
    )
    given = () if reward is None else (Reward("correct", reward),)
    turns = (Turn(0, "solver", token_ids=(1,), logprobs=(-1.0,)),)
    extra = fields.pop("rewards", ())
    return Episode(
        str(id),
        group,
        Task(group, "?"),
        turns=turns,
        decisions=decisions,
        rewards=given + extra,
        **fields,
    )


def group(rewards, name="g", **fields):
    return [episode(f"{name}{i}", reward, group=name, **fields) for i, reward in enumerate(rewards)]


def weights(rule, episodes, across_tasks=False, **settings):
    return decision_credit(
        episodes, CreditConfig(credit=rule, **settings), across_tasks=across_tasks
    )


def of_first(found, episodes):
    return [found.get((e.id, 0)) for e in episodes]


def near(*values):
    return pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("grpo", (1.499700, -0.499900, -0.499900, -0.499900)),
        ("rloo", (1, -1 / 3, -1 / 3, -1 / 3)),
        ("dr_grpo", (0.75, -0.25, -0.25, -0.25)),
        ("dr_mas", (1.499700, -0.499900, -0.499900, -0.499900)),
        ("agent", (1, 0, 0, 0)),
    ],
)
def test_every_decision_has_its_episode_s_weight(rule, expected):
    episodes = group((1, 0, 0, 0))
    found = weights(rule, episodes)
    assert of_first(found, episodes) == near(*expected)
    assert set(found) == {(e.id, i) for e in episodes for i in (0, 1)}
    assert all(found[e.id, 0] == found[e.id, 1] for e in episodes)


def test_group_rules_compare_the_episodes_of_one_task():
    episodes = group((1, 0), "easy") + group((0.5, 0.1), "hard")
    assert of_first(weights("dr_grpo", episodes), episodes) == near(0.5, -0.5, 0.2, -0.2)


def test_across_tasks_the_baseline_is_the_batch_s_mean():
    """GPTSwarm's batch: one graph per task; utilities 1 and .25 have the mean .625."""
    episodes = group((1,), "a") + group((0.25,), "b")
    assert of_first(weights("dr_grpo", episodes), episodes) == [0, 0]  # a group of one says nothing
    assert of_first(weights("dr_grpo", episodes, across_tasks=True), episodes) == near(
        0.375, -0.375
    )
    assert of_first(weights("rloo", episodes, across_tasks=True), episodes) == near(0.75, -0.75)


def test_decisions_are_discounted_as_turns_are():
    found = weights("team", [episode("e", 0.8, "xyz")], discount=0.5)
    assert [found["e", i] for i in range(3)] == near(0.2, 0.4, 0.8)


def test_without_a_baseline_the_weight_is_the_reward():
    episodes = group((1, 0.25))
    assert of_first(weights("team", episodes), episodes) == near(1, 0.25)


def test_rewards_about_a_decision_count_and_those_about_a_turn_do_not():
    """Ret_0 = .5 + 1 + .25 = 1.75, Ret_1 = 1 + .25."""
    about = (
        Reward("judge", 0.5, decision=0),
        Reward("judge", 1.0, decision=1),
        Reward("judge", 100.0, turn=0),
    )
    found = weights("turn", [episode("e", 0.25, rewards=about)])
    assert [found["e", 0], found["e", 1]] == near(1.75, 1.25)


def test_a_reward_about_a_decision_is_not_the_team_s():
    about = (Reward("correct", 7.0, decision=0),)
    episodes = [episode("a", 1.0, rewards=about), episode("b", 0.0)]
    assert of_first(weights("dr_grpo", episodes), episodes) == near(0.5, -0.5)
    of_turns = credit(episodes, CreditConfig(credit="dr_grpo"))
    assert of_turns == {("a", 0, 0): 0.5, ("b", 0, 0): -0.5}
    own = credit(episodes, CreditConfig(credit="agent"))
    assert own == {("a", 0, 0): 1.0, ("b", 0, 0): 0.0}
    whole = (Reward("judge", 1.0, turn=0), Reward("correct", 7.0, decision=0))
    alone = credit([episode("c", None, rewards=whole)], CreditConfig(credit="turn"))
    assert alone == {("c", 0, 0): 1.0}


def test_an_agent_s_reward_is_that_of_the_decision_of_its_name():
    own = (Reward("own", 0.2, agent="y"),)
    found = weights("agent", [episode("e", 1.0, rewards=own)])
    assert [found["e", 0], found["e", 1]] == near(1.0, 0.2)


def test_failed_and_unscored_episodes_give_none():
    episodes = [*group((1, 0, math.nan, None)), episode("failed", 1.0, error="the system raised")]
    found = weights("dr_grpo", episodes)
    assert of_first(found, episodes) == [0.5, -0.5, None, None, None]
    assert {id for id, _ in found} == {"g0", "g1"}


@pytest.mark.parametrize("rule", ["grpo", "rloo", "dr_grpo", "dr_mas"])
def test_a_group_that_says_nothing_has_weight_0(rule):
    episodes = group((0.1 + 0.2, 0.3), "same") + group((1, 0), "other")
    assert of_first(weights(rule, episodes), episodes)[:2] == [0, 0]
    assert of_first(weights(rule, episodes), episodes)[2] > 0


def test_success_keeps_the_decisions_of_correct_episodes():
    episodes = group((1, 0.9, 0))
    assert weights("success", episodes) == {("g0", 0): 1.0, ("g0", 1): 1.0}


def test_counterfactual_rewards_of_decisions():
    own = (Reward("counterfactual", -0.4, decision=1),)
    assert weights("counterfactual", [episode("e", 1.0, rewards=own)]) == {("e", 1): -0.4}


def test_a_rule_that_remembers_keeps_its_baseline():
    state = {}
    config = CreditConfig(credit="rae", rae_decay=0.5)
    first = decision_credit([episode("a", 1.0, "x")], config, state)
    second = decision_credit([episode("b", 1.0, "x")], config, state)
    assert (first, second) == ({("a", 0): 1.0}, {("b", 0): 0.5})


def test_an_episode_without_decisions_gives_none():
    assert weights("dr_grpo", group((1, 0), names=())) == {}


@pytest.mark.parametrize("kind", ["trial", "aside", "eval"])
def test_only_training_episodes_are_learnt_from(kind):
    with pytest.raises(ValueError, match=f"episode b: its kind is '{kind}'; only .* 'train'"):
        weights("grpo", [episode("a", 1.0), episode("b", 0.0, kind=kind)])


def test_at_grpo_is_refused():
    with pytest.raises(SettingError, match="credit: at_grpo compares several answers to one call"):
        weights("at_grpo", group((1, 0)))
