"""DyLAN's team optimisation: trials of a whole temporal network, importance of its agents from the
ratings that they give one another, and the most important ones as the team; no weight moves.

Liu et al., "A dynamic LLM-powered agent network for task-oriented agent collaboration"
(arXiv:2310.02170). A step plays `tasks_per_step` tasks with all agents, at every time step, without
ranking and early end; ratings flow backward from the agents that gave the output
(importance.py); the `team_size` agents with the highest mean importance over all trials so far are
the team in force. It ends when `patience` steps in a row chose the same team. What is measured is
agreement with the team's own output: no gold answer is read, so a team can select what is
confidently wrong; `num_val_tasks` with `keep: best` is the guard. Evaluation plays the network as
its settings say: chosen team, ranking, early end.

Against the paper: one team for the whole task set, not one per subject or query. Trials that failed
are left out; those where no agent gave the output say nothing and are counted (`unmatched`), as is
the share of raters whose ratings could not be read (`unread`), which count with equal weights. What
differs from the authors' network stands in `agents/patterns/temporal_network.py`.

accelerate launch recipes/dylan.py [--config recipes/dylan.yaml] [--field value]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ....agents.patterns.temporal_network import TEAM, TemporalNetwork, team_value
from ....agents.settings import setting
from ....agents.types import SettingError
from ....rollouts.types import Episode
from ...config import RunConfig
from ...loop.step_result import StepResult
from ...trainer import Trainer
from ...values.memory import Memory
from ...values.parts import Part
from .importance import Importance, importance

RATINGS = "marlora.rollouts.rewards.ratings:ratings"


@dataclass
class DyLANConfig(RunConfig):
    """`RunConfig` with the size of the team, and when it counts as found."""

    trains_weights: ClassVar[bool] = False
    collects: ClassVar[bool] = False

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/dylan"
    )
    num_generations: int = setting("trials of a task", 1, at_least=1)
    team_size: int = setting("agents of the team, the ranker aside", 4, at_least=2)
    patience: int = setting(
        "steps in a row that choose the same team, after which the run ends", 3, at_least=1
    )


class DyLANTrainer(Trainer[DyLANConfig]):
    """Selects the team of a `TemporalNetwork`. Arguments: see `Trainer`.

    trainer = DyLANTrainer(model="Qwen/Qwen2.5-0.5B-Instruct",
                           system=TemporalNetwork(["doctor", "lawyer", "historian", "programmer"]),
                           tasks="gsm8k", args=DyLANConfig(team_size=2))
    trainer.train()
    """

    Config = DyLANConfig

    def extra_rewards(self) -> Sequence[str]:
        return (RATINGS,)

    def parts(self) -> Sequence[Part]:
        system = self.spec.system
        if not isinstance(system, TemporalNetwork):
            raise SettingError(
                "system.class: a team is selected of a"
                " marlora.agents.patterns.temporal_network:TemporalNetwork, got"
                f" {type(system).__name__}"
            )
        if self.args.team_size >= len(system.candidates):
            raise SettingError(
                f"team_size: {self.args.team_size} of {len(system.candidates)} agents leaves none"
                " out; expected fewer"
            )
        if system.steps < 2:
            raise SettingError("system.steps: agents rate one another from step 2 on; got 1")
        self.network = system
        self.memory = Memory("importance")
        return [self.memory]

    @property
    def trial(self) -> TemporalNetwork:
        """The network of a trial: no ranking, no early end."""
        return dataclasses.replace(self.network, consensus=1.0, rank_step=self.network.steps + 1)

    def step(self, step: int) -> StepResult:
        """Trials of the whole network, and the team that all trials so far select."""
        everyone = self.run.state.with_values({TEAM: team_value(self.network.candidates)})
        episodes = self.run.rollouts.play(
            self.spec.tasks_of(step), everyone, n=self.args.num_generations, system=self.trial
        )
        found = self.importances(episodes)
        means = self._remember(found)
        team = self.chosen(means)
        teams = self.memory["teams"] = [*self.memory.get("teams", []), team]
        settled = teams[-self.args.patience :]
        done = len(settled) == self.args.patience and len({*settled}) == 1
        return StepResult(
            {
                "importance": means,
                "team": team,
                "trials": self.memory["trials"],
                "unmatched": sum(each.unmatched for each in found) / max(len(found), 1),
                "unread": sum(each.unread for each in found) / max(len(found), 1),
            },
            state=self.run.state.with_values({TEAM: team}),
            done=f"converged: {len(settled)} steps in a row chose {team}" if done else "",
        )

    def importances(self, episodes: Sequence[Episode]) -> list[Importance]:
        """What each trial says; none of those that failed."""
        return [importance(e) for e in episodes if e.parent is None and not e.failed]

    def _remember(self, trials: Sequence[Importance]) -> dict[str, float]:
        """Add to the sums over all trials; the mean importance by agent."""
        sums: dict[str, float] = self.memory.get("sums", {})
        self.memory["sums"] = sums = {
            name: sums.get(name, 0.0) + sum(each.agents.get(name, 0.0) for each in trials)
            for name in self.network.candidates
        }
        self.memory["trials"] = count = self.memory.get("trials", 0) + len(trials)
        return {name: total / max(count, 1) for name, total in sums.items()}

    def chosen(self, means: Mapping[str, float]) -> str:
        """The team of the most important agents, in spec order; of equal ones the first."""
        best = sorted(means, key=lambda name: -means[name])[: self.args.team_size]
        return team_value([name for name in self.network.candidates if name in best])
