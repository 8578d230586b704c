"""metaTextGrad: the prompts of an optimizer are optimized by what the optimizer makes of a team.

Xu et al., arXiv:2505.18524. An inner run lets an optimizer (TextGrad and kin, `OPTIMIZERS`) rewrite
the team's prompts for `inner_steps` steps, from the values that the run began with; its score is
that of the team it ends with, on the validation tasks. Each step of the run is one trial: for
`prompt_trials` steps per optimizer a helper, `meta`, is shown the optimizer's prompts
and a few training tasks and rewrites the prompts to fit them; then, if there are several
optimizers, it composes them, as a list that inner steps take in turn. A trial replaces the best
optimizer so far if its score is strictly higher. The state of the run is the best inner run's team.
No weight moves.

An inner run is part of the run: its episodes stand in the same store, so a run that was killed
inside one goes on there; its calls are on the same ledger, and the run's `budget` is asked before
each of them. `inner_tokens` bounds every inner run besides, between its steps, with recalled
episodes counted as if they were played: equal allowances for all optimizers.

Forward calls of J trials after the start, I inner steps, batches of b and n validation tasks: the
paper's count is (J + 1) I (b + n). Here what was played under the same values is recalled: the
first batch of each inner run, and a value that was measured before; the start's n come on top.

Authors' code: not read (the paper and two summaries were). Decided here: compositions are lists of
known optimizers, not code that a model wrote; a candidate that cannot work (a template with an
unknown field, an optimizer that there is none of) is recorded as lost and not run; inner runs have
the gate of `gate`. `meta` sees training tasks and validation scores, never held-out tasks; values
that copy training tasks are flagged in inner runs as anywhere. The score of the best of K trials is
too high by chance: `summary.json` gives the margin (Hoeffding, 95 %) next to it, and the held-out
tasks measure it afresh. Not taken over: ADAS's program rewriter, MIPRO's demonstrations.

accelerate launch recipes/metatextgrad.py [--config recipes/metatextgrad.yaml] [--field value]
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....agents.seeds import derive_seed
from ....agents.settings import setting
from ....agents.state import Param, TeamState
from ....agents.text.tags import block
from ....agents.text.templates import fields_in
from ....agents.types import SettingError
from ...config import RunConfig
from ...feedback.backward import Feedback
from ...feedback.config import FeedbackConfig
from ...feedback.gates import ValidationGate
from ...feedback.helpers import UNREADABLE, Helpers, Question
from ...feedback.loop import FeedbackLoop, Pieces
from ...feedback.rewriters import PerParam, json_object
from ...feedback.targets import Target
from ...loop.step_result import StepResult
from ...trainer import Trainer
from ...values.acceptance import Verdict, strictly_better
from ...values.memory import Memory
from ...values.parts import Part, json_sha256
from ...values.search import Candidate, Search
from .meta_optimizers import CONSTRAINTS, META, OPTIMIZERS, SYSTEM_OF, margin, shown, worth
from .textual_gradient import TEXTUAL_GRADIENT, GradientConfig

COMPOSED, TRIED = "composed", "all trials are made"


@dataclass
class MetaTextGradConfig(GradientConfig, FeedbackConfig, RunConfig):
    """`RunConfig` with feedback and a loss in words, and the trials of optimizers."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/metatextgrad"
    )
    optimizers: list[str] = setting(
        "optimizers of the team whose prompts are optimized: textgrad, revolve, rewrite",
        factory=lambda: ["textgrad"],
        choices=OPTIMIZERS,
    )
    optimized: list[str] = setting(
        "which prompts of an optimizer are rewritten",
        factory=lambda: ["rewrite_system"],
        choices=TEXTUAL_GRADIENT,
    )
    prompt_trials: int = setting(
        "trials of each optimizer's prompts; the steps that are left compose the optimizers",
        3,
        at_least=0,
    )
    inner_steps: int = setting("steps of an inner run", 2, at_least=1)
    inner_tokens: int = setting(
        "an inner run that has come to so many tokens takes no further step; 0: no such bound",
        0,
        at_least=0,
    )
    num_examples: int = setting("training tasks that meta is shown", 4, at_least=1)
    max_steps: int = setting("trials, those of all optimizers together", 4, at_least=0)

    def check(self) -> None:
        if not self.num_val_tasks:
            raise SettingError(
                "num_val_tasks: optimizers are compared on validation tasks; set it above 0"
            )
        if not self.optimizers or len(set(self.optimizers)) < len(self.optimizers):
            raise SettingError(
                f"optimizers: expected different names, at least one, got {self.optimizers}"
            )


