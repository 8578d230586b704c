"""Correction of failed episodes, the augmentation of SiriuS (arXiv 2502.04780): feedback,
regeneration, rephrasing, and a live replay.

For a failed episode one agent after the other is tried. A conversation (`agents.repair`) makes a
new text for the agent's failed turn; the text, unless it gives away how it was made, takes the
turn's place as a written answer to the turn's ORIGINAL prompt; what was said before is given, the
successors play on live, the rewards judge. The first success ends it. All of it is stored, failures
too: selection keeps what succeeded. Pure Python.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....agents.patterns.self_correction import (
    FEEDBACK,
    REGENERATE,
    REPHRASE,
    SelfCorrection,
    correction_task,
)
from ....agents.settings import Settings, parsed_mapping, setting
from ....agents.transcript import Operation
from ....agents.types import BASE, AgentSpec, Completion, SettingError, Turn, from_json, nearest
from ....rollouts.episodes.runner import EpisodeRequest, EpisodeRunner
from ....rollouts.types import Episode
from ...credit.filtering import SelectionConfig, outcome
from ...credit.leakage import answer_spellings, contains_answer, saw_answer
from ...credit.weights import team_rewards

CORRECTION = "mend"  # the kind of derived episodes; a part of their ids
# the operation of a talk that says whose turn it is about, and what is wrong with the new text
VERDICT = "correction"
TRACES = (
    "feedback",
    "corrected",
    "correction",
    "previous answer",
    "reference answer",
    "my mistake",
    "original text",
)


@dataclass
class CorrectionConfig(Settings):
    """How failed episodes are corrected. The templates' fields: see `SelfCorrection`."""

    repair: str = setting(
        "episodes that are corrected: unsolved (one of each task that none solved), all failed"
        " ones, or none",
        "unsolved",
        choices=("unsolved", "all", "none"),
    )
    repair_agents: list[str] = setting(
        "agents whose turns are corrected, in this order; empty: all that learn", factory=list
    )
    feedback_agent: dict | str | None = setting(
        "the agent that gives feedback and sees the answer: fields of AgentSpec (policy, prompt,"
        " sampling); the bare base if empty",
        factory=dict,
    )
    max_feedback: int = setting("tries of feedback per failed turn", 1, at_least=1)
    max_regenerations: int = setting("tries to regenerate the turn per feedback", 1, at_least=1)
    feedback: str = setting(
        "template: prompt of the feedback agent; empty: no feedback, the turn is only resampled",
        FEEDBACK,
    )
    regenerate: str = setting("template: prompt to write the turn again", REGENERATE)
    rephrase: str = setting(
        "template: prompt to rephrase without a trace of the correction; empty leaves it out",
        REPHRASE,
    )
    may_tell_answer: list[str] = setting(
        "agents, besides the one that answers, whose corrected text may hold the answer",
        factory=list,
    )
    traces: list[str] = setting(
        "a corrected text that holds one of these is refused: it shows how it was made",
        factory=lambda: list(TRACES),
    )

    def prepare(self) -> None:
        self.feedback_agent = parsed_mapping("feedback_agent", self.feedback_agent)

    def check(self) -> None:
        self.conversation(AgentSpec("x"))  # checks the templates

    @property
    def critic(self) -> AgentSpec:
        """Who gives feedback."""
        given = {
            "name": "feedback",
            "role": "knows the answer, is outside the team",
            "policy": BASE,
            **self.feedback_agent,  # type: ignore[dict-item]
        }
        return from_json(AgentSpec, given, "feedback_agent")

    def conversation(self, agent: AgentSpec) -> SelfCorrection:
        """The conversation that corrects a turn of this agent."""
        if agent.name == self.critic.name:
            raise SettingError(
                f"feedback_agent.name: {agent.name!r} is an agent of the team; give it another name"
            )
        return SelfCorrection([self.critic, agent], self.feedback, self.regenerate, self.rephrase)

    def check_agents(self, team: Sequence[AgentSpec]) -> None:
        """Raises `SettingError` if a setting names an agent that the team has not."""
        names = [spec.name for spec in team]
        for field in ("repair_agents", "may_tell_answer"):
            for name in getattr(self, field):
                if name not in names:
                    raise SettingError(
                        f"{field}: {name!r} is no agent of the team; {nearest(name, names)}"
                    )
        for spec in team:
            self.conversation(spec)


