"""`--dry_run`: what a run would do, printed before anything is loaded or started."""

from __future__ import annotations

import asyncio

from ..agents.team import Call, Team
from ..agents.types import Completion, SettingError
from ..rollouts.engines.start import choose_engine
from ..rollouts.tokens import ChatTokens, load_tokenizer
from .bases import dtype_of, group_by_base, versions
from .memory import GIB, Memory, estimate
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


def print_memory(base: str, need: Memory) -> None:
    parts = {name: getattr(need, name) / GIB for name in ("weights", "adapters", "activations", "head")}
    print(f"memory       {base}: {need.parameters / 1e6:.1f}M parameters, adapters {need.adapter_parameters / 1e6:.2f}M")
    print(f"             trainer about {need.total / GIB:.2f} GiB ({', '.join(f'{n} {gib:.2f}' for n, gib in parts.items())})")


def print_plan(run: Run) -> None:
    """Policies, engine, devices, a memory estimate, versions and the first rendered prompt, on stdout."""
    import torch

    config, device = run.config, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, why = choose_engine(config)
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
        print_memory(base, estimate(path, specs, config, dtype_of(path, config.dtype, device)))
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
