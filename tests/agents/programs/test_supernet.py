"""The supernet: what is drawn (unit facts 3 to 6 of MaAS's method sheet), what is asked, and what
comes out."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest

from marlora.agents.programs.chooser import packed
from marlora.agents.programs.supernet import EXIT, VALUE, Supernet, activate, layers_of, softmax
from marlora.agents.testing import fake_team
from marlora.agents.types import AgentSpec, Message, SettingError, Task
from tests.conformance import check_system

TASK = Task("t", "What is 2 + 2?", "4")
SCORES = {"1": 0.9, "2": 0.5, "3": 0.1, "4": -0.2}


class Told:
    """A team that decides what it is told, and remembers with what chance."""

    def __init__(self, choices: Sequence[str]) -> None:
        self.choices, self.logprob = list(choices), 0.0

    def decide(self, name: str, options: Sequence[str], *, logits: dict[str, float]) -> str:
        choice = self.choices.pop(0)
        self.logprob += math.log(softmax({o: logits[o] for o in options})[choice])
        return choice


def chance(order: Sequence[str]) -> tuple[tuple[str, ...], float]:
    """What is active if draws go in this order, and the log-prob of that."""
    team: Any = Told(order)
    active = activate(team, "layer1", SCORES, softmax(SCORES), 0.3)
    return tuple(active), team.logprob


# drawing


def test_probabilities_of_scores() -> None:
    """Fact 3, and what the threshold makes of it without chance."""
    expected = [0.407744, 0.273319, 0.183211, 0.135726]
    assert list(softmax(SCORES).values()) == pytest.approx(expected, abs=1e-6)
    team = fake_team(["a"], lambda *_: "")
    team.greedy = True
    assert activate(team, "layer1", SCORES, softmax(SCORES), 0.3) == ["1"]
    assert activate(team, "layer1", SCORES, softmax(SCORES), 0.7) == ["1", "2", "3"]


def test_chances_of_the_sets_that_are_drawn() -> None:
    """Fact 4: draws without replacement until the probabilities sum to .3."""
    sequences = dict(chance(order) for order in itertools.permutations(SCORES))
    sets: dict[str, float] = {}
    for active, logprob in sequences.items():
        key = "".join(sorted(active))
        sets[key] = sets.get(key, 0.0) + math.exp(logprob)
    expected = {"1": 0.407744, "12": 0.153360, "23": 0.130216, "24": 0.093971}
    expected |= {"13": 0.091460, "14": 0.064032, "34": 0.059216}
    assert sets == pytest.approx(expected, abs=1e-6)
    size = sum(len(active) * math.exp(logprob) for active, logprob in sequences.items())
    assert size == pytest.approx(1.592256, abs=1e-6)


def test_a_log_prob_is_that_of_the_draws() -> None:
    """Fact 5 has log p of {2, 3} as the sum of log pi, -2.994232, which is no log-prob of that set:
    in both orders the draws are likelier."""
    pi = softmax(SCORES)
    assert chance("1234") == (("1",), pytest.approx(-0.897116, abs=1e-6))
    assert math.log(pi["2"]) + math.log(pi["3"]) == pytest.approx(-2.994232, abs=1e-6)
    in_order = math.log(pi["2"]) + math.log(pi["3"] / (1 - pi["2"]))
    assert chance("2341") == (("2", "3"), pytest.approx(in_order))
    both = math.exp(chance("2341")[1]) + math.exp(chance("3241")[1])
    assert both == pytest.approx(0.130216, abs=1e-6)


def test_why_scores_are_no_cosines() -> None:
    """Fact 6: what the softmax of 8 cosines can be at most; our scores have no bound."""
    others = [str(n) for n in range(7)]
    best = softmax({"best": 1.0, **dict.fromkeys(others, -1.0)})["best"]
    alone = softmax({"best": 1.0, **dict.fromkeys(others, 0.0)})["best"]
    assert (best, alone) == pytest.approx((0.513519, 0.279708), abs=1e-6)
    assert softmax({"best": 8.0, **dict.fromkeys(others, 0.0)})["best"] > 0.99


def supernet(operators: Any = ("generate", "ensemble", "self_refine"), **settings: Any) -> Supernet:
    return Supernet(["solver", "judge"], operators=operators, layers=2, **settings)


def weights(system: Supernet, **biases: Sequence[float]) -> dict[str, str]:
    """Weights with which a layer's scores are these, whatever the query."""
    found = {}
    for name, sizes in system.shape.tensors.items():
        layer = f"layer{name.partition('.')[0]}"
        given = biases[layer] if name.endswith("score.bias") else [0.0] * math.prod(sizes)
        found[name] = packed(given)
    return found


