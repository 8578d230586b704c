"""Parts of `marlora bench gpu` that train without a server: an optimizer step with few and many
adapters, trees against packed rows, and the language-model head."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ....agents.types import PolicySpec
from ...batching.batches import Layout, pack
from ...batching.samples import TrainingSequence
from ...distributed.ranks import Ranks
from ...methods.policy_gradient.grpo import GRPOConfig
from ...model.adapters import Adapters
from ...model.fused_lm_head import find_fused_head
from ...model.layout_probe import Way as TreeWay
from ...model.layouts import choose_layout, forced
from ...model.lm_head import of_logits, score
from ...update.losses.policy_gradient import policy_loss
from ...update.optimizer_step import Optimizers, update
from ..geometry import LORA, needed, network
from ..measure import EQUAL, Options, Time, Way, apart, memory, race, rates
from ..update import POLICY, TOKENS, Case, disturb, gradient, recorded, with_logprobs
from .work import Work, peak_flops

# Largest relative norm of the difference of two gradients: half precision adds up over tens of
# layers, and a wrong mask or head is off by about 1.
NEAR = {torch.float32: EQUAL[torch.float32], torch.bfloat16: 0.2}
Results = Iterator[tuple[str, dict[str, Any]]]


def update_part(options: Options, work: Work) -> Results:
    """An optimizer step of every geometry with each number of adapters: raw tokens per second,
    and model FLOPs utilisation (MFU) of the FLOPs it cannot do without."""
    best = rates(options.device, options.dtype)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    sheet = peak_flops(name)
    yield "device", {**best, "data_sheet_flops_per_s": sheet, "says": name}
    for size in work.update:
        for number in work.adapters:
            found = _step(size, number, options, work.case)
            mfu = found["flops_per_s"] / (sheet or best["flops_per_s"])
            found |= {"mfu": mfu, "mfu_of": "data sheet" if sheet else "measured matrix product"}
            says = f"{found['tokens_per_s']:,.0f} tokens/s, MFU {mfu:.2f}"
            yield f"{size}, {number} adapters", found | {"says": says}


def _step(size: str, number: int, options: Options, case: Case) -> dict[str, Any]:
    """Seconds of a step in which each of `number` adapters learns from sequences of its own."""
    names = [f"agent{k}" for k in range(number)]
    base = network(size, options.device, options.dtype)
    samples = [s for k, name in enumerate(names) for s in recorded(case, seed=k, policy=name)]
    work = [needed(base, [s for s in samples if s.policy == name]) for name in names]
    adapters = Adapters(base, [PolicySpec(name, adapter=LORA) for name in names], seed=0)
    config, ranks = GRPOConfig(tokens_per_batch=TOKENS), Ranks()
    ranks.device = torch.device(options.device)
    optimizers = Optimizers(adapters, config)
    laps = []
    for step in range(1, options.repeats + 2):
        start = _now(options)
        update(optimizers, samples, lambda inputs: policy_loss(inputs, config), step, ranks)
        laps.append(_now(options) - start)
    seconds, most = statistics.median(laps[1:]), _peak_bytes(options)
    del base, adapters, optimizers
    free_memory()
    return {
        "seconds": seconds,
        "tokens": sum(len(s.ids) for s in samples),
        "unique_tokens": sum(w.unique for w in work),
        "tokens_per_s": sum(len(s.ids) for s in samples) / seconds,
        "flops_per_s": sum(w.flops for w in work) / seconds,
        "peak_bytes": most,
    }


def trees_part(options: Options, work: Work) -> Results:
    """Forward and backward of trees of about 20 leaves: by branches and by FlexAttention, against
    packed rows that share nothing, with peak memory of each above the model's."""
    size = work.update[0]
    adapters = Adapters(
        network(size, options.device, options.dtype), [PolicySpec(POLICY, adapter=LORA)], seed=0
    )
    disturb(adapters, seed=1)
    choose_layout(adapters.model)
    for case in work.trees:
        samples = with_logprobs(adapters, recorded(case))
        ways, first, refused = _tree_ways(adapters, samples)
        times = race("gpu", ways, options.repeats, apart, NEAR[options.dtype])
        packed = times["packed"]
        found = {name: time_.to_json() | {"first_s": first[name]} for name, time_ in times.items()}
        yield (
            f"{size}, {case.group} leaves of {case.reply} after {case.prompt}",
            {
                "rho": case.rho,
                "ways": found,
                "refused": refused,
                "says": "; ".join(_over(name, t, packed) for name, t in times.items()),
            },
        )


