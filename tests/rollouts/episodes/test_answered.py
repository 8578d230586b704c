"""Judges in episodes: asked once an output is there, recorded, metered, under the budget, never asked
twice for the same."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.types import AgentSpec, PolicySpec, Task
from marlora.rollouts.budget import Budget
from marlora.rollouts.engines.base import EngineError, ModelRef
from marlora.rollouts.engines.scripted import Fault, ScriptedEngine
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.episodes.runner import EpisodeRequest, EpisodeRunner
from marlora.rollouts.ledger import BudgetSpent, Ledger
from marlora.rollouts.rewards.builtin import exact
from marlora.rollouts.rewards.judge import judge
from marlora.rollouts.types import Episode

TASK = Task("t", "2+2?", "4")
CRITIC = judge("critic").served_by(AgentSpec("critic"), PolicySpec("critic", trainable=False))


class Kept:
    """Keeps talks in memory."""

    def __init__(self) -> None:
        self.talks: dict[str, Episode] = {}

    def find(self, id: str) -> Episode | None:
        return self.talks.get(id)

    def keep(self, episodes: Sequence[Episode]) -> None:
        self.talks |= {episode.id: episode for episode in episodes}


def engine(answer: str = "4", verdict: str = "<SCORE>8</SCORE>", **settings: Any) -> ScriptedEngine:
    def said(prompt: str, ref: ModelRef, sampling: Any, k: int) -> str:
        return f"It is {answer}. {verdict}" if ref.policy == "critic" else answer

    return ScriptedEngine(said, **settings)


def runner(served: ScriptedEngine, **settings: Any) -> EpisodeRunner:
    found = {name: EngineCompleter(served, served.tokens, name) for name in ("a", "critic")}
    return EpisodeRunner(Chain(["a"]), found, [CRITIC, exact], **settings)


def played(player: EpisodeRunner, kind: Any = "train") -> Episode:
    return asyncio.run(player.play(EpisodeRequest(TASK, "g/t", kind=kind)))


def test_its_score_is_a_reward_and_its_talk_an_aside() -> None:
    kept, ledger = Kept(), Ledger()
    episode = played(runner(engine(), asides=kept, ledger=ledger))
    by_name = {reward.name: reward for reward in episode.rewards}
    assert by_name["critic"].value == 0.8 and by_name["exact"].value == 1.0
    assert by_name["critic"].text == "It is 4. <SCORE>8</SCORE>"
    assert by_name["critic"].source == "critic" and by_name["critic"].agent is None
    ((id_, talk),) = kept.talks.items()
    assert id_.startswith("g/t/0/critic-") and id_ == talk.id
    assert (talk.kind, talk.parent, talk.follows) == ("aside", episode.id, episode.id)
    assert "<ANSWER>\n4\n</ANSWER>" in talk.task.prompt and not talk.rewards
    assert list(episode.usage) == ["a"] and talk.usage["critic"].calls == 1
    ledger.stored(talk)
    ledger.stored(episode)
    rows = ledger.rows()
    assert rows["aside"]["critic"]["calls"] == 1 and rows["train"]["a"]["calls"] == 1


def test_what_was_judged_before_is_not_judged_again() -> None:
    kept, ledger = Kept(), Ledger()
    first = played(runner(engine(), asides=kept))
    again = played(runner(engine(verdict="<SCORE>1</SCORE>"), asides=kept, ledger=ledger))
    assert again.rewards == first.rewards and len(kept.talks) == 1
    booked = ledger.rows()["aside"]["critic"]
    assert booked["calls"] == 0 and booked["cached_tokens"] > 0
    played(runner(engine(answer="5"), asides=kept))
    assert len(kept.talks) == 2, "another output is another talk"


def test_an_evaluation_pays_for_its_judge() -> None:
    kept, ledger = Kept(), Ledger(Budget(tokens=1))
    episode = played(runner(engine(), asides=kept, ledger=ledger), "eval")
    assert episode.rewards[0].value == 0.8
    assert [talk.kind for talk in kept.talks.values()] == ["eval"]


def test_the_budget_has_a_say() -> None:
    with pytest.raises(BudgetSpent, match="agent 'critic'"):
        played(runner(engine(), ledger=Ledger(Budget(calls=1))))


def test_no_verdict_is_unscored_and_no_answer_is_worth_nothing() -> None:
    unscored = played(runner(engine(verdict="Score: 9")))
    assert math.isnan(unscored.rewards[0].value) and "Score: 9" in unscored.rewards[0].text
    asked = engine(answer=" ")
    silent = played(runner(asked))
    assert silent.rewards[0].value == 0.0 and silent.rewards[0].text == "no answer"


def test_a_prompt_too_long_for_the_judge_leaves_the_episode_unscored() -> None:
    episode = played(runner(engine(context=300)))
    assert episode.error is None and math.isnan(episode.rewards[0].value)
    assert episode.rewards[0].text and episode.rewards[1].value == 1.0


def test_a_judge_that_is_gone_concerns_the_run() -> None:
    gone = engine(faults={1: Fault("raise")})
    with pytest.raises(EngineError):
        played(runner(gone))