def test_what_each_layer_chooses_from() -> None:
    system = supernet()
    assert system.options(1) == ("generate",)  # the others need a solution
    assert system.options(2) == ("generate", "ensemble", "self_refine", EXIT)
    assert EXIT not in supernet(early_exit=False).options(2)


def test_early_exit_ends_the_layer_and_the_system() -> None:
    system = supernet(["generate", "answer_generate", "ensemble"], threshold=0.9)
    scores = weights(system, layer1=[0, 0, 0, 0], layer2=[2.0, -9, -9, 1.9])
    team = fake_team(system.specs, lambda *_: "4", {VALUE: scores})
    team.greedy = True
    assert system.draw("q", team) == [["generate", "answer_generate"], ["generate", EXIT]]
    assert layers_of(team.decisions) == [["generate", "answer_generate"], ["generate", EXIT]]
    assert [d.name for d in team.decisions] == ["layer1", "layer1", "layer2", "layer2"]


def test_the_controller_sees_the_query_and_earlier_layers() -> None:
    system = supernet(["generate", "ensemble"])
    query, first = system.inputs("q", []), system.inputs("q", [["generate", "ensemble"]])
    size = system.shape.features
    assert first[:size] == query and len(first) == 2 * size
    apart = [system.inputs("q", [[name]])[size:] for name in ("generate", "ensemble")]
    assert first[size:] == pytest.approx([a + b for a, b in zip(*apart, strict=True)])
    assert system.inputs("another", [])[:size] != query
    told = supernet(["generate", "ensemble"], profiles={"generate": "one quick answer"})
    assert told.inputs("q", [["generate"]])[size:] != apart[0]


# playing


def played(system: Supernet, answer: Any, *scores: Sequence[float]) -> Any:
    """(output, team) of a greedy episode with these scores by layer."""
    values = {VALUE: weights(system, **{f"layer{n}": s for n, s in enumerate(scores, 1)})}
    team = fake_team(system.specs, answer, values)
    team.greedy = True
    return asyncio.run(system.run(TASK, team)), team


def test_a_layer_reads_the_solutions_of_the_one_before() -> None:
    system = supernet(["generate", "answer_generate", "ensemble"], executors={"ensemble": "judge"})
    seen: list[tuple[str, str]] = []

    def answer(agent: str, messages: tuple[Message, ...]) -> str:
        seen.append((agent, messages[-1].content))
        if agent == "judge":
            return "B"
        return "Answer: 5" if len(seen) == 1 else "Answer: 4"

    first = [1.0, 0.99, 0, 0]  # of generate, answer_generate, ensemble and early exit
    system.threshold = 0.7
    output, team = played(system, answer, first, [0, 0, 9.0, 0])
    assert str(output) == "4" and [agent for agent, _ in seen] == ["solver", "solver", "judge"]
    assert "A: 5" in seen[2][1] and "B: 4" in seen[2][1]
    names = [operation.name for operation in team.operations]
    assert names == ["layer1.generate", "layer1.answer_generate", "layer2.ensemble"]
    generate, reason, ensemble = team.operations
    assert team.turns[2].reads == (generate.index, reason.index)
    assert reason.index in ensemble.reads and team.turns[2].index in ensemble.reads
    assert generate.reads == (team.turns[0].index,)


