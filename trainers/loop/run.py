"""A training run: everything that is not the method.

A method is a loop over a run's parts:

    for step in run.steps():
        episodes = run.rollouts.collect(step)
        results = run.learner.learn(step, sequences, loss)
        run.finish(step, StepResult(metrics, episodes))

`TrainingRun` makes the parts, opens and closes them in the right order, and counts a step as done.
"""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...agents.state import TeamState, check_values
from ...agents.types import SettingError, to_json
from ...rollouts.budget import Budget, prices_of
from ...rollouts.engines.base import Engine
from ...rollouts.evaluation.statistics import Evaluation
from ...rollouts.ledger import BudgetSpent, Ledger
from ...rollouts.report.findings import ENDED
from ...rollouts.report.report import write_report
from ...rollouts.types import Episode
from .. import checkpoint as ckpt
from ..collection.background import StopSignal
from ..collection.engines import EngineGroup
from ..collection.rollout_manager import RolloutManager
from ..distributed.ranks import Ranks
from ..errors import RunError, Stopped
from ..model import sharding
from ..monitoring.run_log import RunLog
from ..update.learner import Learner
from ..update.snapshot import snapshot
from ..values.parts import Part, check_names, values_of
from ..weight_sync.sharded_probes import join_probes
from ..weight_sync.sync import WeightSync
from . import changed_settings, checks
from . import summary as summaries
from .checkpointing import Checkpointer
from .evaluator import Evaluator
from .lock import FolderLock
from .spec import RunSpec
from .step_result import StepResult, Trial

SPENT = "the budget is spent"


