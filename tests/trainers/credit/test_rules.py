"""Credit rules against numbers worked by hand (no rule checks itself), then what must hold for any
rewards."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlora.agents.types import Reward, SettingError, Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.credit.group import leave_one_out
from marlora.trainers.credit.rules import COMPARING, RULES, blame, credit
from marlora.trainers.credit.weights import RULE_NAMES, CreditConfig

NAN = math.nan


def episode(id, reward=None, agents="a", group="g", **fields):
    """An episode whose agents speak in this order, with one team reward (None: no reward)."""
    turns = tuple(
        Turn(i, agent, token_ids=(1,), logprobs=(-1.0,)) for i, agent in enumerate(agents)
    )
    rewards = () if reward is None else (Reward("correct", reward),)
    return Episode(
        **{
            "id": str(id),
            "group": group,
            "task": Task("t", "?"),
            "turns": turns,
            "rewards": rewards,
            **fields,
        }
    )


def group(rewards, agents="a", name="g"):
    return [episode(f"{name}{i}", r, agents, name) for i, r in enumerate(rewards)]


def by_episode(found, episodes):
    """The advantage of each episode's first turn, 0 where it is not trained."""
    return [found.get((e.id, 0, 0), 0.0) for e in episodes]


def advantages(rule, rewards, **fields):
    episodes = group(rewards)
    return by_episode(credit(episodes, CreditConfig(credit=rule, **fields)), episodes)


def near(*values):
    return pytest.approx(values, abs=1e-6)


# the group rules, by hand: r (1,0,0,1) has mean .5 and unbiased std .577350


@pytest.mark.parametrize(
    ("rewards", "grpo", "rloo", "dr_grpo"),
    [
        (
            (1, 0, 0, 1),
            (0.865875, -0.865875, -0.865875, 0.865875),
            (2 / 3, -2 / 3, -2 / 3, 2 / 3),
            (0.5, -0.5, -0.5, 0.5),
        ),
        (
            (1, 0, 0, 0),
            (1.499700, -0.499900, -0.499900, -0.499900),
            (1, -1 / 3, -1 / 3, -1 / 3),
            (0.75, -0.25, -0.25, -0.25),
        ),
        (
            (0.2, 0.5, 0.9, 0.4),
            (-1.018703, 0, 1.358271, -0.339568),
            (-0.4, 0, 0.533333, -0.133333),
            (-0.3, 0, 0.4, -0.1),
        ),
        (
            (1, 0, NAN, 0),
            (1.154501, -0.577250, 0, -0.577250),
            (1, -0.5, 0, -0.5),
            (2 / 3, -1 / 3, 0, -1 / 3),
        ),
    ],
)
def test_group_rules(rewards, grpo, rloo, dr_grpo):
    assert advantages("grpo", rewards) == near(*grpo)
    assert advantages("rloo", rewards) == near(*rloo)
    assert advantages("dr_grpo", rewards) == near(*dr_grpo)
    assert advantages("grpo", rewards, scale_rewards="none") == near(*dr_grpo)


def test_epsilon_is_added_to_the_spread():
    assert advantages("grpo", (1, 0, 0, 1), advantage_epsilon=1e-6)[0] == pytest.approx(
        0.866024, abs=1e-6
    )
    assert max(advantages("grpo", (0.5, 0.5, 0.5, 0.5001))) == pytest.approx(0.5, abs=1e-3)


def test_the_batch_spread_is_over_all_rewards_and_the_mean_is_still_the_group_s():
    episodes = group((1, 0, 0, 1), name="g") + group((1, 0, 0, 0), name="h")
    found = by_episode(credit(episodes, CreditConfig(scale_rewards="batch")), episodes)
    assert found == near(
        0.965905, -0.965905, -0.965905, 0.965905, 1.448858, -0.482953, -0.482953, -0.482953
    )


@pytest.mark.parametrize("rule", ["grpo", "rloo", "dr_grpo", "dr_mas"])
@pytest.mark.parametrize("rewards", [(1,), (0.1, 0.1, 0.1), (1, NAN), (NAN, NAN)])
def test_a_constant_group_is_left_out(rule, rewards):
    found = credit(group(rewards), CreditConfig(credit=rule))
    assert found == {}


