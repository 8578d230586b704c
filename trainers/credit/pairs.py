"""From episodes to preferences: pairs of whole episodes of one task, and pairs of one agent's
replies. Pure Python.

An episode is the unit: a system's output is preferred as a whole, and a good whole does not tell
which part of it was good (SysDPO, arXiv:2502.17721).
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...agents.seeds import derive_seed
from ...agents.settings import setting
from ...agents.types import Turn, to_json
from ...rollouts.types import Episode
from .group import constant
from .weights import RewardWeights, team_rewards


@dataclass(frozen=True)
class Pair:
    """Two runs of a system on one task, of which the first was scored higher by `gap`; `weight` is
    what the pair counts.

    `factors`: what the log-ratio of the chosen and of the rejected side count in the margin
    (Score-DPO: their scores). Each side is a tuple of alternatives that stand for one run
    (SysDPO-Sampling: the same output after different drafts); else there is one.
    """

    chosen: tuple[Episode, ...]
    rejected: tuple[Episode, ...]
    gap: float
    weight: float = 1.0
    factors: tuple[float, float] = (1.0, 1.0)

    @property
    def episodes(self) -> tuple[Episode, ...]:
        return self.chosen + self.rejected


@dataclass
class PairConfig(RewardWeights):
    """Which pairs are made of a task's episodes."""

    min_gap: float = setting(
        "pairs whose scores differ by no more than this are dropped; 0 drops ties only",
        0.0,
        at_least=0,
    )
    max_pairs_per_task: int = setting(
        "pairs of one task in a step, drawn at random from all; 0 takes all", 0, at_least=0
    )


def pairs_of(episodes: Iterable[Episode], config: PairConfig, seed: int) -> list[Pair]:
    """Every two episodes of one task whose team rewards differ by more than `min_gap`, capped per
    task by a seeded draw.

    Left out: episodes that failed or have no score, children of other episodes, and two episodes in
    which the same was said (they differ by the noise of a scorer only). Episodes of a task are
    compared wherever and whenever they were played.
    """
    by_task: dict[str, list[Episode]] = {}
    for episode in episodes:
        if episode.parent is None:
            by_task.setdefault(episode.task.id, []).append(episode)
    chosen_pairs: list[Pair] = []
    for task, group in by_task.items():
        rewards = team_rewards(group, config)
        scored = [e for e in group if not math.isnan(rewards[e.id])]
        pairs = []
        for one, other in itertools.combinations(scored, 2):
            chosen, rejected = (one, other) if rewards[one.id] > rewards[other.id] else (other, one)
            gap = rewards[chosen.id] - rewards[rejected.id]
            tied = constant([rewards[one.id], rewards[other.id]])
            if gap > config.min_gap and not tied and said(chosen) != said(rejected):
                pairs.append(Pair((chosen,), (rejected,), gap))
        if config.max_pairs_per_task and len(pairs) > config.max_pairs_per_task:
            pairs = random.Random(derive_seed(seed, "pairs", task)).sample(
                pairs, config.max_pairs_per_task
            )
        chosen_pairs += pairs
    return chosen_pairs


def said(episode: Episode) -> tuple[tuple[Any, ...], ...]:
    """What the team said: per taken turn its number, agent and tokens (its text, where there are
    none)."""
    return tuple((t.index, t.agent, t.token_ids or t.text) for t in episode.turns if t.taken)


def agent_pairs(
    pairs: Iterable[Pair], agents: Sequence[str]
) -> tuple[list[dict[str, Any]], Counter[tuple[str, str]]]:
    """Rows for TRL's `DPOTrainer`: two replies of one agent to the same prompt, one from the chosen
    and one from the rejected episode.

    Columns `prompt`, `chosen`, `rejected` are TRL's conversational format; `prompt_ids`,
    `chosen_ids`, `rejected_ids` are the tokens that were read and sampled. TRL's pair has one
    prompt, so turns that were asked different things (most turns of an agent that reads others)
    give no row; they are counted, by (agent, reason).
    """
    rows: list[dict[str, Any]] = []
    dropped: Counter[tuple[str, str]] = Counter()
    for pair in pairs:
        turns = [
            {t.index: t for t in side[0].turns if t.taken and t.agent in agents}
            for side in (pair.chosen, pair.rejected)
        ]
        for index in sorted(turns[0].keys() | turns[1].keys()):
            chosen, rejected = (side.get(index) for side in turns)
            reason = _unpaired(chosen, rejected)
            if chosen is None or rejected is None or reason:
                dropped[(chosen or rejected).agent, reason] += 1  # type: ignore[union-attr]
            else:
                rows.append(_row(chosen, rejected))
    return rows, dropped


def _unpaired(chosen: Turn | None, rejected: Turn | None) -> str:
    if chosen is None or rejected is None or chosen.agent != rejected.agent:
        return "spoke in one episode only"
    if chosen.saw_gold or rejected.saw_gold:
        return "saw the answer"
    if not chosen.token_ids or not rejected.token_ids:
        return "no tokens"
    if chosen.prompt_ids != rejected.prompt_ids or chosen.messages != rejected.messages:
        return "was asked different things"
    return "said the same" if chosen.token_ids == rejected.token_ids else ""


def _row(chosen: Turn, rejected: Turn) -> dict[str, Any]:
    prompt = [{"role": m["role"], "content": m["content"]} for m in to_json(chosen.messages)]
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "prompt_ids": list(chosen.prompt_ids),
        "chosen_ids": list(chosen.token_ids),
        "rejected_ids": list(rejected.token_ids),
    }