class TrainingRun:
    """One training run: collect -> learn -> publish -> evaluate -> checkpoint, resumable after a
    kill at any point.

    Args:
        spec: what the run is.
        engine: a running engine to use instead of starting one (tests); it serves every base.

    Of what it holds, `learner` and `log` work on every rank, as do `rollouts` and `evaluator`,
    which share what rank 0 collects; `engines`, `sync`, `ledger` and `checkpointer` are rank 0's.
    `values`: what a team sees of the run's state. `origin`: the state that the run began with.
    `parts`: what the method learns beside weights. `ranks`, and `lock` (of the run folder, rank
    0's), exist once it was opened.
    """

    ranks: Ranks
    lock: FolderLock

    def __init__(self, spec: RunSpec, engine: Engine | None = None) -> None:
        self.spec, config = spec, spec.config
        self.values: dict[str, Any] = dict(spec.values)
        self.parts: list[Part] = []
        policies = spec.served_policies
        self.log = RunLog(config)
        self.ledger = Ledger(Budget.of(config.budget), prices_of(policies))
        self.learner = Learner(config, policies, spec.system.specs, spec.heads, self.log)
        self.learner.values = self.values
        self.engines = EngineGroup(config, self.learner, engine)
        self.sync = WeightSync(config, self.learner, self.values, self.log.record_verification)
        self.rollouts = RolloutManager(
            config,
            spec.system,
            spec.rewards,
            spec.tasks,
            engines=self.engines,
            sync=self.sync,
            log=self.log,
            ledger=self.ledger,
        )
        self.evaluator = Evaluator(
            spec.eval_tasks, spec.val_tasks, spec.metric, self.rollouts, self.log
        )
        self.checkpointer = Checkpointer(
            spec,
            self.values,
            self.parts,
            learner=self.learner,
            sync=self.sync,
            evaluator=self.evaluator,
            log=self.log,
            ledger=self.ledger,
        )
        self._before_step: tuple[int, Any] | None = None  # the step, and the parts before it
        self._last_episodes: Sequence[Episode] = ()
        self._opened = self._loaded = False
        # what `open` started, in the order in which `close` has to end it
        self._exit = contextlib.ExitStack()

    @property
    def step(self) -> int:
        """The last finished step."""
        return self.log.step

    @property
    def state(self) -> TeamState:
        """The state in force, with the versions of all policies (on rank 0; elsewhere without)."""
        return self.sync.state

    @property
    def origin(self) -> TeamState:
        """The state that the run began with (on rank 0)."""
        return self.sync.origin

    def add_parts(self, parts: Sequence[Part]) -> None:
        """Save, restore and show these too; before the run is opened."""
        self.parts.extend(parts)
        check_names(self.parts)
        self._show_parts()

    def _show_parts(self) -> None:
        """Let the team see what the parts hold now."""
        self.values.update(values_of(self.parts))

    # opening and closing

    def open(self) -> TrainingRun:
        """Check the folder, load the bases, restore a checkpoint if asked, start engines, publish
        what is there. Idempotent.

        A closed run may be opened again: it goes on with its adapters, on engines started anew.
        """
        if self._opened:
            return self
        self._opened = True
        config = self.spec.config
        try:
            if not self._loaded:
                # before accelerate looks for packages it may lack
                sharding.sharding_mode(config.shard_base)
                self.ranks = Ranks(seconds=config.collective_timeout)
                join_probes(self.ranks, lambda base: self.learner.bases[base].adapters)
            self.log.open(self.ranks.main, self._exit)
            self.ranks.on_main(self._claim)
            if self.ranks.warning:
                self.log.warn(self.ranks.warning)
            self.stop = StopSignal()
            self._exit.callback(self.stop.close)
            self.rollouts.join(self.ranks, self.stop)
            if not self._loaded:
                self._load()
            self.ranks.on_main(self._open_main)
            self.rollouts.open_players(self._exit)
        except BaseException:
            self.close()
            raise
        return self

    def _claim(self) -> None:
        config = self.spec.config
        self.lock = checks.claim_folder(config, self.log.say, again=self._loaded)
        self._exit.callback(self.lock.release)

    def _load(self) -> None:
        self.learner.load(self.ranks)
        self.ranks.on_main(lambda: checks.prepare_folder(self.spec.config))
        self._resume()
        if not self.learner.policy_of and not self.parts:
            self.log.warn("no policy is trained: all are frozen, outside models or the base")
        self._loaded = True

    def _open_main(self) -> None:
        self.log.keep_warnings()
        spec = self.spec
        for warning in spec.warnings:
            self.log.warn(warning)
        offline = checks.offline_episodes(
            spec.config, spec.system.specs, spec.eval_tasks, self.learner.bases, spec.metric
        )
        self.rollouts.open(self._exit, offline)
        if spec.config.resume:
            before = changed_settings.settings_of(spec.config.folder)
            for line in changed_settings.describe(before, summaries.resolved_settings(spec)):
                self.log.say(f"resume: {line}")
        summaries.write_config(self.spec)
        self.log.open_trackers(self._exit)

    def _resume(self) -> None:
        config = self.spec.config

        def find() -> str | None:
            valid = self.checkpointer.newest() if config.resume else None
            if valid is not None:
                self.log.say(f"resumed from {valid.name}")
            elif config.resume:
                self.log.say(
                    f"resume: no valid checkpoint in {config.folder}; starting from step 0"
                )
            self.log.drop_rows_after_step()
            return str(valid) if valid else None

        name = self.ranks.on_main(find)
        if name:
            if not self.ranks.main:
                self.checkpointer.restore(Path(name))
            self.checkpointer.saved = self.step
        if self.log.done == SPENT and not self.ledger.stopped:
            self.log.done = ""  # the budget was raised

    def close(self) -> None:
        """Stop engines that this run started. Idempotent."""
        self._opened = False
        self._exit.close()

    def __enter__(self) -> TrainingRun:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    # the loop

    def steps(self) -> Iterator[int]:
        """Steps still to do: 1, 2, ... After each, call `finish`. Ends early, with a checkpoint,
        when the user or the cluster asks."""
        last = self.spec.config.max_steps
        self.log.progress.start(self.step, last)
        while self.step < last and not self.log.done:
            self._before_step = (self.step, copy.deepcopy(self.parts))
            yield self.step + 1
            if self.ranks.any(self.stop.asked):
                self.save()
                raise Stopped

    def finish(self, step: int, result: StepResult) -> None:
        """Put the result's state in force, publish what moved, verify it, log, evaluate and save as
        the settings ask. The step counts as done after this."""
        start, config, metrics = time.perf_counter(), self.spec.config, result.metrics
        if result.state is not None:
            self._adopt(result.state)
        self._show_parts()
        self._before_step, self._last_episodes = None, result.episodes
        self.log.finished(step)
        self.log.done = result.done
        self.learner.unfinished = False

        last = step == config.max_steps or bool(result.done)

        def publish() -> None:
            self.lock.check()
            try:
                self.sync.advance(step, result.episodes, final=last)
            finally:  # what was learnt is on record even if no server is left
                more = {"budget": self.ledger.spent_so_far(), **metrics}
                row = {"state": self.sync.named(self.state).key, **more}
                row = self.log.write_step(row, self.sync.verified, time.perf_counter() - start)
            self.log.show_step(row)

        self.ranks.on_main(publish)
        reason = self.log.raise_alarms(metrics.get("policies", {}))
        if reason:
            self.save()
            raise RunError(f"step {step}: {reason}")
        evaluated = config.eval_every and step % config.eval_every == 0
        if evaluated and not last:
            self.evaluator.evaluate(f"step-{step:06d}")
        if evaluated or last:
            self.evaluator.validate()
        if evaluated or step % config.save_every == 0 or last:
            self.save()

    def _adopt(self, state: TeamState) -> None:
        """The values of this state are in force. Raises `RunError` for one that no param takes."""
        seen = values_of(self.parts)
        try:
            check_values(self.spec.system.params(), {**state.values, **seen})
        except SettingError as error:
            raise RunError(
                f"step {self.step + 1}: the proposed state cannot be: {error}"
            ) from error
        self.values.clear()
        self.values.update(json.loads(json.dumps(to_json(state.values))))

    def end(self) -> None:
        """After the last step: with `keep: best`, go back to the state of the best checkpoint."""
        best = self.ranks.broadcast(self.evaluator.best)
        if self.spec.config.keep != "best" or best is None:
            return
        folder = self.spec.config.folder / "checkpoints" / best[1]
        if folder.name == self.checkpointer.folder.name:
            return
        self.checkpointer.restore_state(folder)
        self.log.say(f"keep: best; the run ends with the state of {folder.name}")
        self.ranks.on_main(lambda: self.sync.advance(self.step, self._last_episodes, final=True))
        self.checkpointer.saved = None
        self.save()

    def end_by_budget(self, error: BudgetSpent) -> None:
        """The next call would exceed the budget: the run ends with the last finished step, or with
        this one if adapters have moved in it."""
        self.log.warn(str(error))
        if self.learner.unfinished:
            self.finish(self.step + 1, StepResult({}, done=SPENT))
            return
        self.log.done = SPENT
        self.checkpointer.saved = None
        self.save()

    def _put_back(self) -> None:
        """A step that was cut off leaves the parts as they were before it."""
        if self._before_step is None or self._before_step[0] != self.step:
            return
        for part, before in zip(self.parts, self._before_step[1], strict=True):
            part.__dict__.clear()
            part.__dict__.update(before.__dict__)
        self._before_step = None
        self._show_parts()

    @contextlib.contextmanager
    def trial(self) -> Iterator[Trial]:
        """Updates made inside are tried: at the end the learner and the served adapters are what
        they were, unless `adopt` was called. Every rank has to enter it."""
        with snapshot(self.learner) as before:
            trial = Trial(lambda: self.ranks.on_main(lambda: self.sync.try_out(self.step)))
            unfinished = self.learner.unfinished
            self.ranks.on_main(self.sync.begin_trial)
            try:
                yield trial
            finally:
                if not trial.adopted:
                    before.put_back()
                    self.learner.unfinished = unfinished
                self.ranks.on_main(lambda: self.sync.end_trial(self.step, trial.adopted))

    def save(self) -> Path | None:
        """Write a checkpoint of the last finished step, unless it is there already; its folder on
        rank 0."""
        paths: list[Path] = []
        self._put_back()
        if self.checkpointer.saved != self.step:
            self.ranks.on_main(lambda: paths.append(self._write_checkpoint()))
            self.checkpointer.saved = self.step
        return paths[0] if paths else None

    def _write_checkpoint(self) -> Path:
        self.lock.check()
        return self.checkpointer.save()

    def emergency_save(self, error: Exception) -> None:
        """After the engine has gone: save the last finished step, on the rank that saw it, unless
        an update was under way. Why the run ended is among its warnings, for its report."""
        if not (self._loaded and self.ranks.main):
            return
        self.record_end(error)
        self._put_back()
        if not self.learner.unfinished and self.checkpointer.saved != self.step:
            self.checkpointer.saved = self.step
            self.log.say(f"step {self.step} is saved in {self._write_checkpoint()}")

    def record_end(self, error: Exception) -> None:
        """Keep why the run cannot go on among its warnings, for its report."""
        if self._loaded and self.ranks.main:
            self.log.warn(f"{ENDED} after step {self.step}: {error}")

    def summarise(
        self,
        before: Evaluation | None,
        after: Evaluation | None,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """`summary.json`, with every pinned key, and `report.html`."""
        self.log.clock()
        self.learner.check_bases()
        spec, learner = self.spec, self.learner
        result = summaries.summary(spec, learner, self.sync, self.log, before, after)
        if self.ranks.main:
            result |= summaries.spent(self.ledger, result["tokens"])
            result |= summaries.state_of(self.origin, self.sync.named(self.state))
        result |= extra or {}
        if self.ranks.main:
            if finding := self.log.finding():
                result["finding"] = finding
                self.log.warn(finding)
            ckpt.write_json(spec.config.folder / "summary.json", result)
            write_report(spec.config.folder, pieces=summaries.pieces_of(learner.bases))
        return result