def test_a_refinement_ends_when_the_review_is_content() -> None:
    system = supernet(["generate", "self_refine"])
    replies = ["5", "It is 4.", "4", "RIGHT"]
    output, team = played(system, lambda *_: replies.pop(0), [0, 0, 0], [0, 9.0, 0])
    assert str(output) == "4" and not replies
    asked = [turn.messages[-1].content for turn in team.turns]
    assert "Check it" in asked[1] and "A review of it:\n\nIt is 4." in asked[2]
    assert "A solution:\n\n4" in asked[3]


def test_votes_are_drawn_at_their_own_temperature() -> None:
    solver = AgentSpec("solver")
    system = Supernet([solver], operators=["self_consistency"], layers=1)
    replies = ["4", "5", "4", "6", "5"]  # 4 and 5 twice each: the first one
    team = fake_team(system.specs, lambda *_: replies.pop(0))
    assert str(asyncio.run(system.run(TASK, team))) == "4"
    assert [turn.sampling.temperature for turn in team.turns if turn.sampling] == [1.0] * 5
    assert len({turn.sampling.seed for turn in team.turns if turn.sampling}) == 5


def test_an_operator_that_fails_gives_no_solution() -> None:
    system = supernet(["generate", "ensemble"], executors={"ensemble": "judge"})

    def answer(agent: str, messages: tuple[Message, ...]) -> str:
        return "nobody" if agent == "judge" else "4"

    output, team = played(system, answer, [0, 0, 0], [0, 9.0, 0])
    assert str(output) == "4"  # that of the layer before
    assert "nobody chose one of 1 solutions" in team.operations[1].error
    system = supernet(["generate", "ensemble"])
    output, team = played(system, lambda *_: " ", [0, 0, 0], [0, 0, 9.0])
    assert str(output) == "" and team.operations[0].error == "an empty solution"


def test_one_operator_by_several_names() -> None:
    system = Supernet(
        ["a", "b"],
        operators={"short": "generate", "long": "generate", "check": "self_refine"},
        prompts={"short": "{problem} In a word!", "review": "{solution}?"},
        executors={"long": "b"},
        layers=1,
        threshold=0.9,
    )
    team = fake_team(system.specs, lambda *_: "4")
    assert system.options(1) == ("short", "long")
    asyncio.run(system.run(TASK, team))
    asked = {turn.agent: turn.messages[-1].content for turn in team.turns}
    assert asked["a"] == "What is 2 + 2? In a word!" and "End with a line" in asked["b"]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_system_conforms(seed: int) -> None:
    system = supernet(
        ["generate", "answer_generate", "self_consistency", "ensemble", "self_refine"]
    )
    check_system(system, [TASK, Task("u", "Name a prime.", "7")], seeds=(2 * seed, 2 * seed + 1))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"operators": []}, "operators: expected names of operators"),
        ({"operators": ["generat"]}, "operator 'generat': no such operator"),
        ({"operators": ["ensemble"]}, "operators: each of them reads an earlier solution"),
        ({"operators": ["generate", "custom"]}, "operators.custom: it needs instruction"),
        ({"operators": {EXIT: "generate"}}, "operators: 'early_exit' is an option of every layer"),
        ({"prompts": {"generte": "x"}}, "profiles, prompts: 'generte' is no operator"),
        ({"prompts": {"generate": "{answer}"}}, "prompts.generate"),
        ({"executors": {"generate": "nobody"}}, "executors.generate: 'nobody' is no executor"),
        ({"encoder": "words"}, "encoder 'words': no such encoder"),
        ({"threshold": 0.0}, "threshold: expected"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        Supernet(["solver"], **settings)


def test_weights_of_another_supernet_are_no_value() -> None:
    small, large = supernet(["generate"]), supernet()
    (param,) = [param for param in large.params() if param.name == VALUE]
    others = weights(small, layer1=[0, 0], layer2=[0, 0])
    assert "1.score.weight" in str(param.problem(others))
    right = weights(large, layer1=[0] * 4, layer2=[0] * 4)
    assert param.problem(right) is None and param.problem({}) is None
    assert "packed numbers" in str(param.problem({"1.score.bias": [0.0]}))
