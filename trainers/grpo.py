"""
GRPO for a team: every episode of a task is compared with its siblings, and each agent's own tokens learn from the comparison.

One step plays `tasks_per_step` tasks `num_generations` times, turns rewards into one advantage per turn (`credit`, see `credit.py`), drops
what carries no signal, and updates each agent's adapter on exactly the tokens it sampled (loss: `losses.py`). Against the paper
(arXiv:2402.03300): behaviour log-probabilities are the engine's, so there is no old-log-prob forward; no KL term unless `beta` > 0;
statistics run over whatever the credit rule compares, by default the team's reward over episodes of one task.

accelerate launch recipes/grpo_team.py [--config recipes/grpo_team.yaml] [--field value]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..agents.team import System
from ..agents.types import SettingError, Task, to_json
from ..rollouts.engines.engine import Engine
from ..rollouts.engines.start import help_of
from ..rollouts.evaluate import Evaluation, paired
from ..rollouts.rewards import RewardFn
from ..rollouts.types import Episode, groups
from .batches import Batch
from .config import RunConfig
from .credit import Advantages, CreditConfig, credit
from .losses import LossConfig, Stats, policy_loss
from .replay import counterfactual_rewards
from .run import Run
from .samples import Denominators, samples
from .threads import Stopped
from .update import How, Updated


@dataclass
class GRPOConfig(RunConfig, CreditConfig, LossConfig):
    """`RunConfig` with a credit rule (`CreditConfig`) and a policy-gradient loss (`LossConfig`)."""

    output_dir: str = help_of("run folder: config, episodes, metrics, checkpoints, report", "runs/grpo")

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        for parent in (CreditConfig, LossConfig):
            check = getattr(parent, "__post_init__", None)
            if check is not None:
                check(self)
        if self.num_generations < 2 and self.credit in ("grpo", "rloo", "dr_grpo", "dr_mas"):
            raise SettingError(
                f"num_generations: credit {self.credit!r} compares episodes of one task, so at least 2; got {self.num_generations}"
            )


class GRPOTrainer:
    """Trains a team by policy gradient.

        trainer = GRPOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=Chain(["solver", "reviewer"]), tasks="arithmetic",
                              args=GRPOConfig(output_dir="runs/first"))
        trainer.train()
        print(trainer.evaluate())

    Args:
        model: the shared base, a folder or hub name; "" takes `args.model`.
        system: who talks to whom; None takes `args.system`.
        tasks: a task set's name, or a list of tasks (then give `eval_tasks` too); None takes `args.tasks`.
        rewards: functions `(task, episode) -> Reward | float`, or names; None takes `args.rewards`.
        engine: a running engine instead of one that the run starts.

    Raises `SettingError` at once for settings that cannot work, `RunError` or `EngineError` for a run that cannot go on. Works in a notebook.
    """

    def __init__(
        self,
        model: str = "",
        system: System | None = None,
        tasks: str | Sequence[Task] | None = None,
        args: GRPOConfig | None = None,
        *,
        eval_tasks: Sequence[Task] | None = None,
        rewards: Sequence[RewardFn | str] | None = None,
        engine: Engine | None = None,
        recipe: str = "grpo_team",
    ) -> None:
        self.args = args or GRPOConfig()
        self.args.model = model or self.args.model
        if isinstance(tasks, str):
            self.args.tasks, tasks = tasks, None
        self.run = Run(self.args, system, tasks=tasks, eval_tasks=eval_tasks, rewards=rewards, engine=engine, recipe=recipe)
        self.before: Evaluation | None = None
        for name, spec in self.run.policies.items():
            speaks = [agent.sampling or self.args.sampling() for agent in self.run.system.specs if agent.policy == name]
            if spec.trainable and spec.has_adapter and not any(sampling.on_policy for sampling in speaks):
                raise SettingError(
                    f"policies.{name}: its agents sample at temperature 0 or from a cut-off softmax (top_p, top_k, min_p, penalties), "
                    "where a policy gradient is not defined; change their sampling or set trainable: false"
                )

    def train(self) -> dict[str, Any]:
        """Evaluate, train, evaluate; returns what stands in `summary.json`. Ctrl-C saves the last finished step and goes on up."""
        run = self.run.open()
        try:
            self.before = run.evaluate("before", versions={})
            for step in run.steps():
                episodes = run.collect(step, self.replay if self.args.credit == "counterfactual" else None)
                run.finish(step, episodes, self.learn(step, episodes))
            after = run.evaluate("after")
            return run.summarise(self.before, after, self.contributions())
        except Stopped:
            run.save()
            raise
        finally:
            run.close()

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """One update from the step's episodes; returns metrics."""
        advantages = credit(episodes, self.args, self.run.credit_state)
        found, dropped = samples(episodes, advantages, self.run.policy_of)
        if step == 1 and found:
            self.run.show(found)
        done = self.run.learn(step, found, self.loss, How(reference=self.args.beta > 0, entropy_grad=self.args.entropy_coef > 0))
        shares = {name: shares_of(episodes, self.run.agents_of[name], advantages) for name in self.run.policies}
        return {
            "policies": {
                name: {**metrics(done.get(name)), **shares[name]}
                for base in self.run.bases.values()
                for name in base.adapters.trainable
            },
            "dropped": {f"{agent}: {reason}": count for (agent, reason), count in sorted(dropped.items())},
        }

    async def replay(self, episode: Episode) -> Episode:
        """The episode with counterfactual rewards, from replays of each turn by the team that played it."""
        return await counterfactual_rewards(self.run.player(episode.team_version), episode, self.args)

    def loss(
        self, batch: Batch, logp: torch.Tensor, entropy: torch.Tensor, reference: torch.Tensor | None, counts: Denominators
    ) -> tuple[torch.Tensor, Stats]:
        return policy_loss(logp, entropy, batch, self.args, counts, ref_logp=reference)

    def contributions(self) -> dict[str, Any]:
        """What each adapter is worth: held-out accuracy with one adapter on and the others off, paired against the base team."""
        run, found = self.run, {}
        if not self.args.ablate_adapters:
            return {}
        versions = run.versions
        for policy in run.trained:
            result = run.evaluate(f"only-{policy}", versions={p: v for p, v in versions.items() if p == policy})
            if result is not None and self.before is not None:
                found[policy] = {**result.summary(), "paired": paired(self.before, result)}
        return {"adapters": found}

    def evaluate(self, num_tasks: int | None = None) -> dict[str, Any]:
        """Held-out accuracy of the team as it stands, with its 95 % interval."""
        with self.run as run:
            result = run.evaluate(f"step-{run.step:06d}", tasks=run.eval_tasks[:num_tasks])
            return result.summary() if result else {}


def metrics(result: Updated | None) -> Mapping[str, Any]:
    """One policy's row in `metrics.jsonl`: how much was trained, at what rate, and the loss's statistics."""
    if result is None:
        return {"tokens": 0}
    clipped = result.stats.get("clip_low", 0.0) + result.stats.get("clip_high", 0.0)
    return {**{key: value for key, value in to_json(result).items() if key != "stats"}, **result.stats, "clipped": clipped}


def shares_of(episodes: Sequence[Episode], agents: Sequence[str], advantages: Advantages) -> dict[str, float]:
    """Share of the agents' turns that were cut off, and of groups whose comparison taught them nothing."""
    turns = [turn for episode in episodes for turn in episode.turns if turn.agent in agents]
    found = groups(episodes)
    silent = sum(
        not any(advantages.get((e.id, t.index, t.sibling)) for e in group for t in e.turns if t.agent in agents)
        for group in found.values()
    )
    return {
        "truncated": sum(turn.finish_reason == "length" for turn in turns) / max(len(turns), 1),
        "constant_groups": silent / max(len(found), 1),
    }
