"""A GRPO run so small that it can be killed twenty times: two agents on a random model, a few
steps, one core.

`python -m tests.trainers.small_run` reads one run per line as JSON from stdin (or, with `argv`, one
`marlora` command), plays it in a forked child (so that the imports are paid once) and answers with
the child's exit code; -9 is a SIGKILL. `fault` names a function; at its `at`-th call, before the
call or after it, the child sends itself a signal, tears the line it is writing and dies, or finds
the disk full. `fault` "file call" counts file-system calls instead (`tests/chaos/file_calls.py`).
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal as signals
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from marlora.agents.types import Task
from marlora.recipes.cli import main
from marlora.recipes.launch import settings
from marlora.rollouts.episodes.completers import EngineCompleter
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.rollouts.types import Episode
from marlora.trainers import checkpoint
from marlora.trainers.loop import checkpointing
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig, GRPOTrainer
from marlora.trainers.monitoring import run_folder
from marlora.trainers.testbeds.tiny import tiny_chain
from marlora.trainers.update import learner
from marlora.trainers.weight_sync import publisher
from tests.chaos import file_calls
from tests.repository import ROOT

STEPS, EPISODES, EVAL = 3, 6, 2  # training steps, episodes of each, episodes of an evaluation

FILE_CALL = "file call"
# name -> (owner, attribute): functions that a run calls again and again
FAULTS: dict[str, tuple[Any, str]] = {
    "fsync": (os, "fsync"),  # every write that is to last: episodes, versions, files of checkpoints
    "torn line": (os, "write"),  # of episodes: nothing else is written through it
    "store": (Store, "extend"),
    "speak": (EngineCompleter, "__call__"),
    "learn": (learner.Learner, "learn"),
    "publish": (publisher.Publisher, "publish"),
    "prove": (publisher.Publisher, "verify"),
    "metrics": (run_folder, "append_row"),
    "optimizer file": (checkpoint, "write_tensors"),
    "rename": (Path, "rename"),
    "save": (checkpointing.ckpt, "publish_folder"),
    "prune": (checkpoint, "prune"),
    "delete": (shutil, "rmtree"),
    "step": (torch.optim.AdamW, "step"),
}


def bytes_mod_7(task: Task, episode: Episode) -> float:
    """A reward that no model has learnt and that differs between replies: there is always something
    to learn."""
    return sum(str(episode.output).encode()) % 7 / 6


def config(folder: str | Path, model: str | Path, **changes: Any) -> GRPOConfig:
    small: dict[str, Any] = dict(
        output_dir=str(folder),
        model=str(model),
        engine="transformers",
        num_eval_tasks=EVAL,
        max_steps=STEPS,
        tasks_per_step=EPISODES // 3,
        num_generations=3,
        max_completion_length=4,
        lora_r=4,
        lora_alpha=8.0,
        learning_rate=1e-2,
        lora_target_modules=["q_proj", "v_proj"],
        save_every=1,
        save_total_limit=2,
        proof_every=3,
    )
    return GRPOConfig(**{**small, **changes})


def trainer(folder: str | Path, model: str | Path, **changes: Any) -> GRPOTrainer:
    settings = config(folder, model, **changes)
    tasks, held_out = tiny_tasks()[:40], tiny_tasks("eval")[:EVAL]
    return GRPOTrainer(
        system=tiny_chain(), tasks=tasks, eval_tasks=held_out, rewards=[bytes_mod_7], args=settings
    )


def set_fault(name: str, at: int, signal: str, after: bool) -> Callable[[], int]:
    """Let `signal` (or ENOSPC) strike at the `at`-th call of the named function (0: never). Returns
    the counter of calls."""
    owner, attribute = FAULTS[name]
    real, calls = getattr(owner, attribute), [0]

    def strike() -> None:
        if signal == "ENOSPC":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        number, *again = signal.split()
        for _ in range(2 if again else 1):
            os.kill(os.getpid(), signals.Signals[number])

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at and name == "torn line":
            real(args[0], bytes(args[1])[: len(args[1]) // 2])
        if calls[0] == at and not after:
            strike()
        result = real(*args, **kwargs)
        if calls[0] == at and after:
            strike()
        return result

    setattr(owner, attribute, counted)
    return lambda: calls[0]


def play(
    folder: str,
    model: str,
    fault: str = "",
    at: int | str = 0,
    signal: str = "SIGKILL",
    after: bool = False,
    half: bool = False,
    argv: Sequence[str] = (),
    made_by: str = "tests.trainers.small_run:trainer",
    **changes: Any,
) -> None:
    torch.set_num_threads(1)
    if fault == FILE_CALL:
        count = file_calls.set_kill(Path(folder), at, half=half)
    else:
        count = set_fault(fault, int(at), signal, after) if fault else lambda: 0
    if argv:
        main.main(argv)
    else:
        module, _, name = made_by.partition(":")
        make = getattr(importlib.import_module(module), name)
        settings.run(lambda: make(Path(folder), Path(model), **changes).train())
    Path(f"{folder}.calls").write_text(str(count()))


def child(order: dict[str, Any]) -> int:
    """Play it in this process and tell the exit code; what it says goes to FOLDER.log."""
    log = os.open(f"{order['folder']}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ignored = order.pop(
        "ignored", []
    )  # signals that whoever starts the command has set to be ignored
    for name, usual in (
        ("SIGINT", signals.default_int_handler),
        ("SIGTERM", signals.SIG_DFL),
        ("SIGHUP", signals.SIG_DFL),
    ):
        signals.signal(signals.Signals[name], signals.SIG_IGN if name in ignored else usual)
    try:
        play(**order)
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def serve() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = child(json.loads(line))
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


@contextmanager
def runner() -> Iterator[Callable[..., int]]:
    """A function that plays one run in a process of its own and returns its exit code."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.trainers.small_run"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def ask(folder: Path, model: Path, **order: Any) -> int:
        stdin.write(json.dumps({"folder": str(folder), "model": str(model), **order}) + "\n")
        stdin.flush()
        return int(stdout.readline())

    try:
        yield ask
    finally:
        stdin.close()
        process.wait(60)
        stdout.close()


if __name__ == "__main__":
    serve()
