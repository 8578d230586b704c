"""Held-out accuracy at temperature 0, during a run and at its ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...agents.types import Task
from ...rollouts.evaluation.accuracy import evaluation
from ...rollouts.evaluation.statistics import Evaluation
from ..collection.rollout_manager import RolloutManager
from ..monitoring.run_log import RunLog


class Evaluator:
    """Plays held-out tasks and remembers what came out.

    Args:
        tasks: the held-out tasks.
        metric: the reward whose mean is the accuracy.
        rollouts: plays them, or finds them stored.
        log: where results are shown.

    `results`: summaries by label. `best`: (accuracy, checkpoint) of the best evaluation of the
    adapters in force.
    """

    def __init__(
        self, tasks: Sequence[Task], metric: str, rollouts: RolloutManager, log: RunLog
    ) -> None:
        self.tasks, self.metric, self.rollouts, self.log = tasks, metric, rollouts, log
        self.results: dict[str, dict[str, Any]] = {}
        self.best: tuple[float, str] | None = None

    def evaluate(
        self,
        label: str,
        versions: Mapping[str, str] | None = None,
        tasks: Sequence[Task] | None = None,
    ) -> Evaluation | None:
        """Held-out accuracy for rank 0 (None elsewhere); every rank has to call it.

        Args:
            label: episodes are stored as `eval-LABEL`.
            versions: adapter versions by policy; None: those in force.
            tasks: None: all held-out ones.
        """
        results: list[Evaluation] = []
        self.rollouts.ranks.on_main(lambda: results.append(self._evaluate(label, versions, tasks)))
        return results[0] if results else None

    def _evaluate(
        self, label: str, versions: Mapping[str, str] | None, tasks: Sequence[Task] | None
    ) -> Evaluation:
        chosen = list(tasks if tasks is not None else self.tasks)
        step, runner = self.log.step, self.rollouts.runner.greedy()
        collected = self.rollouts.play_or_find(
            chosen, f"eval-{label}", step, runner, versions=versions
        )
        result = evaluation(chosen, collected.episodes, self.metric)
        self.results[label] = result.summary()
        self.log.track(
            {"eval": {"during" if label.startswith("step-") else label: result.accuracy}}
        )
        if result.failed:
            self.log.warn(
                f"eval {label}: {result.failed} of {len(chosen)} episodes failed and count 0;"
                f" first: {result.errors[0]}"
            )
        self.log.say(
            f"eval {label}: {self.metric} {result.accuracy:.3f} on {len(chosen)} held-out tasks"
        )
        if versions is None and (self.best is None or result.accuracy > self.best[0]):
            self.best = (result.accuracy, f"step-{step:06d}")
        return result

    def state_dict(self) -> dict[str, Any]:
        """The part of `state.json` that is the evaluator's."""
        return {"evals": self.results, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.results = state["evals"]
        self.best = tuple(state["best"]) if state["best"] else None
