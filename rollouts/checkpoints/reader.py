"""Reading a checkpoint: complete, undamaged, and without importing anything that the user did not
trust.

A checkpoint may come from anyone, so `system.json` is read as data: what it names is imported, or
asked over the network, only if it is part of marlora or the user allows it, and names that become
parts of paths are checked first. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...agents.lookup import AGREE, Untrusted, only_trusted
from ...agents.text.secrecy import shown_key_name, shown_url
from ...agents.types import AgentSpec, PolicySpec, Sampling, SettingError, from_json, nearest
from ..engines.adapter_versions import FILES
from ..files import adapter_sha256, file_sha256
from ..rewards.helpers import Helper, helpers_of

SCHEMA = 1
DAMAGE = (
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    IndexError,
    ArithmeticError,
    RecursionError,
    re.error,
)
# What an adapter_config.json may say besides rank, alpha and modules; all else must be off. PEFT
# imports a module that `megatron_core` names, and other settings change the base.
PLAIN_LORA: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
    "inference_mode": (True, False),
}
FREE_LORA = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "base_model_name_or_path",
    "peft_version",
    "revision",
)
_PARTS = {
    "schema": int,
    "step": int,
    "base": dict,
    "bases": dict,
    "system": dict,
    "agents": list,
    "policies": dict,
    "adapters": dict,
    "tasks": dict,
    "rewards": list,
    "sampling": dict,
}


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """`system.json` of a checkpoint, checked together with the adapters it names. Raises
    `SettingError` with the path of what is wrong."""
    path = folder / "system.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "expected a checkpoint such as RUN/checkpoints/step-000010"
        if own := sorted(folder.glob("checkpoints/step-*")):
            hint = f"{folder} is a run; its newest checkpoint is {own[-1]}"
        raise SettingError(f"{path}: {error.strerror}; {hint}") from error
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{path}: not JSON ({error}); the checkpoint is damaged") from error
    try:
        _check_parts(data)
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from error
    except DAMAGE as error:
        raise SettingError(
            f"{path}: damaged, {error!r:.200} where a part of it should be"
        ) from error
    _check_files(folder)
    for name, entry in data["adapters"].items():
        _check_adapter(
            folder / "adapters" / name, entry["sha256"], data["policies"][name]["adapter"]
        )
    return data


def _check_parts(data: Any) -> None:
    """Check types and schema of `system.json`, then each of its parts."""
    if not isinstance(data, dict):
        raise SettingError(
            f"expected an object, got {type(data).__name__}; the checkpoint is damaged"
        )
    for name, kind in _PARTS.items():
        if name not in data:
            raise SettingError(f"{name} is missing; the checkpoint is damaged")
        if type(data[name]) is not kind:
            raise SettingError(
                f"{name}: expected {kind.__name__}, got {data[name]!r:.60}; the checkpoint is"
                " damaged"
            )
    if data["schema"] != SCHEMA:
        raise SettingError(
            f"schema {data['schema']}, this version of marlora reads {SCHEMA}; install a newer one"
        )
    _check_agents(data)
    _check_bases(data)
    _check_values(data)
    from_json(Sampling, data["sampling"], "sampling")
    read_helpers(data)


def read_helpers(data: Mapping[str, Any]) -> dict[str, Helper]:
    """The helpers that the checkpoint's rewards ask, by name. Raises `SettingError` for one that
    takes the name of an agent or a policy, or stands on no base of the checkpoint."""
    taken = {*data["policies"], *(agent["name"] for agent in data["agents"])}
    helpers = helpers_of(data.get("helpers", {}), taken)  # 0.1 wrote none
    for name, helper in helpers.items():
        base = helper.policy.base or data["base"]["name"]
        if not helper.policy.url and base not in data["bases"]:
            raise SettingError(
                f"helpers.{name}.base: {base!r} is no base of the checkpoint;"
                f" {nearest(base, list(data['bases']))}"
            )
    return helpers


def _check_agents(data: Mapping[str, Any]) -> None:
    """Agents, policies and adapters; names of policies are names of files."""
    for agent in data["agents"]:
        from_json(AgentSpec, agent, "agents")
    for name, policy in data["policies"].items():
        if not re.fullmatch(r"[\w-]+", name):
            raise SettingError(
                f"policy {name!r}: letters, digits, '_' and '-' expected (it names files); the"
                " checkpoint is not ours"
            )
        if from_json(PolicySpec, policy, f"policies.{name}").name != name:
            raise SettingError(
                f"policies.{name}.name: expected {name!r}, got {policy['name']!r}; the checkpoint"
                " is damaged"
            )
    for name, entry in data["adapters"].items():
        if not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]) or name not in data["policies"]:
            raise SettingError(
                f"adapters.{name}: expected a policy of that name and a sha256; the checkpoint is"
                " damaged"
            )


def _check_bases(data: Mapping[str, Any]) -> None:
    for name, entry in data["bases"].items():
        if (
            not isinstance(entry["template"], str)
            or not isinstance(entry.get("chat_template_kwargs", {}), dict)
            or not set(entry["policies"]) <= set(data["policies"])
        ):
            raise SettingError(
                f"bases.{name}: expected the hash of a template, its variables by name, and"
                " policies by name; the checkpoint is damaged"
            )


def _check_values(data: Mapping[str, Any]) -> None:
    """The single values of tasks, system, base and rewards."""
    tasks, system = data["tasks"], data["system"]
    for value, kind in (
        (tasks["name"], str),
        (tasks["args"], dict),
        (tasks["seed"], int),
        (tasks["num_eval_tasks"], int),
        (tasks["eval"], str),
        (system["class"], str),
        (system["arguments"], dict),
        (data["base"]["name"], str),
        *((name, str) for name in data["rewards"]),
    ):
        if type(value) is not kind:
            raise SettingError(
                f"tasks, system, base or rewards: expected {kind.__name__}, got {value!r:.60}; the"
                " checkpoint is damaged"
            )


def _check_files(folder: Path) -> None:
    """Check the files that are read here against the manifest; a copy may leave out `trainer/`, or
    the manifest."""
    path = folder / "manifest.json"
    if not path.is_file():
        return
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["sha256"].items()
        hashes = {str(name): str(sha256) for name, sha256 in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingError(
            f"{path}: cannot be read ({error!r}); the checkpoint is damaged"
        ) from error
    for name, expected in hashes.items():
        file = folder / name
        is_read = name == "system.json" or name.startswith(("adapters/", "values/"))
        if (
            is_read
            and ".." not in Path(name).parts
            and file.is_file()
            and file_sha256(file) != expected
        ):
            raise SettingError(
                f"{file}: its sha256 is not the one in manifest.json; the file was altered or torn"
            )


def _check_adapter(folder: Path, expected: str, shape: Mapping[str, Any]) -> None:
    for file in FILES:
        if not (folder / file).is_file():
            raise SettingError(
                f"{folder / file}: missing, though system.json names the adapter ({expected[:8]})"
            )
    sha256 = adapter_sha256(folder / FILES[1])
    try:
        config = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
        saved = {"r": config["r"], "alpha": config["lora_alpha"]}
    except Exception as error:  # of what json and the keys may raise, all mean damage
        raise SettingError(
            f"{folder}: the adapter cannot be read ({type(error).__name__}: {error}); it is damaged"
        ) from error
    if sha256 != expected:
        raise SettingError(
            f"{folder / FILES[1]}: its tensors are {sha256[:8]}, system.json names {expected[:8]};"
            " they were swapped"
        )
    _check_plain(folder / FILES[0], config)
    for name, value in saved.items():
        if value != shape[name]:
            raise SettingError(
                f"{folder / FILES[0]}: {name} is {value}, system.json says {shape[name]}"
            )


def _check_plain(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that is more than a plain LoRA: PEFT acts on its settings before any weight
    is compared."""
    modules = config.get("target_modules")
    if not isinstance(modules, list) or not all(isinstance(each, str) for each in modules):
        raise SettingError(f"{path}: target_modules: expected a list of names, got {modules!r:.80}")
    for name, value in config.items():
        if name in PLAIN_LORA:
            if value not in PLAIN_LORA[name]:
                raise SettingError(
                    f"{path}: {name} is {value!r:.80}; a checkpoint holds plain LoRA adapters only"
                )
        elif name not in FREE_LORA and value:
            raise SettingError(
                f"{path}: {name} is set ({value!r:.80}); a checkpoint holds plain LoRA adapters"
                " only"
            )


