"""The words of the field: names that say what a thing is, and none that a newcomer has to guess."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repository import ROOMS, ROOT, modules

# Words that fit everything, or that only this project used for what the field has a term for.
REFUSED = {
    "told": "say of what: prompt, statistics, summary",
    "made": "the noun of what was made",
    "found": "the noun of what was found",
    "wanted": "expected, requested, or the noun",
    "aloud": "a warning, or logged",
    "whoever": "name the part",
    "whom": "name the part",
    "mend": "correct, refine, repair",
    "mended": "corrected, refined, repaired",
    "mender": "corrector",
    "door": "gateway, server, route",
    "warden": "init process",
    "keeper": "supervisor",
    "cage": "isolation, sandbox",
    "speakers": "completers",
    "contestants": "variants",
    "gallery": "index",
}
# Names that are another library's, or pinned.
EXCEPTIONS: frozenset[str] = frozenset()


def words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+", name.replace("_", " "))}


def names(path: Path) -> Iterator[tuple[int, str]]:
    """Files, classes, functions and arguments of a file, with the line where each stands."""
    yield 1, path.stem
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, node.name
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg


@pytest.mark.parametrize("path", modules(*ROOMS), ids=str)
def test_names_are_the_fields(path: Path) -> None:
    refused = [
        f"{path}:{line} {name}: {word!r} says nothing; {REFUSED[word]}"
        for line, name in names(path)
        if name not in EXCEPTIONS
        for word in sorted(words(name) & REFUSED.keys())
    ]
    assert not refused, "\n".join(refused)


def test_a_refused_word_is_seen() -> None:
    assert words("_told_so") & REFUSED.keys() == {"told"}
    assert words("TrainedMender") & REFUSED.keys() == {"mender"}
    assert not words("foundation_mixer") & REFUSED.keys()


@pytest.mark.parametrize("path", modules(*ROOMS), ids=str)
def test_every_file_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text()))
    assert docstring and not docstring.startswith("TODO"), f"{path}: no docstring"