class MetaTextGradTrainer(Trainer[MetaTextGradConfig]):
    """Optimizes the prompts of an optimizer, and the team with it. Arguments: see `Trainer`."""

    Config = MetaTextGradConfig

    def parts(self) -> Sequence[Part]:
        given: Any = self.args.prompts
        known = {**TEXTUAL_GRADIENT, **META}
        self.meta = Helpers(self.spec, self.run.rollouts, known, given)
        # PerParam asks by its own names
        self.asking = Helpers(self.spec, self.run.rollouts, self._named("meta_"))
        self.meta.check("meta")
        for name in self.args.optimized:
            helper = SYSTEM_OF.get(name, "")
            if helper in self.spec.helpers and self.spec.helper(helper).prompt:
                raise SettingError(
                    f"helpers.{helper}.prompt: it stands in for the prompt {name}, which this"
                    " method rewrites; leave it out, or take the name from `optimized`"
                )
        for name in self.args.optimizers:
            self._loop(name, self.prompts)  # refuses at once what cannot work
        self.search = Search("optimizers", self.args.seed)
        self.inner = Memory("inner_runs")
        self.inner["runs"] = []
        return (self.search, self.inner)

    def _named(self, prefix: str) -> dict[str, str]:
        """The prompts whose names begin so, without that."""
        prompts = self.meta.prompts
        return {n.removeprefix(prefix): t for n, t in prompts.items() if n.startswith(prefix)}

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts that optimizers begin with."""
        return {name: self.meta.prompts[name] for name in TEXTUAL_GRADIENT}

    @property
    def val_ids(self) -> list[str]:
        """Ids of the validation tasks."""
        return [task.id for task in self.spec.val_tasks]

    def step(self, step: int) -> StepResult:
        """One trial: propose an optimizer, let it work on the team, keep it if it is better."""
        self.asking.counts.clear()
        stage = self._stage(step)
        names = self.args.optimizers if stage == COMPOSED else [stage]
        starts = [self._best_of(name) for name in names]
        old = self.search.best(self.val_ids) if stage == COMPOSED else starts[0]
        values = self._composed(starts) if stage == COMPOSED else self._rewritten(step, old)
        verdict = self._try(step, old, values) if values else Verdict(False, "nothing was proposed")
        self.run.log.say(f"step {step}: {stage}: {verdict}")
        best = self.search.best(self.val_ids)
        row = {
            "stage": stage,
            "adopted": bool(verdict),
            "verdict": str(verdict),
            "best": best.id,
            "score": best.mean,
            UNREADABLE: self.asking.counts[UNREADABLE],
        }
        state = self._start().with_values(self._run_of(best)["values"])
        over = len(self.args.optimizers) == 1 and step >= self.args.prompt_trials
        metrics = {"reward": best.mean, "meta": row, "policies": {}}
        return StepResult(metrics, state=state, done=TRIED if over else "")

    def _stage(self, step: int) -> str:
        """The optimizer whose prompts this step tries, or that it composes them."""
        trials = self.args.prompt_trials * len(self.args.optimizers)
        if step > trials:
            return COMPOSED
        return self.args.optimizers[(step - 1) // self.args.prompt_trials]

    # candidates: {"pipeline": names of optimizers, "prompts": {NAME: {prompt: text}}}

    def _best_of(self, name: str) -> Candidate:
        """The best candidate that is this optimizer alone; at first as it is given."""
        alone = [c for c in self.search.candidates if c.values["pipeline"] == [name]]
        if own := [c for c in alone if c.adopted]:
            return max(own, key=lambda candidate: candidate.adopted)
        values = {"pipeline": [name], "prompts": {name: self.prompts}}
        first = self.search.add(Candidate(values, proposer="start"))
        self._score(first)
        return self.search.adopt(first.id, "the start")

    def _rewritten(self, step: int, old: Candidate) -> dict[str, Any] | None:
        """The optimizer with the prompts that `meta` makes of its own."""
        (name,) = old.values["pipeline"]
        prompts = old.values["prompts"][name]
        params = [
            Param(f"{name}.{n}", prompts[n], "text", role=f"the optimizer's {n}")
            for n in self.args.optimized
        ]
        targets = [Target(param, param.value) for param in params]
        examples = self._examples(step)
        rewriter = PerParam(helper="meta", constraints=CONSTRAINTS)
        proposal = rewriter.propose(
            self.asking, targets, {t.name: examples for t in targets}, self._past, step
        )
        if not proposal.values:
            return None
        new = {n: proposal.values.get(f"{name}.{n}", text) for n, text in prompts.items()}
        return {"pipeline": [name], "prompts": {name: new}}

    def _examples(self, step: int) -> list[Feedback]:
        """Training tasks, drawn anew for each step, as `meta` is shown them."""
        rng = random.Random(derive_seed(self.args.seed, "examples", step))
        count = min(self.args.num_examples, len(self.spec.tasks))
        gold = self.args.show_answer
        return [
            Feedback("", task.id, "", math.nan, shown(task, gold), saw_gold=gold)
            for task in rng.sample(list(self.spec.tasks), count)
        ]

    def _past(self, name: str) -> str:
        """What was tried in place of a prompt, with scores, or with what was wrong with it."""
        optimizer, _, prompt = name.partition(".")
        return "\n".join(
            block("TRIED", f"{worth(c)}\n{c.values['prompts'][optimizer][prompt]}")
            for c in self.search.candidates
            if c.values["pipeline"] == [optimizer]
        )

    def _composed(self, starts: Sequence[Candidate]) -> dict[str, Any] | None:
        """The pipeline of optimizers that `meta` names, each with its best prompts."""
        best = {c.values["pipeline"][0]: c for c in starts}
        tried = [c for c in self.search.candidates if len(c.values["pipeline"]) > 1]
        text = self.meta.prompt(
            "meta_compose",
            optimizers="\n".join(
                f"{name}: {OPTIMIZERS[name].about}. {worth(c)}" for name, c in best.items()
            ),
            length=str(self.args.inner_steps),
            history="\n".join(f"{c.values['pipeline']}: {worth(c)}" for c in tried) or "nothing",
        )
        system = self.asking.prompts["rewrite_system"]
        (reply,) = self.asking.ask([Question("meta", system, text, "meta/compose")])
        found = json_object(reply or "", "pipeline")
        if found is None:
            self.asking.counts[UNREADABLE] += reply is not None
            return None
        names = found["pipeline"]
        known = isinstance(names, list) and all(isinstance(n, str) for n in names)
        used = [n for n in dict.fromkeys(names) if n in best] if known else []
        prompts = {n: best[n].values["prompts"][n] for n in used}
        return {"pipeline": names if known else [str(names)], "prompts": prompts}

    def _try(self, step: int, old: Candidate, values: Mapping[str, Any]) -> Verdict:
        """Run a proposed optimizer; it is adopted if its score is strictly higher."""
        known = self.search.find(values)
        if known is not None:
            return Verdict(False, f"tried before, as {known.id}")
        fault = self._fault(values) or ""
        new = self.search.add(
            Candidate(values, proposer="meta", fault=fault, parents=(old.id,), round=step)
        )
        if fault:
            return Verdict(False, f"it cannot work: {fault}")
        verdict = strictly_better(self._score(new), self.search[old.id], self.val_ids)
        if verdict:
            self.search.adopt(new.id, verdict)
        else:
            self.search.reject(new.id, verdict)
        return verdict

    def _fault(self, values: Mapping[str, Any]) -> str | None:
        """Why an optimizer cannot work; None if it can."""
        names, most = values["pipeline"], self.args.inner_steps
        if not 1 <= len(names) <= most:
            return f"expected from 1 to {most} optimizers, got {len(names)}"
        for name in names:
            if name not in self.args.optimizers:
                return f"no optimizer {name!r:.60}; known: {', '.join(self.args.optimizers)}"
        for name, prompts in values["prompts"].items():
            for prompt, text in prompts.items():
                try:
                    fields = set(fields_in(text, setting=f"{name}.{prompt}"))
                except SettingError as error:
                    return str(error)
                if fields != (needed := set(fields_in(self.prompts[prompt], setting=prompt))):
                    return f"{name}.{prompt}: expected the fields {needed}, got {fields}"
        return None

    # inner runs

    def _start(self) -> TeamState:
        """The state that inner runs begin with."""
        return dataclasses.replace(self.run.state, values=dict(self.spec.values))

    def _loop(self, name: str, prompts: Mapping[str, str]) -> FeedbackLoop:
        """An optimizer with these prompts, at its beginning."""
        args, optimizer, run = self.args, OPTIMIZERS[name], self.run
        pieces = Pieces(
            prompts,
            evaluator=args.evaluator(self.spec.metric, args),
            propagator=optimizer.propagator,
            rewriter=PerParam(constraints=tuple(args.constraints)),
            view=optimizer.view,
            gate=ValidationGate(args.gate),
        )
        own = dataclasses.replace(args, prompts={})
        return FeedbackLoop(own, pieces, self.spec, run.rollouts, run.evaluator, run.log)

    def _score(self, candidate: Candidate) -> Candidate:
        """Let an optimizer work on the team, measure what came of it, and keep both."""
        pipeline, prompts = candidate.values["pipeline"], candidate.values["prompts"]
        self.run.log.say(f"inner run of optimizer {candidate.id}: {', '.join(pipeline)}")
        loops = {name: self._loop(name, prompts[name]) for name in dict.fromkeys(pipeline)}
        state, steps, before = self._start(), list[dict[str, Any]](), self._tokens()
        for number in range(1, self.args.inner_steps + 1):
            name = pipeline[(number - 1) % len(pipeline)]
            result = loops[name].step(number, state)
            state = state if result.state is None else result.state
            verdicts = result.metrics["text_feedback"]["verdicts"]
            values = dict(state.values)
            steps.append({"optimizer": name, "values": values, "verdicts": verdicts})
            spent = self._tokens() - before
            if self.args.inner_tokens and spent >= self.args.inner_tokens:
                break
        found = self.run.evaluator.measure(state, self.spec.val_tasks)
        run = {
            "optimizer": candidate.id,
            "steps": steps,
            "values": dict(state.values),
            "tokens": self._tokens() - before,
            "score": found.accuracy,
            "trajectory": json_sha256(steps)[:16],
        }
        self.inner["runs"] = [*self.inner["runs"], run]
        return self.search.score(candidate.id, found.scores)

    def _run_of(self, candidate: Candidate) -> dict[str, Any]:
        """The inner run of a candidate."""
        runs: list[dict[str, Any]] = self.inner["runs"]
        return next(run for run in runs if run["optimizer"] == candidate.id)

    def _tokens(self) -> int:
        """Tokens of the run so far, recalled ones included; the same before and after a resume."""

        def count() -> int:
            ledger = self.run.ledger
            rows = [row for own in ledger.rows().values() for row in own.values()]
            return int(ledger.spent_so_far()["tokens"]) + sum(r["cached_tokens"] for r in rows)

        return self.run.ranks.on_main(count)

    def report(self) -> dict[str, Any]:
        """The best optimizer: its prompts are a value of `prompts` of the other recipes."""
        tried = [c for c in self.search.candidates if c.scores]
        if not tried:
            return super().report()
        best = self.search.best(self.val_ids)
        found = {
            "id": best.id,
            **best.values,
            "score": best.mean,
            "margin": margin(len(tried), len(self.val_ids)),
            "trials": len(self.search.candidates),
        }
        return {**super().report(), "optimizer": found}
