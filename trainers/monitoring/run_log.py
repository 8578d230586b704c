"""Run log: metrics, warnings, dumps, alarms, trackers and counters of one training run.

On every rank (others than rank 0 count and raise, but write and show nothing): metrics.jsonl,
learned.jsonl, proofs.json, warnings.log, dumps of updates that were not finite, alarms, trackers,
progress, and the counters of seconds and tokens that go on over resumes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...rollouts.report.episode_index import json_lines
from ...rollouts.report.findings import learnt_nothing, settings_to_change
from ...rollouts.types import Episode
from .. import checkpoint as ckpt
from ..batching.samples import TrainingSequence
from ..config import RunConfig
from ..errors import RunError
from ..update.losses.inputs import LossFn
from ..update.optimizer_step import UpdateResult, sample_to_json
from . import run_folder
from .alarms import Alarms
from .library_output import silence_libraries
from .notebook import progress_here
from .progress import Progress
from .step_metrics import collection_row
from .token_log import TokenLog
from .trackers import Trackers

FEW_NATS = 1e-3  # a first update that moves its trained tokens by less may be too small


class RunLog:
    """Counters and files of one run.

    Args:
        config: `output_dir`, `report_to`, `max_staleness`.

    `step`: the last finished step. `done`: why no step follows it, "" if one may. `aborted`: steps
    in a row that were not finite. `seconds`: total, rollout, train, publish. `tokens`: sampled,
    trained.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.step, self.done = 0, ""
        self.aborted = 0
        self.seconds = {"total": 0.0, "rollout": 0.0, "train": 0.0, "publish": 0.0}
        self.tokens = {"sampled": 0, "trained": 0}
        self.alarms, self.token_log = Alarms(), TokenLog()
        self.main = False
        self.progress = Progress(False)
        self.trackers: Trackers | None = None
        self._started = time.time()
        self._not_finite = 0  # the last step that was not
        self._row: dict[str, Any] = {}

    def open(self, main: bool, closing: contextlib.ExitStack) -> None:
        """Show progress from now on, if this is rank 0 (`main`)."""
        self.main, self.progress = main, progress_here(main, self.config.verbose)
        if not self.config.verbose:
            silence_libraries()
        closing.callback(self.progress.close)

    def keep_warnings(self) -> None:
        """Write warnings to `warnings.log` too, once the folder is there (rank 0)."""
        self.progress.keep_warnings(self.config.folder / "warnings.log")

    def open_trackers(self, closing: contextlib.ExitStack) -> None:
        """Start the trackers of `report_to` (rank 0)."""
        config = self.config
        self.trackers = Trackers(config.report_to, config.folder, dataclasses.asdict(config))
        closing.callback(self.trackers.close)

    # for people

    def say(self, text: str) -> None:
        self.progress.say(text)

    def warn(self, text: str) -> None:
        self.progress.warn(text)

    def sample(self, policy: str, pieces: Sequence[tuple[str, bool]]) -> None:
        """Show a sequence of the policy as it is trained: (text, is it trained?)."""
        self.progress.sample(policy, pieces)

    def track(self, row: Mapping[str, Any]) -> None:
        """Give numbers that belong to the last finished step to the trackers (rank 0)."""
        if self.trackers is not None:
            self.trackers.log(row, self.step)

    # counters

    def spend(self, part: str, seconds: float) -> None:
        """Count seconds of `rollout`, `train` or `publish`."""
        self.seconds[part] += seconds

    def clock(self) -> None:
        """Add the time since the last call to `seconds["total"]`, which goes on over resumes."""
        now = time.time()
        self.seconds["total"] += now - self._started
        self._started = now

    def sampled(self, episodes: Sequence[Episode]) -> None:
        """Count the tokens that were sampled for these episodes."""
        self.tokens["sampled"] += sum(u.sampled_tokens for e in episodes for u in e.usage.values())

    def trained(self, tokens: int) -> None:
        """Count tokens that were trained."""
        self.tokens["trained"] += tokens

    # a step

    def collected(
        self,
        step: int,
        episodes: Sequence[Episode],
        metric: str,
        seconds: float,
        row: Mapping[str, Any],
    ) -> None:
        """The step's episodes are there, after so many seconds. `row`: more of its metrics. Raises
        `RunError` if there is nothing to learn from."""
        self.spend("rollout", seconds)
        self._row = {**collection_row(step, episodes, metric, self.warn, seconds), **row}
        self.tokens["sampled"] += self._row["sampled_tokens"]

    def watch(
        self, sequences: Sequence[TrainingSequence], loss: LossFn
    ) -> tuple[LossFn, dict[str, torch.Tensor]]:
        """The same loss, noting every token's ratio; give what it notes to `updated`."""
        return self.token_log.watch(sequences, loss)

    def updated(
        self,
        step: int,
        results: Mapping[str, UpdateResult],
        sequences: Sequence[TrainingSequence],
        ratios: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """An update is done. What was not finite is dumped; the third step in a row raises
        `RunError`. `ratios`: of an update of policies, whose tokens count as trained."""
        for policy, result in results.items():
            if result.moved is not None and result.applied and result.moved < FEW_NATS:
                self.warn(
                    f"policy {policy!r}: the first update moved its trained tokens by"
                    f" {result.moved:.1e} nat (below 1e-3); learning_rate {result.learning_rate:g}"
                    " may be too small for a LoRA"
                )
        problems = {p: result.problem for p, result in results.items() if not result.applied}
        if problems:
            self._dump(step, problems, sequences)
        if ratios is not None:
            self.token_log.add(sequences, ratios)
            self.trained(sum(result.tokens for result in results.values()))

    def _dump(
        self, step: int, problems: Mapping[str, str], sequences: Sequence[TrainingSequence]
    ) -> None:
        if self._not_finite != step:  # a method may update several times a step
            self.aborted, self._not_finite = self.aborted + 1, step
        path = self.config.folder / "dumps" / f"step-{step:06d}.json"
        if self.main:
            samples = [sample_to_json(s) for s in sequences if s.policy in problems]
            ckpt.write_json(path, {"problems": problems, "samples": samples})
        self.warn(f"step {step}: not finite for {problems}; no update there, samples in {path}")
        if self.aborted >= 3:
            raise RunError(f"three steps in a row were not finite; samples of the last one: {path}")

    def finished(self, step: int) -> None:
        """The step counts as done (on every rank)."""
        self.step = step
        if self._not_finite != step:
            self.aborted = 0

    def write_step(
        self, metrics: Mapping[str, Any], verified: Mapping[str, Any], seconds: float
    ) -> dict[str, Any]:
        """Write the finished step's rows to metrics.jsonl and learned.jsonl (rank 0), after so many
        seconds of publishing; the row."""
        self.spend("publish", seconds)
        collected, self._row = self._row, {}  # a method may play by other means in the next step
        seen = {"step": self.step, **collected, "proof": verified}
        row = {**seen, **metrics, "seconds": dict(self.seconds)}
        run_folder.append_row(self.config.folder / "metrics.jsonl", row)
        self.token_log.write(self.config.folder / "learned.jsonl", self.step)
        return row

    def show_step(self, row: Mapping[str, Any]) -> None:
        """Give a finished step's row to trackers and progress (rank 0)."""
        self.track(row)
        self.progress.step(self.step, row)

    def raise_alarms(self, rows: Mapping[str, Mapping[str, Any]]) -> str:
        """Warn of what goes wrong in the finished step's rows by policy; a reason to stop, or
        ""."""
        step = self.step
        stale = self.config.max_staleness > 0 and step > 1
        advice = settings_to_change(dataclasses.asdict(self.config))
        warnings, reason = self.alarms.check(rows, stale, advice)
        for warning in warnings:
            self.warn(f"step {step}: {warning}")
        return reason

    def finding(self) -> str:
        """What the run did not learn and why, from its metrics so far; "" if every policy learnt
        (rank 0)."""
        rows = list(json_lines(self.config.folder / "metrics.jsonl"))
        return learnt_nothing(rows, dataclasses.asdict(self.config))

    def record_verification(self, records: list[dict[str, object]]) -> None:
        """Write `proofs.json`: every verification of the run so far (rank 0). A checkpoint holds
        them too, so that they need not outlast a crash of the machine here."""
        ckpt.write_json(self.config.folder / "proofs.json", records, durable=False)

    def drop_rows_after_step(self) -> None:
        """Of a run that was cut off: drop rows of steps that are done again (rank 0). The trend
        that is shown goes on from those that are left."""
        for name in ("metrics.jsonl", "learned.jsonl"):
            run_folder.drop_rows_after(self.config.folder / name, self.step)
        rows = json_lines(self.config.folder / "metrics.jsonl")
        self.progress.go_on(float(row["reward"]) for row in rows if row.get("reward") is not None)

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The part of `state.json` that is the log's."""
        self.clock()
        return {
            "step": self.step,
            "done": self.done,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "monitor": self.alarms.to_json(),
            "aborted": self.aborted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.aborted = state["step"], state["aborted"]
        self.done = state.get("done", "")  # 0.1 did not know it
        self.tokens, self.seconds = state["tokens"], state["seconds"]
        self.alarms = Alarms(**state["monitor"])
