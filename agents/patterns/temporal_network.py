"""Temporal feed-forward network: agents answer in steps; each reads and rates all answers of the
step before, until enough of them agree.

The network of DyLAN (Liu et al., "A dynamic LLM-powered agent network for task-oriented agent
collaboration", arXiv 2310.02170): a node is one agent at one step, its predecessors are the nodes
of the step before. A ranker leaves the best few agents in play from `rank_step` on, and the network
ends at a step where more than two thirds of the agents in play give one answer. Which agents play
at all is the value `team` (names, separated by commas), so that a method can select them.

Against the authors' code: the agents that the ranker names are the ones that go on (there the
ranker's numbers are compared with positions of a shuffled loop, so two others may); the ranker is
asked once, so any number of steps works; naming one answer twice leaves no agent alone, a second is
drawn; a ranking that cannot be read is on record as an operation with an error. Ratings are cut off
before a text is shown to others, so nobody can put numbers into another's mouth; ratings that
cannot be read are rewards of NaN instead of equal weights without a word. Answers are compared as
`answers.same` does, not by BLEU where the task is open.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..concurrency import gather
from ..lookup import trusted
from ..settings import setting
from ..state import Param
from ..system import System
from ..team import Team
from ..text.answers import majority, normalise, vote
from ..text.templates import render
from ..transcript import Output
from ..types import Reward, SettingError, Task, Turn, nearest

TEAM = "team"  # the value that says who plays
RATING = "rating"  # the reward that a rating is; its source is the index of the turn that gave it
HIGHEST = 5  # points of the best answer
UPDATE = (
    "{prompt}\n\nThese are the solutions of other agents:\n\n{others}\n\nUsing their reasoning as"
    " advice, with critical thinking, give an updated answer; they might all be wrong. Then give"
    " each of these {count} solutions a score from 1 to 5, in their order, in the form [[1, 5,"
    " 2]], at the very end."
)
RANK = (
    "{prompt}\n\nThese are the solutions of other agents:\n\n{others}\n\nThink step by step and"
    " choose the best {keep} solutions. End with their numbers, such as [1, 2]."
)
_RATINGS = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_RANKING = re.compile(r"\[([\d\s,]+)\]")


@trusted("system")
@dataclass
class TemporalNetwork(System):
    """Two or more agents and, if one is named, a ranker; the output is the answer most agents of
    the last step give (ties: see `answers.majority`).

    A step asks only as many agents as may decide it, in an order drawn by the episode's seed, and
    further ones while they have not. Every rating becomes a `Reward` named `rating`, from 0 to 1:
    `agent` and `turn` are the rated ones, `source` is the index of the turn that rated, the value
    is NaN if its ratings could not be read. Episodes keep them if `rewards` names
    `marlora.rollouts.rewards.ratings:ratings`.

    Args:
        steps: T; answers of an agent at most.
        consensus: the network ends at a step where more than this share of the agents in play give
            one answer; 1 never.
        ranker: an agent, besides the others, that ranks answers before `rank_step`; "" is none.
        rank_step, keep: from this step on the best `keep` agents go on, if more are in play.
        ask, update, rank: prompts of the first step, of later ones, and of the ranker, as
            templates. Fields: `prompt`; in the last two also `others` (quotes) and `count` (of
            them); in `rank` `keep`.
        quote: how one of the others' answers is shown. Fields: `number` (from 1, in an order drawn
            anew for every reader) and `text`.
    """

    steps: int = setting("answers of an agent at most", 4, at_least=1)
    consensus: float = setting(
        "share of equal answers above which a step is the last", 2 / 3, at_least=0, at_most=1
    )
    ranker: str = ""
    rank_step: int = setting("the ranker is asked before this step", 3, at_least=2)
    keep: int = setting("agents that go on after the ranking", 2, at_least=1)
    ask: str = "{prompt}"
    update: str = UPDATE
    rank: str = RANK
    quote: str = "Solution {number}: {text}"

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [spec.name for spec in self.specs]
        if self.ranker and self.ranker not in names:
            raise SettingError(
                f"TemporalNetwork: ranker {self.ranker!r} is no agent;"
                f" {nearest(self.ranker, names)}"
            )
        if len(self.candidates) < 2:
            raise SettingError(
                "TemporalNetwork: at least two agents besides the ranker expected, got"
                f" {len(self.candidates)}"
            )
        self._check_templates()

    def _check_templates(self) -> None:
        known: dict[str, Sequence[str]] = {
            "ask": ("prompt",),
            "update": ("prompt", "others", "count"),
            "rank": ("prompt", "others", "count", "keep"),
            "quote": ("number", "text"),
        }
        for name, fields in known.items():
            render(getattr(self, name), dict.fromkeys(fields, ""), setting=name)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The agents that answer, all of them, in spec order."""
        return tuple(spec.name for spec in self.specs if spec.name != self.ranker)

    def params(self) -> tuple[Param, ...]:
        """Those of every system, and `team`: the agents that play."""
        role = "the agents that answer, separated by commas"
        everyone = team_value(self.candidates)
        return *super().params(), Param(TEAM, everyone, "choice", role=role, legal=self._refused)

    def _refused(self, value: Any) -> str | None:
        """Why this is no team; None if it is one."""
        names = members(value)
        for name in names:
            if name not in self.candidates:
                return f"{name!r} is no agent that answers; {nearest(name, self.candidates)}"
        return None if names and len({*names}) == len(names) else f"expected names, got {value!r}"

    async def run(self, task: Task, team: Team) -> Output:
        active = self._playing(team.values)
        nodes: list[Turn] = []
        for number in range(1, self.steps + 1):
            if number == self.rank_step and self.ranker and len(active) > self.keep:
                active = await self._ranked(task, team, active, nodes)
            nodes = await self._step(task, team, active, nodes)
            if self.agreed(nodes, len(active)):
                break
        output = majority(map(answered, nodes), team.rng)
        return Output(output, [turn for turn in nodes if _voted(turn, output)])

    def _playing(self, values: Mapping[str, Any]) -> list[str]:
        """The agents in play at the first step, in spec order."""
        value = values.get(TEAM)
        if value is None:
            return list(self.candidates)
        fault = self._refused(value)
        if fault:
            raise SettingError(f"values.{TEAM}: {fault}")
        chosen = members(value)
        return [name for name in self.candidates if name in chosen]

    async def _step(
        self, task: Task, team: Team, active: Sequence[str], before: Sequence[Turn]
    ) -> list[Turn]:
        """The answers of one step, each to all of the step before, with their ratings as rewards;
        agents that could not change a consensus any more are not asked."""
        order = team.rng.sample(active, len(active))
        shown = {name: team.rng.sample(before, len(before)) for name in order}

        async def node(name: str) -> Turn:
            return (
                await team[name].fresh().reply(self._prompt(task, shown[name]), reads=shown[name])
            )

        first = min(enough(len(order), self.consensus), len(order))
        nodes = await gather(node(name) for name in order[:first])
        for name in order[first:]:
            if self.agreed(nodes, len(order)):
                break
            nodes.append(await node(name))
        for turn in nodes:
            team.rewards.extend(_rewards(turn, shown[turn.agent]))
        return nodes

    def agreed(self, nodes: Sequence[Turn], playing: int) -> bool:
        """Whether more than the share `consensus` of so many agents in play gave one answer."""
        votes = [given for turn in nodes if (given := vote(answered(turn)))]
        most = max(Counter(map(normalise, votes)).values(), default=0)
        return most >= enough(playing, self.consensus)

    async def _ranked(
        self, task: Task, team: Team, active: Sequence[str], nodes: Sequence[Turn]
    ) -> list[str]:
        """The agents that go on, in spec order, by the ranker's word on their last answers."""
        shown = team.rng.sample(nodes, len(nodes))
        fields = {**self._fields(task, shown), "keep": self.keep}
        reply = (
            await team[self.ranker]
            .fresh()
            .reply(render(self.rank, fields, setting="rank"), reads=shown)
        )
        named = ranking(reply.text, len(shown), self.keep)
        best = completed(named, len(shown), self.keep, team.rng)
        kept = [name for name in active if name in {shown[number].agent for number in best}]
        fault = "" if len(named) == self.keep else f"{self.keep - len(named)} of them drawn"
        team.record("ranking", team_value(kept), reads=[reply], error=fault)
        return kept

    def _prompt(self, task: Task, shown: Sequence[Turn]) -> str:
        if not shown:
            return render(self.ask, {"prompt": task.prompt}, setting="ask")
        return render(self.update, self._fields(task, shown), setting="update")

    def _fields(self, task: Task, shown: Sequence[Turn]) -> dict[str, Any]:
        quotes = [
            render(self.quote, {"number": number, "text": answered(turn)}, setting="quote")
            for number, turn in enumerate(shown, 1)
        ]
        return {"prompt": task.prompt, "others": "\n\n".join(quotes), "count": len(shown)}


