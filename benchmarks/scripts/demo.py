"""Processor seconds of one pass of the demo's update over a run's stored episodes, by layout:
python -m benchmarks.scripts.demo RUN LAYOUT..."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM

from marlora.agents.types import AdapterSpec, PolicySpec
from marlora.rollouts.engines.hardware import choose_dtype, has_gpu
from marlora.rollouts.episodes.store import Store
from marlora.trainers.batching.samples import samples
from marlora.trainers.credit.rules import credit
from marlora.trainers.distributed.ranks import Ranks
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig
from marlora.trainers.model.adapters import Adapters
from marlora.trainers.model.local_models import local_model
from marlora.trainers.testbeds.pretraining import one_thread
from marlora.trainers.update.losses.policy_gradient import policy_loss
from marlora.trainers.update.optimizer_step import Optimizers, update

REPEATS = 2


def measure(run: Path, layouts: list[str]) -> dict[str, float]:
    """Of the first step's episodes, layouts in turns after a round that does not count. The run's
    own settings, but for the layout."""
    given = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    names = sorted(given["agents"])
    shape = AdapterSpec(
        r=given["lora_r"], alpha=given["lora_alpha"], targets=tuple(given["lora_target_modules"])
    )
    model = local_model(given["model"])
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, choose_dtype(model, "auto", on_gpu=has_gpu()))
    )
    adapters = Adapters(
        network, [PolicySpec(name, adapter=shape) for name in names], seed=0, base_name=model
    )
    kept = ("loss_type", "epsilon_high", "credit", "learning_rate", "tokens_per_batch")
    made = {
        x: Optimizers(
            adapters, GRPOConfig(num_iterations=1, layout=x, **{k: given[k] for k in kept})
        )
        for x in layouts
    }
    config: GRPOConfig = next(iter(made.values())).config  # type: ignore[assignment]
    episodes = [
        episode for episode in Store(run / "episodes").read(step=1) if episode.split == "train"
    ]
    learnt, _ = samples(episodes, credit(episodes, config, {}), {name: name for name in names})
    print(
        f"{len(learnt)} samples of {sum(len(sample.ids) for sample in learnt)} tokens,"
        f" {network.dtype}"
    )
    laps: dict[str, list[float]] = {layout: [] for layout in layouts}
    for _ in range(REPEATS + 1):
        for layout, optimizers in made.items():
            start = time.process_time()
            update(optimizers, learnt, lambda inputs: policy_loss(inputs, config), 1, Ranks())
            laps[layout].append(time.process_time() - start)
    return {layout: statistics.median(seconds[1:]) for layout, seconds in laps.items()}


if __name__ == "__main__":
    with one_thread():
        for layout, seconds in measure(Path(sys.argv[1]), sys.argv[2:]).items():
            print(f"{layout} {seconds:.2f} s")