@dataclass(frozen=True)
class Corrector:
    """Corrects failed episodes, one per call.

    Args:
        player: plays the team as it played the episodes.
        repair, selection: the settings; success is `selection`'s.
        learning: agents whose turns may be corrected.
        write: (turn, text) -> the text as an answer to the turn's prompt, tokens included.
        openings: see `selection.select`.
    """

    player: EpisodeRunner
    repair: CorrectionConfig
    selection: SelectionConfig
    learning: Sequence[str]
    write: Callable[[Turn, str], Completion]
    openings: Mapping[str, str]

    async def __call__(self, episode: Episode) -> list[Episode]:
        """All that was played to correct it: conversations, and replays with a written turn. The
        last one is the success, if there is one."""
        played: list[Episode] = []
        for turn, corrected in targets(
            episode, self.selection, self.repair.repair_agents or self.learning
        ):
            if await self._correct(episode, turn, corrected, played):
                break
        return played

    async def _correct(
        self, episode: Episode, turn: Turn, corrected: Turn | None, played: list[Episode]
    ) -> bool:
        """Try to correct one turn; whether a replay succeeded. `corrected`: the agent's own later
        success, which is only rephrased."""
        tried, place = {turn.text.strip()}, f"{episode.id}/{CORRECTION}/{turn.agent}-{turn.index}"
        task = correction_task(
            episode.task, turn, episode.turns, corrected.text if corrected else ""
        )
        spec = next(spec for spec in self.player.system.specs if spec.name == turn.agent)
        system = self.repair.conversation(spec)
        if corrected is not None:
            if not self.repair.rephrase:
                return False
            system = dataclasses.replace(system, feedback="", regenerate="")
        helper = dataclasses.replace(self.player, system=system, rewards=())
        for number in range(self.repair.max_feedback):
            given: Sequence[Turn] = ()
            for attempt in range(self.repair.max_regenerations):
                talk = await helper.play(
                    EpisodeRequest(
                        task,
                        f"{place}/talk-{number}",
                        attempt,
                        episode.step,
                        kind="aside",
                        follows=episode.id,
                    ),
                    given=given,
                )
                given = talk.turns[:1] if system.feedback else ()
                why = talk.error or self._refused(episode, turn, talk.output or "", tried)
                note = {"agent": turn.agent, "turn": turn.index, "refused": why}
                verdict = Operation(len(talk.turns), VERDICT, text=json.dumps(note))
                played.append(dataclasses.replace(talk, operations=(*talk.operations, verdict)))
                if why:
                    continue
                tried.add(talk.output or "")
                played.append(
                    await self._replay(
                        episode, turn, talk.output or "", f"{place}/play-{number}", attempt
                    )
                )
                if is_corrected(played[-1], self.selection):
                    return True
        return False

    async def _replay(
        self, episode: Episode, turn: Turn, text: str, group: str, attempt: int
    ) -> Episode:
        """The episode with `text` in the turn's place: what was said before is given, what follows
        is live."""
        return await self.player.play(
            EpisodeRequest(episode.task, group, attempt, episode.step),
            given=[earlier for earlier in episode.turns if earlier.index < turn.index],
            replace={turn.index: self.write(turn, text)},
            decisions=episode.decisions,
            seed=episode.seed,
        )

    def _refused(self, episode: Episode, turn: Turn, text: str, tried: set[str]) -> str:
        """Why a text may not take the turn's place; "" if it may."""
        if not text:
            return "empty"
        if text in tried:
            return "nothing new"
        low = text.lower()
        if any(
            trace.lower() in low and trace.lower() not in turn.text.lower()
            for trace in self.repair.traces
        ):
            return "shows that it was corrected"
        if turn.agent not in {*answering(episode), *self.repair.may_tell_answer}:
            public = episode.task.public()
            known = "\n".join(
                [public.prompt, *map(str, public.meta.values()), self.openings.get(turn.agent, "")]
            )
            if contains_answer(text, answer_spellings(episode.task)) and not contains_answer(
                known, answer_spellings(episode.task)
            ):
                return "tells the answer"
        return ""


