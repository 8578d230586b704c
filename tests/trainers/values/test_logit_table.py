"""A table of logits: gradient and Adam by hand and against torch; it learns two edges, and does not
where nothing can be learnt."""

from __future__ import annotations

import json
import math
import random
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlora.agents.state import TeamState
from marlora.agents.testing import fake_team
from marlora.agents.types import Decision, Reward, SettingError, Task
from marlora.rollouts.types import Episode
from marlora.trainers.credit.decisions import decision_credit
from marlora.trainers.credit.weights import CreditConfig
from marlora.trainers.values.logit_table import LogitTable, log_softmax, logit, softmax

YES_NO = ("yes", "no")
EDGES = {"e1": YES_NO, "e2": YES_NO}


def edges(p1=0.5, p2=0.5, learning_rate=0.1, reference="no", **fields):
    """GPTSwarm's edges: one parameter each, P(yes) its sigmoid."""
    initial = {"e1": {"yes": logit(p1)}, "e2": {"yes": logit(p2)}}
    return LogitTable("edges", EDGES, learning_rate, initial=initial, reference=reference, **fields)


def graph(table, id, choices):
    """The decisions of an episode that chose so, with the table's log-probs."""
    drawn = {}
    for index, (name, choice) in enumerate(choices.items()):
        decision = Decision(index, name, tuple(table.logits[name]), choice, 0.0)
        logprob = table.logprob(decision)
        drawn[id, index] = Decision(index, name, decision.options, choice, logprob)
    return drawn


def two_graphs(table):
    """The graphs (1, 0) and (0, 1) of the method sheet."""
    return {
        **graph(table, "a", {"e1": "yes", "e2": "no"}),
        **graph(table, "b", {"e1": "no", "e2": "yes"}),
    }


def weighted(decisions, by_episode):
    return {key: by_episode[key[0]] for key in decisions}


def near(*values):
    return pytest.approx(values, abs=1e-6)


# GPTSwarm's sheet, unit-testable facts 1 to 6


def test_log_probs_of_two_graphs():
    table = edges(0.1, 0.5)
    assert logit(0.1) == pytest.approx(-2.197225, abs=1e-6)
    decisions = two_graphs(table)
    logprobs = [sum(d.logprob for (e, _), d in decisions.items() if e == id) for id in "ab"]
    assert logprobs == near(-2.995732, -0.798508)


@pytest.mark.parametrize(
    ("baseline", "loss", "ascent"),
    [
        (0, 1.597680, (0.4375, -0.1875)),
        (0.4, 0.838832, (0.2775, -0.1875)),
        (0.625, 0.411980, (0.1875, -0.1875)),
    ],
)
def test_loss_and_gradient_of_two_graphs(baseline, loss, ascent):
    table = edges(0.1, 0.5)
    decisions = two_graphs(table)
    weights = weighted(decisions, {"a": 1 - baseline, "b": 0.25 - baseline})
    gradient = table.gradient(weights, decisions)
    assert (-gradient["e1"]["yes"], -gradient["e2"]["yes"]) == near(*ascent)
    assert (gradient["e1"]["no"], gradient["e2"]["no"]) == (0, 0)
    assert table.update(weights, decisions)["loss"] == pytest.approx(loss, abs=1e-6)


def test_a_plain_gradient_step():
    for baseline, p1 in ((0, 0.104007), (0.4, 0.102525)):
        table = edges(0.1, 0.5)
        decisions = two_graphs(table)
        weights = weighted(decisions, {"a": 1 - baseline, "b": 0.25 - baseline})
        gradient = table.gradient(weights, decisions)
        for name, row in gradient.items():
            table.logits[name]["yes"] -= 0.1 * row["yes"]
        chances = table.probabilities()
        assert (chances["e1"]["yes"], chances["e2"]["yes"]) == near(p1, 0.495313)


