"""`marlora slurm init`: the job files for a Slurm cluster, in the folder in which jobs are
submitted."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from marlora.agents.types import SettingError

SOURCE = Path(__file__).resolve().parents[2] / "slurm"  # of the repository, or of the package
FOLDER = Path("slurm")  # jobs read `slurm/common.sh` and `slurm/site.env` from where they start
EXAMPLE, SITE = "site.env.example", "site.env"
PYTHON = "# MARLORA_PYTHON="


def cmd_slurm(args: argparse.Namespace) -> None:
    """Write the sbatch files and site.env into ./slurm; then change site.env and submit."""
    if FOLDER.exists():
        raise SettingError(f"slurm init: {FOLDER.absolute()} exists already; leave it, or move it")
    FOLDER.mkdir()
    names = sorted(path.name for path in SOURCE.iterdir() if path.suffix in (".sbatch", ".sh"))
    for name in names:
        shutil.copyfile(SOURCE / name, FOLDER / name)
    (FOLDER / SITE).write_text(site_settings(sys.executable), encoding="utf-8")
    print(
        f"{FOLDER}: {', '.join([SITE, *names])}\nnow: set account and partition in"
        f" {FOLDER / SITE}, then: sbatch {FOLDER}/train.sbatch grpo_team --output_dir runs/mine"
    )


def site_settings(python: str) -> str:
    """The settings of a site, all to be filled in but the Python that jobs run."""
    text = (SOURCE / EXAMPLE).read_text(encoding="utf-8")
    lines = text.replace("# Copy to slurm/site.env (git does not keep it) and set", "# Set")
    return "".join(
        f"MARLORA_PYTHON={python}\n" if line.startswith(PYTHON) else line
        for line in lines.splitlines(keepends=True)
    )


def add_slurm(command: argparse.ArgumentParser) -> None:
    """Arguments of `marlora slurm`."""
    command.add_argument("action", choices=("init",), help="init: write the files")
