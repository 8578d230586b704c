"""A chain: the agents answer one after the other, each with the texts before it in its prompt. The
last one's text is the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..lookup import trusted
from ..system import System
from ..team import Team
from ..text.answers import extract
from ..text.templates import fields_in, render
from ..types import SettingError, Task, Turn, nearest


@trusted("system")
@dataclass
class Chain(System):
    """Each agent answers once, in order.

    Args:
        views: prompts by agent name, as templates such as `"{previous}+{c}"`. Fields, the first
            that fits wins: `prompt` (the task), `previous` (the text of the agent before),
            `answer` (the answer in that, see `answers.extract`; all of it if there is none), the
            name of any earlier agent (its text), and any public key of `task.meta`. Without a view
            the first agent gets the task, the others the task and the text of the agent before.
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
            # Keys of `task.meta` are known only at play.
            position = names.index(name)
            later = {*names[position:]} | ({"previous", "answer"} if position == 0 else set())
            for key in fields_in(template, setting=f"views.{name}"):
                if key in later - {"prompt"}:
                    raise SettingError(
                        f"views.{name}: {{{key}}} has not been said when {name!r} speaks; use what"
                        " came before it"
                    )

    async def run(self, task: Task, team: Team) -> str:
        turns: list[Turn] = []
        for agent in team:
            text, reads = self.prompt_of(agent.name, task, turns)
            turns.append(await agent.reply(text, reads=reads))
        return turns[-1].text

    def prompt_of(self, name: str, task: Task, turns: list[Turn]) -> tuple[str, list[Turn]]:
        """The agent's prompt after these turns, and those of them whose text it quotes."""
        template = "{prompt}"
        fields: dict[str, Any] = {"prompt": task.prompt}
        quoted = {turn.agent: turn for turn in turns}
        if turns:
            last = turns[-1]
            template += (
                f"\n\n{last.agent} wrote:\n{{previous}}\n\nGo on from this and answer the task."
            )
            fields["previous"] = last.text
            fields["answer"] = lambda: extract(last.text) or last.text.strip()
        fields = fields | {turn.agent: turn.text for turn in turns if turn.agent not in fields}
        quoted |= {field: last for field in ("previous", "answer") if turns}
        fields |= {key: value for key, value in task.meta.items() if key not in fields}
        template, setting = self.views.get(name, template), f"views.{name}"
        text = render(template, fields, setting=setting, context=f" for task {task.id!r}")
        reads = [
            quoted[field]
            for field in fields_in(template, setting=setting)
            if field in quoted and field != "prompt"
        ]
        return text, list({turn.index: turn for turn in reads}.values())
