"""MaAS: a controller learns by REINFORCE which operators answer which query, for what they cost.
No weight of any model is trained.

Zhang et al., "Multi-agent Architecture Search via Agentic Supernet" (arXiv:2502.04180). A step
draws K systems for each of its queries (`Supernet`: operators, layer by layer, until early exit)
and plays them. The objective is E[U - lambda C], with U the reward and C what the episode's own
calls cost; a system G_k counts

    m_k = U_k / sum_i U_i - lambda C_k / sum_i C_i          (0 for a term whose sum is 0)

among the K of its query, and Adam climbs the mean of A_k log p(G_k) with A_k = m_k - mean m, where
log p(G) is the sum of its decisions' log-probs. `weights` names the variants: the paper's
m_k grad p(G_k), U - lambda C with and without a baseline.

Against the authors' code: the cost is each episode's own (theirs is the difference of a running
total of concurrent items); K systems of one query are compared (theirs draws one, without a
baseline, so that whatever was drawn becomes likelier); gradients reach every layer (theirs are
converted to numbers on GSM8K); an episode that failed teaches nothing. Their textual gradient,
which rewrites a prompt of an operator, is a run of its own: `textgrad_prompts` with this run's
system and `init: CHECKPOINT` rewrites the executors' prompts under the controller that was learnt,
and `maas_supernet` can go on from there.

accelerate launch recipes/maas_supernet.py [--config recipes/maas_supernet.yaml] [--field value]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

from ....agents.programs.supernet import EXIT, VALUE, Supernet, layers_of
from ....agents.settings import setting
from ....agents.types import SettingError
from ....rollouts.budget import amounts, prices_of
from ....rollouts.types import Episode, groups
from ....rollouts.usage import total
from ...config import RunConfig
from ...credit.group import centre
from ...credit.weights import RewardWeights, team_rewards
from ...trainer import Trainer
from ...values.controller import Controller, Draw
from ...values.parts import Part

Numbers = Sequence[float]


@dataclass
class MaASConfig(RunConfig, RewardWeights):
    """`RunConfig` with weights of rewards, and what a system costs."""

    trains_weights: ClassVar[bool] = False

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/maas_supernet"
    )
    learning_rate: float = setting("of Adam on the controller", 0.01, at_least=0)
    tasks_per_step: int = setting("queries of a step", 4, at_least=1)
    num_generations: int = setting("systems drawn for each query (K)", 4, at_least=1)
    weights: str = setting(
        "what a system counts: shares (m_k minus the mean of its query's), paper (m_k p(G_k), no"
        " baseline), utility (U - lambda C minus the mean of its query's) or code (U - lambda C, no"
        " baseline)",
        "shares",
        choices=("shares", "paper", "utility", "code"),
    )
    cost_weight: float = setting(
        "lambda, the weight of the cost: of its share (shares, paper), or per unit (utility, code)",
        0.01,
        at_least=0,
    )
    cost_unit: str = setting(
        "what an episode's own calls cost: tokens (of prompts and sampled), calls, or cost (money,"
        " where policies have a price)",
        "tokens",
        choices=("tokens", "calls", "cost"),
    )
    kinds: str = setting(
        "public key of a task's meta that says its kind, for the report; tasks without it go by"
        " their source",
        "kind",
    )

    def check(self) -> None:
        for name in ("max_staleness", "episodes"):
            if getattr(self, name):
                raise SettingError(
                    f"{name}: REINFORCE learns from systems that the present controller drew, not"
                    " from earlier ones; leave it out"
                )
        if self.num_generations < 2 and self.weights in ("shares", "utility", "paper"):
            raise SettingError(
                f"weights: {self.weights} compares the systems of one query and num_generations is"
                " 1; raise it, or set weights to code"
            )


class MaASTrainer(Trainer[MaASConfig]):
    """Learns the controller of a `Supernet`. Arguments: see `Trainer`.

    trainer = MaASTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=Supernet(["solver"]),
                          tasks="gsm8k", args=MaASConfig(output_dir="runs/maas"))
    trainer.train()
    """

    Config = MaASConfig

    def parts(self) -> Sequence[Part]:
        system, args = self.spec.system, self.args
        if not isinstance(system, Supernet):
            raise SettingError(
                "system.class: operators are learnt of a marlora.agents.programs.supernet:Supernet,"
                f" got {type(system).__name__}"
            )
        if args.cost_unit == "cost" and not prices_of(self.spec.served_policies):
            raise SettingError(
                "cost_unit: no policy has a price, so no episode costs money; give one, or set"
                " cost_unit to tokens or calls"
            )
        self.supernet = system
        self.controller = Controller(VALUE, system.shape, args.learning_rate, args.seed)
        if given := self.spec.values.get(VALUE):
            self.controller.set_weights(given)
        return [self.controller]

    def learn(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """One step of Adam on the controller; returns metrics."""
        self.controller.learning_rate = self.args.learning_rate_at(step, self.args.learning_rate)
        return {"supernet": learn_controller(self.controller, self.supernet, episodes, self.args)}

    def report(self) -> dict[str, Any]:
        """`supernet`: what is done with each kind of held-out query, before and after."""
        args, metric = self.args, self.spec.metric
        return {
            "supernet": {
                label: by_kind(self.supernet, self.run.rollouts.stored(label), metric, args)
                for label in ("before", "after")
            }
        }


def learn_controller(
    controller: Controller, system: Supernet, episodes: Sequence[Episode], config: MaASConfig
) -> dict[str, float]:
    """One update of the controller from a step's episodes.

    Returns `Controller.update`'s metrics and means over the episodes that count: their cost in
    `cost_unit`, utility U - lambda C, operators and layers, and the share with early exit. Raises
    `ValueError` for episodes that are not for training.
    """
    for episode in episodes:
        if episode.kind != "train":
            raise ValueError(
                f"episode {episode.id}: its kind is {episode.kind!r}; only episodes of the kind"
                " 'train' are learnt from"
            )
    weights = system_weights(episodes, config)
    counted = [episode for episode in episodes if episode.id in weights]
    draws = [(draw, weights[e.id]) for e in counted for draw in draws_of(system, e)]
    metrics = controller.update([d for d, _ in draws], [w for _, w in draws], len(counted))
    return {**metrics, "episodes": len(counted), **_means(system, counted, config)}


def _means(system: Supernet, episodes: Sequence[Episode], config: MaASConfig) -> dict[str, float]:
    if not episodes:
        return {}
    rewards = team_rewards(episodes, config)
    costs = {e.id: cost(e, config.cost_unit) for e in episodes}
    drawn = [layers_of(e.decisions) for e in episodes]
    return {
        "cost": fmean(costs.values()),
        "utility": fmean(rewards[e.id] - config.cost_weight * costs[e.id] for e in episodes),
        **_structure(system, drawn),
    }


def _structure(system: Supernet, drawn: Sequence[Sequence[Sequence[str]]]) -> dict[str, float]:
    """Means over systems: operators that were asked, layers with any, and the share that ended
    before the last layer."""
    active = [[[o for o in layer if o != EXIT] for layer in layers] for layers in drawn]
    depths = [sum(map(bool, layers)) for layers in active]
    return {
        "operators": fmean(sum(map(len, layers)) for layers in active),
        "layers": fmean(depths),
        EXIT: fmean(depth < system.layers for depth in depths),
    }


def cost(episode: Episode, unit: str) -> float:
    """What an episode's own calls cost, in tokens, calls or money."""
    return amounts(total(episode.usage.values()))[unit]