def broken(
    episodes: Sequence[Episode],
    repair: CorrectionConfig,
    selection: SelectionConfig,
    learning: Sequence[str],
) -> list[Episode]:
    """The episodes to correct: failed ones as `repair` says, and successes in which an agent has
    corrected itself on the way."""
    if repair.repair == "none":
        return []
    solved = {e.task.id for e in episodes if _team(e, selection) >= selection.success_threshold}
    found: list[Episode] = []
    taken: set[str] = set()
    for episode in episodes:
        failed = _team(episode, selection) < selection.success_threshold  # not if it has no score
        if failed and repair.repair == "unsolved" and episode.task.id in solved | taken:
            continue
        if next(targets(episode, selection, repair.repair_agents or learning), None) is not None:
            found.append(episode)
            taken |= {episode.task.id} if failed else set()
    return found


def targets(
    episode: Episode, selection: SelectionConfig, agents: Sequence[str]
) -> Iterator[tuple[Turn, Turn | None]]:
    """Turns to correct, agent by agent: its first turn without success. In an episode that
    succeeded only an agent's turn that it has corrected itself, with the later turn that has
    success."""
    team, gold = _team(episode, selection), saw_answer(episode)
    for agent in agents:
        turns = [
            t
            for t in episode.trajectory(agent)
            if t.source == "sampled" and t.prompt_ids and t.index not in gold
        ]
        values = [outcome(episode, turn, team, selection) for turn in turns]
        first = next(
            (n for n, value in enumerate(values) if value < selection.success_threshold), None
        )
        if first is None:
            continue
        if team < selection.success_threshold:
            yield turns[first], None
            continue
        later = next(
            (n for n in range(first + 1, len(turns)) if values[n] >= selection.success_threshold),
            None,
        )
        if later is not None and team >= selection.success_threshold:
            yield turns[first], turns[later]


def is_corrected(episode: Episode, selection: SelectionConfig) -> bool:
    """Did a replay succeed: the team, and the written turn by its own reward if it has one?"""
    team = _team(episode, selection)
    written = [turn for turn in episode.turns if turn.source == "written"]
    return (
        bool(written)
        and team >= selection.success_threshold
        and all(
            outcome(episode, turn, team, selection) >= selection.success_threshold
            for turn in written
        )
    )


def answering(episode: Episode) -> set[str]:
    """Agents whose text is the team's output, and the one that spoke last: theirs is to give the
    answer."""
    taken = [turn for turn in episode.turns if turn.taken]
    return {turn.agent for turn in taken if turn.text == episode.output} | {
        turn.agent for turn in taken[-1:]
    }


def tally(episodes: Sequence[Episode], selection: SelectionConfig) -> dict[str, Any]:
    """What correction did, for metrics: conversations, refused texts by reason, replays, and
    episodes that were corrected, by agent."""
    talks = [json.loads(o.text) for e in episodes for o in e.operations if o.name == VERDICT]
    plays = [e for e in episodes if e.kind != "aside"]
    who = Counter(
        t.agent
        for e in plays
        if is_corrected(e, selection)
        for t in e.turns
        if t.source == "written"
    )
    refused = Counter(talk["refused"] for talk in talks if talk["refused"])
    return {
        "talks": len(talks),
        "refused": dict(sorted(refused.items())),
        "replays": len(plays),
        "mended": dict(sorted(who.items())),
    }


def _team(episode: Episode, selection: SelectionConfig) -> float:
    return team_rewards([episode], selection)[episode.id]
