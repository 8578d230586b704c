"""`report.html` of a run folder: one file that opens from disk, without scripts and without anything fetched.

Whatever a model, task or setting wrote is escaped, and the page's own policy (CSP) allows its one style sheet by hash and nothing else.
A run that was interrupted has no `summary.json`; the report then shows what is there.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..agents.types import SettingError, Turn
from .page import curves, is_number, legend, number, page, section, table, text, whisker
from .store import Store
from .types import Episode, Reward

MAX_PROOFS = 24
# title, how a row of metrics.jsonl gives it (per policy unless it starts with "/"), what it means
CURVES = (
    ("reward", "/reward", "mean over the step's episodes"),
    ("tokens per second", "/tokens_per_s", "sampled, while playing"),
    ("loss", "loss", "policy loss"),
    ("gradient norm", "grad_norm", "before clipping"),
    ("entropy", "entropy", "nat per trained token"),
    ("mismatch KL", "first_mismatch_kl", "server against trainer"),
    ("clipped share", "clipped", "of trained tokens"),
    ("silent groups", "constant_groups", "share that taught nothing"),
    ("cut-off replies", "truncated", "share at the token limit"),
    ("proof residual", "residual", "served against trained"),
)


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder and return its path. Raises `SettingError` if the folder holds no run."""
    if not (run / "config.yaml").is_file():
        raise SettingError(f"{run}: no config.yaml; expected the folder of a run")
    import yaml

    config = yaml.safe_load((run / "config.yaml").read_text())
    rows, summary = read_lines(run / "metrics.jsonl"), read_json(run / "summary.json") or unfinished(run)
    policies = {
        **summary["policies"],
        **{name: {} for row in rows for name in row.get("policies") or {} if name not in summary["policies"]},
    }
    colour = {name: f"c{number % 6}" for number, name in enumerate(policies)}
    parts = [
        header(run, config, summary, rows),
        section("Held-out accuracy", accuracies(summary)),
        section("Curves", legend(colour) + "".join(card(rows, *curve, colour) for curve in CURVES), "grid"),
        section("Adapters", adapters(policies, colour)),
        section("Live proof", proofs(summary["live_proof"], read_json(run / "proofs.json") or [])),
        section("Warnings", warnings(run, rows)),
        section("Episodes", "".join(episode_box(title, e) for title, e in chosen(Store(run / "episodes")))),
    ]  # fmt: skip
    path, staged = run / "report.html", run / f".report.html.{os.getpid()}"
    staged.write_text(page(f"{summary['recipe'] or 'run'}: {run.name}", "\n".join(parts)), encoding="utf-8", errors="replace")
    staged.replace(path)
    return path


# what is read


def read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a last line torn by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def unfinished(run: Path) -> dict[str, Any]:
    """What would stand in `summary.json`, as far as the newest checkpoint knows it."""
    found = sorted(run.glob("checkpoints/step-*/system.json"))
    system = read_json(found[-1]) if found else {}
    state = (read_json(found[-1].parent / "trainer" / "state.json") if found else None) or {}
    adapters = {name: {"sha256_after": entry["sha256"]} for name, entry in system.get("adapters", {}).items()}
    return {
        "recipe": system.get("recipe", ""), "engine": "", "steps": state.get("step", 0), "unfinished": True,
        "seconds": state.get("seconds", {}), "tokens": state.get("tokens", {}), "policies": adapters, "live_proof": {},
        "eval": {"before": state.get("evals", {}).get("before"), "after": None, "paired": None},
    }  # fmt: skip


def chosen(store: Store) -> list[tuple[str, Episode]]:
    """At most 18 episodes that tell most: best and worst of the first and last step, and of the last evaluation of the team."""
    first: list[Episode] = []
    last: list[Episode] = []
    held_out: list[Episode] = []
    for episode in store:
        if episode.parent is not None or label(episode).startswith("eval-only-"):
            continue
        if label(episode).startswith("eval-"):
            add(held_out, episode, anew=bool(held_out) and label(held_out[0]) != label(episode))
            continue
        if not first or episode.step <= first[0].step:
            add(first, episode, anew=bool(first) and episode.step < first[0].step)
        if not last or episode.step >= last[0].step:
            add(last, episode, anew=bool(last) and episode.step > last[0].step)
    if first and last[0].step == first[0].step:
        last = []
    named = {f"step {episodes[0].step}": episodes for episodes in (first, last) if episodes}
    named |= {"held out, " + label(held_out[0]).removeprefix("eval-"): held_out} if held_out else {}
    return [(f"{name}, {which}", e) for name, episodes in named.items() for which, e in extremes(episodes)]


