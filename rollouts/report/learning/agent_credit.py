"""What each agent was credited with: advantages of its trained turns, its own rewards, and what its
adapter is worth alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..episode_index import EpisodeRow, json_lines
from ..html import is_number, number, table, text
from ..run_data import RunData
from ..tables import colours, difference_with_interval


@dataclass
class Credit:
    """An agent's trained turns: how many, how many of them with an advantage above 0, and the sum
    of the advantages' sizes. `own`: its own rewards, by step."""

    turns: int = 0
    towards: int = 0
    size: float = 0.0
    own: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, advantage: float) -> None:
        self.turns += 1
        self.towards += advantage > 0
        self.size += abs(advantage)


def agent_credit(run: RunData) -> dict[str, Credit]:
    """By agent, in the order of the policies first: its credit over the whole run."""
    credit: dict[str, Credit] = defaultdict(Credit)
    episodes = {row.id: row for row in run.episodes if row.kind == "train"}
    _add_advantages(credit, run.folder / "learned.jsonl", episodes)
    for row in episodes.values():
        for agent, value in row.own_rewards.items():
            credit[agent].own[row.step].append(value)
    order = list(run.policies)
    return dict(sorted(credit.items(), key=lambda each: _place(order, each[0])))


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _add_advantages(
    credit: dict[str, Credit], path: Path, episodes: Mapping[str, EpisodeRow]
) -> None:
    """The advantages in a run's token log, by the agent that spoke the turn."""
    for data in json_lines(path):
        row = episodes.get(data["episode"])
        agent = data["policy"] if row is None else row.agent_of.get(data["turn"], data["policy"])
        if (advantage := mean_advantage(data["advantage"])) is not None:
            credit[agent].add(advantage)


def mean_advantage(advantage: Any) -> float | None:
    """A turn's advantage, the mean of its tokens' where they differ; None if it has none."""
    values = advantage if isinstance(advantage, list) else [advantage]
    known = [float(value) for value in values if is_number(value)]
    return math.fsum(known) / len(known) if known else None


def credit_table(run: RunData) -> str:
    """A row for each agent; "" for a run in which none was credited with anything."""
    credit, alone = agent_credit(run), run.summary.get("adapters") or {}
    names = list(dict.fromkeys([*credit, *alone]))
    if not names:
        return ""
    colour = colours(list(run.policies)) | {n: "c6" for n in names if n not in run.policies}
    rows = [_row(name, credit.get(name, Credit()), alone.get(name), colour) for name in names]
    columns = list(zip(*rows, strict=True))
    kept = [i for i, column in enumerate(columns) if any(cell != "–" for cell in column)]
    return table([HEAD[i] for i in kept], [[row[i] for i in kept] for row in rows])


HEAD = (
    "agent",
    "turns trained",
    "trained towards",
    "mean size of advantage",
    "own reward, first steps",
    "own reward, last steps",
    "its adapter alone",
)


def _row(
    name: str, credit: Credit, alone: Mapping[str, Any] | None, colour: Mapping[str, str]
) -> tuple[str, ...]:
    turns = credit.turns
    first, last = _ends(credit.own)
    return (
        f'<span class="{colour[name]}">{text(name)}</span>',
        number(turns) if turns else "–",
        f"{100 * credit.towards / turns:.0f} %" if turns else "–",
        number(credit.size / turns) if turns else "–",
        number(first),
        number(last),
        difference_with_interval(alone["paired"]) if alone and alone.get("paired") else "–",
    )


def _ends(own: Mapping[int, Sequence[float]]) -> tuple[float | None, float | None]:
    """Mean reward in the first third of the steps and in the last one; None without any."""
    steps = sorted(own)
    if not steps:
        return None, None
    third = max(1, len(steps) // 3)
    first, last = (
        [value for step in part for value in own[step]] for part in (steps[:third], steps[-third:])
    )
    return sum(first) / len(first), sum(last) / len(last)
