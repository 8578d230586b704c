"""The house keeps its plan: rooms and arrow, where torch may be, names, the wheel, and what text
may say."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.repository import ROOMS, ROOT, clean_environment, copy_to, dotted, files, modules

HEAVY = ("torch", "peft", "trl", "accelerate", "vllm")
# files that import torch in functions
TORCH_ENGINE = (
    "transformers",
    "transformers_sampler",
    "transformers_exactness",
    "transformers_prompts",
    "transformers_batch",
    "transformers_adapters",
)
LARGEST = 1_000_000  # bytes of one file in the repository


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute dotted name, at module level?) of each import in a file, those under `if
    TYPE_CHECKING:` left out."""

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                package = dotted(path).split(".")[: -child.level] if child.level else []
                base = ".".join([*package, *([child.module] if child.module else [])])
                yield from ((f"{base}.{alias.name}", top) for alias in child.names)
            yield from walk(
                child,
                top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)),
            )

    return walk(ast.parse((ROOT / path).read_text()), True)


PER_FOLDER = 12  # files with code


def inner_imports(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, anywhere in it: under `if TYPE_CHECKING:` and inside
    functions too."""
    here = dotted(path).split(".")
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = here[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name in MODULES and name != dotted(path))


MODULES = {dotted(path): path for path in modules(*ROOMS)}


def subpackage(name: str) -> str:
    """The part of a room that a module belongs to: `marlora.trainers.update`, or the module itself
    at a room's top. The folders of `trainers.methods` count one by one."""
    parts = name.split(".")
    deep = parts[1:3] == ["trainers", "methods"] and len(parts) > 4
    return ".".join(parts[: 4 if deep else 3])


def cycles(edges: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """The edges that lie on a cycle: from where they lead, their beginning can be reached again."""
    after: dict[str, set[str]] = {}
    for a, b in edges:
        after.setdefault(a, set()).add(b)

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for following in after.get(waiting.pop(), set()) - seen:
                seen.add(following)
                waiting.append(following)
        return seen

    return sorted((a, b) for a, b in edges if a in reachable(b))


def test_cycles_are_seen() -> None:
    assert cycles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")}) == [
        ("a", "b"),
        ("b", "c"),
        ("c", "a"),
    ]
    assert cycles({("a", "b"), ("b", "c"), ("a", "c")}) == []


def test_no_import_cycle_among_files() -> None:
    edges = {(name, other) for name, path in MODULES.items() for other in inner_imports(path)}
    assert len(edges) > 500
    on_a_cycle = [f"{a} -> {b}" for a, b in cycles(edges)]
    assert not on_a_cycle, "imports on a cycle; cut one:\n" + "\n".join(on_a_cycle)


def test_no_import_cycle_among_subpackages() -> None:
    named: dict[tuple[str, str], str] = {}
    for name, path in MODULES.items():
        for other in inner_imports(path):
            a, b = subpackage(name), subpackage(other)
            if a != b and name.split(".")[1] == other.split(".")[1]:
                named.setdefault((a, b), f"{name} -> {other}")
    on_a_cycle = [named[edge] for edge in cycles(set(named))]
    assert not on_a_cycle, "subpackages in a circle; cut one of:\n" + "\n".join(on_a_cycle)


def test_only_the_loop_and_the_trainer_base_take_a_run() -> None:
    """Everything else is handed the nouns it uses: rollouts, evaluator, log, spec, values."""
    importers = {
        name for name, path in MODULES.items() if "marlora.trainers.loop.run" in inner_imports(path)
    }
    outside = {name for name in importers if not name.startswith("marlora.trainers.loop.")}
    assert outside == {"marlora.trainers.trainer"}


def test_folders_hold_at_most_twelve_files() -> None:
    count = Counter(path.parent for path in modules(*ROOMS) if path.parent != Path("recipes"))
    full = {str(folder): n for folder, n in count.items() if n > PER_FOLDER}
    assert not full, f"more than {PER_FOLDER} files; make a subpackage: {full}"


@pytest.mark.parametrize("path", modules(*ROOMS), ids=str)
def test_files_and_functions_are_short(path: Path) -> None:
    """400 lines a file, 60 a function (120 for a training loop marked `# loop`), 100 columns."""
    lines = (ROOT / path).read_text().splitlines()
    assert len(lines) <= 400, f"{path} has {len(lines)} lines; at most 400"
    wide = [number for number, line in enumerate(lines, 1) if len(line) > 100]
    assert not wide, f"{path}: lines {wide} are wider than 100 columns"
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            most = 120 if "# loop" in lines[node.lineno - 1] else 60
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= most, f"{path}:{node.lineno} {node.name} has {length} lines"


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "marlora" and len(parts) > 1 and parts[1] in ROOMS else None


@pytest.mark.parametrize("path", modules(*ROOMS), ids=str)
def test_imports_point_down(path: Path) -> None:
    mine = ROOMS.index(path.parts[0])
    for name, _ in imports(path):
        room = room_of(name)
        assert room is None or ROOMS.index(room) <= mine, (
            f"{path} imports {name}: the arrow is {' <- '.join(ROOMS)}"
        )
        # written for other packages, one of which is called `agents`
        foreign = path.parent == Path("recipes/programs/frameworks")
        assert foreign or name.split(".")[0] not in (*ROOMS, "tests"), (
            f"{path} imports {name}: our rooms are imported as marlora.*"
        )


@pytest.mark.parametrize("path", modules("agents"), ids=str)
def test_agents_use_the_standard_library_only(path: Path) -> None:
    foreign = [
        name
        for name, _ in imports(path)
        if name.split(".")[0] not in (*sys.stdlib_module_names, "marlora")
    ]
    assert not foreign, f"{path} imports {foreign}"


@pytest.mark.parametrize("path", modules("agents", "rollouts", "recipes"), ids=str)
def test_torch_stays_in_trainers(path: Path) -> None:
    if path.parts[0] == "recipes" and path.name.startswith("minimal_"):
        return  # one flat file to be read at one sitting, torch and all
    for name, top in imports(path):
        if name.split(".")[0] == "torch":
            in_engine = path.parent == Path("rollouts/engines") and path.stem in TORCH_ENGINE
            assert in_engine and not top, (
                f"{path} imports torch; only trainers/ may, and rollouts/engines/transformers.py"
                " and transformers_*.py inside functions"
            )


def test_agents_and_rollouts_import_without_torch() -> None:
    names = [dotted(path) for path in modules("agents", "rollouts")]
    script = f"""
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocker())
for name in {names!r}:
    importlib.import_module(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=clean_environment(),
        cwd="/",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(names) > 5


def test_rooms_have_no_init_file() -> None:
    assert [
        str(path)
        for path in files()
        if path.name == "__init__.py" and path.parts[0] not in ("tests", ".package")
    ] == []


def test_packages_name_every_folder_with_code() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {dotted(path.parent) for path in modules(*ROOMS)} | {"marlora", "marlora.slurm"}
    assert set(tool["packages"]) == folders == set(tool["package-dir"])
    for package, folder in tool["package-dir"].items():
        assert package == ("marlora" if folder == PACKAGE else dotted(Path(folder)))


PACKAGE = ".package"  # what stands beside the rooms in an installed package


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    tree = copy_to(folder / "tree")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(tree),
    ]
    done = subprocess.run(build, capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    (built,) = folder.glob("marlora-*.whl")
    return built


@pytest.mark.slow
def test_wheel_equals_tree(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name.removeprefix("marlora/") for name in names if ".dist-info/" not in name}
    assert packed == {
        str(path.relative_to(PACKAGE) if path.parts[0] == PACKAGE else path)
        for path in files()
        if path.parts[0] in (*ROOMS, PACKAGE, "slurm") and path.suffix != ".md"
    }
    for licence in ("LICENSE", "THIRD_PARTY.md"):
        assert any(name.endswith(f"licenses/{licence}") for name in names)


@pytest.mark.slow
def test_nothing_is_left_when_it_is_uninstalled(wheel: Path, tmp_path: Path) -> None:
    """Also of what running it has compiled. (Python -O compiles under other names, which pip leaves
    behind for every package.)"""

    def run(*command: str) -> str:
        env = clean_environment(PYTHONDONTWRITEBYTECODE="")
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
        return done.stdout

    venv.create(tmp_path / "venv")
    python = str(tmp_path / "venv/bin/python")
    pip = (sys.executable, "-m", "pip", "--python", python)
    before = set((tmp_path / "venv").rglob("*"))
    run(*pip, "install", "--no-compile", "--no-deps", "--no-index", str(wheel))
    run(python, "-c", "import marlora.agents.testing, marlora.rollouts.report.html")
    installed = set((tmp_path / "venv").rglob("*")) - before
    assert any(path.suffix == ".pyc" and path.stem.startswith("testing.") for path in installed)
    run(*pip, "uninstall", "--yes", "marlora")
    left = {
        str(path.relative_to(tmp_path)) for path in set((tmp_path / "venv").rglob("*")) - before
    }
    assert not left
    assert "None" in run(python, "-c", "import importlib.util as u; print(u.find_spec('marlora'))")


LAUNCHED = [
    path
    for path in modules("recipes")
    if path.parent.name == "recipes" and '__name__ == "__main__"' in (ROOT / path).read_text()
]
WITH_SETTINGS = [
    path for path in LAUNCHED if path.stem != "cli" and not path.stem.startswith("minimal_")
]


# their files are started by path
SCRIPT_FOLDERS = tuple(map(Path, ("recipes", "recipes/programs", "recipes/programs/frameworks")))


@pytest.mark.parametrize(
    "path", [path for path in modules("recipes") if path.parent in SCRIPT_FOLDERS], ids=str
)
def test_recipe_names_are_nobody_elses(path: Path) -> None:
    # `accelerate launch recipes/X.py` puts recipes/ first on the path: a recipe named like a module
    # would be imported for it.
    assert path.stem not in sys.stdlib_module_names
    assert path.stem not in (
        "dspy",
        "trace",
        "textgrad",
        "opto",
        "adalflow",
        "afl",
        "gptswarm",
        "maas",
        *ROOMS,
    )
    assert importlib.util.find_spec(path.stem) is None, (
        f"{path.stem} is an importable top-level module"
    )


@pytest.mark.parametrize("path", WITH_SETTINGS, ids=str)
def test_recipe_has_its_settings_beside_it(path: Path) -> None:
    """Its default, or one for each of its settings, whose names begin with its own."""
    assert any(
        f.parent == path.parent and f.suffix == ".yaml" and f.stem.startswith(path.stem)
        for f in files()
    )


def test_settings_belong_to_a_recipe() -> None:
    stems = tuple(path.stem for path in LAUNCHED)
    for path in files():
        of_launcher = path.parent == Path("recipes/accelerate")
        if path.parts[0] == "recipes" and path.suffix == ".yaml" and not of_launcher:
            assert path.stem.startswith(stems), (
                f"{path} belongs to no recipe: its name starts like one's"
            )


def test_another_package_named_agents(tmp_path: Path) -> None:
    """`openai-agents` is imported as `agents`: installed beside marlora, both work, even from the
    repository's root."""
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("OWNER = 'someone else'\n")
    script = tmp_path / "probe.py"
    script.write_text(
        "import agents, marlora.agents.types as ours\nassert agents.OWNER and"
        " ours.Task\nprint('both')\n"
    )
    environment = clean_environment(PYTHONPATH=str(tmp_path))
    for how in (["-m", "probe"], ["-c", script.read_text()], [str(script)]):
        done = subprocess.run(
            [sys.executable, *how], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.stdout == "both\n", f"{how}: {done.stderr}"


def test_installed_versions_are_within_the_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [
        Requirement(r) for r in [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    ]
    for requirement in requirements:
        installed = importlib.metadata.version(requirement.name)
        assert requirement.specifier.contains(installed), (
            f"{requirement.name} {installed} is outside {requirement.specifier}"
        )


# Written in two halves, so that this file does not hold what it looks for.
FORBIDDEN = {
    "a host of a package registry": (
        r"\bpy" r"pi\.org|python" r"hosted\.org|registry\.npm" r"js|crates\." r"io\b"
    ),
    "a path of somebody's machine": r"(?<![\w.}])/(work|root|opt|home)/" r"\w",
    "talk about how the text was made": (
        r"(?i)\b(this|the|a|our|next) ses"
        r"sion\b|this work"
        r"place|as an A"
        r"I\b|\bClau"
        r"de\b"
    ),
    "a pointer to notes that are not here": (
        r"\b(house-sty" r"le|engineer" r"ing|cpu-fac" r"ts|desi" r"gn)(\.md| [0-9])|\bshar" r"ed/"
    ),
    "a merge left unfinished": r"^(<{7}|>{7}) ",
}


@pytest.mark.parametrize("path", files(), ids=str)
def test_text_speaks_of_the_project_alone(path: Path) -> None:
    data = (ROOT / path).read_bytes()
    assert len(data) <= LARGEST, f"{path} has {len(data)} bytes; at most {LARGEST}"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return  # not text
    hashed = path.parts[:2] == ("tests", "data")  # byte for byte what another version wrote
    assert hashed or not text or text.endswith("\n"), f"{path}: no newline at the end"
    for what, pattern in FORBIDDEN.items():
        found = re.search(pattern, text, re.MULTILINE)
        assert not found, (
            f"{path}:{text[: found.start()].count(chr(10)) + 1}: {found.group()!r} is {what}"
        )


@pytest.mark.parametrize("path", [path for path in files() if path.suffix == ".md"], ids=str)
def test_links_between_documents_hold(path: Path) -> None:
    prose = re.sub(r"```.*?```", "", (ROOT / path).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
        if not re.match(r"[a-z]+:", target):
            assert (ROOT / path.parent / target).exists(), (
                f"{path} links to {target}, which does not exist"
            )