@pytest.mark.parametrize(
    ("rate", "up", "down", "half_up", "half_down"),
    [(0.1, 0.109367, 0.091353, None, None), (0.4, 0.142189, 0.069317, 0.598688, 0.401312)],
)
def test_the_first_step_of_adam_moves_each_logit_by_the_learning_rate(
    rate, up, down, half_up, half_down
):
    for sign, of_first, of_second in ((1, up, half_down), (-1, down, half_up)):
        table = edges(0.1, 0.5, rate)
        decisions = graph(table, "a", {"e1": "yes", "e2": "no"})
        table.update(weighted(decisions, {"a": sign}), decisions)
        chances = table.probabilities()
        assert chances["e1"]["yes"] == pytest.approx(of_first, abs=1e-6)
        if of_second is not None:
            assert chances["e2"]["yes"] == pytest.approx(of_second, abs=1e-6)


UTILITIES = {("no", "no"): 0.0, ("yes", "no"): 1.0, ("no", "yes"): 0.2, ("yes", "yes"): 0.8}


def expected_utility(table):
    chances = table.probabilities()
    return sum(u * chances["e1"][a] * chances["e2"][b] for (a, b), u in UTILITIES.items())


def test_the_gradient_of_the_expected_utility():
    table = edges(0.3, 0.6)
    assert expected_utility(table) == pytest.approx(0.348, abs=1e-9)
    chances, decisions, weights = table.probabilities(), {}, {}
    for id, ((a, b), utility) in enumerate(UTILITIES.items()):
        drawn = graph(table, str(id), {"e1": a, "e2": b})
        decisions |= drawn
        # times 4: the gradient is a mean over the four graphs, the expectation a sum
        weights |= dict.fromkeys(drawn, 4 * chances["e1"][a] * chances["e2"][b] * utility)
    gradient = table.gradient(weights, decisions)
    assert (-gradient["e1"]["yes"], -gradient["e2"]["yes"]) == near(0.1596, 0.0192)


def test_a_skipped_edge_has_no_gradient():
    table = edges(0.5, 0.5)
    decisions = graph(table, "a", {"e1": "yes"})
    table.update(weighted(decisions, {"a": 1.0}), decisions)
    assert table.logits["e2"]["yes"] == 0 and table.logits["e1"]["yes"] == pytest.approx(0.1)


def test_36_edges_are_one_value():
    names = [f"{a}->{b}" for a in range(6) for b in range(6)]
    table = LogitTable("edges", dict.fromkeys(names, YES_NO), 0.1, reference="no")
    assert list(table.values()) == ["edges"] and list(table.values()["edges"]) == names


# softmax over several options, by hand


def test_the_gradient_of_a_softmax():
    """p = (1/2, 1/4, 1/4), A = 2, choice b: -2 ((0, 1, 0) - p) = (1, -1.5, 0.5)."""
    table = LogitTable("t", {"d": ("a", "b", "c")}, 0.1, initial={"d": {"a": math.log(2)}})
    decisions = graph(table, "e", {"d": "b"})
    assert softmax(table.logits["d"]) == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25})
    gradient = table.gradient({("e", 0): 2.0}, decisions)
    assert tuple(gradient["d"].values()) == near(1.0, -1.5, 0.5)
    done = table.update({("e", 0): 2.0}, decisions)
    assert done["loss"] == pytest.approx(2 * math.log(4))
    assert done["grad_norm"] == pytest.approx(math.sqrt(1 + 2.25 + 0.25))
    assert done["entropy"] == pytest.approx(1.5 * math.log(2))  # of the table before the step
    assert done["episodes"] == 1


def test_only_the_options_that_a_decision_had_are_moved():
    """Of (a, b, c) only a and c were offered: p = (1/2, 1/2) between them."""
    table = LogitTable("t", {"d": ("a", "b", "c")}, 0.1)
    decisions = {("e", 0): Decision(0, "d", ("a", "c"), "c", math.log(0.5))}
    assert table.gradient({("e", 0): 1.0}, decisions)["d"] == {"a": 0.5, "b": 0.0, "c": -0.5}


def test_the_mean_is_over_episodes_those_with_weight_0_included():
    table = edges()
    decisions = two_graphs(table)
    alone = {key: 1.0 for key in decisions if key[0] == "a"}
    both = {**alone, **{key: 0.0 for key in decisions if key[0] == "b"}}
    one, half = table.gradient(alone, decisions), table.gradient(both, decisions)
    assert half["e1"]["yes"] == one["e1"]["yes"] / 2 != 0


