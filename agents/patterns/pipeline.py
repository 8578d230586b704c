"""A pipeline whose structure is a value: states with roles, and edges between the states, so that a
method can change who speaks, how, and in what order.

The standard operating procedures of agent symbolic learning (Zhou et al., "Symbolic Learning
Enables Self-Evolving Agents", arXiv 2406.18532): a state is a group of roles that speak in turn,
then the pipeline goes on to a next state. A role is spoken by one of the system's agents, so
several roles may share a model, and a role that a method adds needs none of its own.

The value `pipeline` is JSON:

    {"begin": STATE, "states": {STATE: {
        "about": what it is for,
        "roles": {ROLE: {
            "agent": NAME, "about": who it is, "template": "...", "parts": {PART: text}}},
        "route": "order" | "random" | "model", "first": ROLE,
        "next": [STATE, ...]}}}    # "end" ends the run, and so does an empty list

A role is sent its `template`, with the fields `about`, the names of its parts, `prompt` (the task),
`previous` (the last text, "" at first) and `history` (all texts, each after its place). Where
`next` has several states, or the route is `model`, the agent that spoke last is asked to name one.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..lookup import trusted
from ..settings import setting
from ..state import Param
from ..system import System
from ..team import Team
from ..text.templates import fields_in, render
from ..transcript import Operation
from ..types import SettingError, Task, Turn, nearest

PIPELINE = "pipeline"  # the value, and the operation before each turn: its text is STATE/ROLE
END = "end"
ROUTES = ("order", "random", "model")
MOST = 20  # states of a pipeline, and roles of a state
TEMPLATE = "{about}\n{instruction}\n\n{prompt}\n\n{previous}"
GIVEN = ("about", "prompt", "previous", "history")  # fields of a template besides its parts
CHOOSE = (
    "A run of several steps stands here:\n\n{previous}\n\nWhat may come next:\n{options}\n\nName"
    " what should come next, and nothing else."
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_KEYS = {
    "pipeline": ("begin", "states"),
    "state": ("about", "roles", "route", "first", "next"),
    "role": ("agent", "about", "template", "parts"),
}


@trusted("system")
@dataclass
class Pipeline(System):
    """Agents that speak the roles of a pipeline; the output is the last text.

    Args:
        pipeline: the structure at the start; empty is a chain in which each agent is a state with
            one role of its own name.
        max_states: states that a run enters at most: a pipeline may lead back. A run that would
            enter more ends with its last text, and an operation says so.
    """

    pipeline: Mapping[str, Any] = field(default_factory=dict)
    max_states: int = setting("states that a run enters at most", 12, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        problem = self.problem(self.start)
        if problem:
            raise SettingError(f"pipeline: {problem}")

    @property
    def start(self) -> dict[str, Any]:
        """The pipeline that the settings say."""
        return dict(self.pipeline) or chained([spec.name for spec in self.specs])

    def params(self) -> tuple[Param, ...]:
        """Those of every system, and `pipeline`: states, roles and edges."""
        role = "states, the roles that speak in each, and which state comes next"
        param = Param(PIPELINE, self.start, "structure", role=role, legal=self.problem)
        return *super().params(), param

    def problem(self, value: Any) -> str | None:
        """Why this is no pipeline of these agents; None if it is one."""
        try:
            _check(value, [spec.name for spec in self.specs])
        except ValueError as error:
            return str(error)
        return None

    async def run(self, task: Task, team: Team) -> Turn:
        value = team.values.get(PIPELINE) or self.start
        if problem := self.problem(value):
            raise SettingError(f"values.{PIPELINE}: {problem}")
        walk = _Walk(task, team)
        name = value["begin"]
        for _ in range(self.max_states):
            state = value["states"][name]
            await walk.enter(name, state)
            options = {n: value["states"].get(n, {}).get("about", "") for n in state["next"]}
            name = await walk.choose(options) if options else END
            if name == END:
                break
        else:
            error = f"more than {self.max_states} states; {name!r} was not entered"
            team.record("limit", name, reads=walk.turns[-1:], error=error)
        return walk.turns[-1]


class _Walk:
    """One run through a pipeline: its turns so far, and the turn that chose what comes now."""

    def __init__(self, task: Task, team: Team) -> None:
        self.task, self.team = task, team
        self.turns: list[Turn] = []
        self.places: list[str] = []  # of the turns
        self._chosen_by: list[Turn | Operation] = []

    async def enter(self, name: str, state: Mapping[str, Any]) -> None:
        """Let the roles of a state speak."""
        roles, route = list(state["roles"]), state["route"]
        first = roles.index(state["first"])
        order = roles[first:] + roles[:first]
        if route == "random":
            order = self.team.rng.sample(roles, len(roles))
        while order:
            role = order.pop(0)
            await self._speak(f"{name}/{role}", state["roles"][role])
            if route == "model" and order:
                abouts = {each: state["roles"][each]["about"] for each in order}
                chosen = await self.choose({**abouts, END: "nobody else has to speak here"})
                order = [] if chosen == END else [chosen, *(r for r in order if r != chosen)]

    async def _speak(self, place: str, role: Mapping[str, Any]) -> None:
        template, quotes = role["template"], zip(self.places, self.turns, strict=True)
        history = "\n\n".join(f"[{where}]\n{turn.text}" for where, turn in quotes)
        fields = {
            **role["parts"],
            "about": role["about"],
            "prompt": self.task.prompt,
            "previous": self.turns[-1].text if self.turns else "",
            "history": history,
        }
        named = fields_in(template, setting=place)
        shown = self.turns if "history" in named else self.turns[-1:] * ("previous" in named)
        stands = self.team.record(PIPELINE, place, reads=self._chosen_by)
        text = f"[{place}]\n{render(template, fields, setting=place).strip()}"
        agent = self.team[role["agent"]].fresh()
        self.turns.append(await agent.reply(text, reads=[stands, *shown]))
        self.places.append(place)
        self._chosen_by = []

    async def choose(self, options: Mapping[str, str]) -> str:
        """The option that the agent which spoke last names; the only one without a question. The
        first, on record as an error, where it names none."""
        names = list(options)
        if len(names) == 1:
            return names[0]
        last = self.turns[-1]
        lines = "\n".join(f"{name}: {about}" for name, about in options.items())
        text = render(CHOOSE, {"previous": last.text, "options": lines}, setting="choose")
        reply = await self.team[last.agent].fresh().reply(text, reads=[last])
        chosen = _named(reply.text, names)
        error = "" if chosen else f"none of {', '.join(names)} was named"
        self._chosen_by = [
            self.team.record("choice", chosen or names[0], reads=[reply], error=error)
        ]
        return chosen or names[0]


def _named(text: str, names: Sequence[str]) -> str | None:
    """The name that stands last in a text, as a word of its own; None if there is none."""
    found = {
        name: max((m.start() for m in re.finditer(rf"(?<![\w-]){name}(?![\w-])", text)), default=-1)
        for name in names
    }
    best = max(names, key=lambda name: found[name])
    return best if found[best] >= 0 else None


def chained(agents: Sequence[str]) -> dict[str, Any]:
    """A pipeline in which these agents speak one after the other, each a state of its own name."""
    states = {
        name: {
            "about": "",
            "roles": {name: role_of(name)},
            "route": "order",
            "first": name,
            "next": list(agents[k + 1 : k + 2]),
        }
        for k, name in enumerate(agents)
    }
    return {"begin": agents[0], "states": states}


def role_of(agent: str, about: str = "", instruction: str = "") -> dict[str, Any]:
    """A role that this agent speaks, with the usual template."""
    parts = {"instruction": instruction}
    return {"agent": agent, "about": about, "template": TEMPLATE, "parts": parts}


def _check(value: Any, agents: Sequence[str]) -> None:
    """Raise `ValueError` unless this is a pipeline of these agents."""
    _check_keys("pipeline", value)
    states = _check_names("states", value["states"])
    if not _is_one(value["begin"], states):
        raise ValueError(f"begin: no state {value['begin']!r:.60}; {nearest('', states)}")
    if END in states:
        raise ValueError(f"states.{END}: {END!r} ends the run; name the state otherwise")
    for name, state in states.items():
        _check_state(name, state, states, agents)
    _check_paths(value["begin"], states)


def _is_one(name: Any, known: Container[str]) -> bool:
    """Whether this is a name that is known; what a model writes may be no text at all."""
    return isinstance(name, str) and name in known


def _check_state(name: str, state: Any, states: Mapping[str, Any], agents: Sequence[str]) -> None:
    where = f"states.{name}"
    _check_keys("state", state, where)
    _check_text(f"{where}.about", state["about"])
    roles = _check_names(f"{where}.roles", state["roles"])
    for role, given in roles.items():
        _check_role(f"{where}.roles.{role}", given, agents)
    if not _is_one(state["first"], roles):
        raise ValueError(f"{where}.first: no role {state['first']!r:.60}; {nearest('', roles)}")
    if not _is_one(state["route"], ROUTES):
        raise ValueError(f"{where}.route: expected one of {', '.join(ROUTES)}")
    following = state["next"]
    if not isinstance(following, list) or len(set(map(str, following))) < len(following):
        raise ValueError(f"{where}.next: expected a list of different states")
    for other in following:
        if other != END and not _is_one(other, states):
            raise ValueError(f"{where}.next: no state {other!r:.60}; {nearest(str(other), states)}")


def _check_role(where: str, role: Any, agents: Sequence[str]) -> None:
    _check_keys("role", role, where)
    if not _is_one(role["agent"], agents):
        agent = role["agent"]
        raise ValueError(f"{where}.agent: no agent {agent!r:.60}; {nearest(str(agent), agents)}")
    parts = role["parts"]
    if not isinstance(parts, Mapping):
        raise ValueError(f"{where}.parts: expected texts by name")
    for part, text in parts.items():
        if not isinstance(part, str) or not part.isidentifier() or part in GIVEN:
            raise ValueError(f"{where}.parts: {part!r:.60} cannot name a part")
        _check_text(f"{where}.parts.{part}", text)
    for text in ("about", "template"):
        _check_text(f"{where}.{text}", role[text])
    try:
        named = fields_in(role["template"], setting=f"{where}.template")
    except SettingError as error:
        raise ValueError(str(error)) from error
    for each in named:
        if each not in (*GIVEN, *parts):
            raise ValueError(f"{where}.template: unknown field {{{each}}}")


def _check_paths(begin: str, states: Mapping[str, Any]) -> None:
    """Every state can be reached, and from every state an end can."""
    reached, todo = set[str](), [begin]
    while todo:
        name = todo.pop()
        if name not in reached and name != END:
            reached.add(name)
            todo += states[name]["next"]
    if lost := [name for name in states if name not in reached]:
        raise ValueError(f"states.{lost[0]}: no way leads to it from {begin!r}")
    ending = {END, *(name for name, state in states.items() if not state["next"])}
    for _ in states:
        ending |= {name for name, state in states.items() if ending & set(state["next"])}
    if endless := [name for name in states if name not in ending]:
        raise ValueError(f"states.{endless[0]}: no way leads from it to an end")


def _check_keys(kind: str, value: Any, where: str = "pipeline") -> None:
    if not isinstance(value, Mapping) or set(value) != set(_KEYS[kind]):
        raise ValueError(f"{where}: expected a mapping with {', '.join(_KEYS[kind])}")


def _check_names(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not 1 <= len(value) <= MOST:
        raise ValueError(f"{where}: expected from 1 to {MOST}, by name")
    for name in value:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{where}: {name!r:.60} is no name (letters, digits, '_' and '-')")
    return value


def _check_text(where: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a text, got {value!r:.60}")