def draws_of(system: Supernet, episode: Episode) -> list[Draw]:
    """The choices of an episode, as the controller made them."""
    number = {name: n for n, name in enumerate(system.scored)}
    found: list[Draw] = []
    drawn: dict[str, list[str]] = {}
    for decision in episode.decisions:
        if decision.name not in drawn:
            inputs = system.inputs(episode.task.prompt, [*drawn.values()])
            drawn[decision.name] = []
        drawn[decision.name].append(decision.choice)
        options = [number[option] for option in decision.options]
        where = f"episode {episode.id}, decision {decision.index} ({decision.name!r})"
        choice, logprob = number[decision.choice], decision.logprob
        found.append(Draw(where, len(drawn), inputs, options, choice, logprob))
    return found


# what a system counts


def system_weights(episodes: Sequence[Episode], config: MaASConfig) -> dict[str, float]:
    """A of each episode by its id. One that failed, or whose reward is unknown, has none, and is in
    no other's sum."""
    rewards = team_rewards(episodes, config)
    found: dict[str, float] = {}
    for group in groups(episodes).values():
        known = [e for e in group if not math.isnan(rewards[e.id])]
        scores, costs = [rewards[e.id] for e in known], [cost(e, config.cost_unit) for e in known]
        logprobs = [math.fsum(d.logprob for d in e.decisions) for e in known]
        if config.weights in SHARES and any(score < 0 for score in scores):
            raise SettingError(
                f"weights: {config.weights} takes shares of the sum of the rewards, and task"
                f" {known[0].task.id!r} has one of {min(scores):g}; give rewards of at least 0, or"
                " weights: utility"
            )
        values = WEIGHTS[config.weights](scores, costs, logprobs, config.cost_weight)
        found |= zip((e.id for e in known), values, strict=True)
    return found


