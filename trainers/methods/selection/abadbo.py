"""A-BAD-BO: how far every agent of a team is trained, found by Bayesian optimisation over target
losses.

Chen, Foo and Low, "Towards AutoAI: Optimizing a Machine Learning System with Black-box and
Differentiable Components" (ICML 2024). The least local loss of every component is not what is best
for the system, so targets of these losses are searched: as many numbers as there are components.
Components are the policies that learn; a local loss is the mean negative log-probability of the
turns that a policy imitates (`select`), as in supervised fine-tuning.

The first step plays `tasks_per_step` tasks, trains every policy `num_local_runs` times on its own
turns and keeps adapters along the way (`local_training.py`); and measures the team as it began and
the fully trained ones. Every further step tries a target: from each training run the adapter whose
loss is nearest, `teams_per_target` random teams of these, the best of which on the validation tasks
is what the target is worth. A Gaussian process over the targets tried so far gives the next one, by
its upper confidence bound; the first stands halfway between the bounds. The best team of all is in
force. All that is tried is tried inside `trial()`.

Against the authors' code: targets are realised by checkpoints of a few training runs, not by
descent and ascent from random starts; a target above the loss before training is never asked for;
points are scaled to the unit cube and values standardised for the Gaussian process; the team as it
began and the fully trained ones are observations too, so the result is on validation never worse
than either. There the local-loss function returns an undefined variable.

accelerate launch recipes/abadbo.py [--config recipes/abadbo.yaml] [--field value]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ....agents.seeds import derive_seed
from ....agents.settings import setting
from ....agents.types import SettingError
from ....rollouts.evaluation.accuracy import evaluation
from ....rollouts.types import Episode
from ...batching.samples import TrainingSequence, samples
from ...config import RunConfig
from ...credit.filtering import SelectionConfig
from ...errors import RunError
from ...loop.step_result import StepResult
from ...trainer import Trainer
from ...values.memory import Memory
from ...values.parts import Part
from ..imitation.imitation import encoded
from ..imitation.sft import selected
from .gaussian_process import GaussianProcess, botorch_module, upper_bound
from .local_training import LocalTraining, LocalTrainingConfig
from .loss_targets import (
    MARGIN,
    Place,
    Target,
    bounds,
    combinations,
    matching_loss,
    preimages,
    reached,
)

Team = Mapping[str, Place]
START, FULL = "start", "fully trained"  # what is measured before any target


@dataclass
class ABADBOConfig(RunConfig, SelectionConfig, LocalTrainingConfig):
    """`RunConfig` with a selection of turns (`SelectionConfig`), their local training
    (`LocalTrainingConfig`), and the search over targets."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/abadbo"
    )
    num_targets: int = setting("targets that are tried, each in a step", 10, at_least=1)
    teams_per_target: int = setting(
        "teams of kept adapters that are measured per target, the best of which counts",
        5,
        at_least=1,
    )
    bound_factor: float = setting(
        "largest target, as a multiple of the least loss that training reached", 5.0, above=MARGIN
    )
    tolerance: float = setting(
        "share of a target by which the loss of a kept adapter may differ and count as reached",
        0.1,
        at_least=0,
    )
    ucb_beta: float = setting("beta of the bound: mean + sqrt(beta) x deviation", 1.0, at_least=0)
    num_val_tasks: int = setting(
        "tasks cut from the training ones, by which teams are compared", 50, at_least=1
    )
    save_every: int = setting(
        "steps between checkpoints; the last step is always saved", 1, at_least=1
    )
    max_steps: int = setting(
        "follows from num_targets: a step is one, after a first one; leave it out", 0, at_least=0
    )

    def check(self) -> None:
        if self.max_steps not in (0, self.num_targets + 1):
            raise SettingError(
                f"max_steps: a step is a target and there are {self.num_targets} after the first,"
                f" so leave it out; got {self.max_steps}"
            )
        self.max_steps = self.num_targets + 1
        if self.max_staleness:
            raise SettingError("max_staleness: only the first step plays to learn; leave it at 0")


