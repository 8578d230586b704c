"""Diversity of a team's agents: agreement of their answers, cross-likelihood of their texts,
distance of embeddings.

The metrics of Multiagent Finetuning (arXiv 2501.05707). All from one table: nll[n, k], the mean of
-log p_k over the tokens that n's policy sampled, in nats at temperature 1. The mean over pairs n !=
k is the cross NLL (the paper's likelihood metric, but over all tokens alike, where it averages
within each text first), and nll[n, k] - nll[n, n] estimates KL(n | k) per token on n's own words,
with the tokens drawn as the only noise; the exact sum over the vocabulary would need every logit.
No embedder is at hand without a network: the distance of embeddings takes a function of the user's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

from ....agents.text.answers import same, vote
from ....agents.types import BASE, SettingError
from ....rollouts.report.sections import ReportSection, table_section
from ....rollouts.types import Episode
from ...batching.samples import TrainingSequence
from ...update.learner import Learner

Table = Mapping[tuple[str, str], float]  # (who sampled, who judges): policies; nats per token
Embedder = Callable[[Sequence[str]], Sequence[Sequence[float]]]  # texts -> a vector each


@dataclass(frozen=True)
class Divergence:
    """Means over ordered pairs of different agents, in nats per token. Agents that share a policy
    differ by 0."""

    cross_nll: float
    kl: float


def divergence(table: Table, policies: Sequence[str]) -> Divergence:
    """Of agents that speak with these policies, one entry per agent (so agents that share one are
    counted as agents)."""
    pairs = list(permutations(policies, 2))
    if not pairs:
        raise ValueError(f"divergence: at least two agents expected, got {list(policies)}")
    cross = [table[n, k] for n, k in pairs]
    own = [table[n, n] for n, _ in pairs]
    return Divergence(
        math.fsum(cross) / len(pairs), (math.fsum(cross) - math.fsum(own)) / len(pairs)
    )


def nll_table(
    learner: Learner, sequences: Sequence[TrainingSequence], judges: Sequence[str] | None = None
) -> dict[tuple[str, str], float]:
    """nll[n, k] of every policy n that has samples and every judge k (None: these policies
    themselves) on the same base.

    One forward per sample and judge, no gradient. `base` as a judge is the bare base. Every rank
    has to call it.
    """
    authors = sorted({sample.policy for sample in sequences})
    table: dict[tuple[str, str], float] = {}
    for judge in dict.fromkeys(judges or authors):
        at_home = [b.policies for b in learner.bases.values()]
        judged = [
            s
            for s in sequences
            if judge == BASE or any(judge in home and s.policy in home for home in at_home)
        ]
        nll = learner.mean_nll(judged, dict.fromkeys(authors, judge))
        table |= {(author, judge): value for author, value in nll.items()}
    return table


def consensus(episodes: Sequence[Episode], agents: Sequence[str]) -> float:
    """Mean share of these agents whose last answer is the team's output. Episodes that failed or
    have no output are left out; NaN if none is left."""
    shares = []
    for episode in episodes:
        if episode.error is None and (episode.output or "").strip():
            last = [said[-1] for name in agents if (said := episode.trajectory(name))]
            shares.append(sum(same(vote(turn), episode.output) for turn in last) / len(agents))
    return math.fsum(shares) / len(shares) if shares else math.nan


def dissimilarity(vectors: Sequence[Sequence[float]]) -> float:
    """Mean of 1 - cos over pairs of vectors; a vector of zeros is at distance 1 from every
    other."""
    pairs = list(combinations(vectors, 2))
    if not pairs:
        raise ValueError(f"dissimilarity: at least two vectors expected, got {len(vectors)}")
    return math.fsum(1 - _cosine(a, b) for a, b in pairs) / len(pairs)


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    norm = math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0


def embedding_distance(
    episodes: Sequence[Episode], agents: Sequence[str], embed: Embedder
) -> float:
    """Mean over episodes of the `dissimilarity` of what these agents said last."""
    spoken = [
        [said[-1].text for name in agents if (said := e.trajectory(name))]
        for e in episodes
        if e.error is None
    ]
    spoken = [texts for texts in spoken if len(texts) > 1]
    if not spoken:
        return math.nan
    vectors = list(embed([text for texts in spoken for text in texts]))
    if len(vectors) != sum(map(len, spoken)):
        raise SettingError(
            f"embedder: expected a vector per text, got {len(vectors)} for {sum(map(len, spoken))}"
            " texts"
        )
    ends = [sum(map(len, spoken[: n + 1])) for n in range(len(spoken))]
    found = [
        dissimilarity([list(v) for v in vectors[end - len(texts) : end]])
        for end, texts in zip(ends, spoken, strict=True)
    ]
    return math.fsum(found) / len(found)


def diversity_section(measured: Mapping[str, Mapping[str, Any]]) -> ReportSection:
    """How different the members of a debate are, by when it was measured, as a table."""
    sides = [(side, name) for side in ("generators", "critics") for name in ("cross_nll", "kl")]
    heads = (f"{side}: {name.replace('_', ' ')}" for side, name in sides)
    rows = []
    for when, entry in measured.items():
        numbers = [entry["consensus"], *(entry.get(side, {}).get(name) for side, name in sides)]
        rows.append([when, *("" if value is None else f"{value:.3f}" for value in numbers)])
    return table_section(
        "sampled debates, held out: nats per token, and the share that agrees with the majority",
        ("diversity", "consensus", *heads),
        rows,
    )
