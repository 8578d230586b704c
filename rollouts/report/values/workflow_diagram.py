"""A workflow in step language as a diagram: its steps in columns from the first one on, with an
arrow for each branch, as inline SVG."""

from __future__ import annotations

from collections import Counter

from ....agents.programs.steps import NEXT, Steps, StepsError, parse_steps
from ..html import text

WIDTH, HEIGHT = 132, 40  # pixels of a step
COLUMN, ROW, MARGIN = 200, 76, 30  # from a column to the next, from a row to the next, around all
LETTERS = 18  # of a name in its box, and of a key at its arrow
MAX_STEPS = 100  # of a workflow that is drawn


def places_of(steps: Steps) -> dict[str, tuple[int, int]]:
    """Where each step stands, (column, row): in the column of its distance from the first step, in
    the order in which it is first led to."""
    columns = {steps.entry.name: 0}
    waiting = [steps.entry.name]
    for name in waiting:
        for target in steps.by_name[name].branches.values():
            if target not in columns:
                columns[target] = columns[name] + 1
                waiting.append(target)
    count: Counter[int] = Counter()
    places = {}
    for name in waiting:
        places[name] = (columns[name], count[columns[name]])
        count[columns[name]] += 1
    return places


def diagram(value: str) -> str:
    """The diagram of a text that is a workflow in step language; "" for any other text."""
    try:
        steps = parse_steps(value, max_steps=MAX_STEPS)
    except StepsError:
        return ""
    places = places_of(steps)
    width = 2 * MARGIN + WIDTH + COLUMN * max(x for x, _ in places.values())
    height = 2 * MARGIN + HEIGHT + ROW * max(y for _, y in places.values())
    arrows = "".join(
        _arrow(places[step.name], places[target], "" if key == NEXT else key)
        for step in steps.by_name.values()
        for key, target in step.branches.items()
    )
    boxes = "".join(
        _box(places[step.name], step.name, step.type, step.instruction)
        for step in steps.by_name.values()
    )
    return (
        f'<div class="scroll" tabindex="0"><svg class="flow" width="{width}" height="{height}"'
        f' role="img"><title>{len(places)} steps; the first one is on the left</title>{arrows}'
        f"{boxes}</svg></div>"
    )


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    return MARGIN + COLUMN * place[0], MARGIN + ROW * place[1]


def _box(place: tuple[int, int], name: str, type_: str, instruction: str) -> str:
    """A step: its name and type, and its instruction when it is pointed at."""
    x, y = _corner(place)
    middle = x + WIDTH // 2
    return (
        f'<g class="{type_}"><title>{text(f"{name}: {instruction}", 600)}</title>'
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8"/>'
        f'<text x="{middle}" y="{y + 18}">{_short(name)}</text>'
        f'<text class="score" x="{middle}" y="{y + 32}">{type_}</text></g>'
    )


def _arrow(start: tuple[int, int], end: tuple[int, int], key: str) -> str:
    """From the right of a step to the left of a later one, or over the top to one that is not."""
    (x, y), (u, v) = _corner(start), _corner(end)
    if end[0] > start[0]:
        x, y, v = x + WIDTH, y + HEIGHT // 2, v + HEIGHT // 2
        middle = (x + u) // 2
        path, tip = f"M{x} {y}C{middle} {y} {middle} {v} {u} {v}", f"M{u} {v}l-7 -4v8z"
        label = middle, (y + v) // 2 - 5
    else:
        x, u = x + WIDTH // 2 + 12, u + WIDTH // 2 - 12
        over = min(y, v) - 22
        path, tip = f"M{x} {y}C{x} {over} {u} {over} {u} {v}", f"M{u} {v}l-4 -7h8z"
        label = (x + u) // 2, over + 4
    said = f'<text class="score" x="{label[0]}" y="{label[1]}">{_short(key)}</text>' if key else ""
    return f'<path d="{path}"/><path class="tip" d="{tip}"/>{said}'


def _short(words: str) -> str:
    return text(words if len(words) <= LETTERS else words[: LETTERS - 1] + "…")
