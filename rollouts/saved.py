"""A checkpoint as it lies on disk: whole, undamaged, and naming nothing that its reader did not agree to.

Anyone may hand you a checkpoint, so `system.json` is read as data: what it names is imported, or asked over the network, only if it
is ours or the reader allows it, and what it names files by is checked first. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..agents.types import AgentSpec, PolicySpec, Sampling, SettingError, from_json

SCHEMA = 1
FILES = ("adapter_config.json", "adapter_model.safetensors")
# a tool is called with what a model writes
OURS = {"reward": "marlora.", "tasks": "marlora.", "tool": "marlora.agents.", "verifier": "marlora.agents.verifiers:"}
MAKERS = {"reward": ("verified", "marlora.rollouts.rewards:verified"), "verifier": ("marlora.trainers.verifier:learned",)}
_PARTS = {
    "schema": int, "step": int, "bases": dict, "system": dict, "agents": list, "policies": dict, "adapters": dict, "tasks": dict,
    "rewards": list, "sampling": dict,
}  # fmt: skip
_DTYPES = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """`system.json` of a checkpoint whose adapters are those it names. Raises `SettingError` with the path of what is wrong."""
    path = folder / "system.json"
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        hint = "expected a checkpoint such as RUN/checkpoints/step-000010"
        if own := sorted(folder.glob("checkpoints/step-*")):
            hint = f"{folder} is a run; its newest checkpoint is {own[-1]}"
        raise SettingError(f"{path}: {error.strerror}; {hint}") from error
    except ValueError as error:
        raise SettingError(f"{path}: not JSON ({error}); the checkpoint is damaged") from error
    try:
        _check_parts(data)
    except (KeyError, TypeError, AttributeError) as error:
        raise SettingError(f"{path}: damaged, {error!r} where a part of it should be") from error
    except SettingError as error:
        raise SettingError(f"{path}: {error}") from error
    _check_files(folder)
    for name, entry in data["adapters"].items():
        _check_adapter(folder / "adapters" / name, entry["sha256"], data["policies"][name]["adapter"])
    return data


def _check_parts(data: Any) -> None:
    if not isinstance(data, dict):
        raise SettingError(f"expected an object, got {type(data).__name__}; the checkpoint is damaged")
    for name, kind in _PARTS.items():
        if name not in data:
            raise SettingError(f"{name} is missing; the checkpoint is damaged")
        if type(data[name]) is not kind:
            raise SettingError(f"{name}: expected {kind.__name__}, got {data[name]!r:.60}; the checkpoint is damaged")
    if data["schema"] != SCHEMA:
        raise SettingError(f"schema {data['schema']}, this version of marlora reads {SCHEMA}; install a newer one")
    for agent in data["agents"]:
        from_json(AgentSpec, agent, "agents")
    for name, policy in data["policies"].items():
        if not re.fullmatch(r"[\w-]+", name):
            raise SettingError(
                f"policy {name!r}: letters, digits, '_' and '-' expected (it names files); the checkpoint is not ours"
            )
        if from_json(PolicySpec, policy, f"policies.{name}").name != name:
            raise SettingError(f"policies.{name}.name: expected {name!r}, got {policy['name']!r}; the checkpoint is damaged")
    for name, entry in data["adapters"].items():
        if not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]) or name not in data["policies"]:
            raise SettingError(f"adapters.{name}: expected a policy of that name and a sha256; the checkpoint is damaged")
    for name, entry in data["bases"].items():
        if not isinstance(entry["template"], str) or not set(entry["policies"]) <= set(data["policies"]):
            raise SettingError(f"bases.{name}: expected the hash of a template, and policies by name; the checkpoint is damaged")
    tasks, system = data["tasks"], data["system"]
    for value, kind in (
        (tasks["name"], str), (tasks["args"], dict), (tasks["seed"], int), (tasks["num_eval_tasks"], int), (tasks["eval"], str),
        (system["class"], str), (system["arguments"], dict), *((name, str) for name in data["rewards"]),
    ):  # fmt: skip
        if type(value) is not kind:
            raise SettingError(f"tasks, system or rewards: expected {kind.__name__}, got {value!r:.60}; the checkpoint is damaged")
    from_json(Sampling, data["sampling"], "sampling")


def _check_files(folder: Path) -> None:
    """Files that the manifest lists and that are here have the hash it gives; a copy may leave out `trainer/`, or the manifest."""
    path = folder / "manifest.json"
    if not path.is_file():
        return
    try:
        hashes = {str(name): str(found) for name, found in json.loads(path.read_text())["sha256"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingError(f"{path}: cannot be read ({error!r}); the checkpoint is damaged") from error
    for name, expected in hashes.items():
        file = folder / name
        wanted = name == "system.json" or name.startswith(("adapters/", "values/"))
        if wanted and ".." not in Path(name).parts and file.is_file() and file_sha256(file) != expected:
            raise SettingError(f"{file}: its sha256 is not the one in manifest.json; the file was altered or torn")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_adapter(folder: Path, expected: str, shape: Mapping[str, Any]) -> None:
    for file in FILES:
        if not (folder / file).is_file():
            raise SettingError(f"{folder / file}: missing, though system.json names the adapter ({expected[:8]})")
    try:
        found = adapter_sha256(folder / FILES[1])
        config = json.loads((folder / FILES[0]).read_text())
        saved = {"r": config["r"], "alpha": config["lora_alpha"]}
    except Exception as error:  # safetensors and json raise many kinds; all mean the same to the user
        raise SettingError(f"{folder}: the adapter cannot be read ({type(error).__name__}: {error}); it is damaged") from error
    if found != expected:
        raise SettingError(f"{folder / FILES[1]}: its tensors are {found[:8]}, system.json names {expected[:8]}; they were swapped")
    for name, value in saved.items():
        if value != shape[name]:
            raise SettingError(f"{folder / FILES[0]}: {name} is {value}, system.json says {shape[name]}")


def adapter_sha256(path: Path) -> str:
    """Hash of an adapter file's tensors (names, dtypes, shapes, bytes): what the trainer calls the adapter's sha256."""
    from safetensors import deserialize

    digest = hashlib.sha256()
    for name, entry in sorted(deserialize(path.read_bytes())):
        digest.update(f"{name} {_DTYPES[entry['dtype']]} {tuple(entry['shape'])}\n".encode())
        digest.update(entry["data"])
    return digest.hexdigest()


def files_sha256(model: str) -> str | None:
    """A hash of a local model's tensor files by name and content; None for a hub name."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# what a checkpoint may name