def test_the_order_of_the_episodes_does_not_matter():
    one, other = edges(0.1, 0.6), edges(0.1, 0.6)
    decisions = {}
    for i in range(20):
        choice = {"e1": YES_NO[i % 2], "e2": YES_NO[i % 3 % 2]}
        decisions |= graph(one, str(i), choice)
    weights = {key: math.sin(int(key[0]) + 1) for key in decisions}
    one.update(weights, decisions)
    other.update(dict(reversed(weights.items())), dict(reversed(decisions.items())))
    assert one.state_dict() == other.state_dict()


@given(st.lists(st.floats(-700, 700), min_size=2, max_size=5))
def test_log_softmax_agrees_with_torch(logits):
    ours = list(log_softmax(dict(zip("abcde", logits, strict=False))).values())
    theirs = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0)
    assert ours == pytest.approx(theirs.tolist(), abs=1e-10)


@pytest.mark.parametrize("reference", ["", "no"])
def test_thirty_steps_agree_with_torch_s_adam(reference):
    rng = random.Random(0)
    table = edges(0.2, 0.7, 0.05, reference)
    start = [[table.logits[e][o] for o in YES_NO] for e in EDGES]
    theirs = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([theirs], lr=0.05)
    fixed = torch.tensor([1.0, 0.0 if reference else 1.0], dtype=torch.float64)
    for step in range(30):
        decisions, weights, loss = {}, {}, 0.0
        for e in range(4):
            picks = [rng.randrange(2), rng.randrange(2)]
            drawn = graph(
                table, f"{step}/{e}", dict(zip(EDGES, [YES_NO[i] for i in picks], strict=True))
            )
            weight = rng.gauss(0, 1)
            decisions |= drawn
            weights |= dict.fromkeys(drawn, weight)
            logprobs = torch.log_softmax(theirs * fixed, 1)
            loss = loss - weight * sum(logprobs[k, i] for k, i in enumerate(picks)) / 4
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert table.update(weights, decisions)["loss"] == pytest.approx(loss.item(), abs=1e-12)
    ours = [[table.logits[e][o] for o in YES_NO] for e in EDGES]
    assert torch.allclose(
        theirs.detach() * fixed, torch.tensor(ours, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_a_table_begins_with_a_team_s_value():
    table, other = edges(0.5, 0.5), edges(0.3, 0.6)
    table.set_logits(other.values()["edges"])
    assert table.values() == other.values() and table.sha256() == other.sha256()
    table.set_logits({"e2": {"yes": 2}})
    assert table.logits == {"e1": other.logits["e1"], "e2": {"yes": 2.0, "no": 0.0}}
    with pytest.raises(SettingError, match="no decision 'e9' in this table"):
        table.set_logits({"e9": {"yes": 1.0}})


# learning, and its controls


def learn(table, seed, utilities, steps=200, batch=4):
    """REINFORCE with the batch's mean as baseline, through episodes and the credit rule."""
    rng = random.Random(seed)
    config = CreditConfig(credit="dr_grpo")
    for step in range(steps):
        state, episodes = TeamState(values=table.values()), []
        for k in range(batch):
            chances = table.probabilities()
            choices = {e: rng.choices(YES_NO, list(chances[e].values()))[0] for e in EDGES}
            id = f"{step}/{k}"
            reward = Reward("u", utilities(tuple(choices.values()), rng))
            drawn = tuple(graph(table, id, choices).values())
            episodes.append(
                Episode(
                    id, f"t{k}", Task(f"t{k}", "?"), state=state, decisions=drawn, rewards=(reward,)
                )
            )
        weights = decision_credit(episodes, config, across_tasks=True)
        table.update(weights, table.decisions(episodes))
    return table


def test_the_useful_edge_is_learnt_and_the_harmful_one_is_dropped():
    """The sheet's two-edge reference: its mean P is (.995, .015), its worst E[u] .9879."""
    tables = [learn(edges(), seed, lambda pair, rng: UTILITIES[pair]) for seed in range(3)]
    chances = [[t.probabilities()[e]["yes"] for e in EDGES] for t in tables]
    assert fmean(p[0] for p in chances) > 0.97 and fmean(p[1] for p in chances) < 0.06
    assert min(map(expected_utility, tables)) > 0.95


def test_random_utilities_teach_nothing():
    """Rewards drawn from the same four numbers whatever the graph: E[u] stays near its .5 on
    average."""

    def shuffled(pair, rng):
        return rng.choice(list(UTILITIES.values()))

    found = [expected_utility(learn(edges(), seed, shuffled)) for seed in range(6)]
    assert fmean(found) == pytest.approx(0.5, abs=0.2) and min(found) < 0.5


def test_equal_utilities_move_nothing():
    table = edges(0.3, 0.6)
    before = table.state_dict()["logits"]["e1"]["yes"]
    learn(table, 0, lambda pair, rng: 0.1 + 0.2, steps=5)
    assert table.logits["e1"]["yes"] == before
    assert table.state_dict()["adam"]["steps"] == 0


def test_learning_rate_0_moves_nothing():
    table = edges(0.3, 0.6, learning_rate=0)
    before = table.sha256()
    learn(table, 0, lambda pair, rng: UTILITIES[pair], steps=5)
    assert table.sha256() == before
    assert table.state_dict()["adam"]["steps"] == 4  # of 5: one batch said nothing


def test_choices_of_a_team_are_those_of_the_table():
    """`team.decide(..., table=)` draws and records by the value that the table gives."""
    table, drawn = edges(0.1, 0.9), []
    for seed in range(200):
        team = fake_team(["a"], lambda agent, messages: "", table.values(), seed=seed)
        for name in EDGES:
            team.decide(name, YES_NO, table="edges")
        state = TeamState(values=table.values())
        drawn.append(
            Episode(str(seed), "g", Task("t", "?"), state=state, decisions=tuple(team.decisions))
        )
    decisions = table.decisions(drawn)
    assert len(decisions) == 400
    shares = [
        fmean(d.choice == "yes" for d in decisions.values() if d.name == name) for name in EDGES
    ]
    assert shares == pytest.approx([0.1, 0.9], abs=0.07)  # three standard errors


# resume


def test_a_resumed_table_goes_on_bit_for_bit(tmp_path):
    whole = learn(edges(0.3, 0.6), 1, lambda pair, rng: UTILITIES[pair], steps=12)
    half = learn(edges(0.3, 0.6), 1, lambda pair, rng: UTILITIES[pair], steps=6)
    other = learn(edges(0.3, 0.6), 2, lambda pair, rng: UTILITIES[pair], steps=1)
    half.save(tmp_path)
    other.load(tmp_path)
    assert other.sha256() == half.sha256() and other.state_dict() == half.state_dict()
    decisions = two_graphs(half)
    weights = weighted(decisions, {"a": 0.3, "b": -0.7})
    half.update(weights, decisions)
    other.update(weights, decisions)
    assert other.state_dict() == half.state_dict() and other.sha256() != whole.sha256()
    moments = json.loads((tmp_path / "state.json").read_text(encoding="utf-8"))["adam"]
    assert moments["steps"] == 6 and moments["first"]["e1"]["yes"] != 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"e1": YES_NO},
            r"edges\.e2: this run's options are \[\], the checkpoint's \['yes', 'no'\]",
        ),
        (
            {"e1": ("yes", "never"), "e2": YES_NO},
            r"edges\.e1: this run's options are \['yes', 'never'\]",
        ),
        ({**EDGES, "e3": YES_NO}, r"edges\.e3: this run's options .*, the checkpoint's \[\]"),
    ],
)
def test_a_table_of_other_decisions_is_refused(tmp_path, options, message):
    edges().save(tmp_path)
    with pytest.raises(SettingError, match=message):
        LogitTable("edges", options, 0.1).load(tmp_path)


