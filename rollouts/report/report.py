"""`report.html` of one run or several: one file that opens from disk, with nothing fetched.

Whatever a model, task or setting wrote is escaped, and the page's own policy (CSP) allows its style
sheet and its script by hash and nothing else. A run that was interrupted has no `summary.json`; the
report then shows what is there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...agents.types import SettingError
from ..episodes.store import Store
from ..evaluation.statistics import Evaluation, interval, paired
from ..files import write_text
from .episode_index import MAX_EPISODES, EpisodeIndex, EpisodeRow, Pieces, json_lines, rows
from .html import page, section, text
from .sections import (
    adapters,
    comparison,
    curves,
    facts,
    last_step,
    more,
    proofs,
    read_json,
    rounds,
    verdict,
    warnings,
)

KNOWN = (
    "recipe",
    "model",
    "engine",
    "steps",
    "seconds",
    "tokens",
    "policies",
    "heads",
    "live_proof",
    "eval",
    "adapters",
    "collaboration",
    "unfinished",
)  # keys of summary.json that have a place of their own; every other one is shown as it is


@dataclass
class RunData:
    """What the folder of a run holds, read once."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    episodes: Sequence[EpisodeRow]

    @classmethod
    def read(cls, folder: Path, name: str = "") -> RunData:
        """Raises `SettingError` if the folder holds no run."""
        if not (folder / "config.yaml").is_file():
            raise SettingError(f"{folder}: no config.yaml; expected the folder of a run")
        import yaml

        config = yaml.safe_load((folder / "config.yaml").read_text()) or {}
        metric = str((config.get("rewards") or [""])[0]).rpartition(":")[2]
        found, metrics = (
            rows(Store(folder / "episodes"), metric),
            list(json_lines(folder / "metrics.jsonl")),
        )
        summary = read_json(folder / "summary.json")
        if summary is None or (
            metrics and metrics[-1]["step"] > summary.get("steps", 0)
        ):  # it went on after an earlier end
            summary = unfinished(folder, found)
        return cls(folder, name or folder.resolve().name, config, summary, metrics, found)

    @property
    def policies(self) -> dict[str, Mapping[str, Any]]:
        """By name, those that only the metrics know included."""
        known = dict(self.summary.get("policies") or {})
        return known | {
            name: {}
            for row in self.metrics
            for name in row.get("policies") or {}
            if name not in known
        }

    @property
    def title(self) -> str:
        return str(self.summary.get("recipe") or "run")

    def reward_points(self) -> list[tuple[int, float, float, float]]:
        """(step, mean, low, high) of the training episodes, the interval over tasks: those of one
        task are not independent."""
        steps: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in self.episodes:
            if not (row.held_out or row.follows) and row.worth is not None:
                steps[row.step][row.task].append(row.worth)
        means = {
            step: [sum(v) / len(v) for v in tasks.values()] for step, tasks in sorted(steps.items())
        }
        return [(step, sum(m) / len(m), *interval(m)) for step, m in means.items()]

    def eval_points(self) -> list[tuple[int, float, float, float]]:
        """(step, mean, low, high) of every evaluation of the whole team; a failed episode counts
        0."""
        steps = {row.label: 0 if row.label == "eval-before" else row.step for row in self.episodes}
        found = {steps[label]: result for label, result in evaluations(self.episodes).items()}
        return [
            (step, found[step].accuracy, *interval(list(found[step].scores.values())))
            for step in sorted(found)
        ]


