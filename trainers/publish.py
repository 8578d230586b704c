"""Adapter versions go to the engine, and a live proof shows that what is served is what was trained.

A version is a folder that never changes (`solver-v12-3fa9c01b`: policy, step, hash of its tensors). A team version maps policies to
adapter versions. A version is retired by the first publish that finds it neither in force nor held by anyone who plays with it.
What is proven, per policy and replica:

1. identity: the replica lists the version's name with our folder, and the file there holds the tensors that are being trained;
2. weights: the same safetensors, served for a moment as a twin whose `lora_alpha` is amplified until the tokens of turns just trained,
   and those before them, move by about half a nat. The server's and the trainer's differences to the bare base must agree:
   ||d_server - d_trainer|| / ||d_trainer|| is small. (Trained tokens alone are soon so sure that one or two of them decide.)
   Levels prove nothing: one step at lr 1e-5 moves a token by less than bfloat16's noise, and adapters one step apart correlate at 0.98;
3. decoding: tokens sampled at the run's temperature after a prompt just served (so that the prefix cache is hit) have the trainer's
   log-probabilities. Scoring, which the twin is judged by, meets neither prefix cache nor penalties.

How small is small follows the noise, measured on the same tokens with every adapter off: where engine and trainer agree to six digits,
the version of one step ago is told apart even after a hundred steps. While B is zero there is nothing to compare and the record says
`untrained`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import re
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..agents.team import derive_seed
from ..agents.types import Sampling
from ..rollouts.engines.engine import Engine, EngineError, Ref, ReplicaLost
from .adapters import Adapters, folder_sha256
from .checkpoint import fsync
from .probes import Probe, trainer_logprobs

TARGET_NATS = 0.5  # mean |difference to base| that the amplified twin should show
MAX_FACTOR = 2.0**24
# Tolerances are MARGIN x the noise, but at least the first number here (float32) or the second (anything shorter on either side, where
# the adapter's own rounding adds noise that the bare base does not show), and the residual's never above its second.
MARGIN = 4.0
RESIDUAL = (0.005, 0.25)  # measured in bfloat16: right pairs up to 0.16 (0.22 on noise), adapters one step apart from 0.34
DECODE = (
    0.002,
    0.05,
)  # nats per token; measured in bfloat16 on small models: up to 0.011 where the bare base agreed to the last bit
DECODED, SAMPLED = 4, 8  # turns whose prompt is decoded after, and tokens decoded
KEEP_VERSIONS = 3  # folders of retired versions kept per policy, beyond what any replica can name


class ProofError(EngineError):
    """The served adapter is not the trained one; the message says which check failed and by how much."""


@dataclass(frozen=True)
class Proof:
    """One check of one version on one replica. `status`: passed, untrained or failed; the numbers are None where nothing was compared.

    `noise`: mean |server - trainer| in nats per sampled token, with every adapter off. `amplified`: the twin's factor.
    """

    step: int
    policy: str
    version: str
    replica: str
    status: str
    reason: str = ""
    noise: float | None = None
    amplified: float | None = None
    residual: float | None = None
    residual_tolerance: float | None = None
    decode: float | None = None
    decode_tolerance: float | None = None


class Publisher:
    """Keeps the team version in force.

    `root` is where version folders live; `versions` maps policy to version. `earlier`: those of the checkpoint a run was resumed from;
    an adapter that is still the same gets its name back. `forward`: the trainer's own log-probs, as `trainer_logprobs` gives them.
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
        self.seed, self.proof_every, self.earlier = seed, proof_every, dict(earlier or {})
        self._trainer_logprobs = forward or functools.partial(trainer_logprobs, adapters)
        self.versions: dict[str, str] = {}
        self.records: list[Proof] = []
        self.unproven: set[str] = set()
        self.asked = False  # whether `prove` was ever called
        self._loaded: dict[str, tuple[str, str]] = {}  # version -> (policy, hash of its tensors), of those not yet retired
        self._held: Counter[str] = Counter()
        self._holding = threading.Lock()
        self._factor: dict[str, float] = {}
        self._retired: list[Path] = []
        served, trained = getattr(torch, engine.info().dtype), next(adapters.model.parameters()).dtype
        self._coarse = int(served != torch.float32 or trained != torch.float32)

    # versions

    def stage(self, policy: str, step: int, digest: str) -> Path:
        """Write the adapter as an immutable version folder, durable before it has its name."""
        earlier = self.earlier.get(policy, "")
        target = self.root / (earlier if earlier.endswith(f"-{digest[:8]}") else f"{policy}-v{step}-{digest[:8]}")
        if target.exists():  # written before a resume
            if folder_sha256(target) != digest:
                raise EngineError(f"adapter {target}: its tensors were changed after it was written; versions never change")
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
        """Load the adapters that changed on every replica and flip the team version. Prove them with `prove` before they are trusted."""
        new: dict[str, Path] = {}
        for policy in policies:
            digest = self.adapters.sha256(policy)
            if self._loaded.get(self.versions.get(policy, "")) != (policy, digest):
                new[policy] = self.stage(policy, step, digest)
                self._loaded[new[policy].name] = (policy, digest)
        if new:
            await self.engine.publish(new)
        self.versions = {**self.versions, **{policy: folder.name for policy, folder in new.items()}}
        self._retired = [folder for folder in self._retired if folder.name not in self._loaded]  # a resumed run learnt it again
        self.unproven |= set(new)
        for version, (policy, _) in list(self._loaded.items()):
            if self.versions[policy] != version and not self._held[version]:
                del self._loaded[version]
                await self._retire(policy, version)
        return dict(self.versions)

    @contextlib.contextmanager
    def hold(self, versions: Mapping[str, str]) -> Iterator[None]:
        """These versions are being played with: until the block ends they stay loaded and their folders stay where they are."""
        mine = [version for version in versions.values() if version in self._loaded]
        with self._holding:
            self._held.update(mine)
        try:
            yield
        finally:
            with self._holding:
                self._held.subtract(mine)

    async def load_again(self, policy: str, version: str) -> bool:
        """Load an earlier version of a run that is resumed, unless it is loaded. False if its folder is gone."""
        if version in self._loaded:
            return True
        folder = self.root / version
        if not folder.is_dir():
            return False
        digest = folder_sha256(folder)
        if not version.endswith(f"-{digest[:8]}"):
            raise EngineError(f"adapter {folder}: its tensors were changed after it was written; versions never change")
        await self.engine.publish({policy: folder})
        self._loaded[version] = (policy, digest)
        self._retired = [one for one in self._retired if one != folder]
        return True

    def sweep(self) -> None:
        """Folders that a process which was killed has left behind: those half written and twins go now, versions as if retired here."""
        own = re.compile(rf"\.?({'|'.join(map(re.escape, self.adapters.policies))})-v(\d+)-[0-9a-f]{{8}}(-twin-[0-9a-f]{{8}})?")
        left = [(folder, own.fullmatch(folder.name)) for folder in self.root.iterdir()] if self.root.is_dir() else []
        for folder, name in sorted((f, n) for f, n in left if n and f.name not in self._loaded):
            if folder.name.startswith(".") or name[3]:
                shutil.rmtree(folder)
            elif folder not in self._retired:
                self._retired.append(folder)
        self._retired.sort(key=lambda folder: int(own.fullmatch(folder.name)[2]))  # type: ignore[index]
        self._clear()

    async def _retire(self, policy: str, version: str) -> None:
        """Unload a version once its last request has ended, and delete folders that were unloaded long ago."""
        await self.engine.retire(Ref(policy, version))
        self._retired.append(self.root / version)
        self._clear()

    def _clear(self) -> None:
        for folder in self._retired[: -KEEP_VERSIONS * max(len(self.versions), 1)]:
            shutil.rmtree(folder)
            self._retired.remove(folder)

    # live proof

    async def prove(self, step: int, probes_of: Mapping[str, Sequence[Probe]], *, final: bool = False) -> list[Proof]:
        """Prove every version published since the last proof, on every replica. Raises `ProofError` after recording all of them.

        With `proof_every` N this happens at step 1 and every N-th; `final` asks for it now.
        """
        self.asked = True
        if not final and step % self.proof_every and step > 1:
            return []
        made: list[Proof] = []
        for policy in sorted(self.unproven):
            mine: list[Proof] = []
            for replica in self.engine.info().replicas:
                with contextlib.suppress(ReplicaLost):  # told by the engine, which lets it come back only with these adapters
                    mine.append(await self._prove(step, policy, replica, probes_of.get(policy, ())))
            if mine and (mine[-1].status != "untrained" or not self.adapters.is_trained(policy)):
                self.unproven.discard(policy)
            made += mine
        self.records += made
        failed = [proof for proof in made if proof.status == "failed"]
        if failed:
            raise ProofError("; ".join(f"{p.version} on {p.replica}: {p.reason}" for p in failed))
        return made

    async def _prove(self, step: int, policy: str, replica: str, found: Sequence[Probe]) -> Proof:
        version = self.versions[policy]
        proof = Proof(step, policy, version, replica, "passed")
        wrong = await self._identity(policy, version, replica)
        if wrong:
            return replace(proof, status="failed", reason=f"identity: {wrong}")
        if not self.adapters.is_trained(policy) or not found:
            return replace(proof, status="untrained", reason="B is zero" if found else "no turn of this policy to compare yet")
        proof = await self._weights(proof, found)
        if not proof.residual <= proof.residual_tolerance:  # type: ignore[operator]
            reason = (
                f"weights: the served differences to base are off by {proof.residual:.3f} (at most {proof.residual_tolerance:.3f})"
            )
            return replace(proof, status="failed", reason=reason)
        proof = await self._decoding(proof, found)
        if not proof.decode <= proof.decode_tolerance:  # type: ignore[operator]
            reason = f"decoding: sampled tokens' log-probs are off by {proof.decode:.4f} nat (at most {proof.decode_tolerance:.4f})"
            return replace(proof, status="failed", reason=reason)
        return proof

    async def _identity(self, policy: str, version: str, replica: str) -> str:
        """What is wrong with what the replica lists, or ""."""
        folder = (await self.engine.adapters(replica)).get(version)
        if folder is None:
            return f"the replica does not list {version!r}"
        if Path(folder).resolve() != self.root / version:
            return f"the replica serves {version!r} from {folder}, expected {self.root / version}"
        if folder_sha256(self.root / version) != self.adapters.sha256(policy):
            return f"the tensors in {folder} are not the trainer's"
        return ""

    async def _weights(self, proof: Proof, found: Sequence[Probe]) -> Proof:
        """The proof with noise, amplification and relative residual of the served twin."""
        base = self._trainer_logprobs(found, None)
        factor, trained = self._amplify(proof.policy, found, base)
        served_base = await self._scores(found, Ref(proof.policy), proof.replica)
        twin = self._twin(proof.version, factor)
        await self.engine.publish({proof.policy: twin})
        try:
            served_twin = await self._scores(found, Ref(proof.policy, twin.name), proof.replica)
        finally:
            await self._retire(proof.policy, twin.name)
        served, gaps = _minus(served_twin, served_base), _minus(served_base, base)
        size, low, high = max(_norm(trained), 1e-12), *RESIDUAL
        noise = MARGIN * math.sqrt(2) * _norm(gaps) / size  # a difference of two log-probs has the noise of both
        tolerance = high if self._coarse else min(max(low, noise), high)
        residual = _norm(_minus(served, trained)) / size
        replies = [
            gap
            for gap, sampled in zip(gaps, (i >= p.prompt for p in found for i in range(p.first, len(p.ids))), strict=True)
            if sampled
        ]
        return replace(proof, noise=_mean(replies), amplified=factor, residual=residual, residual_tolerance=tolerance)

    def _twin(self, version: str, factor: float) -> Path:
        """A copy of the version's folder, under a name of its own, whose `lora_alpha` is times `factor`."""
        twin = self.root / f"{version}-twin-{secrets.token_hex(4)}"
        shutil.copytree(self.root / version, twin)
        config = json.loads((twin / "adapter_config.json").read_text())
        config["lora_alpha"] *= factor
        (twin / "adapter_config.json").write_text(json.dumps(config))
        return twin

    async def _scores(self, found: Sequence[Probe], ref: Ref, replica: str) -> list[float]:
        """The engine's log-probs of the probes' tokens, one after another."""
        scores = await asyncio.gather(*(self.engine.score(probe.ids, ref, replica) for probe in found))
        return [value for probe, row in zip(found, scores, strict=True) for value in row[probe.first - 1 :]]

    def _amplify(self, policy: str, found: Sequence[Probe], base: Sequence[float]) -> tuple[float, list[float]]:
        """The power of two that moves the probes' tokens by about half a nat, and the trainer's differences to base under it."""
        factor, tried = self._factor.get(policy, 1.0), dict[float, tuple[float, list[float]]]()
        while factor not in tried and len(tried) < 12:
            differences = _minus(self._trainer_logprobs(found, policy, factor), base)
            mean = _mean(differences)
            doublings = math.log2(TARGET_NATS / max(mean, 1e-9)) if math.isfinite(mean) else -100.0
            tried[factor] = (abs(doublings), differences)
            # In the linear range one jump would do; from noise, or from saturation, go in steps and look again.
            factor = min(max(factor * 2.0 ** max(-3, min(6, round(doublings))), 1.0), MAX_FACTOR)
        best = min(tried, key=lambda f: tried[f][0])
        self._factor[policy] = best
        return best, tried[best][1]

    async def _decoding(self, proof: Proof, found: Sequence[Probe]) -> Proof:
        """The proof with the mean |server - trainer| of freshly sampled tokens' log-probs."""
        found = found[:DECODED]
        ref, prompts = Ref(proof.policy, proof.version), [probe.ids[: probe.prompt] for probe in found]
        drawn = [
            Sampling(temperature=p.temperature, max_tokens=SAMPLED, seed=derive_seed(self.seed, proof.version, "proof", number))
            for number, p in enumerate(found)
        ]

        async def decode(max_tokens: int) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
            made = await asyncio.gather(
                *(
                    self.engine.generate(ids, ref, replace(sampling, max_tokens=max_tokens), replica=proof.replica)
                    for ids, sampling in zip(prompts, drawn, strict=True)
                )
            )
            return [(one.token_ids, one.logprobs) for (one,) in made]

        await decode(1)  # so that the next requests meet the prefix cache
        replies = await decode(SAMPLED)
        again = [
            Probe(ids + tokens, len(ids), sampling.temperature)
            for ids, (tokens, _), sampling in zip(prompts, replies, drawn, strict=True)
        ]
        ours = self._trainer_logprobs(again, proof.policy, 1.0, True)
        gap = _mean(_minus([value for _, logprobs in replies for value in logprobs], ours))
        coldest = min(probe.temperature for probe in found)
        tolerance = max(DECODE[self._coarse], MARGIN * (proof.noise or 0.0)) / min(coldest, 1.0)
        return replace(proof, decode=gap, decode_tolerance=tolerance)

    def summary(self) -> dict[str, float | int]:
        """Counts for `summary.json`."""
        residuals = [p.residual for p in self.records if p.residual is not None]
        count = {status: sum(p.status == status for p in self.records) for status in ("passed", "untrained", "failed")}
        return {"checks": len(self.records), **count, "max_residual": max(residuals, default=0.0)}

    def to_json(self) -> list[dict[str, object]]:
        return [asdict(proof) for proof in self.records]


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _norm(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def _mean(values: Sequence[float]) -> float:
    """Mean of the absolute values."""
    return sum(map(abs, values)) / max(len(values), 1)
