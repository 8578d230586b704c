"""Evaluation suites: variants of a team on a task set, resumable, since every finished episode is
stored.

A `Variant` is a team as it is to be measured: agents, texts and adapter versions. The single agent,
the base team, one adapter alone and a team of agents from two checkpoints are variants. Episodes
are stored under a key of all that a variant's answers depend on; two variants with one key are the
same and are played once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...agents.state import TeamState
from ...agents.types import SettingError, Task, to_json
from ..episodes.aside_store import StoredAsides
from ..episodes.runner import EpisodeRequest, EpisodeRunner
from ..episodes.store import Store
from ..rewards.builtin import reward_name
from ..types import Episode
from .accuracy import evaluation
from .measures import (
    agreement,
    changes_by_round,
    cost,
    diversity,
    over_samples,
    reward_parts,
    scored,
)
from .statistics import Evaluation, holm, paired, sign_flip_p

Tick = Callable[[Episode], None]
# (variant, episodes in all, of them already stored) -> context manager giving a Tick
ShowProgress = Callable[[str, int, int], AbstractContextManager[Tick]]


@dataclass(frozen=True)
class Variant:
    """A team as it is measured.

    Args:
        name: in tables. rollouts: the agents and their rewards. state: adapter versions and values;
            a policy without a version answers as the base.
        sha256: what those versions hold, by policy; bases: which base each policy is on. Together
            they say whose answers these are, whatever the policies are called.
    """

    name: str
    rollouts: EpisodeRunner
    state: TeamState
    sha256: Mapping[str, str]
    bases: Mapping[str, str] = field(default_factory=dict)

    def key(self, seed: int, greedy: bool) -> str:
        """16 hex digits of all that the answers depend on: system and its code, agents, values,
        adapters, base, sampling, rewards, seed."""
        player = self.player(seed, greedy)
        system = player.system
        values = self.state.values
        specs = [
            {
                **to_json(agent),
                "policy": self.weights_of(values.get(f"{agent.name}.policy") or agent.policy),
            }
            for agent in system.specs
        ]
        facts = [
            f"{type(system).__module__}:{type(system).__qualname__}",
            to_json(system.arguments()),
            specs,
            to_json(dict(values)),
            to_json(player.sampling),
            seed,
            [getattr(fn, "identity", reward_name(fn)) for fn in player.rewards],
            [code_of(type(system)), *map(code_of, player.rewards)],
        ]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:16]

    def weights_of(self, policy: str) -> list[str]:
        """The weights that answer for a policy: its base, and the adapter that is on; of an outside
        model its address and name. A policy without a base of its own goes by its name."""
        if policy in self.state.outside:
            return [self.state.outside[policy]]
        base = (
            [self.bases[policy]]
            if policy in self.bases
            else [policy, *sorted(set(self.bases.values()))]
        )
        return [*base, self.sha256[policy]] if policy in self.state.versions else base

    def player(self, seed: int, greedy: bool) -> EpisodeRunner:
        """Its episode runner with this seed, at temperature 0 if `greedy`."""
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
    """What every variant of a suite plays: each task `samples` times for each seed. Greedy play
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

    def requests(self, variant: Variant, seed: int) -> list[EpisodeRequest]:
        """The variant's episodes. Equal tasks and samples draw equal random numbers in every
        variant, so that differences are the variants'."""
        key = variant.key(seed, self.greedy)
        return [
            EpisodeRequest(
                task,
                f"eval-{key}/{task_digest(task)}/{task.id}",
                k,
                draw=f"eval/{task.id}/{k}",
                kind="eval",
            )
            for task in self.tasks
            for k in range(self.samples)
        ]


def task_digest(task: Task) -> str:
    """8 hex digits of a task's whole content: another task of the same id is not the same task."""
    return hashlib.sha256(
        json.dumps(to_json(task), sort_keys=True, default=str).encode()
    ).hexdigest()[:8]


async def play(
    variant: Variant, plan: Plan, folder: Path, show_progress: ShowProgress
) -> list[Episode]:
    """Its episodes in the order of the plan, then their children; those stored in `folder/KEY` are
    read, the others played and stored. Talks with judges are stored there too, and not counted."""
    episodes: list[Episode] = []
    children: list[Episode] = []
    for seed in plan.seeds:
        requests = plan.requests(variant, seed)
        with Store(folder / variant.key(seed, plan.greedy)) as store:
            stored = {e.id: e for e in store}
            missing = [request for request in requests if request.id not in stored]
            with show_progress(variant.name, len(requests), len(requests) - len(missing)) as tick:
                player = dataclasses.replace(
                    variant.player(seed, plan.greedy), asides=StoredAsides(store, store.extend)
                )
                async for episode in player.collect(missing, variant.state):
                    store.append(episode)
                    stored[episode.id] = episode
                    tick(episode)
        episodes += [stored[request.id] for request in requests]
        parents = tuple(f"{request.id}/" for request in requests)
        children += [
            e
            for e in stored.values()
            if e.parent is not None and e.id.startswith(parents) and not e.follows
        ]
    return episodes + children


@dataclass(frozen=True)
class Measured:
    """Measures of a variant. `evaluation` holds the mean score of each task; `row` is what
    `eval.json` says of it."""

    name: str
    key: str
    evaluation: Evaluation
    episodes: tuple[Episode, ...]
    row: Mapping[str, Any]


async def measure(variant: Variant, plan: Plan, episodes: Sequence[Episode]) -> Measured:
    """All measures of the episodes that a variant played under a plan."""
    everything, episodes = episodes, [e for e in episodes if e.parent is None]
    result = evaluation(plan.tasks, episodes, plan.metric)
    per_seed = len(plan.tasks) * plan.samples
    seeds = {seed: episodes[n * per_seed : (n + 1) * per_seed] for n, seed in enumerate(plan.seeds)}
    row = {
        **result.summary(),
        "by_seed": {
            str(seed): sum(scored(e, plan.metric) for e in own) / len(own)
            for seed, own in seeds.items()
        },
        **over_samples(episodes, plan.metric, plan.samples * len(plan.seeds)),
        "rewards": reward_parts(episodes),
        "cost": cost(everything),
        "agreement": agreement(episodes),
        "diversity": diversity(episodes),
        "transitions": await changes_by_round(
            episodes, variant.rollouts.system, variant.rollouts.rewards[0], plan.metric
        ),
        "adapters_on": dict(variant.state.versions),
    }
    return Measured(
        variant.name, variant.key(plan.seeds[0], plan.greedy), result, tuple(episodes), row
    )


# between variants


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
    variants: Sequence[Variant], plan: Plan, folder: Path, show_progress: ShowProgress
) -> dict[str, Measured]:
    """Play and measure all variants, in order; one that equals an earlier one under another name
    shares its episodes. Returns the measures by name."""
    results: dict[str, Measured] = {}
    for variant in variants:
        if variant.name in results:
            raise SettingError(
                f"evaluate: two variants are named {variant.name!r}; names are unique"
            )
        episodes = await play(variant, plan, folder, show_progress)
        results[variant.name] = await measure(variant, plan, episodes)
    return results
