"""A proposer of prompts that sees what a team did: a helper that writes an instruction for an agent
from episodes under the best and the worst of several prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....agents.settings import Settings, setting
from ....agents.state import Param
from ....agents.text.tags import block, nested
from ....agents.types import AgentSpec, Task
from ....rollouts.types import Episode
from ...collection.rollout_manager import RolloutManager
from ...feedback.helpers import COPIED, Reply
from ...feedback.targets import copied_tasks
from ...loop.spec import RunSpec
from .search.mipro_proposer import PROPOSER, Proposals, usable

SYSTEM = "You write instructions for the agents of a team of language models."
PROPOSE = (
    "Agent {agent} ({role}) works by an instruction (system message). Above stand instructions that"
    " were tried, the better one first, each with the mean reward of the team and with what the"
    " agent was asked and replied. Write a better instruction for agent {agent}, one that holds for"
    " any task of this kind.\n"
    "Answer with the instruction alone, between <INSTRUCTION> and </INSTRUCTION>."
)


@dataclass
class RolloutProposerConfig(Settings):
    """What the proposer is shown of the rollouts, and how long its replies may be."""

    shown_episodes: int = setting(
        "episodes of the best and of the worst candidate that the proposer is shown, those of"
        " lowest and of highest reward",
        4,
        at_least=1,
    )
    max_proposal_tokens: int = setting(
        "tokens of a proposer's reply at most; a truncated instruction is dropped", 512, at_least=1
    )
    max_instruction_chars: int = setting(
        "characters of an instruction at most; a longer one is dropped", 2000, at_least=1
    )


@dataclass(frozen=True)
class Shown:
    """A candidate as the proposer sees it.

    Args:
        values: its prompts by name of a param.
        mean: its mean reward.
        episodes: played with these values.
        rewards: by episode id.
    """

    values: Mapping[str, str]
    mean: float
    episodes: Sequence[Episode]
    rewards: Mapping[str, float]


class RolloutProposer:
    """Asks the helper `proposer` of a run. Every rank has to call it.

    Args:
        rollouts: asks.
        spec: the proposer sees prompts and answers of its training tasks, of others nothing.
    """

    def __init__(
        self, rollouts: RolloutManager, spec: RunSpec, config: RolloutProposerConfig
    ) -> None:
        self.rollouts, self.spec, self.config = rollouts, spec, config

    def propose(self, params: Sequence[Param], shown: Sequence[Shown]) -> Proposals:
        """An instruction for each of these prompts, fewer where some are dropped.

        Args:
            params: agents' prompts, with the values that are to be improved; an agent may stand
                here more than once.
            shown: candidates, the best first.
        """
        talk = Reply([self._agent()], saw_gold=True)
        tasks = [
            Task(f"instruction/{param.agent}/{number}", self.question(param, shown))
            for number, param in enumerate(params)
        ]
        replies = self.rollouts.ask_all([(talk, task, "") for task in tasks])
        found = usable(params, replies, self.config.max_instruction_chars)
        for param in {param.agent: param for param in params}.values():
            texts = found.texts[param.agent]
            fresh = [t for t in texts if not copied_tasks(t, param.value, self.spec.tasks)]
            if len(fresh) < len(texts):
                found.dropped[COPIED] += len(texts) - len(fresh)
            found.texts[param.agent] = fresh
        return found

    def question(self, param: Param, shown: Sequence[Shown]) -> str:
        """What the proposer is asked about an agent's prompt."""
        blocks = [
            nested(f"CANDIDATE_{number}", self._candidate(param, each))
            for number, each in enumerate(shown, 1)
        ]
        ask = PROPOSE.format(agent=param.agent, role=param.role or "no role is given")
        return "\n\n".join([*blocks, ask])

    def _candidate(self, param: Param, shown: Shown) -> str:
        episodes = extremes(shown.episodes, shown.rewards, self.config.shown_episodes)
        told = [_episode(param.agent, e, shown.rewards[e.id]) for e in episodes]
        head = f"Mean reward: {shown.mean:.4f}"
        return "\n".join([block("INSTRUCTION", shown.values[param.name]), head, *told])

    def _agent(self) -> AgentSpec:
        """The helper, at temperature 1 unless its settings say otherwise."""
        agent, config = self.spec.helper(PROPOSER), self.spec.config
        free = dataclasses.replace(
            config.sampling(), temperature=1.0, max_tokens=self.config.max_proposal_tokens
        )
        return dataclasses.replace(
            agent, prompt=agent.prompt or SYSTEM, sampling=agent.sampling or free
        )


def extremes(
    episodes: Sequence[Episode], rewards: Mapping[str, float], count: int
) -> list[Episode]:
    """At most `count` episodes, in turn of the lowest and of the highest reward, of equal ones in
    their order; lowest first."""
    ranked = sorted(episodes, key=lambda episode: rewards[episode.id])
    low, high = ranked[: (count + 1) // 2], ranked[(count + 1) // 2 :]
    return [*low, *(high[-(count // 2) :] if count > 1 else [])]


def _episode(agent: str, episode: Episode, reward: float) -> str:
    """What an agent was asked and replied in an episode, what the answer is, and the reward."""
    talk = [
        part
        for turn in episode.trajectory(agent)
        for part in (
            block("ASKED", str(turn.messages[-1].content or "") if turn.messages else ""),
            block("REPLIED", turn.text),
        )
    ]
    expected = block("TASK_ANSWER", str(episode.task.answer))
    return nested("EPISODE", "\n".join([*talk, expected, f"Reward of the team: {reward:g}"]))
