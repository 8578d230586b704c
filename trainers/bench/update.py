"""`marlora bench update`: forward and backward of a training step, marlora's against other ways to
do it, for shares of common prefixes from none to eight tokens of nine.

All train on the same tokens, drawn from a seed (no engine is needed for them), with rewards +1 and
-1 in every group and the behaviour's log-probabilities equal to the trainer's, so that all losses
have one gradient: ours within 1e-5 of it, or there is no ratio.

    ours      what `trainers/update/optimizer_step.py` does, laid out as `layout: auto` says
    padded    one sample a row, rows padded to one length, our head (trained positions only)
    per_turn  one sample at a time
    trl       TRL's `GRPOTrainer`, fed by `rollout_func`: the log-probs of the old policy that it
              computes for rollouts of an engine, its loss, backward
    trl_compact_head    the same, its head on the trained positions only, as where Triton runs; on
              a CPU it computes every position (`trl_old_s` of the JSON: seconds of either that are
              the old policy's log-probs)
"""

from __future__ import annotations

import dataclasses
import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from ...agents.types import PolicySpec, SettingError
from ..batching.batches import Batch, pack
from ..batching.samples import TrainingSequence, denominators
from ..model.adapters import Adapters
from ..model.layouts import choose_layout
from ..model.logprobs import token_logprobs
from ..testbeds.pretraining import one_thread
from ..testbeds.tiny import tiny_tokenizer
from ..update.losses.inputs import LossInputs
from ..update.losses.policy_gradient import LossConfig, policy_loss
from .geometry import LORA, Needed, check_size, needed, network
from .measure import EQUAL, Options, Time, Way, apart, machine, race, rates, ratios, table

POLICY = "solver"
TOKENS = 8192  # of a batch


@dataclass(frozen=True)
class Case:
    """`group` replies of `reply` tokens to one prompt. Without a prompt the sequences share
    nothing. `full`: with every opponent, and of the length that agents' sequences have, on a GPU
    too."""

    group: int
    prompt: int
    reply: int
    full: bool = False

    @property
    def rho(self) -> float:
        """Raw over unique tokens."""
        return self.group * (self.prompt + self.reply) / (self.prompt + self.group * self.reply)

    def times(self, scale: int) -> Case:
        return (
            self
            if self.full
            else dataclasses.replace(self, prompt=self.prompt * scale, reply=self.reply * scale)
        )


CASES = (
    Case(8, 0, 8),
    Case(8, 16, 12),
    Case(8, 32, 10),
    Case(8, 384, 48, full=True),
    Case(8, 80, 4),
    Case(16, 112, 8),
)
SCALE = {"qwen3-0.6b": 8, "qwen3-4b": 8, "qwen3-8b": 4}  # sequences of a GPU's size


def recorded(
    case: Case, groups: int = 1, seed: int = 0, policy: str = POLICY
) -> list[TrainingSequence]:
    """The samples of `groups` tasks."""
    rng = random.Random(seed)
    sequences = []
    for group in range(groups):
        common = [rng.randrange(5, 261) for _ in range(case.prompt)]
        for number in range(case.group):
            own = [rng.randrange(5, 261) for _ in range(case.reply + (0 if case.prompt else 1))]
            own[0] = (
                5 + number + case.group * group
            )  # two replies that began alike would share more than the prompt
            ids, first = tuple(common + own), case.prompt or 1
            mask = tuple(int(i >= first) for i in range(len(ids)))
            advantage = 1.0 if number % 2 else -1.0
            sequences.append(
                TrainingSequence(
                    policy,
                    f"{group}/{number}",
                    ids,
                    mask,
                    (0.0,) * len(ids),
                    tuple(advantage * m for m in mask),
                    (1.0,) * len(ids),
                    tuple(m - 1 for m in mask),
                )
            )
    return sequences


def disturb(adapters: Adapters, seed: int, std: float = 0.02) -> None:
    """Add noise to every B, so that adapters differ from the base and every gradient is alive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(adapters.policies):
            for key, parameter in adapters.parameters(name).items():
                if ".lora_B." in key:
                    parameter.add_(
                        (torch.randn(parameter.shape, generator=generator) * std).to(
                            parameter.device
                        )
                    )


def with_logprobs(
    adapters: Adapters, samples: Sequence[TrainingSequence]
) -> list[TrainingSequence]:
    """The samples with the current policy's log-probabilities as those they were sampled with."""
    values = torch.zeros(sum(s.num_trained for s in samples))
    for batch in pack(samples, max_tokens=TOKENS, layout="padded"):
        with torch.no_grad(), adapters.active(batch.policy):
            logprobs, _ = token_logprobs(adapters.model, batch.to(adapters.device))
            values[batch.token_index] = logprobs.cpu()
    flat_values = iter(values.tolist())
    return [
        dataclasses.replace(s, logprobs=tuple(next(flat_values) if m else 0.0 for m in s.mask))
        for s in samples
    ]


