"""What the folder of a run holds, as the report reads it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...agents.types import SettingError
from ..episodes.store import Store
from ..evaluation.statistics import Evaluation, interval, paired
from .episode_index import EpisodeRow, json_lines, rows

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

    @classmethod
    def read(cls, folder: Path, name: str = "") -> RunData:
        """Read a run's folder. Raises `SettingError` if it holds no run."""
        if not (folder / "config.yaml").is_file():
            raise SettingError(f"{folder}: no config.yaml; expected the folder of a run")
        import yaml

        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
        metric = str((config.get("rewards") or [""])[0]).rpartition(":")[2]
        episodes = rows(Store(folder / "episodes"), metric)
        metrics = list(json_lines(folder / "metrics.jsonl"))
        summary = read_json(folder / "summary.json")
        last_step = metrics[-1]["step"] if metrics else 0
        if summary is None or last_step > summary.get("steps", 0):  # it went on after an early end
            summary = unfinished(folder, episodes)
        return cls(folder, name or folder.resolve().name, config, summary, metrics, episodes)

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
            if not (row.held_out or row.follows) and row.worth is not None:
                steps[row.step][row.task].append(row.worth)
        means = {
            step: [sum(v) / len(v) for v in tasks.values()] for step, tasks in sorted(steps.items())
        }
        return [(step, sum(m) / len(m), *interval(m)) for step, m in means.items()]

    def eval_points(self) -> list[PointWithInterval]:
        """Accuracy of every evaluation of the whole team; a failed episode counts 0."""
        steps = {row.label: 0 if row.label == "eval-before" else row.step for row in self.episodes}
        by_step = {steps[label]: result for label, result in evaluations(self.episodes).items()}
        return [
            (step, result.accuracy, *interval(list(result.scores.values())))
            for step, result in sorted(by_step.items())
        ]


def evaluations(episodes: Sequence[EpisodeRow]) -> dict[str, Evaluation]:
    """Every evaluation of the whole team by its label: each task's mean over its episodes."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in episodes:
        if row.evaluates_team:
            values[row.label][row.task].append(row.worth or 0.0)
    return {
        label: Evaluation({task: sum(own) / len(own) for task, own in tasks.items()})
        for label, tasks in values.items()
    }


def unfinished(run: Path, episodes: Sequence[EpisodeRow]) -> dict[str, Any]:
    """`summary.json` of a run that has not ended, as far as its newest checkpoint, its proofs and
    its episodes say."""
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
        "eval": latest_evaluation(episodes),
    }


def latest_evaluation(episodes: Sequence[EpisodeRow]) -> dict[str, Any]:
    """`eval` of a run that has not ended: the base team against the newest evaluation of the
    trained team on the same tasks."""
    results = evaluations(episodes)
    if (before := results.pop("eval-before", None)) is None:
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