def test_every_taken_turn_shares_the_advantage_and_nothing_else_gets_one():
    first, second = group((1, 0), agents="aba")
    odd = (
        dataclasses.replace(first.turns[0], taken=False, sibling=1),
        dataclasses.replace(first.turns[1], saw_gold=True),
        dataclasses.replace(first.turns[2], source="written"),
    )
    first = dataclasses.replace(first, turns=(first.turns[0], *odd))
    found = credit([first, second], CreditConfig())
    assert set(found) == {("g0", 0, 0), ("g1", 0, 0), ("g1", 1, 0), ("g1", 2, 0)}
    assert any(found.values())
    assert found["g1", 0, 0] == found["g1", 2, 0] == -found["g0", 0, 0]


def test_failed_episodes_are_neither_trained_nor_counted():
    episodes = [*group((1, 0, 0)), episode("bad", 1.0, error="timeout"), episode("none")]
    assert by_episode(credit(episodes, CreditConfig(credit="dr_grpo")), episodes) == near(
        2 / 3, -1 / 3, -1 / 3, 0, 0
    )


# team, agent, turn


def test_team_reward_discounted_by_position():
    (one,) = group((1,), agents="abab")
    found = credit([one], CreditConfig(credit="team", discount=0.9))
    assert [found["g0", i, 0] for i in range(4)] == near(0.729, 0.81, 0.9, 1)
    assert set(credit([one], CreditConfig(credit="team")).values()) == {1.0}


@pytest.mark.parametrize(
    ("clock", "expected"),
    [
        ("global", (0.885700, 0.873000, 0.970000, 1.300000)),
        ("own", (0.820000, 1.170000, 0.800000, 1.300000)),
    ],
)
def test_returns_of_turns(clock, expected):
    """Planner speaks at 0 and 2, coder at 1 and 3; r (.1, 0, -.2, .3), R 1, discount .9."""
    turn_rewards = [Reward("step", r, turn=i) for i, r in enumerate((0.1, 0.0, -0.2, 0.3))]
    one = episode("e", agents="pcpc", rewards=(Reward("correct", 1.0), *turn_rewards))
    found = credit([one], CreditConfig(credit="turn", discount=0.9, turn_clock=clock))
    assert [found["e", i, 0] for i in range(4)] == near(*expected)


def test_returns_of_turns_need_a_reward_that_can_be_scored():
    some = [
        episode(
            "a", agents="ab", rewards=(Reward("step", 0.5, turn=1),)
        ),  # no team reward at all: it adds nothing
        episode("b", agents="ab", rewards=(Reward("step", NAN, turn=0), Reward("correct", 1.0))),
        episode("c", agents="ab"),
        episode("d", agents="ab", rewards=(Reward("step", 0.5, turn=1),), error="timeout"),
    ]
    assert credit(some, CreditConfig(credit="turn")) == {("a", 0, 0): 0.5, ("a", 1, 0): 0.5}


def test_agents_have_their_own_rewards_or_the_team_s():
    one = episode(
        "e",
        agents="abc",
        rewards=(
            Reward("correct", 1.0),
            Reward("tidy", 0.25, agent="a"),
            Reward("tidy", NAN, agent="c"),
        ),
    )
    assert credit([one], CreditConfig(credit="agent")) == {("e", 0, 0): 0.25, ("e", 1, 0): 1.0}


# rules for teams


def test_dr_mas_gives_every_agent_its_own_statistics():
    """Solver (1,1,0,1) and verifier (.2,.1,0,.3): pooled, the verifier would never be praised."""
    solver, verifier = (1, 1, 0, 1), (0.2, 0.1, 0, 0.3)
    episodes = [
        episode(
            f"e{i}", agents="sv", rewards=(Reward("own", s, agent="s"), Reward("own", v, agent="v"))
        )
        for i, (s, v) in enumerate(zip(solver, verifier, strict=True))
    ]
    found = credit(episodes, CreditConfig(credit="dr_mas", advantage_epsilon=1e-6))
    assert [found[f"e{i}", 0, 0] for i in range(4)] == near(0.499999, 0.499999, -1.499997, 0.499999)
    assert [found[f"e{i}", 1, 0] for i in range(4)] == near(
        0.387295, -0.387295, -1.161886, 1.161886
    )


def test_dr_mas_counts_turns_and_a_missing_agent_is_no_zero():
    """R (1,0,1,0), the agent called (1,3,2,0) times: rows (1,0,0,0,1,1), mean .5, A +-.912869."""
    episodes = [
        episode(f"e{i}", r, "s" + "a" * n)
        for i, (r, n) in enumerate([(1, 1), (0, 3), (1, 2), (0, 0)])
    ]
    found = credit(episodes, CreditConfig(credit="dr_mas", advantage_epsilon=1e-6))
    rows = {key: value for key, value in found.items() if key[1] > 0}
    assert len(rows) == 6 and ("e3", 1, 0) not in found
    assert all(
        value == pytest.approx(0.912869 if key[0] in ("e0", "e2") else -0.912869, abs=1e-6)
        for key, value in rows.items()
    )


