"""Parts: what a run learns and a checkpoint holds, behind one protocol; saved, restored and hashed
by one loop."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ...agents.types import SettingError
from ..checkpoint import CheckpointError, write_json

STATE_FILE = "state.json"


class Part(Protocol):
    """Something that a run learns or remembers: adapters, a table of logits, a method's memory."""

    @property
    def name(self) -> str:
        """Unique in the run; the name of its folder in a checkpoint."""

    def values(self) -> Mapping[str, Any]:
        """What a team sees of it: JSON by the name of a value; {} if it sees nothing."""

    def save(self, folder: Path) -> None:
        """Write everything that a resumed run needs into a folder of its own, which exists."""

    def load(self, folder: Path) -> None:
        """Put back what `save` wrote. Raises `SettingError` if it is of another shape than this."""

    def sha256(self) -> str:
        """SHA-256, in hex, of what was learnt; an optimizer's moments do not count."""


class JsonPart:
    """A part whose state is one JSON value in one file: a subclass gives `state_dict` and
    `load_state_dict`.

    Args:
        name: letters, digits, `_`, `-` and `.`; raises `SettingError` for another.
    """

    def __init__(self, name: str) -> None:
        self._name = checked_name(name)

    @property
    def name(self) -> str:
        return self._name

    def values(self) -> Mapping[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The whole state as JSON."""
        raise TypeError(f"{type(self).__name__} has no state_dict()")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        raise TypeError(f"{type(self).__name__} has no load_state_dict(state)")

    def save(self, folder: Path) -> None:
        write_json(folder / STATE_FILE, self.state_dict())

    def load(self, folder: Path) -> None:
        path = folder / STATE_FILE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        self.load_state_dict(state)

    def sha256(self) -> str:
        return json_sha256(self.state_dict())


def save_parts(parts: Sequence[Part], folder: Path) -> dict[str, str]:
    """Write every part into `folder`/NAME; returns each one's sha256 by name, which `load_parts`
    compares. Raises `SettingError` if two have one name."""
    check_names(parts)
    for part in parts:
        own = folder / part.name
        own.mkdir(parents=True, exist_ok=True)
        part.save(own)
    return {part.name: part.sha256() for part in parts}


def load_parts(parts: Sequence[Part], folder: Path, hashes: Mapping[str, str]) -> None:
    """Restore every part from `folder`/NAME; `hashes` is what `save_parts` returned.

    Raises `SettingError` if the run and the checkpoint have other parts, `CheckpointError` if a
    part's folder is missing or what it holds has another sha256.
    """
    check_names(parts)
    names = {part.name for part in parts}
    for name in sorted(names ^ set(hashes)):
        holder, other = ("this run", folder) if name in names else (folder, "this run")
        raise SettingError(
            f"part {name!r}: {holder} has it and {other} does not; resume with the method and"
            " settings that the run began with"
        )
    for part in parts:
        own = folder / part.name
        if not own.is_dir():
            raise CheckpointError(f"{own}: missing, though the checkpoint lists part {part.name!r}")
        part.load(own)
        if part.sha256() != hashes[part.name]:
            raise CheckpointError(
                f"{own}: the sha256 of part {part.name!r} is not the one that the checkpoint lists;"
                " the file was altered, or belongs to another step"
            )


def values_of(parts: Iterable[Part]) -> dict[str, Any]:
    """What a team sees of all parts, by the name of a value. Raises `SettingError` if two parts
    give one value."""
    values: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for part in parts:
        for name, value in part.values().items():
            if name in owner:
                raise SettingError(
                    f"value {name!r}: parts {owner[name]!r} and {part.name!r} both give it; one"
                    " part owns a value"
                )
            owner[name], values[name] = part.name, value
    return values


def hashes_of(parts: Iterable[Part]) -> dict[str, str]:
    """SHA-256 of what each part has learnt, by its name."""
    return {part.name: part.sha256() for part in parts}


def checked_name(name: str) -> str:
    """The name, if a folder can have it on any system; else raises `SettingError`."""
    plain = name.replace("_", "").replace("-", "").replace(".", "")
    if not plain.isalnum() or not plain.isascii() or name.startswith("."):
        raise SettingError(
            f"part {name!r}: expected letters, digits, '_', '-' and '.' (it names a folder of the"
            " checkpoint)"
        )
    return name


def check_names(parts: Sequence[Part]) -> None:
    """Raise `SettingError` if two parts have the same name or one cannot name a folder."""
    names = [checked_name(part.name) for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise SettingError(f"part {name!r}: {names.count(name)} parts of a run have this name")


def json_sha256(value: Any) -> str:
    """SHA-256, in hex, of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def json_copy(value: Any, path: str) -> Any:
    """A deep copy of a JSON value. Raises `SettingError` with the path of the first thing that
    would not come back from a file as it is: another type, a tuple, a key that is no text, NaN."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, list):
        return [json_copy(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise SettingError(f"{path}: expected texts as keys, got {key!r}")
        return {key: json_copy(item, f"{path}.{key}") for key, item in value.items()}
    got = f"{value!r}" if isinstance(value, float) else type(value).__name__
    raise SettingError(
        f"{path}: expected JSON (text, finite number, true, false, null, list or mapping), got"
        f" {got}"
    )
