"""A trainer's adapters, and engines that lie about what they serve: for the proofs on every
engine."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from marlora.agents.types import AdapterSpec, Completion, PolicySpec, Sampling
from marlora.rollouts.engines.base import Engine, ModelRef, TeamVersion
from marlora.rollouts.engines.transformers import TransformersEngine
from marlora.rollouts.engines.vllm.engine import VLLMEngine
from marlora.trainers.model.adapter_files import WEIGHTS
from marlora.trainers.model.adapters import Adapters
from marlora.trainers.weight_sync.probes import Probe
from marlora.trainers.weight_sync.publisher import Publisher
from marlora.trainers.weight_sync.verification import VerificationRecord, WeightMismatch

POLICIES = ("reviewer", "solver")
PROMPTS = [
    (3, *range(40 + 7 * k, 110 + 9 * k), 1, 4) for k in range(4)
]  # of two cache blocks and more
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def adapters_on(
    model: Path,
    dtype: torch.dtype = torch.float32,
    policies: Sequence[str] = POLICIES,
    seed: int = 0,
) -> Adapters:
    """Fresh adapters of rank 4 on the model in this folder."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    spec = AdapterSpec(r=4, alpha=8.0, targets=TARGETS)
    return Adapters(
        base, [PolicySpec(name, adapter=spec) for name in policies], seed=seed, base_name=str(model)
    )


def with_engine(
    model: Path, work: Callable[[TransformersEngine], Awaitable[Any]], dtype: str = "float32"
) -> Any:
    async def run() -> Any:
        engine = TransformersEngine(model, dtype=dtype)
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


class Learner:
    """Steps of AdamW towards random tokens, a new batch every step: what an update does to A and B,
    whatever the method."""

    def __init__(self, adapters: Adapters, learning_rate: float, seed: int = 0) -> None:
        self.adapters, self.generator = adapters, torch.Generator().manual_seed(seed)
        self.optimizers = {
            name: torch.optim.AdamW(
                adapters.parameters(name).values(), lr=learning_rate, weight_decay=0.0
            )
            for name in adapters.trainable
        }

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for name, optimizer in self.optimizers.items():
                ids = torch.randint(5, 260, (4, 24), generator=self.generator)
                with self.adapters.active(name):
                    self.adapters.model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()


async def play(
    engine: Engine, publisher: Publisher, temperature: float = 1.0
) -> dict[str, list[Probe]]:
    """Turns of every policy in force, as probes."""
    found: dict[str, list[Probe]] = {}
    for policy, version in publisher.versions.items():
        drawn = [
            Sampling(temperature=temperature, max_tokens=12, seed=50 + k)
            for k in range(len(PROMPTS))
        ]
        asked = (
            engine.generate(ids, ModelRef(policy, version), sampling)
            for ids, sampling in zip(PROMPTS, drawn, strict=True)
        )
        found[policy] = [
            Probe(one.prompt_ids + one.token_ids, len(one.prompt_ids), temperature)
            for (one,) in await asyncio.gather(*asked)
        ]
    return found


async def published(
    engine: Engine,
    root: Path,
    adapters: Adapters,
    learner: Learner,
    steps: Sequence[int] = (1,),
    temperature: float = 1.0,
) -> list[VerificationRecord]:
    """Publish fresh adapters, then train `steps[i]` steps, publish and prove, again and again.
    Returns the last proofs, failed or not."""
    publisher = Publisher(root, adapters, engine)
    await publisher.publish(0, adapters.trainable)
    for number, count in enumerate(steps, 1):
        found = await play(engine, publisher, temperature)
        learner.step(count)
        await publisher.publish(number, adapters.trainable)
        made = len(publisher.records)
        try:
            assert await publisher.verify(number, found) == publisher.records[made:]
        except WeightMismatch as error:
            failed = [proof for proof in publisher.records[made:] if proof.status == "failed"]
            assert failed and all(
                f"{proof.version} on {proof.replica}: {proof.reason}" in str(error)
                for proof in failed
            )
    return publisher.records[made:]


class Liar:
    """An engine before a true one, which tells the truth: the liars below change one thing each."""

    def __init__(self, true: Engine) -> None:
        self.true = true

    def asked(self, ref: ModelRef, sampling: Sampling | None) -> tuple[ModelRef, Sampling | None]:
        """What the true engine is asked instead; sampling None: to score."""
        return ref, sampling

    async def generate(
        self,
        ids: Sequence[int],
        ref: ModelRef,
        sampling: Sampling,
        n: int = 1,
        *,
        replica: str | None = None,
    ) -> list[Completion]:
        instead, drawn = self.asked(ref, sampling)
        assert drawn is not None
        made = await self.true.generate(ids, instead, drawn, n, replica=replica)
        return [replace(one, policy=ref.policy, version=ref.version) for one in made]

    async def score(
        self, ids: Sequence[int], ref: ModelRef, replica: str | None = None
    ) -> list[float]:
        return await self.true.score(ids, self.asked(ref, None)[0], replica)

    async def publish(self, adapters: Mapping[str, Path]) -> TeamVersion:
        return await self.true.publish(adapters)

    async def retire(self, ref: ModelRef) -> None:
        await self.true.retire(ref)

    async def adapters(self, replica: str) -> Mapping[str, str]:
        return await self.true.adapters(replica)

    def info(self) -> Any:
        return self.true.info()

    async def close(self) -> None:
        await self.true.close()