SIBLINGS = (
    # weight of the team's reward, scaled?, advantages for team (1,0,1,0), own (.5,.2,-.5,.8)
    (1.0, "group", (1.347037, -0.987827, -0.449012, 0.089802)),
    (1.0, "none", (0.75, -0.55, -0.25, 0.05)),
    (0.5, "group", (1.050208, -0.630125, -1.050208, 0.630125)),
    (0.0, "group", (0.449012, -0.089802, -1.347037, 0.987827)),
)


def with_siblings(team_scores, own_scores, id="e"):
    turns = tuple(Turn(0, "a", sibling=k, taken=k == 0) for k in range(len(own_scores)))
    shared = [Reward("team", s, turn=0, sibling=k) for k, s in enumerate(team_scores)]
    own = [Reward("own", s, agent="a", turn=0, sibling=k) for k, s in enumerate(own_scores)]
    return episode(id, 1.0, turns=turns, rewards=(Reward("correct", 1.0), *shared, *own))


@pytest.mark.parametrize(("weight", "scale", "expected"), SIBLINGS)
def test_at_grpo_compares_and_trains_all_siblings(weight, scale, expected):
    one = with_siblings((1, 0, 1, 0), (0.5, 0.2, -0.5, 0.8))
    config = CreditConfig(
        credit="at_grpo", team_weight=weight, scale_rewards=scale, advantage_epsilon=1e-6
    )
    found = credit([one], config)
    assert [found["e", 0, k] for k in range(4)] == near(*expected)


def test_at_grpo_does_not_compare_different_states():
    """Two episodes whose only siblings agree within each: nothing to learn, although they differ
    from one another."""
    episodes = [with_siblings((1, 1), (0, 0), "e"), with_siblings((0, 0), (0, 0), "f")]
    assert credit(episodes, CreditConfig(credit="at_grpo")) == {}
    assert (
        credit(group((1, 0)), CreditConfig(credit="at_grpo")) == {}
    )  # no siblings, no scores of turns


def test_rae_compares_a_role_with_its_own_past():
    """Role rewards (1,-1), (1,-1), (-1,1), decay .95: A 1, .95, -1.0975; the baselines end at
    +-.042625."""
    games = [
        episode(
            f"e{i}",
            agents="xy",
            rewards=(Reward("win", r, agent="x"), Reward("win", -r, agent="y")),
        )
        for i, r in enumerate((1, 1, -1))
    ]
    state = {}
    found = credit(games, CreditConfig(credit="rae"), state)
    assert [found[f"e{i}", 0, 0] for i in range(3)] == near(1, 0.95, -1.0975)
    assert [found[f"e{i}", 1, 0] for i in range(3)] == near(-1, -0.95, 1.0975)
    assert sorted(state.values()) == near(-0.042625, 0.042625)


def test_rae_remembers_between_steps_and_only_what_it_saw():
    whole, parts = {}, {}
    config = CreditConfig(credit="rae", discount=0.5)
    games = [episode(f"e{i}", r, "xx") for i, r in enumerate((1.0, NAN, 0.5))]
    together = credit(reversed(games), config, whole)  # the order of arrival does not matter
    apart = {}
    for game in games:
        apart |= credit([game], config, parts)
    assert together == apart and whole == parts
    assert together == pytest.approx(
        {("e0", 0, 0): 0.5, ("e0", 1, 0): 1.0, ("e2", 0, 0): 0.225, ("e2", 1, 0): 0.45}
    )


def test_rae_decay_says_how_slowly_the_baseline_follows():
    """Rewards 1, 1, 0 with decay .5: baselines 0, .5, .75 before each, .375 after the last."""
    state = {}
    config = CreditConfig(credit="rae", rae_decay=0.5)
    found = credit([episode(f"e{i}", r) for i, r in enumerate((1.0, 1.0, 0.0))], config, state)
    assert [found[f"e{i}", 0, 0] for i in range(3)] == near(1, 0.5, -0.75)
    assert list(state.values()) == near(0.375)