# what is refused


def episode(table, choices, values=None, logprob=None):
    drawn = graph(table, "e", choices).values()
    if logprob is not None:
        drawn = [Decision(d.index, d.name, d.options, d.choice, logprob) for d in drawn]
    state = TeamState(values=table.values() if values is None else values)
    return Episode("e", "g", Task("t", "?"), state=state, decisions=tuple(drawn))


def test_decisions_of_others_are_left_out():
    table, other = edges(), LogitTable("models", {"m": ("a", "b")}, 0.1)
    mixed = episode(table, {"e1": "yes", "e2": "no"})
    foreign = Decision(2, "m", ("a", "b"), "a", -123.0)
    mixed = Episode(
        "e", "g", Task("t", "?"), state=mixed.state, decisions=(*mixed.decisions, foreign)
    )
    assert list(table.decisions([mixed])) == [("e", 0), ("e", 1)]
    with pytest.raises(ValueError, match=r"log-prob -123\.0"):
        other.decisions([mixed])


def test_a_log_prob_that_the_episode_s_own_table_does_not_give_is_refused():
    """Issue 16, point 3: 462 of 1,594 decisions were drawn from another table than the recorded."""
    table, earlier = edges(0.5, 0.5), edges(0.1, 0.5)
    assert len(table.decisions([episode(table, {"e1": "yes"})])) == 1
    # the table has moved on since; the episode names the one that it was drawn from
    drawn = episode(earlier, {"e1": "yes"})
    assert len(table.decisions([drawn])) == 1
    with pytest.raises(
        ValueError, match=r"episode e, decision 0 \('e1'\): log-prob -2\.302585 .* gives -0\.693147"
    ):
        table.decisions([episode(earlier, {"e1": "yes"}, values=table.values())])
    with pytest.raises(ValueError, match="drawn from another table"):
        table.decisions([episode(earlier, {"e1": "yes"}, values={})])
    near_enough = math.log(0.5) + 9e-7
    assert len(table.decisions([episode(table, {"e1": "yes"}, logprob=near_enough)])) == 1
    with pytest.raises(ValueError, match="drawn from another table"):
        table.decisions([episode(table, {"e1": "yes"}, logprob=math.log(0.5) + 2e-6)])


