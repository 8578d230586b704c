"""Settings that every trainer shares, as mixins, and `RunConfig`, which is all of them. A method's
own config adds its mixins to these; one flat YAML holds them all."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..agents.settings import Settings, mapping, parsed_mapping, setting
from ..agents.text.secrecy import check_policies
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
from ..rollouts.template_variables import as_json
from .warm_start import adapter_shape, checkpoint_policy

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


@dataclass
class RunSettings(Settings):
    """The run as a whole: its folder and seed; what is saved, evaluated and verified, and when."""

    output_dir: str = setting(
        "run folder: config, episodes, metrics, checkpoints, report", "runs/team"
    )
    model: str = setting("the shared base: a folder in the Hugging Face layout or a hub name", "")
    seed: int = setting("everything drawn in the run follows from it", 0)
    save_every: int = setting(
        "steps between checkpoints; the last step is always saved", 10, at_least=1
    )
    save_total_limit: int = setting("checkpoints kept, besides the best", 3, at_least=1)
    num_eval_tasks: int = setting("held-out tasks of an evaluation", 200, at_least=1)
    num_val_tasks: int = setting(
        "tasks cut from the training ones, by which a method or `keep` may choose; 0 cuts none",
        0,
        at_least=0,
    )
    keep: str = setting(
        "the state that the run ends with: its last, or the best on the validation tasks at the"
        " evaluations of eval_every",
        "last",
        choices=("last", "best"),
    )
    init: str = setting(
        "begin with the whole state of this checkpoint: its adapters and its values", ""
    )
    budget: dict | str | None = setting(
        "most that learning may cost, held-out evaluations aside: tokens (prompt and sampled),"
        " calls, cost (money, where policies have a price)",
        factory=dict,
    )
    eval_every: int = setting(
        "steps between evaluations; 0 evaluates only before and after", 0, at_least=0
    )
    ablate_adapters: bool = setting(
        "after training, also evaluate every adapter alone, the others off", False
    )
    proof_every: int = setting("publishes between live proofs; 1 proves every one", 1, at_least=1)
    report_to: list[str] = setting(
        "trackers beside metrics.jsonl: tensorboard, wandb, trackio, mlflow",
        factory=list,
        choices=TRACKERS,
    )
    resume: bool = setting("continue from the newest valid checkpoint of output_dir", False)
    overwrite: bool = setting("delete what an earlier run left in output_dir", False)
    serve_only: bool = setting(
        "start this run's servers here, write where they are into endpoints, and serve until a"
        " signal",
        False,
    )
    verbose: bool = setting(
        "after each step also show what developers read (loss, KL, gradient norm, tokens per"
        " second, live proof), and the libraries' own progress bars",
        False,
    )
    dry_run: bool = setting(
        "print the plan (policies, devices, memory, first prompt) and stop", False
    )

    def check(self) -> None:
        for name in self.report_to:
            if importlib.util.find_spec(name) is None:
                raise SettingError(
                    f"report_to: {name} is not installed; pip install 'marlora[{name}]'"
                )
        if len(set(self.report_to)) < len(self.report_to):
            raise SettingError(f"report_to: a tracker is named twice in {self.report_to}")
        if self.keep == "best" and not (self.num_val_tasks and self.eval_every):
            raise SettingError(
                "keep: best is chosen on validation tasks at evaluations; set num_val_tasks and"
                " eval_every"
            )
        if self.resume and self.overwrite:
            raise SettingError(
                "resume and overwrite: choose one; resume continues, overwrite starts anew"
            )

    def prepare(self) -> None:
        self.budget = parsed_mapping("budget", self.budget)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output_dir)


@dataclass
class RolloutSettings(Settings):
    """What is played: system, tasks and rewards, how many episodes a step has, and their limits.

    Mappings may be given as JSON on the command line, or by path (`--agents.solver.prompt "..."`).
    """

    system: dict | str | None = setting(
        "`class` (module:Class of a System) and its arguments", factory=dict
    )
    agents: dict | str | None = setting(
        "by agent name: fields of AgentSpec to change (prompt, policy, sampling, tools, demos)",
        factory=dict,
    )
    policies: dict | str | None = setting(
        "by policy name: fields of PolicySpec (adapter, trainable, init, url, key_env, price,"
        " base)",
        factory=dict,
    )
    values: dict | str | None = setting(
        "values that the run begins with, by the name of a param: NAME.prompt, NAME.demos,"
        " NAME.policy, or one of the system's own",
        factory=dict,
    )
    helpers: dict | str | None = setting(
        "agents outside the team that a method asks, by name: url or base (neither: the run's"
        " model), key_env, price, prompt, sampling, demos, role",
        factory=dict,
    )
    tasks: str = setting(
        "task set: arithmetic, gsm8k, math, reasoning-gym:NAME, a JSONL/Parquet file, or"
        " module:function",
        "arithmetic",
    )
    task_args: dict | str | None = setting("arguments of the task set", factory=dict)
    rewards: list[str] = setting(
        "reward functions by name or module:function; the first one is the accuracy of evaluations",
        factory=lambda: ["correct"],
    )
    episodes: str = setting(
        "learn from these stored episodes (a run, or its episodes folder) instead of playing", ""
    )
    thumbs: bool = setting(
        "of the stored `episodes`, learn from those that people gave a thumb (marlora report"
        " --follow): up is a reward of 1, down of 0, in place of what they earned",
        False,
    )
    tasks_per_step: int = setting("tasks played in a step", 16, at_least=1)
    num_generations: int = setting(
        "episodes per task: the group that credit compares", 8, at_least=1
    )
    oversample: int = setting(
        "more episodes per task begin than num_generations, and as many are dropped, the slowest;"
        " counted in metrics.jsonl",
        0,
        at_least=0,
    )
    temperature: float = setting(
        "sampling temperature of agents that name no sampling of their own", 1.0, at_least=0
    )
    max_completion_length: int = setting(
        "most tokens of a reply, for agents that name no sampling of their own", 256, at_least=1
    )
    max_concurrency: int = setting("episodes in play at once", 64, at_least=1)
    episode_timeout: float = setting(
        "seconds until an episode that is still in play has failed", 1200.0, above=0, unit="seconds"
    )
    on_error: str = setting(
        "what an episode is worth whose system or program raised: drop (nothing, it is left out) or"
        " zero (all rewards are 0 and its turns are trained on, so that agents learn the format of"
        " a program that raises on replies it cannot read)",
        "drop",
        choices=("drop", "zero"),
    )
    max_staleness: int = setting(
        "staleness bound: team versions an episode may be behind when it is trained on; above 0,"
        " rollouts of later steps run while one step trains",
        0,
        at_least=0,
    )
    pin: str = setting(
        "what one team version covers when rollouts run ahead: an episode, or only a call of a"
        " policy",
        "episode",
        choices=("episode", "call"),
    )
    chat_template_kwargs: dict | str | None = setting(
        "variables of the chat template, such as enable_thinking or date_string; kept in"
        " checkpoints",
        factory=dict,
    )
    reward_timeout: float = setting(
        "seconds until an async reward that has given nothing leaves its episode unscorable",
        600.0,
        above=0,
        unit="seconds",
    )

    def prepare(self) -> None:
        for name in ("system", "agents", "policies", "values", "helpers", "task_args"):
            setattr(self, name, parsed_mapping(name, getattr(self, name)))
        self.chat_template_kwargs = as_json(
            parsed_mapping("chat_template_kwargs", self.chat_template_kwargs)
        )
        for name in ("policies", "helpers"):  # before any check shows a value
            check_policies(getattr(self, name), name)

    def sampling(self) -> Sampling:
        """The sampling of agents that name none of their own."""
        return Sampling(temperature=self.temperature, max_tokens=self.max_completion_length)

    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat templates."""
        return mapping("chat_template_kwargs", self.chat_template_kwargs)

    def limits(self) -> EpisodeLimits:
        """The limits of an episode."""
        return EpisodeLimits(
            episode_timeout=self.episode_timeout,
            reward_timeout=self.reward_timeout,
            concurrency=self.max_concurrency,
            on_error=self.on_error,
        )