def gradient(
    adapters: Adapters, batches: Sequence[Batch], samples: Sequence[TrainingSequence]
) -> torch.Tensor:
    """Forward and backward of all batches; the adapter's gradient as one vector."""
    parameters = list(adapters.parameters(POLICY).values())
    counts = denominators(samples)[POLICY]
    for parameter in parameters:
        parameter.grad = None
    with adapters.active(POLICY):
        for batch in batches:
            logp, entropy = token_logprobs(adapters.model, batch)
            inputs = LossInputs.of(batch, logp, entropy, counts)
            policy_loss(inputs, LossConfig())[0].backward()
    return flat(parameters)


def flat(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([p.grad.flatten().float() for p in parameters if p.grad is not None])


def ways(adapters: Adapters, samples: Sequence[TrainingSequence]) -> list[Way]:
    """Ours, padded, and one sequence at a time."""
    auto, device = choose_layout(adapters.model), adapters.device

    def way(name: str, batches: Sequence[Batch]) -> Way:
        moved = [batch.to(device) for batch in batches]
        return Way(name, lambda: gradient(adapters, moved, samples))

    return [
        way("ours", pack(samples, max_tokens=TOKENS, layout=auto)),
        way("padded", pack(samples, max_tokens=TOKENS, layout="padded")),
        way(
            "per_turn",
            [
                batch
                for sample in samples
                for batch in pack([sample], max_tokens=TOKENS, layout="padded")
            ],
        ),
    ]


def trl_ways(
    adapters: Adapters, samples: Sequence[TrainingSequence], options: Options
) -> tuple[list[Way], list[float]]:
    """TRL's trainer on the same tokens, with a copy of base and adapter of its own (it patches what
    it trains), and the processor seconds of every computation of the old policy's log-probs."""
    mine = Adapters(
        network(options.size, options.device, options.dtype),
        [PolicySpec(POLICY, adapter=LORA)],
        seed=0,
    )
    with torch.no_grad():
        for key, parameter in adapters.parameters(POLICY).items():
            mine.parameters(POLICY)[key].copy_(parameter)
    trainer, inputs = _trl_trainer(mine, samples, options)
    parameters, old_s = list(mine.parameters(POLICY).values()), list[float]()

    def run(compact: bool) -> torch.Tensor:
        for parameter in parameters:
            parameter.grad = None
        with (
            mine.active(POLICY),
            mock.patch(
                "trl.trainer.utils._use_triton", lambda device: compact or device.type == "cuda"
            ),
        ):
            start = time.process_time()
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            with torch.no_grad():
                old = trainer._get_per_token_logps_and_entropies(
                    trainer.model, ids, seen, inputs["completion_ids"].shape[1]
                )[0]
            old_s.append(time.process_time() - start)
            trainer.compute_loss(trainer.model, {**inputs, "old_per_token_logps": old}).backward()
        return flat(parameters)

    return [Way("trl", lambda: run(False)), Way("trl_compact_head", lambda: run(True))], old_s


def _trl_trainer(
    adapters: Adapters, samples: Sequence[TrainingSequence], options: Options
) -> tuple[Any, dict[str, Any]]:
    """(`GRPOTrainer`, the inputs of its loss for the samples)."""
    os.environ.setdefault(
        "TRL_EXPERIMENTAL_SILENCE", "1"
    )  # `rollout_func` is experimental, and says so each time
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    first = [s.mask.index(1) for s in samples]
    prompts = [list(s.ids[:at]) for s, at in zip(samples, first, strict=True)]
    replies = [list(s.ids[at:]) for s, at in zip(samples, first, strict=True)]
    logprobs = [list(s.logprobs[at:]) for s, at in zip(samples, first, strict=True)]
    fed = {"prompt_ids": prompts, "completion_ids": replies, "logprobs": logprobs}
    rewards = [s.advantages[-1] for s in samples]
    count = len(samples)
    with tempfile.TemporaryDirectory(prefix="marlora-bench-") as folder:
        args = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=count,
            num_generations=count,
            gradient_accumulation_steps=1,
            beta=0.0,
            loss_type="dapo",
            scale_rewards="none",
            max_completion_length=max(map(len, replies)),
            temperature=1.0,
            gradient_checkpointing=False,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=options.device == "cpu",
            dataloader_pin_memory=False,
        )
        trainer = GRPOTrainer(
            model=adapters.model,
            reward_funcs=lambda completions, **columns: rewards,
            args=args,
            processing_class=tiny_tokenizer(),
            train_dataset=Dataset.from_dict({"prompt": ["the same"] * count}),
            rollout_func=lambda prompts, trainer: fed,
        )
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        with adapters.active(POLICY):
            inputs = trainer._generate_and_score_completions([{"prompt": "the same"}] * count)
    return trainer, inputs


