"""A training run: everything that is not the method.

`Run` owns the folder, the bases with their adapters, checkpoints, evaluation and what people see;
rank 0 has a `RolloutManager` besides, which plays, stores, publishes and proves. A method is a loop
over it:

    for step in run.steps():
        episodes = run.collect(step)
        run.learn(step, samples, loss)
        run.finish(step)
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...agents.concurrency import gather
from ...agents.system import System, build_system, override_agents
from ...agents.tools.tools import resolve_tools
from ...agents.types import SettingError, Task, from_json, to_json
from ...rollouts.engines.base import Engine
from ...rollouts.evaluation.accuracy import evaluation
from ...rollouts.evaluation.statistics import Evaluation
from ...rollouts.report.report import write_report
from ...rollouts.rewards.builtin import resolve_rewards
from ...rollouts.rewards.scoring import RewardFn, fn_name
from ...rollouts.tasks.registry import load_tasks
from ...rollouts.types import Episode, TurnKey
from .. import checkpoint as ckpt
from ..batching.samples import TrainingSequence
from ..collection import task_order
from ..collection.background import StopSignal
from ..collection.rollout_manager import RolloutManager
from ..collection.stored_episodes import OfflineEpisodes
from ..config import RunConfig
from ..distributed.ranks import Ranks
from ..errors import RunError, Stopped
from ..model import sharding
from ..model.base_models import dtype_of, group_by_base
from ..model.memory_estimate import needs_checkpointing
from ..monitoring import run_folder
from ..monitoring.alarms import Alarms
from ..monitoring.progress import Progress
from ..monitoring.step_metrics import collection_row
from ..monitoring.token_log import TokenLog
from ..monitoring.trackers import Trackers
from ..update.learner import load_base
from ..update.losses.inputs import LossFn
from ..update.optimizer_step import UpdateOptions, UpdateResult, sample_to_json, update
from ..update.scalar_heads import HeadLoss, HeadSpec, ScalarHead, Targets
from ..update.turn_logprobs import turn_logprobs
from ..weight_sync import sharded_probes
from . import checks
from . import summary as summaries
from .checkpointing import restore, save_checkpoint


class Run:
    """State and services of one run. Rank 0 plays, stores and publishes; every rank holds the same
    adapters and learns.

    Args:
        config: the settings, resolved.
        system: who talks to whom; None takes `config.system`.
        tasks, eval_tasks: None loads `config.tasks`. Training and held-out tasks must not share an
            id.
        rewards: functions or names; None takes `config.rewards`. The first one's name is the
            accuracy of evaluations.
        engine: a running engine to use instead of starting one (tests); it serves every base.
    """

    def __init__(
        self,
        config: RunConfig,
        system: System | None = None,
        *,
        tasks: Sequence[Task] | None = None,
        eval_tasks: Sequence[Task] | None = None,
        rewards: Sequence[RewardFn | str] | None = None,
        engine: Engine | None = None,
        recipe: str = "",
    ) -> None:
        self.config, self.recipe = config, recipe
        system = system or build_system(config.system)  # type: ignore[arg-type]
        self.system = system.with_agents(override_agents(system, config.agents, config.sampling()))  # type: ignore[arg-type]
        checks.check_importable(self.system)
        for agent in self.system.specs:
            resolve_tools(agent.tools)
        self.policies = config.policy_specs(self.system.specs)
        self.agents_of = {
            name: [a.name for a in self.system.specs if a.policy == name] for name in self.policies
        }
        args = dict(config.task_args)  # type: ignore[arg-type]
        if tasks is not None and eval_tasks is None:
            raise SettingError(
                "eval_tasks: the training tasks are given as a list, so the held-out ones must be"
                " given too"
            )
        self.tasks_given = tasks is not None or eval_tasks is not None
        self.tasks = list(
            tasks
            if tasks is not None
            else load_tasks(config.tasks, "train", seed=config.seed, **args)
        )
        held_out = (
            eval_tasks
            if eval_tasks is not None
            else load_tasks(config.tasks, "eval", seed=config.seed, **args)
        )
        self.eval_tasks = list(held_out)[: config.num_eval_tasks]
        checks.check_tasks(self.tasks, self.eval_tasks, config)
        self.rewards = resolve_rewards(rewards if rewards is not None else config.rewards)
        if not self.rewards:
            raise SettingError(
                "rewards: empty; expected at least one function, whose name is the accuracy of"
                " evaluations"
            )
        self.metric = fn_name(self.rewards[0])
        self.heads: tuple[
            HeadSpec, ...
        ] = ()  # scalar heads that the method wants; made when the bases are loaded
        self.values: dict[str, Any] = {}
        self.credit_state: dict[str, float] = {}
        self.monitor = Alarms()
        self.learned = TokenLog()
        self.step = 0
        self.aborted = 0  # steps in a row that were not finite
        self._unsound = 0  # the last one of them
        self.started = time.time()
        self.seconds = {"total": 0.0, "rollout": 0.0, "train": 0.0, "publish": 0.0}
        self.tokens = {"sampled": 0, "trained": 0}
        self.evals: dict[str, dict[str, Any]] = {}
        self.best: tuple[float, str] | None = None
        self.earlier_proofs: dict[
            str, list[dict[str, Any]]
        ] = {}  # of the run that this one resumes, by base
        self.earlier_versions: dict[str, dict[str, str]] = {}
        self.earlier_team: dict[int, dict[str, str]] = {}
        self._saved: int | None = None  # the step whose checkpoint is on disk
        self._learning = False  # adapters are past the last finished step
        self._measured = False  # how far the first update moved its tokens
        self.stage = RolloutManager(self, engine)  # rank 0's
        self._opened = self._loaded = False
        self._exit = (
            contextlib.ExitStack()
        )  # what `open` started, in the order in which `close` has to end it
        self._row: dict[str, Any] = {}

    # opening and closing

    def open(self) -> Run:
        """Check the folder, load the bases, restore a checkpoint if asked, start engines, publish
        what is there. Idempotent.

        A closed run may be opened again: it goes on with the adapters it has, on engines started
        anew.
        """
        if self._opened:
            return self
        self._opened = True
        try:
            if not self._loaded:
                sharding.sharding_mode(
                    self.config.shard_base
                )  # before accelerate looks for packages it may lack
                self.ranks = Ranks(seconds=self.config.collective_timeout)
                sharded_probes.join_probes(self)
            self.progress = Progress(self.ranks.main)
            self._exit.callback(self.progress.close)
            if self.ranks.warning:
                self.progress.warn(self.ranks.warning)
            self.stop = StopSignal()
            self._exit.callback(self.stop.close)
            if not self._loaded:
                self._load()
            self.ranks.on_main(self._open_main)
        except BaseException:
            self.close()
            raise
        return self

    def _load(self) -> None:
        found = group_by_base(self.policies, self.config.model)
        among = self.ranks if sharding.sharding_mode(self.config.shard_base) else None
        config, device = self.config, self.ranks.device
        self.bases = {
            name: load_base(name, specs, config, device, self.heads, among)
            for name, specs in found.items()
        }
        on = {base.path: found[name] for name, base in self.bases.items()}
        size = 1 if among is None else among.size
        if needs_checkpointing(
            config,
            on,
            device,
            lambda path: dtype_of(path, config.dtype, device),
            self.progress.say,
            size,
        ):
            for base in self.bases.values():
                base.adapters.checkpoint_activations()
        if among is not None:
            self.progress.say(
                f"shard_base: the base's layers are split over {self.ranks.size} ranks"
            )
        self.before = {p: b.adapters.sha256(p) for b in self.bases.values() for p in b.policies}
        self.before |= {
            h.adapter: h.sha256() for b in self.bases.values() for h in b.heads.values()
        }
        self.base_hashes = {name: base.adapters.base_sha256() for name, base in self.bases.items()}
        self.ranks.on_main(self._prepare_folder)
        self._resume()
        if not self.policy_of:
            self.progress.warn(
                "no policy is trained: all of them are frozen, outside models or the base"
            )
        self._loaded = True

    def _open_main(self) -> None:
        self.progress.keep_warnings(self.config.folder / "warnings.log")
        if self.config.episodes:
            self.given = OfflineEpisodes(self.config.episodes, self.system.specs)
            checks.check_tasks([e.task for e in self.given.episodes], self.eval_tasks, self.config)
            tokens = {
                policy: base.tokens for base in self.bases.values() for policy in base.policies
            }
            self.given.check_tokens(
                {a.name: tokens[a.policy] for a in self.system.specs if a.policy in tokens}
            )
        self.stage.open(self._exit)
        summaries.write_config(self)
        self.trackers = Trackers(
            self.config.report_to, self.config.folder, dataclasses.asdict(self.config)
        )
        self._exit.callback(self.trackers.close)

    def _prepare_folder(self) -> None:
        folder, config = self.config.folder, self.config
        if folder.exists() and not folder.is_dir():
            raise SettingError(f"output_dir {folder}: a file of that name is there; name a folder")
        used = (folder / "config.yaml").exists()
        if used and config.overwrite:
            shutil.rmtree(folder)
        elif used and not config.resume:
            raise SettingError(
                f"output_dir {folder}: holds an earlier run; set resume to go on, overwrite to"
                " replace it, or another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        ckpt.sweep(folder)

    def _resume(self) -> None:
        def find() -> str | None:
            folder = self.config.folder
            valid = (
                ckpt.newest_valid(folder, self.progress.say, lambda found: restore(self, found))
                if self.config.resume
                else None
            )
            if valid is not None:
                self.progress.say(f"resumed from {valid.name}")
            elif self.config.resume:
                self.progress.say(f"resume: no valid checkpoint in {folder}; starting from step 0")
            for name in ("metrics.jsonl", "learned.jsonl"):
                run_folder.drop_rows_after(folder / name, self.step)
            return str(valid) if valid else None

        name = self.ranks.on_main(find)
        if name:
            if not self.ranks.main:
                restore(self, Path(name))
            self._saved = self.step

    def close(self) -> None:
        """Stop engines that this run started. Idempotent."""
        self._opened = False
        self._exit.close()

    def __enter__(self) -> Run:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    # the loop

    def steps(self) -> Iterator[int]:
        """Steps still to do: 1, 2, ... After each, call `finish`. Ends early, with a checkpoint,
        when the user or the cluster asks."""
        self.progress.start(self.step, self.config.max_steps)
        while self.step < self.config.max_steps:
            yield self.step + 1
            if self.ranks.any(self.stop.asked):
                self.save()
                raise Stopped

    @property
    def versions(self) -> dict[str, str]:
        """The team version to play with (rank 0 only). An untrained adapter is the base to the last
        bit, and the base is faster."""
        trained, published = (
            self.trained,
            [base.publisher.versions for base in self.bases.values() if base.publisher is not None],
        )
        return {
            policy: version
            for versions in published
            for policy, version in versions.items()
            if policy in trained
        }

    @property
    def trained(self) -> list[str]:
        """Policies whose adapter is no longer the bare base."""
        return [
            policy
            for base in self.bases.values()
            for policy in base.policies
            if base.adapters.is_trained(policy)
        ]

    def tasks_of(self, step: int) -> list[Task]:
        """The tasks of a step, see `records.tasks_of`."""
        return task_order.tasks_of(self.tasks, self.config.tasks_per_step, self.config.seed, step)

    def collect(
        self, step: int, after: Callable[[Episode], Awaitable[Episode]] | None = None
    ) -> list[Episode]:
        """Play the step's episodes (on rank 0) and give them to every rank, in the order of tasks
        and samples.

        With `max_staleness` the rollouts of later steps are begun too and go on while this one is
        learnt (`ahead.py`). With `config.episodes` they come from that store: the groups of
        `tasks_per_step` of its tasks, in the order `tasks_of` gives. `after` may add to a scored
        episode before the others see it (replays, judges of whole groups). Episodes of this step
        that are stored already, played by adapter versions that fit, are taken as they are.
        """
        start = time.perf_counter()
        episodes: list[Episode] = []
        told: dict[str, Any] = {}

        def play() -> list[Any]:
            if self.config.episodes:
                found = self.given.of(self.config.tasks_per_step, self.config.seed, step)
            else:
                rollout = self.stage.ahead.take(step)
                found, told["row"] = rollout.episodes, rollout.row(self.config.max_staleness)
            self.stage.prove(step - 1, found, start=True)
            if after is not None:
                found = self.stage.perform(gather([after(episode) for episode in found]))
            episodes.extend(found)
            return [to_json(e) for e in found] if self.ranks.size > 1 else []

        sent = self.ranks.on_main(play)
        if not self.ranks.main:
            episodes = [from_json(Episode, e) for e in sent]
        self.seconds["rollout"] += time.perf_counter() - start
        self._row = {
            **collection_row(
                step, episodes, self.metric, self.progress.warn, time.perf_counter() - start
            ),
            **told.get("row", {}),
        }
        self.tokens["sampled"] += self._row["sampled_tokens"]
        return episodes

    def play(
        self,
        label: str,
        tasks: Sequence[Task],
        num_generations: int = 1,
        versions: Mapping[str, str] | None = None,
    ) -> list[Episode]:
        """Sampled episodes of held-out tasks, scored and stored as `eval-LABEL`, on every rank.
        `versions` None: those in force."""
        found: list[Episode] = []

        def go() -> list[Any]:
            found.extend(
                self.stage.play(
                    tasks,
                    f"eval-{label}",
                    self.step,
                    self.stage.rollouts,
                    num_generations,
                    versions,
                )
            )
            return [to_json(e) for e in found] if self.ranks.size > 1 else []

        sent = self.ranks.on_main(go)
        return found if self.ranks.main else [from_json(Episode, e) for e in sent]

    def learn(
        self,
        step: int,
        samples: Sequence[TrainingSequence],
        loss_fn: LossFn,
        how: UpdateOptions = UpdateOptions(),
    ) -> dict[str, UpdateResult]:
        """Update every adapter that has samples. A loss or gradient that is not finite changes
        nothing and is dumped, aloud."""
        start, self._learning = time.perf_counter(), True
        hashes = {p: b.adapters.sha256(p) for b in self.bases.values() for p in b.policies}
        done: dict[str, UpdateResult] = {}
        how, self._measured = (
            dataclasses.replace(how, measure=step == 1 and not self._measured),
            True,
        )
        watched, noted = self.learned.watch(samples, loss_fn)
        for base in self.bases.values():
            done |= update(base.optimizers, samples, watched, step, self.ranks, how)
        for base in self.bases.values():
            for policy in base.policies:
                if policy not in done and base.adapters.sha256(policy) != hashes[policy]:
                    raise RunError(
                        f"step {step}: adapter {policy!r} moved without samples of its own"
                    )
        self._look(step, done, samples)
        self.learned.add(samples, noted)
        self.seconds["train"] += time.perf_counter() - start
        self.tokens["trained"] += sum(u.tokens for u in done.values())
        return done

    def _look(
        self, step: int, done: Mapping[str, UpdateResult], samples: Sequence[TrainingSequence]
    ) -> None:
        for policy, result in done.items():
            if result.moved is not None and result.applied and result.moved < 1e-3:
                self.progress.warn(
                    f"policy {policy!r}: the first update moved its trained tokens by"
                    f" {result.moved:.1e} nat (below 1e-3); learning_rate {result.learning_rate:g}"
                    " may be too small for a LoRA"
                )
        problems = {policy: result.problem for policy, result in done.items() if not result.applied}
        if not problems:
            return
        if self._unsound != step:  # a method may update several times a step
            self.aborted, self._unsound = self.aborted + 1, step
        path = self.config.folder / "dumps" / f"step-{step:06d}.json"
        if self.ranks.main:
            ckpt.write_json(
                path,
                {
                    "problems": problems,
                    "samples": [sample_to_json(s) for s in samples if s.policy in problems],
                },
            )
        self.progress.warn(
            f"step {step}: not finite for {problems}; no update there, samples in {path}"
        )
        if self.aborted >= 3:
            raise RunError(f"three steps in a row were not finite; samples of the last one: {path}")

    def head(self, name: str) -> ScalarHead:
        """The scalar head of this name."""
        return next(base.heads[name] for base in self.bases.values() if name in base.heads)

    def learn_head(
        self,
        step: int,
        name: str,
        samples: Sequence[TrainingSequence],
        targets: Targets,
        loss_fn: HeadLoss,
    ) -> UpdateResult:
        """One update of a scalar head, see `Head.learn`. No policy moves; what is not finite
        changes nothing and is dumped, aloud."""
        start, head, self._learning = time.perf_counter(), self.head(name), True
        hashes = {p: b.adapters.sha256(p) for b in self.bases.values() for p in b.policies}
        done = head.learn(samples, targets, loss_fn, step, self.ranks)
        moved = [
            p for b in self.bases.values() for p in b.policies if b.adapters.sha256(p) != hashes[p]
        ]
        if moved:
            raise RunError(f"step {step}: adapter {moved[0]!r} moved while head {name!r} learnt")
        self._look(
            step,
            {head.adapter: done},
            [dataclasses.replace(s, policy=head.adapter) for s in samples],
        )
        self.seconds["train"] += time.perf_counter() - start
        return done

    def score(
        self, samples: Sequence[TrainingSequence], *, reference: bool = False
    ) -> dict[TurnKey, float]:
        """log p of whole turns, now or as the run began, on every rank: see `scoring.score`."""
        start = time.perf_counter()
        found = turn_logprobs(self, samples, reference=reference)
        self.seconds["train"] += time.perf_counter() - start
        return found

    @property
    def policy_of(self) -> dict[str, str]:
        """Agent -> policy, for agents whose policy learns in this run."""
        learning = {name for base in self.bases.values() for name in base.adapters.trainable}
        return {agent.name: agent.policy for agent in self.system.specs if agent.policy in learning}

    def show(self, samples: Sequence[TrainingSequence]) -> None:
        """Print one sample per policy with its mask: read this before believing any curve."""
        for policy in dict.fromkeys(sample.policy for sample in samples):
            sample = next(s for s in samples if s.policy == policy)
            tokens = next(b.tokens for b in self.bases.values() if policy in b.policies)
            runs = itertools.groupby(
                zip(sample.ids, sample.mask, strict=True), key=lambda item: item[1]
            )
            self.progress.sample(
                policy, [(tokens.show([i for i, _ in run]), bool(mask)) for mask, run in runs]
            )

    def finish(self, step: int, episodes: Sequence[Episode], metrics: Mapping[str, Any]) -> None:
        """Publish what moved, prove it, log, evaluate and save as the settings ask. The step counts
        as done after this."""
        start = time.perf_counter()
        self.step, self._learning = step, False
        if self._unsound != step:
            self.aborted = 0

        def publish() -> None:
            try:
                self.stage.publish(step, episodes, final=step == self.config.max_steps)
            finally:  # what was learnt is on record even if no server is left
                self.seconds["publish"] += time.perf_counter() - start
                row = {
                    **self._row,
                    "proof": self.stage.proofs,
                    **metrics,
                    "seconds": dict(self.seconds),
                }
                run_folder.append_row(self.config.folder / "metrics.jsonl", row)
                self.learned.write(self.config.folder / "learned.jsonl", step)
            self.trackers.log(row, step)
            self.progress.step(step, row)

        self.ranks.on_main(publish)
        self._watch(step, metrics.get("policies", {}))
        evaluated = (
            self.config.eval_every
            and step % self.config.eval_every == 0
            and step < self.config.max_steps
        )
        if evaluated:
            self.evaluate(f"step-{step:06d}")
        if evaluated or step % self.config.save_every == 0 or step == self.config.max_steps:
            self.save()

    def _watch(self, step: int, rows: Mapping[str, Mapping[str, Any]]) -> None:
        warnings, reason = self.monitor.check(
            rows, stale=self.config.max_staleness > 0 and step > 1
        )
        for warning in warnings:
            self.progress.warn(f"step {step}: {warning}")
        if reason:
            self.save()
            raise RunError(f"step {step}: {reason}")

    # evaluation and keeping

    def evaluate(
        self,
        label: str,
        versions: Mapping[str, str] | None = None,
        tasks: Sequence[Task] | None = None,
    ) -> Evaluation | None:
        """Held-out accuracy at temperature 0, for rank 0 (None elsewhere); every rank has to call
        it. `versions` None: those in force."""
        found: list[Evaluation] = []
        self.ranks.on_main(lambda: found.append(self._evaluate(label, versions, tasks)))
        return found[0] if found else None

    def _evaluate(
        self, label: str, versions: Mapping[str, str] | None, tasks: Sequence[Task] | None
    ) -> Evaluation:
        chosen = list(tasks if tasks is not None else self.eval_tasks)
        episodes = self.stage.play(
            chosen, f"eval-{label}", self.step, self.stage.rollouts.greedy(), versions=versions
        )
        result = evaluation(chosen, episodes, self.metric)
        self.evals[label] = result.summary()
        self.trackers.log(
            {"eval": {"during" if label.startswith("step-") else label: result.accuracy}}, self.step
        )
        if result.failed:
            self.progress.warn(
                f"eval {label}: {result.failed} of {len(chosen)} episodes failed and count 0;"
                f" first: {result.errors[0]}"
            )
        self.progress.say(
            f"eval {label}: {self.metric} {result.accuracy:.3f} on {len(chosen)} held-out tasks"
        )
        if versions is None and (self.best is None or result.accuracy > self.best[0]):
            self.best = (result.accuracy, f"step-{self.step:06d}")
        return result

    def save(self) -> Path | None:
        """Write a checkpoint of the last finished step, unless it is there already."""
        found: list[Path] = []
        if self._saved != self.step:
            self.ranks.on_main(lambda: found.append(self._save()))
            self._saved = self.step
        return found[0] if found else None

    def rescue(self, error: Exception) -> None:
        """After the engine has gone: save the last finished step, on the rank that saw it, unless
        an update was under way.

        Why the run ended is among its warnings, where its report finds it.
        """
        if not (self._loaded and self.ranks.main):
            return
        self.progress.warn(f"the run ended after step {self.step}: {error}")
        if not self._learning and self._saved != self.step:
            self._saved = self.step
            self.progress.say(f"step {self.step} is saved in {self._save()}")

    def _save(self) -> Path:
        try:
            path = save_checkpoint(self)
            ckpt.prune(
                self.config.folder,
                self.config.save_total_limit,
                self.best[1] if self.best else None,
            )
        except OSError as error:
            raise RunError(
                f"checkpoint of step {self.step} could not be written: {error}; earlier ones are"
                " whole"
            ) from error
        return path

    def clock(self) -> None:
        """Add the time since the last call to `seconds["total"]`, which goes on over resumes."""
        now = time.time()
        self.seconds["total"] += now - self.started
        self.started = now

    def summarise(
        self,
        before: Evaluation | None,
        after: Evaluation | None,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """`summary.json`, with every pinned key, and `report.html`."""
        self.clock()
        for base in self.bases.values():
            if base.adapters.base_sha256() != self.base_hashes[base.name]:
                raise RunError(
                    f"base {base.name}: its weights changed during the run; they must not"
                )
        result = summaries.summary(self, before, after) | dict(extra or {})
        if self.ranks.main:
            ckpt.write_json(self.config.folder / "summary.json", result)
            write_report(self.config.folder, pieces=summaries.pieces_of(self))
        return result