class OtherWeights(Liar):
    """Lists every folder as published, but serves weights out of other ones, behind names that
    nobody sees."""

    def __init__(self, true: Engine) -> None:
        super().__init__(true)
        self.current: dict[str, Path] = {}  # policy -> its newest version's folder, twins left out
        self.previous: dict[str, Path] = {}
        self.hidden: dict[
            str, tuple[str, Path]
        ] = {}  # version -> the name it has in the true engine, the folder it is listed with

    def source(self, policy: str, folder: Path) -> Path:
        raise NotImplementedError

    async def publish(self, adapters: Mapping[str, Path]) -> TeamVersion:
        for policy, folder in adapters.items():
            if "-twin-" not in folder.name:
                self.previous[policy], self.current[policy] = (
                    self.current.get(policy, folder),
                    folder,
                )
        for policy, folder in adapters.items():
            behind = folder.with_name(f"{folder.name}-lie")
            shutil.copytree(folder, behind)
            shutil.copyfile(self.source(policy, folder) / WEIGHTS, behind / WEIGHTS)
            await self.true.publish({policy: behind})
            self.hidden[folder.name] = (behind.name, folder)
        return {policy: folder.name for policy, folder in adapters.items()}

    def asked(self, ref: ModelRef, sampling: Sampling | None) -> tuple[ModelRef, Sampling | None]:
        return (ModelRef(ref.policy, self.hidden[ref.version][0]) if ref.version else ref), sampling

    async def retire(self, ref: ModelRef) -> None:
        await self.true.retire(ModelRef(ref.policy, self.hidden.pop(ref.version)[0]))

    async def adapters(self, replica: str) -> Mapping[str, str]:
        assert {name for name, _ in self.hidden.values()} <= set(await self.true.adapters(replica))
        return {version: str(folder) for version, (_, folder) in self.hidden.items()}


class Honest(OtherWeights):
    """The same detour with the right weights: the detour is not what fails."""

    def source(self, policy: str, folder: Path) -> Path:
        return folder


class Swapped(OtherWeights):
    """The solver's weights under the reviewer's name, and the other way round."""

    def source(self, policy: str, folder: Path) -> Path:
        (other,) = set(self.current) - {policy}
        return self.current[other]


class Previous(OtherWeights):
    """Always one version late."""

    def source(self, policy: str, folder: Path) -> Path:
        return self.previous[policy]


class PreviousButTwins(Previous):
    """One version late, as after a reload that did not happen; what is loaded under a name never
    seen, as twins are, is right."""

    def source(self, policy: str, folder: Path) -> Path:
        return folder if "-twin-" in folder.name else self.previous[policy]


class BareBase(Liar):
    """Loads adapters and never applies them."""

    def asked(self, ref: ModelRef, sampling: Sampling | None) -> tuple[ModelRef, Sampling | None]:
        return ModelRef(ref.policy), sampling


class BareBaseButTwins(Liar):
    def asked(self, ref: ModelRef, sampling: Sampling | None) -> tuple[ModelRef, Sampling | None]:
        return (ref if "-twin-" in ref.version else ModelRef(ref.policy)), sampling


class Penalised(Liar):
    """A repetition penalty that nobody asked for. Scores have none."""

    def asked(self, ref: ModelRef, sampling: Sampling | None) -> tuple[ModelRef, Sampling | None]:
        return ref, sampling and replace(sampling, repetition_penalty=1.1)


class InPlace(Liar):
    """Every version of a policy behind one name and one path, which are written over and reloaded
    in place through vLLM's own call."""

    true: VLLMEngine

    def __init__(self, true: Engine) -> None:
        super().__init__(true)
        self.listed: dict[str, str] = {}

    async def publish(self, adapters: Mapping[str, Path]) -> TeamVersion:
        for policy, folder in adapters.items():
            live = folder.with_name(f"{policy}-live")
            if "-twin-" in folder.name:
                await self.true.publish({policy: folder})
            elif not live.exists():
                shutil.copytree(folder, live)
                await self.true.publish({policy: live})
            else:
                shutil.copyfile(folder / WEIGHTS, live / WEIGHTS)
                body = {"lora_name": live.name, "lora_path": str(live), "load_inplace": True}
                for replica in self.true.replicas.values():
                    await replica.request("POST", "/v1/load_lora_adapter", body)
            self.listed[folder.name] = str(folder)
        return {policy: folder.name for policy, folder in adapters.items()}

    def asked(self, ref: ModelRef, sampling: Sampling | None) -> tuple[ModelRef, Sampling | None]:
        return (
            ref
            if "-twin-" in ref.version or not ref.version
            else ModelRef(ref.policy, f"{ref.policy}-live")
        ), sampling

    async def retire(self, ref: ModelRef) -> None:
        del self.listed[ref.version]
        if "-twin-" in ref.version:
            await self.true.retire(ref)

    async def adapters(self, replica: str) -> Mapping[str, str]:
        return self.listed