def members(value: Any) -> list[str]:
    """The names in a value of `team`."""
    return [name.strip() for name in str(value).split(",") if name.strip()]


def team_value(names: Sequence[str]) -> str:
    """The value of `team` that names these agents."""
    return ", ".join(names)


def enough(count: int, share: float = 2 / 3) -> int:
    """How many of `count` equal answers are more than this share of them."""
    return math.floor(share * count + 1e-9) + 1


def answered(turn: Turn) -> str:
    """A node's text without its ratings."""
    return _RATINGS.sub("", turn.text).strip()


def ratings(text: str, count: int) -> list[float] | None:
    """The points in the last `[[...]]` of a text, each divided by 5 and cut to 0 to 1; 0 for what
    is no whole number. None if there are not `count` of them."""
    found = _RATINGS.findall(text)
    points = [_points(part) for part in found[-1].split(",")] if found else []
    return points if len(points) == count else None


def _points(text: str) -> float:
    text = text.strip()
    whole = re.fullmatch(r"[-+]?\d{1,9}", text)
    return min(max(int(text) / HIGHEST, 0.0), 1.0) if whole else 0.0


def ranking(text: str, count: int, keep: int) -> list[int]:
    """The numbers (from 0, below `count`, none twice) in the last `[a, b, ...]` of `keep` numbers
    from 1; a number too high is the last answer's. Empty if there is no such list."""
    for inside in reversed(_RANKING.findall(text)):
        numbers = [int(part) for part in inside.split(",") if part.strip().isdigit()]
        if len(numbers) == keep == inside.count(",") + 1:
            return list(dict.fromkeys(min(max(n - 1, 0), count - 1) for n in numbers))
    return []


def completed(named: Sequence[int], count: int, keep: int, rng: random.Random) -> list[int]:
    """`keep` distinct numbers below `count`: those named, and further ones drawn."""
    others = [number for number in range(count) if number not in named]
    return [*named, *rng.sample(others, keep - len(named))]


def _rewards(rater: Turn, rated: Sequence[Turn]) -> list[Reward]:
    points = ratings(rater.text, len(rated))
    text = "" if points else "no ratings could be read"
    return [
        Reward(RATING, value, text, turn.agent, turn.index, turn.sibling, source=str(rater.index))
        for turn, value in zip(rated, points or [math.nan] * len(rated), strict=True)
    ]


def _voted(turn: Turn, output: str) -> bool:
    given = vote(answered(turn))
    return given is not None and bool(output) and normalise(given) == normalise(output)
