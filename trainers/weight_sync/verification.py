"""Weight verification (the "live proof"): the served adapter equals the trained one, per policy and
replica.

1. identity: the replica lists the version's name with our folder, and the file there holds the
   tensors that are being trained;
2. weights: the same safetensors, served for a moment as a twin whose `lora_alpha` is amplified
   until the tokens of turns just trained, and those before them, move by half a nat or more. Server
   and trainer must agree on how far they are from the trainer's bare base: ||served - trained|| /
   ||trained - base|| is small. (Trained tokens alone are soon so sure that one or two of them
   decide.) Levels prove nothing: one step at lr 1e-5 moves a token by less than bfloat16's noise,
   and adapters one step apart correlate at 0.98;
3. decoding: tokens sampled at the run's temperature after a prompt just served (so that the prefix
   cache is hit, where the engine has one) have the trainer's log-probabilities. Scoring, which the
   twin is judged by, meets neither prefix cache nor penalties.

How small is small follows the noise, measured with every adapter off when a replica is first
verified: where engine and trainer agree to six digits, the version of one step ago differs even
after a hundred steps. While B is zero there is nothing to compare and the record says `untrained`.
Where nothing on a base is trained, the trainer has no weights to compute with: the identity is all
that is compared, and the record says `identity`, which counts neither as passed nor as a check.
The trainer's forward passes run beside the engine's work, one at a time, in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from ...agents.concurrency import gather
from ...agents.seeds import derive_seed
from ...agents.types import BASE, Completion, Sampling
from ...rollouts.engines.base import Engine, EngineError, ModelRef, ReplicaLost
from ...rollouts.files import adapter_sha256
from ..model.adapter_files import WEIGHTS
from ..model.adapters import Adapters
from .log_prob_gaps import Noise, mean, measured_noise, minus, norm
from .probes import Probe, ScoredWindow

T = TypeVar("T")

# mean |difference to base| that the amplified twin should show: between these, or more where factor
# 1 shows more
NATS = (0.5, 1.5)
MAX_FACTOR = 2.0**24
# Tolerances are MARGIN x the noise, but at least the first number here (float32) or the second
# (anything shorter on either side, where the adapter's own rounding adds noise that the bare base
# does not show). A residual's is never above its second, decoding's its third.
MARGIN = 4.0
# Measured in bfloat16: right pairs up to 0.12, adapters one step apart from 0.29.
RESIDUAL = (0.005, 0.2)
# Nats per token; measured in bfloat16: up to 0.011 where the bare base agreed to the last bit, up
# to 0.08 where it was off by 0.03.
DECODE = (0.002, 0.05, 0.3)
FROZEN = "nothing on this base is trained; name, folder and tensors are those of the run"
DECODED, SAMPLED = 2, 8  # turns whose prompt is decoded after, and tokens decoded


class WeightMismatch(EngineError):
    """The served adapter is not the trained one; the message says which check failed and by how
    much."""


@dataclass(frozen=True)
class VerificationRecord:
    """One check of one version on one replica. `status`: passed, untrained, failed, or identity
    (see above); the numbers are None where nothing was compared.

    `noise`: mean |server - trainer| in nats per sampled token, with every adapter off, as first
    measured on the replica. `amplified`: the twin's factor.
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

    def judged(self) -> VerificationRecord:
        """Failed if a number is beyond its tolerance, or is not a number."""
        if not self.residual <= self.residual_tolerance:  # type: ignore[operator]
            reason = (
                f"weights: the served differences to base are off by {self.residual:.3f} (at most"
                f" {self.residual_tolerance:.3f})"
            )
        elif not self.decode <= self.decode_tolerance:  # type: ignore[operator]
            reason = (
                f"decoding: sampled tokens' log-probs are off by {self.decode:.4f} nat (at most"
                f" {self.decode_tolerance:.4f})"
            )
        else:
            return self
        return replace(self, status="failed", reason=reason)


