"""Publisher: adapter versions go to one engine and are verified there (`verification.py`).

A version is a folder that never changes (`solver-v12-3fa9c01b`: policy, step, hash of its tensors).
A team version maps policies to adapter versions. A version is retired by the first publish that
finds it neither in force nor held by anyone who plays with it.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from ...agents.concurrency import gather
from ...rollouts.engines.base import Engine, EngineError, ModelRef
from ...rollouts.files import adapter_sha256, fsync
from ..model.adapter_files import WEIGHTS
from ..model.adapters import Adapters
from .probes import Probe, trainer_logprobs
from .verification import VerificationRecord, WeightMismatch, WeightVerifier

KEEP_VERSIONS = 3  # folders of retired versions kept per policy, beyond what any replica can name


class Publisher:
    """Keeps the team version in force.

    `root` is where version folders live; `versions` maps policy to version; `verifier` compares
    served and trained ones.
    `earlier`: those of the checkpoint a run was resumed from; an adapter that is still the same
    gets its name back. `forward`: the trainer's own log-probs, as `trainer_logprobs` gives them.
    """

    def __init__(
        self,
        root: Path,
        adapters: Adapters,
        engine: Engine,
        *,
        seed: int = 0,
        proof_every: int = 1,
        earlier: Mapping[str, str] | None = None,
        forward: Callable[..., list[float]] | None = None,
    ) -> None:
        self.root, self.adapters, self.engine = root.resolve(), adapters, engine
        self.proof_every, self.earlier = proof_every, dict(earlier or {})
        self.versions: dict[str, str] = {}
        self.records: list[VerificationRecord] = []
        self.unproven: set[str] = set()
        self.asked = False  # whether `verify` was ever called
        self._loaded: dict[
            str, tuple[str, str]
        ] = {}  # version -> (policy, hash of its tensors), of those not yet retired
        self._held: Counter[str] = Counter()
        self._holding = threading.Lock()
        self._retired: list[Path] = []
        self.keep: frozenset[str] = frozenset()  # versions whose folders are never deleted
        self.verifier = WeightVerifier(
            self.root,
            adapters,
            engine,
            seed=seed,
            forward=forward or functools.partial(trainer_logprobs, adapters),
            retire=self._retire,
        )

    # versions

    def write_version(self, policy: str, step: int, digest: str) -> Path:
        """Write the adapter as an immutable version folder, durable before it has its name."""
        earlier = self.earlier.get(policy, "")
        target = self.root / (
            earlier if earlier.endswith(f"-{digest[:8]}") else f"{policy}-v{step}-{digest[:8]}"
        )
        if target.exists():  # written before a resume
            if adapter_sha256(target / WEIGHTS) != digest:
                raise EngineError(
                    f"adapter {target}: its tensors were changed after it was written; versions"
                    " never change"
                )
            return target
        staged = target.with_name(f".{target.name}")
        shutil.rmtree(staged, ignore_errors=True)
        self.root.mkdir(parents=True, exist_ok=True)
        self.adapters.save(policy, staged)
        for path in [*staged.iterdir(), staged]:
            fsync(path)
        staged.rename(target)
        fsync(self.root)
        return target

    async def publish(self, step: int, policies: Sequence[str]) -> dict[str, str]:
        """Load the adapters that changed on every replica and flip the team version. Prove them
        with `verify` before they are trusted."""
        changed: dict[str, Path] = {}
        digests = {policy: self.adapters.sha256(policy) for policy in policies}
        for policy, digest in digests.items():
            if self._loaded.get(self.versions.get(policy, "")) != (policy, digest):
                changed[policy] = self.write_version(policy, step, digest)
        # one that something still plays with is loaded under its name
        new = {p: folder for p, folder in changed.items() if folder.name not in self._loaded}
        if new:
            self._loaded |= {f.name: (p, digests[p]) for p, f in new.items()}
            await self.engine.publish(new)
        self.versions = {**self.versions, **{p: folder.name for p, folder in changed.items()}}
        self._retired = [
            folder for folder in self._retired if folder.name not in self._loaded
        ]  # a resumed run learnt it again
        self.unproven |= set(new)
        for version, (policy, _) in list(self._loaded.items()):
            if self.versions[policy] != version and not self._held[version]:
                del self._loaded[version]
                await self._retire(policy, version)
        return dict(self.versions)

    @contextlib.contextmanager
    def hold(self, versions: Mapping[str, str]) -> Iterator[None]:
        """These versions are being played with: until the block ends they stay loaded and their
        folders stay where they are."""
        mine = [version for version in versions.values() if version in self._loaded]
        with self._holding:
            self._held.update(mine)
        try:
            yield
        finally:
            with self._holding:
                self._held.subtract(mine)

    async def reload(self, policy: str, version: str) -> bool:
        """Load an earlier version of a run that is resumed, unless it is loaded. False if its
        folder is gone."""
        if version in self._loaded:
            return True
        folder = self.root / version
        if not folder.is_dir():
            return False
        digest = adapter_sha256(folder / WEIGHTS)
        if not version.endswith(f"-{digest[:8]}"):
            raise EngineError(
                f"adapter {folder}: its tensors were changed after it was written; versions never"
                " change"
            )
        await self.engine.publish({policy: folder})
        self._loaded[version] = (policy, digest)
        self._retired = [one for one in self._retired if one != folder]
        return True

    def remove_leftovers(self) -> None:
        """Folders that a process which was killed has left behind: those half written and twins go
        now, versions as if retired here."""
        policies = "|".join(map(re.escape, self.adapters.policies))
        own = re.compile(rf"\.?({policies})-v(\d+)-[0-9a-f]{{8}}(-twin-[0-9a-f]{{8}})?")
        left = (
            [(folder, own.fullmatch(folder.name)) for folder in self.root.iterdir()]
            if self.root.is_dir()
            else []
        )
        for folder, name in sorted((f, n) for f, n in left if n and f.name not in self._loaded):
            if folder.name.startswith(".") or name[3]:
                shutil.rmtree(folder)
            elif folder not in self._retired and folder.name not in self.keep:
                self._retired.append(folder)

        def step_of(folder: Path) -> int:
            name = own.fullmatch(folder.name)
            return int(name[2]) if name else 0

        self._retired.sort(key=step_of)
        self._clear()

    async def _retire(self, policy: str, version: str) -> None:
        """Unload a version once its last request has ended, and delete folders that were unloaded
        long ago."""
        await self.engine.retire(ModelRef(policy, version))
        if version not in self.keep:
            self._retired.append(self.root / version)
        self._clear()

    def _clear(self) -> None:
        for folder in self._retired[: -KEEP_VERSIONS * max(len(self.versions), 1)]:
            # Renamed first: a kill during deletion leaves no half folder under a version's name.
            doomed = folder.with_name(f".{folder.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
            shutil.rmtree(doomed)
            self._retired.remove(folder)

    # live proof

    async def verify(
        self, step: int, probes_of: Mapping[str, Sequence[Probe]], *, final: bool = False
    ) -> list[VerificationRecord]:
        """Prove every version published since the last proof, on every replica. Raises
        `WeightMismatch` after recording all of them.

        With `proof_every` N this happens at step 1 and every N-th; `final` asks for it now.
        """
        self.asked = True
        if not final and step % self.proof_every and step > 1:
            return []
        policies = sorted(self.unproven)
        results = await gather(
            self.verifier.verify(step, p, self.versions[p], probes_of.get(p, ())) for p in policies
        )
        for policy, mine in zip(policies, results, strict=True):
            looked_at = {proof.replica for proof in mine} >= set(
                self.engine.info().replicas
            )  # none was lost and is back unseen
            if (
                mine
                and looked_at
                and (mine[-1].status != "untrained" or not self.adapters.is_trained(policy))
            ):
                self.unproven.discard(policy)
        records = [proof for mine in results for proof in mine]
        self.records += records
        failed = [proof for proof in records if proof.status == "failed"]
        if failed:
            raise WeightMismatch(
                "; ".join(f"{p.version} on {p.replica}: {p.reason}" for p in failed)
            )
        return records

    def summary(self) -> dict[str, float | int]:
        """Counts for `summary.json`. `checks`: the records that are judged, so without those that
        say `identity`; of these it tells where there are any."""
        residuals = [p.residual for p in self.records if p.residual is not None]
        count = {
            status: sum(p.status == status for p in self.records)
            for status in ("passed", "untrained", "failed")
        }
        identity = len(self.records) - sum(count.values())
        return {
            "checks": sum(count.values()),
            **count,
            "max_residual": max(residuals, default=0.0),
            **({"identity": identity} if identity else {}),
        }

    def to_json(self) -> list[dict[str, object]]:
        return [asdict(proof) for proof in self.records]