def _tree_ways(
    adapters: Adapters, samples: Sequence[TrainingSequence]
) -> tuple[list[Way], dict[str, float], dict[str, str]]:
    """The ways that run here, seconds of the first run of each (a compiler's among them), and why
    another does not."""
    first: dict[str, float] = {}
    refused: dict[str, str] = {}
    made: list[Way] = []
    plans: tuple[tuple[str, Layout, TreeWay], ...] = (
        ("packed", "packed", "branches"),
        ("branches", "shared", "branches"),
        ("flex", "shared", "flex"),
    )
    for name, layout, tree_way in plans:
        rows = [b.to(adapters.device) for b in pack(samples, max_tokens=TOKENS, layout=layout)]

        def run(rows: Any = rows, tree_way: TreeWay = tree_way) -> torch.Tensor:
            with forced(adapters.model, tree_way):
                return gradient(adapters, rows, samples)

        start = time.perf_counter()
        try:
            run()
        except Exception as error:  # kernels and compilers raise kinds of their own
            refused[name] = f"{type(error).__name__}: {str(error)[:300]}"
            continue
        free_memory()
        first[name] = time.perf_counter() - start
        made.append(Way(name, run))
    return made, first, refused


def _over(name: str, time_: Time, packed: Time) -> str:
    gib = f", {time_.bytes / 2**30:.2f} GiB" if time_.bytes is not None else ""
    return f"{name} {packed.seconds / time_.seconds:.2f} x packed{gib}"


def head_part(options: Options, work: Work) -> Results:
    """Log-probs of trained terms and the gradient of their hidden states: our chunked head, TRL's
    fused kernel, and plain logits."""
    terms, width, vocabulary = work.head
    generator = torch.Generator(options.device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=options.device, dtype=options.dtype)

    hidden = drawn(terms, width)
    head = torch.nn.Linear(width, vocabulary, bias=False, device="meta", dtype=options.dtype)
    head.weight = torch.nn.Parameter(drawn(vocabulary, width) * width**-0.5, requires_grad=False)
    target = torch.arange(terms, device=options.device) % vocabulary
    ones = torch.ones(terms, device=options.device)
    fused, why = find_fused_head()

    def way(name: str, run: Callable[[torch.Tensor], Any]) -> Way:
        def gradient_of() -> torch.Tensor:
            leaf = hidden.clone().requires_grad_()
            run(leaf)[0].sum().backward()
            assert leaf.grad is not None
            return leaf.grad.float()

        return Way(name, gradient_of)

    ways = [
        way("plain", lambda h: of_logits(head(h), target, ones, False)),
        way("ours", lambda h: score(head, None, h, target, ones, entropy_grad=False, fuse=False)),
    ]
    if fused is not None:
        ways.append(way("trl", lambda h: fused(h, head.weight, None, target, 1.0, None)))
    times = race("gpu", ways, options.repeats, apart, NEAR[options.dtype])
    says = ", ".join(f"{name} {1000 * t.seconds:.1f} ms" for name, t in times.items())
    yield (
        f"{terms} terms, {width} to {vocabulary}",
        {
            "ways": {name: time_.to_json() for name, time_ in times.items()},
            "refused": {} if fused else {"trl": why},
            "says": says,
        },
    )


def _now(options: Options) -> float:
    """Seconds: of the wall where a GPU does the work, else of the processor."""
    if options.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes(options: Options) -> int:
    """Most bytes taken: of the GPU since its record was reset, or of the process on a CPU."""
    return memory("VmHWM") if options.device == "cpu" else torch.cuda.max_memory_allocated()


def free_memory() -> None:
    """Give back what the GPU's allocator keeps, and forget its largest use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
