"""Every command a document shows has been run: cheap ones here, dear ones by the test named for
them.

A new command in a ```bash block needs a line in COVERED; a command that left the documents takes
its line with it.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from marlora.recipes.cli.train import recipes
from tests.repository import ROOT, ci_targets, clean_environment, copy_to, files, names_of_tests
from tests.results_tables import numbers

PAGES = (
    "README.md",
    "docs/guides/training.md",
    "docs/guides/programs.md",
    "docs/guides/evaluation.md",
    "skills/marlora/SKILL.md",
    "AGENTS.md",
)  # for users
DOCUMENTS = (
    *PAGES,
    "CONTRIBUTING.md",
    *(f"docs/guides/{name}.md" for name in ("cluster", "gpus", "speed")),
    *(f"docs/{name}.md" for name in ("layout", "methods")),
)

RUN = "run here, in a copy of the repository"
CI = "a target that .ci/run makes"
DEMO, TINY = (
    "tests/recipes/test_demos.py::test_make_demo",
    "tests/recipes/test_demos.py::test_make_demo_tiny",
)
SHOWN = "tests/recipes/test_demos.py::test_commands_of_the_pages"  # runs what PAGES show
REQUEUED = "tests/test_slurm.py::test_a_job_requeued_twice_ends_as_one_that_was_not"
NODES = "tests/test_slurm.py::test_server_nodes_and_trainer_nodes_of_one_job"
COLLECT = "tests/test_slurm.py::test_an_array_fills_one_store_and_a_checkpoint_is_evaluated"
COVERED = {
    "make demo": DEMO,
    "make demo-tiny": TINY,
    "make setup": CI,
    "make check": CI,
    "make test": CI,
    "make test-full": CI,
    "make bench-gpu": "tests/trainers/bench/gpu/test_hour.py::test_a_failure_a_hang_and_a_missing_vllm_leave_the_others",
    "make help": RUN,
    "make docs": "tests/test_site.py::test_the_site_builds",
    "make pages": "tests/test_method_pages.py::test_the_pages_are_todays",
    "make test-fast": "tests/test_setup.py::test_targets_do_their_own_set_up",
    # On the one node of a test's Slurm, with its sizes and a tiny model.
    "sbatch slurm/train.sbatch recipes/grpo_team.py --output_dir runs/mine": REQUEUED,
    "sbatch --nodes=3 slurm/multinode.sbatch runs/mine recipes/grpo_team.py --max_steps 500": NODES,
    "sbatch --array=0-7 slurm/collect_array.sbatch runs/mine/checkpoints/step-000030 --output runs/store --num_tasks 4000": (
        COLLECT
    ),
    "sbatch slurm/eval.sbatch runs/mine/checkpoints/step-000030 --json runs/mine/eval.json": (
        COLLECT
    ),
}


def blocks(document: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE
    )


def commands(document: str) -> list[str]:
    """Commands of the bash blocks: continued lines joined, comments and spacing left out. Getting
    the clone is no test's business."""
    lines = "\n".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    found = [" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in lines]
    return [line for line in found if line and not line.startswith(("git clone", "cd "))]


def tried() -> list[str]:
    """The commands of the pages that are run one after the other, in their order."""
    every = dict.fromkeys(command for page in PAGES for command in commands(page))
    return [command for command in every if not command.startswith(("make ", "sbatch "))]


def test_every_method_has_its_line() -> None:
    """docs/methods.md names every recipe but those that show or prepare something."""
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert {*re.findall(r"\(methods/(\w+)\.md\)", page)} == {*recipes()} - {"demo", "own_program"}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_page_with_code_is_run() -> None:
    """By this file, or by tests/test_guides.py, which takes all of two folders."""
    with_code = {
        str(path)
        for path in files()
        if path.suffix == ".md" and (blocks(str(path), "bash") or blocks(str(path), "python"))
    }
    assert with_code <= {*DOCUMENTS} | {
        name for name in with_code if name.startswith(("docs/guides/", "docs/start/"))
    }


def test_numbers_of_the_readme_are_those_of_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    quoted = numbers(rows) | numbers("\n".join(blocks("README.md", "python")))
    measured = (ROOT / "recipes" / "RESULTS.md").read_text(encoding="utf-8")
    assert not quoted - numbers(measured), "the README's tables and code quote recipes/RESULTS.md"


def test_every_command_is_covered() -> None:
    shown = {command for document in DOCUMENTS for command in commands(document)}
    shown -= set(tried())  # all run by SHOWN
    assert SHOWN in names_of_tests()
    assert not shown - COVERED.keys(), "say in COVERED which test runs these commands"
    assert not COVERED.keys() - shown, "no document shows these commands any more"


@pytest.mark.parametrize("command", [c for c, how in COVERED.items() if how != RUN])
def test_what_covers_a_command_exists(command: str) -> None:
    how = COVERED[command]
    if how == CI:
        assert command.split()[1] in ci_targets()
    else:
        assert how in names_of_tests()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository that borrows the running environment."""
    folder = copy_to(tmp_path_factory.mktemp("clone"))
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@pytest.mark.parametrize("command", [c for c, how in COVERED.items() if how == RUN])
def test_command_runs(command: str, clone: Path) -> None:
    assert not re.match(r"make (?!help)", command), (
        "in the copy, make would install the borrowed environment anew"
    )
    path = f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=clone,
        env=clean_environment(PATH=path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


@pytest.mark.parametrize(
    ("document", "block"), [(d, b) for d in DOCUMENTS for b in blocks(d, "python")]
)
def test_python_in_documents_names_what_exists(document: str, block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("marlora."):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{document}: {node.module} has no {alias.name}"
