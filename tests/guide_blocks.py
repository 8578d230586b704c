"""The code blocks of documentation pages, and what it takes to run one after the other."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from marlora.recipes.cli.main import main, parser
from marlora.recipes.launch.settings import parse
from marlora.trainers.loop.spec import RunSpec
from marlora.trainers.trainer import Trainer
from tests.test_readme import COVERED

GPU = "needs a GPU"  # in a comment of a line or of a block's first line: only its form is checked
REFUSED = "# refused"  # behind a command that ends with exit code 2
LONG = "minute"  # in a comment that begins a block of Python: it is run where commands are


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line where it begins."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str:
        """The file that the block is, if its first line names one: `# team.py`."""
        named = re.match(r"# (\w+\.(?:py|yaml))(?:\s.*)?\n", self.text)
        return named.group(1) if named else ""

    @property
    def commands(self) -> list[tuple[str, int]]:
        """The commands of a bash block and their exit codes: 2 where the comment behind one says
        `refused`. Those that need a GPU are left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        bare = [
            (re.sub(r"(^|\s)#.*", "", line).strip(), 2 if REFUSED in line else 0)
            for line in lines
            if GPU not in line
        ]
        return [(command, code) for command, code in bare if command]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page that name a language, in their order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found.group(1), found.group(2), text[: found.start()].count("\n") + 1)
        for found in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


@contextlib.contextmanager
def importable_here() -> Iterator[None]:
    """Modules of the current folder can be imported; they are forgotten at the end."""
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, "")
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        here = str(Path.cwd())
        for name in set(sys.modules) - before:
            if (getattr(sys.modules[name], "__file__", None) or "").startswith(here):
                del sys.modules[name]


def run_page(page: Path, *, commands: bool, bash: bool = True) -> None:
    """Run the blocks of a page in the current folder, which `marlora init` made.

    A block that names a file is written there. Other Python is executed, the blocks of a page with
    the same names; YAML is put over `config.yaml` and resolved, as `marlora train` does before it
    loads anything. Commands are run if `commands`, with the Python that reads what they left;
    else they are parsed, and the Python after the first command is compiled. Without `bash` they
    are another test's.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    run = True
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
            importlib.invalidate_caches()
        if block.language == "python":
            code = compile(block.text, where, "exec")
            first = block.text.partition("\n")[0]
            long = first.startswith("#") and LONG in first
            if run and GPU not in first and (commands or not long):
                exec(code, names)
        elif block.language == "yaml":
            resolve(block)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "bash":
            for command, code in block.commands if bash else ():
                check_command(command)
                if commands:
                    run_command(command, code)
            run = run and (commands or not bash)
        else:
            raise AssertionError(f"{where}: a block of {block.language!r}, which nothing runs")


def resolve(block: Block) -> RunSpec:
    """The run that `config.yaml` describes with these lines over its own."""
    settings = yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8"))
    settings |= yaml.safe_load(block.text)
    recipe = importlib.import_module(f"marlora.recipes.{settings.pop('recipe')}")
    changed = Path(f"line{block.line}.yaml")
    changed.write_text(yaml.safe_dump(settings), encoding="utf-8")
    (trainer,) = (
        value
        for value in vars(recipe).values()
        if isinstance(value, type) and issubclass(value, Trainer)
    )
    return RunSpec.resolve(parse(trainer.Config, changed, ["--config", str(changed)]))


def check_command(command: str) -> None:
    """A `marlora` command has only arguments that it knows."""
    name, *words = shlex.split(command)
    if command in COVERED:
        return
    assert name == "marlora", f"{command!r}: not a marlora command; say which test runs it"
    parser().parse_args(words)


def run_command(command: str, expected: int) -> None:
    """Run a command in this process. Raises `AssertionError` for another exit code."""
    if command in COVERED:  # by a test that is named there
        return
    code: Any = 0
    argv = sys.argv
    try:
        main(shlex.split(command)[1:])
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
    assert code == expected, f"{command}: exit code {code}"
