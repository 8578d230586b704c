"""LLMSelector: a model for every agent of a team, found by coordinate search; no weight moves.

Chen et al., "Optimizing Model Selection for Compound AI Systems" (arXiv:2502.14815), algorithm 1:
take the agents in turn, measure the team with each model in the agent's place while the others keep
theirs, allocate the best one, and end when a whole round changed nothing. The models are policies:
the base, LoRA adapters (`init`), other bases, outside models. What a model is worth in a place is,
on every task, `beta` x the team's score + `alpha` x (1 - guilt), where guilt is a diagnoser's
verdict that this agent caused the error (`helpers: {diagnoser: ...}`, see diagnoser.py).

`rule: mean` allocates the model with the highest mean, as the paper says; `votes` the one that most
tasks count among their best, as the released code does. That code's default, alpha 0 and beta 1, is
ours: no diagnoser. Against it: the seed that is set is used; ties keep the model that is there,
else the cheapest, where theirs favour the first of the list; tasks that are solved are not
diagnosed, their guilt is 0. Episodes are cached whole by the allocation that played them, not call
by call. Not taken over: the two-stage start by verdicts alone.

accelerate launch recipes/llmselector.py [--config recipes/llmselector.yaml] [--field value]
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ....agents.seeds import derive_seed
from ....agents.settings import setting
from ....agents.types import Sampling, SettingError, Task, nearest
from ....rollouts.evaluation.accuracy import evaluation
from ....rollouts.evaluation.statistics import paired
from ....rollouts.types import Episode
from ...config import RunConfig
from ...loop.step_result import StepResult
from ...trainer import Trainer
from ...values.memory import Memory
from ...values.parts import Part
from ...values.search import Candidate, Search
from .allocation import RULES, affordable, choice, converged, module_score, worth
from .diagnoser import INNOCENT, UNREAD, Diagnosis, diagnosis_task, verdict

DIAGNOSER = "diagnoser"  # the helper's name


@dataclass
class LLMSelectorConfig(RunConfig):
    """`RunConfig` with the agents, the models, and how these are compared."""

    trains_weights: ClassVar[bool] = False
    collects: ClassVar[bool] = False

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/llmselector"
    )
    modules: list[str] = setting("agents whose model is chosen; empty: all", factory=list)
    candidates: list[str] = setting(
        "policies to choose among; empty: all of the run (agents' own and `policies`)", factory=list
    )
    start: str = setting(
        "first allocation: random (by the seed), or given (by agents and `values`)",
        "random",
        choices=("random", "given"),
    )
    rule: str = setting(
        "the model that is allocated: mean (the highest mean), or votes (best on most tasks, ties"
        " counted for all)",
        "mean",
        choices=RULES,
    )
    alpha: float = setting("weight of the diagnoser's verdicts; 0 asks none", 0.0, at_least=0)
    beta: float = setting("weight of the team's score", 1.0, at_least=0)
    num_search_tasks: int = setting(
        "training tasks on which allocations are compared; 0: all", 0, at_least=0
    )
    search_budget: int = setting(
        "allocations measured at most, as the paper counts them: models - 1 per step; 0: no bound",
        0,
        at_least=0,
    )
    measure_uniform: bool = setting(
        "after the search, evaluate every model in all places at once", True
    )

    def check(self) -> None:
        if not (self.alpha or self.beta):
            raise SettingError("alpha and beta: both are 0, so no model is worth more than another")


class LLMSelectorTrainer(Trainer[LLMSelectorConfig]):
    """Allocates a policy to every agent. Arguments: see `Trainer`.

    mine = {"init": "runs/grpo_team/checkpoints/step-000050#solver"}
    trainer = LLMSelectorTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=Chain(["a", "b"]),
                                 tasks="gsm8k", args=LLMSelectorConfig(policies={"mine": mine}))
    trainer.train()
    """

    Config = LLMSelectorConfig

    def parts(self) -> Sequence[Part]:
        self._check_names()
        self.search = Search("allocations", self.args.seed)
        self.memory = Memory("selection")  # history of allocations, verdicts by episode and module
        return [self.search, self.memory]

    def _check_names(self) -> None:
        args, spec = self.args, self.spec
        agents = [agent.name for agent in spec.system.specs]
        for field, known in (("modules", agents), ("candidates", [*spec.policies])):
            for name in getattr(args, field):
                if name not in known:
                    raise SettingError(f"{field}: no {name!r} here; {nearest(name, known)}")
        if len(self.models) < 2:
            raise SettingError(
                f"candidates: only {self.models}; expected at least two policies to choose among,"
                " named in `policies` with init, base or url"
            )
        if 0 < args.search_budget < len(self.models) - 1:
            raise SettingError(
                f"search_budget: {args.search_budget} is less than a step takes,"
                f" {len(self.models) - 1} for {len(self.models)} models"
            )
        if args.start == "given":
            for module, model in zip(self.modules, self._start(), strict=True):
                if model not in self.models:
                    raise SettingError(
                        f"start: given, but {module!r} speaks with {model!r}, which is none of the"
                        f" candidates {self.models}; name it there, or start at random"
                    )
        if args.alpha:
            spec.helper(DIAGNOSER)

    @property
    def modules(self) -> list[str]:
        """The agents whose model is chosen."""
        return self.args.modules or [agent.name for agent in self.spec.system.specs]

    @property
    def models(self) -> list[str]:
        """The policies to choose among."""
        return self.args.candidates or [*self.spec.policies]

    @property
    def search_tasks(self) -> list[Task]:
        """The tasks on which allocations are compared."""
        return list(self.spec.tasks[: self.args.num_search_tasks or None])

    def _start(self) -> list[str]:
        """The first allocation: a model by module."""
        if self.args.start == "random":
            rng = random.Random(derive_seed(self.args.seed, "allocation"))
            return rng.choices(self.models, k=len(self.modules))
        own = {agent.name: agent.policy for agent in self.spec.system.specs}
        return [self.spec.values.get(f"{name}.policy") or own[name] for name in self.modules]

    def step(self, step: int) -> StepResult:
        """Choose the model of one module, the others as they are."""
        history: list[list[str]] = self.memory.get("history") or [self._start()]
        place, now = (step - 1) % len(self.modules), history[-1]
        parent = self._candidate(now, step)
        scores: dict[str, Mapping[str, float]] = {}
        for model in self.models:
            tried = [model if n == place else other for n, other in enumerate(now)]
            scores[model] = self._scores(self._candidate(tried, step, parent), self.modules[place])
        found = worth(scores, self.args.rule)
        best = choice(found, now[place], self._prices())
        chosen = [best if n == place else other for n, other in enumerate(now)]
        adopted = self._candidate(chosen, step, parent)
        told = ", ".join(f"{model} {value:.4f}" for model, value in found.items())
        self.search.adopt(adopted.id, f"{self.modules[place]}: {self.args.rule} {told}")
        self.memory["history"] = history = [*history, chosen]
        return StepResult(
            {"selection": self._row(place, now, chosen, adopted)},
            state=self.run.state.with_values(self._values(chosen)),
            done=self._done(history),
        )

    def _values(self, allocation: Sequence[str]) -> dict[str, str]:
        pairs = zip(self.modules, allocation, strict=True)
        return {f"{module}.policy": model for module, model in pairs}

    def _candidate(
        self, allocation: Sequence[str], step: int, parent: Candidate | None = None
    ) -> Candidate:
        """The candidate of the archive that is this allocation."""
        values = self._values(allocation)
        known = self.search.find(values)
        if known is not None:
            return known
        parents = (parent.id,) if parent else ()
        proposer = self.modules[(step - 1) % len(self.modules)] if parent else "start"
        return self.search.add(Candidate(values, proposer, parents=parents, round=step))

    def _scores(self, candidate: Candidate, module: str) -> dict[str, float]:
        """What the candidate's model is worth in a module, by task id."""
        args, tasks = self.args, self.search_tasks
        state = self.run.state.with_values(candidate.values)
        episodes = self.run.rollouts.play(tasks, state, greedy=True)
        correct = evaluation(tasks, episodes, self.spec.metric).scores
        self.search.score(candidate.id, correct)
        guilt = self._guilt(episodes, correct, module) if args.alpha else {}
        return {
            task: module_score(score, guilt.get(task, INNOCENT), args.alpha, args.beta)
            for task, score in correct.items()
        }

    def _guilt(
        self, episodes: Sequence[Episode], correct: Mapping[str, float], module: str
    ) -> dict[str, float]:
        """The diagnoser's verdict on a module by task; 0 where the task is solved. Verdicts on
        episodes of earlier steps are remembered."""
        verdicts: dict[str, float] = self.memory.setdefault("verdicts", {})
        wrong = [e for e in episodes if e.parent is None and correct[e.task.id] < 1]
        asked = [diagnosis_task(episode, module, self.spec.system) for episode in wrong]
        new = [pair for pair in zip(wrong, asked, strict=True) if pair[1].id not in verdicts]
        system = Diagnosis([self._diagnoser()])
        told = self.run.rollouts.ask_all([(system, task, episode.id) for episode, task in new])
        for (_, task), answer in zip(new, told, strict=True):
            verdicts[task.id] = UNREAD if answer.output is None else verdict(answer.output)
        return {e.task.id: verdicts[task.id] for e, task in zip(wrong, asked, strict=True)}

    def _diagnoser(self) -> Any:
        """The helper, at temperature 0 unless its settings say otherwise."""
        agent = self.spec.helper(DIAGNOSER)
        greedy = Sampling(temperature=0.0, max_tokens=self.args.max_completion_length)
        return dataclasses.replace(agent, sampling=agent.sampling or greedy)

    def _prices(self) -> dict[str, float]:
        """Price of a model, prompt and sampled tokens alike; 0 where it has none."""
        return {
            name: float(spec.price.get("prompt", 0)) + float(spec.price.get("sampled", 0))
            for name, spec in self.spec.policies.items()
        }

    def _done(self, history: Sequence[Sequence[str]]) -> str:
        modules, models = len(self.modules), len(self.models)
        if converged(history, modules):
            return f"converged: {modules} steps in a row changed no module"
        spent = (len(history) - 1) * (models - 1)
        if not affordable(spent, self.args.search_budget, models):
            return f"search_budget: {spent} allocations measured, another step takes {models - 1}"
        return ""

    def _row(
        self, place: int, before: Sequence[str], after: Sequence[str], adopted: Candidate
    ) -> dict[str, Any]:
        return {
            "module": self.modules[place],
            "model": after[place],
            "changed": before[place] != after[place],
            "accuracy": self.search[adopted.id].mean,
            "allocations": sum(bool(each.scores) for each in self.search.candidates),
        }

    def report(self) -> dict[str, Any]:
        """Also `uniform`: held-out accuracy of every model in all places, and the difference that
        the found allocation makes to it."""
        run, found = self.run, super().report()
        if not self.args.measure_uniform:
            return found
        tasks, alone = self.spec.eval_tasks, dict[str, Any]()
        after = evaluation(tasks, run.rollouts.stored("after"), self.spec.metric)
        for model in self.models:
            state = run.state.with_values(self._values([model] * len(self.modules)))
            result = run.evaluator.evaluate(f"uniform-{model}", state)
            if result is not None:
                alone[model] = {**result.summary(), "paired": paired(result, after)}
        return {**found, "uniform": alone}
