"""The in-process engine with continuous batches against its waves, which is what it does where a
cache cannot be cut: tokens per second of processor time at 135M or on the tiny model.

Both are one engine with one adapter (r 16 on q, k, v, o), switched by `Sampler.shares`, in turns in
one process with one thread; the same requests with the same seeds. Replies are of the same
distributions, but bfloat16 rounds otherwise in other batches, so the gate is the share of equal
replies, and what is compared is tokens per second. Cases:

drafts: eight siblings, of which each reads another draft of one task; siblings: eight replies to
one prompt; tails: 24 requests for 8 rows, of which one in six has a long reply; groups: four tasks
of eight. The file is written after every case.

    python benchmarks/scripts/engine.py --json FILE [--size tiny] [--repeats 2] [--cases drafts]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from marlora.agents.types import Completion, Message, Sampling
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.transformers import TransformersEngine
from marlora.trainers.bench.geometry import served_folder
from marlora.trainers.bench.measure import machine

SYSTEM = "You solve sums. Repeat the sum and end with the result, as in the worked turns."
SHOTS = (("14 + 3", "14 + 3 = 17"), ("8 + 19", "8 + 19 = 27"))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
WAYS = {"waves": False, "continuous": True}
Request = tuple[list[Message], int, int, int]  # chat, replies, tokens of a reply, seed


def chat(question: str) -> list[Message]:
    shown = [m for q, a in SHOTS for m in (Message("user", q), Message("assistant", a))]
    return [Message("system", SYSTEM), *shown, Message("user", question)]


def cases() -> dict[str, tuple[int, list[Request]]]:
    """{name: (rows of a batch, requests)}."""
    drafts = [(chat(f"5 + 12\nDraft: {10 + k}. Is it right?"), 1, 12, k) for k in range(8)]
    tails = [(chat(f"{k} + {k + 3}"), 1, 40 if k % 6 == 0 else 6, k) for k in range(24)]
    return {
        "drafts": (64, drafts),
        "siblings": (64, [(chat("17 + 12"), 8, 12, 0)]),
        "tails": (8, tails),
        "groups": (64, [(chat(f"{t} + 12"), 8, 12, 100 * t) for t in range(4)]),
    }


def adapter(model: str, folder: Path) -> Path:
    """An adapter that differs from the base, saved by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.002)
    adapted.save_pretrained(folder / "solver-v1-0000")
    return folder / "solver-v1-0000"


async def play(
    engine: TransformersEngine, ref: ModelRef, rows: int, requests: Sequence[Request]
) -> list[Completion]:
    """What the engine replies to these requests, asked at once; no reply ends before its length,
    so that every way samples as many tokens."""
    engine.max_batch = rows
    never = {str(token): -1e9 for token in engine.tokens.eos_ids}
    calls = [
        engine.generate(
            engine.tokens.prompt(messages),
            ref,
            Sampling(max_tokens=length, seed=seed, logit_bias=never),
            n,
        )
        for messages, n, length, seed in requests
    ]
    return [one for replies in await asyncio.gather(*calls) for one in replies]


async def measured(model: str, folder: Path, options: argparse.Namespace) -> None:
    engine = TransformersEngine(model, dtype=options.dtype, threads=1)
    if not engine.sampler.shares:
        raise SystemExit("the engine does not read this model's prompts as trees")
    team = await engine.publish({"solver": adapter(model, folder)})
    ref, results = ModelRef("solver", team["solver"]), dict[str, Any]()
    await play(engine, ref, 8, [(chat("1 + 1"), 2, 2, 0)])  # warms up
    for name in options.cases:
        rows, requests = cases()[name]
        laps: dict[str, list[float]] = {way: [] for way in WAYS}
        replies: dict[str, list[Completion]] = {}
        for _ in range(options.repeats):
            for way, shares in WAYS.items():
                engine.sampler.shares = shares
                start = time.process_time()
                replies[way] = await play(engine, ref, rows, requests)
                laps[way].append(time.process_time() - start)
        results[name] = _summary(rows, replies, laps)
        print(name, json.dumps(results[name]["ratio"]), flush=True)
        write(options, results)
    await engine.close()


def write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    command = f"python benchmarks/scripts/engine.py --size {options.size} --dtype {options.dtype}"
    record = {
        "command": f"{command} --repeats {options.repeats} --cases {' '.join(results)}",
        "suite": "engine",
        "clock": "process",
        **machine(),
        "cases": results,
    }
    options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _summary(
    rows: int, replies: dict[str, list[Completion]], laps: dict[str, list[float]]
) -> dict[str, Any]:
    waves, continuous = (replies[way] for way in WAYS)
    sampled = sum(len(one.token_ids) for one in waves)
    if sampled != sum(len(one.token_ids) for one in continuous):
        raise SystemExit("the ways sampled different numbers of tokens; no ratio is given")
    seconds = {way: statistics.median(lap) for way, lap in laps.items()}
    equal = [a.token_ids == b.token_ids for a, b in zip(waves, continuous, strict=True)]
    return {
        "rows": rows,
        "replies": len(waves),
        "prompt_tokens": sum(len(one.prompt_ids) for one in waves),
        "sampled_tokens": sampled,
        "laps": laps,
        "seconds": seconds,
        "tokens_per_second": {way: sampled / s for way, s in seconds.items()},
        "equal_replies": sum(equal) / len(equal),
        "ratio": seconds["waves"] / seconds["continuous"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--size", default="135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=list(cases()), default=list(cases()))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="marlora-bench-") as scratch:
        model = served_folder(options.size, Path(scratch))
        asyncio.run(measured(model, Path(scratch), options))


if __name__ == "__main__":
    main()
