"""`marlora bench`: small measurements that anyone can repeat, each behind a gate on equal results.

What is compared runs in turns (A B A B ...) in one process, on one thread, so that a machine that slows down slows both. Given are
medians of process time and wall time. If two ways do not give the same gradients there is no ratio, only an error.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..agents.types import AdapterSpec, PolicySpec, Sampling
from ..rollouts import sandbox as run_in
from ..rollouts.engines.engine import Ref
from ..rollouts.engines.transformers import TransformersEngine
from .adapters import Adapters
from .bases import versions
from .batches import Batch, Layout, pack
from .config import RunError
from .logprobs import token_logprobs
from .losses import LossConfig, policy_loss
from .publish import Probe, Publisher
from .samples import Sample, denominators
from .tiny import one_thread, tiny_network, tiny_random_model

EQUAL = 1e-5  # relative norm of the difference of two gradients in float32
GROUP, REPLY = 8, 32  # episodes of a task, tokens of a reply
PROMPTS = (0, 40, 120, 300)  # tokens of the common prompt; 0: nothing in common, so both ways are the same work and the ratio is 1
SPEC = AdapterSpec(r=8, alpha=16.0, targets=("q_proj", "k_proj", "v_proj"))


def machine() -> dict[str, Any]:
    """Where it was measured."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "versions": versions()}


