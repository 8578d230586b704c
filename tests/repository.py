"""The repository as data: its files, its Python modules, and a copy of it to run commands in."""

from __future__ import annotations

import ast
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (
    "agents",
    "rollouts",
    "trainers",
    "recipes",
)  # lowest first: each may import those before it


@functools.cache
def files() -> tuple[Path, ...]:
    """Every file git tracks or would track, relative to the root."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return tuple(
        sorted(
            path for path in map(Path, filter(None, listed.split("\0"))) if (ROOT / path).is_file()
        )
    )


def modules(*rooms: str) -> list[Path]:
    """Python files of the rooms, relative to the root."""
    return [path for path in files() if path.parts[0] in rooms and path.suffix == ".py"]


def dotted(path: Path) -> str:
    """`rollouts/engines/vllm/engine.py` -> `marlora.rollouts.engines.vllm.engine`."""
    return ".".join(("marlora", *path.with_suffix("").parts))


def copy_to(folder: Path) -> Path:
    """A copy of the repository's files, with no .venv, runs or caches."""
    for path in files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
    return folder


def clean_environment(**settings: str) -> dict[str, str]:
    """The environment without what would put other packages before those under test."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")} | settings


def throw_away(packages: Sequence[str], *, atop: bool = False, by_uv: bool = False) -> Path:
    """The Python of a throw-away environment with these packages; kept in the temporary folder
    while they are the same.

    `atop`: it sees the packages of this environment too, and installs what they lack. `by_uv`: uv
    installs them, which chooses among many packages' versions in a small part of pip's time.
    """
    what = repr((sys.version, packages, atop and sys.path))
    name = hashlib.sha256(what.encode()).hexdigest()[:10]
    folder = Path(tempfile.gettempdir()) / f"marlora-programs-{name}"
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            if atop:
                here = sysconfig.get_path("purelib", vars={"base": str(folder)})
                found = [
                    path for path in sys.path if path.endswith("site-packages")
                ]  # `addsitedir`: with what their .pth files name
                Path(here, "atop.pth").write_text(
                    "".join(f"import site; site.addsitedir({path!r})\n" for path in found)
                )
            python = str(folder / "bin/python")
            pip = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
            uv = [str(folder / "bin/uv"), "pip", "install", "--quiet", "--python", python]
            for install in ([*pip, "uv"], [*uv, *packages]) if by_uv else ([*pip, *packages],):
                done = subprocess.run(
                    install, env=clean_environment(), capture_output=True, text=True
                )
                assert done.returncode == 0, done.stderr[-2000:]
            (folder / "done").touch()
    return folder / "bin/python"


@functools.cache
def names_of_tests() -> frozenset[str]:
    """Every test there is, as `tests/agents/test_team.py::test_name` (parameters left out)."""
    return frozenset(
        f"{path}::{node.name}"
        for path in modules("tests")
        if path.name.startswith("test_")
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.name.startswith("test_")
    )


def ci_targets() -> set[str]:
    """The make targets that .ci/run reaches, with what they depend on."""
    rules = dict(
        re.findall(r"^([a-z-]+):([^=#\n]*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    found: set[str] = set()
    waiting = re.findall(r"\bmake ([a-z-]+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    while waiting:
        target = waiting.pop()
        found.add(target)
        waiting += [t for t in rules[target].split() if t not in found]
    return found
