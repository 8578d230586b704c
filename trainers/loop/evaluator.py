"""Evaluation: held-out accuracy during a run and at its ends, and what a state is worth on tasks of
a method's choice.

Episodes are identified by all that their answers depend on (`identified_episodes.py`), so measuring
the same state again costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...agents.state import TeamState
from ...agents.types import Task
from ...rollouts.evaluation.accuracy import evaluation
from ...rollouts.evaluation.statistics import Evaluation
from ...rollouts.types import Episode, Kind
from ..collection.identified_episodes import Play
from ..collection.rollout_manager import RolloutManager
from ..monitoring.run_log import RunLog


class Evaluator:
    """Plays tasks at temperature 0 and remembers what came out.

    Args:
        tasks: the held-out tasks. val_tasks: those that a method may choose by, () for none.
        metric: the reward whose mean is the accuracy.
        rollouts: plays them, or finds them stored.
        log: where results are shown.

    `results`: summaries by label. `best`: (accuracy, checkpoint) of the best state in force so far,
    on the validation tasks where there are any, else on held-out ones.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        val_tasks: Sequence[Task],
        metric: str,
        rollouts: RolloutManager,
        log: RunLog,
    ) -> None:
        self.tasks, self.val_tasks, self.metric = tasks, val_tasks, metric
        self.rollouts, self.log = rollouts, log
        self.results: dict[str, dict[str, Any]] = {}
        self.best: tuple[float, str] | None = None

    def evaluate(
        self, label: str, state: TeamState | None = None, tasks: Sequence[Task] | None = None
    ) -> Evaluation | None:
        """Held-out accuracy for rank 0 (None elsewhere); every rank has to call it.

        Args:
            label: the name of this evaluation, see `RolloutManager.stored`.
            state: None: the one in force.
            tasks: None: all held-out ones.
        """
        chosen = list(tasks if tasks is not None else self.tasks)
        results: list[Evaluation] = []

        def work() -> None:
            results.append(self._played(chosen, state, kind="eval", label=label))
            self._show(label, results[0], "held-out")
            if state is None and not self.val_tasks:
                self._remember(results[0].accuracy)

        self.rollouts.ranks.on_main(work)
        return results[0] if results else None

    def validate(self) -> Evaluation | None:
        """Accuracy of the state in force on the validation tasks, for rank 0 (None elsewhere, and
        where there are none)."""
        results: list[Evaluation] = []

        def work() -> None:
            label = f"val-step-{self.log.step:06d}"
            results.append(self._played(self.val_tasks, None, kind="trial", label=label))
            self._show(label, results[0], "validation")
            self._remember(results[0].accuracy)

        if self.val_tasks:
            self.rollouts.ranks.on_main(work)
        return results[0] if results else None

    def measure(
        self,
        state: TeamState | None,
        tasks: Sequence[Task],
        *,
        n: int = 1,
        greedy: bool = True,
        above: float | None = None,
        label: str = "",
    ) -> Evaluation:
        """What a state (None: the one in force) is worth on these tasks, on every rank: trials, on
        which the budget is spent.

        Args:
            n: episodes per task. greedy: at temperature 0.
            above: stop once the accuracy cannot exceed this any more, for rewards of at most 1;
                what is not played is `left`.
        """

        def work() -> list[Evaluation]:
            if above is None:
                return [self._played(tasks, state, kind="trial", n=n, greedy=greedy, label=label)]
            return [self._played_until(tasks, state, n, greedy, above)]

        return self.rollouts.ranks.share(work, Evaluation)[0]

    def _played(
        self,
        tasks: Sequence[Task],
        state: TeamState | None,
        *,
        kind: Kind,
        n: int = 1,
        greedy: bool = True,
        label: str = "",
    ) -> Evaluation:
        what = Play(tasks, state, n, greedy, kind, label=label)
        collected = self.rollouts.play_or_find(what)
        return evaluation(tasks, collected.episodes, self.metric)

    def _played_until(
        self, tasks: Sequence[Task], state: TeamState | None, n: int, greedy: bool, above: float
    ) -> Evaluation:
        """Play in portions, as long as perfect scores of the rest would exceed the bound."""
        portion = max(self.rollouts.config.max_concurrency // n, 1)
        episodes: list[Episode] = []
        for end in range(portion, len(tasks) + portion, portion):
            played = tasks[:end]
            what = Play(tasks[end - portion : end], state, n, greedy)
            collected = self.rollouts.play_or_find(what)
            episodes += collected.episodes
            result = evaluation(played, episodes, self.metric)
            most = max(1.0, max(result.scores.values()))
            reachable = (sum(result.scores.values()) + most * (len(tasks) - len(played))) / len(
                tasks
            )
            if reachable <= above:
                break
        left = len(tasks) - len(played)
        return Evaluation(result.scores, result.failed, result.errors, result.tokens, left)

    def _show(self, label: str, result: Evaluation, which: str) -> None:
        step = label.startswith(("step-", "val-step-"))
        name = "val" if which == "validation" else "eval"
        self.results[label] = result.summary()
        self.log.track({name: {"during" if step else label: result.accuracy}})
        count = len(result.scores)
        if result.failed:
            self.log.warn(
                f"eval {label}: {result.failed} of {count} episodes failed and count 0;"
                f" first: {result.errors[0]}"
            )
        self.log.say(f"eval {label}: {self.metric} {result.accuracy:.3f} on {count} {which} tasks")

    def _remember(self, accuracy: float) -> None:
        if self.best is None or accuracy > self.best[0]:
            self.best = (accuracy, f"step-{self.log.step:06d}")

    def state_dict(self) -> dict[str, Any]:
        """The part of `state.json` that is the evaluator's."""
        return {"evals": self.results, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.results = state["evals"]
        self.best = tuple(state["best"]) if state["best"] else None
