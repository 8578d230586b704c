"""Episode index of the report: a row for each episode, and the whole text of a selection, as
compact JSON.

Every text stands once in `strings` and is named by its number: prompts of a run are mostly the
same. A large run is sampled: first what failed, then best and worst of every step and evaluation,
then an even draw; the page says how many it left out.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...agents.types import Decision, Reward, Turn
from ..episodes.codec import kind_of
from ..episodes.store import Store
from ..types import Episode, Kind
from .html import visible

MAX_ROWS = 20_000  # episodes with a row in the list
MAX_EPISODES = 2_000  # of them with their whole text
MAX_BYTES = 12 << 20  # of that, as JSON
MAX_KIND = 40  # characters of a value in a task's meta that may make a kind of task
EACH = 3  # best and worst of every step and evaluation

Pieces = Callable[
    [str, Sequence[int]], "list[str] | None"
]  # (policy, token ids) -> the text of each, None without a tokenizer


@dataclass
class EpisodeRow:
    """An episode in the list of the report, read without unpacking its turns."""

    id: str
    group: str
    kind: Kind
    task: str
    prompt: str
    step: int
    state: str  # the key of what the team played with, "" in stores of 0.1
    worth: float | None
    rewards: Mapping[str, float | None]
    agents: tuple[str, ...]
    usage: Sequence[Mapping[str, Any]]  # `agent` and what its calls have cost
    # f failed, u unscorable, c a reply was truncated, m several siblings, g an agent saw the answer
    # and k: played on behalf of another, or about it
    marks: str
    about: str  # the id of that other one
    child: bool  # has it a parent?
    kinds: Mapping[str, str] = field(default_factory=dict)  # of its task, see `task_kinds`
    agent_of: Mapping[int, str] = field(default_factory=dict)  # by turn
    own_rewards: Mapping[str, float] = field(default_factory=dict)  # by agent, those of its own
    evaluations: tuple[str, ...] = ()  # labels of those that it is an episode of

    @property
    def labels(self) -> tuple[str, ...]:
        """When it was played: the evaluations it belongs to, else its step."""
        if self.evaluations:
            return tuple(f"eval-{n}" if self.kind == "eval" else n for n in self.evaluations)
        return (f"trial-{self.step:06d}" if self.kind == "trial" else self.group.split("/")[0],)

    @property
    def tokens(self) -> int:
        """Tokens that were sampled."""
        return sum(usage["sampled_tokens"] for usage in self.usage)

    @property
    def trains(self) -> bool:
        """Is it one of a step's own episodes, and not played on behalf of one?"""
        return self.kind == "train" and not self.child


def episode_row(data: Mapping[str, Any], metric: str) -> EpisodeRow:
    """A row from one line of the store. `worth`: the reward named `metric`, else the sum of the
    team's; null if not scorable."""
    team = [r for r in data["rewards"] if _whole(r) and not r["agent"]]
    named = [r for r in team if r["name"] == metric] or team
    values = [r["value"] for r in named]
    worth = None if not values or None in values else sum(values)
    turns, kind = data["turns"], kind_of(data)
    about = data["parent"] or data.get("follows", "")
    scored = kind != "aside" and not data["parent"]
    marks = "f" * bool(data["error"]) + "u" * (worth is None and scored and not data["error"])
    marks += "c" * any(t["finish_reason"] == "length" for t in turns) + "m" * any(
        t["sibling"] for t in turns
    )
    marks += "g" * any(t["saw_gold"] for t in turns) + "k" * bool(about)
    return EpisodeRow(
        id=data["id"],
        group=data["group"],
        kind=kind,
        task=data["task"]["id"],
        prompt=visible(data["task"]["prompt"], 90),
        step=data["step"],
        state=data.get("state", ""),
        worth=worth,
        rewards={
            r["name"] + (f" of {r['agent']}" if r["agent"] else ""): r["value"]
            for r in data["rewards"]
            if _whole(r)
        },
        agents=tuple(dict.fromkeys(t["agent"] for t in turns)),
        usage=data["usage"],
        marks=marks,
        about=about,
        child=bool(data["parent"]),
        kinds=task_kinds(data["task"]),
        agent_of={t["index"]: t["agent"] for t in turns},
        own_rewards=_own_rewards(data["rewards"]),
    )


