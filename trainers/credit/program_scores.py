"""The score table of written programs: one row per program and task, from the episodes that ran it.
Pure Python.

The episode in which a program was written is its first run; the others are that episode's children.
A run that failed scores 0, and so does one that is missing: the sum is divided by the number of
runs requested. A program with a run that the scorer could not score has no row.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ...agents.seeds import derive_seed
from ...agents.types import Reward, SettingError, Turn
from ...rollouts.types import Episode
from .pairs import Pair
from .weights import RewardWeights, team_rewards


@dataclass(frozen=True)
class ScoredProgram:
    """A program and its score.

    episode: in which it was written, and ran for the first time.
    turn: of the designer, that holds it.
    runs: all its runs, that episode first.
    score: their mean, from 0 to 1; 0 if the program is invalid.
    fault: the reason that it is invalid, "" if it is valid.
    """

    episode: Episode
    turn: Turn
    runs: tuple[Episode, ...]
    score: float
    fault: str = ""

    @property
    def as_lesson(self) -> Episode:
        """The episode with the designer's turn alone, as a training example."""
        return replace(self.episode, turns=(self.turn,))


def score_table(
    episodes: Iterable[Episode], designer: str, num_runs: int, config: RewardWeights, what: str
) -> tuple[list[ScoredProgram], Counter[str]]:
    """The programs of these episodes with their scores, in order, and counts of those that have
    none, by reason.

    `what`: names the children that are runs, see `collection.derived_episodes`. Raises
    `SettingError` if an episode has no reward `valid`, or if a score is outside 0 to 1.
    """
    parents = [e for e in episodes if e.parent is None]
    again: dict[str, list[Episode]] = {}
    for episode in episodes:
        if episode.parent is not None and episode.group.startswith(f"{episode.parent}/{what}/"):
            again.setdefault(episode.parent, []).append(episode)
    table: list[ScoredProgram] = []
    without: Counter[str] = Counter()
    for episode in parents:
        turn = next((t for t in reversed(episode.turns) if t.agent == designer and t.taken), None)
        if turn is None or episode.error is not None:
            without["failed episode"] += 1
            continue
        fault = _fault(episode, turn)
        runs = (episode, *([] if fault else again.get(episode.id, [])))
        score = 0.0 if fault else _mean(runs, num_runs, config)
        if math.isnan(score):
            without["no score"] += 1
        elif not 0 <= score <= 1:
            raise SettingError(
                f"rewards: episode {episode.id} scores {score:g}; scores of programs are from 0 to"
                " 1. reward_weights says which rewards count"
            )
        else:
            table.append(ScoredProgram(episode, turn, runs, score, fault))
    return table, without


def _fault(episode: Episode, turn: Turn) -> str:
    validity = [
        r
        for r in episode.rewards
        if r.name == "valid" and (r.turn, r.sibling) == (turn.index, turn.sibling)
    ]
    if not validity:
        raise SettingError(
            f"rewards: episode {episode.id} does not say whether its program is valid; add the"
            " reward `workflow`"
        )
    return "" if validity[0].value else validity[0].text or "invalid"


def _mean(runs: Sequence[Episode], num_runs: int, config: RewardWeights) -> float:
    rewards = team_rewards(runs, config)
    return sum(0.0 if run.error is not None else rewards[run.id] for run in runs) / num_runs


def ordered_pairs(
    table: Iterable[ScoredProgram], invalid: bool
) -> list[tuple[ScoredProgram, ScoredProgram]]:
    """Every two programs of one task of which the first scores higher (arXiv:2502.04306). Two of
    the same text are no pair.

    `invalid`: programs that cannot be run take part, with their score of 0.
    """
    by_task: dict[str, list[ScoredProgram]] = {}
    for row in table:
        if invalid or not row.fault:
            by_task.setdefault(row.episode.task.id, []).append(row)
    return [
        (one, other)
        for rows in by_task.values()
        for one in rows
        for other in rows
        if one.score > other.score and one.turn.text != other.turn.text
    ]


def distances(pairs: Sequence[tuple[ScoredProgram, ScoredProgram]], alpha: float) -> list[float]:
    """d = (s_w - s_l)^alpha of each pair, to which its chance of being drawn is proportional."""
    return [(one.score - other.score) ** alpha for one, other in pairs]


def drawn(
    pairs: Sequence[tuple[ScoredProgram, ScoredProgram]], count: int, alpha: float, seed: int
) -> list[tuple[ScoredProgram, ScoredProgram]]:
    """`count` pairs drawn with replacement, with chances as `distances` says. None if there are
    none."""
    if not pairs:
        return []
    return random.Random(derive_seed(seed, "programs")).choices(
        pairs, distances(pairs, alpha), k=count
    )


def preference(
    chosen: ScoredProgram, rejected: ScoredProgram, weighting: str, power: float = 1.0
) -> Pair:
    """A pair for Score-DPO: r*(w) = f(s_w) r(w), r*(l) = (1 - f(s_l)) r(l) with f(s) = s^power.

    `weighting`: which sides are weighed: both, chosen, rejected, or none (plain DPO).
    """
    factors = (
        chosen.score**power if weighting in ("both", "chosen") else 1.0,
        1 - rejected.score**power if weighting in ("both", "rejected") else 1.0,
    )
    return Pair(
        (chosen.as_lesson,), (rejected.as_lesson,), chosen.score - rejected.score, factors=factors
    )


def best_programs(table: Iterable[ScoredProgram]) -> list[ScoredProgram]:
    """Of every task the valid program that scores highest, the first of equals; none where all
    score 0."""
    best: dict[str, ScoredProgram] = {}
    for row in table:
        other = best.get(row.episode.task.id)
        if not row.fault and row.score > 0 and (other is None or row.score > other.score):
            best[row.episode.task.id] = row
    return list(best.values())


def invalid_kinds(valid: Sequence[Reward]) -> dict[str, float]:
    """Share of programs that cannot be run, by what is wrong with them."""
    kinds = sorted({r.text.split(":")[0] for r in valid if not r.value})
    return {
        kind: sum(not r.value and r.text.split(":")[0] == kind for r in valid) / len(valid)
        for kind in kinds
    }
