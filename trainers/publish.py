"""Adapter versions go to the engine, and a live proof shows that what is served is what was trained.

A version is a folder that never changes (`solver-v12-3fa9c01b`: policy, step, hash of its tensors). A team version maps policies to
adapter versions; it flips only when every new version is loaded and proven on every replica. What is proven, per policy and replica:

1. identity: the replica lists the version's name with our folder, and the file there has the sha256 that we wrote;
2. weights: the same safetensors, served for a moment as a twin whose `lora_alpha` is amplified until tokens just trained move by about
   half a nat. The server's and the trainer's differences to the bare base must agree: ||d_server - d_trainer|| / ||d_trainer|| <= 0.2.
   Levels prove nothing: one step at lr 1e-5 moves a token by less than bfloat16's noise, and adapters one step apart correlate at 0.98;
3. decoding: tokens sampled with the run's temperature after a prompt just served (so that the prefix cache is hit) have the trainer's
   log-probabilities, within the noise measured at the start.

While B is still zero there is nothing to compare and the record says `untrained`.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ..agents.team import derive_seed
from ..agents.types import Sampling
from ..rollouts.engines.engine import Engine, EngineError, Ref
from ..rollouts.types import Episode
from .adapters import Adapters, folder_sha256
from .checkpoint import fsync

TARGET_NATS = 0.5  # mean |difference to base| that the amplified twin should show
MAX_RESIDUAL = 0.2  # measured: right pairs 0.07 and 0.13, adapters one step apart 0.34 and 0.56
MAX_FACTOR = 2.0**24
KEEP_VERSIONS = 3  # folders of retired versions kept: no replica's cache can still name older ones


class ProofError(EngineError):
    """The served adapter is not the trained one; the message says which check failed and by how much."""


@dataclass(frozen=True)
class Probe:
    """A turn of the policy: `ids` [P + T], of which the last T were sampled, and how."""

    ids: tuple[int, ...]
    prompt: int
    sampling: Sampling


@dataclass(frozen=True)
class Proof:
    """One check of one version on one replica. `status`: passed, untrained or failed; the numbers are None where nothing was compared."""

    step: int
    policy: str
    version: str
    replica: str
    status: str
    reason: str = ""
    residual: float | None = None
    amplified: float | None = None
    decode: float | None = None
    decode_tolerance: float | None = None


def probes(episodes: Iterable[Episode], agents_of: Mapping[str, Sequence[str]], policy: str, count: int = 4) -> list[Probe]:
    """Up to `count` turns of the policy, of different tasks first; the shortest ones that have at least two sampled tokens."""
    turns = [
        (episode.task.id, turn)
        for episode in episodes
        for turn in episode.turns
        if turn.agent in agents_of[policy] and turn.source == "sampled" and len(turn.token_ids) > 1
    ]
    turns.sort(key=lambda item: len(item[1].prompt_ids) + len(item[1].token_ids))
    firsts: dict[str, None] = {}
    chosen = [t for task, t in turns if task not in firsts and not firsts.update({task: None})]
    chosen = (chosen + [t for _, t in turns if t not in chosen])[:count]
    return [Probe(t.prompt_ids + t.token_ids, len(t.prompt_ids), t.sampling) for t in chosen]


class Publisher:
    """Keeps the team version in force. `root` is where version folders live; `versions` maps policy to version."""

    def __init__(self, root: Path, adapters: Adapters, engine: Engine, *, seed: int = 0, proof_every: int = 1) -> None:
        self.root, self.adapters, self.engine = root.resolve(), adapters, engine
        self.seed, self.proof_every = seed, proof_every
        self.versions: dict[str, str] = {}
        self.records: list[Proof] = []
        self.unproven: set[str] = set()
        self._factor: dict[str, float] = {}
        self._noise: float | None = None
        self._retired: list[Path] = []
        self._served_dtype = getattr(torch, engine.info().dtype)

    # versions

    def stage(self, policy: str, step: int) -> Path:
        """Write the adapter as an immutable version folder, durable before it has its name."""
        digest = self.adapters.sha256(policy)
        target = self.root / f"{policy}-v{step}-{digest[:8]}"
        if not target.exists():
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
        """Load new versions of these policies on every replica and flip the team version. Prove them with `prove` before use."""
        folders = {policy: self.stage(policy, step) for policy in policies}
        new = {policy: folder for policy, folder in folders.items() if self.versions.get(policy) != folder.name}
        if new:
            await self.engine.publish(new)
        old = {policy: self.versions[policy] for policy in new if policy in self.versions}
        self.versions = {**self.versions, **{policy: folder.name for policy, folder in new.items()}}
        self.unproven |= set(new)
        for policy, version in old.items():
            await self.engine.retire(Ref(policy, version))
            self._retired.append(self.root / version)
        for folder in self._retired[: -KEEP_VERSIONS * max(len(self.versions), 1)]:
            shutil.rmtree(folder, ignore_errors=True)
            self._retired.remove(folder)
        return dict(self.versions)

    # live proof

    async def prove(self, step: int, probes_of: Mapping[str, Sequence[Probe]], *, final: bool = False) -> list[Proof]:
        """Prove every version published since the last proof, on every replica. Raises `ProofError` after recording all of them."""
        if not final and step % self.proof_every and step > 1:
            return []
        made: list[Proof] = []
        for policy in sorted(self.unproven):
            for replica in self.engine.info().replicas:
                made.append(await self._prove(step, policy, replica, probes_of.get(policy, ())))
            if made[-1].status != "untrained" or not self.adapters.is_trained(policy):
                self.unproven.discard(policy)
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
        residual, factor = await self._weights(policy, version, replica, found)
        proof = replace(proof, residual=residual, amplified=factor)
        if not residual <= MAX_RESIDUAL:
            reason = f"weights: the served differences to base are off by {residual:.3f} (at most {MAX_RESIDUAL})"
            return replace(proof, status="failed", reason=reason)
        mean, tolerance = await self._decoding(policy, version, found)
        proof = replace(proof, decode=mean, decode_tolerance=tolerance)
        if not mean <= tolerance:
            reason = f"decoding: sampled tokens' log-probs differ by {mean:.4f} nat (at most {tolerance:.4f})"
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

    async def _weights(self, policy: str, version: str, replica: str, found: Sequence[Probe]) -> tuple[float, float]:
        """(relative residual, amplification) of the served twin against the trainer."""
        factor, trained = self._amplify(policy, found)
        twin = self.root / f"{version}-twin-{len(self.records)}"
        shutil.copytree(self.root / version, twin, dirs_exist_ok=True)
        config = json.loads((twin / "adapter_config.json").read_text())
        config["lora_alpha"] = config["lora_alpha"] * factor
        (twin / "adapter_config.json").write_text(json.dumps(config))
        await self.engine.publish({policy: twin})
        try:
            served = []
            for probe in found:
                with_twin = await self.engine.score(probe.ids, Ref(policy, twin.name), replica)
                without = await self.engine.score(probe.ids, Ref(policy, ""), replica)
                served += [a - b for a, b in zip(with_twin, without, strict=True)][probe.prompt - 1 :]
        finally:
            await self.engine.retire(Ref(policy, twin.name))
            self._retired.append(twin)
        off = math.sqrt(sum((s - t) ** 2 for s, t in zip(served, trained, strict=True)))
        return off / max(math.sqrt(sum(t * t for t in trained)), 1e-12), factor

    def _amplify(self, policy: str, found: Sequence[Probe]) -> tuple[float, list[float]]:
        """The power of two that moves the probes' tokens by about half a nat, and the trainer's differences under it."""
        level = [replace(probe, sampling=Sampling()) for probe in found]  # compared at temperature 1, as engines score
        base = self._trainer_logprobs(level, None)
        factor = self._factor.get(policy, 1.0)
        tried: dict[float, tuple[float, list[float]]] = {}  # factor -> (how far from half a nat, in doublings; differences)
        while factor not in tried and len(tried) < 12:
            moved = self._trainer_logprobs(level, policy, factor)
            differences = [a - b for a, b in zip(moved, base, strict=True)]
            mean = sum(map(abs, differences)) / len(differences)
            doublings = math.log2(TARGET_NATS / max(mean, 1e-9))
            tried[factor] = (abs(doublings), differences)
            # In the linear range one jump would do; from noise, or from saturation, go in steps and look again.
            factor = min(max(factor * 2.0 ** max(-3, min(6, round(doublings))), 1.0), MAX_FACTOR)
        best = min(tried, key=lambda f: tried[f][0])
        self._factor[policy] = best
        return best, tried[best][1]

    async def _decoding(self, policy: str, version: str, found: Sequence[Probe]) -> tuple[float, float]:
        """(mean |server - trainer| log-prob of freshly sampled tokens, its tolerance)."""
        if self._noise is None:
            self._noise = await self._sampled_gap(policy, "", None, found[:2])
        mean = await self._sampled_gap(policy, version, policy, found[:2])
        return mean, max(0.02, 4 * self._noise)

    async def _sampled_gap(self, policy: str, version: str, adapter: str | None, found: Sequence[Probe]) -> float:
        gaps: list[float] = []
        for number, probe in enumerate(found):
            temperature = probe.sampling.temperature if probe.sampling.on_policy else 1.0
            prompt = probe.ids[: probe.prompt]
            for repeat in range(2):  # the second request meets the prefix cache of the first
                seed = derive_seed(self.seed, version, "proof", number, repeat)
                sampling = Sampling(temperature=temperature, max_tokens=8, seed=seed)
                (got,) = await self.engine.generate(prompt, Ref(policy, version), sampling)
            ours = self._trainer_logprobs([Probe(prompt + got.token_ids, len(prompt), sampling)], adapter)
            gaps += [abs(a - b) for a, b in zip(ours, got.logprobs, strict=True)]
        return sum(gaps) / max(len(gaps), 1)

    @torch.no_grad()
    def _trainer_logprobs(self, found: Sequence[Probe], policy: str | None, factor: float = 1.0) -> list[float]:
        """The trainer's log-probs of the probes' sampled tokens, one after another, at each probe's own temperature.

        The adapter is rounded to the served dtype and its scaling taken times `factor`; policy None is the bare base.
        """
        device, width = self.adapters.device, max(len(probe.ids) for probe in found)
        ids = torch.tensor([list(p.ids) + [0] * (width - len(p.ids)) for p in found], device=device)
        mask = torch.tensor([[1] * len(p.ids) + [0] * (width - len(p.ids)) for p in found], device=device)
        with self.adapters.active("base") if policy is None else self._as_served(policy, factor):
            first = min(probe.prompt for probe in found) - 1
            logits = self.adapters.model(input_ids=ids, attention_mask=mask, logits_to_keep=width - first).logits.float()
        values: list[float] = []
        for row, probe in zip(logits, found, strict=True):
            own = row[probe.prompt - 1 - first : len(probe.ids) - 1 - first] / (probe.sampling.temperature or 1.0)
            targets = torch.tensor(probe.ids[probe.prompt :], device=device)
            values += torch.log_softmax(own, -1).gather(1, targets[:, None])[:, 0].tolist()
        return values

    @contextlib.contextmanager
    def _as_served(self, policy: str, factor: float) -> Iterator[None]:
        with self.adapters.active(policy), self.adapters.disguised(policy, factor, self._served_dtype):
            yield

    def summary(self) -> dict[str, float | int]:
        """Counts for `summary.json`."""
        residuals = [p.residual for p in self.records if p.residual is not None]
        count = {status: sum(p.status == status for p in self.records) for status in ("passed", "untrained", "failed")}
        return {"checks": len(self.records), **count, "max_residual": max(residuals, default=0.0)}

    def to_json(self) -> list[dict[str, object]]:
        return [asdict(proof) for proof in self.records]