def evaluations(episodes: Sequence[EpisodeRow]) -> dict[str, Evaluation]:
    """By label every evaluation of the whole team: each task's mean over its episodes."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in episodes:
        if row.evaluates_team:
            found[row.label][row.task].append(row.worth or 0.0)
    return {
        label: Evaluation({task: sum(own) / len(own) for task, own in tasks.items()})
        for label, tasks in found.items()
    }


def unfinished(run: Path, episodes: Sequence[EpisodeRow]) -> dict[str, Any]:
    """What would stand in `summary.json`, as far as the newest checkpoint, the proofs and the
    episodes tell."""
    found = sorted(run.glob("checkpoints/step-*/system.json"))
    system = read_json(found[-1]) if found else {}
    state = (read_json(found[-1].parent / "trainer" / "state.json") if found else None) or {}
    first, proofs = state.get("sha256_before", {}), read_json(run / "proofs.json") or []
    before = {
        name: {"sha256_before": first[name]} if name in first else {}
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
            "checks": len(proofs),
            **{status: counts[status] for status in ("passed", "untrained", "failed")},
        },
        "eval": so_far(episodes),
    }


def so_far(episodes: Sequence[EpisodeRow]) -> dict[str, Any]:
    """`eval` of a run that did not end: the base team against the team as it was last evaluated on
    the same tasks."""
    found = evaluations(episodes)
    if (before := found.pop("eval-before", None)) is None:
        return {"before": None, "after": None, "paired": None}
    later = [result for result in found.values() if result.scores.keys() == before.scores.keys()]
    if not later:
        return {"before": before.summary(), "after": None, "paired": None}
    return {
        "before": before.summary(),
        "after": later[-1].summary(),
        "paired": paired(before, later[-1]),
    }


def write_report(
    *folders: Path,
    output: Path | None = None,
    pieces: Pieces | None = None,
    max_episodes: int = MAX_EPISODES,
) -> Path:
    """Write the report of these runs and return its path: `output`, or `report.html` in the first
    one's folder.

    `pieces` gives the text of each token, so that tokens can be coloured; without it a reply is
    shown as one text. Raises `SettingError` if a folder holds no run.
    """
    path = output or folders[0] / "report.html"
    write_text(path, build(folders, pieces, max_episodes)[0], errors="replace")
    return path


def build(
    folders: Sequence[Path],
    pieces: Pieces | None = None,
    max_episodes: int = MAX_EPISODES,
    follow: bool = False,
) -> tuple[str, EpisodeIndex]:
    """The page as text, and the data of its episode browser."""
    runs = [
        RunData.read(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)
    ]
    gallery = EpisodeIndex(pieces or (lambda policy, ids: None))
    for run in runs:
        gallery.add(run.folder, run.name, run.episodes, max_episodes // len(runs))
    parts = [comparison(runs)] if len(runs) > 1 else []
    parts += [part for number, run in enumerate(runs) for part in parts_of(run, number, len(runs))]
    title = (
        f"{runs[0].title}: {runs[0].name}"
        if len(runs) == 1
        else " and ".join(run.name for run in runs)
    )
    links = (
        [("compare", "Runs"), *((f"run-{n}", text(r.name)) for n, r in enumerate(runs))]
        if len(runs) > 1
        else []
    )
    links += (
        [("accuracy-0", "Accuracy"), ("curves-0", "Curves"), ("adapters-0", "Adapters")]
        if len(runs) == 1
        else []
    )
    there = [
        (name, label) for name, label in links if any(f'id="{name}"' in part for part in parts)
    ]
    nav = "".join(
        f'<a href="#{name}">{label}</a>' for name, label in [*there, ("episodes", "Episodes")]
    )
    body = f'<nav>{nav}<span id="live"></span></nav><main>{"".join(parts)}{BROWSER}</main>'
    return page(title, body, gallery.to_json(), follow=follow), gallery


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names; their whole paths where two are alike."""
    short = [folder.resolve().name for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise SettingError("report: a run is named twice")
    return [
        name if short.count(name) == 1 else str(folder.resolve())
        for name, folder in zip(short, folders, strict=True)
    ]


def parts_of(run: RunData, n: int, several: int) -> list[str]:
    """All that is told of one run, but for its episodes."""
    return [
        (
            f'<header id="run-{n}"><h1>{text(run.title)}'
            f" <small>{text(run.name)}</small></h1>{verdict(run, n)}{facts(run)}</header>"
        ),
        *curves(run, n),
        section("Rounds", rounds(run.summary.get("collaboration"))),
        *last_step(run.metrics),
        section("Adapters", adapters(run.policies), name=f"adapters-{n}"),
        section("Scalar heads", adapters(run.summary.get("heads") or {}, "head")),
        section(
            "Live proof",
            proofs(
                run.summary.get("live_proof") or {}, read_json(run.folder / "proofs.json") or []
            ),
        ),
        *(
            section(text(key.replace("_", " ")), more(value))
            for key, value in run.summary.items()
            if key not in KNOWN
        ),
        section("Warnings", warnings(run.folder, run.metrics)),
    ]


BROWSER = """
<section id="episodes"><h2>Episodes</h2><p id="sampled" class="soft"></p>
<form id="filters" autocomplete="off">
<label>search <input id="q" type="search" placeholder="task, prompt or id  ( / )"></label>
<label>run <select id="run"></select></label><label>when <select id="label"></select></label>
<label>agent <select id="agent"></select></label>
<label>outcome <select id="outcome"><option value="">all</option><option value="right">right</option><option value="wrong">not right</option>
<option value="f">failed</option><option value="u">unscorable</option><option value="c">a reply cut off</option>
<option value="m">with siblings</option><option value="k">follows from another</option>
<option value="t">whole text here</option></select></label>
<label>reward from <input id="low" type="number" step="any"></label><label>to <input id="high" type="number" step="any"></label>
<button type="reset">clear</button></form>
<p id="count" class="soft" role="status"></p>
<div id="list" class="scroll"><table><thead><tr id="heads"></tr></thead><tbody id="rows"></tbody></table></div>
<p id="pager"><button id="back" type="button">previous</button> <span id="where"></span> <button id="next" type="button">next</button>
<span class="soft keys">keys: <kbd>j</kbd> <kbd>k</kbd> walk through the list, <kbd>/</kbd> search,
<kbd>a</kbd> <kbd>r</kbd> <kbd>l</kbd> <kbd>n</kbd> colour tokens, <kbd>Esc</kbd> closes</span></p>
<article id="episode" tabindex="-1" aria-live="polite" hidden></article></section>
<noscript><p class="note">Episodes need the script of this page, which is turned off here.</p></noscript>"""
