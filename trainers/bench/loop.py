"""`marlora bench loop`: whole steps of marlora and of TRL's `GRPOTrainer`: sample, score, learn and
publish.

One agent (TRL's trainer has one), the same model, tasks, LoRA, group size, reply length and reward.
They step in turns in one process. Ours publishes every step and verifies it. TRL samples with
`generate` of transformers: it cannot bring weights to a vLLM server on a CPU. The only gate is that
both sampled as many replies and moved their adapter; what is sampled differs, so tokens are given
too.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...agents.patterns.chain import Chain
from ...agents.types import SettingError, Task
from ...rollouts.engines.hardware import choose_dtype, has_gpu
from ...rollouts.types import Episode
from ..errors import RunError
from ..methods.policy_gradient.grpo import GRPOConfig, GRPOTrainer
from .geometry import served_folder
from .measure import Options, machine, table
from .publish import engines


@dataclass(frozen=True)
class Work:
    """Of one step: `tasks` of `group` replies each, of at most `reply` tokens."""

    tasks: int
    group: int
    reply: int


WORK = {"tiny": Work(2, 4, 8)}
USUAL = Work(4, 8, 16)
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
RATE = 1e-4
COMLRL = Path(__file__).parents[2] / "benchmarks" / "scripts" / "comlrl_steps.py"


@dataclass
class Baton:
    """Two loops in two threads, of which one has its turn; `laps`: seconds of every turn that ended
    at the next call, by name."""

    order: list[str]
    laps: dict[str, list[float]] = field(default_factory=dict)
    error: BaseException | None = None
    _change: threading.Condition = field(default_factory=threading.Condition)
    _since: float | None = None

    def take(self, name: str) -> None:
        """Wait for the first turn. It begins with what comes before the first step, which is not
        counted."""
        with self._change:
            self._wait(name)

    def step(self, name: str) -> None:
        """A step begins, and so the one before it has ended: give the turn away, and wait for it to
        come back."""
        with self._change:
            if self._since is not None and self.order[:1] == [name]:
                self.laps.setdefault(name, []).append(time.perf_counter() - self._since)
                self._since = None
                self.order.append(self.order.pop(0))
                self._change.notify_all()
            self._wait(name)
            self._since = time.perf_counter()

    def _wait(self, name: str) -> None:
        while self.order[:1] != [name]:
            if self.error is not None:
                raise RunError("bench loop: the other loop failed") from self.error
            self._change.wait(timeout=1.0)

    def leave(self, name: str, error: BaseException | None = None) -> None:
        """The loop has ended; the other one goes on alone. The step that ends with it is not
        counted: it saves, or evaluates."""
        with self._change:
            self.order.remove(name)
            self.error, self._since = error or self.error, None
            self._change.notify_all()


class _Ours(GRPOTrainer):
    """Tells when a step begins."""

    begin: Callable[[], None]

    def collect(self, step: int) -> list[Episode]:
        self.begin()
        return super().collect(step)


def reward(text: str) -> float:
    """Differs between replies whatever a model can: there is always something to learn."""
    return sum(text.encode()) % 7 / 6


def loop(options: Options) -> dict[str, Any]:
    """Seconds of a step and tokens sampled per second, ours on every engine that is here against
    TRL."""
    work = WORK.get(options.size, USUAL)
    results = {}
    for kind in engines(options):
        with tempfile.TemporaryDirectory(prefix="marlora-bench-") as scratch:
            results[kind] = _race(kind, Path(scratch), work, options)
    rows = [
        [
            kind,
            name,
            f"{one['seconds']:.2f}",
            f"{one['tokens_per_step']:.0f}",
            f"{one['tokens_per_second']:.1f}",
        ]
        for kind, both in results.items()
        for name, one in both.items()
    ]
    ratios = {
        f"trl@{kind}": both["trl"]["seconds"] / both["ours"]["seconds"]
        for kind, both in results.items()
    }
    ratios |= {
        f"trl_per_token@{k}": b["ours"]["tokens_per_second"] / b["trl"]["tokens_per_second"]
        for k, b in results.items()
    }
    comlrl = {}
    if "comlrl" in options.opponents:
        comlrl = _against_comlrl(options, work)
        ratios["comlrl@transformers"] = comlrl["comlrl"]["seconds"] / comlrl["ours"]["seconds"]
    columns = ["our engine", "whose step", "median, s", "tokens sampled", "tokens/s"]
    return {
        "suite": "loop",
        "size": options.size,
        "clock": "wall",
        **machine(),
        "work": vars(work),
        "results": results,
        "two_agents": comlrl,
        "ratios": ratios,
        **table(f"loop: {options.size}, {work.tasks} x {work.group} replies a step", columns, rows),
    }


def _against_comlrl(options: Options, work: Work) -> dict[str, dict[str, float]]:
    """{"ours" | "comlrl": seconds of a step and peak memory}, by a script of a checkout, since it
    installs a package. Raises `RunError` with the words of the script."""
    if not COMLRL.is_file():
        raise SettingError(
            f"--opponents comlrl: {COMLRL} is missing; it installs a package and is no part of an"
            " installed marlora, so run this from a checkout"
        )
    with tempfile.TemporaryDirectory(prefix="marlora-bench-") as scratch:
        model = served_folder(options.size, Path(scratch))
        shape = (model, work.group, work.reply, options.repeats + 2, scratch)
        argv = [sys.executable, str(COMLRL), "both", *map(str, shape)]
        done = subprocess.run(
            argv, capture_output=True, text=True, encoding="utf-8", errors="replace"
        )
    if done.returncode:
        raise RunError(
            f"bench loop: {COMLRL.name} failed; no numbers are given\n{done.stderr[-2000:]}"
        )
    results: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return results


def _race(kind: str, folder: Path, work: Work, options: Options) -> dict[str, dict[str, float]]:
    model, steps = (
        served_folder(options.size, folder),
        options.repeats + 2,
    )  # the first warms up, the last is not counted
    tasks = [Task(str(k), f"{k} + {k + 3}", split="train") for k in range(work.tasks * steps)]
    baton = Baton(["ours", "trl"])
    ours = _Ours(
        model=model,
        system=Chain(["solver"]),
        tasks=tasks,
        eval_tasks=[Task("held-out", "1 + 1", split="eval")],
        rewards=[lambda task, episode: reward(str(episode.output))],
        args=GRPOConfig(
            output_dir=str(folder / "ours"),
            engine=kind,
            max_steps=steps,
            tasks_per_step=work.tasks,
            num_generations=work.group,
            max_completion_length=work.reply,
            learning_rate=RATE,
            save_every=10**6,
            num_eval_tasks=1,
            max_model_len=512,
        ),
    )
    ours.begin = lambda: baton.step("ours")
    tokens: list[int] = []
    trainer = _trl_trainer(model, folder, work, steps, tasks, tokens, lambda: baton.step("trl"))
    other = threading.Thread(target=_trl, args=(baton, trainer, steps, tokens), name="trl")
    other.start()
    try:
        summary = ours.train()
    except BaseException as error:
        baton.leave("ours", error)
        raise
    baton.leave("ours")
    other.join()
    if baton.error is not None:
        raise RunError(
            f"bench loop: TRL's trainer failed ({baton.error}); no numbers are given"
        ) from baton.error
    if any(p["sha256_before"] == p["sha256_after"] for p in summary["policies"].values()):
        raise RunError("bench loop: our adapter did not move; no numbers are given")
    played = [
        json.loads(line)["sampled_tokens"]
        for line in (folder / "ours" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    per_step = {"ours": statistics.mean(played[1:-1]), "trl": statistics.mean(tokens[1:-1])}
    return {
        name: {
            "seconds": (s := statistics.median(baton.laps[name][1:])),
            "tokens_per_step": n,
            "tokens_per_second": n / s,
        }
        for name, n in per_step.items()
    }


def _trl(baton: Baton, trainer: Any, steps: int, tokens: Sequence[int]) -> None:
    """TRL's loop, in a thread of its own. It has put into `tokens` how many each step sampled."""
    try:
        baton.take("trl")
        before = {
            n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad
        }
        trainer.train()
        moved = any(
            bool((p != before[n]).any()) for n, p in trainer.model.named_parameters() if n in before
        )
        if not moved or len(tokens) != steps:
            raise RunError(
                f"its adapter moved: {moved}; {len(tokens)} of {steps} batches were scored"
            )
    except BaseException as error:
        baton.leave("trl", error)
    else:
        baton.leave("trl")


def _trl_trainer(
    model: str,
    folder: Path,
    work: Work,
    steps: int,
    tasks: Sequence[Task],
    tokens: list[int],
    begin: Callable[[], None],
) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig as TRLConfig
    from trl import GRPOTrainer as TRLTrainer

    class Begin(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            begin()

    def score(
        completions: Any, completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [reward(reply[0]["content"]) for reply in completions]

    args = TRLConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=work.tasks * work.group,
        num_generations=work.group,
        gradient_accumulation_steps=1,
        max_completion_length=work.reply,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        beta=0.0,
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
    )
    dtype = getattr(torch, choose_dtype(model, "auto", on_gpu=has_gpu()))
    return TRLTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
        reward_funcs=score,
        args=args,
        callbacks=[Begin()],
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": task.prompt}] for task in tasks]}
        ),
    )