def shares(scores: Numbers, costs: Numbers, lam: float) -> list[float]:
    """m_k = U_k / sum U - lambda C_k / sum C [K]; a term whose sum is 0 is 0."""
    return [u - lam * c for u, c in zip(_normalised(scores), _normalised(costs), strict=True)]


def utilities(scores: Numbers, costs: Numbers, lam: float) -> list[float]:
    """U_k - lambda C_k [K]."""
    return [u - lam * c for u, c in zip(scores, costs, strict=True)]


def _normalised(values: Numbers) -> list[float]:
    whole = math.fsum(values)
    return [value / whole if whole else 0.0 for value in values]


def _of_paper(scores: Numbers, costs: Numbers, logprobs: Numbers, lam: float) -> list[float]:
    """m_k p(G_k), since grad p = p grad log p."""
    found = shares(scores, costs, lam)
    return [m * math.exp(logprob) for m, logprob in zip(found, logprobs, strict=True)]


# (scores [K], costs [K], log-probs [K], lambda) -> A [K], of the systems of one query
SHARES = ("shares", "paper")  # rules that divide by the sum of the rewards
WEIGHTS: Mapping[str, Callable[[Numbers, Numbers, Numbers, float], list[float]]] = {
    "shares": lambda scores, costs, _, lam: _centred(shares(scores, costs, lam)),
    "paper": _of_paper,
    "utility": lambda scores, costs, _, lam: _centred(utilities(scores, costs, lam)),
    "code": lambda scores, costs, _, lam: utilities(scores, costs, lam),
}


def _centred(values: list[float]) -> list[float]:
    return centre(values) if values else []


# the report


def by_kind(
    system: Supernet, episodes: Sequence[Episode], metric: str, config: MaASConfig
) -> dict[str, dict[str, Any]]:
    """What is done with the queries of each kind: how many there are, their mean reward and cost,
    how many operators and layers answer and how often early exit ends it, and the mean probability
    of every option in each layer that was reached."""
    found: dict[str, list[Episode]] = {}
    for episode in episodes:
        if episode.parent is None:
            kind = str(episode.task.meta.get(config.kinds, episode.task.source))
            found.setdefault(kind, []).append(episode)
    return {kind: _summary(system, found[kind], metric, config) for kind in sorted(found)}


def _summary(
    system: Supernet, episodes: Sequence[Episode], metric: str, config: MaASConfig
) -> dict[str, Any]:
    rewards = [reward for e in episodes if not math.isnan(reward := e.reward(metric))]
    drawn = [layers_of(e.decisions) for e in episodes]
    reached: dict[str, list[dict[str, float]]] = {}
    for episode, layers in zip(episodes, drawn, strict=True):
        weights = episode.state.values.get(VALUE)
        for n in range(len(layers)):
            pi = system.probabilities(weights, episode.task.prompt, layers[:n])
            reached.setdefault(f"layer{n + 1}", []).append(pi)
    return {
        "queries": len(episodes),
        metric: fmean(rewards) if rewards else None,
        config.cost_unit: fmean(cost(e, config.cost_unit) for e in episodes),
        **_structure(system, drawn),
        "probabilities": {
            layer: {name: fmean(pi[name] for pi in many) for name in many[0]}
            for layer, many in reached.items()
        },
    }
