"""GEPA: prompts evolve by reflection on the turns of one agent at a time, along a Pareto front; no
weight moves. The search is that of the library `gepa` (the extra `gepa`).

Agrawal et al., "GEPA: Reflective Prompt Evolution Can Outperform Reinforcement Learning"
(arXiv:2507.19457). The first step scores the team as it began on the validation tasks. Every
further step is an iteration of the library: it draws a candidate of the Pareto front (those that
are best on some validation task), plays it on `reflection_minibatch_size` training tasks, and shows
the helper `reflector` what the agent whose turn it is read and said, and how the team did. The new
prompt is scored on the same tasks, and if the sum is higher on all validation tasks, and put into
the archive. The candidate with the highest mean is in force.

The library has its own loop, budget and state; here the run has them. Each step runs it from its
start: what was asked in earlier steps is answered from a record in JSON, so nothing is played
twice, no pickle is written, and a resumed run is nothing special. The run's `budget` is asked
before every call, where the library's overshoots by up to a whole evaluation. A reply that is cut
off, too long, refused or no news is dropped and counted, and the iteration ends without a
candidate.

accelerate launch recipes/gepa_prompts.py [--config recipes/gepa_prompts.yaml] [--field value]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .....agents.settings import setting
from .....agents.state import Param, TeamState
from .....agents.types import SettingError, nearest
from ....config import RunConfig
from ....loop.step_result import StepResult
from ....trainer import Trainer
from ....values.memory import Memory
from ....values.parts import Part
from ....values.search import Candidate, Search
from ....values.selection import pareto_wins
from .gepa_adapter import REFLECTOR, Record, ReflectionConfig, TeamAdapter, gepa_module

SELECTORS = ("pareto", "current_best", "epsilon_greedy", "top_k_pareto")
COMPONENTS = ("round_robin", "all")


@dataclass
class GEPAConfig(RunConfig, ReflectionConfig):
    """`RunConfig` with reflection (`ReflectionConfig`) and the library's search."""

    trains_weights: ClassVar[bool] = False
    collects: ClassVar[bool] = False

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/gepa_prompts"
    )
    modules: list[str] = setting("agents whose prompts evolve; empty: all", factory=list)
    num_proposals: int = setting("iterations of the library, each in a step", 20, at_least=1)
    candidate_selection: str = setting(
        "which candidate is reflected on: pareto (drawn from the front), current_best,"
        " epsilon_greedy, top_k_pareto",
        "pareto",
        choices=SELECTORS,
    )
    component_selection: str = setting(
        "which agent's prompt is rewritten: round_robin (one per iteration), or all",
        "round_robin",
        choices=COMPONENTS,
    )
    skip_perfect_score: bool = setting(
        "do not reflect where all scores of the minibatch are 1", True
    )
    use_merge: bool = setting("also merge two candidates of the front", False)
    max_merge_invocations: int = setting("merges at most", 5, at_least=1)
    num_val_tasks: int = setting(
        "tasks cut from the training ones, on which the front is", 100, at_least=1
    )
    save_every: int = setting(
        "steps between checkpoints; the last step is always saved", 1, at_least=1
    )
    max_steps: int = setting(
        "follows from num_proposals: a step is one, after a first one; leave it out", 0, at_least=0
    )

    def check(self) -> None:
        if self.max_steps not in (0, self.num_proposals + 1):
            raise SettingError(
                f"max_steps: a step is a proposal and there are {self.num_proposals} after the"
                f" first, so leave it out; got {self.max_steps}"
            )
        self.max_steps = self.num_proposals + 1


