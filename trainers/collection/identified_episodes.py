"""Episodes that are identified by all that their answers depend on: state, system and its code,
sampling, rewards, seed, task and sample.

Evaluations and trials are such episodes. Those that are stored are not played again, under whatever
label they are asked for; `Evaluations` remembers which labels there were.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...agents.state import TeamState, content_key
from ...agents.system import System
from ...agents.types import BASE, Task
from ...rollouts.episodes.runner import EpisodeRequest, EpisodeRunner
from ...rollouts.episodes.store import Store
from ...rollouts.evaluation.suite import Variant, task_digest
from ...rollouts.files import files_sha256
from ...rollouts.rewards.scoring import RewardFn
from ...rollouts.types import Episode, Kind
from .. import checkpoint as ckpt
from ..update.learner import Learner

FILE = "evaluations.json"  # in the run folder


@dataclasses.dataclass(frozen=True)
class Play:
    """What `RolloutManager.play` is to play.

    Args:
        tasks: `n` episodes of each.
        state: None: the one in force.
        greedy: at temperature 0, decisions by the likeliest option.
        kind: `trial` of a candidate, `eval` of held-out tasks, which costs no budget, `train` of
            what is learnt from.
        system: another system than the run's, played by the same policies. rewards: what its
            episodes are scored by; None: the run's.
        label: under which `RolloutManager.stored` and the report find them.
        draws: names the random numbers; under another name the same state gives other episodes.
        failures_count: stored episodes are taken also where every one of them failed, as those of
            a trial are: for what learns from errors, which would pay for them again after a kill.
    """

    tasks: Sequence[Task]
    state: TeamState | None = None
    n: int = 1
    greedy: bool = False
    kind: Kind = "trial"
    system: System | None = None
    rewards: Sequence[RewardFn] | None = None
    label: str = ""
    draws: str = ""
    failures_count: bool = False


@dataclasses.dataclass(frozen=True)
class Identified:
    """What is played with one state.

    Args:
        runner, state: who plays.
        what: the tasks, how often, and as what.
        bases: which base each policy is on, by the hash of its weights.
    """

    runner: EpisodeRunner
    state: TeamState
    what: Play
    step: int
    bases: Mapping[str, str]

    @property
    def variant(self) -> Variant:
        # a version's name ends in the hash of its tensors
        hashes = {p: name.rpartition("-")[2] for p, name in self.state.versions.items()}
        return Variant("", self.runner, self.state, hashes, self.bases)

    @property
    def key(self) -> str:
        """16 hex digits of what the answers to any task depend on."""
        return self.variant.key(self.runner.seed, self.what.greedy)

    @property
    def player(self) -> EpisodeRunner:
        """The runner that plays them."""
        return self.variant.player(self.runner.seed, self.what.greedy)

    def requests(self, attempt: int = 0) -> list[EpisodeRequest]:
        """What to play. Equal tasks and samples draw equal random numbers in every state, so that
        differences are the states'. Those of a later `attempt` are other episodes of the same."""
        what = self.what
        label = f"{what.kind}-{self.key}" + (f".{attempt}" if attempt else "")
        label += f"/{what.draws}" if what.draws else ""
        return [
            EpisodeRequest(
                task,
                f"{label}/{task_digest(task)}/{task.id}",
                k,
                self.step,
                draw=f"{what.draws or 'eval'}/{task.id}/{k}",
                kind=what.kind,
            )
            for task in what.tasks
            for k in range(what.n)
        ]


def weights_below(learner: Learner) -> dict[str, str]:
    """By policy the base that it stands on, by the hash of its weights, or by name where these are
    not on this machine."""
    bare = learner.policies[BASE].base if BASE in learner.policies else None
    below: dict[str, str] = {}
    for name, base in learner.bases.items():
        weights = learner.base_hashes.get(name) or files_sha256(base.path) or name
        policies = (*base.policies, *([BASE] if name == (bare or learner.config.model) else []))
        below |= dict.fromkeys(policies, weights)
    return below


def training_label(runner: EpisodeRunner, weights: Mapping[str, str], folder: Path) -> str:
    """How a run names the training episodes of a `{step}`: `train-000001`, and with other rewards,
    prompts, sampling or code than it began with (it was resumed under other settings) with the key
    of these, so that what was played under the old ones is not taken for it."""
    variant = Variant("", runner, TeamState(), {}, weights)
    key = content_key([variant.key(runner.seed, False), runner.limits.on_error], "rewards")
    path = folder / "rollouts.json"
    if not path.is_file():
        ckpt.write_json(path, {"key": key})
    first = json.loads(path.read_text(encoding="utf-8"))["key"]
    return "train-{step:06d}" if key == first else "train-{step:06d}-" + key


class Evaluations:
    """Which evaluations a run has made, by label, in the run folder's `evaluations.json`.

    An entry: `kind`, `key` of its episodes, `step`, `tasks` (ids) and `n`. The report finds the
    episodes of a label by it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def read(self) -> dict[str, dict[str, Any]]:
        """The entries by label, in the order in which they were made."""
        if not self.path.is_file():
            return {}
        entries: dict[str, dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))
        return entries

    def episodes(self, label: str, store: Store) -> list[Episode]:
        """The episodes of an entry, none if there is no such label."""
        entry = self.read().get(label)
        if entry is None:
            return []
        groups = re.compile(rf"{entry['kind']}-{entry['key']}(\.\d+)?/")
        ids = filter(groups.match, store.ids())
        played = store.read(id=set(ids), kind=entry["kind"])
        return [episode for episode in played if episode.task.id in entry["tasks"]]

    def add(self, label: str, asked: Identified) -> bool:
        """Remember one, durable; a label that is there is made anew. False if it is known as it is:
        a resumed run comes to it again."""
        entries = self.read()
        entry = {
            "kind": asked.what.kind,
            "key": asked.key,
            "step": asked.step,
            "tasks": [task.id for task in asked.what.tasks],
            "n": asked.what.n,
        }
        if {**entries.get(label, {}), "step": asked.step} == entry:
            return False
        entries.pop(label, None)
        ckpt.write_json(self.path, {**entries, label: entry})
        return True
