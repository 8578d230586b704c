"""Suites of evaluations: contestants on tasks, every finished episode kept, so that a suite goes on
where it was stopped.

A `Variant` is a team as it is to be measured: players, texts and adapter versions. The single
agent, the base team, one adapter alone and a team of agents from two checkpoints are contestants,
and so is whatever you think of next. What it played is stored under a key of all that its answers
depend on; two contestants with one key are one, and are played once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...agents.text.answers import extract, normalise, same
from ...agents.types import Reward, SettingError, Task, to_json
from ..episodes.runner import EpisodeRequest, EpisodeRunner
from ..episodes.store import Store
from ..rewards.builtin import reward_name
from ..rewards.scoring import score
from ..types import Episode, Usage
from .rounds import answers_by_round, transitions
from .statistics import Evaluation, holm, majority_at_k, paired, pass_at_k, quantile, sign_flip_p

ANSWER = "answer of a turn"  # the reward that says whether a turn's answer is right
RIGHT = 1.0 - 1e-9  # a score from which an answer counts as right


@dataclass(frozen=True)
class Variant:
    """A team as it is measured.

    Args:
        name: in tables. rollouts: who plays, with their texts and rewards. versions: adapter
            version by policy, none speaks as the base.
        sha256: what those versions hold, by policy; bases: which base each policy is on. Together
            they say whose answers these are, whatever the policies are called.
    """

    name: str
    rollouts: EpisodeRunner
    versions: Mapping[str, str]
    sha256: Mapping[str, str]
    bases: Mapping[str, str] = field(default_factory=dict)

    def key(self, seed: int, greedy: bool) -> str:
        """16 hex digits of all that the answers depend on: system and its code, agents, values,
        adapters, base, sampling, rewards, seed."""
        player = self.player(seed, greedy)
        system, specs = (
            player.system,
            [
                {**to_json(agent), "policy": self.speaks(agent.policy)}
                for agent in player.system.specs
            ],
        )
        facts = [
            f"{type(system).__module__}:{type(system).__qualname__}",
            to_json(system.arguments()),
            specs,
            to_json(dict(player.values)),
            to_json(player.sampling),
            seed,
            [reward_name(fn) for fn in player.rewards],
            [code_of(type(system)), *map(code_of, player.rewards)],
        ]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[
            :16
        ]

    def speaks(self, policy: str) -> list[str]:
        """Which weights answer for a policy: its base, and the adapter that is on. A policy without
        a base of its own goes by its name."""
        base = (
            [self.bases[policy]]
            if policy in self.bases
            else [policy, *sorted(set(self.bases.values()))]
        )
        return [*base, self.sha256[policy]] if policy in self.versions else base

    def player(self, seed: int, greedy: bool) -> EpisodeRunner:
        """The same with this seed, at temperature 0 if `greedy`."""
        return dataclasses.replace(self.rollouts.greedy() if greedy else self.rollouts, seed=seed)


def code_of(what: Any) -> str:
    """A hash of the module that defines a class or function; "" where there is no source to
    read."""
    module = inspect.getmodule(what)
    try:
        return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:16] if module else ""
    except (OSError, TypeError):
        return ""


@dataclass(frozen=True)
class Plan:
    """What every contestant of a suite plays: each task `samples` times for each seed. Greedy play
    is the same every time."""

    tasks: tuple[Task, ...]
    metric: str
    seeds: tuple[int, ...] = (0,)
    samples: int = 1
    greedy: bool = True

    def __post_init__(self) -> None:
        if not self.tasks:
            raise SettingError("evaluate: the task set is empty; expected at least one task")
        if self.samples < 1 or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise SettingError(
                f"samples and seeds: at least one each, no seed twice; got {self.samples} and"
                f" {list(self.seeds)}"
            )
        if self.greedy and (self.samples > 1 or len(self.seeds) > 1):
            raise SettingError(
                "samples, seeds: at temperature 0 every sample is the same; set sampled to draw"
                " several"
            )

    def jobs(self, contestant: Variant, seed: int) -> list[EpisodeRequest]:
        """Its episodes. Equal tasks and samples draw equal random numbers, whoever plays, so that
        differences are the players'."""
        key = contestant.key(seed, self.greedy)
        return [
            EpisodeRequest(
                task, f"eval-{key}/{task_digest(task)}/{task.id}", k, draw=f"eval/{task.id}/{k}"
            )
            for task in self.tasks
            for k in range(self.samples)
        ]


