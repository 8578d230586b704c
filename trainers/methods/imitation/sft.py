"""SFT for a team: play (or take a store of episodes), keep some turns, and let every agent imitate
its own kept turns.

With the default selection, `success`, this is rejection sampling fine-tuning with one LoRA per
agent. What is kept is `credit/filtering.py`, how it is learnt `imitation.py`. One step plays
`tasks_per_step` tasks `num_generations` times and makes `num_train_epochs` passes over what was
kept. `--trainer trl` hands the same sequences and masks to TRL's SFTTrainer, one policy after the
other.

accelerate launch recipes/sft_team.py [--config recipes/sft_team.yaml] [--episodes runs/x/episodes]
[--field value]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....agents.chat import Services
from ....agents.settings import setting
from ....agents.system import System
from ....agents.team import Team
from ....agents.transcript import Call
from ....agents.types import Completion, Message
from ....rollouts.types import Episode
from ...config import RunConfig
from ...credit.filtering import FilteredTurns, Rule, SelectionConfig, filter_turns
from ...errors import RunError
from ...trainer import Trainer
from .imitation import ImitationConfig, fit_turns


@dataclass
class SFTConfig(RunConfig, SelectionConfig, ImitationConfig):
    """`RunConfig` with a selection of turns (`SelectionConfig`) and epochs of imitation
    (`ImitationConfig`)."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/sft"
    )


class SFTTrainer(Trainer[SFTConfig]):
    """Trains a team by imitation of its own kept turns. Arguments: see `Trainer`."""

    Config = SFTConfig

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Select, then imitate; returns metrics with the table of what was kept and dropped."""
        selection = selected(self, step, episodes, self.args)
        done = fit_turns(self.run.learner, step, episodes, selection.weights, self.args)
        return {
            "policies": done.into(self.rows(done.updates, episodes)),
            "selection": selection.table(),
            "dropped": done.untrained,
        }


def selected(
    trainer: Trainer[Any],
    step: int,
    episodes: Sequence[Episode],
    config: SelectionConfig,
    rule: Rule | None = None,
) -> FilteredTurns:
    """What a run keeps of a step's episodes, told to people. Raises `RunError` if it is nothing."""
    run, spec = trainer.run, trainer.spec
    played = {e.state.key: e.state.values for e in episodes}.values()
    selection = filter_turns(
        episodes,
        config,
        rule,
        agents=run.learner.policy_of,
        openings=openings(spec.system, run.values, *played),
        seed=spec.config.seed,
    )
    run.log.say("\n".join(f"step {step}: {line}" for line in str(selection).splitlines()))
    if not selection.kept:
        lines = "; ".join(str(selection).splitlines()) or "no agent that learns has spoken"
        raise RunError(
            f"step {step}: no turn was kept ({lines}); the episodes are stored, no adapter was"
            " changed"
        )
    return selection


def openings(system: System, *values: Mapping[str, Any]) -> Mapping[str, str]:
    """Per agent what stands at the head of all its chats, under any of these values: there an
    answer is no leak."""
    texts: dict[str, list[str]] = {}
    for each in values:
        for name, head in opening_messages(system, each).items():
            texts.setdefault(name, []).extend(message.content for message in head)
    return {name: "\n".join(dict.fromkeys(own)) for name, own in texts.items()}


def opening_messages(system: System, values: Mapping[str, Any]) -> dict[str, tuple[Message, ...]]:
    """Per agent the messages at the head of all its chats: system message and demonstrations."""
    team = Team(system.specs, Services(_nobody), values=values)
    return {agent.name: agent.opening(agent.tools) for agent in team}


async def _nobody(call: Call) -> list[Completion]:
    raise RuntimeError(f"agent {call.agent.name!r} is not to be asked here")