def test_success_keeps_correct_episodes_whole():
    written = dataclasses.replace(
        episode("w", 1.0, "ab"), turns=(Turn(0, "a", source="written"), Turn(1, "b", saw_gold=True))
    )
    episodes = [
        episode("x", 1.0, "ab"),
        episode("y", 0.99, "ab"),
        episode("z", NAN),
        written,
        episode("f", 1.0, error="timeout"),
    ]
    found = credit(episodes, CreditConfig(credit="success"))
    assert found == {("x", 0, 0): 1.0, ("x", 1, 0): 1.0, ("w", 0, 0): 1.0}
    assert ("y", 0, 0) in credit(episodes, CreditConfig(credit="success", success_threshold=0.9))


def test_counterfactual_takes_what_replays_have_found():
    shown = [Reward("counterfactual", v, agent="a", turn=i) for i, v in ((0, 0.3), (2, -0.1))]
    one = episode("e", 0.8, "aba", rewards=(Reward("correct", 0.8), *shown))
    assert credit([one], CreditConfig(credit="counterfactual")) == {
        ("e", 0, 0): 0.3,
        ("e", 2, 0): -0.1,
    }
    # other rules do not mix them into the agent's reward
    assert credit([one], CreditConfig(credit="agent"))["e", 0, 0] == 0.8


def test_leave_one_out():
    assert leave_one_out((0.75, 0.25, 0.5)) == near(0.375, -0.375, 0)
    assert leave_one_out((0.75, 0.5, 0), (4, 2, 2)) == near(0.5, 0, -2 / 3)


# which rewards count


def test_format_is_apart_from_correctness():
    rewards = (Reward("correct", 1.0), Reward("format", 0.0), Reward("length", -0.5))
    one = episode("e", rewards=rewards)
    assert credit([one], CreditConfig(credit="team")) == {("e", 0, 0): 1.0}
    weights = {"correct": 1, "format": 0.5}
    assert credit([one], CreditConfig(credit="team", reward_weights=weights)) == {("e", 0, 0): 1.0}
    assert CreditConfig(reward_weights='{"correct": 2}').weight("correct") == 2.0


def test_nan_of_a_reward_without_weight_does_no_harm():
    one = episode("e", rewards=(Reward("correct", 1.0), Reward("format", NAN)))
    assert credit([one], CreditConfig(credit="team")) == {("e", 0, 0): 1.0}


def test_an_episode_that_lacks_a_reward_of_its_group_is_unscorable():
    """A judge that failed on one episode must not make it look worse by what the judge would have
    given."""
    complete = [
        episode(f"e{i}", rewards=(Reward("correct", r), Reward("judge", 0.5)))
        for i, r in enumerate((1.0, 0.0))
    ]
    torn = episode("e2", rewards=(Reward("correct", 1.0), Reward("my_judge_fn", NAN)))
    found = credit([*complete, torn], CreditConfig(credit="dr_grpo"))
    assert found == {("e0", 0, 0): 0.5, ("e1", 0, 0): -0.5}


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"credit": "gpro"}, "did you mean 'grpo'"),
        ({"scale_rewards": "std"}, "scale_rewards: expected one of group, batch, none"),
        ({"discount": 1.5}, "discount: expected a number from 0 to 1"),
        ({"reward_weights": ["correct"]}, "reward_weights: expected a number by reward name"),
        ({"reward_weights": {"correct": "high"}}, "reward_weights"),
        ({"reward_weights": "correct=1"}, "reward_weights: expected a mapping"),
    ],
)
def test_bad_settings_are_named(given_settings, message):
    with pytest.raises(SettingError, match=message):
        CreditConfig(**given_settings)


def test_weights_that_name_no_reward_and_twice_the_same_id_are_errors():
    with pytest.raises(SettingError, match=r"rewards given are \['correct'\]"):
        credit(group((1, 0)), CreditConfig(reward_weights={"corect": 1.0}))
    with pytest.raises(ValueError, match="same id"):
        credit([episode("e", 1.0), episode("e", 0.0)], CreditConfig())


# what must hold for any rewards

scores = st.lists(st.integers(-8, 8).map(lambda n: n / 8) | st.just(NAN), min_size=1, max_size=6)
centred = st.sampled_from(["grpo", "rloo", "dr_grpo", "dr_mas"])


