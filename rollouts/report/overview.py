"""Head of the report: did training help, which episodes to read, and the facts of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from .findings import ENDED, learnt_nothing
from .html import number, text
from .learning.before_after import examples
from .run_data import RunData

UNFINISHED = (
    '<p class="note">This run did not end, or has not yet: what follows is as far as it came.</p>'
)


def verdict(run: RunData, n: int) -> str:
    """Whether training helped in a sentence, which adapter does, and three episodes to read; `n`
    numbers the run in links."""
    summary = run.summary
    lines = [f'<p class="note"><b>{text(each)}</b></p>' for each in problems(run)]
    lines += [UNFINISHED] if summary.get("unfinished") else []
    accuracies = summary.get("eval") or {}
    before, after, paired = (accuracies.get(key) for key in ("before", "after", "paired"))
    if not (before and after and paired):
        return "".join(lines)
    low, high = paired["ci95"]
    effect = (
        "Training helped"
        if low > 0
        else "Training hurt"
        if high < 0
        else "No effect of training is shown"
    )
    so_far = " so far" if summary.get("unfinished") else ""
    sentence = (
        f"{effect}{so_far}: {before['accuracy']:.3f} → {after['accuracy']:.3f}"
        f" on {after['num_tasks']} held-out tasks"
    )
    lines.append(
        f'<p class="verdict {"good" if low > 0 else "bad" if high < 0 else ""}"><b>{sentence}</b>'
        f" {change(paired)}.</p>"
    )
    alone = []
    for name, entry in (summary.get("adapters") or {}).items():
        low, high = entry["paired"]["ci95"]
        does = "helps" if low > 0 else "hurts" if high < 0 else "shows no effect"
        alone.append(f"<b>{text(name)}</b> alone {does} {change(entry['paired'])}")
    lines += [f"<p>By adapter: {'; '.join(alone)}.</p>"] if alone else []
    links = " · ".join(
        f'<a href="#e={n}:{quote(change.after.id)}">one that {change.what}</a>'
        for change in examples(run)
    )
    return "".join(lines) + (f"<p>Episodes to read: {links}</p>" if links else "")


def problems(run: RunData) -> list[str]:
    """What a reader has to know before anything else: why the run ended early, and what it did not
    learn and why."""
    found = []
    if run.summary.get("unfinished"):
        path = run.folder / "warnings.log"
        kept = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        found += [line for line in kept.splitlines() if line.startswith(ENDED)][-1:]
    if stopped := (run.summary.get("budget") or {}).get("stopped"):
        found.append(f"The budget ended the run: {stopped}")
    finding = run.summary.get("finding") or learnt_nothing(run.metrics, run.config)
    return [*found, finding] if finding else found


def change(paired: Mapping[str, Any]) -> str:
    """A paired difference with its interval, in brackets."""
    low, high = paired["ci95"]
    counts = (
        f", {paired['gained']} tasks gained, {paired['lost']} lost" if "gained" in paired else ""
    )
    return f"({paired['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}{counts})"


def facts(run: RunData) -> str:
    """A definition list of the run's model, system, tasks, steps, seconds and tokens."""
    summary, config = run.summary, run.config
    seconds, tokens = summary.get("seconds") or {}, summary.get("tokens") or {}
    steps = (
        f"{len(run.metrics)} of {config.get('max_steps', '?')}"
        if summary.get("unfinished")
        else number(summary.get("steps"))
    )
    parts = text(
        ", ".join(
            f"{name} {number(round(s))}" for name, s in seconds.items() if name != "total" and s
        )
    )
    total = seconds.get("total")
    items = (
        ("model", text(config.get("model", ""))),
        ("system", text(str((config.get("system") or {}).get("class", "")).rpartition(":")[2])),
        ("tasks", text(config.get("tasks", ""))),
        ("engine", text(summary.get("engine") or config.get("engine", ""))),
        ("steps", steps),
        ("ended early", text(summary.get("done") or "")),
        ("credit", text(str(config.get("credit") or ""))),
        ("seconds", f"{number(round(total))} ({parts})" if total else parts),
        ("tokens", ", ".join(f"{number(count)} {text(name)}" for name, count in tokens.items())),
    )
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in items if value)
    return f"<dl>{shown}</dl>"