class ABADBOTrainer(Trainer[ABADBOConfig]):
    """Finds how far every policy of a team is trained. Arguments: see `Trainer`.

    trainer = ABADBOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", system=Chain(["a", "b"]),
                            tasks="gsm8k", args=ABADBOConfig(tasks_per_step=200))
    trainer.train()
    """

    Config = ABADBOConfig

    def parts(self) -> Sequence[Part]:
        botorch_module()
        self.local = LocalTraining(self.run.learner, self.args.folder, self.args)
        # `paths`: loss and sha256 of every kept adapter by policy and training run; `tried`: a row
        # per observation; `best`: the number of the one in force
        self.memory = Memory("abadbo")
        return [self.memory]

    def step(self, step: int) -> StepResult:
        """First train and measure both ends; then one target per step."""
        return self._begin(step) if step == 1 else self._target(step)

    # the first step

    def _begin(self, step: int) -> StepResult:
        run, args = self.run, self.args
        episodes = self.collect(step)
        self._check_weights(episodes)
        selection = selected(self, step, episodes, args)
        sequences, dropped = samples(
            [encoded(run.learner, episode) for episode in episodes],
            selection.weights,
            run.learner.policy_of,
            ratios=False,
        )
        self._check_lessons(sequences)
        run.learner.show(sequences)
        paths: dict[str, list[list[dict[str, Any]]]] = {}
        with run.trial():
            for number in range(args.num_local_runs):
                kept, updates = self.local.trained(step, sequences, number)
                for policy, rows in kept.items():
                    paths.setdefault(policy, []).append(rows)
        self.memory["paths"] = paths
        self.memory["tried"] = []
        ends = {
            p: [Place(n, len(kept) - 1) for n, kept in enumerate(own)] for p, own in paths.items()
        }
        before = {p: [Place(0, 0)] for p in paths}
        seed = derive_seed(args.seed, "teams", step)
        first = self._tried(START, {}, combinations(before, 1, seed))
        played = self._tried(FULL, {}, combinations(ends, args.teams_per_target, seed))
        run.log.say("\n".join(self._row_text(row) for row in self.memory["tried"]))
        counts = {f"{agent}: {reason}": n for (agent, reason), n in sorted(dropped.items())}
        row = {"limits": self._limits(), "rows": self.memory["tried"]}
        return StepResult(
            {
                "targets": row,
                "policies": self.rows(updates, episodes),  # of the last training run
                "selection": selection.table(),
                "dropped": counts,
            },
            played or first,
        )

    def _check_lessons(self, sequences: Sequence[TrainingSequence]) -> None:
        """Raise `RunError` unless every policy that learns has turns to learn from."""
        taught = {sequence.policy for sequence in sequences}
        for policy in self.run.learner.trainable:
            if policy not in taught:
                raise RunError(
                    f"policy {policy!r}: no turn of its own was kept, so it has no local loss;"
                    f" raise tasks_per_step from {self.args.tasks_per_step}, or set"
                    f" policies.{policy}.trainable: false"
                )

    # a target

    def _target(self, step: int) -> StepResult:
        run, args = self.run, self.args
        tried = self.memory["tried"]
        proposal = run.ranks.on_main(lambda: self._proposed(step))
        target: dict[str, float] = proposal["target"]
        seed = derive_seed(args.seed, "teams", step)
        teams = combinations(preimages(self._losses(), target), args.teams_per_target, seed)
        played = self._tried(f"target {step - 1}", target, teams, proposal)
        row = self.memory["tried"][-1]
        run.log.say(self._row_text(row))
        best = self.memory["tried"][self.memory["best"]]
        metrics = {**row, "best": best["name"], "best_score": best["score"], "of": len(tried) + 1}
        return StepResult({"target": metrics, "policies": self.rows({}, ())}, played)

    def _proposed(self, step: int) -> dict[str, Any]:
        """The next target, and the mean and the deviation that the Gaussian process predicts
        there."""
        args, tried, limits = self.args, self.memory["tried"], self._limits()
        names = list(limits)
        points = [[row["target"][name] for name in names] for row in tried]
        process = GaussianProcess(points, [row["score"] for row in tried], list(limits.values()))
        if step == 2:
            point = [(low + high) / 2 for low, high in limits.values()]
        else:
            point = process.highest(args.ucb_beta, derive_seed(args.seed, "target", step))
        mean, deviation = process.predict(point)
        target = dict(zip(names, point, strict=True))
        bound = upper_bound(mean, deviation, args.ucb_beta)
        return {"target": target, "mean": mean, "deviation": deviation, "bound": bound}

    def _losses(self) -> dict[str, list[list[float]]]:
        """By policy and training run the loss of every kept adapter."""
        paths = self.memory["paths"]
        return {p: [[each["loss"] for each in kept] for kept in own] for p, own in paths.items()}

    def _limits(self) -> dict[str, tuple[float, float]]:
        """Where targets are looked for, by policy."""
        losses = self._losses()
        least = {p: min(min(kept) for kept in own) for p, own in losses.items()}
        most = {p: max(kept[0] for kept in own) for p, own in losses.items()}
        return bounds(least, self.args.bound_factor, most)

    # what a team is worth

    def _tried(
        self,
        name: str,
        target: Target,
        teams: Sequence[Team],
        proposal: Mapping[str, Any] | None = None,
    ) -> list[Episode]:
        """Measure these teams, remember the best one, and put it in force if it is better than
        all before; the episodes that it played then, () if not."""
        with self.run.trial() as trial:
            scores, played = [], []
            for team in teams:
                self.local.put_in(self._kept(team))
                trial.serve()
                played.append(self.run.rollouts.play(self.spec.val_tasks, greedy=True))
                result = evaluation(self.spec.val_tasks, played[-1], self.spec.metric)
                scores.append(result.accuracy)
            at = max(range(len(teams)), key=scores.__getitem__)
            row = self._row(name, target, teams[at], scores, proposal)
            tried = [*self.memory["tried"], row]
            best = self.memory.get("best")
            better = best is None or scores[at] > tried[best]["score"]
            if better:
                self.local.put_in(self._kept(teams[at]))
                trial.adopt()
                self.memory["best"] = len(tried) - 1
            self.memory["tried"] = tried
        return played[at] if better else []

    def _kept(self, team: Team) -> dict[str, tuple[Place, str]]:
        paths = self.memory["paths"]
        return {p: (place, paths[p][place.run][place.at]["sha256"]) for p, place in team.items()}

    def _row(
        self,
        name: str,
        target: Target,
        team: Team,
        scores: Sequence[float],
        proposal: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """What is remembered of an observation. One without a target stands at the losses that it
        has."""
        losses = self._losses()
        achieved = {p: losses[p][place.run][place.at] for p, place in team.items()}
        row: dict[str, Any] = {
            "name": name,
            "target": dict(target or achieved),
            "achieved": achieved,
            "score": max(scores),
            "scores": list(scores),
            "team": {p: asdict(place) for p, place in team.items()},
        }
        if proposal is not None:
            tolerance = self.args.tolerance
            row["reached"] = {p: reached(achieved[p], target[p], tolerance) for p in achieved}
            # above 0: the adapter would have to learn on to meet the target; below: to unlearn
            row["slope"] = {p: matching_loss(achieved[p], target[p])[1] for p in achieved}
            row["predicted"] = proposal["mean"]
            row["deviation"], row["bound"] = proposal["deviation"], proposal["bound"]
            row["error"] = abs(proposal["mean"] - row["score"])
        return row

    def _row_text(self, row: Mapping[str, Any]) -> str:
        losses = ", ".join(
            f"{p} {row['target'][p]:.4f} ({loss:.4f})" for p, loss in row["achieved"].items()
        )
        guess = ""
        if "predicted" in row:
            guess = f", predicted {row['predicted']:.4f} +- {row['deviation']:.4f}"
        teams = f"best of {len(row['scores'])}" if len(row["scores"]) > 1 else "one team"
        return (
            f"{row['name']}: loss {losses}; {self.spec.metric} {row['score']:.4f} ({teams}){guess}"
        )

    def report(self) -> dict[str, Any]:
        """Also `targets`: every observation (target and achieved loss by policy, score on the
        validation tasks, prediction), with which one is in force; and `limits`."""
        tried, best = self.memory.get("tried", []), self.memory.get("best")
        rows = [{**row, "kept": n == best} for n, row in enumerate(tried)]
        limits = self._limits() if tried else {}
        return {**super().report(), "targets": rows, "limits": limits}
