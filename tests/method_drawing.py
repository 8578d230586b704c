"""The way of the data through a method, as an SVG: drawn from what its recipe's YAML file names."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, LOW, LINE = 172, 112, 78, 15  # of a box; of one below; between lines of its text
LEFT, TOP, STEP = 10, 14, 204  # of the first box; from one box to the next
LETTERS = 27  # of a line
EDGE, INK, PALE = "#57606a", "#1f2328", "#57606a"


@dataclass(frozen=True)
class Box:
    """A box with a heading and a few lines."""

    title: str
    lines: Sequence[str]
    fill: str = "#ffffff"


def agents_of(config: dict[str, Any], trains: bool) -> list[str]:
    """A line about those that speak: all names, then who learns."""
    named = config["system"].get("agents") or list(config.get("agents") or {})
    names = [agent["name"] if isinstance(agent, dict) else agent for agent in named]
    more = config.get("agents") or {}
    policy = {
        name: {**(agent if isinstance(agent, dict) else {}), **more.get(name, {})}.get("policy", "")
        for name, agent in zip(names, named, strict=True)
    }
    kinds = config.get("policies") or {}
    learning = [
        name
        for name in names
        if trains
        and policy[name] != "base"
        and kinds.get(policy[name] or name, {}).get("trainable", True)
    ]
    lines = [", ".join(names)]
    if len(learning) == len(names):
        return [*lines, "all learn (LoRA)"]
    return [*lines, f"learns (LoRA): {', '.join(learning)}" if learning else "no weight learns"]


def boxes(name: str, changes: str, config: dict[str, Any], trains: bool) -> list[Box]:
    """The boxes in the order of the data; the last two are the helpers' and the new state's."""
    short = [str(item).split(":")[-1] for item in (config["tasks"], *config["rewards"])]
    validation = config.get("num_val_tasks")
    held_out = config.get("num_eval_tasks")
    splits = ["for learning"]
    splits += [f"for validation: {validation}"] if validation else []
    splits += [f"held out: {held_out}"] if held_out else []
    system = config["system"]["class"].split(":")[-1]
    checks = ["live proof of every adapter"] if trains else []
    checks += [f"compared on {validation} validation tasks"] if validation else []
    helpers = list(config.get("helpers") or {})
    return [
        Box(f"Tasks: {short[0]}", splits),
        Box(f"Team: {system}", agents_of(config, trains), "#ddf4ff"),
        Box("Rewards", [", ".join(short[1:]), "text, number or both"]),
        Box("Store of episodes", ["turns, tokens, choices,", "scores, cost"]),
        Box(name, ["learns from the store", f"changes {changes}"], "#dafbe1"),
        Box("Helpers", [", ".join(helpers), "asked, recorded, metered"] if helpers else []),
        Box("New state of the team", [changes, *checks], "#fff8c5"),
    ]


def text_of(box: Box, x: float, y: float, width: float, letters: int) -> str:
    """The box with its text at a place."""
    title = textwrap.wrap(box.title, letters - 3)
    lines = [line for text in box.lines for line in textwrap.wrap(text, letters)]
    middle, top = x + width / 2, y + 22
    spans = [
        f'<text x="{middle:g}" y="{top + LINE * n:g}" font-weight="600" fill="{INK}">'
        f"{html.escape(line)}</text>"
        for n, line in enumerate(title)
    ]
    spans += [
        f'<text x="{middle:g}" y="{top + LINE * (n + len(title)) + 3:g}" font-size="11.5"'
        f' fill="{PALE}">{html.escape(line)}</text>'
        for n, line in enumerate(lines)
    ]
    height = HEIGHT if width == WIDTH else LOW
    frame = (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height}" rx="8" fill="{box.fill}"'
        f' stroke="{EDGE}" stroke-width="1.4"/>'
    )
    return frame + "".join(spans)


def drawing(name: str, changes: str, config: dict[str, Any], trains: bool) -> str:
    """The picture as an SVG of its own, readable on light and dark pages.

    Args:
        name: of the method.
        changes: what it changes, in a few words.
        config: the recipe's YAML file as a mapping.
        trains: whether weights move.
    """
    *row, helpers, state = boxes(name, changes, config, trains)
    lower, full = TOP + HEIGHT + 46, LEFT * 2 + STEP * 4 + WIDTH
    parts = [text_of(box, LEFT + STEP * n, TOP, WIDTH, LETTERS) for n, box in enumerate(row)]
    parts.append(text_of(state, LEFT + STEP, lower, STEP + WIDTH, 60))
    arrows = [f"M{LEFT + STEP * n + WIDTH} {TOP + HEIGHT / 2:g}h28" for n in range(4)]
    middle = LEFT + STEP * 4 + WIDTH / 2
    start = lower + LOW / 2
    if helpers.lines:
        parts.append(text_of(helpers, LEFT + STEP * 3, lower, STEP + WIDTH, 60))
        arrows += [
            f"M{middle:g} {TOP + HEIGHT}V{lower - 4}",
            f"M{middle - 30:g} {lower}V{TOP + HEIGHT + 4}",
        ]
    else:
        arrows.append(f"M{middle:g} {TOP + HEIGHT}V{start:g}H{LEFT + STEP * 2 + WIDTH + 4}")
    if helpers.lines:  # from the method's corner, between the helpers and the row
        bend = TOP + HEIGHT + 23
        corner, onto = LEFT + STEP * 4 + 24, LEFT + STEP * 2 + WIDTH / 2
        arrows.append(f"M{corner} {TOP + HEIGHT}V{bend}H{onto:g}V{lower - 4}")
    arrows.append(f"M{LEFT + STEP + WIDTH / 2:g} {lower}V{TOP + HEIGHT + 4}")
    title = f"The way of the data through {name}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full} {lower + LOW + 12}"'
        f' font-family="system-ui, sans-serif" font-size="13" role="img">\n'
        f"<title>{html.escape(title)}</title>\n"
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
        f' orient="auto"><path d="M0 0 8 4 0 8z" fill="{EDGE}"/></marker></defs>\n'
        f'<rect width="{full}" height="{lower + LOW + 12}" rx="8" fill="#ffffff"/>\n'
        f'<g text-anchor="middle">{chr(10).join(parts)}</g>\n'
        f'<g stroke="{EDGE}" stroke-width="1.4" fill="none" marker-end="url(#a)">'
        + "".join(f'<path d="{arrow}"/>' for arrow in arrows)
        + "</g>\n</svg>\n"
    )
