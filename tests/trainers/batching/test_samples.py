"""Which tokens are trained: masks as full lists on a hand-built episode of two agents, forks,
siblings, refusals."""

import pytest

from marlora.agents.types import Sampling, Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.batching.samples import (
    Denominators,
    TrainingSequence,
    _Segment,
    denominators,
    samples,
)

POLICY = {"solver": "solver", "critic": "critic"}


def turn(index: int, agent: str, prompt: list[int], reply: list[int], **fields) -> Turn:
    logprobs = tuple(-0.1 * token for token in reply)
    return Turn(
        index,
        agent,
        prompt_ids=tuple(prompt),
        token_ids=tuple(reply),
        **({"logprobs": logprobs} | fields),
    )


def episode(*turns: Turn, name: str = "e", **fields) -> Episode:
    return Episode(name, "g", Task("t", "2+2?"), turns=turns, **fields)


def both(
    *turns: Turn, credit: float = 1.0, ratios: bool = True, **fields
) -> tuple[list[TrainingSequence], dict]:
    made, dropped = samples(
        [episode(*turns, **fields)],
        {("e", t.index, t.sibling): credit for t in turns},
        POLICY,
        ratios=ratios,
    )
    return made, dict(dropped)


def masked(sample: TrainingSequence) -> list[int]:
    return [token for token, m in zip(sample.ids, sample.mask, strict=True) if m]


def two_agents() -> Episode:
    """Solver drafts, critic comments on the draft's text (10 11), solver answers again in the same
    chat."""
    return episode(
        turn(0, "solver", [1, 2, 3], [10, 11, 9]),
        turn(1, "critic", [1, 5, 10, 11, 3], [20, 9], sampling=Sampling(temperature=0.7)),
        turn(
            2, "solver", [1, 2, 3, 10, 11, 9, 4, 20, 3], [12, 9], sampling=Sampling(temperature=0.5)
        ),
    )


def test_a_chat_is_one_sequence_and_only_own_sampled_tokens_are_trained():
    made, dropped = samples(
        [two_agents()], {("e", 0, 0): 1.0, ("e", 1, 0): -2.0, ("e", 2, 0): 0.5}, POLICY
    )
    solver, critic = made
    assert not dropped
    assert (solver.policy, critic.policy, solver.episode) == ("solver", "critic", "e")
    assert solver.ids == (1, 2, 3, 10, 11, 9, 4, 20, 3, 12, 9)
    assert solver.mask == (0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1)
    assert solver.logprobs == pytest.approx((0, 0, 0, -1.0, -1.1, -0.9, 0, 0, 0, -1.2, -0.9))
    assert solver.advantages == (0, 0, 0, 1, 1, 1, 0, 0, 0, 0.5, 0.5)
    assert solver.temperatures == (1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5, 0.5)
    assert solver.sequence == (-1, -1, -1, 0, 0, 0, -1, -1, -1, 2, 2)
    assert critic.ids == (1, 5, 10, 11, 3, 20, 9)
    assert critic.mask == (0, 0, 0, 0, 0, 1, 1)  # the solver's draft, 10 11, is text it read
    assert critic.temperatures == (1, 1, 1, 1, 1, 0.7, 0.7)
    assert denominators(made) == {"solver": Denominators(5, 2), "critic": Denominators(2, 1)}


def test_a_zero_or_missing_credit_is_context_and_a_sample_without_trained_tokens_is_gone():
    made, dropped = samples([two_agents()], {("e", 0, 0): 0.0, ("e", 2, 0): 0.5}, POLICY)
    (solver,) = made
    assert solver.ids == (1, 2, 3, 10, 11, 9, 4, 20, 3, 12, 9)
    assert solver.mask == (0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1)
    assert dict(dropped) == {("solver", "zero advantage"): 1}
    first_only, _ = samples([two_agents()], {("e", 0, 0): 1.0}, POLICY)
    assert [s.ids for s in first_only] == [
        (1, 2, 3, 10, 11, 9)
    ]  # nothing after the last trained token is computed


def test_agents_without_a_trained_policy_give_nothing_and_shared_policies_share():
    credit = {("e", i, 0): 1.0 for i in range(3)}
    made, dropped = samples([two_agents()], credit, {"solver": "solver"})
    assert [s.policy for s in made] == ["solver"] and not dropped
    made, _ = samples([two_agents()], credit, {"solver": "one", "critic": "one"})
    assert [s.policy for s in made] == ["one", "one"]


