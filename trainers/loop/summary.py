"""What a run writes at its start and end: config.yaml and summary.json."""

from __future__ import annotations

import dataclasses
import functools
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...agents.state import TeamState
from ...agents.types import to_json
from ...rollouts import files
from ...rollouts.evaluation.statistics import Evaluation, paired
from ...rollouts.ledger import Ledger
from ...rollouts.report.episode_index import Pieces
from ...rollouts.rewards.builtin import REWARDS
from ...rollouts.rewards.scoring import RewardFn, fn_name
from ...rollouts.tasks.registry import split_hash
from ..monitoring.run_log import RunLog
from ..update.learner import Learner
from ..update.learner_base import LearnerBase
from ..values.parts import json_sha256
from ..weight_sync.sync import WeightSync
from .spec import RunSpec

ACCURACIES = ("correct", "exact", "close", "em", "right")  # rewards of ours that are 1 or 0


def split_of(spec: RunSpec) -> dict[str, Any]:
    """What `system.json` says of the task set."""
    return {
        "name": "" if spec.tasks_given else spec.config.tasks,
        "args": spec.config.task_args,
        "seed": spec.config.seed,
        "num_eval_tasks": len(spec.eval_tasks),
        "train": split_hash(spec.tasks),
        "eval": split_hash(spec.eval_tasks),
    }


def pieces_of(bases: Mapping[str, LearnerBase]) -> Pieces:
    """The text of every token, for the report; a policy without a base of its own is read with the
    first one's tokenizer. Without any base there are no tokens."""
    if not bases:
        return lambda policy, ids: None
    of = {policy: base.tokens for base in bases.values() for policy in base.policies}
    usual = next(iter(bases.values())).tokens

    @functools.cache
    def piece(policy: str, token: int) -> str:
        return of.get(policy, usual).show([token])

    return lambda policy, ids: [piece(policy, token) for token in ids]


def resolved_settings(spec: RunSpec) -> dict[str, Any]:
    """The settings as they were resolved; they work as `--config` of another run."""
    config, system = spec.config, spec.system
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    settings |= {
        "resume": False,
        "overwrite": False,
        "dry_run": False,
        "serve_only": False,
    }  # of one call, not of the run
    cls = type(system)
    settings["system"] = {
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "agents": [agent.name for agent in system.specs],
        **system.arguments(),
    }
    settings["agents"] = {
        a.name: {k: v for k, v in to_json(a).items() if k != "name"} for a in system.specs
    }
    plain: dict[str, Any] = to_json(settings)
    return plain


def write_config(spec: RunSpec) -> None:
    """`config.yaml`: the recipe, where it has a name, the resolved settings, and the folders of
    code of the user's own (`imports`), from which `marlora train RUN` and the commands that open a
    checkpoint of the run import it again."""
    import yaml

    own: dict[str, Any] = {"recipe": spec.recipe} if spec.recipe else {}
    if folders := code_folders([type(spec.system), *spec.rewards]):
        own["imports"] = folders
    files.write_text(
        spec.config.folder / "config.yaml",
        yaml.safe_dump({**own, **resolved_settings(spec)}, sort_keys=False, allow_unicode=True),
    )


def code_folders(things: Iterable[Any]) -> list[str]:
    """The folders, absolute, that have to be on the import path for these classes and functions:
    those outside marlora and outside what is installed."""
    installed = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    found: dict[str, None] = {}
    for thing in things:
        top = thing.__module__.partition(".")[0]
        module = sys.modules.get(top)
        places = [*getattr(module, "__path__", ())] or [getattr(module, "__file__", None)]
        if top in ("__main__", __name__.partition(".")[0]) or places[0] is None:
            continue
        folder = Path(places[0]).absolute().parent
        if not installed & {folder, *folder.parents}:
            found[str(folder)] = None
    return list(found)


def summary(
    spec: RunSpec,
    learner: Learner,
    sync: WeightSync,
    log: RunLog,
    before: Evaluation | None,
    after: Evaluation | None,
) -> dict[str, Any]:
    """What `summary.json` says of a run, with every pinned key."""
    publishers = list(sync.publishers.values())
    proofs = [publisher.summary() for publisher in publishers]
    total = {
        key: sum(p[key] for p in proofs) for key in ("checks", "passed", "untrained", "failed")
    }
    identity = sum(p.get("identity", 0) for p in proofs)
    heads = {
        head.spec.name: {
            "trainable_parameters": sum(p.numel() for p in head.parameters().values()),
            "sha256_before": learner.before[head.adapter],
            "sha256_after": head.sha256(),
        }
        for base in learner.bases.values()
        for head in base.heads.values()
    }
    return {
        "recipe": spec.recipe,
        "model": spec.config.model,
        "engine": publishers[0].engine.info().kind if publishers else "none",
        "measured": measured_name(spec.rewards[0]),
        "steps": log.step,
        "done": log.done,
        "seconds": log.seconds,
        "tokens": log.tokens,
        "policies": _policies(learner),
        **({"heads": heads} if heads else {}),
        "live_proof": {
            **total,
            "max_residual": max((p["max_residual"] for p in proofs), default=0.0),
            **({"identity": identity} if identity else {}),
        },
        "eval": {
            "before": before.summary() if before else None,
            "after": after.summary() if after else None,
            "paired": paired(before, after) if before and after else None,
        },
    }


def spent(ledger: Ledger, tokens: Mapping[str, int]) -> dict[str, Any]:
    """What a run has cost: by kind and agent, by policy, and against its budget. `tokens` of the
    summary: what was sampled for learning, by whatever kind of episode."""
    rows = ledger.rows()
    sampled = sum(
        row["sampled_tokens"]
        for kind, own in rows.items()
        if kind != "eval"
        for row in own.values()
    )
    return {
        "ledger": rows,
        "ledger_by_policy": ledger.by_policy(),
        "budget": ledger.to_json(),
        "tokens": {**tokens, "sampled": sampled},
    }


def state_of(origin: TeamState, state: TeamState) -> dict[str, Any]:
    """The state's key, and the hashes of every value before and after ("": not there)."""
    names = sorted({*origin.values, *state.values})
    hashes = {
        name: {
            "sha256_before": json_sha256(origin.values[name]) if name in origin.values else "",
            "sha256_after": json_sha256(state.values[name]) if name in state.values else "",
        }
        for name in names
    }
    return {"state": {"key": state.key, "values": hashes}}


def measured_name(reward: RewardFn) -> str:
    """What the mean of a reward is called: `accuracy` where it says whether an answer is right,
    else the reward's name; a judge's score is no accuracy."""
    name = fn_name(reward)
    return "accuracy" if name in ACCURACIES and REWARDS[name] is reward else f"{name} (mean)"


def _policies(learner: Learner) -> dict[str, dict[str, Any]]:
    """By policy, how much of it learns, and its hash before and after."""
    rows: dict[str, dict[str, Any]] = {}
    for base in learner.bases.values():
        for name in base.policies:
            trainable = base.adapters.policies[name].trainable
            parameters = base.adapters.parameters(name).values() if trainable else ()
            rows[name] = {
                "trainable_parameters": sum(p.numel() for p in parameters),
                "sha256_before": learner.before[name],
                "sha256_after": base.adapters.sha256(name),
            }
    return rows
