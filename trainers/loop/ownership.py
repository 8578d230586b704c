"""The run folder: its marker, which files in it a run wrote, and what `overwrite` may delete.

A folder is a run's if it carries the marker file that the run wrote when it made the folder. Runs
of version 0.1 wrote none: they are recognised by what they hold, if they hold nothing else. Only
files that a run wrote are ever deleted; a folder that holds anything else is refused by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ...agents.types import SettingError
from ...rollouts import files
from .lock import LOCK

MARKER = ".marlora-run"
RUN, CLEARING = "run", "clearing"  # states of a marked folder

_NAMED = r"[^/]+"
_ADAPTER = r"(adapter_config\.json|adapter_model\.safetensors|README\.md)"
_CHECKPOINT = r"\.?step-\d{6}(\.\d+|\.deleted)?"
_VERSION = rf"\.?{_NAMED}-v\d+-[0-9a-f]{{8}}(-twin-[0-9a-f]{{8}})?"
_EPISODES = r"(episodes-(\w+-)?\d{5}\.jsonl|\.lock(-\w+)?|values/[0-9a-f]{16}\.json)"
# by top-level name, what a run writes below it
_FOLDERS = {
    "episodes": _EPISODES,
    "checkpoints": rf"{_CHECKPOINT}/(manifest\.json|system\.json|values/{_NAMED}\.json"
    rf"|adapters/{_NAMED}/{_ADAPTER}"
    rf"|trainer/(state\.json|{_NAMED}\.safetensors|(heads|parts)/{_NAMED}/{_NAMED}))",
    "versions": rf"{_VERSION}/{_ADAPTER}",
    "dumps": r"step-\d{6}\.json",
    "tracking": r".+",
    "eval": rf"(eval\.json|eval\.md|({_NAMED}/)*{_EPISODES})",
    "verifier": rf"{_NAMED}\.(json|safetensors)",
}
_FILES = (
    "config.yaml metrics.jsonl learned.jsonl proofs.json warnings.log evaluations.json"
    " rollouts.json summary.json report.html thumbs.jsonl"
)
_FILE = re.compile(
    "|".join(
        (
            *(re.escape(name) for name in (*_FILES.split(), MARKER, LOCK)),
            r"vllm(-[^/]+)?\.(log|key)",
        )
    )
)
_SHOWN = 3  # names in an error


def check_place(folder: Path) -> None:
    """Raise `SettingError` for a folder that cannot be a run's own: the working directory, the
    home, or one that holds either."""
    name = str(folder)
    if name.startswith("~"):
        raise SettingError(f"output_dir {name}: ~ is not expanded here; write the path out")
    real = folder.resolve()
    holders = {Path.cwd(): "the working directory", Path.home(): "the home directory"}
    for place, what in holders.items():
        if place.resolve().is_relative_to(real):
            same = place.resolve() == real
            raise SettingError(
                f"output_dir {name!r}: is {what if same else f'a folder above {what}'}; name a"
                " folder of the run's own, such as runs/team"
            )
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"output_dir {folder}: a file of that name is there; name a folder")


def entries(folder: Path, kept: Path | None = None) -> Iterator[Path]:
    """Every file, link and empty folder below `folder`, relative to it; links are not followed.
    `kept`: a folder that is left out."""
    for place, folders, names in os.walk(folder):
        here = Path(place)
        folders[:] = [name for name in folders if here / name != kept]
        links = [name for name in folders if (here / name).is_symlink()]
        if here != folder and not (folders or names):
            yield here.relative_to(folder)
        for name in (*names, *links):
            yield (here / name).relative_to(folder)


def is_written(folder: Path, entry: Path) -> bool:
    """Whether a run writes an entry of this name: a plain file, or a folder that is still empty."""
    path, parts = folder / entry, list(entry.parts)
    if path.is_symlink():
        return False
    parts[-1] = re.sub(r"^\.(.+)\.\d+$", r"\1", parts[-1])  # half written by a killed process
    top, rest = parts[0], "/".join(parts[1:])
    if path.is_dir():
        return _is_empty_part(top, rest)
    if not rest:
        return _FILE.fullmatch(top) is not None
    top = re.sub(r"^\.(verifier)\.\d+$", r"\1", top)
    return top in _FOLDERS and re.fullmatch(_FOLDERS[top], rest) is not None


def _is_empty_part(top: str, rest: str) -> bool:
    """Whether a run makes this folder before it fills it."""
    if top not in _FOLDERS:
        return False
    if top == "checkpoints" and rest:
        inside = rf"(/(values|trainer(/heads(/{_NAMED})?)?|adapters(/{_NAMED})?))?"
        return re.fullmatch(_CHECKPOINT + inside, rest) is not None
    if top == "versions" and rest:
        return re.fullmatch(_VERSION, rest) is not None
    return not rest or top in ("tracking", "eval")


def foreign(folder: Path, kept: Path | None = None) -> list[str]:
    """Names of entries that no run wrote, in order."""
    return sorted(str(e) for e in entries(folder, kept) if not is_written(folder, e))


def marked(folder: Path) -> bool:
    """Whether the folder carries the marker of a run."""
    path = folder / MARKER
    return path.is_file() and not path.is_symlink()


def state_of(folder: Path) -> str:
    """`run`, or `clearing` where a deletion was cut off; of a marked folder."""
    with contextlib.suppress(ValueError):
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return str(content.get("state", RUN)) if isinstance(content, dict) else RUN
    return RUN


def mark(folder: Path, state: str = RUN) -> None:
    """Write the marker; the folder is a run's from now on."""
    text = json.dumps({"written_by": "marlora", "state": state}) + "\n"
    files.write_text(folder / MARKER, text)


