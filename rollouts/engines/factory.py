"""Which engine plays, and its settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...agents.types import PolicySpec, SettingError
from ..renderer import ChatRenderer
from ..secrecy import check_addresses, check_arguments
from .base import Engine


def help_of(text: str, default: Any = None, factory: Any = None) -> Any:
    """A dataclass field with the one line that `--help` shows."""
    return (
        field(default_factory=factory, metadata={"help": text})
        if factory
        else field(default=default, metadata={"help": text})
    )


@dataclass
class EngineConfig:
    """Settings of the engine that plays."""

    engine: str = help_of("who plays: auto, vllm or transformers (in this process)", "auto")
    engine_args: dict | str | None = help_of(
        "more arguments for the vLLM server, checked by its own parser", factory=dict
    )
    engine_dtype: str = help_of(
        "of the served base: auto (the model's own), float32 or bfloat16", "auto"
    )
    server_urls: list[str] = help_of(
        "vLLM servers already running (.../v1); empty starts our own", factory=list
    )
    server_key: str = help_of(
        "environment variable or 0600 file that holds the key of server_urls", ""
    )
    router_url: str = help_of(
        "vllm-router before these servers: it is asked to generate; adapters still go to every"
        " server, and are proven there",
        "",
    )
    endpoints: str = help_of(
        "file or folder of files in which server nodes write where their servers are; see"
        " serve_only",
        "",
    )
    num_servers: int = help_of("endpoints: how many servers to wait for", 1)
    server_host: str = help_of(
        "address that our servers listen on; other nodes reach only another one than this",
        "127.0.0.1",
    )
    server_port: int = help_of("port of our server; 0 takes a free one", 0)
    server_memory: float = help_of(
        "share of the GPU's memory for our server (on a CPU: GiB of KV cache); 0 = a printed"
        " estimate",
        0.0,
    )
    server_devices: str = help_of(
        'CUDA_VISIBLE_DEVICES of our server ("0;1" starts one on each); empty = the trainer\'s', ""
    )
    server_timeout: float = help_of("seconds our server may take to come up", 600.0)
    max_staleness: int = help_of(
        "team versions an episode may be behind when it is learnt from: above 0, later steps are"
        " played while one is learnt",
        0,
    )
    max_model_len: int = help_of(
        "context of our server in tokens; 0 = the model's own, at most 4096", 0
    )
    allow_open_server: bool = help_of("accept servers by URL that answer without a key", False)

    def __post_init__(self) -> None:
        check_addresses(self.server_urls, self.router_url, self.server_key)
        check_arguments(self.engine_args)


def cpu_has_bfloat16() -> bool:
    """Does this CPU multiply bfloat16 itself? Without it bfloat16 is about nine times slower than
    float32 (measured, AVX2)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(word in flags for word in ("avx512_bf16", "amx_bf16", " bf16"))


def choose_dtype(model: str, setting: str, *, on_gpu: bool) -> str:
    """`auto` becomes the dtype that the model's config names, but float32 on a CPU that would have
    to emulate bfloat16."""
    if setting != "auto":
        if setting not in ("float32", "bfloat16"):
            raise SettingError(f"dtype: expected auto, float32 or bfloat16; got {setting!r}")
        return setting
    if not on_gpu and not cpu_has_bfloat16():
        return "float32"
    from transformers import AutoConfig

    named = str(
        getattr(AutoConfig.from_pretrained(model, trust_remote_code=False), "dtype", None)
    ).removeprefix("torch.")
    return named if named in ("float32", "bfloat16") else "bfloat16" if on_gpu else "float32"


def has_gpu() -> bool:
    """Is there an NVIDIA device on this machine? Asked without torch."""
    return Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/gpus").is_dir()


def choose_engine(config: EngineConfig) -> tuple[str, str]:
    """(kind, why) for the setting `engine`."""
    setting, elsewhere = config.engine, config.server_urls or config.endpoints
    if config.server_urls and config.endpoints:
        raise SettingError(
            "server_urls and endpoints: choose one; both say where servers run already"
        )
    if config.router_url and not elsewhere:
        raise SettingError(
            "router_url: name the servers behind the router too (server_urls or endpoints);"
            " adapters go to each of them"
        )
    if setting not in ("auto", "vllm", "transformers"):
        raise SettingError(f"engine: expected one of auto, vllm, transformers; got {setting!r}")
    found = importlib.util.find_spec("vllm") is not None
    if setting != "auto":
        if setting == "vllm" and not elsewhere and not found:
            raise SettingError(
                "engine: vllm is not installed here; install the extra (make setup), give"
                " server_urls, or use transformers"
            )
        return setting, "as set"
    if elsewhere:
        return "vllm", "servers that run already are named"
    return ("vllm", "vllm is installed") if found else ("transformers", "vllm is not installed")


async def start_engine(
    model: str,
    tokens: ChatRenderer,
    policies: Sequence[PolicySpec],
    config: EngineConfig,
    *,
    folder: Path,
    say: Callable[[str], None],
) -> Engine:
    """A running engine for one base and its policies. `folder`: the run's, for the server's log,
    key and version folders."""
    kind, why = choose_engine(config)
    say(f"engine: {kind} ({why}) for {model}")
    if kind == "transformers":
        from .transformers import TransformersEngine

        return TransformersEngine(
            model, dtype=choose_dtype(model, config.engine_dtype, on_gpu=has_gpu())
        )
    from .vllm.engine import start_vllm

    dtype = (
        config.engine_dtype
        if config.server_urls or config.endpoints
        else choose_dtype(model, config.engine_dtype, on_gpu=has_gpu())
    )
    return await start_vllm(
        model, tokens, policies, replace(config, engine_dtype=dtype), folder=folder, say=say
    )
