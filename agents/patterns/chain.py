"""A chain: each agent in turn, each shown what was said before it. The last one's text is the
answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from ..lookup import trusted
from ..system import System
from ..team import Team
from ..text.answers import extract
from ..text.templates import view
from ..types import SettingError, Task, Turn, nearest

_FIELDS = ("prompt", "previous", "answer")


@trusted("system")
@dataclass
class Chain(System):
    """Each agent speaks once, in order.

    Args:
        views: what an agent is told, by its name, as a template such as `"{previous}+{c}"`. Fields,
            the first that fits wins:
            `prompt` (the task), `previous` (what the agent before said), `answer` (the answer in
            that, see `answers.extract`; all of it if none is found), the name of any earlier agent
            (what it said), and any public key of `task.meta`. Without a view the first agent gets
            the task, the others the task and what the agent before them said.
    """

    views: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [spec.name for spec in self.specs]
        for name, template in self.views.items():
            if name not in names:
                raise SettingError(
                    f"views.{name}: no such agent in the chain; {nearest(name, names)}"
                )
            if not isinstance(template, str):
                raise SettingError(
                    f"views.{name}: expected a template such as '{{prompt}}', got {template!r}"
                )
            view(template, partial(self._check, name), f"views.{name}")

    def _check(self, name: str, key: str) -> str:
        """A field that cannot have been said when `name` speaks. Keys of `task.meta` are known only
        at play."""
        names = [spec.name for spec in self.specs]
        position = names.index(name)
        unsaid = {*names[position:]} | ({"previous", "answer"} if position == 0 else set())
        if key in unsaid - {"prompt"}:
            raise SettingError(
                f"views.{name}: {{{key}}} has not been said when {name!r} speaks; use what came"
                " before it"
            )
        return ""

    async def run(self, task: Task, team: Team) -> str:
        said: list[Turn] = []
        for agent in team:
            text, reads = self.told(agent.name, task, said)
            said.append(await agent.reply(text, reads=reads))
        return said[-1].text

    def told(self, name: str, task: Task, said: list[Turn]) -> tuple[str, list[Turn]]:
        """What the agent is told after these turns, and those of them whose text it is shown."""
        default = "{prompt}"
        if said:
            default += (
                f"\n\n{said[-1].agent} wrote:\n{{previous}}\n\nGo on from this and answer the task."
            )
        shown: dict[int, Turn] = {}
        by_name = {turn.agent: turn for turn in said}

        def value(key: str) -> str:
            if key == "prompt":
                return task.prompt
            turn = said[-1] if said and key in _FIELDS else by_name.get(key)
            if turn is not None:
                shown[turn.index] = turn
                return (extract(turn.text) or turn.text.strip()) if key == "answer" else turn.text
            if key in task.meta:
                return str(task.meta[key])
            known = [*(_FIELDS if said else ("prompt",)), *by_name, *task.meta]
            raise SettingError(
                f"views.{name}: unknown field {{{key}}} for task {task.id!r}; {nearest(key, known)}"
            )

        return view(self.views.get(name, default), value, f"views.{name}"), list(shown.values())