@dataclass
class AdapterSettings(Settings):
    """The LoRA of policies that name none of their own."""

    lora_r: int = setting(
        "rank of adapters whose policy names none; one with an `init` has that folder's",
        16,
        at_least=1,
    )
    lora_alpha: float = setting("LoRA alpha of adapters whose policy names none", 32.0, at_least=0)
    lora_target_modules: list[str] = setting(
        "modules that get a LoRA", factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"]
    )

    def adapter(self) -> AdapterSpec:
        """The shape of adapters whose policy names none."""
        return AdapterSpec(self.lora_r, float(self.lora_alpha), tuple(self.lora_target_modules))


@dataclass
class OptimizerSettings(Settings):
    """How a step's sequences become an update: the optimizer, its schedule, and how the trainer
    computes."""

    max_steps: int = setting("steps of collect, learn, publish", 50, at_least=0)
    learning_rate: float = setting("peak learning rate (LoRA needs 1e-5 and up)", 1e-4, at_least=0)
    lr_scheduler_type: str = setting(
        "constant, linear or cosine (both decay to 0 at max_steps)",
        "constant",
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = setting("steps over which the learning rate rises from 0", 0, at_least=0)
    weight_decay: float = setting("AdamW's weight decay on adapters", 0.0, at_least=0)
    max_grad_norm: float = setting(
        "gradient norm per adapter is clipped to this; 0 does not clip", 1.0, at_least=0
    )
    num_iterations: int = setting("optimizer updates per batch of episodes", 1, at_least=1)
    tokens_per_batch: int = setting("computed tokens of one forward pass", 8192, at_least=1)
    shard_base: bool = setting(
        "split the base's layers over the ranks (FSDP2): for a base that does not fit one device",
        False,
    )
    layout: str = setting(
        "how batches are laid out: auto, shared (prefix trees), packed or padded",
        "auto",
        choices=("auto", "shared", "packed", "padded"),
    )
    gradient_checkpointing: str = setting(
        "recompute activations in the backward pass (less memory, a third more time): auto (where"
        " memory would not do without), true or false",
        "auto",
        choices=("auto", "true", "false"),
    )
    dtype: str = setting(
        "of the base in the trainer: auto (the model's own), float32 or bfloat16; adapters are"
        " float32",
        "auto",
        choices=("auto", "float32", "bfloat16"),
    )
    collective_timeout: float = setting(
        "seconds that ranks may wait for one another in an update; then all dump their stacks"
        " and end",
        1800.0,
        above=0,
        unit="seconds",
    )

    def prepare(self) -> None:
        if isinstance(self.gradient_checkpointing, bool):  # YAML's true is no text
            self.gradient_checkpointing = str(self.gradient_checkpointing).lower()

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


@dataclass
class RunConfig(RunSettings, OptimizerSettings, AdapterSettings, RolloutSettings, EngineConfig):
    """One training run: engines, rollouts, adapters, updates, and what is saved and checked.

    `trains_weights` is False in the settings of a method that trains none: its policies are frozen.
    `collects` is False in those of a method whose steps play runs of their own: it learns neither
    from stored `episodes` nor from runs that were played ahead.
    """

    trains_weights: ClassVar[bool] = True
    collects: ClassVar[bool] = True

    def check(self) -> None:
        if not self.collects and self.episodes:
            raise SettingError("episodes: this method plays its runs itself; leave it out")
        if not self.collects and self.max_staleness:
            raise SettingError(
                "max_staleness: this method plays its runs itself, none ahead; leave it at 0"
            )
        if self.max_staleness and self.episodes:
            raise SettingError(
                "max_staleness: with `episodes` nothing is played, so nothing can be played ahead;"
                " leave it 0"
            )
        if self.thumbs and not self.episodes:
            raise SettingError(
                "thumbs: they are of stored episodes; name the run that was judged with `episodes`"
            )
        if self.pin == "call" and not self.max_staleness:
            raise SettingError(
                "pin: call changes nothing unless rollouts run ahead; set max_staleness above 0, or"
                " pin to episode"
            )

    def policy_specs(self, agents: tuple[AgentSpec, ...]) -> dict[str, PolicySpec]:
        """Every policy the agents use, with the fields the settings change, then those that a value
        may name later (`NAME.policy`): they say what they are by `init`, `base` or `url`. Order:
        first use by an agent."""
        values: dict[str, Any] = self.values  # type: ignore[assignment]
        used = list(dict.fromkeys(agent.policy for agent in agents))
        named = {values.get(f"{agent.name}.policy") for agent in agents}
        policies: dict[str, Any] = self.policies  # type: ignore[assignment]
        for name, given in policies.items():
            of_its_own = mapping(f"policies.{name}", given).keys() & {"init", "base", "url"}
            if name not in (*used, *named, BASE) and not of_its_own:
                raise SettingError(
                    f"policies.{name}: no agent speaks with it (one that only values name later"
                    f" needs init, base or url); {nearest(name, used)}"
                )
        specs = {}
        for name in dict.fromkeys([*used, *policies]):
            given = mapping(f"policies.{name}", policies.get(name))
            if self.init:
                given = {**checkpoint_policy(self.init, name), **given}
            own = mapping(f"policies.{name}.adapter", given.get("adapter"))
            start = adapter_shape(given.get("init"), own, f"policies.{name}.adapter")
            given["adapter"] = {**to_json(self.adapter()), **start, **own}
            spec = from_json(PolicySpec, {"name": name, **given}, f"policies.{name}")
            if name == BASE and spec.trainable and "trainable" in given:
                raise SettingError(
                    "policies.base.trainable: the base is never trained; give the agent a policy of"
                    " its own"
                )
            if not self.trains_weights and given.get("trainable"):
                raise SettingError(
                    f"policies.{name}.trainable: this method trains no policy; leave it out"
                )
            specs[name] = spec if self.trains_weights else replace(spec, trainable=False)
        return specs
