"""What a run writes at its start and end: config.yaml and summary.json."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from ...agents.types import to_json
from ...rollouts import files
from ...rollouts.evaluation.statistics import Evaluation, paired
from ...rollouts.report.episode_index import Pieces
from ...rollouts.tasks.registry import split_hash

if TYPE_CHECKING:
    from .run import Run


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
    files.write_text(
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
