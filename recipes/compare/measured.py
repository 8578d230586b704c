"""What was measured: scores by seed and held-out task, and what a task costs, from episodes just
played or from the folder of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from marlora.agents.types import Usage
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.evaluation.measures import scored
from marlora.rollouts.evaluation.statistics import majority_at_k
from marlora.rollouts.report.episode_index import EpisodeRow, rows
from marlora.rollouts.report.html import visible
from marlora.rollouts.report.run_data import TEAM, VALIDATION, RunData, ledger_of
from marlora.rollouts.types import Episode

PROMPT = 90  # characters of a task's prompt that stand in a row of the report
Scores = dict[str, float]  # by task
LedgerTable = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by kind and agent
OF_A_POLICY = ("grad_norm", "calls_per_episode")  # metrics of its updates
# evaluations whose state is that of their step; with `keep: best` the one after may be of a
# checkpoint before
DURING = re.compile(r"before|step-\d+")
EVALUATION = "eval"  # the kind of episodes that nothing is learnt from
NOTHING = {"tokens": 0.0, "calls": 0.0, "cost": 0.0}
Point = tuple[float, float]  # tokens spent on learning, score


def task_key(id: str, prompt: str) -> str:
    """A task across runs: its id and the begin of what it asks, since task sets that are drawn may
    use an id again."""
    return f"{id}\n{visible(prompt, PROMPT)}"


@dataclass(frozen=True)
class Measurement:
    """Scores of one state, and what an episode costs.

    scores: by seed, then by task. calls, prompt_tokens, sampled_tokens: means per task; where a
    task is answered by several samples, of all of them.
    """

    scores: Mapping[int, Scores]
    calls: float
    prompt_tokens: float
    sampled_tokens: float

    @property
    def tokens(self) -> float:
        """Tokens per task, of prompts and replies."""
        return self.prompt_tokens + self.sampled_tokens


def measurement(scores: Mapping[int, Scores], usage: Usage, tasks: int) -> Measurement:
    """A measurement from the sum of what `tasks` tasks have cost."""
    return Measurement(
        scores, usage.calls / tasks, usage.prompt_tokens / tasks, usage.sampled_tokens / tasks
    )


def mean_of(parts: Sequence[Measurement]) -> Measurement:
    """Several seeds of one arm as one measurement."""
    scores = {seed: own for part in parts for seed, own in part.scores.items()}
    count = len(parts)
    return Measurement(
        scores,
        sum(part.calls for part in parts) / count,
        sum(part.prompt_tokens for part in parts) / count,
        sum(part.sampled_tokens for part in parts) / count,
    )


# episodes just played


def of_episodes(episodes: Sequence[Episode], metric: str, seed: int = 0) -> Measurement:
    """The mean score of each task over its episodes; children only cost tokens."""
    own: dict[str, list[float]] = {}
    for episode in episodes:
        if episode.parent is None:
            own.setdefault(_key(episode), []).append(scored(episode, metric))
    means = {task: sum(values) / len(values) for task, values in own.items()}
    return measurement({seed: means}, _usage(episodes), len(means))


def by_vote(episodes: Sequence[Episode], metric: str, samples: int, seed: int = 0) -> Measurement:
    """Self-consistency (Wang et al., arXiv 2203.11171): of each task the score of the answer that
    most of its `samples` episodes give."""
    own: dict[str, list[Episode]] = {}
    for episode in episodes:
        if episode.parent is None:
            own.setdefault(_key(episode), []).append(episode)
    scores = {
        task: majority_at_k(
            [e.output for e in several], [scored(e, metric) for e in several], samples, seed
        )
        for task, several in own.items()
    }
    return measurement({seed: scores}, _usage(episodes), len(scores))


def by_sample(episodes: Sequence[Episode], metric: str, samples: int) -> list[Scores]:
    """The scores of each of `samples` plays of the tasks, in the order of the samples."""
    plays: list[Scores] = [{} for _ in range(samples)]
    for episode in episodes:
        if episode.parent is None:
            plays[int(episode.id.rpartition("/")[2])][_key(episode)] = scored(episode, metric)
    return plays


def _key(episode: Episode) -> str:
    return task_key(episode.task.id, episode.task.prompt)


def _usage(episodes: Iterable[Episode]) -> Usage:
    return sum((usage for e in episodes for usage in e.usage.values()), Usage())


# the folder of a run


@dataclass(frozen=True)
class RunResult:
    """What a finished run came to.

    after: of the state that it ends with. held_out, validation: curves. spent: tokens, calls and
    cost of learning. by_role: the same by agent. by_policy: means over the steps that trained it of
    `OF_A_POLICY`. seconds: wall time. trained: tokens in updates.
    stopped: why the budget ended it, or "". key: of the final state.
    """

    seed: int
    before: Measurement
    after: Measurement
    held_out: Sequence[Point]
    validation: Sequence[Point]
    spent: Mapping[str, float]
    by_role: Mapping[str, Mapping[str, float]]
    by_policy: Mapping[str, Mapping[str, float]]
    seconds: float
    trained: int
    steps: int
    stopped: str


def run_result(data: RunData, seed: int) -> RunResult:
    """The result of a run that has ended."""
    summary = data.summary
    spent = dict((summary.get("budget") or {}).get("spent") or {})
    return RunResult(
        seed,
        _evaluated(data, "before", seed),
        _evaluated(data, "after", seed),
        _curve(data, data.eval_points(DURING if data.config.get("keep") == "best" else TEAM)),
        _curve(data, data.eval_points(VALIDATION)),
        spent,
        _by_role(summary.get("ledger") or {}),
        _by_policy(data),
        float(summary["seconds"]["total"]),
        int(summary["tokens"].get("trained", 0)),
        int(summary["steps"]),
        str((summary.get("budget") or {}).get("stopped") or ""),
    )


def _evaluated(data: RunData, label: str, seed: int) -> Measurement:
    """The evaluation of this label, from the episodes of the run."""
    own = [row for row in data.episodes if label in row.evaluations and not row.child]
    ids = tuple(f"{row.id}/" for row in own)
    children = [row for row in data.episodes if row.child and row.id.startswith(ids)]
    values: dict[str, list[float]] = {}
    for row in own:
        values.setdefault(f"{row.task}\n{row.prompt}", []).append(row.worth or 0.0)
    scores = {task: sum(each) / len(each) for task, each in values.items()}
    return measurement({seed: scores}, _spent([*own, *children]), len(scores))


def _spent(played: Iterable[EpisodeRow]) -> Usage:
    return sum(
        (
            Usage(each["calls"], each["prompt_tokens"], each["sampled_tokens"])
            for row in played
            for each in row.usage
        ),
        Usage(),
    )


def _curve(data: RunData, points: Iterable[tuple[int, float, float, float]]) -> list[Point]:
    """Points over tokens spent instead of steps. A step that has no row of metrics stands where
    the run ended."""
    spent = {row["step"]: (row.get("budget") or {}).get("tokens", 0.0) for row in data.metrics}
    end = (data.summary.get("budget") or {}).get("spent", {}).get("tokens", 0.0)
    at = {0: 0.0, **spent, int(data.summary["steps"]): end}
    return [(float(at.get(step, end)), mean) for step, mean, *_ in points]


def _by_role(ledger: LedgerTable) -> dict[str, dict[str, float]]:
    """Tokens, calls and cost of learning by agent: all kinds but evaluations."""
    table: dict[str, dict[str, float]] = {}
    for kind, agents in ledger.items():
        for agent, row in agents.items() if kind != EVALUATION else ():
            _add(table.setdefault(agent, dict(NOTHING)), row)
    return table


def _by_policy(data: RunData) -> dict[str, dict[str, float]]:
    """Of every policy that was trained the mean metrics of its updates."""
    updates: dict[str, list[Mapping[str, Any]]] = {}
    for row in data.metrics:
        for name, own in (row.get("policies") or {}).items():
            if own.get("tokens") and all(key in own for key in OF_A_POLICY):
                updates.setdefault(name, []).append(own)
    return {
        name: {key: fmean(own[key] for own in trained) for key in OF_A_POLICY}
        for name, trained in updates.items()
    }


def by_kind(ledger: LedgerTable) -> dict[str, dict[str, float]]:
    """Tokens, calls and cost of `learning` and of `evaluation`."""
    table = {"learning": dict(NOTHING), "evaluation": dict(NOTHING)}
    for kind, agents in ledger.items():
        for row in agents.values():
            _add(table["evaluation" if kind == EVALUATION else "learning"], row)
    return table


def stored_cost(folder: Path) -> dict[str, float]:
    """Tokens, calls and cost of all episodes in the folder of a run."""
    total = dict(NOTHING)
    for own in by_kind(ledger_of(rows(Store(folder / "episodes"), ""), ())).values():
        for key in total:
            total[key] += own[key]
    return total


def _add(sums: dict[str, float], row: Mapping[str, Any]) -> None:
    sums["tokens"] += row["prompt_tokens"] + row["sampled_tokens"]
    sums["calls"] += row["calls"]
    sums["cost"] += row["cost"]
