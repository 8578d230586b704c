"""GPTSwarm's edge optimisation: which agent should read which other is learnt by REINFORCE, with no
weight of any model trained.

Zhuge et al., "Language Agents as Optimizable Graphs" (arXiv:2402.16823): an edge e of the swarm has
one logit theta_e and is on with probability sigmoid(theta_e). A step plays graphs that are drawn
edge by edge, and Adam climbs (1/M) sum_i (u_i - b) grad log p(G_i) with the utilities u_i of the M
episodes. An edge that was skipped, since it would have closed a cycle, has no term. Against the
authors' code: the baseline b is by default the step's mean utility (theirs is none, or a constant
where a moving average is meant), so that a wrong answer counts against its graph; edges have
names, so a checkpoint fits whatever process reads it; training, gates and evaluation have tasks
of their own. Not taken over: learnt orders of the nodes, and node optimisation.

accelerate launch recipes/gptswarm_edges.py [--config recipes/gptswarm_edges.yaml] [--field value]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ....agents.patterns.swarm import OFF, ON, TABLE, Swarm, edge_name
from ....agents.settings import setting
from ....agents.types import SettingError
from ....rollouts.types import Episode
from ...config import RunConfig
from ...credit.decisions import decision_credit
from ...credit.weights import CreditConfig
from ...trainer import Trainer
from ...values.logit_table import LogitTable, logit
from ...values.parts import Part


@dataclass
class GPTSwarmConfig(RunConfig, CreditConfig):
    """`RunConfig` with a credit rule (`CreditConfig`) for the edges."""

    trains_weights: ClassVar[bool] = False

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/gptswarm_edges"
    )
    learning_rate: float = setting("of Adam on the edges' logits", 0.1, at_least=0)
    tasks_per_step: int = setting("tasks played in a step", 8, at_least=1)
    num_generations: int = setting("graphs drawn for each task", 1, at_least=1)
    initial_probability: float = setting(
        "P(on) of every edge before step 1, unless `values` or `init` says otherwise",
        0.5,
        above=0,
        below=1,
    )
    credit: str = setting(
        "rule: dr_grpo (utility minus the mean), rloo (minus the others' mean), grpo, team (no"
        " baseline) or rae (minus a running mean)",
        "dr_grpo",
        choices=("dr_grpo", "rloo", "grpo", "team", "rae"),
    )
    across_tasks: bool = setting(
        "compare all episodes of a step; false: only the graphs of one task with one another", True
    )

    def check(self) -> None:
        for name in ("max_staleness", "episodes"):
            if getattr(self, name):
                raise SettingError(
                    f"{name}: REINFORCE learns from graphs that the present logits drew, not from"
                    " earlier ones; leave it out"
                )
        compared = self.num_generations * (self.tasks_per_step if self.across_tasks else 1)
        if compared < 2 and self.credit in ("dr_grpo", "rloo", "grpo"):
            raise SettingError(
                f"credit: {self.credit!r} compares episodes and a step has one to compare; raise"
                " num_generations or tasks_per_step, or set credit to rae or team"
            )


class GPTSwarmTrainer(Trainer[GPTSwarmConfig]):
    """Learns the edges of a `Swarm`. Arguments: see `Trainer`.

    trainer = GPTSwarmTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=Swarm(["a", "b", "c"]),
                              tasks="gsm8k", args=GPTSwarmConfig(output_dir="runs/swarm"))
    trainer.train()
    """

    Config = GPTSwarmConfig

    def parts(self) -> Sequence[Part]:
        system, args = self.spec.system, self.args
        if not isinstance(system, Swarm):
            raise SettingError(
                f"system.class: edges are learnt of a marlora.agents.patterns.swarm:Swarm, got"
                f" {type(system).__name__}"
            )
        given = self.spec.values.get(TABLE, {})
        self.table = edge_table(system, args.learning_rate, args.initial_probability, given)
        return [self.table]

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """One step of Adam on the edges' logits; returns metrics."""
        self.table.learning_rate = self.args.learning_rate_at(step, self.args.learning_rate)
        return {"edges": learn_edges(self.table, episodes, self.args)}


def edge_table(
    system: Swarm,
    learning_rate: float,
    initial_probability: float = 0.5,
    given: Mapping[str, Mapping[str, float]] = {},
) -> LogitTable:
    """The logits of a swarm's edges, `given` ones by name, else those of `initial_probability`.
    That of `off` stays 0, so P(on) is the sigmoid of the other."""
    names = [edge_name(edge) for edge in system.possible_edges]
    logits = dict.fromkeys(names, logit(initial_probability))
    logits |= {name: row.get(ON, 0.0) - row.get(OFF, 0.0) for name, row in given.items()}
    return LogitTable(
        TABLE,
        dict.fromkeys(names, (ON, OFF)),
        learning_rate,
        initial={name: {ON: value} for name, value in logits.items()},
        reference=OFF,
    )


def learn_edges(
    table: LogitTable, episodes: Sequence[Episode], config: GPTSwarmConfig
) -> dict[str, float]:
    """One update of the table from a step's episodes.

    Returns `LogitTable.update`'s metrics, the mean number of edges of the graphs (`on`) and of
    edges that were skipped (`skipped`), and how many edges are now more likely than not (`kept`).
    """
    weights = decision_credit(episodes, config, across_tasks=config.across_tasks)
    decisions = table.decisions(episodes)
    metrics = table.update(weights, decisions)
    on = sum(decision.choice == ON for decision in decisions.values())
    count = max(len(episodes), 1)
    return {
        **metrics,
        "on": on / count,
        "skipped": len(table.logits) - len(decisions) / count,
        "kept": sum(chances[ON] > 0.5 for chances in table.probabilities().values()),
    }