def measure(ways: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of each way, run in turns after one round that does not count."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, run in ways.items():
            start, process = time.perf_counter(), time.process_time()
            run()
            if number:
                found[name].append((time.perf_counter() - start, time.process_time() - process))
    return {
        name: {"wall": statistics.median(w for w, _ in times), "process": statistics.median(p for _, p in times)}
        for name, times in found.items()
    }


def disturb(adapters: Adapters, seed: int, std: float = 0.02) -> None:
    """Add noise to every B, so that adapters differ from the base and every gradient is alive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in sorted(adapters.policies):
            for key, parameter in adapters.parameters(name).items():
                if ".lora_B." in key:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


# update: rows padded to one length against rows that share prefixes


def recorded(prompt: int, groups: int = 1, seed: int = 0) -> list[Sample]:
    """Samples of `groups` tasks: `prompt` tokens in common and a reply each. Without a prompt the sequences share nothing."""
    rng = random.Random(seed)
    found = []
    for group in range(groups):
        common = [rng.randrange(5, 261) for _ in range(prompt)]
        for number in range(GROUP):
            own = [rng.randrange(5, 261) for _ in range(REPLY + (0 if prompt else 1))]
            own[0] = 5 + number + GROUP * group  # two replies that began alike would share more than the prompt
            ids, first = tuple(common + own), prompt or 1
            mask = tuple(int(i >= first) for i in range(len(ids)))
            advantage = 1.0 if number % 2 else -1.0
            found.append(Sample("solver", f"{group}/{number}", ids, mask, (0.0,) * len(ids), tuple(advantage * m for m in mask),
                                (1.0,) * len(ids), tuple(m - 1 for m in mask)))  # fmt: skip
    return found


def with_logprobs(adapters: Adapters, samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the current policy's log-probabilities as those they were sampled with."""
    found = []
    for sample in samples:
        (batch,) = pack([sample], max_tokens=10**6, layout="padded")
        with torch.no_grad(), adapters.active("solver"):
            values = iter(token_logprobs(adapters.model, batch)[0].tolist())
        found.append(dataclasses.replace(sample, logprobs=tuple(next(values) if m else 0.0 for m in sample.mask)))
    return found


def gradient(adapters: Adapters, batches: Sequence[Batch], samples: Sequence[Sample]) -> torch.Tensor:
    """Forward and backward of all batches; the adapter's gradient as one vector."""
    parameters = list(adapters.parameters("solver").values())
    counts = denominators(samples)["solver"]
    for parameter in parameters:
        parameter.grad = None
    with adapters.active("solver"):
        for batch in batches:
            logp, entropy = token_logprobs(adapters.model, batch)
            policy_loss(logp, entropy, batch, LossConfig(), counts)[0].backward()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def compare(adapters: Adapters, prompt: int, repeats: int) -> dict[str, Any]:
    """One size of prompt: tokens, seconds of both layouts, and their ratio. Raises `RunError` if the gradients differ."""
    samples = with_logprobs(adapters, recorded(prompt))
    layouts: tuple[Layout, Layout] = ("padded", "shared")
    batches = {layout: pack(samples, max_tokens=8192, layout=layout) for layout in layouts}
    padded, shared = (gradient(adapters, batches[layout], samples) for layout in layouts)
    off = float((padded - shared).norm() / padded.norm())
    if not off <= EQUAL:
        raise RunError(
            f"bench update: gradients of padded and shared rows differ by {off:.1e} (at most {EQUAL:.0e}); no ratio is given"
        )
    tokens = {layout: sum(int(batch.attention_mask.sum()) for batch in found) for layout, found in batches.items()}
    seconds = measure({name: lambda found=found: gradient(adapters, found, samples) for name, found in batches.items()}, repeats)  # type: ignore[misc]
    ratio = {clock: seconds["padded"][clock] / seconds["shared"][clock] for clock in ("wall", "process")}
    return {"prompt": prompt, "raw_over_unique": tokens["padded"] / tokens["shared"], "tokens": tokens, "gradient_difference": off,
            "seconds": seconds, "padded_over_shared": ratio}  # fmt: skip


def update(repeats: int) -> dict[str, Any]:
    """Forward and backward of a step on the tiny geometry, at several shares of common tokens."""
    adapters = Adapters(tiny_network(), [PolicySpec("solver", adapter=SPEC)], seed=0)
    disturb(adapters, seed=1)
    with one_thread():  # threads that wait for a busy core spin, and would count as work
        results, where = [compare(adapters, prompt, repeats) for prompt in PROMPTS], machine()
    rows = [
        [
            f"{r['raw_over_unique']:.2f}", f"{r['tokens']['padded']}", f"{r['gradient_difference']:.0e}",
            *(f"{r['seconds'][way]['process']:.3f}" for way in ("padded", "shared")),
            *(f"{r['padded_over_shared'][clock]:.2f}" for clock in ("process", "wall")),
        ]
        for r in results
    ]  # fmt: skip
    columns = ["raw / unique tokens", "raw", "gradients differ", "padded, s", "shared, s", "ratio, process", "ratio, wall"]
    return {"suite": "update", "repeats": repeats, "group": GROUP, "reply": REPLY, **where, "results": results,
            "title": "update: padded rows over rows that share prefixes", "columns": columns, "rows": rows}  # fmt: skip


# publish: from a trained adapter to a proven version


def publish(repeats: int) -> dict[str, Any]:
    """Seconds to stage and load a new version, and to prove it, with the transformers engine on a small random model."""
    with tempfile.TemporaryDirectory(prefix="marlora-bench-") as folder, one_thread():
        results, where = asyncio.run(_publish(Path(folder), repeats)), machine()
    median = {part: statistics.median(r[part] for r in results) for part in ("publish", "prove")}
    return {
        "suite": "publish", "repeats": repeats, **where, "results": results, "median": median,
        "title": "publish: one adapter on one replica, in this process", "columns": ["part", "median, s", "smallest", "largest"],
        "rows": [[what, f"{median[part]:.3f}", f"{min(r[part] for r in results):.3f}", f"{max(r[part] for r in results):.3f}"]
                 for part, what in (("publish", "stage and load"), ("prove", "live proof"))],
    }  # fmt: skip


async def _publish(folder: Path, repeats: int) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model = tiny_random_model(folder / "model", hidden_size=128, layers=3)
    adapters = Adapters(AutoModelForCausalLM.from_pretrained(model), [PolicySpec("solver", adapter=SPEC)], seed=0)
    engine = TransformersEngine(model)
    publisher = Publisher(folder / "versions", adapters, engine)
    prompts = [tuple(recorded(40, seed=seed)[0].ids[:40]) for seed in range(2)]
    try:
        replies = [(await engine.generate(p, Ref("solver", ""), Sampling(max_tokens=16, seed=1)))[0] for p in prompts]
        probes = [Probe(reply.prompt_ids + reply.token_ids, len(reply.prompt_ids)) for reply in replies]
        found = []
        for step in range(1, repeats + 2):
            disturb(adapters, seed=step)
            start = time.perf_counter()
            await publisher.publish(step, ["solver"])
            published = time.perf_counter()
            (proof,) = await publisher.prove(step, {"solver": probes}, final=True)  # a failed proof raises
            if proof.status != "passed":
                raise RunError(f"bench publish: the proof of {proof.version} is {proof.status} ({proof.reason}); no time is given")
            if step > 1:  # the first one warms up
                found.append({"publish": published - start, "prove": time.perf_counter() - published, "residual": proof.residual})
        return found
    finally:
        await engine.close()


# sandbox: what a program costs before it does anything


def sandbox(repeats: int) -> dict[str, Any]:
    """Median seconds of the smallest program, call and check in the sandbox, beside a bare Python that does nothing."""
    exam = run_in.Exam(("assert f(2) == 4",), ("f",))

    async def answer(text: str) -> str:
        return text

    async def once() -> dict[str, float]:
        found = {}
        for name, start in (
            ("workflow program", lambda: run_in.run("1 + 1", {})),
            ("workflow program, ten calls", lambda: run_in.run("for _ in range(10):\n    await answer('x')", {"answer": answer})),
            ("plain Python", lambda: run_in.run("print(2)")),
            ("check, two processes", lambda: run_in.check("def f(x): return x * x", exam)),
            ("bare Python", lambda: asyncio.create_subprocess_exec(sys.executable, "-I", "-S", "-c", "print(2)", stdout=-3)),
        ):
            begun = time.perf_counter()
            done = await start()
            if isinstance(done, asyncio.subprocess.Process):
                await done.wait()
            elif not (done.passed if isinstance(done, run_in.Verdict) else done.ok):
                raise RunError(f"bench sandbox: {name} ended with {done}; no time is given")
            found[name] = time.perf_counter() - begun
        return found

    async def several() -> list[dict[str, float]]:
        return [await once() for _ in range(repeats + 1)][1:]  # the first proves the cage and starts a worker

    results, where = asyncio.run(several()), machine()
    median = {name: statistics.median(each[name] for each in results) for name in results[0]}
    return {
        "suite": "sandbox", "repeats": repeats, **where, "held": run_in.state()[0], "results": results, "median": median,
        "title": f"sandbox: {run_in.state()[0]}", "columns": ["what", "median, ms", "smallest", "largest"],
        "rows": [[name, *(f"{1000 * value:.1f}" for value in (median[name], min(r[name] for r in results), max(r[name] for r in results)))]
                 for name in median],
    }  # fmt: skip


def proxy(repeats: int) -> dict[str, Any]:
    """Tokens per second straight to the team and through the door that programs ask at (see `bench_proxy`)."""
    from .bench_proxy import proxy as measured

    return measured(repeats)


SUITES: dict[str, Callable[[int], dict[str, Any]]] = {"update": update, "publish": publish, "sandbox": sandbox, "proxy": proxy}
