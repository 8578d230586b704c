"""`marlora cache`: the local models that were made or unpacked here, and their removal."""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from marlora.agents.types import SettingError, nearest
from marlora.recipes.launch.tables import table
from marlora.trainers.model.local_models import TRAINED, cache

# NAME-HASH (`pretraining.ToyModel`), adapters of one, and NAME-N
OURS = re.compile(
    rf"(?:{'|'.join(map(re.escape, TRAINED))})(?:-lora)?-[0-9a-f]{{12}}|smollm2-135m-instruct-\d+"
)


def models(root: Path) -> dict[str, Path]:
    """By name: the folders in a cache that hold a local model, older versions among them. Whatever
    else lies there is not ours."""
    if not root.is_dir():
        return {}
    found = sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    return {path.name: path for path in found if OURS.fullmatch(path.name)}


def cmd_cache(args: argparse.Namespace) -> None:
    """Show the cache of local models (tiny ones are trained, SmolLM2 is unpacked at first use); or
    clear it."""
    root = cache()
    found = models(root)
    if args.clear is None:
        rows = [(name, f"{_size(path) / 1e6:.1f} MB") for name, path in found.items()]
        print(table(f"models in {root}", ("folder", "size"), rows))
        return
    for name in args.clear:
        if name not in found:
            raise SettingError(
                f"cache --clear {name}: no such model in {root}; {nearest(name, found)}"
            )
    for name in args.clear or found:
        shutil.rmtree(found[name])
        print(f"removed {found[name]}")


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def add_cache(command: argparse.ArgumentParser) -> None:
    """Arguments of `marlora cache`."""
    command.add_argument(
        "--clear", nargs="*", metavar="FOLDER", help="remove these models; all if none is named"
    )
