"""Checkpoints of a run: what is written where, and what must fit when it is read.

Each part of the run writes and reads its own state (`state_dict`, `load_state_dict`); this file
knows which files hold them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ...agents.types import SettingError, to_json
from ...rollouts.checkpoints.reader import ORIGIN, VALUES, read_values
from ...rollouts.files import files_sha256
from ...rollouts.ledger import NOTHING_SPENT, Ledger
from ...rollouts.rewards.builtin import reward_name
from ...rollouts.rewards.helpers import asked_helpers
from .. import checkpoint as ckpt
from ..errors import RunError
from ..model.base_models import versions
from ..monitoring.run_log import RunLog
from ..update.learner import Learner
from ..values.parts import Part, json_sha256, load_parts, save_parts
from ..weight_sync.sync import WeightSync
from .evaluator import Evaluator
from .spec import RunSpec
from .summary import split_of

STATE = (  # the keys of trainer/state.json, in their order
    "step",
    "tokens",
    "seconds",
    "credit",
    "monitor",
    "evals",
    "best",
    "heads",
    "sha256_before",
    "aborted",
    "seed",
    "proofs",
    "versions",
    "team",
    "origin",
    "done",
    "ledger",
    "parts",
)


class Stateful(Protocol):
    """Something of a run with a state of its own."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Checkpointer:
    """Writes and restores the checkpoints of a run.

    Args:
        spec: of the run; its config names folder, limit and seed.
        values: what a team sees of the run's state, by name; restored in place.
        parts: what the method learns beside weights.
        learner, sync, evaluator, log, ledger: whose state is kept.

    `saved`: the step whose checkpoint is on disk.
    """

    def __init__(
        self,
        spec: RunSpec,
        values: dict[str, Any],
        parts: Sequence[Part],
        *,
        learner: Learner,
        sync: WeightSync,
        evaluator: Evaluator,
        log: RunLog,
        ledger: Ledger,
    ) -> None:
        self.spec, self.values, self.parts, self.ledger = spec, values, parts, ledger
        self.learner, self.sync, self.evaluator, self.log = learner, sync, evaluator, log
        self.saved: int | None = None

    @property
    def stateful(self) -> tuple[Stateful, ...]:
        return (self.log, self.learner, self.evaluator, self.sync)

    @property
    def folder(self) -> Path:
        """The folder of the last finished step's checkpoint."""
        return self.spec.config.folder / "checkpoints" / f"step-{self.log.step:06d}"

    def save(self) -> Path:
        """Write a checkpoint of the last finished step and drop old ones (rank 0). See
        `checkpoint.publish_folder` for what a kill leaves. Raises `RunError` if the disk refuses.
        """
        config, best = self.spec.config, self.evaluator.best
        try:
            path = ckpt.publish_folder(self.folder, self._write)
            ckpt.prune(config.folder, config.save_total_limit, best[1] if best else None)
        except OSError as error:
            raise RunError(
                f"checkpoint of step {self.log.step} could not be written: {error}; earlier ones"
                " are whole"
            ) from error
        return path

    def _write(self, folder: Path) -> None:
        ckpt.write_json(folder / "system.json", self.system_json())
        ckpt.write_json(folder / "values" / VALUES, to_json(self.values))
        ckpt.write_json(folder / "values" / ORIGIN, to_json(self.sync.origin.values))
        (folder / "trainer").mkdir()
        self.learner.save(folder)
        state: dict[str, Any] = {
            "seed": self.spec.config.seed,
            "ledger": self.ledger.state_dict(),
            "parts": save_parts(self.parts, folder / "trainer" / "parts"),
        }
        for each in self.stateful:
            state |= each.state_dict()
        ckpt.write_json(folder / "trainer" / "state.json", {key: state[key] for key in STATE})

    def system_json(self) -> dict[str, Any]:
        """All that `marlora eval` needs: base, system, agents, policies, values, adapters by hash,
        tasks, rewards and the helpers they ask (of whose keys only the variables' names stand
        there), versions."""
        spec, config, bases = self.spec, self.spec.config, self.learner.bases
        hashes = self.learner.base_hashes
        cls = type(spec.system)
        helpers = asked_helpers(spec.rewards)
        spoken = {*spec.policies, *(helper.policy.name for helper in helpers.values())}
        return {
            "schema": ckpt.SCHEMA,
            "recipe": spec.recipe,
            "step": self.log.step,
            "base": {"name": config.model, "sha256": hashes.get(config.model)},
            "bases": {
                n: {
                    "sha256": hashes.get(n),  # null: nothing on it is trained
                    "files": files_sha256(b.path),
                    "template": b.tokens.template_hash,
                    "chat_template_kwargs": b.tokens.settings,
                    "policies": [p for p in b.policies if p in spec.policies],
                }
                for n, b in bases.items()
                if n == config.model or any(p in spoken for p in b.policies)
            },
            "system": {
                "class": f"{cls.__module__}:{cls.__qualname__}",
                "arguments": spec.system.arguments(),
            },
            "agents": to_json(spec.system.specs),
            "policies": {name: to_json(policy) for name, policy in spec.policies.items()},
            "values": {name: json_sha256(to_json(v)) for name, v in sorted(self.values.items())},
            "adapters": {
                p: {"sha256": b.adapters.sha256(p), "trained": b.adapters.is_trained(p)}
                for b in bases.values()
                for p in b.policies
                if p in spec.policies
            },
            "tasks": split_of(spec),
            "rewards": [reward_name(r) for r in spec.rewards],
            "helpers": {name: helper.settings() for name, helper in helpers.items()},
            "sampling": to_json(config.sampling()),
            "versions": versions(),
        }

    def restore(self, folder: Path) -> None:
        """Put adapters, optimizers, values and counters back. Raises `SettingError` where
        checkpoint and settings do not fit."""
        system = ckpt.read_system(folder)
        state = json.loads((folder / "trainer" / "state.json").read_text(encoding="utf-8"))
        self._check_bases(folder, system)
        if state["seed"] != self.spec.config.seed:
            raise SettingError(
                f"seed: the run began with {state['seed']}, got {self.spec.config.seed}; its tasks"
                " and samples follow from it"
            )
        self._restore_learnt(folder, system, state)
        self.ledger.load_state_dict(state.get("ledger", NOTHING_SPENT))
        for each in self.stateful:
            each.load_state_dict(state)

    def restore_state(self, folder: Path) -> None:
        """Put back what was learnt by the time of this checkpoint; counters go on."""
        state = json.loads((folder / "trainer" / "state.json").read_text(encoding="utf-8"))
        self._restore_learnt(folder, ckpt.read_system(folder), state)

    def _restore_learnt(
        self, folder: Path, system: Mapping[str, Any], state: Mapping[str, Any]
    ) -> None:
        self.learner.restore(folder, system["adapters"], state["heads"])
        load_parts(self.parts, folder / "trainer" / "parts", state.get("parts", {}))
        self.values.clear()
        self.values.update(read_values(folder, system))

    def _check_bases(self, folder: Path, system: Mapping[str, Any]) -> None:
        """Raise `SettingError` unless the checkpoint stands on the bases of this run."""
        for name, base in self.learner.bases.items():
            saved = system["bases"].get(name)
            if saved is None:
                raise SettingError(
                    f"{folder}: made for base {', '.join(system['bases'])}, this run's is {name};"
                    " resume with the same model"
                )
            hashes = saved["sha256"], self.learner.base_hashes.get(name)
            if None in hashes:  # by one of both runs it is not loaded for training
                files = files_sha256(base.path)
                hashes = saved.get("files", files), files
            if hashes[0] != hashes[1]:
                raise SettingError(
                    f"{folder}: made for base {name} with other weights (sha256 differs); resume"
                    " with the same model"
                )
            if (kwargs := saved.get("chat_template_kwargs", {})) != base.tokens.settings:
                raise SettingError(
                    f"chat_template_kwargs: {name} has {base.tokens.settings}, {folder} was trained"
                    f" with {kwargs}; resume with the same"
                )
            if saved["template"] != base.tokens.template_hash:
                raise SettingError(
                    f"{folder}: the chat template of {name} has changed since; resume with the same"
                    " tokenizer"
                )

    def newest(self) -> Path | None:
        """Restore the newest whole checkpoint of the run's folder (rank 0); its folder, None if
        there is none."""
        config = self.spec.config
        found = ckpt.newest_valid(config.folder, self.log.say, self.restore)
        if found is not None and found == ckpt.list_checkpoints(config.folder)[-1]:
            # a run that was killed after its last rename has not pruned
            best = self.evaluator.best
            ckpt.prune(config.folder, config.save_total_limit, best[1] if best else None)
        return found