@settings(max_examples=40, deadline=None)
@given(rewards=scores, rule=centred)
def test_centred_rules_sum_to_zero(rewards, rule):
    assert sum(advantages(rule, rewards)) == pytest.approx(0, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(rewards=scores, rule=centred, shift=st.integers(-3, 3))
def test_a_shift_of_all_rewards_changes_nothing(rewards, rule, shift):
    assert advantages(rule, [r + shift for r in rewards]) == pytest.approx(
        advantages(rule, rewards), abs=1e-9
    )


@settings(max_examples=40, deadline=None)
@given(rewards=scores, scale=st.sampled_from([0.5, 3.0]))
def test_a_scale_changes_nothing_only_with_the_spread(rewards, scale):
    scaled = [r * scale for r in rewards]
    assert advantages("grpo", scaled, advantage_epsilon=0.0) == pytest.approx(
        advantages("grpo", rewards, advantage_epsilon=0.0), abs=1e-9
    )
    assert advantages("dr_grpo", scaled) == pytest.approx(
        [a * scale for a in advantages("dr_grpo", rewards)], abs=1e-9
    )


@settings(max_examples=40, deadline=None)
@given(rewards=scores)
def test_a_failed_episode_beside_the_others_changes_nothing(rewards):
    episodes = group(rewards)
    alone, beside = (
        credit(episodes, CreditConfig()),
        credit([*episodes, episode("x", 1.0, error="gone")], CreditConfig()),
    )
    assert alone == beside


@settings(max_examples=40, deadline=None)
@given(data=st.data(), rule=st.sampled_from(sorted(RULES)))
def test_renaming_agents_permutes_credit_and_order_does_not_matter(data, rule):
    other = {"a": "b", "b": "a"}
    episodes, swapped = [], []
    for i in range(data.draw(st.integers(1, 4))):
        agents = data.draw(st.text("ab", min_size=1, max_size=4))
        values = data.draw(st.lists(st.integers(0, 4).map(lambda n: n / 4), min_size=4, max_size=4))
        rewards = [
            Reward("correct", values[0]),
            Reward("own", values[1], agent="a"),
            Reward("own", values[2], agent="b"),
        ]
        rewards += [
            Reward("step", values[3], turn=0),
            Reward("counterfactual", values[1], agent=agents[0], turn=0),
        ]
        episodes.append(episode(i, agents=agents, rewards=tuple(rewards)))
        named = tuple(dataclasses.replace(r, agent=other.get(r.agent)) for r in rewards)
        swapped.append(episode(i, agents="".join(other[a] for a in agents), rewards=named))
    config = CreditConfig(credit=rule)
    found = credit(episodes, config)
    assert credit(swapped, config) == pytest.approx(found)
    assert credit(reversed(episodes), config) == pytest.approx(found)
    assert all(math.isfinite(value) for value in found.values())


def test_the_settings_list_every_rule():
    assert set(RULE_NAMES) == set(RULES)


def winner_takes_all(batch, settings):
    """A rule of one's own: 1 for the turns of episodes above their group's mean."""
    mean = sum(batch.known_rewards) / len(batch.known_rewards)
    return {
        (e.id, t.index, 0): 1.0
        for e in batch.episodes
        for t in e.turns
        if batch.rewards[e.id] > mean
    }


def nowhere(batch, settings):
    return {("nobody", 0, 0): 1.0}


def without_end(batch, settings):
    return {(batch.episodes[0].id, 0, 0): NAN}


def test_a_rule_of_ones_own_is_named_by_module_and_function():
    assert advantages(f"{__name__}:winner_takes_all", (1, 0, 0, 1)) == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (f"{__name__}:nowhere", r"nowhere': gave 1\.0 to \('nobody', 0, 0\)"),
        (f"{__name__}:without_end", r"gave nan to \('g0', 0, 0\)"),
        (f"{__name__}:absent", "absent.*cannot be imported"),
        (f"{__name__}:NAN", "expected a function, found a float"),
        ("winner", "credit: expected one of team, agent"),
    ],
)
def test_a_wrong_rule_of_ones_own_is_refused(rule, message):
    with pytest.raises(SettingError, match=message):
        advantages(rule, (1, 0))


def test_an_agent_is_blamed_for_turns_that_fell_short():
    """a: A -.5 and .3, so .1; b: -.2 alone, its other turn has no advantage; c is praised."""
    turns = (Turn(0, "a"), Turn(1, "b"), Turn(2, "c"))
    episodes = [Episode(id, "g", Task("t", "?"), seed=0, turns=turns) for id in "xy"]
    advantages = {("x", 0, 0): -0.5, ("y", 0, 0): 0.3, ("x", 1, 0): -0.2, ("x", 2, 0): 0.4}
    assert blame(episodes, advantages) == {"a": pytest.approx(0.1), "b": 0.2, "c": 0.0}
    assert blame(episodes, {}) == {}
    assert set(COMPARING) == set(RULES) - {"team", "agent", "turn", "success"}