def test_bad_weights_and_decisions_are_refused():
    table = edges()
    decisions = graph(table, "a", {"e1": "yes"})
    before = table.state_dict()["adam"]["steps"], table.sha256()
    with pytest.raises(ValueError, match=r"decision \('b', 0\) has a weight and is not among"):
        table.update({("b", 0): 1.0}, decisions)
    with pytest.raises(ValueError, match="weight nan of decision"):
        table.update({("a", 0): math.nan}, decisions)
    with pytest.raises(SettingError, match="no decision 'e9' in this table"):
        table.update({("a", 0): 1.0}, {("a", 0): Decision(0, "e9", YES_NO, "yes", -0.7)})
    with pytest.raises(ValueError, match=r"had the options \['maybe'\], which have no logit"):
        table.update({("a", 0): 1.0}, {("a", 0): Decision(0, "e1", ("yes", "maybe"), "yes", -0.7)})
    assert (table.state_dict()["adam"]["steps"], table.sha256()) == before
    assert table.update({}, decisions)["episodes"] == 0 and table.sha256() == before[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": {}}, "expected at least one decision"),
        ({"options": {"d": ("a",)}}, r"t\.d: expected at least two different options"),
        ({"options": {"d": ("a", "a")}}, "two different options"),
        ({"options": {"d": "ab"}}, "two different options"),
        ({"learning_rate": -0.1}, "expected a learning rate from 0, got -0.1"),
        ({"learning_rate": math.nan}, "expected a learning rate from 0, got nan"),
        ({"betas": (0.9, 1.0)}, r"below 1 .*, got \(0\.9, 1\.0\)"),
        ({"epsilon": 0.0}, "epsilon above 0"),
        ({"initial": {"x": {"a": 1.0}}}, "no decision 'x' in this table"),
        (
            {"initial": {"d": {"x": 1.0}}},
            r"t\.d: expected a finite logit for each of \['a', 'b'\], got 'x'",
        ),
        ({"initial": {"d": {"a": math.inf}}}, r"got 'a': inf"),
        ({"initial": {"d": {"b": 1.0}}, "reference": "b"}, "the reference option stays 0, got 1.0"),
    ],
)
def test_a_table_that_cannot_be_is_refused(fields, message):
    with pytest.raises(SettingError, match=message):
        LogitTable(**{"name": "t", "options": {"d": ("a", "b")}, "learning_rate": 0.1, **fields})


@pytest.mark.parametrize("probability", [0, 1, -0.1, 1.5])
def test_a_logit_is_of_a_probability_between_0_and_1(probability):
    with pytest.raises(SettingError, match="between 0 and 1"):
        logit(probability)
