"""THIRD_PARTY.md names every package of pyproject.toml with the licence that it has."""

from __future__ import annotations

import re

from tests.third_party import PAGE, licence, packages

ROW = re.compile(r"^\| ([\w.-]+) \| ([^|]+) \| ([^|]+) \|$", re.M)


def test_every_package_stands_there_with_its_licence() -> None:
    rows = {name: (own, what) for name, own, what in ROW.findall(PAGE.read_text(encoding="utf-8"))}
    del rows["Package"]
    written = "run python -m tests.third_party"
    assert {name: what for name, (_, what) in rows.items()} == packages(), written
    for name, (own, _) in rows.items():
        assert licence(name) in (None, own), written
