"""Rewards, returns and advantages of PPO where turns cannot be trained, and where nothing can be
compared."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from marlora.agents.types import Reward, Sampling, Task, Turn
from marlora.rollouts.types import Episode
from marlora.trainers.batching.samples import samples
from marlora.trainers.methods.policy_gradient.critics import CriticBatch, critic_batch, critic_of
from marlora.trainers.methods.policy_gradient.ppo import PPOConfig, turn_rewards

UNTRAINED: dict[str, dict[str, Any]] = {
    "empty": {"token_ids": (), "logprobs": ()},
    "temperature 0": {"sampling": Sampling(temperature=0.0)},
    "cut softmax": {"sampling": Sampling(top_p=0.5)},
    "written": {"source": "written"},
    "saw the answer": {"saw_gold": True},
    "no log-probs": {"logprobs": ()},
    "another policy": {"policy": "other"},
}


def episode(name: str, agents: str, *rewards: Reward, **last: Any) -> Episode:
    """A turn per letter, each in a chat of its own; `last` changes the last one."""
    turns = [
        Turn(i, agent, prompt_ids=(i + 1,), token_ids=(7, 8), logprobs=(-1.0, -1.0), policy="p")
        for i, agent in enumerate(agents)
    ]
    turns[-1] = dataclasses.replace(turns[-1], **last)
    return Episode(name, "g", Task("t", "?"), turns=tuple(turns), rewards=rewards)


def judged(episodes: list[Episode], config: PPOConfig, error: float = 0.0) -> CriticBatch:
    """A step's numbers with a critic that is wrong by up to `error`."""
    policy_of = {turn.agent: "p" for e in episodes for turn in e.turns}
    rewards = turn_rewards(episodes, config, policy_of)
    found, _ = samples(episodes, dict.fromkeys(rewards, 1.0), policy_of)
    noise = torch.Generator().manual_seed(0)

    def read(sequences: Any, _ranks: Any) -> torch.Tensor:
        return error * torch.rand(sum(s.num_trained for s in sequences), generator=noise)

    learner: Any = SimpleNamespace(head=lambda name: SimpleNamespace(read=read), ranks=None)
    critic = critic_of(policy_of, episodes, config)
    return critic_batch(learner, episodes, found, rewards, critic, config)


@pytest.mark.parametrize("rule", ["agent", "team", "turn"])
@pytest.mark.parametrize("why", sorted(UNTRAINED))
def test_an_episode_s_reward_comes_with_the_last_turn_that_is_trained(rule: str, why: str) -> None:
    """Two episodes, lost and won. Turns of `a`: two that are trained, then one that is not."""
    config = PPOConfig(credit=rule, across_turns=True, whiten_advantages=False, lam=1.0)
    played = [
        episode(f"e{won}", "aaa", Reward("r", float(won)), **UNTRAINED[why]) for won in (0, 1)
    ]
    given = turn_rewards(played, config, {"a": "p"})
    assert {key: value for key, value in given.items() if value} == {("e1", 1, 0): 1.0}
    lesson = judged(played, config)
    for e, expected in (("e0", 0.0), ("e1", 1.0)):
        for turn in (0, 1):
            span = lesson.spans[e, turn, 0]
            assert lesson.returns[span.start : span.stop].tolist() == [expected] * 2
        assert (e, 2, 0) not in lesson.spans


def test_rewards_of_turns_that_are_not_trained_come_with_the_turn_before() -> None:
    """Turn 1 is written and earns 0.5, turn 2 is trained and earns 0.25, the team's is 1. The first
    turn of `b` is not trained, so what it earns was nobody's doing."""
    config = PPOConfig(credit="turn", across_turns=True)
    scored = (
        Reward("r", 1.0),
        Reward("s", 0.5, agent="a", turn=1),
        Reward("s", 0.25, agent="a", turn=2),
        Reward("s", 0.125, agent="b", turn=3),
    )
    played = episode("e", "aaabb", *scored)
    turns = list(played.turns)
    turns[1] = dataclasses.replace(turns[1], source="written")
    turns[3] = dataclasses.replace(turns[3], token_ids=(), logprobs=())
    played = dataclasses.replace(played, turns=tuple(turns))
    given = turn_rewards([played], config, {"a": "p", "b": "p"})
    assert {key[1]: value for key, value in given.items() if value} == {0: 0.5, 2: 1.25, 4: 1.0}


def test_an_agent_none_of_whose_turns_is_trained_has_no_reward() -> None:
    config = PPOConfig(credit="agent", across_turns=True)
    played = episode("e", "ab", Reward("r", 1.0), source="written")
    assert turn_rewards([played], config, {"a": "p", "b": "p"}) == {("e", 0, 0): 1.0}


ALIKE = {
    "agent, across": {"credit": "agent", "across_turns": True},
    "team, across": {"credit": "team", "across_turns": True},
    "team, discounted": {"credit": "team", "discount": 0.9},
    "turn, across": {"credit": "turn", "across_turns": True},
    "turn, discounted": {"credit": "turn", "discount": 0.5},
    "agent": {"credit": "agent"},
    "a critic per turn": {"credit": "agent", "across_turns": True, "value_heads": "turn"},
}


@pytest.mark.parametrize("reward", [0.0, 1.0, -1.0, 0.3])
@pytest.mark.parametrize("settings", ALIKE.values(), ids=ALIKE)
def test_what_a_critic_gets_wrong_is_no_advantage_whatever_all_earned(
    reward: float, settings: dict[str, Any]
) -> None:
    """All episodes earn the same, up to rounding; with one that earns more there is an
    advantage."""
    same = [
        episode(f"e{n}", "aba", Reward("x", part), Reward("y", reward - part))
        for n, part in enumerate((0.1, 0.0, 0.2))
    ]
    lesson = judged(same, PPOConfig(**settings), error=0.1)
    assert lesson.advantages.abs().max() == 0
    assert float(lesson.returns.sum()) != 0
    better = [*same[:2], episode("e2", "aba", Reward("x", reward + 1), Reward("y", 0.0))]
    assert judged(better, PPOConfig(**settings), error=0.1).advantages.abs().max() > 1


def test_a_reward_of_one_place_alone_is_a_signal() -> None:
    """Second turns differ and first ones do not."""
    config = PPOConfig(credit="turn", discount=0.0)
    played = [episode(f"e{n}", "aa", Reward("s", float(n), "", "a", 1)) for n in range(3)]
    lesson = judged(played, config)
    found = {key[:2]: float(lesson.advantages[span.start]) for key, span in lesson.spans.items()}
    assert found["e2", 1] > 1 and found["e0", 1] == found["e0", 0] < 0
