"""Measures of a team's episodes on a task set: pass@k, majority@k, rewards, cost, agreement and
diversity of answers, and what debate rounds do to them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from ...agents.system import System
from ...agents.text.answers import extract, normalise, same
from ...agents.types import Reward, Usage
from ..rewards.judge import Judge
from ..rewards.scoring import RewardFn, score
from ..types import Episode
from .rounds import answers_by_round, transitions
from .statistics import majority_at_k, pass_at_k, quantile

ANSWER = "answer of a turn"  # the reward that says whether a turn's answer is right
RIGHT = 1.0 - 1e-9  # a score from which an answer counts as right


def by_task(episodes: Iterable[Episode]) -> dict[str, list[Episode]]:
    """Episodes by the id of their task."""
    tasks: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        tasks[episode.task.id].append(episode)
    return tasks


def scored(episode: Episode, metric: str) -> float:
    """An episode's score; 0 for an episode that failed or could not be scored."""
    value = episode.reward(metric)
    return 0.0 if value != value else value


def over_samples(episodes: Sequence[Episode], metric: str, count: int) -> dict[str, Any]:
    """`pass_at` and `majority_at` for k = 1, 2, 4, ... up to the `count` samples of a
    task; nothing for a single sample."""
    ks = [k for k in (2**n for n in range(20)) if k <= count]
    ks += [count] * (count not in ks)
    if count == 1:
        return {}
    tasks = by_task(episodes).values()
    scores = [[scored(e, metric) for e in own] for own in tasks]
    outputs = [[e.output for e in own] for own in tasks]
    right = [sum(s >= RIGHT for s in own) for own in scores]
    return {
        "pass_at": {str(k): sum(pass_at_k(count, c, k) for c in right) / len(right) for k in ks},
        "majority_at": {
            str(k): (
                sum(majority_at_k(o, s, k) for o, s in zip(outputs, scores, strict=True))
                / len(scores)
            )
            for k in ks
        },
    }


def reward_parts(episodes: Sequence[Episode]) -> dict[str, float]:
    """Mean of every reward by name, `NAME of AGENT` for an agent's own; those that could not be
    given are left out of their mean."""
    values: dict[str, list[float]] = defaultdict(list)
    for reward in (r for e in episodes for r in e.rewards if r.value == r.value):
        values[reward.name + (f" of {reward.agent}" if reward.agent else "")].append(reward.value)
    return {name: sum(own) / len(own) for name, own in values.items()}


def cost(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Per task: calls, prompt and sampled tokens, seconds of waiting for replies (summed over
    agents; mean, median, 95th percentile).

    What children cost is their first ancestor's.
    """
    spent = {e.id: Usage() for e in episodes if e.parent is None}
    for e in episodes:
        owner = next(id for id in (e.id, *_prefixes(e.id)) if id in spent)
        spent[owner] = sum(e.usage.values(), spent[owner])
    totals = list(spent.values())
    n, waits = len(totals), [t.seconds for t in totals]
    return {
        "calls": sum(t.calls for t in totals) / n,
        "prompt_tokens": sum(t.prompt_tokens for t in totals) / n,
        "sampled_tokens": sum(t.sampled_tokens for t in totals) / n,
        "seconds": {
            "mean": sum(waits) / n,
            "median": quantile(waits, 0.5),
            "p95": quantile(waits, 0.95),
        },
    }


def _prefixes(name: str) -> list[str]:
    """`a/b/c` -> `a/b`, `a`: the ids of a child's ancestors are beginnings of its own."""
    return list(itertools.accumulate(name.split("/"), lambda a, b: f"{a}/{b}"))[-2::-1]


def last_answers(episode: Episode) -> dict[str, str]:
    """The answer in each agent's last taken turn."""
    return {
        turn.agent: extract(turn.text) or turn.text.strip() for turn in episode.turns if turn.taken
    }


def agreement(episodes: Sequence[Episode]) -> float | None:
    """Share of pairs of agents whose last answers are the same; None if no two agents spoke in any
    episode."""
    pairs = [
        same(a, b) for e in episodes for a, b in itertools.combinations(last_answers(e).values(), 2)
    ]
    return sum(pairs) / len(pairs) if pairs else None


def diversity(episodes: Sequence[Episode]) -> dict[str, float | None]:
    """Different answers as a share of all: `agents` within an episode, `samples` within a task;
    None where there is only one."""

    def share(lists: Iterable[list[str]]) -> float | None:
        shares = [len(set(map(normalise, own))) / len(own) for own in lists if len(own) > 1]
        return sum(shares) / len(shares) if shares else None

    samples = (
        [extract(e.output) or e.output.strip() for e in own if e.output is not None]
        for own in by_task(episodes).values()
    )
    return {
        "agents": share(list(last_answers(e).values()) for e in episodes),
        "samples": share(samples),
    }


async def changes_by_round(
    episodes: Sequence[Episode], system: System, reward: RewardFn, metric: str
) -> dict[str, Any] | None:
    """What rounds do to answers (`rounds.py`): every taken turn is scored as if it were the
    team's output. None for a system without rounds (one that does not say which member each agent
    is, `member_of`: its turns need not be answers), if no member has two turns, and for a reward
    that asks a judge, who is asked about outputs alone."""
    member_of = getattr(system, "member_of", None)
    if (
        not member_of
        or isinstance(reward, Judge)
        or not any(len(answers_by_round(episode, member_of)) > 1 for episode in episodes)
    ):
        return None
    known: dict[tuple[str, str], float] = {}

    async def value(episode: Episode, text: str) -> float:
        if (episode.task.id, text) not in known:
            rewards = await score(
                episode.task, dataclasses.replace(episode, output=text, rewards=()), [reward]
            )
            known[episode.task.id, text] = next(
                (r.value for r in rewards if r.name == metric and r.agent is None), math.nan
            )
        return known[episode.task.id, text]

    labelled = []
    for episode in episodes:
        rewards = [
            Reward(
                ANSWER,
                await value(episode, turn.text),
                agent=turn.agent,
                turn=turn.index,
                sibling=turn.sibling,
            )
            for turn in episode.turns
            if turn.taken
        ]
        labelled.append(dataclasses.replace(episode, rewards=tuple(rewards)))
    return transitions(labelled, member_of, ANSWER)
