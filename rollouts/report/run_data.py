"""What the folder of a run holds, as the report reads it."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...agents.types import SettingError
from ..episodes.store import Store
from ..evaluation.statistics import Evaluation, interval, paired
from .episode_index import EpisodeRow, json_lines, rows
from .metrics.names import current

EVALUATIONS = "evaluations.json"  # {label: {kind, key, step, tasks, n}}
TEAM = re.compile(r"before|after|step-\d+")  # labels of evaluations of the whole team
VALIDATION = re.compile(r"val-step-\d+")
IDENTIFIED = re.compile(r"(eval|trial)-([0-9a-f]{16})(?:\.(\d+))?/")  # groups of a key's episodes
LABELLED = re.compile(r"eval-(.+?)(?:\.\d+)?/")  # those of 0.1, which had a label's
AMOUNTS = ("calls", "prompt_tokens", "sampled_tokens", "cached_tokens", "seconds", "cost")
Asked = tuple[str, str, str]  # kind and key of an evaluation's episodes, and one of its tasks
PointWithInterval = tuple[int, float, float, float]  # step, mean, low and high of its interval


@dataclass
class RunData:
    """The settings, result, metrics and episodes in the folder of a run, read once."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    episodes: Sequence[EpisodeRow]
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by label
    metric: str = ""  # the reward that is its accuracy

    @classmethod
    def read(cls, folder: Path, name: str = "", metric: str = "") -> RunData:
        """Read a run's folder. Raises `SettingError` if it holds no run.

        `metric`: the reward whose mean is the accuracy, by the name that its function has; "" takes
        the one that the settings name.
        """
        if not (folder / "config.yaml").is_file():
            raise SettingError(f"{folder}: no config.yaml; expected the folder of a run")
        import yaml

        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
        metric = metric or str((config.get("rewards") or [""])[0]).rpartition(":")[2]
        episodes = rows(Store(folder / "episodes"), metric)
        evaluations = label_evaluations(episodes, read_json(folder / EVALUATIONS) or {})
        metrics = [current(row) for row in json_lines(folder / "metrics.jsonl")]
        summary = read_json(folder / "summary.json")
        last_step = metrics[-1]["step"] if metrics else 0
        if summary is None or last_step > summary.get("steps", 0):  # it went on after an early end
            summary = unfinished(folder, config, metrics, episodes, evaluations)
        name = name or folder.resolve().name
        return cls(folder, name, config, summary, metrics, episodes, evaluations, metric)

    @property
    def policies(self) -> dict[str, Mapping[str, Any]]:
        """Policies by name, those that only the metrics know included."""
        known = dict(self.summary.get("policies") or {})
        return known | {
            name: {}
            for row in self.metrics
            for name in row.get("policies") or {}
            if name not in known
        }

    @property
    def title(self) -> str:
        """Name of the recipe."""
        return str(self.summary.get("recipe") or "run")

    def reward_points(self) -> list[PointWithInterval]:
        """Reward of the training episodes at each step. The interval is over tasks: episodes of one
        task are not independent."""
        steps: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in self.episodes:
            if row.trains and row.worth is not None:
                steps[row.step][row.task].append(row.worth)
        means = {
            step: [sum(v) / len(v) for v in tasks.values()] for step, tasks in sorted(steps.items())
        }
        return [(step, sum(m) / len(m), *interval(m)) for step, m in means.items()]

    def eval_points(self, labels: re.Pattern[str] = TEAM) -> list[PointWithInterval]:
        """Accuracy of every evaluation of the whole team, or of those with such labels, over steps;
        a failed episode counts 0."""
        by_step = {
            0 if label == "before" else self.evaluations[label]["step"]: result
            for label, result in results(self.episodes, self.evaluations, labels).items()
        }
        return [
            (step, result.accuracy, *interval(list(result.scores.values())))
            for step, result in sorted(by_step.items())
        ]