class WeightVerifier:
    """Proves versions. It remembers how far each policy had to be amplified, and how noisy each
    replica is.

    `root`: where version folders live. `forward`: the trainer's log-probs, see
    `probes.trainer_logprobs`. `retire`: unload a version and forget its folder.
    """

    def __init__(
        self,
        root: Path,
        adapters: Adapters,
        engine: Engine,
        *,
        seed: int,
        forward: Callable[..., list[float]],
        retire: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self.root, self.adapters, self.engine, self.seed = root, adapters, engine, seed
        self.forward, self.retire = forward, retire
        self._factor: dict[str, float] = {}
        self._noise: dict[str, Noise] = {}
        self._trainer, self._twins, self._measuring = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        self._threads = torch.get_num_threads()
        served = getattr(torch, engine.info().dtype)
        trained = {} if adapters.weightless else {next(adapters.model.parameters()).dtype}
        self._coarse = int({served, *trained} != {torch.float32})

    async def verify(
        self, step: int, policy: str, version: str, probes: Sequence[Probe]
    ) -> list[VerificationRecord]:
        """The proof of a version on every replica that is there."""
        looked = await gather(
            self._identity(VerificationRecord(step, policy, version, r, "passed"))
            for r in self.engine.info().replicas
        )
        proofs = {proof.replica: proof for proof in looked if proof is not None}
        if self.adapters.weightless:
            return [
                replace(proof, status="identity", reason=FROZEN)
                if proof.status == "passed"
                else proof
                for proof in proofs.values()
            ]
        open_ = [replica for replica, proof in proofs.items() if proof.status == "passed"]
        if not self.adapters.is_trained(policy) or not probes:
            why = "B is zero" if probes else "no turn of this policy to compare yet"
            return [
                replace(p, status="untrained", reason=why) if p.replica in open_ else p
                for p in proofs.values()
            ]
        weighed: dict[str, VerificationRecord] = {}
        if open_:
            weighed, decoded = await gather(
                [
                    self._weights({r: proofs[r] for r in open_}, probes),
                    self._decoding({r: proofs[r] for r in open_}, probes[:DECODED]),
                ]
            )
            coldest = min(1.0, *(probe.temperature for probe in probes[:DECODED]))
            weighed = {
                replica: (
                    replace(
                        proof,
                        decode=decoded[replica].decode,
                        decode_tolerance=min(
                            max(DECODE[self._coarse], MARGIN * (proof.noise or 0.0)), DECODE[2]
                        )
                        / coldest,
                    ).judged()
                )
                for replica, proof in weighed.items()
                if replica in decoded
            }
        return [
            weighed.get(replica, proof)
            for replica, proof in proofs.items()
            if replica in weighed or replica not in open_
        ]

    async def _identity(self, proof: VerificationRecord) -> VerificationRecord | None:
        """The proof, failed if the replica lists something else; None if it is lost."""
        listed = await _unless_lost(self.engine.adapters(proof.replica))
        if listed is None:
            return None
        folder, expected = listed.get(proof.version), self.root / proof.version
        if folder is None:
            wrong = f"the replica does not list {proof.version!r}"
        elif Path(folder).resolve() != expected:
            wrong = f"the replica serves {proof.version!r} from {folder}, expected {expected}"
        elif await asyncio.to_thread(adapter_sha256, expected / WEIGHTS) != self.adapters.sha256(
            proof.policy
        ):
            wrong = f"the tensors in {folder} are not the trainer's"
        else:
            return proof
        return replace(proof, status="failed", reason=f"identity: {wrong}")

    async def _weights(
        self, proofs: dict[str, VerificationRecord], probes: Sequence[Probe]
    ) -> dict[str, VerificationRecord]:
        """By replica, the proof with noise, amplification and relative residual of the served twin;
        lost ones are left out."""
        some = next(iter(proofs.values()))
        policy, asked = some.policy, [probe.window for probe in probes]
        base = await self._trained(asked, BASE)
        factor, trained = await self._amplify(policy, asked, base)
        size = max(norm(minus(trained, base)), 1e-12)
        async with self._twin(policy, some.version, factor) as twin:
            served = await self._served(proofs, asked, ModelRef(policy, twin))
        async with self._measuring:
            bare = await self._served(proofs.keys() - self._noise.keys(), asked, ModelRef(policy))
            self._noise |= {
                replica: measured_noise(probes, asked, minus(scores, base))
                for replica, scores in bare.items()
            }
        records = {}
        for replica, scores in served.items():
            if replica not in self._noise:  # lost in between
                continue
            noise = self._noise[replica]
            low, high = RESIDUAL
            tolerance = (
                high
                if self._coarse
                else min(max(low, MARGIN * noise.all * math.sqrt(len(base)) / size), high)
            )
            residual = norm(minus(scores, trained)) / size
            records[replica] = replace(
                proofs[replica],
                noise=noise.sampled,
                amplified=factor,
                residual=residual,
                residual_tolerance=tolerance,
            )
        return records

    @contextlib.asynccontextmanager
    async def _twin(self, policy: str, version: str, factor: float) -> AsyncIterator[str]:
        """A copy of the version whose `lora_alpha` is times `factor`, served under a name of its
        own; one at a time finds room."""
        async with self._twins:
            twin = self.root / f"{version}-twin-{secrets.token_hex(4)}"
            shutil.copytree(self.root / version, twin)
            config = json.loads((twin / "adapter_config.json").read_text(encoding="utf-8"))
            config["lora_alpha"] *= factor
            (twin / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
            loading = asyncio.ensure_future(self.engine.publish({policy: twin}))
            try:
                await _finished(loading)
                yield twin.name
            finally:
                if not loading.exception():
                    await self.retire(policy, twin.name)

    async def _amplify(
        self, policy: str, asked: Sequence[ScoredWindow], base: Sequence[float]
    ) -> tuple[float, list[float]]:
        """The power of two that moves the tokens by half a nat or more, and the trainer's log-probs
        under it."""
        factor, tried = self._factor.get(policy, 1.0), dict[float, tuple[float, list[float]]]()
        while factor not in tried and len(tried) < 12:
            trained = await self._trained(asked, policy, factor)
            nats = mean(minus(trained, base))
            doublings = math.log2(NATS[0] / max(nats, 1e-9)) if math.isfinite(nats) else -100.0
            tried[factor] = (abs(doublings + 0.5), trained)
            if NATS[0] <= nats <= NATS[1]:
                break
            # In the linear range one jump would do; from noise, or from saturation, go in steps and
            # look again.
            factor = min(
                max(factor * 2.0 ** max(-3, min(6, math.ceil(doublings))), 1.0), MAX_FACTOR
            )
        best = min(tried, key=lambda f: tried[f][0])
        self._factor[policy] = best
        return best, tried[best][1]

    async def _decoding(
        self, proofs: dict[str, VerificationRecord], probes: Sequence[Probe]
    ) -> dict[str, VerificationRecord]:
        """By replica, the proof with the mean |server - trainer| of freshly sampled tokens'
        log-probs; lost ones are left out."""
        some = next(iter(proofs.values()))
        drawn = [
            Sampling(
                temperature=p.temperature,
                max_tokens=SAMPLED,
                seed=derive_seed(self.seed, some.version, "proof", number),
            )
            for number, p in enumerate(probes)
        ]

        async def decode(replica: str, max_tokens: int) -> list[Completion]:
            ref = ModelRef(some.policy, some.version)
            replies = await gather(
                self.engine.generate(
                    probe.ids[: probe.prompt],
                    ref,
                    replace(sampling, max_tokens=max_tokens),
                    replica=replica,
                )
                for probe, sampling in zip(probes, drawn, strict=True)
            )
            return [one for (one,) in replies]

        async def answers(replica: str) -> list[Completion]:
            if self.engine.info().prefix_cache:
                await decode(replica, 1)  # so that the next requests meet it
            return await decode(replica, SAMPLED)

        replies = dict(
            zip(
                proofs,
                await gather(_unless_lost(answers(replica)) for replica in proofs),
                strict=True,
            )
        )
        records = {}
        for replica, completions in replies.items():
            if completions is not None:
                asked = [
                    ScoredWindow(p.ids[: p.prompt] + one.token_ids, p.prompt, p.temperature)
                    for p, one in zip(probes, completions, strict=True)
                ]
                ours = await self._trained(asked, some.policy)
                gap = mean(minus([value for one in completions for value in one.logprobs], ours))
                records[replica] = replace(proofs[replica], decode=gap)
        return records

    async def _trained(
        self, asked: Sequence[ScoredWindow], policy: str, factor: float = 1.0
    ) -> list[float]:
        """The trainer's log-probs of the scored tokens, one sequence after another."""
        # a pass switches the adapters: called off or not, no other pass begins before it has put
        # them back
        async with self._trainer:
            return await _finished(asyncio.to_thread(self._pass, asked, policy, factor))

    def _pass(self, asked: Sequence[ScoredWindow], policy: str, factor: float) -> list[float]:
        """One core is left to the server: threads that wait for one another on a core that is
        taken make two slower than one."""
        torch.set_num_threads(max(1, self._threads - 1))
        try:
            return self.forward(asked, policy, factor)
        finally:
            torch.set_num_threads(self._threads)

    async def _served(
        self, replicas: Iterable[str], asked: Sequence[ScoredWindow], ref: ModelRef
    ) -> dict[str, list[float]]:
        """The log-probs of the scored tokens by every replica that is not lost."""
        names = list(replicas)
        scores = await gather(_unless_lost(self._scores(asked, ref, replica)) for replica in names)
        return {
            name: values for name, values in zip(names, scores, strict=True) if values is not None
        }

    async def _scores(
        self, asked: Sequence[ScoredWindow], ref: ModelRef, replica: str
    ) -> list[float]:
        rows = await gather(self.engine.score(one.ids, ref, replica) for one in asked)
        return [
            value for one, row in zip(asked, rows, strict=True) for value in row[one.first - 1 :]
        ]


async def _finished(work: Awaitable[T]) -> T:
    """Await to the end what must not stop halfway, also if called off in between."""
    begun = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(begun)
    finally:
        while not begun.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([begun])


async def _unless_lost(work: Awaitable[T]) -> T | None:
    """None if the replica is lost: the engine has reported it, and lets it come back only with the
    adapters it should have."""
    try:
        return await work
    except ReplicaLost:
        return None
