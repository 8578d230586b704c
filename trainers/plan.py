"""`--dry_run`: what a run would do, printed before anything is loaded or started."""

from __future__ import annotations

import asyncio
from typing import Any

from ..agents.team import Call, Team
from ..agents.types import Completion, PolicySpec, SettingError
from ..rollouts.engines.start import choose_engine
from ..rollouts.tokens import ChatTokens, load_tokenizer
from .bases import dtype_of, group_by_base, versions
from .models import local_model
from .run import Run


class _FirstCall(Exception):
    def __init__(self, call: Call) -> None:
        self.call = call


def first_call(run: Run) -> Call:
    """The first request that the system would make on its first training task."""

    async def ask(call: Call) -> list[Completion]:
        raise _FirstCall(call)

    team = Team(run.system.specs, ask, values=run.values, sampling=run.config.sampling())
    try:
        asyncio.run(run.system.run(run.tasks_of(1)[0].public(), team))
    except _FirstCall as found:
        return found.call
    raise SettingError(f"{type(run.system).__name__} asked no agent anything on task {run.tasks_of(1)[0].id!r}")


def reaches(spec: PolicySpec, module: str) -> bool:
    """Does the policy's LoRA stand on this linear layer?"""
    if spec.adapter.targets == ("all-linear",):
        return "lm_head" not in module
    return any(module == target or module.endswith(f".{target}") for target in spec.adapter.targets)


def sizes(model: str) -> dict[str, Any]:
    """Parameters of the base and of one adapter's rank, without loading weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    load_tokenizer(model)  # first: it tells best what is wrong with a folder
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a config of any other kind of model
        raise SettingError(f"model {model!r}: no causal language model ({str(error).splitlines()[0]})") from error
    linears = {name: m for name, m in made.named_modules() if isinstance(m, torch.nn.Linear)}
    return {"parameters": sum(p.numel() for p in made.parameters()), "linears": linears}


def print_plan(run: Run) -> None:
    """Policies, engine, devices, a memory estimate, versions and the first rendered prompt, on stdout."""
    import torch

    config = run.config
    kind, why = choose_engine(config.engine, config.server_urls)
    print(f"run folder   {config.output_dir}")
    print(f"system       {type(run.system).__name__} {run.system.arguments()}")
    for agent in run.system.specs:
        print(f"  agent      {agent.name}: policy {agent.policy}; {agent.role or 'no role given'}")
    for name, spec in run.policies.items():
        kind_of = (
            f"outside model at {spec.url}"
            if spec.url
            else f"LoRA r={spec.adapter.r} alpha={spec.adapter.alpha:g} on {', '.join(spec.adapter.targets)}"
        )
        learns = "trained" if spec.trainable and spec.has_adapter else "frozen"
        print(f"  policy     {name}: {kind_of if spec.has_adapter or spec.url else 'bare base'}; {learns}; init {spec.init}")
    print(
        f"tasks        {config.tasks}: {len(run.tasks)} to train on, {len(run.eval_tasks)} held out; rewards {', '.join(config.rewards)}"
    )
    print(f"steps        {config.max_steps} of {config.tasks_per_step} tasks x {config.num_generations} episodes")
    print(f"engine       {kind} ({why})")
    print(f"devices      {torch.cuda.device_count()} GPUs, {torch.get_num_threads()} CPU threads")
    for base, specs in group_by_base(run.policies, config.model).items():
        path = local_model(base)
        found, width = (
            sizes(path),
            2
            if dtype_of(path, config.dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu")) == torch.bfloat16
            else 4,
        )
        adapters = sum(
            spec.adapter.r * (m.in_features + m.out_features)
            for spec in specs if spec.has_adapter
            for name, m in found["linears"].items() if reaches(spec, name)
        )  # fmt: skip
        trainer = (found["parameters"] * width + adapters * 16) / 2**30
        print(f"memory       {base}: {found['parameters'] / 1e6:.1f}M parameters, adapters {adapters / 1e6:.2f}M")
        print(
            f"             trainer about {trainer:.2f} GiB without activations (base at {width} bytes, adapters with AdamW at 16)"
        )
    print("versions     " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    call = first_call(run)
    spec = run.policies[call.agent.policy]
    print(f"first prompt (to {call.agent.name!r}):")
    if spec.url:
        print("\n".join(f"  {m.role}: {m.content}" for m in call.messages))
    else:
        tokens = ChatTokens(load_tokenizer(local_model(spec.base or config.model)))
        ids = tokens.prompt(call.messages)
        print(f"{tokens.show(ids)}\n({len(ids)} tokens)")
