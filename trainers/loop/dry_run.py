"""`--dry_run`: what a run would do, and on which devices, printed before anything is loaded or
started."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from ...agents.chat import Services
from ...agents.team import Team
from ...agents.transcript import Call
from ...agents.types import Completion, PolicySpec, SettingError
from ...rollouts.engines.factory import choose_engine
from ...rollouts.engines.vllm.server_args import CPU_CACHE_GIB
from ...rollouts.renderer import base_renderer, load_tokenizer
from ...rollouts.sandbox import sandbox
from ..config import RunConfig
from ..model.base_models import group_by_base, versions
from ..model.local_models import local_model
from ..model.memory_estimate import GIB, Memory, TrainerPlacement, needs_checkpointing, server_share
from ..model.sharding import sharding_mode
from ..update.learner_base import trained_bases
from .spec import RunSpec

NOT_LOADED = "no base is loaded for training"


class _FirstCall(Exception):
    def __init__(self, call: Call) -> None:
        self.call = call


def first_call(spec: RunSpec) -> Call:
    """The first request that the system would make on its first training task."""

    async def ask(call: Call) -> list[Completion]:
        raise _FirstCall(call)

    system, task = spec.system, spec.tasks_of(1)[0]
    services = Services(ask, execute=sandbox.run, sampling=spec.config.sampling())
    team = Team(system.specs, services, values={})
    try:
        asyncio.run(system.run(task.public(), team))
    except _FirstCall as first:
        return first.call
    raise SettingError(f"{type(system).__name__} asked no agent anything on task {task.id!r}")


@dataclass(frozen=True)
class Node:
    """This machine as a launcher has handed it to us. `gpus`: bytes of those we see, by the name
    that CUDA_VISIBLE_DEVICES gives them; `memory`: bytes of the CPU's that are free; `ranks`:
    trainers here and, `world`, in all."""

    name: str
    gpus: Mapping[str, float]
    memory: float
    ranks: int
    world: int


def here() -> Node:
    import psutil
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = names if len(names) == count else [str(number) for number in range(count)]
    gpus = {
        name: float(torch.cuda.get_device_properties(i).total_memory)
        for i, name in enumerate(names[:count])
    }
    world = int(os.environ.get("WORLD_SIZE", 1))
    return Node(
        socket.gethostname(),
        gpus,
        psutil.virtual_memory().available,
        int(os.environ.get("LOCAL_WORLD_SIZE", world)),
        world,
    )


def placement(config: RunConfig, bases: Mapping[str, Memory], node: Node) -> list[str]:
    """Who sits where, and how much memory that takes: lines for people.

    `bases`: what each needs of a trainer. Raises `SettingError` where what shares a GPU does not
    fit it.
    """
    need, elsewhere = sum(m.total for m in bases.values()), config.server_urls or config.endpoints
    gpus = list(node.gpus)
    lines = [
        f"nodes        {node.name}: {node.ranks} of {node.world} trainers"
        + (", servers elsewhere" if elsewhere else "")
    ]
    for rank in range(node.ranks):
        place = f"GPU {gpus[rank % len(gpus)]}" if gpus else "CPU"
        room = node.gpus[gpus[rank % len(gpus)]] if gpus else node.memory
        what = f"about {need / GIB:.2f} GiB of {room / GIB:.1f}" if need else NOT_LOADED
        lines.append(f"  trainer {rank}  {place}: {what}")
    if not bases:
        return lines
    kind = choose_engine(config)[0]
    if kind != "vllm":
        lines.append(
            "  engine     in process with trainer 0: the base's weights once more,"
            f" {sum(m.weights for m in bases.values()) / GIB:.2f} GiB"
        )
    elif config.server_urls:
        lines += [f"  server     {url}" for url in config.server_urls]
    elif config.endpoints:
        lines.append(f"  servers    {config.num_servers}, found through {config.endpoints}")
    else:
        lines += _servers(config, bases, node)
    if not node.gpus:
        whole = need * node.ranks + sum(m.weights for m in bases.values()) * (not elsewhere)
        if whole > node.memory:
            lines.append(
                f"  too much   {whole / GIB:.1f} GiB and KV caches, {node.memory / GIB:.1f} are"
                " free: fewer ranks, or lower tokens_per_batch"
            )
    return lines


def _servers(config: RunConfig, bases: Mapping[str, Memory], node: Node) -> list[str]:
    """Servers that the run would start: one per base and entry of `server_devices`."""
    lines: list[str] = []
    gpus, split = list(node.gpus), list[str]()
    share = config.server_memory or 0.9
    alone = len(bases) == 1 and not any(need.held for need in bases.values())
    if gpus and not config.server_devices and not config.server_memory and not alone:
        share = server_share(list(bases.values()), node.gpus[gpus[0]], split.append)
    for base, need in bases.items():
        for offset, devices in enumerate(config.server_devices.split(";")):
            where = f"{config.server_host}, " + (
                f"port {config.server_port + offset}" if config.server_port else "a free port"
            )
            weights = f"{need.weights / GIB:.2f} GiB of weights" + f" ({base})" * (len(bases) > 1)
            head = f"  server {len(lines)}   "
            if devices or gpus:
                mine = devices.split(",") if devices else gpus[:1]
                beside = [
                    str(rank)
                    for rank in range(node.ranks)
                    if gpus and gpus[rank % len(gpus)] in mine
                ]
                place = f"GPU {','.join(mine)}" + (
                    f" beside trainer {', '.join(beside)}" if beside else ""
                )
                lines.append(f"{head}{place}, {where}: {share:.0%} of its memory, {weights}")
            else:
                cache = config.server_memory or CPU_CACHE_GIB
                lines.append(f"{head}CPU, {where}: {weights}, {cache:g} GiB of KV cache")
    return [*lines, *(f"             {line}" for line in split)]


@dataclass(frozen=True)
class Plan:
    """What a run would do, before anything is loaded.

    `memory`: what the trainer needs on each base. `recompute`: is gradient checkpointing on?
    `prompt`: the first rendered prompt, and its length in tokens (None: of an outside model).
    """

    spec: RunSpec
    engine: tuple[str, str]  # kind, why
    devices: str
    node: Node
    memory: Mapping[str, Memory]
    recompute: bool
    agent: str  # who is asked first
    prompt: tuple[str, int | None]

    def lines(self) -> list[str]:
        """The plan as text."""
        spec, config = self.spec, self.spec.config
        system, (text, tokens) = spec.system, self.prompt
        return [
            f"run folder   {config.output_dir}",
            f"system       {type(system).__name__} {system.arguments()}",
            *(
                f"  agent      {a.name}: policy {a.policy}; {a.role or 'no role given'}"
                for a in system.specs
            ),
            *(policy_line(name, policy) for name, policy in spec.policies.items()),
            f"tasks        {config.tasks}: {len(spec.tasks)} to train on, {len(spec.eval_tasks)}"
            f" held out; rewards {', '.join(config.rewards)}",
            f"steps        {config.max_steps} of {config.tasks_per_step} tasks x"
            f" {config.num_generations} episodes",
            f"engine       {self.engine[0]} ({self.engine[1]})",
            f"devices      {self.devices}",
            *(line for base, need in self.memory.items() for line in memory_lines(base, need)),
            *(
                [
                    f"             gradient checkpointing {'on' if self.recompute else 'off'}"
                    f" ({config.gradient_checkpointing})"
                ]
                if any(need.held for need in self.memory.values())
                else []
            ),
            *placement(config, self.memory, self.node),
            "versions     "
            + ", ".join(f"{name} {version}" for name, version in versions().items()),
            f"first prompt (to {self.agent!r}):",
            text,
            *([f"({tokens} tokens)"] if tokens is not None else []),
            *(f"warning: {text}" for text in spec.warnings),
        ]


def policy_line(name: str, policy: PolicySpec) -> str:
    """One policy: its adapter or outside model, and whether it learns."""
    adapter = policy.adapter
    if policy.url:
        kind = f"outside model at {policy.url}"
    elif policy.has_adapter:
        kind = f"LoRA r={adapter.r} alpha={adapter.alpha:g} on {', '.join(adapter.targets)}"
    else:
        kind = "bare base"
    learns = "trained" if policy.trainable and policy.has_adapter else "frozen"
    return f"  policy     {name}: {kind}; {learns}; init {policy.init}"


def memory_lines(base: str, need: Memory) -> list[str]:
    """What the trainer needs on this base, by part."""
    parts = {
        name: getattr(need, name) / GIB for name in ("weights", "adapters", "activations", "head")
    }
    size = (
        f"memory       {base}: {need.parameters / 1e6:.1f}M parameters, adapters"
        f" {need.adapter_parameters / 1e6:.2f}M"
    )
    if not need.held:
        return [f"{size}; served, not loaded for training"]
    return [
        size,
        f"             trainer about {need.total / GIB:.2f} GiB"
        f" ({', '.join(f'{n} {gib:.2f}' for n, gib in parts.items())})",
    ]


def plan(spec: RunSpec) -> Plan:
    """What a run of this spec would do on this machine: policies, engine, devices, a memory
    estimate and the first rendered prompt."""
    import torch

    config, device = spec.config, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    node = here()
    bases = group_by_base(dict(spec.policies), config.model)
    on = {local_model(base): specs for base, specs in bases.items()}
    for path in on:
        load_tokenizer(path)  # first: it tells best what is wrong with a folder
    ranks = node.world if sharding_mode(config.shard_base) else 1

    learning = trained_bases(bases, spec.heads, config.model)
    served_only = frozenset(local_model(base) for base in bases if base not in learning)
    placement = TrainerPlacement(config, on, device, ranks, served_only)
    recompute = needs_checkpointing(placement, lambda text: None)
    estimates = placement.memory(recompute)
    memory = {base: estimates[local_model(base)] for base in bases}
    call = first_call(spec)
    return Plan(
        spec,
        choose_engine(config) if bases else ("none", "every policy is an outside model"),
        f"{torch.cuda.device_count()} GPUs, {torch.get_num_threads()} CPU threads",
        node,
        memory,
        recompute,
        call.agent.name,
        first_prompt(spec, call),
    )


def first_prompt(spec: RunSpec, call: Call) -> tuple[str, int | None]:
    """The call as text, and its length in tokens; None where an outside model reads it."""
    policy = spec.policies[call.agent.policy]
    if policy.url:
        return "\n".join(f"  {m.role}: {m.content}" for m in call.messages), None
    tokens = base_renderer(
        local_model(policy.base or spec.config.model), spec.config.template_variables()
    )
    ids = tokens.prompt(call.messages)
    return tokens.show(ids), len(ids)


def print_plan(spec: RunSpec) -> None:
    """The plan on stdout, by the first process of a launch only."""
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(plan(spec).lines()))