# values

VALUES, ORIGIN = "values.json", "origin.json"  # those of the checkpoint; those its run began with


def read_values(folder: Path, data: Mapping[str, Any], file: str = VALUES) -> dict[str, Any]:
    """The values of a checkpoint by name, or (`ORIGIN`) those with which its run began. 0.1 wrote
    a file per value, and none of the beginning."""
    if isinstance(data.get("values"), list):
        paths = sorted((folder / "values").glob("*.json")) if file == VALUES else []
        return {path.stem: _json(path) for path in paths}
    values: dict[str, Any] = _json(folder / "values" / file)
    return values


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(
            f"{path}: cannot be read ({error}); the checkpoint is damaged"
        ) from error


# what a checkpoint names


@contextlib.contextmanager
def as_data(folder: Path, data: Mapping[str, Any], trust: bool) -> Iterator[None]:
    """A context in which names of `system.json` are looked up as untrusted, unless the user trusts
    them (see `agents.lookup`).

    Raises `SettingError` with the place in the file of a name that is refused or cannot be used.
    """
    try:
        with only_trusted(not trust):
            yield
    except Untrusted as refused:
        where = ", ".join(places(data, refused.name)[:3])
        name = f"{refused.name}{where and f' ({where})'}"
        raise SettingError(
            f"{folder}: the checkpoint names {refused.kind} {name}; {AGREE}"
        ) from refused
    except SettingError as error:
        raise SettingError(f"{folder / 'system.json'}: {error}") from error
    except DAMAGE as error:
        problem = f"{type(error).__name__}: {error}"
        raise SettingError(
            f"{folder / 'system.json'}: cannot be used ({problem:.300}); the checkpoint is damaged"
        ) from error


def places(data: Any, name: str, path: str = "") -> list[str]:
    """The places of a text in a checkpoint's `system.json`, such as `system.arguments.prompts[0]`;
    those inside longer texts if there is no other."""
    leaves = list(_texts(data, path))
    alone = [where for where, text in leaves if text == name]
    return alone or [where for where, text in leaves if name in text]


def _texts(data: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(data, str):
        yield path, data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from _texts(value, f"{path}[{number}]")


def outside_addresses(data: Mapping[str, Any]) -> list[str]:
    """The models that playing this checkpoint would ask over the network, with the keys that they
    would be sent, as text for the user to agree to."""
    return [
        f"the model at {shown_url(p['url'])} as {name} with {shown_key_name(p.get('key_env'))}"
        for name, p in [*data["policies"].items(), *data.get("helpers", {}).items()]
        if p.get("url")
    ]