def add(found: list[Episode], episode: Episode, *, anew: bool) -> None:
    if anew:
        found.clear()
    found.append(episode)


def extremes(episodes: Sequence[Episode], count: int = 3) -> list[tuple[str, Episode]]:
    """The best and the worst, of different tasks as far as there are any, none of them twice."""
    ranked = sorted(episodes, key=lambda e: (worth(e), e.id))

    def distinct(found: list[Episode]) -> list[Episode]:
        tasks: dict[str, Episode] = {}
        for episode in found:
            tasks.setdefault(episode.task.id, episode)
        return list(tasks.values())[:count]

    best = distinct(ranked[::-1])
    worst = distinct([e for e in ranked if all(e is not b for b in best)])
    return [("among the best", e) for e in best] + [("among the worst", e) for e in worst]


def label(episode: Episode) -> str:
    return episode.group.partition("/")[0]


def worth(episode: Episode) -> float:
    """Sum of the team's rewards; what failed or could not be scored comes below everything."""
    value = episode.reward()
    return -math.inf if math.isnan(value) else value


# what is written


def header(run: Path, config: Mapping[str, Any], summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    before, after, seconds, tokens = summary["eval"]["before"], summary["eval"]["after"], summary["seconds"], summary["tokens"]
    accuracy = " → ".join(f"{e['accuracy']:.3f}" for e in (before, after) if e)
    steps = f"{len(rows)} of {config.get('max_steps', '?')}" if summary.get("unfinished") else number(summary["steps"])
    parts = ", ".join(f"{name} {number(round(s))}" for name, s in seconds.items() if name != "total" and s)
    system = str((config.get("system") or {}).get("class", "")).rpartition(":")[2]
    facts = (
        ("model", text(config.get("model", ""))), ("system", text(system)), ("tasks", text(config.get("tasks", ""))),
        ("engine", text(summary["engine"] or config.get("engine", ""))), ("steps", steps),
        ("accuracy", accuracy), ("seconds", f"{number(round(seconds.get('total', 0)))} ({parts})" if seconds.get("total") else parts),
        ("tokens", ", ".join(f"{number(count)} {text(name)}" for name, count in tokens.items())),
    )  # fmt: skip
    note = '<p class="note">This run did not end: there is no summary.json yet.</p>' if summary.get("unfinished") else ""
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts if value)
    return f"<header><h1>{text(summary['recipe'] or 'run')} <small>{text(run.name)}</small></h1>{note}<dl>{items}</dl></header>"


def accuracies(summary: Mapping[str, Any]) -> str:
    found = summary["eval"]
    rows = {"base team": found["before"], **{f"only {n}": e for n, e in (summary.get("adapters") or {}).items()}}
    rows["trained team"] = {**found["after"], "paired": found["paired"]} if found["after"] else None
    body = []
    for name, entry in rows.items():
        if entry:
            low, high = entry["ci95"]
            paired = entry.get("paired") or {}
            change = (
                f"{paired['difference']:+.3f} <small>[{paired['ci95'][0]:+.3f}, {paired['ci95'][1]:+.3f}]</small>" if paired else ""
            )
            body.append(
                (
                    text(name),
                    f"{entry['accuracy']:.3f} <small>[{low:.3f}, {high:.3f}]</small>",
                    whisker(entry["accuracy"], low, high),
                    number(entry["num_tasks"]),
                    change,
                )
            )
    return table(("", "mean, 95 % interval", "0 to 1", "tasks", "against base, paired"), body) if body else ""


def points(rows: Sequence[Mapping[str, Any]], key: str, policy: str = "") -> list[tuple[int, float]]:
    """(step, value) wherever the value is a number."""
    found = []
    for row in rows:
        place: Any = row if not policy else (row.get("proof" if key == "residual" else "policies") or {}).get(policy) or {}
        value = place.get(key)
        if is_number(value):
            found.append((row["step"], float(value)))
    return found


def card(rows: Sequence[Mapping[str, Any]], title: str, key: str, note: str, colours: Mapping[str, str]) -> str:
    shown = {"": "c6"} if key.startswith("/") else colours
    return curves(title, note, {name: points(rows, key.lstrip("/"), name) for name in shown}, shown)


def adapters(policies: Mapping[str, Mapping[str, Any]], colour: Mapping[str, str]) -> str:
    rows = [
        (
            f'<span class="{colour[name]}">{text(name)}</span>', number(entry.get("trainable_parameters")),
            *(f"<code>{text(str(entry.get(key) or '')[:16])}</code>" for key in ("sha256_before", "sha256_after")),
            "" if "sha256_before" not in entry else "unchanged" if entry["sha256_before"] == entry["sha256_after"] else "trained",
        )
        for name, entry in policies.items()
    ]  # fmt: skip
    return table(("policy", "trainable parameters", "sha256 before", "sha256 after", ""), rows) if rows else ""