def task_digest(task: Task) -> str:
    """8 hex digits of a task's whole content: another task of the same id is not the same task."""
    return hashlib.sha256(
        json.dumps(to_json(task), sort_keys=True, default=str).encode()
    ).hexdigest()[:8]


Tick = Callable[[Episode], None]
Told = Callable[
    [str, int, int], Any
]  # (contestant, episodes in all, found) -> context manager giving a Tick


async def play(contestant: Variant, plan: Plan, folder: Path, told: Told) -> list[Episode]:
    """Its episodes in the order of the plan, then their children; those stored in `folder/KEY` are
    taken, the others played and stored."""
    found: list[Episode] = []
    children: list[Episode] = []
    for seed in plan.seeds:
        wanted = plan.jobs(contestant, seed)
        with Store(folder / contestant.key(seed, plan.greedy)) as store:
            have = {e.id: e for e in store}
            todo = [job for job in wanted if job.id not in have]
            with told(contestant.name, len(wanted), len(wanted) - len(todo)) as tick:
                async for episode in contestant.player(seed, plan.greedy).collect(
                    todo, contestant.versions
                ):
                    store.append(episode)
                    have[episode.id] = episode
                    tick(episode)
        found += [have[job.id] for job in wanted]
        ours = tuple(f"{job.id}/" for job in wanted)
        children += [e for e in have.values() if e.parent is not None and e.id.startswith(ours)]
    return found + children


# what is read off episodes


@dataclass(frozen=True)
class Measured:
    """What a contestant did. `evaluation` holds the mean score of each task; `row` is what goes
    into JSON."""

    name: str
    key: str
    evaluation: Evaluation
    episodes: tuple[Episode, ...]
    row: Mapping[str, Any]


def by_task(episodes: Iterable[Episode]) -> dict[str, list[Episode]]:
    found: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        found[episode.task.id].append(episode)
    return found


def scored(episode: Episode, metric: str) -> float:
    """Its score; 0 for an episode that failed or could not be scored."""
    value = episode.reward(metric)
    return 0.0 if value != value else value


def evaluation_of(plan: Plan, episodes: Sequence[Episode]) -> Evaluation:
    """Mean score per task. Raises `SettingError` if rewards were given but none of the metric's
    name."""
    given = {r.name for e in episodes for r in e.rewards if r.agent is None and r.turn is None}
    if given and plan.metric not in given:
        raise SettingError(
            f"rewards: none of the team is named {plan.metric!r}, the accuracy of this suite;"
            f" given: {sorted(given)}"
        )
    tasks = by_task(episodes)
    scores = {
        task.id: sum(scored(e, plan.metric) for e in tasks[task.id]) / len(tasks[task.id])
        for task in plan.tasks
    }
    lost = [e for e in episodes if e.reward(plan.metric) != e.reward(plan.metric)]
    errors = {
        e.error or next((r.text for r in e.rewards if r.value != r.value), "no reward")
        for e in lost
    }
    tokens = sum(usage.sampled_tokens for e in episodes for usage in e.usage.values())
    return Evaluation(scores, len(lost), tuple(sorted(errors)), tokens)


