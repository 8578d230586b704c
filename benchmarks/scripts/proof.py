"""Residual of the live proof for right adapters and for wrong ones, on vLLM:
python -m benchmarks.scripts.proof RUN

RUN is a finished run of the demo (`make demo`). From its stored steps two teams learn anew, at
learning rates 1e-5 and 1e-4. After every step but the first, each policy's adapter is served as
itself, as it was one step earlier, and as the other policy's.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM

from marlora.agents.types import BASE, AdapterSpec, PolicySpec
from marlora.rollouts.engines.base import Engine, ModelRef
from marlora.rollouts.engines.config import EngineConfig
from marlora.rollouts.engines.factory import start_engine
from marlora.rollouts.engines.hardware import choose_dtype, has_gpu
from marlora.rollouts.episodes.store import Store
from marlora.rollouts.renderer import ChatRenderer, load_tokenizer
from marlora.rollouts.types import Episode
from marlora.trainers.batching.samples import samples
from marlora.trainers.credit.rules import credit
from marlora.trainers.distributed.ranks import Ranks
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig
from marlora.trainers.model.adapters import Adapters
from marlora.trainers.model.local_models import local_model
from marlora.trainers.testbeds.pretraining import one_thread
from marlora.trainers.update.losses.policy_gradient import policy_loss
from marlora.trainers.update.optimizer_step import Optimizers, update
from marlora.trainers.weight_sync.log_prob_gaps import minus, norm
from marlora.trainers.weight_sync.probes import Probe, probes
from marlora.trainers.weight_sync.publisher import Publisher
from marlora.trainers.weight_sync.verification import WeightVerifier

FROM_RUN = ("loss_type", "epsilon_high", "credit", "tokens_per_batch")
STEPS = 3


async def residuals(
    verifier: WeightVerifier, policy: str, versions: list[str], windows: list[Probe]
) -> list[float]:
    """Of the adapter that the trainer has, against each of these versions as served."""
    asked = [probe.window for probe in windows]
    base = await verifier._trained(asked, BASE)
    factor, trained = await verifier._amplify(policy, asked, base)
    residuals = []
    for version in versions:
        async with verifier._twin(policy, version, factor) as twin:
            served = await verifier._scores(
                asked, ModelRef(policy, twin), verifier.engine.info().replicas[0]
            )
        residuals.append(norm(minus(served, trained)) / norm(minus(trained, base)))
    return residuals


async def measure(
    engine: Engine,
    adapters: Adapters,
    config: GRPOConfig,
    episodes: dict[int, list[Episode]],
    root: Path,
) -> None:
    optimizers, publisher, names = (
        Optimizers(adapters, config),
        Publisher(root, adapters, engine),
        list(adapters.trainable),
    )
    for step in range(1, STEPS + 1):
        learnt, _ = samples(
            episodes[step], credit(episodes[step], config, {}), {name: name for name in names}
        )
        update(optimizers, learnt, lambda inputs: policy_loss(inputs, config), step, Ranks())
        earlier = dict(publisher.versions)
        versions = await publisher.publish(step, names)
        for name, other in zip(names, [*names[1:], names[0]], strict=True):
            if step > 1:
                windows = probes(episodes[step], name)
                row = await residuals(
                    publisher.verifier,
                    name,
                    [versions[name], earlier[name], versions[other]],
                    windows,
                )
                line = "  ".join(
                    f"{what} {x:.3f}"
                    for what, x in zip(("itself", "a step earlier", f"{other}'s"), row, strict=True)
                )
                print(f"{config.learning_rate:g}  step {step}  {name}: {line}", flush=True)


async def main(run: Path) -> None:
    given, folder = (
        yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")),
        run / "bench-proof",
    )
    model = local_model(given["model"])
    shape = AdapterSpec(
        r=given["lora_r"], alpha=given["lora_alpha"], targets=tuple(given["lora_target_modules"])
    )
    policies = [PolicySpec(name, adapter=shape) for name in sorted(given["agents"])]
    store = Store(run / "episodes")
    episodes = {
        step: [e for e in store.read(step=step) if e.split == "train"]
        for step in range(1, STEPS + 1)
    }
    settings = EngineConfig(engine="vllm", max_model_len=given["max_model_len"])
    engine = await start_engine(
        model, ChatRenderer(load_tokenizer(model)), policies, settings, folder=folder, say=print
    )
    try:
        for rate in (1e-5, 1e-4):
            dtype = getattr(torch, choose_dtype(model, "auto", on_gpu=has_gpu()))
            adapters = Adapters(
                AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
                policies,
                seed=0,
                base_name=model,
            )
            config = GRPOConfig(
                num_iterations=1, learning_rate=rate, **{name: given[name] for name in FROM_RUN}
            )
            await measure(engine, adapters, config, episodes, folder / "versions")
    finally:
        await engine.close()


if __name__ == "__main__":
    with one_thread():
        asyncio.run(main(Path(sys.argv[1])))
