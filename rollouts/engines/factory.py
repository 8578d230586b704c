"""Chooses and starts the inference engine of a base model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...agents.types import PolicySpec, SettingError, from_json
from ..renderer import ChatRenderer
from .base import Engine
from .config import EngineConfig
from .hardware import choose_dtype, has_gpu


def choose_engine(config: EngineConfig) -> tuple[str, str]:
    """(kind, reason) for the setting `engine`."""
    setting, running = config.engine, config.server_urls or config.endpoints
    if config.server_urls and config.endpoints:
        raise SettingError(
            "server_urls and endpoints: choose one; both say where servers run already"
        )
    if config.router_url and not running:
        raise SettingError(
            "router_url: name the servers behind the router too (server_urls or endpoints);"
            " adapters go to each of them"
        )
    if setting not in ("auto", "vllm", "transformers"):
        raise SettingError(f"engine: expected one of auto, vllm, transformers; got {setting!r}")
    installed = importlib.util.find_spec("vllm") is not None
    if setting != "auto":
        if setting == "vllm" and not running and not installed:
            raise SettingError(
                "engine: vllm is not installed here; install the extra (make setup), give"
                " server_urls, or use transformers"
            )
        return setting, "as set"
    if running:
        return "vllm", "servers that run already are named"
    return ("vllm", "vllm is installed") if installed else ("transformers", "vllm is not installed")


async def start_engine(
    model: str,
    tokens: ChatRenderer,
    policies: Sequence[PolicySpec],
    config: EngineConfig,
    *,
    folder: Path,
    say: Callable[[str], None],
    staleness: int = 0,
) -> Engine:
    """A running engine for one base and its policies.

    Args:
        folder: the run's, for the server's log, key and version folders.
        staleness: earlier versions of every adapter that stay loaded beside the newest one.
    """
    kind, reason = choose_engine(config)
    say(f"engine: {kind} ({reason}) for {model}")
    if kind == "transformers":
        from .transformers import TransformersEngine

        return TransformersEngine(
            model,
            dtype=choose_dtype(model, config.engine_dtype, on_gpu=has_gpu()),
            tokens=tokens,
            context=config.max_model_len,
        )
    from .vllm.engine import start_vllm

    dtype = (
        config.engine_dtype
        if config.server_urls or config.endpoints
        else choose_dtype(model, config.engine_dtype, on_gpu=has_gpu())
    )
    return await start_vllm(
        model,
        tokens,
        policies,
        replace(config, engine_dtype=dtype),
        folder=folder,
        say=say,
        staleness=staleness,
    )


def address_of(engine: Engine) -> dict[str, Any] | None:
    """What another process needs to ask the servers of this engine, as JSON; None if it has none
    that could be asked."""
    from .vllm.engine import VLLMEngine

    return engine.address() if isinstance(engine, VLLMEngine) else None


def attach_engine(
    address: Mapping[str, Any], tokens: ChatRenderer, config: EngineConfig, folder: Path
) -> Engine:
    """An engine that asks the servers of another process's engine (`address_of`), which alone
    publishes and retires.

    A server that is started again there is waited for until it lists the adapters that are asked
    for here, for as long as a start may take (`server_timeout`) and a minute; it is found at its
    new address.

    Args:
        folder: the run's. Raises `SettingError` or `EngineError` for a server that cannot be
            asked from here.
    """
    from .vllm.discovery import Endpoint, key_from
    from .vllm.engine import VLLMEngine
    from .vllm.health import ReplicaPolicy

    policy = ReplicaPolicy()
    return VLLMEngine(
        [from_json(Endpoint, server) for server in address["servers"]],
        tokens,
        adapter_root=folder / "versions",
        key=key_from(config.server_key),
        allow_open_server=config.allow_open_server,
        dtype=address["dtype"],
        router=address["router_url"],
        retry=replace(policy, gone=policy.gone + config.server_timeout),
        foreign=True,
    )


async def revive_servers(engine: Engine) -> None:
    """Start again what this process has started for the engine and has died since. Raises
    `EngineError` for one that died too often."""
    from .vllm.engine import VLLMEngine

    if isinstance(engine, VLLMEngine):
        await engine.fleet.revive()