def proofs(counts: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """All that failed, and the latest of the others."""
    if not records:
        return ""
    shown = [r for r in records if r["status"] == "failed"] + [r for r in records if r["status"] != "failed"][-MAX_PROOFS:]
    numbers = [name for name in records[0] if any(is_number(r.get(name)) for r in records) and name != "step"]
    rows = [
        (number(r["step"]), text(r["version"]), text(r["replica"]), status(r), *(number(r.get(name)) for name in numbers))
        for r in sorted(shown, key=lambda r: r["step"])
    ]
    line = ", ".join(f"{number(value)} {text(name.replace('_', ' '))}" for name, value in counts.items() if name != "max_residual")
    line += f"; largest residual {number(counts['max_residual'])}" if "max_residual" in counts else ""
    head = ("step", "version", "replica", "status", *(text(name.replace("_", " ")) for name in numbers))
    more = f" ({len(rows)} of {len(records)}; all of them: proofs.json)" if len(rows) < len(records) else ""
    return f"<p>{line}</p><details><summary>Records{more}</summary>{table(head, rows)}</details>"


def status(record: Mapping[str, Any]) -> str:
    name = text(record["status"])
    return f'<span class="{name}">{name}</span> {text(record["reason"])}'


def warnings(run: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """What the run warned of, and what its rows show should be looked at."""
    path = run / "warnings.log"
    found = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for key, what in (("failed", "episodes failed"), ("unscorable", "episodes could not be scored")):
        if count := sum(row.get(key) or 0 for row in rows):
            found.append(f"{count} of {sum(row.get('episodes') or 0 for row in rows)} {what}")
    dropped: dict[str, int] = {}
    for row in rows:
        for reason, count in (row.get("dropped") or {}).items():
            dropped[reason] = dropped.get(reason, 0) + count
    found += [f"{count} turns not trained on, {reason}" for reason, count in dropped.items()]
    return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in found)}</ul>" if found else ""


def episode_box(title: str, episode: Episode) -> str:
    ids = {turn.index: turn.agent for turn in episode.turns}
    team = " ".join(reward_text(r) for r in episode.rewards if r.turn is None)
    output = f'<p class="failed">{text(episode.error)}</p>' if episode.error else f"<pre>{text(episode.output)}</pre>"
    turns = "".join(
        turn_box(turn, ids, [r for r in episode.rewards if (r.turn, r.sibling) == (turn.index, turn.sibling)])
        for turn in episode.turns
    )
    answer = "" if episode.task.answer is None else f"<h4>expected</h4><pre>{text(episode.task.answer)}</pre>"
    head = f"<summary><b>{text(title)}</b> {text(episode.task.prompt, 90)} {team}</summary><p><code>{text(episode.id)}</code></p>"
    task = f"<h4>task</h4><pre>{text(episode.task.prompt)}</pre>{answer}"
    return f"<details>{head}{task}{turns}<h4>team's output ({text(episode.stop_reason)})</h4>{output}</details>"


def turn_box(turn: Turn, agents: Mapping[int, str], rewards: Sequence[Reward]) -> str:
    reads = ", ".join(f"{text(agents.get(index, '?'))} (turn {index})" for index in turn.reads)
    marks = [
        f"turn {turn.index}",
        f"read {reads}" if reads else "read no other agent",
        f"{len(turn.token_ids)} tokens",
        text(turn.version or "base"),
    ]
    marks += ["cut off"] * (turn.finish_reason == "length") + ["saw the answer"] * turn.saw_gold
    marks += [] if turn.taken else [f"sibling {turn.sibling}, not taken"]
    marks += [] if turn.source == "sampled" else [text(turn.source)]
    told = "".join(f"<h4>{text(m.role)}</h4><pre>{text(m.content)}</pre>" for m in turn.messages)
    return (
        f'<article><h3>{text(turn.agent)} <small>{" · ".join(marks)}</small> {" ".join(map(reward_text, rewards))}</h3>'
        f"<details><summary>what it was sent</summary>{told}</details><pre>{text(turn.text)}</pre></article>"
    )  # fmt: skip


def reward_text(reward: Reward) -> str:
    who = f" of {text(reward.agent)}" if reward.agent else ""
    why = f' title="{text(reward.text, 400)}"' if reward.text else ""
    return f'<span class="reward"{why}>{text(reward.name)}{who} {number(reward.value) if math.isfinite(reward.value) else "unscorable"}</span>'
