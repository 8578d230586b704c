"""How marlora was installed here, and the command that installs what is missing."""

from __future__ import annotations

from pathlib import Path

from marlora.rollouts.engines.hardware import has_gpu

ROOT = Path(__file__).resolve().parents[2]  # the repository, or the package's folder
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's documented home of CPU builds
SMALL_TORCH = f"pip install torch --index-url {TORCH_CPU_INDEX}"


def in_checkout() -> bool:
    """Whether this is a checkout of the repository, which `make setup` installs for."""
    return (ROOT / "Makefile").is_file() and (ROOT / ".ci" / "setup.py").is_file()


def place() -> str:
    """How and where it is installed, in words."""
    return f"a checkout at {ROOT}" if in_checkout() else f"a package in {ROOT.parent}"


def install(extra: str = "") -> str:
    """What to do so that everything, and this extra, is installed."""
    if in_checkout():
        return "run make setup"
    name = f"marlora[{extra}]" if extra else "marlora"
    return f"pip install --upgrade '{name}'"


def install_package(requirement: str) -> str:
    """What to do so that one package is installed. torch has a small build for machines without a
    GPU, which pip does not choose by itself."""
    command = f"pip install '{requirement}'"
    if requirement.startswith("torch") and not has_gpu():
        command += f" --index-url {TORCH_CPU_INDEX}"
    return f"{install()}, or {command}" if in_checkout() else command