def label_evaluations(
    episodes: Sequence[EpisodeRow], entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Put into every row the labels of the evaluations that it is an episode of; returns the
    evaluations by label, in their order.

    `entries`: of the run's `evaluations.json`. Runs of 0.1 have none: there a group's name begins
    with the label. Of several attempts at a task, the last one counts.
    """
    asked: dict[Asked, list[str]] = defaultdict(list)
    for label, entry in entries.items():
        for task in entry["tasks"]:
            asked[entry["kind"], entry["key"], task].append(label)
    played: list[tuple[EpisodeRow, Asked, int]] = []
    last: dict[Asked, int] = {}  # the number of the last attempt
    old: dict[str, Mapping[str, Any]] = {}
    for row in episodes:
        if match := IDENTIFIED.match(row.group):
            what, attempt = (match[1], match[2], row.task), int(match[3] or 0)
            played.append((row, what, attempt))
            last[what] = max(attempt, last.get(what, 0))
        elif (match := LABELLED.match(row.group)) and match[1] not in entries:
            row.evaluations = (match[1],)
            old[match[1]] = {"kind": "eval", "step": row.step}
    for row, what, attempt in played:
        sample = 0 if row.child else int(row.id.rpartition("/")[2])
        row.evaluations = tuple(
            label
            for label in asked.get(what, ())
            if attempt == last[what] and sample < entries[label]["n"]
        )
    return {**old, **entries}


def results(
    episodes: Iterable[EpisodeRow],
    evaluations: Mapping[str, Mapping[str, Any]],
    labels: re.Pattern[str] = TEAM,
) -> dict[str, Evaluation]:
    """Every evaluation of the whole team (or with such labels) by its label, in the order of
    `evaluations`: each task's mean over its episodes."""
    values: dict[str, dict[str, list[float]]] = {
        label: defaultdict(list) for label in evaluations if labels.fullmatch(label)
    }
    for row in episodes:
        for label in row.evaluations:
            if label in values and not row.child:
                values[label][row.task].append(row.worth or 0.0)
    return {
        label: Evaluation({task: sum(own) / len(own) for task, own in tasks.items()})
        for label, tasks in values.items()
        if tasks
    }


def unfinished(
    run: Path,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    episodes: Sequence[EpisodeRow],
    evaluations: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """`summary.json` of a run that has not ended, as far as its newest checkpoint, its proofs, its
    metrics and its episodes say."""
    systems = sorted(run.glob("checkpoints/step-*/system.json"))
    system = read_json(systems[-1]) if systems else {}
    state = (read_json(systems[-1].parent / "trainer" / "state.json") if systems else None) or {}
    hashes, proofs = state.get("sha256_before", {}), read_json(run / "proofs.json") or []
    before = {
        name: {"sha256_before": hashes[name]} if name in hashes else {}
        for name in system.get("adapters", {})
    }
    adapters = {
        name: {**before[name], "sha256_after": entry["sha256"]}
        for name, entry in system.get("adapters", {}).items()
    }
    counts = Counter(record["status"] for record in proofs)
    return {
        "recipe": system.get("recipe", ""),
        "engine": "",
        "steps": state.get("step", 0),
        "unfinished": True,
        "seconds": state.get("seconds", {}),
        "tokens": state.get("tokens", {}),
        "policies": adapters,
        "live_proof": {
            "checks": len(proofs) - counts["identity"],
            **{status: counts[status] for status in ("passed", "untrained", "failed")},
        },
        "eval": latest_evaluation(results(episodes, evaluations)),
        "ledger": ledger_of(episodes, (state.get("ledger") or {}).get("unstored", ())),
        "budget": {
            "limit": config.get("budget") or {},
            "spent": metrics[-1].get("budget", {}) if metrics else {},
            "stopped": "",
        },
    }


def ledger_of(
    episodes: Iterable[EpisodeRow], unstored: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """What these episodes have cost, {KIND: {AGENT: {calls, ...}}}, and what stands beside the
    store in a checkpoint's ledger."""
    entries = [(row.kind, usage) for row in episodes for usage in row.usage]
    entries += [(row["kind"], row) for row in unstored]
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, usage in entries:
        sums = table.setdefault(kind, {}).setdefault(usage["agent"], dict.fromkeys(AMOUNTS, 0))
        for name in AMOUNTS:
            sums[name] += usage.get(name, 0)
    return table


def latest_evaluation(results: Mapping[str, Evaluation]) -> dict[str, Any]:
    """`eval` of a run that has not ended: the base team against the newest evaluation of the
    trained team on the same tasks. `results` by label, in the order in which they were made."""
    results = dict(results)
    if (before := results.pop("before", None)) is None:
        return {"before": None, "after": None, "paired": None}
    later = [result for result in results.values() if result.scores.keys() == before.scores.keys()]
    if not later:
        return {"before": before.summary(), "after": None, "paired": None}
    return {
        "before": before.summary(),
        "after": later[-1].summary(),
        "paired": paired(before, later[-1]),
    }


def read_json(path: Path) -> Any:
    """A JSON file's value; None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
