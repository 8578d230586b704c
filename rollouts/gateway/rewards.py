"""Rewards that a program returns or that are posted from outside: a number, an object, or a list of
these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...agents.team import Team
from ...agents.types import Reward, Turn, nearest
from .api.fields import MAX_ITEMS, BadRequest, brief, number, only, optional_text, wrong

KNOWN = ("value", "name", "text", "agent", "turn", "sibling")


def read_rewards(data: Any, source: str, team: Team) -> list[Reward]:
    """All rewards of `data`, or `BadRequest` for the first that is not valid."""
    if not isinstance(data, list):
        return [read_reward(data, "reward", source, team)]
    if len(data) > MAX_ITEMS:
        raise wrong("rewards", f"expected at most {MAX_ITEMS}, got {len(data)}")
    return [read_reward(each, f"reward[{i}]", source, team) for i, each in enumerate(data)]


def read_reward(data: Any, where: str, source: str, team: Team) -> Reward:
    """One reward; `where` is its path for errors."""
    given = data if isinstance(data, Mapping) else {"value": data}
    value = _value(given, where, brief(data))
    only(given, KNOWN, where)
    name = optional_text(given.get("name"), f"{where}.name") or source
    text = optional_text(given.get("text"), f"{where}.text") or ""
    agent = optional_text(given.get("agent"), f"{where}.agent")
    names = [each.name for each in team]
    if agent is not None and agent not in names:
        raise _absent(f"{where}.agent", agent, f"no such agent; {nearest(agent[:80], names)}")
    turn = given.get("turn")
    about = [] if turn is None else [t for t in team.turns if type(turn) is int and t.index == turn]
    if turn is not None and not about:
        raise _absent(f"{where}.turn", turn, "the episode has no such turn")
    return Reward(
        name=name,
        value=value,
        text=text,
        agent=agent or (about[0].agent if about else None),
        turn=turn,
        sibling=_sibling(given.get("sibling"), f"{where}.sibling", about),
        source=source,
    )


def _value(given: Mapping[str, Any], where: str, shown: str) -> float:
    try:
        return number(given.get("value"), where)
    except BadRequest as error:
        problem = f"expected a finite number, or an object with one as `value`, got {shown}"
        raise BadRequest(400, f"{where}: {problem}", param=f"{where}.value") from error


def _sibling(value: Any, where: str, about: Sequence[Turn]) -> int:
    if value is None:
        return 0
    if type(value) is not int or value not in [turn.sibling for turn in about]:
        raise _absent(where, value, "the turn has no such answer")
    return value


def _absent(where: str, value: Any, problem: str) -> BadRequest:
    return BadRequest(400, f"{where} {brief(value)}: {problem}", param=where)
