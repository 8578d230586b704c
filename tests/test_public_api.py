"""The names of docs/api.md exist where it says, and say what they are."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys

import pytest

import marlora
from tests.repository import ROOT

ROW = re.compile(r"^\| (`\w+`(?:, `\w+`)*) \| `([\w.]+)` \| (.+) \|$", re.MULTILINE)
NAMES = [
    (module, name)
    for names, module, _ in ROW.findall((ROOT / "docs" / "api.md").read_text())
    for name in re.findall(r"\w+", names)
]


def test_the_page_lists_them() -> None:
    assert 40 <= len(NAMES) == len(set(NAMES))


def test_the_package_names_them_too() -> None:
    """`from marlora import NAME` imports nothing before NAME is asked for."""
    listed = {name: module.removeprefix("marlora.") for module, name in NAMES}
    assert listed == marlora.NAMES, "docs/api.md and .package/__init__.py name the same things"
    assert list(marlora.NAMES) == sorted(marlora.NAMES) and {*marlora.NAMES} <= {*dir(marlora)}
    code = "import sys, marlora; marlora.Chain, marlora.__version__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    with pytest.raises(AttributeError, match="'GRPOTraine'"):
        getattr(marlora, "GRPOTraine")  # noqa: B009


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[name for _, name in NAMES])
def test_a_public_name_is_defined_where_the_page_says(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    assert getattr(marlora, name) is thing
    assert thing.__module__ == module, f"{name} is defined in {thing.__module__}"
    assert (inspect.getdoc(thing) or "").strip(), f"{name} has no docstring"
