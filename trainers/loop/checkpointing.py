"""From a run to a checkpoint and back: what is written where, and what must fit when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from ...agents.types import SettingError, to_json
from ...rollouts.files import files_sha256
from ...rollouts.rewards.builtin import reward_name
from .. import checkpoint as ckpt
from ..model.base_models import versions
from ..monitoring.alarms import Alarms
from .summary import split_of

if TYPE_CHECKING:
    from .run import Run


def system_json(run: Run) -> dict[str, Any]:
    """All that `marlora eval` needs: base, system, agents, policies, values, adapters by hash,
    tasks, rewards, versions."""
    cls = type(run.system)
    return {
        "schema": ckpt.SCHEMA,
        "recipe": run.recipe,
        "step": run.step,
        "base": {"name": run.config.model, "sha256": run.base_hashes.get(run.config.model)},
        "bases": {
            n: {
                "sha256": run.base_hashes[n],
                "files": files_sha256(b.path),
                "template": b.tokens.template_hash,
                "policies": list(b.policies),
            }
            for n, b in run.bases.items()
        },
        "system": {
            "class": f"{cls.__module__}:{cls.__qualname__}",
            "arguments": run.system.arguments(),
        },
        "agents": to_json(run.system.specs),
        "policies": {name: to_json(spec) for name, spec in run.policies.items()},
        "values": sorted(run.values),
        "adapters": {
            p: {"sha256": b.adapters.sha256(p), "trained": b.adapters.is_trained(p)}
            for b in run.bases.values()
            for p in b.policies
        },
        "tasks": split_of(run),
        "rewards": [reward_name(r) for r in run.rewards],
        "sampling": to_json(run.config.sampling()),
        "versions": versions(),
    }


def save_checkpoint(run: Run) -> Path:
    """`checkpoints/step-NNNNNN` of the run: see `checkpoint.publish_folder` for what a kill
    leaves."""

    def write(folder: Path) -> None:
        ckpt.write_json(folder / "system.json", system_json(run))
        (folder / "values").mkdir()
        for name, value in run.values.items():
            ckpt.write_json(folder / "values" / f"{name}.json", to_json(value))
        (folder / "trainer").mkdir()
        for base in run.bases.values():
            for policy in base.policies:
                base.adapters.save(policy, folder / "adapters" / policy)
            for policy in base.adapters.trainable:
                ckpt.write_tensors(
                    folder / "trainer" / f"{policy}.safetensors", base.optimizers.state(policy)
                )
            for head in base.heads.values():
                path = head.save(folder / "trainer" / "heads" / head.spec.name)
                ckpt.write_tensors(path / "optimizer.safetensors", head.state())
        run.clock()
        state = {
            "step": run.step,
            "tokens": run.tokens,
            "seconds": run.seconds,
            "credit": run.credit_state,
            "monitor": run.monitor.to_json(),
            "evals": run.evals,
            "best": run.best,
            "heads": {
                h.spec.name: h.sha256() for b in run.bases.values() for h in b.heads.values()
            },
            "sha256_before": run.before,
            "aborted": run.aborted,
            "seed": run.config.seed,
            "proofs": {
                name: base.publisher.to_json() for name, base in run.bases.items() if base.publisher
            },
            "versions": {
                name: base.publisher.versions for name, base in run.bases.items() if base.publisher
            },
            "team": run.stage.team.of,
        }
        ckpt.write_json(folder / "trainer" / "state.json", state)

    return ckpt.publish_folder(run.config.folder / "checkpoints" / f"step-{run.step:06d}", write)


def restore(run: Run, folder: Path) -> None:
    """Put adapters, optimizers, values and counters back. Raises `SettingError` where checkpoint
    and settings do not fit."""
    system, state = (
        ckpt.read_system(folder),
        json.loads((folder / "trainer" / "state.json").read_text()),
    )
    for name, base in run.bases.items():
        saved = system["bases"].get(name)
        if saved is None:
            raise SettingError(
                f"{folder}: made for base {', '.join(system['bases'])}, this run's is {name};"
                " resume with the same model"
            )
        if saved["sha256"] != run.base_hashes[name]:
            raise SettingError(
                f"{folder}: made for base {name} with other weights (sha256 differs); resume with"
                " the same model"
            )
        if saved["template"] != base.tokens.template_hash:
            raise SettingError(
                f"{folder}: the chat template of {name} has changed since; resume with the same"
                " tokenizer"
            )
    if state["seed"] != run.config.seed:
        raise SettingError(
            f"seed: the run began with {state['seed']}, got {run.config.seed}; its tasks and"
            " samples follow from it"
        )
    for base in run.bases.values():
        for policy in base.policies:
            if policy not in system["adapters"]:
                raise SettingError(
                    f"{folder}: holds no adapter {policy!r}; it has {', '.join(system['adapters'])}"
                )
            base.adapters.load(policy, folder / "adapters" / policy)
            if base.adapters.sha256(policy) != system["adapters"][policy]["sha256"]:
                raise SettingError(f"{folder}: adapter {policy!r} is not the one system.json names")
        for policy in base.adapters.trainable:
            path = folder / "trainer" / f"{policy}.safetensors"
            if not path.exists():
                raise SettingError(
                    f"{folder}: no optimizer state of {policy!r}; it was not trainable in the"
                    " earlier run"
                )
            base.optimizers.load(policy, load_file(path))
        for name, head in base.heads.items():
            path = folder / "trainer" / "heads" / name
            if not path.is_dir():
                raise SettingError(
                    f"{folder}: holds no head {name!r}; the earlier run was of another method or of"
                    " other settings"
                )
            head.load(path)
            head.load_state(load_file(path / "optimizer.safetensors"))
            if head.sha256() != state["heads"][name]:
                raise SettingError(f"{folder}: head {name!r} is not the one that state.json names")
    run.values.update(
        {
            path.stem: json.loads(path.read_text())
            for path in sorted((folder / "values").glob("*.json"))
        }
    )
    run.step, run.tokens, run.seconds, run.aborted = (
        state["step"],
        state["tokens"],
        state["seconds"],
        state["aborted"],
    )
    run.credit_state.update(state["credit"])
    run.monitor = Alarms(**state["monitor"])
    run.earlier_proofs, run.earlier_versions = state["proofs"], state["versions"]
    # absent in checkpoints from before runs could play ahead
    run.earlier_team = {int(step): version for step, version in state.get("team", {}).items()}
    run.evals, run.best, run.before = (
        state["evals"],
        tuple(state["best"]) if state["best"] else None,
        state["sha256_before"],
    )
