"""What the servers of several versions of vLLM take, read from their source: the table that
`tests/rollouts/engines/vllm/test_versions.py` holds our command line against.

    python -m pip download --no-deps vllm==0.33.0    # for each version; then unpack the wheels
    python -m benchmarks.scripts.vllm_arguments MODEL FOLDER/0.20.0 ... FOLDER/0.33.0

Nothing of vLLM is imported, so neither torch nor a GPU is needed. MODEL is a model folder; the
others are named by their version.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from marlora.agents.types import PolicySpec
from marlora.rollouts.engines.vllm.server_args import RESERVED, ServerSettings, command

TABLE = Path(__file__).parents[2] / "tests" / "rollouts" / "engines" / "vllm" / "arguments.json"
PARSERS = ("common", "launchers", "openai")  # where `make_arg_parser` has lived
ENGINE = ("EngineArgs", "AsyncEngineArgs")
FRONTEND = ("FrontendArgs", "BaseFrontendArgs")


def ours(model: str) -> list[str]:
    """Names of the arguments we hand to the GPU build for this model, or refuse to have set."""
    flags = command(ServerSettings(model, Path(), policies=[PolicySpec("a")]), 1, on_cpu=False)
    names = {f[2:].partition("=")[0].removeprefix("no-") for f in flags if f.startswith("--")}
    return sorted(names | set(RESERVED))


def options(root: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """(module of the parser, by name what an argument takes) of an unpacked wheel.

    `kind`: switch (`--x`, `--no-x`), list or value; `choices` where they are listed.
    """
    fields, aliases = _config_fields(root)
    place = next(p for p in PARSERS if (root / f"vllm/entrypoints/{p}/cli_args.py").is_file())
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, annotation: ast.expr | None, action: str = "") -> None:
        text = "" if annotation is None else ast.unparse(annotation).removesuffix(" | None")
        switch = text == "bool" or action.endswith("BooleanOptionalAction")
        kind = "switch" if switch else "list" if "list[" in text else "value"
        choices = None if annotation is None else _choices(annotation, aliases)
        listed = {"choices": sorted(choices)} if choices and kind == "value" else {}
        found[name] = {"kind": kind, **listed}

    engine = ast.parse((root / "vllm/engine/arg_utils.py").read_text(encoding="utf-8"))
    for call in _added([n for n in engine.body if getattr(n, "name", "") in ENGINE]):
        keys = [n.slice for k in call.keywords for n in ast.walk(k.value) if _is_item(n)]
        key = next((k.value for k in keys if isinstance(k, ast.Constant)), None)
        action = next((ast.unparse(k.value) for k in call.keywords if k.arg == "action"), "")
        for name in _names(call):
            add(name, fields.get(str(key)), action)
    frontend = ast.parse(
        (root / f"vllm/entrypoints/{place}/cli_args.py").read_text(encoding="utf-8")
    )
    for node in frontend.body:
        if isinstance(node, ast.ClassDef) and node.name in FRONTEND:
            for each in node.body:
                if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                    add(each.target.id.replace("_", "-"), each.annotation)
    for call in _added([n for n in frontend.body if getattr(n, "name", "") == "make_arg_parser"]):
        for name in _names(call):
            add(name, None)
    return f"vllm.entrypoints.{place}.cli_args", found


def _added(nodes: list[Any]) -> Iterator[ast.Call]:
    """Calls of `add_argument` in these nodes."""
    for node in nodes:
        for each in ast.walk(node):
            if isinstance(each, ast.Call) and getattr(each.func, "attr", "") == "add_argument":
                yield each


def _names(call: ast.Call) -> list[str]:
    texts = [a.value for a in call.args if isinstance(a, ast.Constant)]
    return [text[2:] for text in texts if isinstance(text, str) and text.startswith("--")]


def _is_item(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript)


def _config_fields(root: Path) -> tuple[dict[str, ast.expr], dict[str, list[str]]]:
    """(annotation by field, choices by the name of a type) of vLLM's config classes."""
    fields: dict[str, ast.expr] = {}
    aliases: dict[str, list[str]] = {}
    for file in sorted((root / "vllm/config").glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                if choices := _choices(node.value, {}):
                    aliases[node.targets[0].id] = choices
            elif isinstance(node, ast.ClassDef):
                for each in node.body:
                    if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                        fields.setdefault(each.target.id, each.annotation)
    return fields, aliases


def _choices(node: ast.expr, aliases: dict[str, list[str]]) -> list[str] | None:
    """The values of a `Literal` in an annotation, or of a type that is named there."""
    for each in ast.walk(node):
        if isinstance(each, ast.Subscript) and ast.unparse(each.value).endswith("Literal"):
            values = each.slice.elts if isinstance(each.slice, ast.Tuple) else [each.slice]
            if all(isinstance(v, ast.Constant) for v in values):
                return [str(ast.literal_eval(v)) for v in values]
    names = [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]
    return next((aliases[name] for name in names if name in aliases), None)


def main(model: str, folders: list[Path]) -> None:
    """Write the table."""
    wanted, table = ours(model), {}
    for folder in folders:
        parser, found = options(folder)
        table[folder.name] = {
            "parser": parser,
            "arguments": {name: found[name] for name in wanted if name in found},
        }
        missing = [name for name in wanted if name not in found]
        print(f"{folder.name}: {len(found)} arguments, without {missing or 'none of ours'}")
    lines = [f"{json.dumps(v)}: {json.dumps(t, sort_keys=True)}" for v, t in table.items()]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], [Path(name) for name in sys.argv[2:]])