OPPONENTS = ("padded", "per_turn", "trl", "trl_compact_head")


def compare(
    adapters: Adapters, case: Case, options: Options, best: dict[str, float]
) -> dict[str, Any]:
    """One case: seconds, memory and FLOPs of every way, and their ratios to ours. Raises `RunError`
    if gradients differ."""
    samples = with_logprobs(adapters, recorded(case))
    names = {"ours", *(options.opponents or (OPPONENTS if case.full else ("padded",)))}
    runs, old_s = ways(adapters, samples), list[float]()
    if names & {"trl", "trl_compact_head"}:
        theirs, old_s = trl_ways(adapters, samples, options)
        runs += theirs
    runs = [way for way in runs if way.name in names]
    times = race("update", runs, options.repeats, apart, EQUAL[options.dtype], count=True)
    gc.collect()  # a trainer of TRL's holds itself, and its model
    work, label = needed(adapters.model.get_base_model(), samples), f"{case.rho:g}"
    times_to_ours = ratios(times, "ours", label)
    padded, ours = (times[name].bytes if name in times else None for name in ("padded", "ours"))
    row = [
        label,
        f"{max(t.difference for t in times.values()):.0e}",
        f"{times['ours'].seconds:.3f}",
        *(f"{times_to_ours[f'{name}@{label}']:.2f}" if name in times else "" for name in OPPONENTS),
        f"{work.flops / best['flops_per_s'] / times['ours'].seconds:.2f}",
        f"{padded / ours:.2f}" if padded and ours else "",
    ]
    return {
        "rho": case.rho,
        **dataclasses.asdict(case),
        "flops_useful": work.flops,
        "bound_s": work.flops / best["flops_per_s"],
        "ways": {name: _shares_of_time(t, work, best) for name, t in times.items()},
        "ratios": times_to_ours,
        "row": row,
        **({"trl_old_s": statistics.median(old_s)} if old_s else {}),
    }


def _shares_of_time(time_: Time, work: Needed, best: dict[str, float]) -> dict[str, Any]:
    """`roofline`: share of the time that the useful FLOPs take at the device's rate; `busy`: the
    same of the FLOPs spent."""
    share = {
        "roofline": work.flops / best["flops_per_s"] / time_.seconds,
        "busy": (time_.flops or 0) / best["flops_per_s"] / time_.seconds,
    }
    return {**time_.to_json(), **share}


def update(options: Options) -> dict[str, Any]:
    """Forward and backward of a step on the geometry `options.size`, over shares of common
    tokens."""
    check_size(options.size)
    chosen = [case for case in CASES if not options.rho or case.rho in options.rho]
    if missing := [f"{rho:g}" for rho in options.rho if rho not in {case.rho for case in CASES}]:
        raise SettingError(
            f"--rho {', '.join(missing)}: expected some of"
            f" {', '.join(f'{case.rho:g}' for case in CASES)}"
        )
    if unknown := sorted(set(options.opponents) - set(OPPONENTS)):
        raise SettingError(
            f"--opponents {', '.join(unknown)}: the update is raced against {', '.join(OPPONENTS)}"
        )
    with one_thread():  # threads that wait for a busy core spin, and would count as work
        best = rates(options.device, options.dtype)
        adapters = Adapters(
            network(options.size, options.device, options.dtype),
            [PolicySpec(POLICY, adapter=LORA)],
            seed=0,
        )
        disturb(adapters, seed=1)
        scale = SCALE.get(options.size, 1)
        results, where = (
            [compare(adapters, case.times(scale), options, best) for case in chosen],
            machine(),
        )
    joined = {name: value for r in results for name, value in r["ratios"].items()}
    rows = [r.pop("row") for r in results]
    others = [f"{name} / ours" for name in OPPONENTS]
    columns = [
        "raw / unique",
        "gradients differ",
        "ours, s",
        *others,
        "roofline share",
        "memory, padded / ours",
    ]
    return {
        "suite": "update",
        "size": options.size,
        "clock": "wall" if options.device != "cpu" else "processor time, one thread",
        **where,
        "device_rates": best,
        "lora": dataclasses.asdict(LORA),
        "ratios": joined,
        "results": results,
        **table(f"update: {options.size}, seconds of others over ours", columns, rows),
    }