def foreign(kind: str, name: str) -> bool:
    """Would this name of a checkpoint import code that is not ours? `kind`: reward, tasks, tool or verifier.

    `maker(text)` calls the maker with a text of the checkpoint's: only those that are meant for it are ours.
    """
    maker, bracket, text = name.partition("(")
    if bracket and name.endswith(")"):
        return maker not in MAKERS.get(kind, ()) or (kind == "reward" and foreign("verifier", text[:-1]))
    return ":" in name and not name.startswith(("reasoning-gym:", "reasoning_gym:", "hub:")) and not name.startswith(OURS[kind])


def own_program(system: Mapping[str, Any]) -> list[str]:
    """What `marlora.rollouts.own_programs` would run for this system."""
    told = system["arguments"].get("main"), system["arguments"].get("command")
    return [f"the program {each if isinstance(each, str) else json.dumps(each)}" for each in told if each]


def strangers(data: Mapping[str, Any], *, rewards: bool = True) -> list[str]:
    """What playing this checkpoint would import from elsewhere, or ask over the network: for people to read before they agree."""
    found = [f"reward {name}" for name in data["rewards"] if rewards and foreign("reward", name)]
    found += [f"tool {t} of {a['name']}" for a in data["agents"] for t in a.get("tools", ()) if foreign("tool", t)]
    verifier = data["system"]["arguments"].get("verifier")
    found += [f"verifier {verifier}"] if isinstance(verifier, str) and foreign("verifier", verifier) else []
    found += own_program(data["system"])
    found += [f"the model at {p['url']} as {name}" for name, p in data["policies"].items() if p.get("url")]
    return found