def task_kinds(task: Mapping[str, Any]) -> dict[str, str]:
    """What a task may be counted by: its source, and the short values of its meta."""
    meta = json.loads(task["meta"]) if task.get("meta") else {}  # packed as JSON
    short = {
        name: str(value)
        for name, value in meta.items()
        if isinstance(value, (str, int)) and len(str(value)) <= MAX_KIND
    }
    return {**({"source": task["source"]} if task.get("source") else {}), **short}


def _own_rewards(rewards: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """By agent, the sum of the whole episode's rewards that are its own."""
    found: dict[str, float] = {}
    for reward in rewards:
        if reward["agent"] and _whole(reward) and reward["value"] is not None:
            found[reward["agent"]] = found.get(reward["agent"], 0.0) + reward["value"]
    return found


def _whole(reward: Mapping[str, Any]) -> bool:
    """Is a packed reward about the whole episode, not a turn or a decision?"""
    return bool(reward["turn"] < 0 and reward.get("decision", -1) < 0)


def rows(store: Store, metric: str) -> list[EpisodeRow]:
    """A row for every episode, in the order of the store."""
    return [episode_row(data, metric) for data in store.lines()]


def most_telling(rows: Sequence[EpisodeRow], limit: int) -> list[EpisodeRow]:
    """At most `limit` rows whose whole text the page holds: first failed and unscorable ones, then
    best and worst of every step and evaluation, then an even draw."""
    order: dict[str, EpisodeRow] = {
        row.id: row for row in [r for r in rows if "f" in r.marks or "u" in r.marks][: limit // 4]
    }
    labels: dict[str, list[EpisodeRow]] = defaultdict(list)
    for row in rows:
        for label in row.labels:
            labels[label].append(row)
    ends = [
        ranked[-EACH:] + ranked[:EACH]
        for ranked in (sorted(own, key=rank) for own in labels.values())
    ]
    latest = list(labels)[-1:] + [name for name in labels if name.startswith("eval-")]
    for several in (
        *ends,
        *(labels[name] for name in latest),
        sorted(rows, key=lambda r: zlib.crc32(r.id.encode())),
    ):
        order |= {row.id: row for row in several if row.id not in order}
    return list(order.values())[:limit]


def rank(row: EpisodeRow) -> tuple[float, str]:
    return (-math.inf if row.worth is None else row.worth, row.id)


@dataclass
class EpisodeIndex:
    """The browser's data, filled run by run."""

    pieces: Pieces = lambda policy, ids: None
    strings: dict[str, int] = field(default_factory=dict)
    rows: list[list[Any]] = field(default_factory=list)
    episodes: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0

    def add(
        self,
        run: Path,
        name: str,
        rows: Sequence[EpisodeRow],
        max_episodes: int = MAX_EPISODES,
        always: Collection[str] = (),
    ) -> None:
        """Add a run's rows, and the whole text of at most `max_episodes` of its episodes, beside
        those of the ids `always`."""
        number, store = len(self.runs), Store(run / "episodes")
        listed = rows if len(rows) <= MAX_ROWS else even(rows, MAX_ROWS)
        ids = {row.id for row in most_telling(listed, max_episodes)} | set(always)
        learned = read_learned(run / "learned.jsonl", ids)
        whole = 0
        for episode in store.read(id=ids):
            if self.size < MAX_BYTES or episode.id in always:
                packed = self.pack(episode, learned.get(episode.id, {}))
                self.size += len(json.dumps(packed))
                self.episodes[f"{number}:{episode.id}"] = packed
                whole += 1
        self.rows += [
            [
                number,
                r.id,
                [self.text(label) for label in r.labels],
                self.text(r.task),
                self.text(r.prompt),
                r.step,
                r.worth,
                [self.text(a) for a in r.agents],
                r.tokens,
                r.marks,
                self.text(r.kind),
                self.text(r.about),
            ]
            for r in listed
        ]
        self.runs.append(
            {"name": visible(name), "episodes": len(rows), "listed": len(listed), "whole": whole}
        )

    def text(self, value: Any, limit: int = 8000) -> int:
        """The number of a text, which is stored once."""
        return self.strings.setdefault(visible(str(value), limit), len(self.strings))

    def pack(
        self, episode: Episode, learned: Mapping[tuple[int, int], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """An episode as the browser shows it."""
        whole = [r for r in episode.rewards if r.turn is None and r.decision is None]
        return {
            "task": self.text(episode.task.id),
            "prompt": self.text(episode.task.prompt),
            "stop": episode.stop_reason,
            "answer": None if episode.task.answer is None else self.text(episode.task.answer),
            "output": None if episode.output is None else self.text(episode.output),
            "error": None if episode.error is None else self.text(episode.error),
            "kind": episode.kind,
            "parent": episode.parent,
            "follows": episode.follows,
            "from": list(episode.output_from),
            "state": episode.state.key,
            "rewards": [self.reward(r) for r in whole],
            "decisions": [self.decision(d, episode.rewards) for d in episode.decisions],
            "operations": [
                [o.index, list(o.reads), *map(self.text, (o.name, o.text, o.error))]
                for o in episode.operations
            ],
            "turns": [
                self.turn(t, episode.rewards, learned.get((t.index, crc(t.token_ids)), {}))
                for t in episode.turns
            ],
        }

    def turn(
        self, turn: Turn, rewards: Iterable[Reward], learned: Mapping[str, Any]
    ) -> dict[str, Any]:
        own = [r for r in rewards if (r.turn, r.sibling) == (turn.index, turn.sibling)]
        pieces = self.pieces(turn.policy, turn.token_ids) if turn.token_ids else None
        data = {
            "i": turn.index,
            "k": turn.sibling,
            "agent": self.text(turn.agent),
            "version": turn.version or "base",
            "told": [[m.role, self.text(m.content)] for m in turn.messages],
            "text": self.text(turn.text),
            "reads": list(turn.reads),
            "n": len(turn.token_ids),
            "rewards": [self.reward(r) for r in own],
        }
        marks = ["not taken"] * (not turn.taken) + ["truncated"] * (turn.finish_reason == "length")
        marks += ["saw the answer"] * turn.saw_gold + [turn.source] * (turn.source != "sampled")
        data |= {"marks": marks} if marks else {}
        data |= {"advantage": learned["advantage"]} if "advantage" in learned else {}
        if pieces is not None and len(pieces) == len(turn.token_ids):
            data["tokens"] = [self.text(piece) for piece in pieces]
            data |= (
                {"logp": [short(x) for x in turn.logprobs]}
                if len(turn.logprobs) == len(pieces)
                else {}
            )
            data |= (
                {"ratio": learned["ratio"]}
                if len(learned.get("ratio") or ()) == len(pieces)
                else {}
            )
        return data

    def decision(self, decision: Decision, rewards: Iterable[Reward]) -> list[Any]:
        own = [self.reward(r) for r in rewards if r.decision == decision.index]
        chance = math.exp(decision.logprob) if math.isfinite(decision.logprob) else None
        return [self.text(decision.name), self.text(decision.choice), short(chance), own]

    def reward(self, reward: Reward) -> list[Any]:
        value = reward.value if math.isfinite(reward.value) else None
        name = f"{reward.name} of {reward.agent}" if reward.agent else reward.name
        return [self.text(name), value, self.text(reward.text) if reward.text else None]

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "strings": list(self.strings),
            "rows": self.rows,
            "episodes": self.episodes,
        }


def even(rows: Sequence[EpisodeRow], limit: int) -> list[EpisodeRow]:
    """Every n-th row, `limit` of them, in order."""
    return [rows[i * len(rows) // limit] for i in range(limit)]


def short(value: float | None) -> float | None:
    return round(value, 3) if value is not None and math.isfinite(value) else None


def crc(ids: Iterable[int]) -> int:
    """Which of several siblings: a checksum of what was sampled."""
    return zlib.crc32(json.dumps(list(ids)).encode())


def read_learned(path: Path, ids: set[str]) -> dict[str, dict[tuple[int, int], dict[str, Any]]]:
    """The token log of each turn: {episode: {(turn, checksum of its tokens): advantage and
    ratios}}. See `trainers/monitoring/token_log.py`."""
    turns: dict[str, dict[tuple[int, int], dict[str, Any]]] = defaultdict(dict)
    for data in json_lines(path):
        if data["episode"] in ids:
            turns[data["episode"]][data["turn"], data["ids"]] = data
    return turns


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file; a last line torn by a kill is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return