def test_a_template_that_rewrites_history_forks_with_the_same_trained_tokens():
    chat = [
        turn(0, "solver", [1, 2, 3], [7, 10, 9]),
        turn(1, "solver", [1, 2, 3, 10, 9, 4, 3], [7, 12, 9]),
    ]  # thinking (7) dropped
    made, _ = both(*chat)
    assert [s.ids for s in made] == [(1, 2, 3, 7, 10, 9), (1, 2, 3, 10, 9, 4, 3, 7, 12, 9)]
    assert [masked(s) for s in made] == [[7, 10, 9], [7, 12, 9]]
    kept, _ = both(
        turn(0, "solver", [1, 2, 3], [7, 10, 9]),
        turn(1, "solver", [1, 2, 3, 7, 10, 9, 4, 3], [7, 12, 9]),
    )
    assert [masked(s) for s in kept] == [[7, 10, 9, 7, 12, 9]]


def test_a_new_chat_and_two_heirs_of_one_turn_fork():
    made, _ = both(
        turn(0, "solver", [1, 2], [10]),
        turn(1, "solver", [1, 2], [11]),  # agent.fresh()
        turn(2, "solver", [1, 2, 10, 4], [12]),
        turn(
            3, "solver", [1, 2, 10, 4], [13]
        ),  # extends turn 0 too, but turn 2 stands there already
    )
    assert [(s.ids, masked(s)) for s in made] == [
        ((1, 2, 10, 4, 12), [10, 12]),
        ((1, 2, 11), [11]),
        ((1, 2, 10, 4, 13), [13]),
    ]


def test_siblings_are_segments_of_their_own_and_the_taken_one_goes_on():
    made, _ = both(
        turn(0, "solver", [1, 2], [10, 9]),
        turn(1, "solver", [1, 2, 10, 9, 3], [11], taken=False),
        turn(1, "solver", [1, 2, 10, 9, 3], [12], sibling=1),
        turn(1, "solver", [1, 2, 10, 9, 3], [12], sibling=2, taken=False),
        turn(2, "solver", [1, 2, 10, 9, 3, 12, 4], [13]),
    )
    assert [(s.ids, masked(s), max(s.sequence)) for s in made] == [
        ((1, 2, 10, 9, 3, 12, 4, 13), [10, 9, 12, 13], 2),
        ((1, 2, 10, 9, 3, 11), [11], 1),
        ((1, 2, 10, 9, 3, 12), [12], 1),
    ]


def test_turns_unfit_for_ratios_are_counted_by_agent_and_reason_but_stay_context():
    cases = [
        ({"source": "written"}, "written, not sampled"),
        ({"sampling": Sampling(temperature=0.0)}, "sampled off the softmax"),
        ({"sampling": Sampling(top_p=0.9)}, "sampled off the softmax"),
        ({"logprobs": (-1.0,)}, "as many log-probs as tokens expected"),
        ({"logprobs": ()}, "as many log-probs as tokens expected"),
        ({"logprobs": (float("nan"), -1.0)}, "log-prob not finite"),
        ({"logprobs": (float("-inf"), -1.0)}, "log-prob not finite"),
        ({"policy": "base"}, "spoken by policy 'base'"),
    ]
    for fields, reason in cases:
        made, dropped = both(
            turn(0, "solver", [1, 2], [10, 9], **fields), turn(1, "solver", [1, 2, 10, 9, 3], [11])
        )
        assert dropped == {("solver", reason): 1}
        assert [(s.ids, s.mask) for s in made] == [((1, 2, 10, 9, 3, 11), (0, 0, 0, 0, 0, 1))]


def test_without_ratios_written_and_greedy_turns_are_trained_at_temperature_one():
    made, dropped = both(
        turn(0, "solver", [1, 2], [10, 9], source="written", logprobs=()),
        turn(1, "solver", [1, 2, 10, 9, 3], [11], sampling=Sampling(temperature=0.0)),
        ratios=False,
    )
    assert not dropped and masked(made[0]) == [10, 9, 11]
    assert set(made[0].temperatures) == {1.0} and made[0].logprobs[2:4] == (0.0, 0.0)


@pytest.mark.parametrize("ratios", [True, False])
def test_what_saw_the_answer_is_never_trained_nor_what_extends_it(ratios):
    made, dropped = both(
        turn(0, "solver", [1, 2], [10]),
        turn(1, "solver", [1, 2, 10, 77], [11], saw_gold=True),  # 77: the answer
        turn(2, "solver", [1, 2, 10, 77, 11, 3], [12]),
        turn(3, "solver", [1, 2, 77], [13], saw_gold=True, taken=False),
        turn(4, "critic", [1, 2], [14]),
        ratios=ratios,
    )
    assert [(s.policy, s.ids) for s in made] == [("solver", (1, 2, 10)), ("critic", (1, 2, 14))]
    assert dropped == {("solver", "saw the answer"): 3}


