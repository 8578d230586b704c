"""The arguments that servers are started with, against what every minor version of vLLM in the
range takes: `arguments.json`, which `benchmarks/scripts/vllm_arguments.py` reads from the wheels
of the GPU build."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from marlora.agents.types import AdapterSpec, PolicySpec
from marlora.rollouts.engines.vllm.server_args import (
    PARSE,
    RANKS,
    RESERVED,
    ServerSettings,
    command,
)
from tests.repository import ROOT

TABLE: dict[str, Any] = json.loads(
    Path(__file__).with_name("arguments.json").read_text(encoding="utf-8")
)


def bounds() -> SpecifierSet:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (wanted,) = project["optional-dependencies"]["vllm"]
    return SpecifierSet(wanted.removeprefix("vllm"))


def minors(versions: Iterator[str] | list[str]) -> set[int]:
    return {Version(version).minor for version in versions}


def test_the_table_has_every_minor_version_of_the_range() -> None:
    inside = [version for version in TABLE if version in bounds()]
    least, most = sorted(Version(each.version).minor for each in bounds())
    assert minors(inside) == set(range(least, most))


def commands(model: Path) -> Iterator[list[str]]:
    """Command lines of the GPU build: of every rank, with the modules of adapters named, without
    adapters and without guard, of every dtype."""
    for rank in RANKS:
        shape = AdapterSpec(r=rank, alpha=1.0, targets=("all-linear",))
        yield command(ServerSettings(str(model), model, [PolicySpec("a", adapter=shape)]), 1, False)
    named = AdapterSpec(r=8, alpha=1.0, targets=("q_proj", "v_proj"))
    policies = [PolicySpec("a", adapter=named), PolicySpec("b", adapter=named)]
    for dtype in ("float32", "bfloat16", "float16"):
        settings = ServerSettings(str(model), model, policies=policies, staleness=2, dtype=dtype)
        yield command(settings, 8000, on_cpu=False)
    yield command(
        ServerSettings(str(model), model, guard="", enforce_eager=True, memory=0.4), 1, False
    )


def problems(argv: list[str], known: dict[str, Any]) -> list[str]:
    """What a version's parser would refuse of a command line (after `-m MODULE`)."""
    found, at = [], argv.index("-m") + 2
    while at < len(argv):
        name, equals, value = argv[at].removeprefix("--").partition("=")
        at += 1
        values = [value] if equals else []
        while not equals and at < len(argv) and not argv[at].startswith("--"):
            values, at = [*values, argv[at]], at + 1
        entry = known.get(name) or known.get(name.removeprefix("no-"))
        if entry is None:
            found.append(f"{name}: unknown")
        elif (entry["kind"] == "switch") is bool(values):
            found.append(f"{name}: {entry['kind']}, got {values}")
        elif len(values) > 1 and entry["kind"] != "list":
            found.append(f"{name}: one value, got {values}")
        elif "choices" in entry and set(values) - set(entry["choices"]):
            found.append(f"{name}: one of {entry['choices']}, got {values}")
    return found


@pytest.mark.parametrize("version", TABLE)
def test_every_argument_is_known_and_takes_what_it_gets(version: str, model: Path) -> None:
    lines = list(commands(model))
    assert len(lines) == len(RANKS) + 4
    for argv in lines:
        assert problems(argv, TABLE[version]["arguments"]) == []
    assert set(RESERVED) <= set(TABLE[version]["arguments"])


def test_what_a_version_would_refuse_is_seen() -> None:
    known = {
        "a": {"kind": "switch"},
        "b": {"kind": "value", "choices": ["x", "y"]},
        "c": {"kind": "list"},
    }
    assert problems(["py", "-m", "m", "--no-a", "--b=x", "--c", "1", "2", "--c=3"], known) == []
    wrong = ["py", "-m", "m", "--a=1", "--b=z", "--b", "x", "y", "--d", "--b"]
    assert problems(wrong, known) == [
        "a: switch, got ['1']",
        "b: one of ['x', 'y'], got ['z']",
        "b: one value, got ['x', 'y']",
        "d: unknown",
        "b: value, got []",
    ]


def test_the_parser_is_looked_for_where_each_version_has_it() -> None:
    places = {entry["parser"] for entry in TABLE.values()}
    assert len(places) > 1
    assert all(f"from {place} import make_arg_parser" in PARSE for place in places)