async def measured(contestant: Variant, plan: Plan, episodes: Sequence[Episode]) -> Measured:
    """All measures of what a contestant played."""
    everything, episodes = episodes, [e for e in episodes if e.parent is None]
    found = evaluation_of(plan, episodes)
    per_seed = len(plan.tasks) * plan.samples
    seeds = {seed: episodes[n * per_seed : (n + 1) * per_seed] for n, seed in enumerate(plan.seeds)}
    row = {
        **found.summary(),
        "by_seed": {
            str(seed): sum(scored(e, plan.metric) for e in own) / len(own)
            for seed, own in seeds.items()
        },
        **over_samples(episodes, plan),
        "rewards": reward_parts(episodes),
        "cost": cost(everything),
        "agreement": agreement(episodes),
        "diversity": diversity(episodes),
        "transitions": await rounds(episodes, contestant, plan.metric),
        "adapters_on": dict(contestant.versions),
    }
    return Measured(
        contestant.name, contestant.key(plan.seeds[0], plan.greedy), found, tuple(episodes), row
    )


def over_samples(episodes: Sequence[Episode], plan: Plan) -> dict[str, Any]:
    """`pass_at` and `majority_at` for k = 1, 2, 4, ... up to the samples of a task; nothing for a
    single sample."""
    count = plan.samples * len(plan.seeds)
    ks = [k for k in (2**n for n in range(20)) if k <= count]
    ks += [count] * (count not in ks)
    if count == 1:
        return {}
    tasks = by_task(episodes).values()
    scores = [[scored(e, plan.metric) for e in own] for own in tasks]
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


async def rounds(
    episodes: Sequence[Episode], contestant: Variant, metric: str
) -> dict[str, Any] | None:
    """What rounds do to answers (`transitions.py`): every taken turn is scored as if it were the
    team's output. None if nobody speaks twice."""
    system, reward = contestant.rollouts.system, contestant.rollouts.rewards[0]
    member_of = getattr(system, "member_of", None) or {
        spec.name: spec.name for spec in system.specs
    }
    if not any(len(answers_by_round(episode, member_of)) > 1 for episode in episodes):
        return None
    known: dict[tuple[str, str], float] = {}

    async def value(episode: Episode, text: str) -> float:
        if (episode.task.id, text) not in known:
            found = await score(
                episode.task, dataclasses.replace(episode, output=text, rewards=()), [reward]
            )
            known[episode.task.id, text] = next(
                (r.value for r in found if r.name == metric and r.agent is None), math.nan
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


# between contestants


def compare(pairs: Iterable[tuple[Measured, Measured]]) -> list[dict[str, Any]]:
    """Paired differences (second minus first) with intervals and p-values, raw and corrected for
    their number (Holm)."""
    rows = []
    for first, second in pairs:
        differences = [
            second.evaluation.scores[task] - first.evaluation.scores[task]
            for task in first.evaluation.scores
        ]
        change = paired(first.evaluation, second.evaluation)
        rows.append(
            {"from": first.name, "to": second.name, **change, "p": sign_flip_p(differences)}
        )
    corrected = holm({str(n): row["p"] for n, row in enumerate(rows)})
    return [{**row, "p_holm": corrected[str(n)]} for n, row in enumerate(rows)]


def seen(tasks: Iterable[Task], ids: set[str], prompts: set[str]) -> list[str]:
    """Ids of the tasks that were trained on: by id, or by the hash of what is asked."""
    return [task.id for task in tasks if task.id in ids or prompt_hash(task.prompt) in prompts]


def prompt_hash(prompt: str) -> str:
    """A prompt's identity: white space and case do not make it another one."""
    return hashlib.sha256(" ".join(prompt.split()).casefold().encode()).hexdigest()


async def suite(
    contestants: Sequence[Variant], plan: Plan, folder: Path, told: Told
) -> dict[str, Measured]:
    """Play and measure all, in order; a contestant that is the same as an earlier one under another
    name shares its episodes."""
    found: dict[str, Measured] = {}
    for contestant in contestants:
        if contestant.name in found:
            raise SettingError(
                f"evaluate: two contestants are named {contestant.name!r}; names are unique"
            )
        found[contestant.name] = await measured(
            contestant, plan, await play(contestant, plan, folder, told)
        )
    return found