class GEPATrainer(Trainer[GEPAConfig]):
    """Evolves the prompts of a team. Arguments: see `Trainer`.

    trainer = GEPATrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=Chain(["a", "b"]),
                          tasks="gsm8k", args=GEPAConfig(helpers={"reflector": {}}))
    trainer.train()
    """

    Config = GEPAConfig

    def parts(self) -> Sequence[Part]:
        gepa_module()
        self.spec.helper(REFLECTOR)
        names = [agent.name for agent in self.spec.system.specs]
        for name in self.args.modules:
            if name not in names:
                raise SettingError(f"modules: no agent {name!r}; {nearest(name, names)}")
        if self.args.reflection_minibatch_size > len(self.spec.tasks):
            raise SettingError(
                f"reflection_minibatch_size: {self.args.reflection_minibatch_size} tasks of"
                f" {len(self.spec.tasks)} training tasks; set it lower"
            )
        params = {param.name: param for param in self.spec.system.params()}
        chosen = [params[f"{name}.prompt"] for name in self.args.modules or names]
        values = self.spec.values
        self.params: dict[str, Param] = {
            p.name: dataclasses.replace(p, value=values.get(p.name, p.value)) for p in chosen
        }
        self.search = Search("candidates", self.args.seed)
        # `calls`: the record of what the library asked; `asked`, `dropped`: of the proposals
        self.memory = Memory("gepa")
        return [self.search, self.memory]

    @property
    def start(self) -> TeamState:
        """The state in force, with the values that the search began with."""
        return self.run.state.with_values(self.spec.values)

    def step(self, step: int) -> StepResult:
        """First score the team as it began; then one iteration of the library."""
        record = Record(list(self.memory.get("calls", [])))
        known = len(record.calls)
        adapter = TeamAdapter(
            self.run.rollouts, self.spec, self.args, self.start, self.params, record
        )
        result = self._evolved(adapter, step - 1)
        self.memory["calls"] = record.calls
        proposals = adapter.proposals
        self.memory["asked"] = self.memory.get("asked", 0) + proposals.asked
        dropped = {**self.memory.get("dropped", {})}
        for reason, count in proposals.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
        self.memory["dropped"] = dropped
        before, count = self.search.current, len(self.search.candidates)
        self._keep(result, step)
        best = self.search.current
        assert best is not None
        row = {
            "candidates": len(self.search.candidates),
            "new": len(self.search.candidates) - count,
            "asked": proposals.asked,
            "dropped": dict(proposals.dropped),
            "best": best.id,
            "best_score": best.mean,
            "front": len(self._front()),
        }
        self.run.log.say(
            f"iteration {step - 1}: {row['new']} new candidates, {row['front']} on the front; best:"
            f" candidate {best.id} {best.mean:.4f}"
        )
        moved = before is not None and best.id != before.id
        return StepResult(
            {"gepa": {**row, "calls": len(record.calls) - known}, "policies": self.rows({}, ())},
            state=self.start.with_values(best.values) if moved else None,
        )

    def _evolved(self, adapter: TeamAdapter, iterations: int) -> Any:
        """The library's result after so many iterations. Raises what a call raised."""
        args = self.args
        try:
            result = gepa_module().optimize(
                seed_candidate={name: param.value for name, param in self.params.items()},
                trainset=list(self.spec.tasks),
                valset=list(self.spec.val_tasks),
                adapter=adapter,
                candidate_selection_strategy=args.candidate_selection,
                module_selector=args.component_selection,
                reflection_minibatch_size=args.reflection_minibatch_size,
                skip_perfect_score=args.skip_perfect_score,
                use_merge=args.use_merge,
                max_merge_invocations=args.max_merge_invocations,
                stop_callbacks=[adapter.failed, lambda state: state.i + 1 >= iterations],
                logger=Silent(),
                track_best_outputs=False,
                seed=args.seed,
            )
        except Exception:
            if adapter.failure is None:
                raise
        if adapter.failure is not None:
            raise adapter.failure
        return result

    def _keep(self, result: Any, step: int) -> None:
        """Bring the archive to what the library holds: its candidates with parents and scores, the
        best one adopted, and for each on how many tasks it is on the front."""
        tasks = [task.id for task in self.spec.val_tasks]
        ids: list[str] = []
        for values, parents, scores in zip(
            result.candidates, result.parents, result.val_subscores, strict=True
        ):
            known = self.search.find(values)
            if known is None:
                made_from = tuple(dict.fromkeys(ids[at] for at in parents if at is not None))
                proposer = REFLECTOR if made_from else "start"
                new = Candidate(values, proposer=proposer, parents=made_from, round=step - 1)
                known = self.search.add(new)
                known = self.search.score(known.id, {tasks[at]: s for at, s in scores.items()})
            ids.append(known.id)
        best = ids[result.best_idx]
        if self.search.current is None or self.search.current.id != best:
            self.search.adopt(best)
        front = self._front()
        for candidate in self.search.candidates:
            wins = front.get(candidate.id, 0)
            verdict = f"Pareto front: best on {wins} of {len(tasks)} tasks" if wins else "dominated"
            self.search.reject(candidate.id, verdict)

    def _front(self) -> Mapping[str, int]:
        """The Pareto front: by candidate on how many validation tasks it is among the best."""
        return pareto_wins(self.search.pool([task.id for task in self.spec.val_tasks]))

    def report(self) -> dict[str, Any]:
        """Also `pareto_front`: its candidates, the best mean first, with the number of validation
        tasks on which each is among the best; and `gepa`: what became of the proposals."""
        scored = bool(self.search.candidates)
        front = self._front() if scored else {}
        rows = [
            {"id": c.id, "score": c.mean, "best_on": front[c.id], "parents": list(c.parents)}
            for c in sorted(self.search.candidates, key=lambda c: -c.mean)
            if c.id in front
        ]
        found = {
            "iterations": max(self.run.step - 1, 0),
            "candidates": len(self.search.candidates),
            "asked": self.memory.get("asked", 0),
            "dropped": self.memory.get("dropped", {}),
        }
        return {**super().report(), "pareto_front": rows, "gepa": found}


class Silent:
    """The library's logger: nothing, since the run says what matters and every step would say all
    earlier ones again."""

    def log(self, message: str) -> None:
        """Say nothing."""
