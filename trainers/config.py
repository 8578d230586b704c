"""Settings that every trainer shares. A method's own config adds its fields to these, and one flat
YAML holds them all."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

from ..agents.secrecy import check_policies
from ..agents.settings import check_type, help_of, mapping, parsed_mapping
from ..agents.types import (
    BASE,
    AdapterSpec,
    AgentSpec,
    PolicySpec,
    Sampling,
    SettingError,
    from_json,
    nearest,
    to_json,
)
from ..rollouts.engines.config import EngineConfig
from ..rollouts.episodes.runner import EpisodeLimits
from .monitoring.trackers import check_names


@dataclass
class RunConfig(EngineConfig):
    """One training run: what is played, how it is learnt, what is kept.

    Lists and mappings may be given as JSON on the command line; `agents`, `policies`, `system`,
    `task_args` and `engine_args` also by path (`--agents.solver.prompt "..."`).
    """

    output_dir: str = help_of(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/team"
    )
    model: str = help_of("the shared base: a folder in the Hugging Face layout or a hub name", "")
    seed: int = help_of("everything drawn in the run follows from it", 0)
    # what is played
    system: dict | str | None = help_of(
        "`class` (module:Class of a System) and its arguments", factory=dict
    )
    agents: dict | str | None = help_of(
        "by agent name: fields of AgentSpec to change (prompt, policy, sampling, tools, demos)",
        factory=dict,
    )
    policies: dict | str | None = help_of(
        "by policy name: fields of PolicySpec (adapter, trainable, init, url, base)", factory=dict
    )
    tasks: str = help_of(
        "task set: arithmetic, gsm8k, math, reasoning-gym:NAME, a JSONL/Parquet file, or"
        " module:function",
        "arithmetic",
    )
    task_args: dict | str | None = help_of("arguments of the task set", factory=dict)
    num_eval_tasks: int = help_of("held-out tasks of an evaluation", 200)
    rewards: list[str] = help_of(
        "reward functions by name or module:function; the first one is the accuracy of evaluations",
        factory=lambda: ["correct"],
    )
    episodes: str = help_of(
        "learn from these stored episodes (a run, or its episodes folder) instead of playing", ""
    )
    # how much
    max_steps: int = help_of("steps of collect, learn, publish", 50)
    tasks_per_step: int = help_of("tasks played in a step", 16)
    num_generations: int = help_of("episodes per task: the group that credit compares", 8)
    oversample: int = help_of(
        "more episodes per task begin than num_generations, and as many are dropped, the slowest;"
        " counted in metrics.jsonl",
        0,
    )
    temperature: float = help_of(
        "sampling temperature of agents that name no sampling of their own", 1.0
    )
    max_completion_length: int = help_of(
        "most tokens of a reply, for agents that name no sampling of their own", 256
    )
    max_concurrency: int = help_of("episodes in play at once", 64)
    episode_timeout: float = help_of(
        "seconds until an episode that is still in play has failed", 1200.0
    )
    pin: str = help_of(
        "what keeps its team version when rollouts run ahead: an episode, or only a call of a"
        " policy",
        "episode",
    )
    reward_timeout: float = help_of(
        "seconds until an async reward that has given nothing leaves its episode unscorable", 600.0
    )
    # adapters and optimizer
    lora_r: int = help_of("rank of adapters whose policy names none", 16)
    lora_alpha: float = help_of("LoRA alpha of adapters whose policy names none", 32.0)
    lora_target_modules: list[str] = help_of(
        "modules that get a LoRA", factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    learning_rate: float = help_of("peak learning rate (LoRA wants 1e-5 and up)", 1e-4)
    lr_scheduler_type: str = help_of(
        "constant, linear or cosine (both decay to 0 at max_steps)", "constant"
    )
    warmup_steps: int = help_of("steps over which the learning rate rises from 0", 0)
    weight_decay: float = help_of("AdamW's weight decay on adapters", 0.0)
    max_grad_norm: float = help_of("gradient norm per adapter is clipped to this", 1.0)
    num_iterations: int = help_of("optimizer updates per batch of episodes", 1)
    tokens_per_batch: int = help_of("computed tokens of one forward pass", 8192)
    shard_base: bool = help_of(
        "split the base's layers over the ranks (FSDP2): for a base that does not fit one device",
        False,
    )
    layout: str = help_of(
        "how batches are laid out: auto, shared (prefix trees), packed or padded", "auto"
    )
    gradient_checkpointing: str = help_of(
        "recompute activations in the backward pass (less memory, a third more time): auto (where"
        " memory would not do without), true or false",
        "auto",
    )
    dtype: str = help_of(
        "of the base in the trainer: auto (the model's own), float32 or bfloat16; adapters are"
        " float32",
        "auto",
    )
    collective_timeout: float = help_of(
        "seconds that ranks may wait for one another in an update; then all write their stacks"
        " and end",
        1800.0,
    )
    # what is kept and checked
    save_every: int = help_of("steps between checkpoints; the last step is always saved", 10)
    save_total_limit: int = help_of("checkpoints kept, besides the best", 3)
    eval_every: int = help_of("steps between evaluations; 0 evaluates only before and after", 0)
    ablate_adapters: bool = help_of(
        "after training, also evaluate every adapter alone, the others off", False
    )
    proof_every: int = help_of("publishes between live proofs; 1 proves every one", 1)
    report_to: list[str] = help_of(
        "trackers beside metrics.jsonl: tensorboard, wandb, trackio, mlflow", factory=list
    )
    resume: bool = help_of("go on from the newest valid checkpoint of output_dir", False)
    overwrite: bool = help_of("delete what an earlier run left in output_dir", False)
    serve_only: bool = help_of(
        "start this run's servers here, write where they are into endpoints, and serve until a"
        " signal",
        False,
    )
    dry_run: bool = help_of(
        "print the plan (policies, devices, memory, first prompt) and stop", False
    )

    def __post_init__(self) -> None:
        for name in ("system", "agents", "policies", "task_args", "engine_args"):
            setattr(self, name, parsed_mapping(name, getattr(self, name)))
        super().__post_init__()  # before any other check shows a value
        check_policies(self.policies)
        if isinstance(self.gradient_checkpointing, bool):  # YAML's true is no text
            self.gradient_checkpointing = str(self.gradient_checkpointing).lower()
        hints = get_type_hints(type(self))  # not `field.type`: parsers write to it
        for f in fields(self):
            check_type(f.name, hints[f.name], getattr(self, f.name))
        positive = (
            "tasks_per_step",
            "num_generations",
            "max_completion_length",
            "max_concurrency",
            "lora_r",
            "num_iterations",
        )
        for name in (
            *positive,
            "tokens_per_batch",
            "save_every",
            "save_total_limit",
            "num_eval_tasks",
            "proof_every",
        ):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.collective_timeout < math.inf:
            raise SettingError(
                f"collective_timeout: expected seconds above 0, got {self.collective_timeout}"
            )
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "temperature", "lora_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingError(f"{name}: expected a number from 0, got {getattr(self, name)}")
        for name in ("episode_timeout", "reward_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(f"{name}: expected seconds above 0, got {getattr(self, name)}")
        for name in ("max_steps", "warmup_steps", "eval_every", "oversample", "max_staleness"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.max_staleness and self.episodes:
            raise SettingError(
                "max_staleness: with `episodes` nothing is played, so nothing can be played ahead;"
                " leave it 0"
            )
        if self.pin == "call" and not self.max_staleness:
            raise SettingError(
                "pin: call changes nothing unless rollouts run ahead; set max_staleness above 0, or"
                " pin to episode"
            )
        for name, allowed in (
            ("pin", ("episode", "call")),
            ("dtype", ("auto", "float32", "bfloat16")),
            ("lr_scheduler_type", ("constant", "linear", "cosine")),
            ("gradient_checkpointing", ("auto", "true", "false")),
            ("layout", ("auto", "shared", "packed", "padded")),
        ):
            if getattr(self, name) not in allowed:
                raise SettingError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        check_names(self.report_to)
        if self.resume and self.overwrite:
            raise SettingError(
                "resume and overwrite: choose one; resume goes on, overwrite begins anew"
            )

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, max_tokens=self.max_completion_length)

    def limits(self) -> EpisodeLimits:
        return EpisodeLimits(
            episode_timeout=self.episode_timeout,
            reward_timeout=self.reward_timeout,
            concurrency=self.max_concurrency,
        )

    def learning_rate_at(self, step: int, peak: float) -> float:
        """Learning rate of step 1, 2, ...: a pure function, so a resumed run needs no scheduler
        state."""
        if step <= self.warmup_steps:
            return peak * step / self.warmup_steps
        if self.lr_scheduler_type == "constant":
            return peak
        share = (step - self.warmup_steps - 1) / max(self.max_steps - self.warmup_steps, 1)
        return peak * (
            1 - share
            if self.lr_scheduler_type == "linear"
            else 0.5 * (1 + math.cos(math.pi * share))
        )

    def policy_specs(self, agents: tuple[AgentSpec, ...]) -> dict[str, PolicySpec]:
        """Every policy the agents speak with, with the fields the settings change. Order: first use
        by an agent."""
        used = list(dict.fromkeys(agent.policy for agent in agents))
        for name in self.policies:  # type: ignore[union-attr]
            if name not in used:
                raise SettingError(
                    f"policies.{name}: no agent speaks with it; {nearest(name, used)}"
                )
        shape = AdapterSpec(self.lora_r, float(self.lora_alpha), tuple(self.lora_target_modules))
        specs = {}
        for name in used:
            given = mapping(f"policies.{name}", self.policies.get(name))  # type: ignore[union-attr]
            given["adapter"] = {
                **to_json(shape),
                **mapping(f"policies.{name}.adapter", given.get("adapter")),
            }
            spec = from_json(PolicySpec, {"name": name, **given}, f"policies.{name}")
            if name == BASE and spec.trainable and "trainable" in given:
                raise SettingError(
                    "policies.base.trainable: the base is never trained; give the agent a policy of"
                    " its own"
                )
            specs[name] = spec
        return specs