def test_failed_episodes_and_turns_without_tokens_are_counted():
    assert both(turn(0, "solver", [1], [2]), error="boom") == (
        [],
        {("solver", "failed episode"): 1},
    )
    assert both(turn(0, "solver", [], [], text="from outside")) == (
        [],
        {("solver", "no tokens"): 1},
    )
    assert both(turn(0, "solver", [1], [])) == ([], {("solver", "no tokens"): 1})
    assert both(turn(0, "solver", [], [5])) == ([], {("solver", "no prompt"): 1})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_credit_that_is_not_finite_stops_the_step(bad):
    with pytest.raises(ValueError, match="episode e, turn 0 of 'solver': advantage"):
        both(turn(0, "solver", [1], [2]), credit=bad)


def test_inverting_the_mask_is_noticed(monkeypatch):
    """The mutation of this room's most important line: 1 where the agent read, 0 where it spoke."""
    right = _Segment._add
    monkeypatch.setattr(
        _Segment, "_add", lambda self, token, mask, *rest: right(self, token, 1 - mask, *rest)
    )
    with pytest.raises(AssertionError):
        test_a_chat_is_one_sequence_and_only_own_sampled_tokens_are_trained()


# agents whose policy is a value


def test_a_turn_trains_the_policy_that_spoke_it() -> None:
    """The solver speaks as the critic's policy, then as its own: two sequences, and the first is
    context of the second. What a policy that does not learn said is dropped and counted."""
    turns = [
        turn(0, "solver", [1, 2], [10, 9], policy="critic"),
        turn(1, "solver", [1, 2, 10, 9, 4], [11, 9], policy="solver"),
        turn(2, "solver", [1, 2, 10, 9, 4, 11, 9, 5], [12, 9], policy="critic"),
        turn(3, "solver", [1, 2], [13], policy="frozen"),
    ]
    made, dropped = both(*turns)
    assert [(s.policy, s.ids, masked(s)) for s in made] == [
        ("critic", (1, 2, 10, 9, 4, 11, 9, 5, 12, 9), [10, 9, 12, 9]),
        ("solver", (1, 2, 10, 9, 4, 11, 9), [11, 9]),
    ]
    assert dropped == {("solver", "spoken by policy 'frozen'"): 1}
    imitated, dropped = both(*turns, ratios=False)
    assert {s.policy for s in imitated} == {"solver"} and dropped == {}, "text has no probability"


def test_a_policy_that_no_agent_speaks_as_now_learns_from_what_it_said() -> None:
    """Episodes that began before the mapping changed: of an agent that has another policy now, and
    of one whose policy now does not learn."""
    spoken = episode(
        turn(0, "solver", [1], [10], policy="old"), turn(1, "frozen", [2], [11], policy="old")
    )
    advantages = {("e", 0, 0): 1.0, ("e", 1, 0): 1.0}
    made, dropped = samples([spoken], advantages, POLICY, learning=["old", "solver", "critic"])
    assert [(s.policy, masked(s)) for s in made] == [("old", [10]), ("old", [11])]
    assert not dropped
    made, dropped = samples([spoken], advantages, POLICY)
    assert made == [] and dropped == {("solver", "spoken by policy 'old'"): 1}


def test_a_turn_of_another_policy_that_goes_on_from_the_answer_is_not_trained() -> None:
    made, dropped = both(
        turn(0, "solver", [1, 2], [10], policy="critic", saw_gold=True),
        turn(1, "solver", [1, 2, 10, 4], [11], policy="solver"),
    )
    assert made == [] and dropped == {("solver", "saw the answer"): 2}


def test_calls_are_those_of_the_policy_in_the_episode_whoever_spoke_as_it() -> None:
    """Solver speaks twice and critic once; siblings are answers to one call; with one policy for
    both, it was called three times. What is not trained was a call all the same."""
    e = two_agents()
    credits = {("e", 0, 0): 1.0, ("e", 1, 0): 1.0, ("e", 2, 0): 1.0}
    own, _ = samples([e], credits, POLICY)
    assert {s.policy: s.calls for s in own} == {"solver": 2, "critic": 1}
    shared, _ = samples([e], credits, {"solver": "team", "critic": "team"})
    assert [s.calls for s in shared] == [3, 3]
    part, _ = samples([e], {("e", 0, 0): 1.0}, POLICY)
    assert [s.calls for s in part] == [2]
    written = [turn(0, "solver", [1], [5], source="written"), turn(1, "solver", [2], [6])]
    assert [s.calls for s in both(*written)[0]] == [1]
    assert [s.calls for s in both(written[0], ratios=False)[0]] == [1]
    fan = [turn(0, "solver", [1], [k], sibling=k, taken=k == 0) for k in range(3)]
    answers, _ = both(*fan)
    assert len(answers) == 3 and {s.calls for s in answers} == {1}
