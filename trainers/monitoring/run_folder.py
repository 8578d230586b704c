"""What a run checks before it starts and writes down as it goes: plain functions, so that `run.py`
is the run itself."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...agents.team import System, derive_seed
from ...agents.types import SettingError, Task, to_json
from ...rollouts.evaluation.accuracy import Evaluation, paired
from ...rollouts.report.episode_index import Pieces
from ...rollouts.tasks.registry import split_hash
from .. import checkpoint as ckpt
from ..config import RunConfig

if TYPE_CHECKING:
    from ..loop.run import Run


def check_importable(system: System) -> None:
    """Refuse a System that a checkpoint could not name: evaluation has to import it again."""
    cls = type(system)
    try:
        module = importlib.import_module(cls.__module__) if cls.__module__ != "__main__" else None
    except ImportError:  # it came from a place that is on no path
        module = None
    if (
        module is None
        or "<locals>" in cls.__qualname__
        or getattr(module, cls.__qualname__, None) is not cls
    ):
        raise SettingError(
            f"system {cls.__qualname__} is defined in"
            f" {cls.__module__}{' (inside a function)' if '<locals>' in cls.__qualname__ else ''}:"
            " put the class at the top of a module of its own, so that checkpoints can import it"
        )


def check_tasks(train: Sequence[Task], held_out: Sequence[Task], config: RunConfig) -> None:
    for name, found in (("training", train), ("held-out", held_out)):
        if not found:
            raise SettingError(f"tasks {config.tasks!r}: the {name} split is empty")
    both = {task.id for task in train} & {task.id for task in held_out}
    if both:
        raise SettingError(
            f"tasks {config.tasks!r}: {len(both)} held-out tasks are also trained on, such as"
            f" {sorted(both)[0]!r}"
        )


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """One line of a log. See `checkpoint.append_text`."""
    ckpt.append_text(path, json.dumps(finite(to_json(row)), allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A JSON value in which numbers that are not finite are null: NaN is not JSON, and other
    readers refuse it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_rows_after(path: Path, step: int) -> None:
    """After a kill, metrics may be ahead of the checkpoint; those steps are done again."""
    if path.exists():
        rows = []
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue  # the line that the kill tore
        ckpt.write_text(
            path, "".join(f"{json.dumps(row)}\n" for row in rows if row["step"] <= step)
        )


def split_of(run: Run) -> dict[str, Any]:
    """What `system.json` says of the task set."""
    return {
        "name": "" if run.tasks_given else run.config.tasks,
        "args": run.config.task_args,
        "seed": run.config.seed,
        "num_eval_tasks": len(run.eval_tasks),
        "train": split_hash(run.tasks),
        "eval": split_hash(run.eval_tasks),
    }


def tasks_of(tasks: Sequence[Task], count: int, seed: int, step: int) -> list[Task]:
    """The tasks of a step: a pure function of seed and step, so nothing that fails or is dropped
    can hold the cursor."""
    count, size = min(count, len(tasks)), len(tasks)
    chosen: list[Task] = []
    for at in range((step - 1) * count, step * count):
        epoch, place = divmod(at, size)
        order = list(range(size))
        random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
        chosen.append(tasks[order[place]])
    return list({task.id: task for task in chosen}.values())


def pieces_of(run: Run) -> Pieces:
    """The text of every token, for the report; a policy without a base of its own is read with the
    first one's tokenizer."""
    of = {policy: base.tokens for base in run.bases.values() for policy in base.policies}
    usual = next(iter(run.bases.values())).tokens

    @functools.cache
    def piece(policy: str, token: int) -> str:
        return of.get(policy, usual).show([token])

    return lambda policy, ids: [piece(policy, token) for token in ids]


def write_config(run: Run) -> None:
    """`config.yaml`: the resolved settings; it works as `--config` of another run."""
    import yaml

    settings = {f.name: getattr(run.config, f.name) for f in dataclasses.fields(run.config)}
    settings |= {
        "resume": False,
        "overwrite": False,
        "dry_run": False,
        "serve_only": False,
    }  # of one call, not of the run
    cls = type(run.system)
    names = [agent.name for agent in run.system.specs]
    settings["system"] = {
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "agents": names,
        **run.system.arguments(),
    }
    settings["agents"] = {
        a.name: {k: v for k, v in to_json(a).items() if k != "name"} for a in run.system.specs
    }
    ckpt.write_text(
        run.config.folder / "config.yaml",
        yaml.safe_dump(to_json(settings), sort_keys=False, allow_unicode=True),
    )


def summary(run: Run, before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    """What `summary.json` says of a run, with every pinned key."""
    publishers = [base.publisher for base in run.bases.values() if base.publisher]
    proofs = [publisher.summary() for publisher in publishers]
    total = {
        key: sum(p[key] for p in proofs) for key in ("checks", "passed", "untrained", "failed")
    }
    policies = {}
    for base in run.bases.values():
        for name in base.policies:
            count = (
                sum(p.numel() for p in base.adapters.parameters(name).values())
                if base.adapters.policies[name].trainable
                else 0
            )
            policies[name] = {
                "trainable_parameters": count,
                "sha256_before": run.before[name],
                "sha256_after": base.adapters.sha256(name),
            }
    heads = {
        head.spec.name: {
            "trainable_parameters": sum(p.numel() for p in head.parameters().values()),
            "sha256_before": run.before[head.adapter],
            "sha256_after": head.sha256(),
        }
        for base in run.bases.values()
        for head in base.heads.values()
    }
    return {
        "recipe": run.recipe,
        "model": run.config.model,
        "engine": publishers[0].engine.info().kind if publishers else "none",
        "steps": run.step,
        "seconds": run.seconds,
        "tokens": run.tokens,
        "policies": policies,
        **({"heads": heads} if heads else {}),
        "live_proof": {
            **total,
            "max_residual": max((p["max_residual"] for p in proofs), default=0.0),
        },
        "eval": {
            "before": before.summary() if before else None,
            "after": after.summary() if after else None,
            "paired": paired(before, after) if before and after else None,
        },
    }
