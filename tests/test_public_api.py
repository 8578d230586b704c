"""The names of docs/api.md exist where it says, and say what they are."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

from tests.repository import ROOT

ROW = re.compile(r"^\| (`\w+`(?:, `\w+`)*) \| `([\w.]+)` \| (.+) \|$", re.MULTILINE)
NAMES = [
    (module, name)
    for names, module, _ in ROW.findall((ROOT / "docs" / "api.md").read_text())
    for name in re.findall(r"\w+", names)
]


def test_the_page_lists_them() -> None:
    assert 40 <= len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[name for _, name in NAMES])
def test_a_public_name_is_defined_where_the_page_says(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    assert thing.__module__ == module, f"{name} is defined in {thing.__module__}"
    assert (inspect.getdoc(thing) or "").strip(), f"{name} has no docstring"