def is_earlier_version(folder: Path) -> bool:
    """Whether a run of version 0.1 wrote `config.yaml` here, beside its episodes or metrics."""
    import yaml

    path = folder / "config.yaml"
    if path.is_symlink() or not path.is_file():
        return False
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    known = isinstance(config, dict) and {"output_dir", "model", "system", "agents"} <= set(config)
    return known and (_holds_metrics(folder) or any((folder / "episodes").glob("episodes-*.jsonl")))


def _holds_metrics(folder: Path) -> bool:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
    try:
        row = json.loads(first)
    except ValueError:
        return False
    return isinstance(row, dict) and "step" in row


def names_in_the_way(folder: Path) -> list[str]:
    """Top-level names that a run writes and that are there already, in a folder without marker."""
    names = {*_FILES.split(), *_FOLDERS, MARKER}
    return sorted(path.name for path in folder.iterdir() if path.name in names)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def check_overwritable(folder: Path, kept: Path | None = None) -> None:
    """Raise `SettingError` unless everything in the folder was written by a run."""
    others = foreign(folder, kept)
    if others:
        raise SettingError(
            f"output_dir {folder}: overwrite deletes only what a run wrote, and this folder also"
            f" holds {_listed(others)}; move that away, or name another folder"
        )
    holds = [entry for entry in entries(folder, kept) if entry != Path(LOCK)]  # the lock is ours
    if holds and not marked(folder) and not is_earlier_version(folder):
        raise SettingError(
            f"output_dir {folder}: overwrite deletes run folders only, and this one has neither"
            f" the marker {MARKER} of a run nor the files of one; name another folder"
        )


def check_free(folder: Path, *, resume: bool) -> None:
    """Raise `SettingError` unless a run may begin here or, with `resume`, go on."""
    if marked(folder) or is_earlier_version(folder):
        if not resume:
            raise SettingError(
                f"output_dir {folder}: holds an earlier run; set resume to go on, overwrite to"
                " replace it, or another folder"
            )
        return
    taken = names_in_the_way(folder)
    if taken:
        raise SettingError(
            f"output_dir {folder}: holds {_listed(taken)}, which no run of marlora wrote and a run"
            " would replace; name another folder"
        )


def clear(folder: Path, kept: Path | None = None) -> None:
    """Delete what a run wrote; the folder stays, with its marker and the lock. A clearing that a
    kill cuts off is finished by the next run in the folder."""
    mark(folder, CLEARING)
    for entry in sorted(entries(folder, kept), key=lambda e: len(e.parts), reverse=True):
        path = folder / entry
        if entry.parts[0] in (MARKER, LOCK) or not is_written(folder, entry):
            continue
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
    for place, _, _ in os.walk(folder, topdown=False):
        here = Path(place)
        if here != folder and here != kept and not any(here.iterdir()):
            here.rmdir()


def remove_staged(folder: Path) -> None:
    """Delete the files that a killed process left half written at the top of the folder, in `dumps`
    and beside the states of its episodes."""
    for place in (folder, folder / "dumps", folder / "episodes" / "values"):
        for path in place.glob(".*") if place.is_dir() else ():
            staged = re.fullmatch(r"\..+\.\d+", path.name) and not path.is_symlink()
            if staged and path.is_file() and is_written(folder, path.relative_to(folder)):
                path.unlink()
            elif re.fullmatch(r"\.verifier\.\d+", path.name) and path.is_dir():
                shutil.rmtree(path)
